// One pass over quantized weights: dequantize, decay, add a dense update, find the new grid, round
// (src/quant/update.rs). Over lists, one launch for a list.
#include "grid.cuh"
#include "list.cuh"
#include "pack.cuh"
#include "philox.cuh"
#include "tile.cuh"

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

// The new value; an update that is not finite counts as zero, and so does the decay then.
__device__ __forceinline__ float updated(const WeightTensor& tensor, float old, float update) {
    const float next = old * tensor.keep + tensor.alpha * update;
    return fabsf(next) < __uint_as_float(EXPONENT) ? next : old;
}

// Not zero where a value changes. Adding zero turns -0 into 0, which is no change.
__device__ __forceinline__ u32 difference(float old, float next) {
    return __float_as_uint(next + 0.0f) ^ __float_as_uint(old + 0.0f);
}

__device__ __forceinline__ Grid load_grid(const WeightTensor& tensor, i64 group) {
    return {tensor.scale[group], tensor.zero_point ? int(tensor.zero_point[group]) : 0};
}
__device__ __forceinline__ void store_grid(const WeightTensor& tensor, i64 group, Grid grid) {
    tensor.scale[group] = grid.scale;
    if (tensor.zero_point) tensor.zero_point[group] = u8(grid.zero_point);
}

template <int BITS>
__device__ __forceinline__ void requantize_tile(const WeightTensor& tensor, i64 group_size,
                                                bool stochastic, u32 key0, u32 key1,
                                                u32* exchange) {
    const Tile tile(group_size, blockIdx.x - tensor.first_block);
    const Format format(BITS, tensor.zero_point == nullptr);
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
        const Grid grid = left > 0 ? load_grid(tensor, tile.group(quad)) : Grid{0.0f, 0};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float old = grid.value(format.code(code_of<BITS>(word, j)));
            values[quad][j] = updated(tensor, old, update[j]);
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
        if (tile.leads(quad) && left > 0) store_grid(tensor, tile.group(quad), grid);
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

// A group of a run, before and after.
struct Change {
    Grid old, next;
    float inverse;
    bool changes;
};

// What becomes of the group of `size` elements from `begin` on, found by a team.
__device__ __forceinline__ Change change_of_group(const WeightTensor& tensor, i64 begin, i64 group,
                                                  i64 size, int bits, Format format, Team team) {
    u32 highest = 0, lowest = 0, differs = 0;
    const i64 end = min(begin + size, tensor.numel);
    const Grid old = begin < end ? load_grid(tensor, group) : Grid{1.0f, 0};
    for (i64 element = begin + team.lane(); element < end; element += team.size()) {
        const float value = old.value(format.code(load_code(tensor.codes, element, bits)));
        const float next = updated(tensor, value, tensor.update[element]);
        extend(highest, lowest, next);
        differs |= difference(value, next);
    }
    highest = team.max(highest);
    lowest = team.max(lowest);
    const Grid next = Grid::covering(Range::of(highest, lowest), format);
    return {old, next, 1.0f / next.scale, team.max(differs) != 0};
}

// The same for groups of any size. Block: 256 threads in teams, each of which has a run: a group,
// or two where a byte belongs to both.
extern "C" __global__ void __launch_bounds__(256)
requantize_dense_any(const __grid_constant__ WeightList list, int count, const float* found_inf,
                     i64 group_size, int bits, int stochastic, u32 key0, u32 key1, int team) {
    if (is_set(found_inf)) return;
    const WeightTensor& tensor = list.tensors[tensor_of_block(list, count)];
    const Format format(bits, tensor.zero_point == nullptr);
    const Team mine(team, blockIdx.x - tensor.first_block);
    const bool two = bits == 4 && group_size % 2 == 1;
    const i64 run = two ? 2 * group_size : group_size, numel = tensor.numel;
    const i64 first = mine.number() * run, group = mine.number() * (two ? 2 : 1);
    const Change front =
        change_of_group(tensor, first, group, group_size, bits, format, mine);
    Change back = front;
    if (two)
        back = change_of_group(tensor, first + group_size, group + 1, group_size, bits, format,
                               mine);
    if (mine.lane() == 0 && front.changes) store_grid(tensor, group, front.next);
    if (mine.lane() == 0 && two && back.changes) store_grid(tensor, group + 1, back.next);
    if (!__any_sync(FULL_WARP, front.changes || back.changes)) return;
    Dithers dithers(Key{{key0, key1}, tensor.tensor_id, tensor.step});
    for (i64 turn = 0; turn < run; turn += team) {
        const i64 place = turn + mine.lane(), element = first + place;
        const bool here = place < run && element < numel;
        u32 stored = 0;
        if (here) {
            const bool in_front = place < group_size;
            stored = load_code(tensor.codes, element, bits);
            if (in_front ? front.changes : back.changes) {
                const Grid before = choose(in_front, front.old, back.old);
                const Grid grid = choose(in_front, front.next, back.next);
                const float inverse = in_front ? front.inverse : back.inverse;
                const float old = before.value(format.code(stored));
                const float next = updated(tensor, old, tensor.update[element]);
                int code;
                if (!stochastic) code = grid.round_nearest(next, inverse, format);
                else code = grid.round_stochastic<8>(next, inverse, dithers.at(element), format);
                stored = format.stored(code);
            }
        }
        store_code(tensor.codes, element, here, stored, bits);
    }
}
