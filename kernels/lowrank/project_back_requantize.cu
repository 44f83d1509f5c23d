// W = W keep + alpha back(update) on a quantized weight, which exists in floating point only tile by
// tile in shared memory (Q-GaLore, arXiv 2407.08296, section 3.3).
#include "back.cuh"
#include "change.cuh"

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
    if (is_set(found_inf)) return;
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
