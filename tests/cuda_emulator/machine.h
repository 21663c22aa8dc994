// What kernels ask of the emulated machine: emulator.h gives it CUDA's names, the .cpp files beside it do the work.
#pragma once

#include <cstddef>
#include <cstdint>

#include <driver_types.h>
#include <vector_types.h>

// Nothing of this leaves the library that the kernels are in: there may be several of them in one process.
#pragma GCC visibility push(hidden)

namespace emulator {

// What a thread may ask about itself.
struct Thread {
  dim3 index, block, block_size, grid_size;
  int linear, lane, warp;
  void* dynamic_shared;
};

// The thread that runs: one at a time, whatever the number of blocks.
extern Thread* running;
inline Thread& self() { return *running; }

enum class WarpOp : uint8_t { kSync, kShuffle, kBallot, kAll, kAny, kMatch, kAdd, kMin, kMax, kAnd, kOr, kXor };

struct Site {
  const char* file;
  int line;
};

// Counts, ors and ands the predicate over the block.
struct Votes {
  int count, any, all;
};
Votes barrier(int predicate, Site site);
// `source` is the lane that a shuffle reads. Values are up to eight bytes.
uint64_t meet(WarpOp op, unsigned mask, uint64_t value, int source, bool is_signed, Site site);
void grid_barrier(Site site);
[[noreturn]] void fail(const char* format, ...);

// Others may run first, if chance has it; others do run first.
void give_way();
void sleep();

// Only ThreadSanitizer's build has something to do at these: an atomic operation has read, has written, a fence for the whole device.
void atomic_read(const void* at);
void atomic_written(const void* at);
void fence();

void count_read(const void* from, size_t bytes);

void copy_async(void* to, const void* from, size_t bytes);
void copy_commit();
void copy_wait(size_t but);

struct Launch {
  const char* kernel;
  const void* function;
  dim3 grid, block_size;
  size_t dynamic_shared;
  bool is_cooperative;
  void (*run)(void*);
  void* body;
};
void launch(const Launch& asked);
// More than 48 KiB of shared memory must be asked for, kernel by kernel.
void allow_shared(const void* function, size_t bytes);
const char* sentence();
cudaError_t take_error();

}  // namespace emulator

#pragma GCC visibility pop
