// The second-order method's block of columns (SparseGPT): weights go one column after the other, and
// the later columns of the block make up for them. Every product and sum is that of the CPU.
#include "element.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int INFINITE = 0x7f80'0000;
constexpr int NARROW = 128, WIDE = 256; // columns of a block of the two kernels

// A warp for each row: lane l has columns l, l + 32, ... in registers.
template <int COLUMNS>
__device__ __forceinline__ void prune_row(float* weight, const float* factor, u8* mask,
                                          float* errors, float* loss, int width, int size,
                                          int drop, int* keys) {
    constexpr int EACH_LANE = COLUMNS / 32;
    const int lane = threadIdx.x % 32;
    float values[EACH_LANE];
    bool kept[EACH_LANE];
#pragma unroll
    for (int k = 0; k < EACH_LANE; ++k) {
        const int column = 32 * k + lane;
        values[k] = column < width ? weight[column] : 0.0f;
        kept[k] = column < width && size == 0 && mask[column];
    }
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < EACH_LANE; ++part) {
        for (int source = 0; source < 32; ++source) {
            const int i = 32 * part + source;
            if (i >= width) break;
            if (size > 0 && i % size == 0) {
#pragma unroll
                for (int k = 0; k < EACH_LANE; ++k) {
                    const int column = 32 * k + lane;
                    if (column < i || column >= i + size) continue;
                    const float inverse = 1.0f / factor[i64(column) * width + column];
                    const u32 bits = __float_as_uint(fabsf(values[k]) * inverse);
                    keys[column] = min(int(bits & MAGNITUDE), INFINITE);
                }
                __syncwarp();
#pragma unroll
                for (int k = 0; k < EACH_LANE; ++k) {
                    const int column = 32 * k + lane;
                    if (column < i || column >= i + size) continue;
                    const int own = keys[column];
                    int before = 0;
                    for (int j = i; j < i + size; ++j)
                        before += keys[j] < own || (keys[j] == own && j < column);
                    kept[k] = before >= drop;
                }
                __syncwarp();
            }
            const float value = __shfl_sync(FULL_WARP, values[part], source);
            const bool keep = __shfl_sync(FULL_WARP, int(kept[part]), source);
            const float* row = factor + i64(i) * width;
            const float error = keep ? 0.0f : value / row[i];
            sum += error * error;
            if (lane == source) {
                errors[i] = error;
                mask[i] = keep;
                if (!keep) values[part] = 0.0f;
            }
            if (keep || error == 0.0f) continue;
#pragma unroll
            for (int k = part; k < EACH_LANE; ++k) {
                const int column = 32 * k + lane;
                if (column > i && column < width) values[k] -= error * row[column];
            }
        }
    }
#pragma unroll
    for (int k = 0; k < EACH_LANE; ++k)
        if (32 * k + lane < width) weight[32 * k + lane] = values[k];
    if (lane == 0) *loss = sum;
}

template <int COLUMNS>
__device__ __forceinline__ void prune_rows(float* weight, const float* factor, u8* mask,
                                           float* errors, float* loss, i64 rows, int width,
                                           int size, int drop) {
    __shared__ int keys[WARPS][COLUMNS];
    const int warp = threadIdx.x / 32;
    const i64 row = i64(blockIdx.x) * WARPS + warp;
    if (row >= rows) return;
    const i64 first = row * width;
    prune_row<COLUMNS>(weight + first, factor, mask + first, errors + first, loss + row, width,
                       size, drop, keys[warp]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    prune_columns(float* __restrict__ weight, const float* __restrict__ factor,
                  u8* __restrict__ mask, float* __restrict__ errors, float* __restrict__ loss,
                  i64 rows, int width, int size, int drop) {
    prune_rows<NARROW>(weight, factor, mask, errors, loss, rows, width, size, drop);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    prune_columns_wide(float* __restrict__ weight, const float* __restrict__ factor,
                       u8* __restrict__ mask, float* __restrict__ errors,
                       float* __restrict__ loss, i64 rows, int width, int size, int drop) {
    prune_rows<WIDE>(weight, factor, mask, errors, loss, rows, width, size, drop);
}
