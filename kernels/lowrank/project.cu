// Products of a gradient with a basis: R = G P or P^T G (GaLore, arXiv 2403.03507, section 4.1).
// Also every other product of a subspace's refresh. The launches are described in README.md.
#include "basis.cuh"
#include "state.cuh"

#ifndef BASIS_PARTS
#define BASIS_PARTS 2 // halves that stand for one element of the basis on tensor cores
#endif

#if BASIS_BITS == 32
using BasisElement = float;
#else
using BasisElement = u8;
#endif

#if TENSOR && HAS_MMA
template <class T>
struct HalfOf {
    using Type = bf16;
};
template <>
struct HalfOf<f16> {
    using Type = f16;
};
constexpr int ELEM_PARTS = Same<ELEM, f32>::value ? 2 : 1;
using Core = MmaCore<128, 64, 32, HalfOf<ELEM>::Type, ELEM_PARTS, BASIS_PARTS>;
#else
using Core = FmaCore<128, 64>;
#endif

template <bool INNER>
__device__ __forceinline__ void run(Core& core, Core::Shared& shared, const ELEM* a, i64 a_stride,
                                    const BasisElement* b, const float* b_scale,
                                    const u8* b_zero_point, i64 b_stride, i64 b_group_size, i64 m,
                                    i64 n, i64 row, i64 column, i64 first, i64 end) {
    const Dense<ELEM, INNER> left{a, a_stride, m, end};
#if BASIS_BITS == 32
    const Dense<float, false> right{b, b_stride, n, end};
#else
    const Codes<BASIS_BITS, false> right{b, b_scale,  b_zero_point,
                                         b_stride, n, end, b_group_size};
#endif
    multiply_tile(core, shared, left, right, row, column, first, end);
}

// out = A B, A [m, k] with one of its strides 1, B [k, n] by rows, out by rows or by columns. A
// block has a 128 x 64 tile (x: tiles, those of a row first) and one of the runs of k (y); with
// several runs, out is [runs, m * n] and project_reduce adds them up.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, GEMM_BLOCKS)
    project(const ELEM* __restrict__ a, const BasisElement* __restrict__ b,
            const float* __restrict__ b_scale, const u8* __restrict__ b_zero_point,
            float* __restrict__ out, i64 m, i64 n, i64 k, i64 a_row, i64 a_k, i64 b_row,
            i64 b_group_size, int by_columns, i64 k_per_run, const int* flags, int stages) {
    __shared__ Core::Shared shared;
    if (!runs(flags, stages)) return;
    const i64 across = (n + Core::COLUMNS - 1) / Core::COLUMNS;
    const i64 row = blockIdx.x / across * Core::ROWS, column = blockIdx.x % across * Core::COLUMNS;
    const i64 first = blockIdx.y * k_per_run, end = min(k, first + k_per_run);
    Core core;
    if (a_k == 1)
        run<true>(core, shared, a, a_row, b, b_scale, b_zero_point, b_row, b_group_size, m, n, row,
                  column, first, end);
    else
        run<false>(core, shared, a, a_k, b, b_scale, b_zero_point, b_row, b_group_size, m, n, row,
                   column, first, end);
    float* const part = out + blockIdx.y * m * n;
    if (by_columns) core.store_columns(part + column * m + row, m, m - row, n - column);
    else core.store_rows(part + row * n + column, n, m - row, n - column);
}

// out[i] = the sum of parts[run][i] over the runs, in their order. Four elements a thread.
extern "C" __global__ void __launch_bounds__(256)
    project_reduce(const float* __restrict__ parts, float* __restrict__ out, i64 count,
                   int runs_of_k, const int* flags, int stages) {
    if (!runs(flags, stages)) return;
    const i64 first = (i64(blockIdx.x) * 256 + threadIdx.x) * 4, left = count - first;
    if (left <= 0) return;
    float sum[4] = {};
    for (int run = 0; run < runs_of_k; ++run) {
        float part[4];
        load_four(parts + run * count + first, left, part);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += part[j];
    }
    store_four(out + first, left, sum);
}
