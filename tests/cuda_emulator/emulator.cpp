// The emulator's scheduler: fibers, barriers, warp primitives. Compiled without -fsanitize, whatever the kernels are; with EMULATOR_ASAN
// where they have AddressSanitizer, which must be told of every change of stack. No thread_local variable may stand here: the segment of this
// library is the kernels' shared memory, and is overwritten.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <unordered_set>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif

#if defined(EMULATOR_ASAN)
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
#endif

// Saves the registers that a function must keep on the present stack, its pointer in *from, and goes on where `to` stopped.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  push %rbx
  push %rbp
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
  pop %rbp
  pop %rbx
  ret
.size emulator_switch, .-emulator_switch
.section .note.GNU-stack,"",@progbits
.text
)");

namespace emulator {

void begin_fiber();

namespace {

constexpr size_t kStack = 64 << 10, kPage = 4096;
constexpr int kWarp = 32;
constexpr int kPoison = 0xFF;

enum class State { kReady, kBarrier, kWarp, kDone };
enum class Order { kForward, kReverse, kRandom };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, group;
};

struct Fiber : Thread {
  void* stack_pointer;
  State state = State::kReady;
  Site site{"", 0};
  int predicate = 0;
  Votes votes{};
  WarpOp op{};
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int source = 0;
  bool is_signed = false;
  std::vector<Copy> copies;
  size_t groups = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// The one block that runs.
struct {
  const char* kernel;
  dim3 index;
  std::vector<Fiber> fibers;
  int live, at_barrier;
  void (*run)(void*);
  void* body;
  char* stacks;
  size_t stacks_size;
  void* scheduler;  // its stack pointer
  void* fake_stack;
  const void* bottom;
  size_t bottom_size;
} block;

Fiber* current = nullptr;
Order order = Order::kForward;
uint64_t random_state = 1;
std::string error;
cudaError_t code = cudaSuccess;

uint64_t random() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

const char* name_of(WarpOp op) {
  constexpr const char* names[] = {"__syncwarp",        "a shuffle",         "__ballot_sync",     "__all_sync",
                                   "__any_sync",        "__match_any_sync",  "__reduce_add_sync", "__reduce_min_sync",
                                   "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  return names[static_cast<int>(op)];
}

// The first error is kept; nothing more of the launch runs.
void record(const std::string& text) {
  if (error.empty()) error = text;
  code = cudaErrorLaunchFailure;
}

std::string where() {
  char text[256];
  std::snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u)", block.kernel, block.index.x, block.index.y, block.index.z);
  return text;
}

void to_scheduler(bool is_over = false) {
  Fiber& fiber = *current;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(is_over ? nullptr : &fiber.fake_stack, block.bottom, block.bottom_size);
#endif
  (void)is_over;
  emulator_switch(&fiber.stack_pointer, block.scheduler);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &block.bottom, &block.bottom_size);
#endif
}

void resume(Fiber& fiber) {
  current = &fiber;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&block.fake_stack, block.stacks + fiber.linear * kStack, kStack);
#endif
  emulator_switch(&block.scheduler, fiber.stack_pointer);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);
#endif
}

void release_barrier() {
  const Fiber* first = nullptr;
  Votes votes{0, 0, 1};
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::kDone)
      return record(where() + ": a barrier is completed although thread " + std::to_string(fiber.linear) + " has returned");
    if (first == nullptr) first = &fiber;
    if (fiber.site.line != first->site.line || std::strcmp(fiber.site.file, first->site.file) != 0)
      return record(where() + ": threads wait at different barriers: thread " + std::to_string(first->linear) + " at " + first->site.file +
                    ":" + std::to_string(first->site.line) + ", thread " + std::to_string(fiber.linear) + " at " + fiber.site.file + ":" +
                    std::to_string(fiber.site.line));
    votes.count += fiber.predicate != 0;
    votes.any |= fiber.predicate != 0;
    votes.all &= fiber.predicate != 0;
  }
  for (Fiber& fiber : block.fibers) fiber.votes = votes, fiber.state = State::kReady;
  block.at_barrier = 0;
}

