// The maps of 4 bits (src/quant/dynamic/four.rs): with a sign the dynamic map with three exponent
// bits, without one sixteenths from 1/16 on.
#pragma once

#include "element.cuh"
#include "map_tables.cuh"

// Every thread of the block takes part in `load`; a barrier has to follow.
struct DecodeMap4 {
    __device__ void load(bool is_signed) {
        for (u32 i = threadIdx.x; i < 16; i += blockDim.x) values[i] = MAP4_VALUES[is_signed][i];
    }
    // In a block of scale 1.
    __device__ float value(u32 code) const { return values[code]; }

    float values[16];
};

struct EncodeMap4 {
    __device__ void load(bool is_signed) {
        for (u32 i = threadIdx.x; i < 15; i += blockDim.x) middles[i] = MAP4_MIDDLES[i];
        if (threadIdx.x == 0) has_sign = is_signed;
    }
    // The entry nearest to `x`, which is at most 1 in magnitude: how many middles lie below it.
    __device__ u32 code(float x) const {
        if (!has_sign) return u32(__float2int_rz(fminf(fmaxf(x * 16.0f - 0.5f, 0.0f), 15.0f)));
        u32 below = 0;
#pragma unroll
        for (u32 step = 8; step > 0; step /= 2)
            if (x > middles[below + step - 1]) below += step;
        return below;
    }

    float middles[15];
    bool has_sign;
};
