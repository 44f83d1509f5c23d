// Turns what a GPU would do wrong, differently or not at all into messages of the launch.
//
// Kernels are compiled with some of -fsanitize=undefined. The compiler calls the functions below;
// having our own means no runtime library to preload, and a message that names the CUDA thread.
#include "checks.h"

#include <signal.h>
#include <stdint.h>

#include "scheduler.h"

namespace {

// What the compiler passes (compiler-rt and libsanitizer, ubsan_value.h).
struct Location {
    const char* file;
    uint32_t line, column;
};
struct Type {
    uint16_t kind, info; // kind 0: integer; info: sign in bit 0, log2 of the width above
    char name[1];        // quoted
};
struct TypeMismatch {
    Location at;
    const Type* type;
    unsigned char log_alignment, access;
};
struct OutOfBounds {
    Location at;
    const Type* array;
    const Type* index;
};

[[noreturn]] void undefined(const void* data, const char* what) {
    const Location& at = *static_cast<const Location*>(data);
    cuemu::fail("%s (%s:%u)", what, cuemu::file_name(at.file), at.line);
}

} // namespace

#define CUEMU_HANDLER(name) \
    extern "C" [[noreturn]] __attribute__((visibility("hidden"))) void __ubsan_handle_##name

CUEMU_HANDLER(type_mismatch_v1)(const TypeMismatch* data, uintptr_t address) {
    const char* file = cuemu::file_name(data->at.file);
    if (!address) cuemu::fail("null pointer to %s (%s:%u)", data->type->name, file, data->at.line);
    cuemu::fail("misaligned address %#zx of %s, which needs a multiple of %u (%s:%u)",
                size_t(address), data->type->name, 1u << data->log_alignment, file, data->at.line);
}
CUEMU_HANDLER(out_of_bounds)(const OutOfBounds* data, uintptr_t index) {
    // Small integers come by value, negative ones sign-extended.
    cuemu::fail("index %lld is outside %s (%s:%u)", static_cast<long long>(index),
                data->array->name, cuemu::file_name(data->at.file), data->at.line);
}
CUEMU_HANDLER(shift_out_of_bounds)(const void* data, uintptr_t, uintptr_t) {
    undefined(data, "shift by a negative number or by all bits of the type");
}
CUEMU_HANDLER(float_cast_overflow)(const void* data, uintptr_t) {
    undefined(data, "floating point value outside the integer type it is cast to");
}
CUEMU_HANDLER(divrem_overflow)(const void* data, uintptr_t, uintptr_t) {
    undefined(data, "division by zero or overflow of a division");
}
CUEMU_HANDLER(add_overflow)(const void* data, uintptr_t, uintptr_t) {
    undefined(data, "overflow of a signed addition");
}
CUEMU_HANDLER(sub_overflow)(const void* data, uintptr_t, uintptr_t) {
    undefined(data, "overflow of a signed subtraction");
}
CUEMU_HANDLER(mul_overflow)(const void* data, uintptr_t, uintptr_t) {
    undefined(data, "overflow of a signed multiplication");
}
CUEMU_HANDLER(negate_overflow)(const void* data, uintptr_t) {
    undefined(data, "overflow of a negation");
}

namespace cuemu {

#ifdef CUEMU_ASAN
void catch_faults() {} // AddressSanitizer says more
#else

namespace {

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction previous[sizeof SIGNALS / sizeof *SIGNALS];

void on_fault(int signal, siginfo_t* info, void* context) {
    // Leaving a handler for good by a switch is fine: the kernel keeps no account of it.
    if (inside_kernel()) fail("fault: signal %d at address %p", signal, info->si_addr);
    for (unsigned s = 0; s < sizeof SIGNALS / sizeof *SIGNALS; ++s) {
        if (SIGNALS[s] != signal) continue;
        if (previous[s].sa_flags & SA_SIGINFO) {
            previous[s].sa_sigaction(signal, info, context);
        } else if (previous[s].sa_handler != SIG_DFL && previous[s].sa_handler != SIG_IGN) {
            previous[s].sa_handler(signal);
        } else {
            sigaction(signal, &previous[s], nullptr); // the instruction faults again, and ends it
        }
    }
}

} // namespace

void catch_faults() {
    static const bool done = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK; // it may never return
        for (unsigned s = 0; s < sizeof SIGNALS / sizeof *SIGNALS; ++s)
            sigaction(SIGNALS[s], &action, &previous[s]);
        return true;
    }();
    static_cast<void>(done);
}
#endif

} // namespace cuemu
