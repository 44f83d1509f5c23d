// Atomics, cached loads and stores, fences. Threads switch at collectives only, so a plain
// read-modify-write is atomic here.
#pragma once

// Macros, so that the checks of null and misaligned pointers name the kernel's line, not ours.
#define atomicAdd(address, ...) ::cuemu::atomic_add(*(address), __VA_ARGS__)
#define atomicSub(address, ...) ::cuemu::atomic_sub(*(address), __VA_ARGS__)
#define atomicMax(address, ...) ::cuemu::atomic_max(*(address), __VA_ARGS__)
#define atomicMin(address, ...) ::cuemu::atomic_min(*(address), __VA_ARGS__)
#define atomicAnd(address, ...) ::cuemu::atomic_and(*(address), __VA_ARGS__)
#define atomicOr(address, ...) ::cuemu::atomic_or(*(address), __VA_ARGS__)
#define atomicXor(address, ...) ::cuemu::atomic_xor(*(address), __VA_ARGS__)
#define atomicInc(address, ...) ::cuemu::atomic_inc(*(address), __VA_ARGS__)
#define atomicDec(address, ...) ::cuemu::atomic_dec(*(address), __VA_ARGS__)
#define atomicExch(address, ...) ::cuemu::atomic_exch(*(address), __VA_ARGS__)
#define atomicCAS(address, ...) ::cuemu::atomic_cas(*(address), __VA_ARGS__)

// Cache hints mean nothing here.
#define __ldg(...) ::cuemu::load(*(__VA_ARGS__))
#define __ldca(...) ::cuemu::load(*(__VA_ARGS__))
#define __ldcg(...) ::cuemu::load(*(__VA_ARGS__))
#define __ldcs(...) ::cuemu::load(*(__VA_ARGS__))
#define __ldlu(...) ::cuemu::load(*(__VA_ARGS__))
#define __ldcv(...) ::cuemu::load(*(__VA_ARGS__))
#define __stwb(address, ...) ::cuemu::store(*(address), __VA_ARGS__)
#define __stcg(address, ...) ::cuemu::store(*(address), __VA_ARGS__)
#define __stcs(address, ...) ::cuemu::store(*(address), __VA_ARGS__)
#define __stwt(address, ...) ::cuemu::store(*(address), __VA_ARGS__)

namespace cuemu {

using u64 = unsigned long long;

// The value is converted to the type of the memory, as CUDA's overloads do.
template <class T>
using Like = std::enable_if_t<true, T>;

template <class T>
T load(const T& memory) {
    return memory;
}
template <class T>
void store(T& memory, Like<T> value) {
    memory = value;
}

// Puts a value in and returns the one before. Refuses types that CUDA has no overload for.
template <class... Allowed, class T>
T replace(T& memory, Like<T> value) {
    static_assert((std::is_same_v<T, Allowed> || ...), "CUDA has no such atomic for this type");
    const T old = memory;
    memory = value;
    return old;
}

template <class T>
T atomic_add(T& memory, Like<T> value) {
    if constexpr (std::is_same_v<T, int>) // wraps, which is undefined for signed types in C++
        return replace<int>(memory, int(unsigned(memory) + unsigned(value)));
    else
        return replace<unsigned, u64, float, double>(memory, memory + value);
}
template <class T>
T atomic_sub(T& memory, Like<T> value) {
    return replace<int, unsigned>(memory, T(unsigned(memory) - unsigned(value)));
}
template <class T>
T atomic_max(T& memory, Like<T> value) {
    return replace<int, unsigned, long long, u64>(memory, memory < value ? value : memory);
}
template <class T>
T atomic_min(T& memory, Like<T> value) {
    return replace<int, unsigned, long long, u64>(memory, value < memory ? value : memory);
}
template <class T>
T atomic_and(T& memory, Like<T> value) {
    return replace<int, unsigned, u64>(memory, memory & value);
}
template <class T>
T atomic_or(T& memory, Like<T> value) {
    return replace<int, unsigned, u64>(memory, memory | value);
}
template <class T>
T atomic_xor(T& memory, Like<T> value) {
    return replace<int, unsigned, u64>(memory, memory ^ value);
}
template <class T>
T atomic_inc(T& memory, Like<T> limit) {
    return replace<unsigned>(memory, memory >= limit ? 0 : memory + 1);
}
template <class T>
T atomic_dec(T& memory, Like<T> limit) {
    return replace<unsigned>(memory, memory == 0 || memory > limit ? limit : memory - 1);
}
template <class T>
T atomic_exch(T& memory, Like<T> value) {
    return replace<int, unsigned, u64, float>(memory, value);
}
template <class T>
T atomic_cas(T& memory, Like<T> expected, Like<T> value) {
    return replace<int, unsigned, u64, unsigned short>(memory, memory == expected ? value : memory);
}

} // namespace cuemu

// Nothing else runs between two collectives, so memory is always in order.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}

inline long long clock64() { return 0; } // measures nothing
