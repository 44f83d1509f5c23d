// What happens to a weight in an optimizer's step (quant::update::Change of the CPU).
#pragma once

#include "flag.cuh"
#include "grid.cuh"
#include "pack.cuh"
#include "philox.cuh"
#include "reduce.cuh"

// weight * keep + alpha * update. An update that is not finite counts as zero, and so does the
// decay then. Two roundings, as on the CPU: the intrinsics are never contracted.
struct Change {
    float keep, alpha;

    __device__ __forceinline__ float apply(float old, float update) const {
        const float next = __fadd_rn(__fmul_rn(old, keep), __fmul_rn(alpha, update));
        return fabsf(next) < __uint_as_float(EXPONENT) ? next : old;
    }
};

// Not zero where a value changes. Adding zero turns -0 into 0, which is no change.
__device__ __forceinline__ u32 difference(float old, float next) {
    return __float_as_uint(next + 0.0f) ^ __float_as_uint(old + 0.0f);
}

// A quantized weight; groups are consecutive elements, row by row.
struct Weight {
    u8* codes;
    float* scale;
    u8* zero_point; // null: symmetric codes
    i64 group_size;
    int bits;

    // Elements that share no byte with others.
    __device__ i64 run() const {
        return bits == 4 && group_size % 2 == 1 ? 2 * group_size : group_size;
    }
    __device__ Format format() const { return Format(bits, zero_point == nullptr); }
    __device__ float value(i64 element, Grid grid, Format format) const {
        return grid.value(format.code(load_code(codes, element, bits)));
    }
    __device__ Grid load(i64 group) const {
        return {scale[group], zero_point ? int(zero_point[group]) : 0};
    }
    __device__ void store(i64 group, Grid grid) const {
        scale[group] = grid.scale;
        if (zero_point) zero_point[group] = u8(grid.zero_point);
    }
};

// The dithers of one tensor; without them rounding is to nearest even.
struct Rounding {
    Key key;
    int stochastic;

    __device__ __forceinline__ u32 code(float value, Grid grid, float inverse, Format format,
                                        Dithers& dithers, i64 element) const {
        // The rule for 8 bits holds for 4 as well, whose slack is always zero.
        return format.stored(stochastic ? grid.round_stochastic<8>(value, inverse,
                                                                   dithers.at(element), format)
                                        : grid.round_nearest(value, inverse, format));
    }
};
