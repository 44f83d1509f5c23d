// The border between a compiled .cu file and the scheduler that runs it. The scheduler is compiled
// once and linked to every kernel library, so that a .cu file costs little to compile.
#pragma once

#include <stdint.h>
#include <string.h>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3() = default;
    constexpr dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#pragma GCC visibility push(hidden)

// The scheduler sets these before it lets a thread continue.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuemu {

// One collective operation in the source. Threads meet when they wait at the same object, so two
// operations in one line, or two instances of a template, are never taken for each other.
struct Site {
    const char* name;
    const char* file;
    int line;
};

struct Parameter {
    char kind;     // p pointer, i signed, u unsigned, f floating point, s anything else
    unsigned size; // in bytes; for a pointer what it points to, 0 for void
};

// What an extern "C" __global__ function needs to be launched by name.
struct Kernel {
    const char* name;
    void (*run)(void** args);
    const Parameter* parameters; // ends with kind 0
    unsigned max_threads;        // from __launch_bounds__
};
extern const Kernel* const kernel_table;
extern const unsigned kernel_count;

extern unsigned char* dynamic_shared; // null when the launch asked for none

// How many threads of the block came with a non-zero predicate.
unsigned block_barrier(const Site& site, bool predicate);

// Warp collectives. Each returns when every lane named in `mask` has arrived at `site`.
void warp_barrier(const Site& site, unsigned mask);
uint64_t exchange(const Site& site, unsigned mask, uint64_t value, unsigned source_lane);
unsigned ballot(const Site& site, unsigned mask, bool predicate);
unsigned match(const Site& site, unsigned mask, uint64_t value);
using Combine = uint64_t (*)(uint64_t, uint64_t);
uint64_t fold(const Site& site, unsigned mask, uint64_t value, Combine combine);
unsigned active_mask(const Site& site);
unsigned lane_id();

// Messages show a file's name only: where a checkout lies is nobody's concern.
inline const char* file_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// Ends the launch with this message about the running thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

} // namespace cuemu

#pragma GCC visibility pop
