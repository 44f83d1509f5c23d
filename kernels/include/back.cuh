// Back from the subspace into the weights: U P^T, or P U (GaLore, arXiv 2403.03507, algorithm 2),
// tile by tile in shared memory.
#pragma once

#include "basis.cuh"

#if BASIS_BITS == 32
using BasisElement = float;
template <bool INNER>
using BasisOperand = Dense<float, INNER>;
#else
using BasisElement = u8;
template <bool INNER>
using BasisOperand = Codes<BASIS_BITS, INNER>;
#endif

// A tile has whole groups of a row: 256 columns.
#if TENSOR && HAS_MMA
using Core = MmaCore<32, 256, 16, bf16, 2, 2>;
#else
using Core = FmaCore<32, 256>;
#endif
constexpr int ROWS = Core::ROWS, COLUMNS = Core::COLUMNS, WARPS = GEMM_THREADS / 32;

// The low-rank update and the basis it lies in: [rows, rank] and [columns, rank] where rows >=
// columns, else [rank, columns] and [rows, rank].
struct Factors {
    const float* update;
    const BasisElement* basis;
    const float* basis_scale;
    const u8* basis_zero_point;
    i64 rows, columns, rank, basis_group_size;

    __device__ bool is_right() const { return rows >= columns; }

    // The basis has its rank along lines.
    __device__ BasisOperand<true> operand() const {
        const i64 lines = is_right() ? columns : rows;
#if BASIS_BITS == 32
        return {basis, rank, lines, rank};
#else
        return {basis, basis_scale, basis_zero_point, rank, lines, rank, basis_group_size};
#endif
    }
};

union Shared {
    Core::Shared operands;
    alignas(16) float tile[ROWS][COLUMNS + 4];
};

// The update's tile at (row, column) into shared memory, for all threads to see.
__device__ __forceinline__ void make_tile(const Factors& f, i64 row, i64 column, Shared& shared) {
    Core core;
    if (f.is_right()) {
        const Dense<float, true> left{f.update, f.rank, f.rows, f.rank};
        multiply_tile(core, shared.operands, left, f.operand(), row, column, 0, f.rank);
    } else {
        const Dense<float, false> right{f.update, f.columns, f.columns, f.rank};
        multiply_tile(core, shared.operands, f.operand(), right, row, column, 0, f.rank);
    }
    core.store_rows(&shared.tile[0][0], COLUMNS + 4, ROWS, COLUMNS);
    __syncthreads();
}

// The rows of a block's tile, one warp to a row. Block b has tile b, those of a row first.
struct TileRows {
    i64 row, column;
    int rows, columns; // that exist

    __device__ TileRows(i64 first_row, i64 all_rows, i64 all_columns) {
        const i64 across = (all_columns + COLUMNS - 1) / COLUMNS;
        row = first_row + blockIdx.x / across * ROWS;
        column = blockIdx.x % across * COLUMNS;
        rows = int(min(i64(ROWS), all_rows - row));
        columns = int(min(i64(COLUMNS), all_columns - column));
    }
};

__device__ __forceinline__ int warp() { return int(threadIdx.x) / 32; }
__device__ __forceinline__ int lane() { return int(threadIdx.x) % 32; }

#define FACTORS \
    const float *__restrict__ update, const BasisElement *__restrict__ basis, \
        const float *__restrict__ basis_scale, const u8 *__restrict__ basis_zero_point, i64 rows, \
        i64 columns, i64 rank, i64 basis_group_size
#define GIVEN \
    {update, basis, basis_scale, basis_zero_point, rows, columns, rank, basis_group_size}
