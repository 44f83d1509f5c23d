// How much of a step is taken, by how much the gradient has changed (src/optim/cpu.rs).
#pragma once

#include "element.cuh"

// In float32 arithmetic alone, with the CPU's bits.
__device__ __forceinline__ float exp_of(float x) {
    const float rounder = 12582912.0f;
    const float shifted = x * 1.44269504f + rounder;
    const float n = shifted - rounder;
    const float r = x - n * 0.6933594f - n * -2.1219444e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    const u32 power = (__float_as_uint(shifted) - __float_as_uint(rounder) + 127u) << 23;
    return (p * r * r + r + 1.0f) * __uint_as_float(power);
}

struct Friction {
    u32 mask; // the bits of the difference that count
    float slope, height, base;

    __device__ float of(float difference) const {
        float x = __uint_as_float(__float_as_uint(difference) & mask) * slope;
        x = x < 87.0f ? x : 87.0f;
        x = x > -87.0f ? x : -87.0f;
        return height * (1.0f / (1.0f + exp_of(-x))) + base;
    }
};
