// The uniforms of eight draws at once, bit by bit those of philox.h. See the NOTE in simd.h.
#pragma once

#include "../philox.h"
#include "simd.h"

namespace edlm {
namespace {

// The products of the low 32 bits of each lane. Named, because compilers make of the plain product one of 64 by 64 bits.
inline u64x8 multiply_low(u64x8 a, u64x8 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<u64x8>(_mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  __m256i x[2], y[2];
  std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 2; ++i) x[i] = _mm256_mul_epu32(x[i], y[i]);
  std::memcpy(&a, x, sizeof x);
  return a;
#elif defined(__x86_64__)
  __m128i x[4], y[4];
  std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 4; ++i) x[i] = _mm_mul_epu32(x[i], y[i]);
  std::memcpy(&a, x, sizeof x);
  return a;
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// The top 53 bits of a word of two halves, as to_double() has them. Each half is put in the mantissa of 2^52, which needs no conversion of
// 64-bit integers; both parts and their sum are exact.
inline f64x8 to_double(u64x8 low, u64x8 high) {
  const uint64_t two_52 = 0x4330000000000000u;
  const f64x8 upper = reinterpret_cast<f64x8>((high & 0xFFFFFFFFu) | two_52) - 0x1.0p52;
  const f64x8 lower = reinterpret_cast<f64x8>(((low & 0xFFFFFFFFu) >> 11) | two_52) - 0x1.0p52;
  return upper * 0x1.0p-32 + lower * 0x1.0p-53;
}

struct Uniforms8 {
  alignas(64) double first[8], second[8];
};

// Candidates candidate .. candidate + 7.
inline void philox_uniform8(int64_t seed, int64_t position, int64_t candidate, int64_t offset, Purpose purpose, Uniforms8* out) {
  const u64x8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  u64x8 x = u64x8{} + static_cast<uint32_t>(position), y = lanes + static_cast<uint64_t>(candidate);
  u64x8 z = u64x8{} + static_cast<uint32_t>(offset), w = u64x8{} + static_cast<uint32_t>(purpose);
  const u64x8 m0 = u64x8{} + uint64_t{0xD2511F53u}, m1 = u64x8{} + uint64_t{0xCD9E8D57u};
  u64x8 k0 = u64x8{} + static_cast<uint32_t>(seed), k1 = u64x8{} + (static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 10; ++round) {  // only the low halves count
    const u64x8 p0 = multiply_low(x, m0), p1 = multiply_low(z, m1);
    x = (p1 >> 32) ^ y ^ k0;
    z = (p0 >> 32) ^ w ^ k1;
    y = p1;
    w = p0;
    k0 += uint64_t{0x9E3779B9u};
    k1 += uint64_t{0xBB67AE85u};
  }
  const f64x8 first = to_double(x, y), second = to_double(z, w);
  std::memcpy(out->first, &first, sizeof first);
  std::memcpy(out->second, &second, sizeof second);
}

}  // namespace
}  // namespace edlm
