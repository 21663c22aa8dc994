// Fibers: where one begins, and where one is stopped by an error.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "switch.h"

namespace emulator {

Thread* running = nullptr;

namespace {

// What a fiber runs, from its first switch on. It never returns: nothing is above it on its stack.
void begin_fiber() {
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &block->bottom, &block->bottom_size);
#endif
  present.run(present.body);
  Fiber& fiber = current();
  if (!fiber.copies.empty()) fail("the thread ends with %zu asynchronous copies that it did not wait for", fiber.copies.size());
  block->end_thread(fiber);
  to_scheduler(true);
  std::abort();
}

}  // namespace

void lay_stack(Fiber& fiber, char* bottom) {
  // Tops at different distances from the stacks' ends, or all would have the same few lines of the cache.
  const size_t distance = (fiber.linear * 5 % 32 + 1) * 64;
  auto** top = reinterpret_cast<void**>(bottom + kStack - distance);
  *--top = nullptr;  // where begin_fiber would return to; also keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&begin_fiber);
  fiber.stack_pointer = top;
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  record(where(*block) + ", thread " + std::to_string(running->linear) + ": " + text);
  for (;;) to_scheduler();  // the launch is over; the scheduler does not come back
}

}  // namespace emulator
