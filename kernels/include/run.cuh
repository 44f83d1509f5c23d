// Whole groups of any size of a quantized weight, worked on by a team of threads: a run is a group,
// or two where a byte belongs to both (src/quant/update.rs, update_run).
#pragma once

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

// Updates the elements of one run from `begin` to `end` of the weight. All threads of the team come
// here, those of a warp that is shared by teams together.
__device__ __forceinline__ void requantize_run(const Weight& weight, Change change,
                                               const Rounding& rounding, const float* update,
                                               i64 begin, i64 end, i64 run, Team team) {
    const Format format = weight.format();
    const i64 border = min(begin + weight.group_size, end); // where a second group begins
    const Regrid front = regrid(weight, change, update, begin, border, team);
    const Regrid back = regrid(weight, change, update, border, end, team);
    if (team.lane() == 0 && front.changes) weight.store(begin / weight.group_size, front.next);
    if (team.lane() == 0 && back.changes) weight.store(border / weight.group_size, back.next);
    // A team within a warp stays with the warp, whose lanes meet when they store nibbles.
    if (!__any_sync(FULL_WARP, front.changes || back.changes)) return;
    Dithers dithers(rounding.key);
    for (i64 turn = 0; turn < run; turn += team.size()) {
        const i64 element = begin + turn + team.lane();
        const bool here = element < end, in_front = element < border;
        u32 stored = here ? load_code(weight.codes, element, weight.bits) : 0;
        if (here && (in_front ? front.changes : back.changes)) {
            const Grid before = choose(in_front, front.old, back.old);
            const Grid grid = choose(in_front, front.next, back.next);
            const float old = before.value(format.code(stored));
            const float next = change.apply(old, update[element]);
            stored = rounding.code(next, grid, in_front ? front.inverse : back.inverse, format,
                                   dithers, element);
        }
        store_code(weight.codes, element, here, stored, weight.bits);
    }
}