// All lanes of the mask have come with the same operation: gives each its result.
void complete(Fiber* warp, unsigned mask, WarpOp op) {
  uint64_t all = 0;
  bool is_first = true;
  unsigned ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t v = warp[lane].value;
    const bool is_signed = warp[lane].is_signed;
    if (v != 0) ballot |= 1u << lane;
    const auto less = [&](uint64_t a, uint64_t b) {
      return is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : static_cast<uint32_t>(a) < static_cast<uint32_t>(b);
    };
    if (is_first) all = v;
    else if (op == WarpOp::kAdd) all = static_cast<uint32_t>(all + v);
    else if (op == WarpOp::kMin) all = less(v, all) ? v : all;
    else if (op == WarpOp::kMax) all = less(all, v) ? v : all;
    else if (op == WarpOp::kAnd) all &= v;
    else if (op == WarpOp::kOr) all |= v;
    else if (op == WarpOp::kXor) all ^= v;
    is_first = false;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& fiber = warp[lane];
    if (op == WarpOp::kShuffle) {
      if (!(mask >> fiber.source & 1)) {
        char text[128];
        std::snprintf(text, sizeof text, ", thread %d: a shuffle at %s:%d reads lane %d, which is not in its mask %08x", fiber.linear,
                      fiber.site.file, fiber.site.line, fiber.source, mask);
        return record(where() + text);
      }
      fiber.result = warp[fiber.source].value;
    } else if (op == WarpOp::kBallot) {
      fiber.result = ballot;
    } else if (op == WarpOp::kAll) {
      fiber.result = ballot == mask;
    } else if (op == WarpOp::kAny) {
      fiber.result = ballot != 0;
    } else if (op == WarpOp::kMatch) {
      fiber.result = 0;
      for (int other = 0; other < kWarp; ++other)
        if ((mask >> other & 1) && warp[other].value == fiber.value) fiber.result |= 1u << other;
    } else {
      fiber.result = all;
    }
    fiber.state = State::kReady;
  }
}

// Runs a fiber until it waits. True if there was something to run.
bool step(Fiber& fiber) {
  if (fiber.state != State::kReady || code != cudaSuccess) return false;
  resume(fiber);
  return true;
}

// One turn: forward, all fibers once; otherwise one warp for as long as it can, while the others stand still. A fair random order would hide what
// only an unfair one shows: a warp that is through while another has not begun.
bool turn() {
  bool ran = false;
  const int n = static_cast<int>(block.fibers.size()), warps = (n + kWarp - 1) / kWarp;
  if (order == Order::kForward) {
    for (Fiber& fiber : block.fibers) ran |= step(fiber);
    return ran;
  }
  const int start = order == Order::kRandom ? static_cast<int>(random() % warps) : warps - 1;
  for (int i = 0; i < warps && !ran; ++i) {
    const int warp = (start - i + warps) % warps, first = warp * kWarp, lanes = std::min(kWarp, n - first);
    const int turns = order == Order::kRandom && random() % 4 == 0 ? 1 : 1 << 30;
    for (int j = 0; j < turns; ++j) {
      int lane[kWarp];
      for (int l = 0; l < lanes; ++l) lane[l] = lanes - 1 - l;
      if (order == Order::kRandom)
        for (int l = lanes - 1; l > 0; --l) std::swap(lane[l], lane[random() % (l + 1)]);
      bool some = false;
      for (int l = 0; l < lanes; ++l) some |= step(block.fibers[first + lane[l]]);
      if (!some) break;
      ran = true;
    }
  }
  return ran;
}

void report_deadlock() {
  std::string text = where() + ": no thread can go on:";
  int shown = 0;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::kDone || ++shown > 4) continue;
    text += " thread " + std::to_string(fiber.linear) + " waits at " +
            (fiber.state == State::kBarrier ? "__syncthreads" : name_of(fiber.op)) + " (" + fiber.site.file + ":" +
            std::to_string(fiber.site.line) + ")";
  }
  record(text);
}

