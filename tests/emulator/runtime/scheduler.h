// The threads of one block and the order in which they run.
#pragma once

#include "interface.h"

#pragma GCC visibility push(hidden)
namespace cuemu {

class Fiber;

enum class Order { forward, reverse, random };

struct Launch {
    const Kernel* kernel;
    void** args;
    Order order;
    bool exited_threads_may_miss_barriers;
};

void prepare(const Launch& launch, const dim3& block, uint64_t seed);

// Runs every thread of the block at `blockIdx` to its end. False after an error: see `message`.
bool run_block();
const char* message();

// True while this OS thread executes kernel code: a fault is then the kernel's.
bool inside_kernel();

// Random numbers of the launch (xorshift64*).
uint64_t next_random();

struct Thread {
    Fiber* fiber = nullptr;     // null before its first instruction
    const Site* site = nullptr; // where it waits
    unsigned mask = 0;          // whom it waits for there; unused at block barriers
    bool at_block_barrier = false;
    uint3 index{};
    uint64_t in = 0, out = 0; // what it gives to and takes from a warp collective
    unsigned source = 0;      // the lane it reads in a shuffle
};

Thread& self();

template <class Function>
void for_each_lane(unsigned mask, Function function) {
    for (; mask; mask &= mask - 1) function(unsigned(__builtin_ctz(mask)));
}

// Waits for the lanes in `mask` at `site`. Whoever comes last calls `finish` with the warp's
// threads and a bit for each member, to work out the results of all of them: who runs ahead
// afterwards cannot overwrite what another has not read yet.
using Finish = void (*)(Thread* lanes, unsigned members);
void collect(const Site& site, unsigned mask, Finish finish);

// Waits until no thread of the block can move. Returns the lanes that wait at `site` then.
unsigned collect_whoever_comes(const Site& site);

// Ends the launch with a message about a thread that may not be the running one.
[[noreturn]] void fail_at(const Thread& thread, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

} // namespace cuemu
#pragma GCC visibility pop
