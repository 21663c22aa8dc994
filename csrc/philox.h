// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The only RNG, host and device.
//
// Contract (python/edlm/ops/_philox.py is its reference): the key is a sequence's 64-bit seed, the counter is
// (position, candidate, step offset, purpose). Nothing else enters a draw.
#pragma once

#include <cstdint>

#include "device.h"

// NOTE: functions are static: sources that are compiled for several instruction sets include this, and the linker would otherwise
// keep one copy for all, perhaps the one that needs AVX-512.
namespace edlm {

// Values are part of the contract: see Purpose in _philox.py, which has two more that no kernel draws.
enum class Purpose : uint32_t { kToken = 0, kSelect = 1, kResample = 2, kOpen = 3, kCorrupt = 4, kTime = 5 };

struct Words {
  uint32_t x, y, z, w;
};

struct Uniforms {
  double first, second;
};

EDLM_HD static inline Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.x;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.z;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The top 53 bits of a 64-bit word, in [0, 1). All 64 could round to 1.0.
EDLM_HD static inline double to_double(uint32_t low, uint32_t high) {
  return static_cast<double>(((uint64_t{high} << 32) | low) >> 11) * 0x1.0p-53;
}

EDLM_HD static inline Uniforms philox_uniform(int64_t seed, int64_t position, int64_t candidate, int64_t offset, Purpose purpose) {
  const Words r = philox4x32({static_cast<uint32_t>(position), static_cast<uint32_t>(candidate),
                              static_cast<uint32_t>(offset), static_cast<uint32_t>(purpose)},
                             static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  return {to_double(r.x, r.y), to_double(r.z, r.w)};
}

}  // namespace edlm
