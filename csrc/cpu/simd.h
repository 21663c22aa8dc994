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
using i32x4 = int32_t __attribute__((vector_size(16)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using f32x8 = float __attribute__((vector_size(32)));
using f32x4 = float __attribute__((vector_size(16)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using f64x8 = double __attribute__((vector_size(64)));
using i64x8 = int64_t __attribute__((vector_size(64)));
using u64x8 = uint64_t __attribute__((vector_size(64)));

struct bf16 {
  static constexpr uint16_t kMinusInf = 0xFF80;
  uint16_t bits;
};

struct f16 {
  static constexpr uint16_t kMinusInf = 0xFC00;
  uint16_t bits;
};

// Not f64x8{} + x, which must add: -0.0 + 0.0 is +0.0.
inline f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline f64x8 splat(double x) { return f64x8{x, x, x, x, x, x, x, x}; }

inline f32x16 load16(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline f32x16 load16(const bf16* p) {
#if defined(__AVX512F__)
  __m256i half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<f32x16>(reinterpret_cast<u32x16>(_mm512_maskz_cvtepu16_epi32(0xFFFF, half)) << 16);
#else
  u16x16 half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<f32x16>(__builtin_convertvector(half, u32x16) << 16);
#endif
}

// Thirty-two columns at p: two of them share a 32-bit word, so that a shift and a mask are all it takes. first and second hold them in
// an order of their own, the same everywhere: even columns, odd columns.
inline void load32(const bf16* p, f32x16* first, f32x16* second) {
  u32x16 pair;
  std::memcpy(&pair, p, sizeof pair);
  *first = reinterpret_cast<f32x16>(pair << 16);
  *second = reinterpret_cast<f32x16>(pair & 0xFFFF0000u);
}

inline f32x16 load16(const f16* p) {
#if defined(__AVX512F__)
  __m256i half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<f32x16>(_mm512_maskz_cvtph_ps(0xFFFF, half));
#elif defined(__F16C__)
  __m128i half[2];
  std::memcpy(half, p, sizeof half);
  const __m256 wide[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  f32x16 v;
  std::memcpy(&v, wide, sizeof v);
  return v;
#else
  // Exponent and mantissa move up by 13 bits, and a product with 2^112 corrects the bias, denormals included. An exponent of all ones
  // (NaN, infinity) is set again.
  u16x16 half;
  std::memcpy(&half, p, sizeof half);
  const u32x16 wide = __builtin_convertvector(half, u32x16);
  const f32x16 scaled = reinterpret_cast<f32x16>((wide & 0x7FFFu) << 13) * 0x1.0p112f;
  const u32x16 special = reinterpret_cast<u32x16>((wide & 0x7C00u) == 0x7C00u) & 0x7F800000u;
  return reinterpret_cast<f32x16>(reinterpret_cast<u32x16>(scaled) | special | ((wide & 0x8000u) << 16));
#endif
}

// The first `count` of sixteen lanes from p, the rest -inf.
inline f32x16 load_first(const float* p, int count) {
  const float nothing = -__builtin_inff();
#if defined(__AVX512F__)
  return reinterpret_cast<f32x16>(_mm512_mask_loadu_ps(_mm512_set1_ps(nothing), (1u << count) - 1, p));
#else
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i < count ? p[i] : nothing;
  return load16(lanes);
#endif
}

template <class T>
f32x16 load_first(const T* p, int count) {
  T lanes[16];
  const uint16_t nothing = T::kMinusInf;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m256i v = _mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<int16_t>(nothing)), (1u << count) - 1, p);
  std::memcpy(lanes, &v, sizeof v);
#else
  for (int i = 0; i < 16; ++i) lanes[i].bits = i < count ? p[i].bits : nothing;
#endif
  return load16(lanes);
}

inline float to_float(float x) { return x; }
template <class T>
float to_float(T x) {
  return load_first(&x, 1)[0];
}

inline bool any(i32x16 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#else
  uint64_t part[8];
  std::memcpy(part, &mask, sizeof part);
  return ((part[0] | part[1]) | (part[2] | part[3]) | (part[4] | part[5]) | (part[6] | part[7])) != 0;
#endif
}

// Lanes where the mask is not 0 become -inf.
inline f32x16 exclude(f32x16 v, i32x16 mask) {
  const i32x16 nothing = i32x16{} + static_cast<int32_t>(0xFF800000);
  return reinterpret_cast<f32x16>((reinterpret_cast<i32x16>(v) & ~mask) | (nothing & mask));
}

inline void load32(const f16* p, f32x16* first, f32x16* second) {
  *first = load16(p);
  *second = load16(p + 16);
}

// `count` floats to p, rounded to the nearest, ties to even.
inline void store(const float* x, int64_t count, float* p) { std::memcpy(p, x, count * sizeof *p); }

inline void store(const float* x, int64_t count, bf16* p) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
    p[i].bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
}

inline void store(const float* x, int64_t count, f16* p) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits, half;
    std::memcpy(&bits, x + i, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
    float denormal;  // 0.5 has the spacing of half's denormals: the addition rounds
    std::memcpy(&denormal, &size, sizeof denormal);
    denormal += 0.5f;
    std::memcpy(&half, &denormal, sizeof half);
    half -= 0x3F000000u;
    if (size >= 0x38800000u) half = (size - 0x38000000u + 0xFFFu + (size >> 13 & 1)) >> 13;
    if (size >= 0x47800000u) half = size > 0x7F800000u ? 0x7E00u : 0x7C00u;
    p[i].bits = static_cast<uint16_t>(sign | half);
  }
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
inline f32x4 fold_to_4(f32x16 v) {
  f32x8 half[2];
  std::memcpy(half, &v, sizeof half);
  const f32x8 sum = half[0] + half[1];
  f32x4 quarter[2];
  std::memcpy(quarter, &sum, sizeof quarter);
  return quarter[0] + quarter[1];
}

#if defined(__clang__) || __GNUC__ >= 12
#define EDLM_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define EDLM_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (i32x4{i, j, k, l}))
#endif

// Four at once: one by one they would cost as much as the exponentials that they add up.
inline f32x4 fold_sums(f32x16 v0, f32x16 v1, f32x16 v2, f32x16 v3) {
  const f32x4 a = fold_to_4(v0), b = fold_to_4(v1), c = fold_to_4(v2), d = fold_to_4(v3);
  const f32x4 ab = EDLM_SHUFFLE4(a, b, 0, 1, 4, 5) + EDLM_SHUFFLE4(a, b, 2, 3, 6, 7);
  const f32x4 cd = EDLM_SHUFFLE4(c, d, 0, 1, 4, 5) + EDLM_SHUFFLE4(c, d, 2, 3, 6, 7);
  return EDLM_SHUFFLE4(ab, cd, 0, 2, 4, 6) + EDLM_SHUFFLE4(ab, cd, 1, 3, 5, 7);
}

inline float fold_sum(f32x16 v) {
  const f32x4 sum = fold_to_4(v);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

inline float fold_max(f32x16 v) {
  f32x4 q[4];
  std::memcpy(q, &v, sizeof q);
  q[0] = q[0] > q[1] ? q[0] : q[1];
  q[2] = q[2] > q[3] ? q[2] : q[3];
  q[0] = q[0] > q[2] ? q[0] : q[2];
  const float a = q[0][0] > q[0][1] ? q[0][0] : q[0][1], b = q[0][2] > q[0][3] ? q[0][2] : q[0][3];
  return a > b ? a : b;
}

inline double fold_sum(f64x8 v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

// Eight floats as doubles.
inline f64x8 widen8(const float* p) {
#if defined(__AVX512F__)  // GCC 12 makes two halves of the conversion
  return reinterpret_cast<f64x8>(_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(p)));
#else
  f32x8 v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, f64x8);
#endif
}

inline void narrow8(f64x8 v, float* p) {
  const f32x8 narrow = __builtin_convertvector(v, f32x8);
  std::memcpy(p, &narrow, sizeof narrow);
}

inline f64x8 load8(const double* p) {
  f64x8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store8(double* p, f64x8 v) { std::memcpy(p, &v, sizeof v); }

// How many lanes are at most x.
inline int count_up_to(f64x8 v, double x) {
#if defined(__AVX512F__)
  return __builtin_popcount(_mm512_cmp_pd_mask(reinterpret_cast<__m512d>(v), _mm512_set1_pd(x), _CMP_LE_OQ));
#else
  const i64x8 n = v <= x;
  return -static_cast<int>(((n[0] + n[1]) + (n[2] + n[3])) + ((n[4] + n[5]) + (n[6] + n[7])));
#endif
}

inline f64x8 min_with_0(f64x8 v) { return reinterpret_cast<f64x8>(reinterpret_cast<i64x8>(v) & (v < 0.0)); }

// n + 1 in the lanes where a <= b.
inline i64x8 count_where(i64x8 n, f64x8 a, f64x8 b) {
#if defined(__AVX512F__)
  const __mmask8 mask = _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), _CMP_LE_OQ);
  const __m512i v = reinterpret_cast<__m512i>(n);
  return reinterpret_cast<i64x8>(_mm512_mask_add_epi64(v, mask, v, _mm512_set1_epi64(1)));
#else
  return n - (a <= b);
#endif
}

// Prefix sums of eight lanes.
inline f64x8 scan(f64x8 v) {
#if defined(__AVX512F__)
  // Three shifts, where a chain would wait for seven additions and then for its own stores.
  const __m512i by_1 = _mm512_setr_epi64(0, 0, 1, 2, 3, 4, 5, 6), by_2 = _mm512_setr_epi64(0, 0, 0, 1, 2, 3, 4, 5);
  const __m512i by_4 = _mm512_setr_epi64(0, 0, 0, 0, 0, 1, 2, 3);
  v += reinterpret_cast<f64x8>(_mm512_maskz_permutexvar_pd(0xFE, by_1, reinterpret_cast<__m512d>(v)));
  v += reinterpret_cast<f64x8>(_mm512_maskz_permutexvar_pd(0xFC, by_2, reinterpret_cast<__m512d>(v)));
  v += reinterpret_cast<f64x8>(_mm512_maskz_permutexvar_pd(0xF0, by_4, reinterpret_cast<__m512d>(v)));
  return v;
#else
  for (int i = 1; i < 8; ++i) v[i] += v[i - 1];
  return v;
#endif
}

// exp(d) for d <= 0, relative error below 3e-7 (and mean error below 2e-8); exactly 0 below -88; NaN stays NaN. A minimax polynomial of
// degree 5 on [-ln2/2, ln2/2] (9e-8), times 2^n, which is 0 at n = -127. With degree 6 the law of the draws
// is no nearer to the softmax: what is left is the rounding of floats.
inline f32x16 exp_negative(f32x16 d) {
  d = max_or_second(splat(-88.2f), d);
  const float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits; 127: a float's bias
  const f32x16 shifted = d * 1.44269504f + magic;
  const f32x16 n = shifted - magic;
#if defined(__FMA__) || defined(__aarch64__)
  const f32x16 r = d - n * 0.693147182f;  // one rounding; the constant is off by 2e-9
#else
  const f32x16 r = (d - n * 0.693359375f) + n * 2.12194440e-4f;  // the first product is exact
#endif
  f32x16 p = splat(0.00829031618586752f);
  p = p * r + 0.04189793282504681f;
  p = p * r + 0.1666763620034831f;
  p = p * r + 0.49999149504877566f;
  p = p * r + 0.9999997071807268f;
  p = p * r + 1.0f;
  return p * reinterpret_cast<f32x16>(reinterpret_cast<i32x16>(shifted) << 23);
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
