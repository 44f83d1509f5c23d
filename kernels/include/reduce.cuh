// Largest values of lanes, and sums for counters.
#pragma once

#include "element.cuh"

constexpr u32 FULL_WARP = 0xffff'ffff;
constexpr int MAX_WARPS = 8; // of a block; every kernel here has at most 256 threads

// The largest value of each `lanes` neighbouring lanes, a power of two.
__device__ __forceinline__ u32 max_of_lanes(u32 value, int lanes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if (lanes == 32) return __reduce_max_sync(FULL_WARP, value);
#endif
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        if (distance < lanes) value = max(value, __shfl_xor_sync(FULL_WARP, value, distance));
    return value;
}

// Adds what the lanes of a warp counted to `total`, unless that is null.
__device__ __forceinline__ void add_to_counter(u64* total, u32 count) {
    if (!__any_sync(FULL_WARP, count != 0)) return; // nearly always
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        count += __shfl_xor_sync(FULL_WARP, count, distance);
    if (total && threadIdx.x % 32 == 0) atomicAdd(total, u64(count));
}
