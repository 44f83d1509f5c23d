// Arithmetic as the device does it: named roundings, saturating conversions, bit operations.
// Compiled without contraction and without fast-math, so + - * / and sqrt are the device's bits.
// exp, log, sin and their kin are the C library's: near the device's, not equal to them.
#pragma once

// Reinterpretation.
#define CUEMU_BITS(name, From, To) \
    inline To name(From value) { \
        To result; \
        memcpy(&result, &value, sizeof result); \
        return result; \
    }
CUEMU_BITS(__float_as_int, float, int)
CUEMU_BITS(__float_as_uint, float, unsigned)
CUEMU_BITS(__int_as_float, int, float)
CUEMU_BITS(__uint_as_float, unsigned, float)
CUEMU_BITS(__double_as_longlong, double, long long)
CUEMU_BITS(__longlong_as_double, long long, double)
#undef CUEMU_BITS

// One rounding each, to nearest even.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// Twice the digits leave the second rounding no chance to matter but at a tie, and no root is one.
inline float __frsqrt_rn(float a) { return float(1.0 / sqrt(double(a))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

namespace cuemu {

// cvt.<integer>.<float>: beyond the range the nearest end, NaN is 0 (in 64 bits the top bit).
template <class Integer, class Float>
Integer saturate(Float rounded) {
    constexpr bool is_signed = std::is_signed_v<Integer>;
    constexpr int digits = sizeof(Integer) * 8 - is_signed;
    const Float limit = Float(uint64_t(1) << (digits - 1)) * 2;
    constexpr Integer top = Integer(~uint64_t(0) >> (64 - digits));
    constexpr Integer bottom = is_signed ? Integer(-top - 1) : Integer(0);
    if (rounded != rounded) return sizeof(Integer) == 4 ? 0 : Integer(uint64_t(1) << 63);
    if (rounded >= limit) return top;
    if (rounded < (is_signed ? -limit : Float(0))) return bottom;
    return Integer(rounded);
}

} // namespace cuemu

#define CUEMU_CONVERSIONS(name, Float, Integer, nearest, down, up, zero) \
    inline Integer __##name##_rn(Float a) { return ::cuemu::saturate<Integer>(nearest(a)); } \
    inline Integer __##name##_rd(Float a) { return ::cuemu::saturate<Integer>(down(a)); } \
    inline Integer __##name##_ru(Float a) { return ::cuemu::saturate<Integer>(up(a)); } \
    inline Integer __##name##_rz(Float a) { return ::cuemu::saturate<Integer>(zero(a)); }
CUEMU_CONVERSIONS(float2int, float, int, rintf, floorf, ceilf, truncf)
CUEMU_CONVERSIONS(float2uint, float, unsigned, rintf, floorf, ceilf, truncf)
CUEMU_CONVERSIONS(float2ll, float, long long, rintf, floorf, ceilf, truncf)
CUEMU_CONVERSIONS(float2ull, float, unsigned long long, rintf, floorf, ceilf, truncf)
CUEMU_CONVERSIONS(double2int, double, int, rint, floor, ceil, trunc)
CUEMU_CONVERSIONS(double2ll, double, long long, rint, floor, ceil, trunc)
#undef CUEMU_CONVERSIONS

inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
inline float __ll2float_rn(long long a) { return float(a); }
inline float __ull2float_rn(unsigned long long a) { return float(a); }
inline float __double2float_rn(double a) { return float(a); }

// The other operand where one is NaN; +0 counts as more than -0.
inline float cuemu_fmaxf(float a, float b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return signbit(a) ? b : a;
    return a > b ? a : b;
}
inline float cuemu_fminf(float a, float b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return signbit(a) ? a : b;
    return a < b ? a : b;
}
#define fmaxf cuemu_fmaxf
#define fminf cuemu_fminf

#define CUEMU_MIN_MAX(T, A, B) \
    inline T min(A first, B second) { \
        const T a = first, b = second; \
        return b < a ? b : a; \
    } \
    inline T max(A first, B second) { \
        const T a = first, b = second; \
        return a < b ? b : a; \
    }
CUEMU_MIN_MAX(int, int, int)
CUEMU_MIN_MAX(unsigned, unsigned, unsigned)
CUEMU_MIN_MAX(unsigned, int, unsigned)
CUEMU_MIN_MAX(unsigned, unsigned, int)
CUEMU_MIN_MAX(long, long, long)
CUEMU_MIN_MAX(unsigned long, unsigned long, unsigned long)
CUEMU_MIN_MAX(long long, long long, long long)
CUEMU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef CUEMU_MIN_MAX
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }

// Bits.
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll((unsigned long long)(a)) : 64; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline unsigned __brev(unsigned a) {
    unsigned result = 0;
    for (int bit = 0; bit < 32; ++bit) result |= (a >> bit & 1) << (31 - bit);
    return result;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int byte = 0; byte < 4; ++byte)
        result |= unsigned(bytes >> (selector >> byte * 4 & 7) * 8 & 0xff) << byte * 8;
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}

// The high half of a product.
inline int __mulhi(int a, int b) { return int((long long)(a)*b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline long long __mul64hi(long long a, long long b) { return (long long)(__int128(a) * b >> 64); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)(a)*b >> 64);
}

// Near the device's value, not its bits.
inline float rsqrtf(float a) { return __frsqrt_rn(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0 ? fminf(a, 1.0f) : 0.0f; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
