// A low-rank update as a dense matrix: the first of two passes over weights whose groups are not
// parts of a tile's rows; requantize_span.cu is the second.
#include "back.cuh"

// Rows first_row to first_row + row_count of the update, dense, in out.
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
