// The integer grid of a group: its range, its scale, and rounding onto it (src/quant/grid.rs).
#pragma once

#include "element.cuh"

struct Format {
    __device__ Format(int bits, bool symmetric)
        : low(symmetric ? 1 - (1 << (bits - 1)) : 0),
          high(symmetric ? (1 << (bits - 1)) - 1 : (1 << bits) - 1),
          offset(symmetric && bits == 4 ? 8 : 0), symmetric(symmetric) {}

    // A stored code as a number; nibbles have an offset, bytes a sign.
    __device__ int code(u32 stored) const {
        return symmetric && offset == 0 ? int(stored << 24) >> 24 : int(stored) - offset;
    }
    __device__ u32 stored(int code) const { return u32(code + offset); }

    int low, high;
    int offset;
    bool symmetric;
};

// Extremes of a group's finite values, zero included. As a signed integer a float's pattern grows
// with a positive value, as an unsigned one with a negative value's distance from zero, so both are
// found as the largest unsigned patterns: highest of values without a sign, lowest of all.
struct Range {
    float low, high;

    __device__ static Range of(u32 highest, u32 lowest) {
        return {lowest >> 31 ? __uint_as_float(lowest) : 0.0f, __uint_as_float(highest)};
    }

    // NaN becomes zero, the infinities the extremes.
    __device__ float sanitize(float x) const {
        if (is_finite(x)) return x;
        return is_nan(x) ? 0.0f : x > 0 ? high : low;
    }
};

__device__ __forceinline__ void extend(u32& highest, u32& lowest, float x) {
    const u32 bits = __float_as_uint(x);
    highest = u32(max(int(highest), int(bits)));
    lowest = max(lowest, bits);
}

// Highest and lowest of the finite among each quad's values; returns how many are not finite.
__device__ __forceinline__ u32 extremes(const float (&x)[2][4], u32 (&out)[2][2]) {
    u32 nonfinite = 0;
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        out[quad][0] = out[quad][1] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) extend(out[quad][0], out[quad][1], x[quad][j]);
        nonfinite += out[quad][0] >= EXPONENT || out[quad][1] >= (0x8000'0000 | EXPONENT);
    }
    if (nonfinite == 0) return 0;
    nonfinite = 0;
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        out[quad][0] = out[quad][1] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (is_finite(x[quad][j])) extend(out[quad][0], out[quad][1], x[quad][j]);
            else ++nonfinite;
        }
    }
    return nonfinite;
}

// Round half to even, for magnitudes below 2^22: the low bits of the sum are the integer.
__device__ __forceinline__ int nearest(float x) {
    constexpr float MAGIC = 12'582'912.0f; // 1.5 * 2^23
    return __float_as_int(x + MAGIC) - __float_as_int(MAGIC);
}

// value = (code - zero_point) * scale
struct Grid {
    float scale;
    int zero_point;

    // The finest grid that covers `range`.
    __device__ static Grid covering(Range range, Format format) {
        float scale;
        if (format.symmetric) {
            scale = fmaxf(range.high, -range.low) / float(format.high);
        } else {
            // Dividing first keeps the difference of huge extremes finite.
            const float steps = float(format.high);
            scale = range.high / steps - range.low / steps;
        }
        if (scale == 0.0f && range.low == 0.0f && range.high == 0.0f) return {1.0f, 0};
        // Below the smallest normal number the inverse overflows.
        scale = fmaxf(scale, 1.17549435e-38f);
        if (format.symmetric) return {scale, 0};
        return {scale, min(max(nearest(-range.low / scale), 0), format.high)};
    }

    __device__ float value(int code) const { return float(code - zero_point) * scale; }

    // Codes of finite values; `inverse` is 1 / scale.
    __device__ int round_nearest(float x, float inverse, Format format) const {
        return min(max(nearest(x * inverse) + zero_point, format.low), format.high);
    }

    // Up or down, up with the chance that keeps the mean. A value counts in 65536ths of a step;
    // dithers keep as far from both ends as dividing by a rounded scale may have moved a value off
    // its grid, so that a value which lies on the grid stays. Codes of 4 bits are too small for
    // that to reach a 65536th.
    template <int BITS>
    __device__ int round_stochastic(float x, float inverse, u32 dither, Format format) const {
        const int parts = __float2int_rn(x * inverse * 65536.0f);
        int shift = int(dither);
        if constexpr (BITS == 8) {
            const int slack = abs(parts) >> 21;
            shift = min(max(shift, slack), 0xffff - slack);
        }
        const int code = (parts + shift + (zero_point << 16)) >> 16;
        return min(max(code, format.low), format.high);
    }
};

// Member by member, so that neither needs an address.
__device__ __forceinline__ Grid choose(bool first, Grid a, Grid b) {
    return {first ? a.scale : b.scale, first ? a.zero_point : b.zero_point};
}
__device__ __forceinline__ Range choose(bool first, Range a, Range b) {
    return {first ? a.low : b.low, first ? a.high : b.high};
}
