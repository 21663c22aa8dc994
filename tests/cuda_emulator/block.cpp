// The scheduler of a block: whose turn it is, and the barrier.
#include "switch.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace emulator {

Order order = Order::kForward;
Block* block = nullptr;

namespace {

uint64_t random_state = 1;

// Lane by lane, each once.
template <class Lane>
void step(Warp& warp, const Lane& lane_of) {
  const unsigned lanes = warp.ready;
  for (int i = 0; i < kWarp && !is_stopped; ++i) {
    const int lane = lane_of(i);
    if (!(lanes >> lane & 1)) continue;
    warp.ready &= ~(1u << lane);
    resume(warp.lane[lane]);
  }
}

void step(Warp& warp) {
  if (order == Order::kForward) return step(warp, [](int i) { return i; });
  if (order == Order::kReverse) return step(warp, [](int i) { return kWarp - 1 - i; });
  const auto chance = static_cast<int>(random() >> 32);  // an odd factor and an offset make some order of all lanes
  step(warp, [=](int i) { return ((chance | 1) * i + (chance >> 8)) & (kWarp - 1); });
}

// One turn: forward, all fibers once; otherwise one warp for as long as it can, while the others stand still. A fair random order would
// hide what only an unfair one shows: a warp that is through while another has not begun.
bool turn(std::vector<Warp>& warps) {
  bool ran = false;
  if (order == Order::kForward) {
    for (Warp& warp : warps)
      if (warp.ready != 0) step(warp), ran = true;
    return ran;
  }
  const size_t n = warps.size(), start = order == Order::kRandom ? random() % n : n - 1;
  for (size_t i = 0; i < n && !ran; ++i) {
    Warp& warp = warps[(start + n - i) % n];
    const bool is_brief = order == Order::kRandom && random() % 4 == 0;
    while (warp.ready != 0 && !is_stopped && !(ran && is_brief)) step(warp), ran = true;
  }
  return ran;
}

}  // namespace

void seed(uint64_t with) { random_state = with; }

uint64_t random() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

Block::~Block() {
  if (stacks != nullptr) munmap(stacks, stacks_size);
  std::free(dynamic_shared);
}

void Block::prepare(dim3 at) {
  const dim3 size = present.block_size;
  const int n = static_cast<int>(size.x * size.y * size.z);
  if (stacks_size < n * kStack) {
    if (stacks != nullptr) munmap(stacks, stacks_size);
    stacks_size = n * kStack;
    void* memory = mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<char*>(memory);
    // The lowest page of each stack may not be touched: one that grows too large stops the program rather than its neighbour's data.
    for (int i = 0; i < n; ++i) mprotect(stacks + i * kStack, kPage, PROT_NONE);
  }
  if (dynamic_shared_size != present.dynamic_shared) {  // exact, so that AddressSanitizer sees its end
    std::free(dynamic_shared);
    dynamic_shared = nullptr;
    dynamic_shared_size = present.dynamic_shared;
    if (dynamic_shared_size > 0 && posix_memalign(&dynamic_shared, 16, dynamic_shared_size) != 0) std::abort();
  }
  poison_shared();
  if (dynamic_shared != nullptr) std::memset(dynamic_shared, kPoison, dynamic_shared_size);

  index = at;
  live = n;
  at_barrier = 0;
  races::schedule(*this);
  fibers.resize(n);
  warps.resize((n + kWarp - 1) / kWarp);
  for (size_t w = 0; w < warps.size(); ++w) {
    Warp& warp = warps[w];
    warp.lane = &fibers[w * kWarp];
    warp.all = warp.ready = 0xFFFFFFFFu >> (kWarp - std::min(kWarp, n - static_cast<int>(w) * kWarp));
    warp.asleep = warp.returned = 0;
    warp.meetings = 0;
  }
  for (int i = 0; i < n; ++i) {
    Fiber& fiber = fibers[i];
    const dim3 thread(i % size.x, i / size.x % size.y, i / (size.x * size.y));
    static_cast<Thread&>(fiber) = {thread, at, size, present.grid, i, i % kWarp, i / kWarp, dynamic_shared};
    fiber.wait = Wait::kTurn;
    fiber.copies.clear();
    fiber.groups = 0;
    lay_stack(fiber, stacks + i * kStack);
    races::begin(fiber);
  }
}

bool Block::advance() {
  block = this;
  bool ran = false;
  for (Warp& warp : warps) {
    warp.ready |= warp.asleep;
    warp.asleep = 0;
  }
  while (live > 0 && !is_stopped && turn(warps)) ran = true;
  return ran;
}

void Block::release_barrier() {
  if (live < static_cast<int>(fibers.size())) {
    const auto returned = std::find_if(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.wait == Wait::kReturned; });
    return record(where(*this) + ": a barrier is completed although thread " + std::to_string(returned->linear) + " has returned");
  }
  result = votes;
  at_barrier = 0;
  for (Warp& warp : warps) warp.ready = warp.all;
  for (const Fiber& fiber : fibers) races::arrive(fiber, this);
  for (const Fiber& fiber : fibers) races::depart(fiber, this);
}

void Block::end_thread(Fiber& fiber) {
  fiber.wait = Wait::kReturned;
  warps[fiber.warp].returned |= 1u << fiber.lane;
  if (--live > 0 && at_barrier == live) release_barrier();
}

Votes barrier(int predicate, Site site) {
  Fiber& fiber = current();
  fiber.site = site, fiber.wait = Wait::kBarrier;
  if (block->at_barrier == 0) {
    block->first_at_barrier = &fiber;
    block->votes = {0, 0, 1};
  }
  const Fiber& first = *block->first_at_barrier;
  if (site.line != first.site.line || std::strcmp(site.file, first.site.file) != 0)
    record(where(*block) + ": threads wait at different barriers: " + waiting_at(first) + ", " + waiting_at(fiber));
  const bool is_true = predicate != 0;
  block->votes.count += is_true;
  block->votes.any |= is_true;
  block->votes.all &= is_true;
  if (++block->at_barrier == block->live) block->release_barrier();
  to_scheduler();
  return block->result;
}

void give_way() {
  if (order != Order::kRandom || random() % 4 != 0) return;
  block->warps[running->warp].ready |= 1u << running->lane;
  to_scheduler();
}

void sleep() {
  current().wait = Wait::kSleep;
  block->warps[running->warp].asleep |= 1u << running->lane;
  to_scheduler();
}

}  // namespace emulator
