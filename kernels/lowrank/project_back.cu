// Back from the subspace into the weights: W = W keep + alpha U P^T, or P U (GaLore, arXiv
// 2403.03507, algorithm 2), where the update exists only tile by tile in shared memory, and a
// quantized weight only there in floating point (Q-GaLore, arXiv 2407.08296, section 3.3).
#include "basis.cuh"
#include "change.cuh"

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

// Rows first_row to first_row + row_count of the update, dense, in out: the first of two passes
// over weights whose groups are not parts of a tile's rows.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, GEMM_BLOCKS)
    project_back(float* __restrict__ out, FACTORS, i64 first_row, i64 row_count) {
    __shared__ Shared shared;
    const TileRows tile(first_row, first_row + row_count, columns);
    make_tile(GIVEN, tile.row, tile.column, shared);
    for (int r = warp(); r < tile.rows; r += WARPS) {
        float* const to = out + (tile.row - first_row + r) * columns + tile.column;
        for (int c = lane(); c < tile.columns; c += 32) to[c] = shared.tile[r][c];
    }
}

template <class T>
__device__ __forceinline__ T rounded(T, float x, int, Dithers&, i64) {
    return narrow<T>(x);
}
__device__ __forceinline__ bf16 rounded(bf16, float x, int stochastic, Dithers& dithers,
                                        i64 element) {
    return stochastic ? narrow_stochastic(x, dithers.at(element)) : narrow<bf16>(x);
}

// param = param keep + alpha back(update), rounded once; bf16 stochastically if asked. A block has
// a tile of 32 x 256.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, GEMM_BLOCKS)
    project_back_add(ELEM* __restrict__ param, FACTORS, const float* found_inf, float keep,
                     float alpha, int stochastic, Key key) {
    __shared__ Shared shared;
    if (overflowed(found_inf)) return;
    const TileRows tile(0, rows, columns);
    make_tile(GIVEN, tile.row, tile.column, shared);
    const Change change{keep, alpha};
    for (int r = warp(); r < tile.rows; r += WARPS) {
        const i64 first = (tile.row + r) * columns + tile.column, end = first + tile.columns;
        Dithers dithers(key);
        // From a multiple of 32 on, a lane's elements share their random words.
        for (i64 element = first / 32 * 32 + lane(); element < end; element += 32) {
            if (element < first) continue;
            const float old = widen(param[element]);
            const float next = change.apply(old, shared.tile[r][element - first]);
            param[element] = rounded(ELEM{}, next, stochastic, dithers, element);
        }
    }
}

// One group, whose updates are in `values`, by a warp: the new values take their place, and where
// one differs they are rounded onto a new grid. `size` is a multiple of 32.
__device__ __forceinline__ void requantize_group(const Weight& weight, Change change,
                                                 const Rounding& rounding, Dithers& dithers,
                                                 i64 first, i64 group, int size, float* values) {
    const Format format = weight.format();
    const Grid old_grid = weight.load(group);
    u32 highest = 0, lowest = 0, differs = 0;
    for (int i = lane(); i < size; i += 32) {
        const float old = weight.value(first + i, old_grid, format);
        const float next = change.apply(old, values[i]);
        extend(highest, lowest, next);
        differs |= difference(old, next);
        values[i] = next;
    }
    if (!__any_sync(FULL_WARP, differs != 0)) return; // codes and grid stay bit for bit
    const Range range = Range::of(max_of_lanes(highest, 32), max_of_lanes(lowest, 32));
    const Grid grid = Grid::covering(range, format);
    const float inverse = 1.0f / grid.scale;
    if (lane() == 0) weight.store(group, grid);
    for (int i = lane(); i < size; i += 32) {
        const u32 code = rounding.code(values[i], grid, inverse, format, dithers, first + i);
        store_code(weight.codes, first + i, true, code, weight.bits);
    }
}

// The same on a quantized weight in one pass; group_size is 32, 64, 128, or 256, and divides
// columns. A block has a tile of 32 x 256.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, GEMM_BLOCKS)
    project_back_requantize(u8* __restrict__ codes, float* __restrict__ scale,
                            u8* __restrict__ zero_point, FACTORS, const float* found_inf,
                            i64 group_size, int bits, float keep, float alpha, int stochastic,
                            Key key) {
    __shared__ Shared shared;
    if (overflowed(found_inf)) return;
    const TileRows tile(0, rows, columns);
    make_tile(GIVEN, tile.row, tile.column, shared);
    const Weight weight{codes, scale, zero_point, group_size, bits};
    const Rounding rounding{key, stochastic};
    const int size = int(group_size);
    for (int r = warp(); r < tile.rows; r += WARPS) {
        const i64 first = (tile.row + r) * columns + tile.column;
        Dithers dithers(key);
        i64 group = first / size;
        for (int c = 0; c < tile.columns; c += size, ++group)
            requantize_group(weight, {keep, alpha}, rounding, dithers, first + c, group, size,
                             &shared.tile[r][c]);
    }
}
