// Sixteen floats, eight doubles: GCC and Clang vector extensions, which the compiler lowers to whatever the instruction set has. One
// source therefore has one order of summation on every processor (where there is FMA, products are contracted: last bits differ), and
// needs no intrinsics but the ones named below.
//
// NOTE: this header is compiled once per instruction set. Everything in it is static, so that the linker never lets a baseline
// object call the AVX-512 copy of a function.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edlm {
namespace {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using f64x8 = double __attribute__((vector_size(64)));
using i64x8 = int64_t __attribute__((vector_size(64)));

struct bf16 {
  uint16_t bits;
};

inline f32x16 splat(float x) { return f32x16{} + x; }
inline f64x8 splat(double x) { return f64x8{} + x; }

inline f32x16 load16(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline f32x16 load16(const bf16* p) {
  u16x16 half;
  std::memcpy(&half, p, sizeof half);
  const u32x16 wide = __builtin_convertvector(half, u32x16) << 16;
  return reinterpret_cast<f32x16>(wide);
}

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t wide = uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}

// The larger of each lane; b where either is NaN. That is what the x86 instruction does; GCC turns the same ternary on vectors wider
// than the machine's into scalar code (measured: 5x the time of a whole row with AVX2), so the instruction is named.
inline f32x16 max_or_second(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32x16>(_mm512_maskz_max_ps(0xFFFF, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  __m256 x[2], y[2];
  std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 2; ++i) x[i] = _mm256_max_ps(x[i], y[i]);
  std::memcpy(&a, x, sizeof x);
  return a;
#elif defined(__x86_64__)
  __m128 x[4], y[4];
  std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 4; ++i) x[i] = _mm_max_ps(x[i], y[i]);
  std::memcpy(&a, x, sizeof x);
  return a;
#else
  return a > b ? a : b;
#endif
}

inline f64x8 max_or_second(f64x8 a, f64x8 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<f64x8>(_mm512_maskz_max_pd(0xFF, reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif defined(__x86_64__)
  __m128d x[4], y[4];
  std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 4; ++i) x[i] = _mm_max_pd(x[i], y[i]);
  std::memcpy(&a, x, sizeof x);
  return a;
#else
  return a > b ? a : b;
#endif
}

// Sums and maxima of sixteen lanes in one fixed order, whatever the instruction set: halves are folded.
inline float fold_sum(f32x16 v) {
  float lane[16];
  std::memcpy(lane, &v, sizeof lane);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

inline float fold_max(f32x16 v) {
  float lane[16];
  std::memcpy(lane, &v, sizeof lane);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// exp(d) for d <= 0, relative error below 1e-7; exactly 0 below -88; NaN stays NaN. Range reduction in two parts, a minimax
// polynomial of degree 6 on [-ln2/2, ln2/2] (1.9e-9), and a product with 2^n, which becomes 0 at n = -127.
inline f32x16 exp_negative(f32x16 d) {
  d = max_or_second(splat(-88.2f), d);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const f32x16 shifted = d * 1.44269504f + magic;
  const f32x16 n = shifted - magic;
  f32x16 r = d - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32x16 p = splat(0.00138368357f);
  p = p * r + 0.00837482405f;
  p = p * r + 0.0416682262f;
  p = p * r + 0.166664200f;
  p = p * r + 0.499999921f;
  p = p * r + 1.00000004f;
  p = p * r + 1.0f;
  const i32x16 exponent = (reinterpret_cast<i32x16>(shifted) + 127) << 23;
  return p * reinterpret_cast<f32x16>(exponent);
}

// The same in double, relative error of a few 1e-16; exactly 0 below -709.
inline f64x8 exp_negative(f64x8 d) {
  d = max_or_second(splat(-709.3), d);
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const f64x8 shifted = d * 1.4426950408889634 + magic;
  const f64x8 n = shifted - magic;
  f64x8 r = d - n * 0.693147180369123816490;  // ln 2, its first 33 bits: exact times n
  r = r - n * 1.90821492927058770002e-10;
  f64x8 p = splat(2.49942933457304636e-8);
  p = p * r + 2.76323082244525444e-7;
  p = p * r + 2.75576226520244885e-6;
  p = p * r + 2.48014864812834982e-5;
  p = p * r + 1.98412694324344383e-4;
  p = p * r + 1.38888889512612042e-3;
  p = p * r + 8.3333333335594518e-3;
  p = p * r + 4.1666666666492629e-2;
  p = p * r + 0.166666666666661682;
  p = p * r + 0.50000000000000177;
  p = p * r + 1.00000000000000003;
  p = p * r + 1.0;
  const i64x8 exponent = (reinterpret_cast<i64x8>(shifted) + 1023) << 52;
  return p * reinterpret_cast<f64x8>(exponent);
}

}  // namespace
}  // namespace edlm
