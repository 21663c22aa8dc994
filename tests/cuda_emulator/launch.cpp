// Launches: the blocks of a grid, one after another, or all alive at once, each on a thread of the operating system of its own. Even
// those run one at a time: they hand a baton on. Threads of their own give them static shared memory of their own.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <map>
#include <semaphore>
#include <thread>

#include "switch.h"

namespace emulator {

Launch present;
std::vector<Block*> residents;
bool is_stopped = false;

namespace {

std::string error;
cudaError_t code = cudaSuccess;
std::map<const void*, size_t> allowed_shared;
constexpr size_t kStaticShared = 8 << 10;  // it cannot be seen from here: as if each kernel had so much
int64_t at_grid_barrier;

dim3 index_of(uint64_t i) {
  const dim3 grid = present.grid;
  const auto x = static_cast<unsigned>(i % grid.x);
  const uint64_t rest = i / grid.x;
  return dim3(x, static_cast<unsigned>(rest % grid.y), static_cast<unsigned>(rest / grid.y));
}

std::vector<uint64_t> order_of_blocks(uint64_t n) {
  std::vector<uint64_t> blocks(n);
  for (uint64_t i = 0; i < n; ++i) blocks[i] = order == Order::kReverse ? n - 1 - i : i;
  if (order == Order::kRandom)
    for (uint64_t i = n - 1; i > 0; --i) std::swap(blocks[i], blocks[random() % (i + 1)]);
  return blocks;
}

void report_deadlock(const Block& of) {
  std::string text = where(of) + ": no thread can go on:";
  int shown = 0;
  for (const Fiber& fiber : of.fibers)
    if (fiber.wait != Wait::kReturned && ++shown <= 4) text += " " + waiting_at(fiber);
  record(text);
}

// A block on a thread of its own. The launcher says when it goes on, and waits for it.
class Resident {
 public:
  explicit Resident(dim3 index) : thread_([this, index] { run(index); }) { step(); }

  // True if the block has got on.
  bool step() {
    go_.release();
    back_.acquire();
    return ran_;
  }

  bool is_over() const { return block.live == 0; }

  void end() {
    is_ended_ = true;
    go_.release();
    thread_.join();
    races::join(block);
  }

  Block block;

 private:
  void run(dim3 index) {
    go_.acquire();
    block.prepare(index);
    back_.release();
    for (;;) {
      go_.acquire();
      if (is_ended_) return;
      ran_ = block.advance();
      back_.release();
    }
  }

  std::binary_semaphore go_{0}, back_{0};
  bool ran_ = false, is_ended_ = false;
  std::thread thread_;  // the last: it begins when the rest is there
};

// Until the end of the launch no block gives its memory, its thread or its fibers back: another block's would look like the same.
void run_residents(const std::vector<uint64_t>& blocks) {
  std::deque<Resident> all;
  const auto run = [&](Resident& resident) {
    while (!resident.is_over() && !is_stopped)
      if (!resident.step() && !is_stopped) report_deadlock(resident.block);
  };
  for (const uint64_t i : blocks) {
    if (is_stopped) break;
    residents.push_back(&all.emplace_back(index_of(i)).block);
    if (!present.is_cooperative) run(all.back());
  }
  for (bool ran = true; ran && !is_stopped;) {  // where a block waits for another, the others go on
    ran = false;
    for (Resident& resident : all)
      if (!resident.is_over() && !is_stopped) ran |= resident.step();
  }
  const auto stuck = std::find_if(all.begin(), all.end(), [](const Resident& resident) { return !resident.is_over(); });
  if (stuck != all.end() && !is_stopped) report_deadlock(stuck->block);
  residents.clear();
  for (Resident& resident : all) resident.end();
  races::forget_keys();
}

}  // namespace

void record(const std::string& text) {
  if (error.empty()) error = text;
  code = cudaErrorLaunchFailure;
  is_stopped = true;
}

std::string where(const Block& of) {
  char text[256];
  std::snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u)", present.kernel, of.index.x, of.index.y, of.index.z);
  return text;
}

void grid_barrier(Site site) {
  if (!present.is_cooperative) fail("sync() of the grid at %s:%d in a launch that is not cooperative", site.file, site.line);
  Fiber& fiber = current();
  fiber.site = site, fiber.wait = Wait::kGrid;
  int64_t threads = 0;
  for (const Block* each : residents) threads += static_cast<int64_t>(each->fibers.size());
  if (++at_grid_barrier == threads) {
    at_grid_barrier = 0;
    for (Block* each : residents) {
      for (Warp& warp : each->warps) warp.ready = warp.all;
      for (const Fiber& thread : each->fibers) races::arrive(thread, &present);
    }
    for (const Block* each : residents)
      for (const Fiber& thread : each->fibers) races::depart(thread, &present);
  }
  to_scheduler();
}

void allow_shared(const void* function, size_t bytes) { allowed_shared[function] = bytes; }

const char* sentence() { return error.c_str(); }

void launch(const Launch& asked) {
  if (code != cudaSuccess) return;
  const auto refuse = [&](const char* why) {
    error = std::string("launch of ") + asked.kernel + ": " + why;
    code = cudaErrorInvalidConfiguration;
  };
  const dim3 grid = asked.grid, size = asked.block_size;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || size.z > 64) return refuse("a block has 1 to 1024 threads");
  if (blocks == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    return refuse("a grid has 1 to 2^31 - 1, 65535 and 65535 blocks");
  if (asked.dynamic_shared > (227 << 10)) return refuse("more dynamic shared memory than a block may have (227 KiB)");
  if (asked.dynamic_shared > (48 << 10) - kStaticShared) {
    const auto allowed = allowed_shared.find(asked.function);
    if (allowed == allowed_shared.end() || allowed->second < asked.dynamic_shared)
      return refuse("more than 48 KiB of shared memory, counting 8 for what is static, which were not asked for (cudaFuncSetAttribute)");
  }
  if (asked.is_cooperative && blocks > 64) return refuse("a cooperative grid has up to 64 blocks here");
#if defined(EMULATOR_ASAN)
  if (asked.is_cooperative) return refuse("not cooperative under AddressSanitizer, where blocks have one shared memory");
#endif
  present = asked;
  is_stopped = false;
  at_grid_barrier = 0;
  const std::vector<uint64_t> in_order = order_of_blocks(blocks);
  if (asked.is_cooperative || races::kAreSeen) {
    run_residents(in_order);
  } else {
    static Block one;
    for (const uint64_t i : in_order) {
      one.prepare(index_of(i));
      while (one.live > 0 && !is_stopped)
        if (!one.advance() && !is_stopped) report_deadlock(one);
      if (is_stopped) break;
    }
  }
  running = nullptr;
}

cudaError_t take_error() {
  const cudaError_t taken = code;
  code = cudaSuccess;
  return taken;
}

}  // namespace emulator

// For tests: how threads take turns (0 forward, 1 reverse, 2 random), and the sentence of the last error, which is then forgotten.
extern "C" void emulator_schedule(int order, uint64_t seed) {
  emulator::order = static_cast<emulator::Order>(order);
  emulator::seed(seed);
}

extern "C" const char* emulator_error() {
  static std::string last;
  last.swap(emulator::error);
  emulator::error.clear();
  return last.c_str();
}