// The thread-local segment of the library that the kernel is in: its static shared memory.
void poison_shared(const void* kernel) {
#if !defined(EMULATOR_ASAN)
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* key) {
        bool is_here = false;
        size_t size = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const auto offset = reinterpret_cast<uintptr_t>(key) - (info->dlpi_addr + segment.p_vaddr);
          if (segment.p_type == PT_LOAD && offset < segment.p_memsz) is_here = true;
          if (segment.p_type == PT_TLS) size = segment.p_memsz;
        }
        if (is_here && info->dlpi_tls_data != nullptr) std::memset(info->dlpi_tls_data, kPoison, size);
        return is_here ? 1 : 0;
      },
      const_cast<void*>(kernel));
#else
  (void)kernel;
#endif
}

void run_block(const void* kernel, dim3 grid, dim3 size, dim3 index, size_t dynamic_shared) {
  const int n = static_cast<int>(size.x * size.y * size.z);
  const size_t wanted = n * kStack;
  if (block.stacks_size < wanted) {
    if (block.stacks != nullptr) munmap(block.stacks, block.stacks_size);
    void* memory = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    block.stacks = static_cast<char*>(memory);
    block.stacks_size = wanted;
    // The lowest page of each stack may not be touched: one that grows too large stops the program rather than its neighbour's data.
    for (int i = 0; i < n; ++i) mprotect(block.stacks + i * kStack, kPage, PROT_NONE);
  }
  poison_shared(kernel);
  void* shared = nullptr;  // of exact size, so that AddressSanitizer sees its end
  if (dynamic_shared > 0 && posix_memalign(&shared, 16, dynamic_shared) != 0) std::abort();
  if (shared != nullptr) std::memset(shared, kPoison, dynamic_shared);

  block.index = index;
  block.live = n;
  block.at_barrier = 0;
  block.fibers.assign(n, Fiber{});
  for (int i = 0; i < n; ++i) {
    Fiber& fiber = block.fibers[i];
    static_cast<Thread&>(fiber) = {dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y)), index, size, grid, i, i % kWarp, i / kWarp, shared};
    auto** top = reinterpret_cast<void**>(block.stacks + (i + 1) * kStack);
    *--top = nullptr;  // where begin_fiber would return to; also keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&begin_fiber);
    for (int j = 0; j < 6; ++j) *--top = nullptr;
    fiber.stack_pointer = top;
  }
  while (block.live > 0 && code == cudaSuccess)
    if (!turn() && code == cudaSuccess) report_deadlock();
  std::free(shared);
  current = nullptr;
}

}  // namespace

// What a fiber runs, from its first switch on. It never returns: nothing is above it on its stack.
void begin_fiber() {
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &block.bottom, &block.bottom_size);
#endif
  block.run(block.body);
  Fiber& fiber = *current;
  if (!fiber.copies.empty()) fail("the thread ends with %zu asynchronous copies that it did not wait for", fiber.copies.size());
  fiber.state = State::kDone;
  if (--block.live > 0 && block.at_barrier == block.live) release_barrier();
  to_scheduler(true);
  std::abort();
}

Thread& self() { return *current; }

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  record(where() + ", thread " + std::to_string(current->linear) + ": " + text);
  for (;;) to_scheduler();  // the launch is over; the scheduler does not come back
}

Votes barrier(int predicate, Site site) {
  Fiber& fiber = *current;
  fiber.site = site;
  fiber.predicate = predicate;
  fiber.state = State::kBarrier;
  if (++block.at_barrier == block.live) release_barrier();
  to_scheduler();
  return fiber.votes;
}

uint64_t meet(WarpOp op, unsigned mask, uint64_t value, int source, bool is_signed, Site site) {
  Fiber& fiber = *current;
  Fiber* warp = &block.fibers[fiber.warp * kWarp];
  const int lanes = std::min(kWarp, static_cast<int>(block.fibers.size()) - fiber.warp * kWarp);
  if (!(mask >> fiber.lane & 1))
    fail("%s at %s:%d: lane %d is not in its own mask %08x", name_of(op), site.file, site.line, fiber.lane, mask);
  fiber.op = op, fiber.mask = mask, fiber.value = value, fiber.source = source, fiber.is_signed = is_signed;
  fiber.site = site;
  fiber.state = State::kWarp;
  bool all = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (lane >= lanes) fail("%s at %s:%d: mask %08x names lane %d of a warp of %d", name_of(op), site.file, site.line, mask, lane, lanes);
    const Fiber& other = warp[lane];
    if (other.state == State::kDone)
      fail("%s at %s:%d: mask %08x names lane %d, which has returned", name_of(op), site.file, site.line, mask, lane);
    if (other.state != State::kWarp || other.mask != mask)
      all = false;
    else if (other.op != op)
      fail("%s at %s:%d meets lane %d at %s (%s:%d)", name_of(op), site.file, site.line, lane, name_of(other.op), other.site.file,
           other.site.line);
  }
  if (all) complete(warp, mask, op);
  to_scheduler();
  return fiber.result;
}

