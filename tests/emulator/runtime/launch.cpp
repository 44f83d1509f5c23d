// The C interface of a compiled library: what Python and Rust call.
#include <fenv.h>
#include <stdlib.h>
#include <string.h>

#include <mutex>
#include <new>
#include <numeric>
#include <string>

#include "checks.h"
#include "scheduler.h"

#define CUEMU_EXPORT extern "C" __attribute__((visibility("default")))

// All static shared memory of the library lies between these (shared.ld).
extern "C" {
extern uint64_t __start_cushared[] __attribute__((visibility("hidden")));
extern uint64_t __stop_cushared[] __attribute__((visibility("hidden")));
}

namespace cuemu {
unsigned char* dynamic_shared = nullptr;

namespace {

// The largest dynamic shared memory of any architecture (sm_90 and sm_100: 227 KiB).
constexpr unsigned MAX_SHARED = 227 * 1024;

// Bits of the argument `order`. The two lowest hold an `Order`.
constexpr int SHUFFLE_BLOCKS = 4;
constexpr int EXITED_MAY_MISS_BARRIERS = 8;

std::mutex one_launch_at_a_time;

const Kernel* find(const char* name) {
    for (unsigned k = 0; name && k < kernel_count; ++k)
        if (!strcmp(kernel_table[k].name, name)) return &kernel_table[k];
    return nullptr;
}

std::string shape(const unsigned* d) {
    const auto text = [&](int i) { return std::to_string(d[i]); };
    return "(" + text(0) + ", " + text(1) + ", " + text(2) + ")";
}

// What the driver refuses before anything runs.
std::string refusal(const Kernel& kernel, const unsigned* grid, const unsigned* block,
                    unsigned shared_bytes, void** args, int order) {
    const uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff || grid[1] > 65535 ||
        grid[2] > 65535)
        return "grid " + shape(grid) + " is outside 1 .. (2147483647, 65535, 65535)";
    if (!threads || block[0] > 1024 || block[1] > 1024 || block[2] > 64 || threads > 1024)
        return "block " + shape(block) + " is outside 1 .. (1024, 1024, 64), 1024 threads in all";
    if (threads > kernel.max_threads)
        return "block " + shape(block) + " has more threads than __launch_bounds__(" +
               std::to_string(kernel.max_threads) + ") allows";
    if (shared_bytes > MAX_SHARED)
        return std::to_string(shared_bytes) + " bytes of dynamic shared memory, at most " +
               std::to_string(MAX_SHARED);
    if (!args && kernel.parameters[0].kind) return "no arguments given";
    if (order < 0 || order > 15 || (order & 3) == 3)
        return "no such order: " + std::to_string(order);
    return "";
}

// All bits set are a NaN. Volatile, so that no call of memset comes of it: AddressSanitizer's would
// complain about the red zones between the variables.
void poison_static_shared() {
    for (volatile uint64_t* word = __start_cushared; word != __stop_cushared; ++word) *word = ~0ull;
}

// Visits the blocks one after another, by number or in an order drawn from the seed.
std::string run(const Launch& launch, const dim3& grid, const dim3& block, unsigned shared_bytes,
                bool shuffle, unsigned seed) {
    gridDim = grid;
    blockDim = block;
    prepare(launch, block, seed);
    const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
    // number -> first + number * step visits every block once if step and count share no factor.
    uint64_t step = 1, number = 0;
    if (shuffle) {
        number = next_random() % count;
        do step = 1 + next_random() % count;
        while (std::gcd(step, count) != 1);
    }
    for (uint64_t done = 0; done < count; ++done, number = (number + step) % count) {
        blockIdx = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                    unsigned(number / grid.x / grid.y)};
        poison_static_shared();
        if (shared_bytes) memset(dynamic_shared, 0xff, shared_bytes);
        if (!run_block()) return message();
    }
    return "";
}

} // namespace
} // namespace cuemu

// The kernels' names, one a line.
CUEMU_EXPORT const char* cuemu_kernels() {
    static const std::string names = [] {
        std::string text;
        for (unsigned k = 0; k < cuemu::kernel_count; ++k)
            text += std::string(k ? "\n" : "") + cuemu::kernel_table[k].name;
        return text;
    }();
    return names.c_str();
}

// The kernel's parameters as words: kind and size, see `Parameter`. Null for an unknown kernel.
CUEMU_EXPORT const char* cuemu_signature(const char* kernel) {
    static thread_local std::string text;
    const cuemu::Kernel* found = cuemu::find(kernel);
    if (!found) return nullptr;
    text.clear();
    for (const cuemu::Parameter* p = found->parameters; p->kind; ++p)
        text += std::string(text.empty() ? "" : " ") + p->kind + std::to_string(p->size);
    return text.c_str();
}

// Null when all went well, else a message that stays valid until this thread's next launch.
// `args` as in cuLaunchKernel: a pointer to the value of each parameter.
CUEMU_EXPORT const char* cuemu_launch(const char* name, const unsigned grid[3],
                                      const unsigned block[3], unsigned shared_bytes, void** args,
                                      int order, unsigned seed) {
    using namespace cuemu;
    static thread_local std::string error;
    const std::lock_guard lock(one_launch_at_a_time);
    const Kernel* kernel = find(name);
    if (!kernel) {
        error = std::string("no kernel named ") + (name ? name : "(null)") + "; there are:";
        for (unsigned k = 0; k < kernel_count; ++k)
            error += std::string(k ? ", " : " ") + kernel_table[k].name;
        return error.c_str();
    }
    error = refusal(*kernel, grid, block, shared_bytes, args, order);
    if (!error.empty()) return (error = std::string(name) + ": " + error).c_str();

    // As many bytes as asked for and no more, so that AddressSanitizer finds the end.
    void* shared = nullptr;
    if (shared_bytes && posix_memalign(&shared, 16, shared_bytes)) return "out of memory";
    dynamic_shared = static_cast<unsigned char*>(shared);

    // Other rounding or flushed subnormals, which torch may have set, are not the GPU's.
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    catch_faults();
    try {
        error = run({kernel, args, Order(order & 3), (order & EXITED_MAY_MISS_BARRIERS) != 0},
                    {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes,
                    order & SHUFFLE_BLOCKS, seed);
    } catch (const std::bad_alloc&) {
        error = "out of memory";
    }
    fesetenv(&environment);
    free(shared);
    dynamic_shared = nullptr;
    return error.empty() ? nullptr : error.c_str();
}
