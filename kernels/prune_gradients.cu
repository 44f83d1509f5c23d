// Gradients of single samples, added up as their sizes or squares. Bit-equal to the CPU: a product
// or two and a sum for each element.
#include "element.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int EACH = 2048; // elements of a block

extern "C" __global__ void __launch_bounds__(THREADS)
    accumulate_gradients(float* __restrict__ total, const ELEM* __restrict__ part,
                         u64* __restrict__ nonfinite, float scale, int squared, i64 numel) {
    const i64 first = i64(blockIdx.x) * EACH;
    u32 count = 0;
#pragma unroll
    for (int turn = 0; turn < EACH / (4 * THREADS); ++turn) {
        const i64 element = first + 4 * (i64(turn) * THREADS + threadIdx.x);
        const int left = left_of(numel, element);
        if (left == 0) continue;
        float sums[4], values[4];
        load_four(total + element, left, sums);
        load_four(part + element, left, values);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float value = scale * values[j];
            const float term = squared ? value * value : fabsf(value);
            const bool good = is_finite(term);
            count += !good;
            sums[j] += good ? term : 0.0f;
        }
        store_four(total + element, left, sums);
    }
    add_to_counter(nonfinite, count);
}
