// Runs a block, each thread on a fiber.
//
// The order is strict: of all threads that can run, the one with the lowest (forward), the highest
// (reverse) or a random number goes on, until it waits or exits. So warp 0 gets as far ahead of
// warp 1 as the barriers allow, or as far behind; a missing barrier shows in one of the orders.
#include "scheduler.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>

#include <memory>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuemu {
namespace {

// The lanes that have arrived at one warp collective.
struct Group {
    const Site* site;
    unsigned mask, arrived;
};

struct Warp {
    unsigned exists, alive, ready; // one bit per lane
    unsigned group_count;
    Group groups[32];
};

constexpr unsigned WHOEVER_COMES = 0; // in the place of a mask, which is never empty

Launch launch;
Thread threads[MAX_THREADS];
Warp warps[MAX_THREADS / 32];
unsigned thread_count, warp_count, alive_count;
unsigned ready_warps; // those with a ready lane
Thread* current;
pthread_t owner;
Context main_context;
uint64_t random_state = 1;
char error[2048];

struct {
    const Site* site;
    unsigned arrived, count, result;
} barrier;

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle_fibers;

unsigned rank_of(const Thread& thread) { return unsigned(&thread - threads); }
Warp& warp_of(const Thread& thread) { return warps[rank_of(thread) / 32]; }
unsigned bit_of(const Thread& thread) { return 1u << (rank_of(thread) % 32); }
bool exited(const Thread& thread) { return !(warp_of(thread).alive & bit_of(thread)); }
Thread* lanes_of(const Warp& warp) { return threads + (&warp - warps) * 32; }

// One of the set bits.
unsigned choose(unsigned mask) {
    if (launch.order == Order::forward) return unsigned(__builtin_ctz(mask));
    if (launch.order == Order::reverse) return 31 - unsigned(__builtin_clz(mask));
    const unsigned skip = unsigned(next_random() >> 59);
    const unsigned rotated = mask >> skip | mask << (-skip & 31);
    return (unsigned(__builtin_ctz(rotated)) + skip) & 31;
}

void make_ready(Warp& warp, unsigned lanes) {
    warp.ready |= lanes;
    if (lanes) ready_warps |= 1u << (&warp - warps);
}

Thread* take_ready() {
    if (!ready_warps) return nullptr;
    const unsigned w = choose(ready_warps);
    const unsigned lane = choose(warps[w].ready);
    warps[w].ready &= ~(1u << lane);
    if (!warps[w].ready) ready_warps &= ~(1u << w);
    return threads + w * 32 + lane;
}

void thread_main();

Fiber* take_fiber() {
    if (idle_fibers.empty()) {
        fibers.push_back(std::make_unique<Fiber>(unsigned(fibers.size()), thread_main));
        idle_fibers.push_back(fibers.back().get());
    }
    Fiber* fiber = idle_fibers.back();
    idle_fibers.pop_back();
    return fiber;
}

// Leaves `from` for the next thread, or for run_block when none can run.
void yield(Context& from) {
    Context* to = &main_context;
    if (Thread* next = take_ready()) {
        if (!next->fiber) next->fiber = take_fiber();
        current = next;
        threadIdx = next->index;
        to = &next->fiber->context;
    }
    if (to != &from) switch_context(from, *to);
}

void check_stack() {
    if (current->fiber->overflowed()) fail("the stack of the emulated thread overflowed");
}

void wait() {
    check_stack();
    yield(current->fiber->context);
}

bool barrier_complete() {
    const bool excused = launch.exited_threads_may_miss_barriers;
    return barrier.arrived == (excused ? alive_count : thread_count);
}

void release_barrier() {
    barrier.result = barrier.count;
    barrier.arrived = barrier.count = 0;
    for (unsigned w = 0; w < warp_count; ++w) make_ready(warps[w], warps[w].alive);
}

// Where every fiber starts. One that has finished a thread goes straight on with the next unborn
// one, so that kernels without collectives run as a plain loop.
void thread_main() {
    arrived(nullptr);
    for (;;) {
        launch.kernel->run(launch.args);
        check_stack();
        Fiber* fiber = current->fiber;
        warp_of(*current).alive &= ~bit_of(*current);
        --alive_count;
        idle_fibers.push_back(fiber);
        if (barrier.arrived && barrier_complete()) release_barrier();
        yield(fiber->context);
    }
}

void set_error(const Thread* thread, const char* format, va_list arguments) {
    int n = snprintf(error, sizeof error, "%s: block (%u, %u, %u)", launch.kernel->name, blockIdx.x,
                     blockIdx.y, blockIdx.z);
    if (thread)
        n += snprintf(error + n, sizeof error - size_t(n), ", thread (%u, %u, %u)", thread->index.x,
                      thread->index.y, thread->index.z);
    n += snprintf(error + n, sizeof error - size_t(n), ": ");
    vsnprintf(error + n, sizeof error - size_t(n), format, arguments);
}

[[noreturn]] void leave_for_good() {
    switch_context(current->fiber->context, main_context);
    __builtin_unreachable();
}

struct Text {
    char c[512];
};

Text describe(const Thread& thread) {
    Text text;
    const uint3 i = thread.index;
    int n = snprintf(text.c, sizeof text, "thread (%u, %u, %u) ", i.x, i.y, i.z);
    const auto append = [&](const char* format, auto... values) {
        n += snprintf(text.c + n, sizeof text - size_t(n), format, values...);
    };
    if (exited(thread)) {
        append("has exited");
    } else {
        const Site& site = *thread.site;
        append("waits at %s (%.200s:%d", site.name, file_name(site.file), site.line);
        if (!thread.at_block_barrier) append(", mask 0x%08x", thread.mask);
        append(")");
    }
    return text;
}

// Why `waiting` cannot go on because of `other`, which has to be where it is.
bool is_missed(const Thread& waiting, const Thread& other) {
    const bool block = waiting.at_block_barrier;
    if (!block && &warp_of(waiting) != &warp_of(other)) return false;
    if (!block && !(waiting.mask & bit_of(other))) return false;
    if (exited(other)) return !(block && launch.exited_threads_may_miss_barriers);
    return other.site != waiting.site || (!block && other.mask != waiting.mask);
}

void set_error(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    set_error(nullptr, format, arguments);
    va_end(arguments);
}

// Nobody can run and not all have exited: says who waits for whom.
void report_divergence() {
    for (unsigned r = 0; r < thread_count; ++r)
        for (unsigned o = 0; o < thread_count; ++o)
            if (!exited(threads[r]) && is_missed(threads[r], threads[o]))
                return set_error("divergent barrier: %s, but %s, which has to take part",
                                 describe(threads[r]).c, describe(threads[o]).c);
    set_error("no thread can run (an error of the emulator)");
}

// Lets those go on who wait for whoever comes: all that can come have come.
bool release_gatherings() {
    bool any = false;
    for (unsigned w = 0; w < warp_count; ++w) {
        Warp& warp = warps[w];
        for (unsigned g = warp.group_count; g-- > 0;) {
            const Group group = warp.groups[g];
            if (group.mask != WHOEVER_COMES) continue;
            warp.groups[g] = warp.groups[--warp.group_count];
            Thread* lanes = lanes_of(warp);
            for_each_lane(group.arrived, [&](unsigned lane) { lanes[lane].out = group.arrived; });
            make_ready(warp, group.arrived);
            any = true;
        }
    }
    return any;
}

// Threads of a broken block are still on their stacks: forgets them.
void abandon() {
    ready_warps = 0;
    idle_fibers.clear();
    for (auto& fiber : fibers) {
        fiber->reset();
        idle_fibers.push_back(fiber.get());
    }
}

void join_group(const Site& site, unsigned mask, Finish finish) {
    Thread& thread = *current;
    Warp& warp = warp_of(thread);
    thread.site = &site;
    thread.mask = mask;
    thread.at_block_barrier = false;
    Group* group = warp.groups;
    Group* const end = group + warp.group_count;
    while (group != end && (group->site != &site || group->mask != mask)) ++group;
    if (group == end) {
        *group = {&site, mask, 0};
        ++warp.group_count;
    }
    group->arrived |= bit_of(thread);
    if (mask != WHOEVER_COMES && group->arrived == (mask & warp.exists)) {
        const unsigned members = group->arrived;
        *group = warp.groups[--warp.group_count];
        if (finish) finish(lanes_of(warp), members);
        make_ready(warp, members);
    }
    wait();
}

} // namespace

