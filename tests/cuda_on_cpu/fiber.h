// Stacks that take turns on one system thread. x86-64 only.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;  // its lowest byte; nullptr: the system's
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    const void* system_stack = nullptr;
    size_t system_bytes = 0;
#endif
};

// Saves what a call preserves on this stack, and goes on where the other one was left.
__attribute__((naked, noinline)) inline void switch_stack(void**, void*) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

// `ends`: nobody comes back to `from`.
inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool ends) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack,
                                   to.stack ? to.stack : to.system_stack,
                                   to.stack ? kStackBytes : to.system_bytes);
#endif
    switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing on a new stack.
inline void arrived_in_fiber([[maybe_unused]] Fiber& from) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &from.system_stack, &from.system_bytes);
#endif
}

// Stack number i, below which a page is missing. They are kept for the launches that follow.
inline unsigned char* fiber_stack(size_t i) {
    static std::vector<unsigned char*> stacks;
    constexpr size_t guard = 4096;
    while (stacks.size() <= i) {
        void* memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
            perror("a fiber's stack");
            abort();
        }
        stacks.push_back(static_cast<unsigned char*>(memory) + guard);
    }
    return stacks[i];
}

inline void start_fiber(Fiber& fiber, void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
    // The last calls on it never returned.
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);
    fiber.fake_stack = nullptr;
#endif
    // Six registers, then `entry`, as if called from address 0.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
    memset(top - 8, 0, 8 * sizeof(void*));
    top[-2] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = top - 8;
}

}  // namespace emulator
