// Races: what ThreadSanitizer is told about who comes before whom. It sees every access of the kernels by itself. Each CUDA thread is a
// fiber of ThreadSanitizer's; changing from one to another orders nothing. Order comes from what is called here, and from nothing else.
#pragma once

#pragma GCC visibility push(hidden)

namespace emulator {

struct Block;
struct Fiber;

namespace races {

// Handles of ThreadSanitizer's fibers. The last two run nothing: they stand for what a thread has told or heard by atomics and fences.
struct Clocks {
  void *own, *told, *heard;
};

#if defined(EMULATOR_TSAN)

constexpr bool kAreSeen = true;

// Who creates the block's threads and resumes them.
void schedule(Block& block);
// The thread begins after all that its creator has done.
void begin(Fiber& fiber);
// From now on, what is done is done by this fiber; by the scheduler of its block.
void enter(const Fiber& fiber);
void leave(const Block& block);
// All that the fiber did comes before what others do after depart() from the same key.
void arrive(const Fiber& fiber, const void* key);
void depart(const Fiber& fiber, const void* key);
// A key for the lanes of a mask.
const void* key_of(const void* warp, unsigned mask);
// The caller comes after all that the block's threads did. They are gone.
void join(Block& block);
// All blocks of the launch are joined.
void forget_keys();

#else

constexpr bool kAreSeen = false;

inline void schedule(Block&) {}
inline void begin(Fiber&) {}
inline void enter(const Fiber&) {}
inline void leave(const Block&) {}
inline void arrive(const Fiber&, const void*) {}
inline void depart(const Fiber&, const void*) {}
inline const void* key_of(const void*, unsigned) { return nullptr; }
inline void join(Block&) {}
inline void forget_keys() {}

#endif

}  // namespace races
}  // namespace emulator

#pragma GCC visibility pop
