// Scores of weights, as numbers and as integers that sort alike, and a block's way through them.
#pragma once

#include "element.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int INFINITE = 0x7f80'0000;

enum Kind { GIVEN, WEIGHT, HALF };

__device__ __forceinline__ float round_half(float x) { return widen(narrow<f16>(x)); }

// What is scored, and by what.
struct Score {
    const ELEM* weight;
    const float* scale; // of columns; null for none
    const float* grad;  // of elements; null for none
    float alpha;
    int kind;

    __device__ float at(i64 element, i64 column) const {
        const float given = widen(weight[element]);
        if (kind == GIVEN) return given;
        const float size = fabsf(given);
        if (!grad) return scale ? size * scale[column] : size;
        const float slope = fabsf(grad[element]);
        if (kind == HALF) {
            const float product = round_half(round_half(size) * round_half(slope));
            return scale ? size * scale[column] + product : product;
        }
        const float term = alpha * slope;
        return size * (scale ? scale[column] + term : term);
    }

    // An integer in the order of the scores; not a number counts as infinite.
    __device__ int key(i64 element, i64 column, u32& nan) const {
        const u32 bits = __float_as_uint(at(element, column));
        const int magnitude = int(bits & MAGNITUDE);
        if (magnitude > INFINITE) {
            ++nan;
            return INFINITE;
        }
        return kind == GIVEN && bits >> 31 ? -magnitude : magnitude;
    }
};

__device__ __forceinline__ u32 ordered(int key) { return u32(key) ^ 0x8000'0000; }

// A row of weights, or all of them, for a block of threads.
struct Span {
    Score score;
    i64 first, count, columns;

    // Calls `use` with the place and the key of every weight; all threads take as many turns, those
    // past the end with a place of -1.
    template <class Use>
    __device__ void each(u32& nan, Use use) const {
        i64 column = (first + threadIdx.x) % columns;
        const i64 stride = THREADS % columns;
        for (i64 base = 0; base < count; base += THREADS) {
            const i64 place = base + threadIdx.x;
            const bool here = place < count;
            use(here ? place : -1, here ? ordered(score.key(first + place, column, nan)) : 0);
            column += stride;
            if (column >= columns) column -= columns;
        }
    }
};

// The sum over the threads up to this one; every thread of the block takes part.
template <class T>
__device__ __forceinline__ T inclusive_sum(T value, T (&totals)[WARPS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const T before = __shfl_up_sync(FULL_WARP, value, distance);
        if (lane >= distance) value += before;
    }
    if (lane == 31) totals[warp] = value;
    __syncthreads();
    for (int other = 0; other < warp; ++other) value += totals[other];
    __syncthreads();
    return value;
}

// How many ties the threads before this one, and the turns before, have; every thread of the block
// takes part.
__device__ __forceinline__ u32 ties_before(bool tie, u32& seen, u32 (&votes)[WARPS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 vote = __ballot_sync(FULL_WARP, tie);
    if (lane == 0) votes[warp] = __popc(vote);
    __syncthreads();
    u32 before = seen + __popc(vote & ((1u << lane) - 1));
    for (int other = 0; other < WARPS; ++other) {
        if (other < warp) before += votes[other];
        seen += votes[other];
    }
    __syncthreads();
    return before;
}
