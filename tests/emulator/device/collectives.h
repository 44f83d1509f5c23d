// Barriers, shuffles and votes.
#pragma once

// The static object is what threads meet at; its address tells one call from all others.
#define CUEMU_SITE(name) \
    ([]() -> const ::cuemu::Site& { \
        static constexpr ::cuemu::Site site{name, __FILE__, __LINE__}; \
        return site; \
    }())

namespace cuemu {

inline int syncthreads_or(const Site& site, int predicate) {
    return block_barrier(site, predicate != 0) != 0;
}
inline int syncthreads_and(const Site& site, int predicate) {
    return block_barrier(site, predicate == 0) == 0;
}
inline int syncthreads_count(const Site& site, int predicate) {
    return int(block_barrier(site, predicate != 0));
}

struct Syncwarp { // a macro cannot drop the comma after the site when no mask follows
    const Site& site;
    void operator()(unsigned mask = 0xffffffffu) const { warp_barrier(site, mask); }
};

inline int any_sync(const Site& site, unsigned mask, int predicate) {
    return ballot(site, mask, predicate != 0) != 0;
}
inline int all_sync(const Site& site, unsigned mask, int predicate) {
    return ballot(site, mask, predicate == 0) == 0;
}
inline unsigned ballot_sync(const Site& site, unsigned mask, int predicate) {
    return ballot(site, mask, predicate != 0);
}

template <class T>
uint64_t to_bits(T value) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "CUDA exchanges 4- and 8-byte numbers only");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
unsigned match_any_sync(const Site& site, unsigned mask, T value) {
    return match(site, mask, to_bits(value));
}

// Small integers are promoted, as the overloads of CUDA would.
template <class T>
using Promoted = decltype(+T());

template <class T>
Promoted<T> exchange_as(const Site& site, unsigned mask, Promoted<T> value, unsigned source) {
    return from_bits<Promoted<T>>(exchange(site, mask, to_bits(value), source));
}

inline unsigned check_width(const Site& site, int width) {
    if (width < 1 || width > 32 || (width & (width - 1)))
        fail("%s (%s:%d): width %d is not a power of two up to 32", site.name, file_name(site.file),
             site.line, width);
    return unsigned(width);
}

// Which lane is read, or the own one where CUDA says so: PTX ISA, shfl.sync.
template <class T>
Promoted<T> shfl(const Site& site, unsigned mask, T value, int source, int width = 32) {
    const unsigned within = check_width(site, width) - 1;
    return exchange_as<T>(site, mask, value, (lane_id() & ~within) | (unsigned(source) & within));
}
template <class T>
Promoted<T> shfl_up(const Site& site, unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned within = check_width(site, width) - 1, lane = lane_id();
    delta &= 31;
    return exchange_as<T>(site, mask, value, (lane & within) >= delta ? lane - delta : lane);
}
template <class T>
Promoted<T> shfl_down(const Site& site, unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned within = check_width(site, width) - 1, lane = lane_id();
    delta &= 31;
    const unsigned source = (lane & within) + delta <= within ? lane + delta : lane;
    return exchange_as<T>(site, mask, value, source);
}
template <class T>
Promoted<T> shfl_xor(const Site& site, unsigned mask, T value, int lane_mask, int width = 32) {
    const unsigned within = check_width(site, width) - 1, lane = lane_id();
    const unsigned source = lane ^ (unsigned(lane_mask) & 31);
    // Earlier groups of `width` lanes can be read, later ones cannot.
    return exchange_as<T>(site, mask, value, source <= (lane | within) ? source : lane);
}

template <class T, class Operation>
T reduce(const Site& site, unsigned mask, T value, Operation) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "int or unsigned");
    return from_bits<T>(fold(site, mask, to_bits(value), [](uint64_t a, uint64_t b) {
        return to_bits(Operation()(from_bits<T>(a), from_bits<T>(b)));
    }));
}

struct Add {
    int operator()(int a, int b) const { return int(unsigned(a) + unsigned(b)); }
    unsigned operator()(unsigned a, unsigned b) const { return a + b; }
};
struct Min {
    template <class T>
    T operator()(T a, T b) const { return b < a ? b : a; }
};
struct Max {
    template <class T>
    T operator()(T a, T b) const { return a < b ? b : a; }
};
struct And {
    unsigned operator()(unsigned a, unsigned b) const { return a & b; }
};
struct Or {
    unsigned operator()(unsigned a, unsigned b) const { return a | b; }
};
struct Xor {
    unsigned operator()(unsigned a, unsigned b) const { return a ^ b; }
};

} // namespace cuemu

#define __syncthreads() void(::cuemu::block_barrier(CUEMU_SITE("__syncthreads"), false))
#define __syncthreads_or(predicate) \
    ::cuemu::syncthreads_or(CUEMU_SITE("__syncthreads_or"), predicate)
#define __syncthreads_and(predicate) \
    ::cuemu::syncthreads_and(CUEMU_SITE("__syncthreads_and"), predicate)
#define __syncthreads_count(predicate) \
    ::cuemu::syncthreads_count(CUEMU_SITE("__syncthreads_count"), predicate)

#define __syncwarp(...) (::cuemu::Syncwarp{CUEMU_SITE("__syncwarp")}(__VA_ARGS__))
#define __any_sync(...) ::cuemu::any_sync(CUEMU_SITE("__any_sync"), __VA_ARGS__)
#define __all_sync(...) ::cuemu::all_sync(CUEMU_SITE("__all_sync"), __VA_ARGS__)
#define __ballot_sync(...) ::cuemu::ballot_sync(CUEMU_SITE("__ballot_sync"), __VA_ARGS__)
#define __match_any_sync(...) ::cuemu::match_any_sync(CUEMU_SITE("__match_any_sync"), __VA_ARGS__)
#define __activemask() ::cuemu::active_mask(CUEMU_SITE("__activemask"))

#define __shfl_sync(...) ::cuemu::shfl(CUEMU_SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) ::cuemu::shfl_up(CUEMU_SITE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) ::cuemu::shfl_down(CUEMU_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) ::cuemu::shfl_xor(CUEMU_SITE("__shfl_xor_sync"), __VA_ARGS__)

#define CUEMU_REDUCE(name, mask, value, operation) \
    ::cuemu::reduce(CUEMU_SITE(name), mask, value, ::cuemu::operation())
#define __reduce_add_sync(mask, value) CUEMU_REDUCE("__reduce_add_sync", mask, value, Add)
#define __reduce_min_sync(mask, value) CUEMU_REDUCE("__reduce_min_sync", mask, value, Min)
#define __reduce_max_sync(mask, value) CUEMU_REDUCE("__reduce_max_sync", mask, value, Max)
#define __reduce_and_sync(mask, value) CUEMU_REDUCE("__reduce_and_sync", mask, value, And)
#define __reduce_or_sync(mask, value) CUEMU_REDUCE("__reduce_or_sync", mask, value, Or)
#define __reduce_xor_sync(mask, value) CUEMU_REDUCE("__reduce_xor_sync", mask, value, Xor)
