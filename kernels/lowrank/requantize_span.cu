// Whole groups of any size of a quantized weight, from a dense update of just their elements: the
// second of two passes, after project_back (src/quant/update.rs, update_run).
#include "change.cuh"
#include "tile.cuh"

// A group before and after.
struct Regrid {
    Grid old, next;
    float inverse;
    bool changes;
};

// What becomes of the group of the elements from `begin` to `end`, found by a team. `update` is
// indexed by element.
__device__ __forceinline__ Regrid regrid(const Weight& weight, Change change, const float* update,
                                         i64 begin, i64 end, Team team) {
    const Format format = weight.format();
    const Grid old = begin < end ? weight.load(begin / weight.group_size) : Grid{1.0f, 0};
    u32 highest = 0, lowest = 0, differs = 0;
    for (i64 element = begin + team.lane(); element < end; element += team.size()) {
        const float value = weight.value(element, old, format);
        const float next = change.apply(value, update[element]);
        extend(highest, lowest, next);
        differs |= difference(value, next);
    }
    highest = team.max(highest);
    lowest = team.max(lowest);
    const Grid next = Grid::covering(Range::of(highest, lowest), format);
    return {old, next, 1.0f / next.scale, team.max(differs) != 0};
}

// Elements `first` to `first + count` of the weight, whole groups but for the tensor's end; values
// has their updates. Block: 256 threads in teams, each of which has a run: a group, or two where a
// byte belongs to both.
extern "C" __global__ void __launch_bounds__(256)
    requantize_span(u8* __restrict__ codes, float* __restrict__ scale, u8* __restrict__ zero_point,
                    const float* __restrict__ values, i64 first, i64 count, const float* found_inf,
                    i64 group_size, int bits, float keep, float alpha, int stochastic, Key key,
                    int team) {
    if (overflowed(found_inf)) return;
    const Weight weight{codes, scale, zero_point, group_size, bits};
    const Format format = weight.format();
    const Change change{keep, alpha};
    const Rounding rounding{key, stochastic};
    const Team mine(team, blockIdx.x);
    const i64 run = bits == 4 && group_size % 2 == 1 ? 2 * group_size : group_size;
    const i64 begin = first + mine.number() * run, end = min(begin + run, first + count);
    const i64 border = min(begin + group_size, end); // where a second group begins
    const float* const update = values - first;
    const Regrid front = regrid(weight, change, update, begin, border, mine);
    const Regrid back = regrid(weight, change, update, border, end, mine);
    if (mine.lane() == 0 && front.changes) weight.store(begin / group_size, front.next);
    if (mine.lane() == 0 && back.changes) weight.store(border / group_size, back.next);
    // A team within a warp stays with the warp, whose lanes meet when they store nibbles.
    if (!__any_sync(FULL_WARP, front.changes || back.changes)) return;
    Dithers dithers(key);
    for (i64 turn = 0; turn < run; turn += team) {
        const i64 element = begin + turn + mine.lane();
        const bool here = element < end, in_front = element < border;
        u32 stored = here ? load_code(codes, element, bits) : 0;
        if (here && (in_front ? front.changes : back.changes)) {
            const Grid before = choose(in_front, front.old, back.old);
            const Grid grid = choose(in_front, front.next, back.next);
            const float old = before.value(format.code(stored));
            const float next = change.apply(old, update[element]);
            stored = rounding.code(next, grid, in_front ? front.inverse : back.inverse, format,
                                   dithers, element);
        }
        store_code(codes, element, here, stored, bits);
    }
}
