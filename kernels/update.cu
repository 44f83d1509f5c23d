// One pass over quantized weights: dequantize, decay, add a dense update, find the new grid, round
// (src/quant/update.rs). Over lists, one launch for a list.
#include "list.cuh"
#include "run.cuh"

struct WeightTensor {
    u8* codes;
    float* scale;
    u8* zero_point; // null for symmetric codes
    const float* update;
    i64 numel;
    u32 first_block;
    u32 tensor_id, step;
    float keep, alpha; // the weight becomes weight * keep + alpha * update
    u32 unused;
};
static_assert(sizeof(WeightTensor) == 64, "as README.md says");
using WeightList = List<WeightTensor>;

__device__ __forceinline__ Change change_of(const WeightTensor& tensor) {
    return {tensor.keep, tensor.alpha};
}
__device__ __forceinline__ Weight weight_of(const WeightTensor& tensor, i64 group_size, int bits) {
    return {tensor.codes, tensor.scale, tensor.zero_point, group_size, bits};
}

template <int BITS>
__device__ __forceinline__ void requantize_tile(const WeightTensor& tensor, i64 group_size,
                                                bool stochastic, u32 key0, u32 key1,
                                                u32* exchange) {
    const Tile tile(group_size, blockIdx.x - tensor.first_block);
    const Weight weight = weight_of(tensor, group_size, BITS);
    const Change change = change_of(tensor);
    const Format format = weight.format();
    const i64 numel = tensor.numel;
    float values[2][4];
    u32 found[2][3] = {}; // highest, lowest, whether anything changes
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const i64 element = tile.element(quad);
        const int left = tile.left(quad, numel);
        float update[4];
        load_four(tensor.update + element, left, update);
        const u32 word = load_codes<BITS>(tensor.codes, element, left);
        const Grid grid = left > 0 ? weight.load(tile.group(quad)) : Grid{0.0f, 0};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float old = grid.value(format.code(code_of<BITS>(word, j)));
            values[quad][j] = change.apply(old, update[j]);
            if (j >= left) continue; // a code of nothing need not stand for zero
            extend(found[quad][0], found[quad][1], values[quad][j]);
            found[quad][2] |= difference(old, values[quad][j]);
        }
        found[quad][2] = found[quad][2] != 0;
    }
    tile.max_of_groups(found);
    u32 dithers[2][4] = {};
    if (stochastic && __any_sync(FULL_WARP, found[0][2] | found[1][2])) {
        const Key key = {{key0, key1}, tensor.tensor_id, tensor.step};
        dithers_of_quads(key, tile.number(), exchange, dithers);
    }
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        if (!found[quad][2]) continue; // codes and grid stay bit for bit
        const int left = tile.left(quad, numel);
        const Grid grid = Grid::covering(Range::of(found[quad][0], found[quad][1]), format);
        if (tile.leads(quad) && left > 0) weight.store(tile.group(quad), grid);
        const float inverse = 1.0f / grid.scale;
        u32 stored[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            stored[j] = format.stored(
                stochastic ? grid.round_stochastic<BITS>(values[quad][j], inverse,
                                                         dithers[quad][j], format)
                           : grid.round_nearest(values[quad][j], inverse, format));
        store_codes<BITS>(tensor.codes, tile.element(quad), left, stored);
    }
}

// Updates weights in groups of plain sizes. Block: 32 threads for each 256 elements of one tensor,
// up to 256 (tile.cuh).
extern "C" __global__ void __launch_bounds__(256)
requantize_dense(const __grid_constant__ WeightList list, int count, const float* found_inf,
                 i64 group_size, int bits, int stochastic, u32 key0, u32 key1) {
    __shared__ __align__(16) u32 exchange[MAX_WARPS][128];
    if (is_set(found_inf)) return;
    const WeightTensor& tensor = list.tensors[tensor_of_block(list, count)];
    u32* const mine = exchange[threadIdx.x / 32];
    if (bits == 4) requantize_tile<4>(tensor, group_size, stochastic, key0, key1, mine);
    else requantize_tile<8>(tensor, group_size, stochastic, key0, key1, mine);
}

// The same for groups of any size. Block: 256 threads in teams, each of which has a run.
extern "C" __global__ void __launch_bounds__(256)
requantize_dense_any(const __grid_constant__ WeightList list, int count, const float* found_inf,
                     i64 group_size, int bits, int stochastic, u32 key0, u32 key1, int team) {
    if (is_set(found_inf)) return;
    const WeightTensor& tensor = list.tensors[tensor_of_block(list, count)];
    const Weight weight = weight_of(tensor, group_size, bits);
    const Team mine(team, blockIdx.x - tensor.first_block);
    const Rounding rounding{{{key0, key1}, tensor.tensor_id, tensor.step}, stochastic};
    const i64 run = weight.run();
    const i64 begin = mine.number() * run, end = min(begin + run, tensor.numel);
    requantize_run(weight, change_of(tensor), rounding, tensor.update, begin, end, run, mine);
}