void give_way() {
  if (order == Order::kRandom && random() % 4 == 0) to_scheduler();
}

// Off unless a test asks: bytes asked for by __ldg, and the 32-byte sectors of memory that they lie in.
struct {
  bool is_on;
  uint64_t requested;
  std::unordered_set<uintptr_t> sectors;
} traffic;

void count_read(const void* from, size_t bytes) {
  if (!traffic.is_on) return;
  traffic.requested += bytes;
  const auto first = reinterpret_cast<uintptr_t>(from);
  for (uintptr_t sector = first / 32; sector <= (first + bytes - 1) / 32; ++sector) traffic.sectors.insert(sector);
}

void copy_async(void* to, const void* from, size_t bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || bits % bytes != 0) fail("an asynchronous copy of %zu bytes, %p to %p", bytes, from, to);
  current->copies.push_back({to, from, bytes, current->groups});
}

void copy_commit() { ++current->groups; }

// All groups but the last `but` are copied.
void copy_wait(size_t but) {
  Fiber& fiber = *current;
  const auto is_due = [&](const Copy& copy) { return copy.group + but < fiber.groups; };
  for (const Copy& copy : fiber.copies)
    if (is_due(copy)) std::memcpy(copy.to, copy.from, copy.bytes);
  fiber.copies.erase(std::remove_if(fiber.copies.begin(), fiber.copies.end(), is_due), fiber.copies.end());
}

void launch(const char* name, const void* kernel, dim3 grid, dim3 size, size_t dynamic_shared, void (*run)(void*), void* body) {
  if (code != cudaSuccess) return;
  const auto refuse = [&](const char* why) {
    error = std::string("launch of ") + name + ": " + why;
    code = cudaErrorInvalidConfiguration;
  };
  const uint64_t threads = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || size.z > 64) return refuse("a block has 1 to 1024 threads");
  if (blocks == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) return refuse("a grid has 1 to 2^31 - 1, 65535 and 65535 blocks");
  if (dynamic_shared > (227 << 10)) return refuse("more dynamic shared memory than a block may have (227 KiB)");
  block.kernel = name, block.run = run, block.body = body;
  std::vector<uint64_t> blocks_in_order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) blocks_in_order[i] = order == Order::kReverse ? blocks - 1 - i : i;
  if (order == Order::kRandom)
    for (uint64_t i = blocks - 1; i > 0; --i) std::swap(blocks_in_order[i], blocks_in_order[random() % (i + 1)]);
  for (const uint64_t i : blocks_in_order) {
    if (code != cudaSuccess) return;
    const dim3 index(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y), static_cast<unsigned>(i / grid.x / grid.y));
    run_block(kernel, grid, size, index, dynamic_shared);
  }
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
  emulator::random_state = seed;
}

extern "C" const char* emulator_error() {
  static std::string last;
  last.swap(emulator::error);
  emulator::error.clear();
  return last.c_str();
}

// Starts counting the reads by __ldg, or stops: returns the bytes asked for since the start, and the distinct bytes of memory, in sectors.
extern "C" void emulator_count(int is_on, uint64_t* requested, uint64_t* distinct) {
  if (requested != nullptr) *requested = emulator::traffic.requested;
  if (distinct != nullptr) *distinct = 32 * emulator::traffic.sectors.size();
  emulator::traffic.is_on = is_on != 0;
  emulator::traffic.requested = 0;
  emulator::traffic.sectors.clear();
}
