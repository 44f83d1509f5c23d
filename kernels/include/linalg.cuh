// Squares of 32 x 32 in float64, of which small dense matrices are made: 256 threads have four
// elements of a product each, rows y and y + 16, columns x and x + 16. Matrices are stored by rows
// with a leading dimension `ld` that is a multiple of 32, so that there are whole squares only.
#pragma once

#include "element.cuh"

constexpr int SIDE = 32;
constexpr int SQUARE_THREADS = 256;

struct Square {
    double at[SIDE][SIDE + 1]; // lanes that go down a column meet in no bank

    // From a float matrix of `width` columns, of which `rows` rows are left; zeros outside.
    __device__ __forceinline__ void load(const float* from, i64 width, i64 column, i64 rows) {
        const int c = int(threadIdx.x) % SIDE;
        for (int r = int(threadIdx.x) / SIDE; r < SIDE; r += SQUARE_THREADS / SIDE)
            at[r][c] = r < rows && column + c < width ? double(from[r * width + column + c]) : 0.0;
    }
    __device__ __forceinline__ void load(const double* from, i64 ld) {
        const int c = int(threadIdx.x) % SIDE;
        for (int r = int(threadIdx.x) / SIDE; r < SIDE; r += SQUARE_THREADS / SIDE)
            at[r][c] = from[r * ld + c];
    }
};

// A thread's part of a product.
struct Quarter {
    double at[2][2] = {};

    __device__ static __forceinline__ int row(int i) { return int(threadIdx.x) / 16 + 16 * i; }
    __device__ static __forceinline__ int column(int j) { return int(threadIdx.x) % 16 + 16 * j; }

    // Adds a b; either may be meant transposed.
    template <bool A_TRANSPOSED, bool B_TRANSPOSED>
    __device__ __forceinline__ void multiply(const Square& a, const Square& b) {
#pragma unroll 8
        for (int k = 0; k < SIDE; ++k) {
            double left[2], right[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                left[i] = A_TRANSPOSED ? a.at[k][row(i)] : a.at[row(i)][k];
                right[i] = B_TRANSPOSED ? b.at[column(i)][k] : b.at[k][column(i)];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                at[i / 2][i % 2] = fma(left[i / 2], right[i % 2], at[i / 2][i % 2]);
        }
    }

    __device__ __forceinline__ void put(Square& to) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) to.at[row(i / 2)][column(i % 2)] = at[i / 2][i % 2];
    }
    __device__ __forceinline__ void store(double* to, i64 ld) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[row(i / 2) * ld + column(i % 2)] = at[i / 2][i % 2];
    }
    __device__ __forceinline__ void subtract_from(double* from, i64 ld) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) from[row(i / 2) * ld + column(i % 2)] -= at[i / 2][i % 2];
    }
};

// The place in a triangle of squares, by rows: (0, 0), (1, 0), (1, 1), (2, 0), ...
__device__ __forceinline__ int2 place_in_triangle(int number) {
    int row = 0;
    while (number > row) number -= ++row;
    return make_int2(row, number);
}

// The sum over a block of 256, always in the same order.
__device__ __forceinline__ double sum_of_block(double value) {
    __shared__ double parts[SQUARE_THREADS];
    __syncthreads(); // the last sum has been read
    parts[threadIdx.x] = value;
    __syncthreads();
    for (int half = SQUARE_THREADS / 2; half > 0; half /= 2) {
        if (int(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
        __syncthreads();
    }
    return parts[0];
}
