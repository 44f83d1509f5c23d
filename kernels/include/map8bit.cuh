// The dynamic maps of 8 bits (src/quant/dynamic/mod.rs): codes to values in [-1, 1] and back. The
// tables lie in shared memory, where a warp reads different entries at once.
#pragma once

#include "element.cuh"
#include "map_tables.cuh"

// Every thread of the block takes part in `load`; a barrier has to follow.
struct DecodeMap8 {
    __device__ void load(bool is_signed) {
        for (u32 i = threadIdx.x; i < 256; i += blockDim.x) values[i] = MAP8_VALUES[is_signed][i];
    }
    // In a block of scale 1.
    __device__ float value(u32 code) const { return values[code]; }

    float values[256];
};

// Entries below 1 come in decades, evenly spaced inside each; the entry 1 is a decade of its own,
// and so is zero, the first. In one binade at most one decade begins.
struct EncodeMap8 {
    __device__ void load(bool is_signed) {
        for (u32 i = threadIdx.x; i < 32; i += blockDim.x) binades[i] = MAP8_BINADES[is_signed][i];
        for (u32 i = threadIdx.x; i < 9; i += blockDim.x) decades[i] = MAP8_DECADES[is_signed][i];
        if (threadIdx.x == 0) zero = is_signed ? 127 : 0;
    }
    // The entry nearest to `x`, which is at most 1 in magnitude.
    __device__ u32 code(float x) const {
        const float magnitude = fabsf(x);
        // Everything below 2^-31 counts as the first binade.
        const u32 exponent = __float_as_uint(magnitude) >> 23;
        const Binade binade = binades[min(max(exponent, 96u), 127u) - 96];
        const Decade decade = decades[binade.below + (magnitude > binade.from)];
        const float steps = fminf(magnitude * decade.slope + decade.offset, decade.cap);
        const int place = max(__float2int_rz(steps), decade.least);
        // The map with a sign has no -1; the one without has no values below zero.
        return u32(x < 0 && zero ? zero - min(place, 127) : zero + place);
    }

    Binade binades[32];
    Decade decades[9];
    int zero;
};
