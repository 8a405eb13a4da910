// SPDX-License-Identifier: Apache-2.0
#include "runtime/fiber.hpp"

#include <cstdint>

#if defined(__x86_64__) && !defined(FLASHLLM_UCONTEXT)

// Callee-saved registers go on the old stack and come from the new one; the rest is the compiler's to save.
extern "C" __attribute__((visibility("hidden"))) void flashllm_switch(void** save, void* load);
asm(R"(
.text
.hidden flashllm_switch
.globl flashllm_switch
.type flashllm_switch, @function
flashllm_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size flashllm_switch, .-flashllm_switch
)");

namespace emu {

void switch_context(Context& from, Context& to) { flashllm_switch(&from.stack, to.stack); }

void prepare_context(Context& context, char* bottom, std::size_t bytes, void (*entry)()) {
    auto top = (reinterpret_cast<std::uintptr_t>(bottom) + bytes) & ~std::uintptr_t{15};
    void** stack = reinterpret_cast<void**>(top);
    *--stack = nullptr;  // the return address of `entry`; also aligns its frame as a call would
    *--stack = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--stack = nullptr;
    context.stack = stack;
}

}  // namespace emu

#else

namespace emu {

void switch_context(Context& from, Context& to) { swapcontext(&from.machine, &to.machine); }

void prepare_context(Context& context, char* bottom, std::size_t bytes, void (*entry)()) {
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = bottom;
    context.machine.uc_stack.ss_size = bytes;
    context.machine.uc_link = nullptr;
    makecontext(&context.machine, entry, 0);
}

}  // namespace emu

#endif
