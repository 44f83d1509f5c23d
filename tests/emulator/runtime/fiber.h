// A stack and a place to continue: what a CUDA thread runs on.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

#if !defined(__x86_64__) && !defined(CUEMU_UCONTEXT)
#define CUEMU_UCONTEXT
#endif
#ifdef CUEMU_UCONTEXT
#include <ucontext.h>
#endif
#ifdef CUEMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuemu {

struct Context {
#ifdef CUEMU_UCONTEXT
    ucontext_t machine;
#else
    void* stack_pointer = nullptr;
#endif
    // Bounds of the stack, which AddressSanitizer wants to know at every switch.
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake_stack = nullptr;
};

#ifndef CUEMU_UCONTEXT
// Saves the registers that a call must preserve and continues on the other stack. ucontext would
// do, but makes a system call at each switch: 10 to 30 times slower. An indirect jump and no `ret`,
// because the return predictor is always wrong here.
extern "C" void cuemu_switch(void** save, void* load);
asm(R"(.text
.globl cuemu_switch
.hidden cuemu_switch
.type cuemu_switch,@function
cuemu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    pop %rax
    jmp *%rax
.size cuemu_switch,.-cuemu_switch
)");
#endif

// The context that was left last: the one that arrives completes the bookkeeping for it.
inline Context* left_context = nullptr;

inline void arrived([[maybe_unused]] void* fake_stack) {
#ifdef CUEMU_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, &left_context->bottom, &left_context->size);
#endif
}

inline void switch_context(Context& from, Context& to) {
    left_context = &from;
#ifdef CUEMU_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#ifdef CUEMU_UCONTEXT
    swapcontext(&from.machine, &to.machine);
#else
    cuemu_switch(&from.stack_pointer, to.stack_pointer);
#endif
    arrived(from.fake_stack);
}

constexpr unsigned MAX_THREADS = 1024; // of a block

class Fiber {
public:
#ifdef CUEMU_ASAN
    static constexpr size_t STACK = 256 * 1024; // red zones make frames several times larger
#else
    static constexpr size_t STACK = 64 * 1024;
#endif

    Context context;

    Fiber(unsigned number, void (*entry)()) : number_(number), entry_(entry) {
        // All stacks in one piece, above a spare one: what overflows hits a neighbour that is not
        // running, and is found before that one runs. Guard pages between them would use up the
        // kernel's limit on mappings with a few dozen libraries.
        static char* const memory = reserve();
        stack_ = memory + (number + 1) * STACK;
        reset();
    }
    Fiber(const Fiber&) = delete;

    // The next switch to it starts at the entry, whatever it was doing before.
    void reset() {
#ifdef CUEMU_ASAN
        __asan_unpoison_memory_region(stack_, STACK);
#endif
        memcpy(stack_, &CANARY, sizeof CANARY);
        context.bottom = stack_;
        context.size = STACK;
        context.fake_stack = nullptr;
#ifdef CUEMU_UCONTEXT
        getcontext(&context.machine);
        context.machine.uc_stack.ss_sp = stack_;
        context.machine.uc_stack.ss_size = STACK;
        context.machine.uc_link = nullptr;
        makecontext(&context.machine, entry_, 0);
#else
        // Stacks start at different offsets; equal ones would fight for the same cache set.
        const uintptr_t end = reinterpret_cast<uintptr_t>(stack_) + STACK - number_ * 192 % 4096;
        void** top = reinterpret_cast<void**>(end & ~uintptr_t(15)) - 1;
        *top = nullptr; // no return address: the entry never returns
        *--top = reinterpret_cast<void*>(entry_);
        context.stack_pointer = top - 6; // six saved registers, their values do not matter
#endif
    }

    bool overflowed() const { return memcmp(stack_, &CANARY, sizeof CANARY) != 0; }

private:
    static char* reserve() {
        constexpr size_t size = (MAX_THREADS + 1) * STACK, guard = 4096;
        void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        mprotect(memory, guard, PROT_NONE);
        return static_cast<char*>(memory);
    }

    static constexpr uint64_t CANARY = 0x9E3779B97F4A7C15;
    unsigned number_;
    void (*entry_)();
    char* stack_ = nullptr;
};

} // namespace cuemu
