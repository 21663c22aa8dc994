// Memory: shared memory before a block begins, asynchronous copies, and reads that are counted.
#include <link.h>

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "block.h"

namespace emulator {

namespace {

#if !defined(EMULATOR_ASAN)
// Static shared memory is thread_local. It fills, with this byte, the thread-local segment of the library that the kernels and the
// emulator are in, so that no other thread_local variable may stand here: it would be overwritten.
thread_local char anchor;

struct Segment {
  ptrdiff_t before_anchor;
  size_t size;
};

Segment find_segment(char* at) {
  struct Found {
    char* anchor;
    Segment segment;
  } found{at, {0, 1}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* into) {
        auto& to = *static_cast<Found*>(into);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const ptrdiff_t before = to.anchor - static_cast<char*>(info->dlpi_tls_data);
          const bool is_here = before >= 0 && before < static_cast<ptrdiff_t>(header.p_memsz);
          if (header.p_type != PT_TLS || info->dlpi_tls_data == nullptr || !is_here) continue;
          to.segment = {before, header.p_memsz};
          return 1;
        }
        return 0;
      },
      &found);
  return found.segment;
}
#endif

// Off unless a test asks: bytes asked for by __ldg, and the 32-byte sectors of memory that they lie in.
struct {
  bool is_on;
  uint64_t requested;
  std::unordered_set<uintptr_t> sectors;
} traffic;

}  // namespace

void poison_shared() {
#if !defined(EMULATOR_ASAN)
  char* at = &anchor;  // asking for its address makes the segment, for a thread that has none yet
  static const Segment segment = find_segment(at);
  std::memset(at - segment.before_anchor, kPoison, segment.size);
#endif
}

void copy_async(void* to, const void* from, size_t bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || bits % bytes != 0)
    fail("an asynchronous copy of %zu bytes, %p to %p", bytes, from, to);
  Fiber& fiber = current();
  fiber.copies.push_back({to, from, bytes, fiber.groups});
}

void copy_commit() { ++current().groups; }

// All groups but the last `but` are copied. memcpy is a call, which sanitizers see.
void copy_wait(size_t but) {
  Fiber& fiber = current();
  const auto is_due = [&](const Copy& copy) { return copy.group + but < fiber.groups; };
  for (const Copy& copy : fiber.copies)
    if (is_due(copy)) std::memcpy(copy.to, copy.from, copy.bytes);
  fiber.copies.erase(std::remove_if(fiber.copies.begin(), fiber.copies.end(), is_due), fiber.copies.end());
}

void count_read(const void* from, size_t bytes) {
  if (!traffic.is_on) return;
  traffic.requested += bytes;
  const auto first = reinterpret_cast<uintptr_t>(from);
  for (uintptr_t sector = first / 32; sector <= (first + bytes - 1) / 32; ++sector) traffic.sectors.insert(sector);
}

}  // namespace emulator

// Starts counting the reads by __ldg, or stops: returns the bytes asked for since the start, and the distinct bytes of memory, in
// sectors.
extern "C" void emulator_count(int is_on, uint64_t* requested, uint64_t* distinct) {
  using emulator::traffic;
  if (requested != nullptr) *requested = traffic.requested;
  if (distinct != nullptr) *distinct = 32 * traffic.sectors.size();
  traffic.is_on = is_on != 0;
  traffic.requested = 0;
  traffic.sectors.clear();
}
