// W = W keep + alpha back(update) on float parameters, where the update exists only tile by tile.
#include "back.cuh"
#include "change.cuh"

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
    if (is_set(found_inf)) return;
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
