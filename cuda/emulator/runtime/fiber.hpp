// SPDX-License-Identifier: Apache-2.0
// Switching between stacks: a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(FLASHLLM_UCONTEXT)
#include <ucontext.h>
#endif

namespace emu {

struct Context {
#if defined(__x86_64__) && !defined(FLASHLLM_UCONTEXT)
    void* stack = nullptr;
#else
    ucontext_t machine;
#endif
};

// Saves the running context and continues another.
void switch_context(Context& from, Context& to);

// Makes `context` start in `entry` (which never returns) on the stack [bottom, bottom + bytes).
void prepare_context(Context& context, char* bottom, std::size_t bytes, void (*entry)());

}  // namespace emu
