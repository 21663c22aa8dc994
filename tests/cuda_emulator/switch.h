// How one stack is left for another; AddressSanitizer (EMULATOR_ASAN) and ThreadSanitizer are told. All of it is inline: a processor
// guesses where a function returns to from the calls before; a guess that a change of stacks makes wrong costs more than the change.
#pragma once

#include "block.h"

#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif

#if defined(EMULATOR_ASAN)
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
#endif

namespace emulator {

// Keeps where the present stack stops in *from, and goes on where `to` stopped. The compiler saves the registers that it uses, all but
// the frame's; it may use the first 128 bytes below a stack.
inline __attribute__((always_inline)) void switch_stack(void** from, void* to) {
  asm volatile(
      "sub $128, %%rsp\n"
      "push %%rbp\n"
      "lea 1f(%%rip), %%rax\n"
      "push %%rax\n"
      "mov %%rsp, (%0)\n"
      "mov %1, %%rsp\n"
      "pop %%rax\n"
      "jmp *%%rax\n"
      "1:\n"
      "pop %%rbp\n"
      "add $128, %%rsp\n"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4",
        "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
}

// Gives way; returns when the fiber is resumed.
inline __attribute__((always_inline)) void to_scheduler([[maybe_unused]] bool is_over = false) {
  Fiber& fiber = current();
  races::leave(*block);
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(is_over ? nullptr : &fiber.fake_stack, block->bottom, block->bottom_size);
#endif
  switch_stack(&fiber.stack_pointer, block->scheduler);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(current().fake_stack, &block->bottom, &block->bottom_size);
#endif
}

// Runs a fiber until it gives way.
inline __attribute__((always_inline)) void resume(Fiber& fiber) {
  running = &fiber;
  races::enter(fiber);
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&block->fake_stack, block->stacks + fiber.linear * kStack, kStack);
#endif
  switch_stack(&block->scheduler, fiber.stack_pointer);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
#endif
}

}  // namespace emulator
