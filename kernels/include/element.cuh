// Numbers: integers by their width, the three element types, and their conversions to float32.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

using f32 = float;
struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

template <class T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

constexpr u32 EXPONENT = 0x7f80'0000;
constexpr u32 MAGNITUDE = 0x7fff'ffff;

__device__ __forceinline__ bool is_finite(float x) {
    return (__float_as_uint(x) & EXPONENT) != EXPONENT;
}
__device__ __forceinline__ bool is_nan(float x) {
    return (__float_as_uint(x) & MAGNITUDE) > EXPONENT;
}

__device__ __forceinline__ float widen(f32 x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) {
#ifdef GRADPRESS_EMULATOR
    return cuemu_f16_to_f32(x.bits);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
#endif
}

// Rounds to nearest even. A NaN keeps its sign and leading bits and becomes quiet, as on the CPU;
// the device's own conversions would give one and the same NaN.
template <class T>
__device__ T narrow(float x);

template <>
__device__ __forceinline__ f32 narrow<f32>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
    const u32 bits = __float_as_uint(x);
    const u32 nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {u16(is_nan(x) ? bits >> 16 | 0x40 : nearest)};
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
    u16 nearest;
#ifdef GRADPRESS_EMULATOR
    nearest = cuemu_f32_to_f16_rn(x);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(nearest) : "f"(x));
#endif
    const u32 bits = __float_as_uint(x);
    const u32 quiet = (bits >> 16 & 0x8000) | 0x7e00 | (bits >> 13 & 0x3ff);
    return {is_nan(x) ? u16(quiet) : nearest};
}

// One of the two nearest bfloat16, the one further from zero with the chance that keeps the mean.
// Infinities and NaNs stay; a finite value stays finite.
__device__ __forceinline__ bf16 narrow_stochastic(float x, u32 dither) {
    const u32 bits = __float_as_uint(x);
    const u32 dropped = (bits + dither) >> 16;
    // A carry out of the largest finite value would make an infinity.
    const u32 finite = (dropped & 0x7fff) == 0x7f80 ? dropped - 1 : dropped;
    const u32 special = bits >> 16 | (is_nan(x) ? 0x40 : 0);
    return {u16(is_finite(x) ? finite : special)};
}

// Four consecutive elements, moved by one instruction where the address allows it.
template <class T>
struct alignas(4 * sizeof(T)) Four {
    T values[4];
};

template <class T>
__device__ __forceinline__ bool is_aligned(const void* at) {
    return reinterpret_cast<u64>(at) % alignof(T) == 0;
}

// How many of the four elements from `element` on there are.
__device__ __forceinline__ int left_of(i64 numel, i64 element) {
    return int(max(min(numel - element, i64(4)), i64(0)));
}

// Elements beyond the first `left` are not touched and read as zero.
template <class T>
__device__ __forceinline__ void load_four(const T* at, int left, float (&values)[4]) {
    if (left >= 4 && is_aligned<Four<T>>(at)) {
        const Four<T> four = *reinterpret_cast<const Four<T>*>(at);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = widen(four.values[j]);
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = j < left ? widen(at[j]) : 0.0f;
    }
}

template <class T>
__device__ __forceinline__ void store_four(T* at, int left, const T (&values)[4]) {
    if (left >= 4 && is_aligned<Four<T>>(at)) {
        *reinterpret_cast<Four<T>*>(at) = {values[0], values[1], values[2], values[3]};
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j < left) at[j] = values[j];
    }
}
