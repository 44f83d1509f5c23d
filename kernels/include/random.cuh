// Random matrices: bounded, symmetric numbers of variance one (`random` in src/lowrank/range.rs).
#pragma once

#include "philox.cuh"

__device__ __forceinline__ float random_of_dither(u32 dither) {
    constexpr float UNIT = 3.46410161513775459f / 65536.0f; // the root of 12
    return (float(dither) - 32767.5f) * UNIT;
}

__device__ __forceinline__ float random_at(Key key, i64 element) {
    return random_of_dither(Dithers(key).at(element));
}
