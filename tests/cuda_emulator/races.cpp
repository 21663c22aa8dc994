// What ThreadSanitizer's build tells it: see races.h. In other builds, three empty functions.
#include "races.h"

#include <map>
#include <utility>
#include <vector>

#include "block.h"

#if defined(EMULATOR_TSAN)

extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* key);
void __tsan_release(void* key);
}

namespace emulator {
namespace races {

namespace {

constexpr unsigned kNoSync = 1;

std::map<std::pair<const void*, unsigned>, char> keys;
// Fibers of launches that are over: to make one takes longer than what else there is to do for it.
std::vector<void*> spare;

// ThreadSanitizer takes any address for a key, and does not write there.
void acquire(const void* key) { __tsan_acquire(const_cast<void*>(key)); }
void release(const void* key) { __tsan_release(const_cast<void*>(key)); }

// Does something in another's name, and comes back.
template <class Act>
void as(void* fiber, const Act& act) {
  void* before = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber, kNoSync);
  act();
  __tsan_switch_to_fiber(before, kNoSync);
}

// One that comes after all that the caller has done.
void make(void*& fiber) {
  if (spare.empty()) {
    fiber = __tsan_create_fiber(0);
    return;
  }
  fiber = spare.back();
  spare.pop_back();
  release(&fiber);
  as(fiber, [&] { acquire(&fiber); });
}

}  // namespace

void schedule(Block& of) { of.scheduler_clock = __tsan_get_current_fiber(); }

void begin(Fiber& fiber) {
  fiber.clocks = {};
  make(fiber.clocks.own);
}

void enter(const Fiber& fiber) { __tsan_switch_to_fiber(fiber.clocks.own, kNoSync); }
void leave(const Block& of) { __tsan_switch_to_fiber(of.scheduler_clock, kNoSync); }

void arrive(const Fiber& fiber, const void* key) {
  as(fiber.clocks.own, [=] { release(key); });
}

void depart(const Fiber& fiber, const void* key) {
  as(fiber.clocks.own, [=] { acquire(key); });
}

const void* key_of(const void* warp, unsigned mask) { return &keys[{warp, mask}]; }

void join(Block& of) {
  for (Fiber& fiber : of.fibers) {
    arrive(fiber, &of);
    for (void* clock : {fiber.clocks.own, fiber.clocks.told, fiber.clocks.heard})
      if (clock != nullptr) spare.push_back(clock);
  }
  acquire(&of);
}

void forget_keys() { keys.clear(); }

}  // namespace races

// An atomic operation alone orders nothing. What it reads may carry what others told by a fence and an atomic operation on the same
// address: the thread has heard it, and knows it from its next fence on.
void atomic_read(const void* at) {
  races::Clocks& clocks = current().clocks;
  if (clocks.heard == nullptr) races::make(clocks.heard);
  races::as(clocks.heard, [=] { races::acquire(at); });
}

// What the thread did before its last fence, and no more, is told.
void atomic_written(const void* at) {
  const races::Clocks& clocks = current().clocks;
  if (clocks.told != nullptr) races::as(clocks.told, [=] { races::release(at); });
}

void fence() {
  races::Clocks& clocks = current().clocks;
  if (clocks.heard != nullptr) {
    races::as(clocks.heard, [&] { races::release(&clocks.heard); });
    races::acquire(&clocks.heard);
  }
  if (clocks.told == nullptr) {
    races::make(clocks.told);
  } else {
    races::release(&clocks.told);
    races::as(clocks.told, [&] { races::acquire(&clocks.told); });
  }
}

}  // namespace emulator

#else

namespace emulator {

void atomic_read(const void*) {}
void atomic_written(const void*) {}
void fence() {}

}  // namespace emulator

#endif