void prepare(const Launch& new_launch, const dim3& block, uint64_t seed) {
    launch = new_launch;
    owner = pthread_self();
    random_state = (seed + 1) * 0x9E3779B97F4A7C15 | 1;
    thread_count = block.x * block.y * block.z;
    warp_count = (thread_count + 31) / 32;
    for (unsigned r = 0; r < thread_count; ++r)
        threads[r].index = {r % block.x, r / block.x % block.y, r / block.x / block.y};
    error[0] = 0;
}

bool run_block() {
    alive_count = thread_count;
    barrier = {};
    for (unsigned r = 0; r < thread_count; ++r) threads[r].fiber = nullptr;
    for (unsigned w = 0; w < warp_count; ++w) {
        const unsigned lanes = thread_count - w * 32;
        const unsigned exists = lanes >= 32 ? ~0u : (1u << lanes) - 1;
        warps[w].exists = warps[w].alive = exists;
        warps[w].ready = warps[w].group_count = 0;
        make_ready(warps[w], exists);
    }
    do yield(main_context);
    while (!error[0] && release_gatherings());
    current = nullptr;
    if (!error[0] && alive_count) report_divergence();
    if (error[0]) abandon();
    return !error[0];
}

const char* message() { return error; }

bool inside_kernel() { return current && pthread_equal(owner, pthread_self()); }

uint64_t next_random() {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545F4914F6CDD1D;
}

Thread& self() { return *current; }

unsigned lane_id() { return rank_of(*current) % 32; }

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    set_error(current, format, arguments);
    va_end(arguments);
    leave_for_good();
}

void fail_at(const Thread& thread, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    set_error(&thread, format, arguments);
    va_end(arguments);
    leave_for_good();
}

unsigned block_barrier(const Site& site, bool predicate) {
    current->site = &site;
    current->at_block_barrier = true;
    if (!barrier.arrived) barrier.site = &site;
    // Who comes to another barrier is not counted, so this one never completes: reported.
    if (barrier.site == &site) {
        ++barrier.arrived;
        barrier.count += predicate;
        if (barrier_complete()) release_barrier();
    }
    wait();
    return barrier.result;
}

void collect(const Site& site, unsigned mask, Finish finish) {
    if (!(mask & bit_of(*current)))
        fail("%s (%s:%d) is called by lane %u, which its mask 0x%08x does not name", site.name,
             file_name(site.file), site.line, lane_id(), mask);
    join_group(site, mask, finish);
}

unsigned collect_whoever_comes(const Site& site) {
    Thread& thread = *current;
    join_group(site, WHOEVER_COMES, nullptr);
    return unsigned(thread.out);
}

} // namespace cuemu
