// A block of threads, as the scheduler sees it. Only one thread runs at a time, even where several blocks are alive.
#pragma once

#include <string>
#include <vector>

#include "machine.h"
#include "races.h"

#pragma GCC visibility push(hidden)

namespace emulator {

constexpr int kWarp = 32;

enum class Order { kForward, kReverse, kRandom };
extern Order order;
void seed(uint64_t with);
uint64_t random();

// What a thread that does not run waits for.
enum class Wait : uint8_t { kTurn, kBarrier, kWarp, kGrid, kSleep, kReturned };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, group;
};

// A CUDA thread.
struct Fiber : Thread {
  void* stack_pointer;
  Wait wait;
  WarpOp op;
  Site site;  // where it waits
  std::vector<Copy> copies;
  size_t groups;
  void* fake_stack;  // AddressSanitizer's
  races::Clocks clocks;
};

// Lanes that have come to a warp primitive, of those that its mask names.
struct Meeting {
  unsigned mask, arrived;
  WarpOp op;
  bool is_signed;
};

// Sets of lanes are bits. What lanes exchange is here and not with the fibers, so that it is in few lines of the cache.
struct Warp {
  Fiber* lane;
  unsigned all, ready, asleep, returned;
  int meetings;
  Meeting meeting[kWarp];
  uint64_t value[kWarp], result[kWarp];
  uint8_t source[kWarp];
};

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int live = 0, at_barrier = 0;
  const Fiber* first_at_barrier = nullptr;
  Votes votes{}, result{};  // of the barrier that fills, of the one before
  char* stacks = nullptr;
  size_t stacks_size = 0;
  void* dynamic_shared = nullptr;
  size_t dynamic_shared_size = 0;
  void* scheduler = nullptr;  // the stack pointer of what resumes fibers
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t bottom_size = 0;
  void* scheduler_clock = nullptr;  // ThreadSanitizer's

  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block();

  // Threads at their beginning, shared memory filled. Memory of the block before is used again where it fits.
  void prepare(dim3 at);
  // Runs for as long as some thread can go on. False if none could.
  bool advance();
  void release_barrier();
  void end_thread(Fiber& fiber);
};

extern Block* block;    // the one that runs
extern Launch present;  // the launch that runs
extern std::vector<Block*> residents;  // of a cooperative launch
extern bool is_stopped;

inline Fiber& current() { return static_cast<Fiber&>(*running); }

// Of a fiber, with a page that stops it. An odd number of pages, so that not all stacks use the same places of the processor's tables.
constexpr size_t kPage = 4096, kStack = 17 * kPage;
// The fiber's first switch will begin the kernel.
void lay_stack(Fiber& fiber, char* bottom);

// The first error is kept; nothing more of the launch runs.
void record(const std::string& text);
std::string where(const Block& block);
std::string waiting_at(const Fiber& fiber);

// Fills the static shared memory of the calling operating system's thread.
void poison_shared();
constexpr int kPoison = 0xFF;

}  // namespace emulator

#pragma GCC visibility pop
