// Warp primitives: a meeting of the lanes that a mask names. Results are given when the last of them has come.
#include "switch.h"

namespace emulator {

namespace {

const char* name_of(WarpOp op) {
  constexpr const char* names[] = {"__syncwarp",        "a shuffle",         "__ballot_sync",     "__all_sync",
                                   "__any_sync",        "__match_any_sync",  "__reduce_add_sync", "__reduce_min_sync",
                                   "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  return names[static_cast<int>(op)];
}

// Which of them ThreadSanitizer is to take for an order of what the lanes did to memory: all make lanes wait for each other, but CUDA
// promises that of __syncwarp alone.
constexpr bool orders_memory(WarpOp op) { return op == WarpOp::kSync; }

int lowest(unsigned lanes) { return __builtin_ctz(lanes); }

template <class Act>
void for_each(unsigned lanes, const Act& act) {
  for (; lanes != 0; lanes &= lanes - 1) act(lowest(lanes));
}

uint32_t combined(const Warp& warp, const Meeting& meeting) {
  uint32_t all = static_cast<uint32_t>(warp.value[lowest(meeting.mask)]);
  for_each(meeting.mask & (meeting.mask - 1), [&](int lane) {
    const auto v = static_cast<uint32_t>(warp.value[lane]);
    const bool is_less = meeting.is_signed ? static_cast<int32_t>(v) < static_cast<int32_t>(all) : v < all;
    switch (meeting.op) {
      case WarpOp::kAdd: all += v; break;
      case WarpOp::kMin: all = is_less ? v : all; break;
      case WarpOp::kMax: all = is_less ? all : v; break;
      case WarpOp::kAnd: all &= v; break;
      case WarpOp::kOr: all |= v; break;
      default: all ^= v; break;
    }
  });
  return all;
}

void give_all(Warp& warp, unsigned mask, uint64_t result) {
  for_each(mask, [&](int lane) { warp.result[lane] = result; });
}

void give_results(Warp& warp, const Meeting& meeting) {
  const unsigned mask = meeting.mask;
  const auto lanes_with = [&](auto holds) {
    unsigned lanes = 0;
    for_each(mask, [&](int lane) { lanes |= holds(warp.value[lane]) ? 1u << lane : 0; });
    return lanes;
  };
  const auto is_true = [](uint64_t value) { return value != 0; };
  switch (meeting.op) {
    case WarpOp::kSync: break;
    case WarpOp::kShuffle: for_each(mask, [&](int lane) { warp.result[lane] = warp.value[warp.source[lane]]; }); break;
    case WarpOp::kBallot: give_all(warp, mask, lanes_with(is_true)); break;
    case WarpOp::kAll: give_all(warp, mask, lanes_with(is_true) == mask); break;
    case WarpOp::kAny: give_all(warp, mask, lanes_with(is_true) != 0); break;
    case WarpOp::kMatch:
      for_each(mask, [&](int lane) {
        warp.result[lane] = lanes_with([&](uint64_t value) { return value == warp.value[lane]; });
      });
      break;
    default: give_all(warp, mask, combined(warp, meeting));
  }
}

// Which lanes of a mask are not what they must be: the errors of meet().
[[noreturn]] void refuse(const Warp& warp, WarpOp op, unsigned mask, int source, Site site) {
  const char* name = name_of(op);
  const int lane = running->lane;
  if (!(mask >> lane & 1)) fail("%s at %s:%d: lane %d is not in its own mask %08x", name, site.file, site.line, lane, mask);
  if (mask & ~warp.all)
    fail("%s at %s:%d: mask %08x names lane %d of a warp of %d", name, site.file, site.line, mask, lowest(mask & ~warp.all),
         __builtin_popcount(warp.all));
  if (mask & warp.returned)
    fail("%s at %s:%d: mask %08x names lane %d, which has returned", name, site.file, site.line, mask, lowest(mask & warp.returned));
  fail("a shuffle at %s:%d reads lane %d, which is not in its mask %08x", site.file, site.line, source, mask);
}

}  // namespace

uint64_t meet(WarpOp op, unsigned mask, uint64_t value, int source, bool is_signed, Site site) {
  Fiber& fiber = current();
  Warp& warp = block->warps[fiber.warp];
  const unsigned self = 1u << fiber.lane;
  if (!(mask & self) || (mask & (~warp.all | warp.returned)) || (op == WarpOp::kShuffle && !(mask >> source & 1)))
    refuse(warp, op, mask, source, site);
  int i = 0;
  while (i < warp.meetings && warp.meeting[i].mask != mask) ++i;
  Meeting& meeting = warp.meeting[i];
  if (i == warp.meetings) {
    meeting = {mask, 0, op, is_signed};
    ++warp.meetings;
  } else if (meeting.op != op) {
    const int lane = lowest(meeting.arrived);
    const Site other = warp.lane[lane].site;
    const char* before = name_of(meeting.op);
    fail("%s at %s:%d meets lane %d at %s (%s:%d)", name_of(op), site.file, site.line, lane, before, other.file, other.line);
  }
  warp.value[fiber.lane] = value;
  warp.source[fiber.lane] = static_cast<uint8_t>(source);
  fiber.site = site, fiber.op = op, fiber.wait = Wait::kWarp;
  meeting.arrived |= self;
  if (meeting.arrived == mask) {
    give_results(warp, meeting);
    meeting = warp.meeting[--warp.meetings];
    warp.ready |= mask;
    if (races::kAreSeen && orders_memory(op)) {
      const void* key = races::key_of(&warp, mask);
      for_each(mask, [&](int lane) { races::arrive(warp.lane[lane], key); });
      for_each(mask, [&](int lane) { races::depart(warp.lane[lane], key); });
    }
  }
  to_scheduler();
  return warp.result[fiber.lane];
}

std::string waiting_at(const Fiber& fiber) {
  const bool is_warp = fiber.wait == Wait::kWarp;
  const char* what = is_warp ? name_of(fiber.op) : fiber.wait == Wait::kBarrier ? "__syncthreads" : "the grid's sync()";
  const std::string line = std::to_string(fiber.site.line);
  return "thread " + std::to_string(fiber.linear) + " waits at " + what + " (" + fiber.site.file + ":" + line + ")";
}

}  // namespace emulator
