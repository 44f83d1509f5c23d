// What the lanes of a warp exchange.
#include "scheduler.h"

namespace cuemu {

void warp_barrier(const Site& site, unsigned mask) { collect(site, mask, nullptr); }

uint64_t exchange(const Site& site, unsigned mask, uint64_t value, unsigned source) {
    Thread& thread = self();
    thread.in = value;
    thread.source = source;
    collect(site, mask, [](Thread* lanes, unsigned members) {
        for_each_lane(members, [&](unsigned lane) {
            Thread& reader = lanes[lane];
            if (!(members >> reader.source & 1))
                fail_at(reader, "%s (%s:%d) reads lane %u, which does not take part (0x%08x do)",
                        reader.site->name, file_name(reader.site->file), reader.site->line,
                        reader.source, members);
            reader.out = lanes[reader.source].in;
        });
    });
    return thread.out;
}

unsigned ballot(const Site& site, unsigned mask, bool predicate) {
    Thread& thread = self();
    thread.in = predicate;
    collect(site, mask, [](Thread* lanes, unsigned members) {
        unsigned votes = 0;
        for_each_lane(members, [&](unsigned lane) { votes |= unsigned(lanes[lane].in) << lane; });
        for_each_lane(members, [&](unsigned lane) { lanes[lane].out = votes; });
    });
    return unsigned(thread.out);
}

unsigned match(const Site& site, unsigned mask, uint64_t value) {
    Thread& thread = self();
    thread.in = value;
    collect(site, mask, [](Thread* lanes, unsigned members) {
        for_each_lane(members, [&](unsigned lane) {
            unsigned equal = 0;
            for_each_lane(members, [&](unsigned other) {
                equal |= unsigned(lanes[other].in == lanes[lane].in) << other;
            });
            lanes[lane].out = equal;
        });
    });
    return unsigned(thread.out);
}

uint64_t fold(const Site& site, unsigned mask, uint64_t value, Combine combine) {
    // The last lane to come folds, before anyone else can run, and all lanes bring the same one.
    static Combine last;
    last = combine;
    Thread& thread = self();
    thread.in = value;
    collect(site, mask, [](Thread* lanes, unsigned members) {
        const unsigned first = unsigned(__builtin_ctz(members));
        uint64_t total = lanes[first].in;
        for_each_lane(members & (members - 1),
                      [&](unsigned lane) { total = last(total, lanes[lane].in); });
        for_each_lane(members, [&](unsigned lane) { lanes[lane].out = total; });
    });
    return thread.out;
}

unsigned active_mask(const Site& site) { return collect_whoever_comes(site); }

} // namespace cuemu
