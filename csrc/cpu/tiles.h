// One read of a row of logits, tile by tile: what sampling and log-probabilities have in common. See the NOTE in simd.h.
#pragma once

#include "../tiles.h"
#include "simd.h"

namespace edlm {
namespace {

constexpr float kMinusInf = -__builtin_inff();

// A row as it is to be read: its logits stay untouched, and columns that are excluded count as -inf.
template <class T>
struct Row {
  const T* x;
  int64_t vocab;
  const int64_t* forbidden;
  int64_t num_forbidden;
  // A filter keeps logits above `cut`, and those equal to it at columns below `tie_end`.
  bool is_cut = false;
  float cut = kMinusInf;
  int64_t tie_end = 0;
};

template <class T>
bool excludes(const Row<T>& row, int64_t begin, int64_t end) {
  if (row.is_cut) return true;
  for (int64_t i = 0; i < row.num_forbidden; ++i)
    if (row.forbidden[i] >= begin && row.forbidden[i] < end) return true;
  return false;
}

// Columns begin .. begin + 15 as floats; the excluded ones, and what lies beyond the vocabulary, are -inf.
template <class T>
f32x16 read16(const Row<T>& row, int64_t begin) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t left = row.vocab - begin;
  if (left <= 0) return splat(kMinusInf);
  f32x16 v = left >= 16 ? load16(row.x + begin) : load_first(row.x + begin, static_cast<int>(left));
  for (int64_t i = 0; i < row.num_forbidden; ++i) {
    const int64_t at = row.forbidden[i] - begin;
    if (at >= 0 && at < 16) v = exclude(v, lane == static_cast<int32_t>(at));
  }
  if (row.is_cut) {
    const int64_t ties = row.tie_end - begin;
    const i32x16 is_tie = lane < static_cast<int32_t>(ties < 0 ? 0 : ties > 16 ? 16 : ties);
    v = exclude(v, ~((v > row.cut) | ((v == row.cut) & is_tie)));
  }
  return v;
}

// The same for [begin, end), padded with -inf up to a multiple of kBlock.
template <class T>
void copy_columns(const Row<T>& row, int64_t begin, int64_t end, float* out) {
  for (int64_t i = 0; i < (end - begin + kBlock - 1) / kBlock * kBlock; i += 16) {
    const f32x16 v = read16(row, begin + i);
    std::memcpy(out + i, &v, sizeof v);
  }
}

// Bytes that are fetched ahead of those that are exponentiated: two pages, which the processor's own prefetchers do not cross. (A tile
// ahead took 1.2 times as long where logits come from memory.) Beyond the end of the logits a prefetch reads nothing.
constexpr size_t kAhead = 8192;

// `blocks` whole blocks of 64 columns: their maximum, and the columns themselves as floats, in `out` where they are not floats yet.
inline float max_and_widen(const float* x, int blocks, const float** wide, float*) {
  *wide = x;
  f32x16 m0 = splat(kMinusInf), m1 = m0, m2 = m0, m3 = m0;
  for (int i = 0; i < blocks; ++i) {
    m0 = max_or_second(load16(x + i * kBlock), m0);
    m1 = max_or_second(load16(x + i * kBlock + 16), m1);
    m2 = max_or_second(load16(x + i * kBlock + 32), m2);
    m3 = max_or_second(load16(x + i * kBlock + 48), m3);
  }
  return fold_max(max_or_second(max_or_second(m0, m1), max_or_second(m2, m3)));
}

template <class T>
float max_and_widen(const T* x, int blocks, const float** wide, float* out) {
  *wide = out;
  f32x16 m0 = splat(kMinusInf), m1 = m0, m2 = m0, m3 = m0;
  for (int i = 0; i < blocks; ++i) {
    f32x16 v[4];
    load32(x + i * kBlock, v, v + 1);
    load32(x + i * kBlock + 32, v + 2, v + 3);
    m0 = max_or_second(v[0], m0), m1 = max_or_second(v[1], m1);
    m2 = max_or_second(v[2], m2), m3 = max_or_second(v[3], m3);
    std::memcpy(out + i * kBlock, v, sizeof v);
  }
  return fold_max(max_or_second(max_or_second(m0, m1), max_or_second(m2, m3)));
}

// A NaN or +inf anywhere makes the sum of its block NaN: the maximum passes over NaN, but x - max does not.
//
// 1 / T is rounded to a float here, by at most 6e-8 of itself; only distances inside a tile feel it, since tiles are weighed against
// each other in double.
template <bool kTempered, bool kModel, class T>
void tile_mass(const T* x, int blocks, float inverse, TileMass* tile) {
  alignas(64) float buffer[kTile];
  const float* wide;
  const float max = max_and_widen(x, blocks, &wide, buffer);
  tile->max = max;
  // All -inf: measure against 0 instead, so that the sums are 0 rather than NaN, unless there is a NaN.
  const f32x16 reference = splat(max == kMinusInf ? 0.0f : max);
  f32x16 sum[kBlocksPerTile], model = splat(0.0f);
  for (int i = 0; i < blocks; ++i) {
    for (size_t line = 0; line < kBlock * sizeof(T); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x + i * kBlock) + kAhead + line);
    f32x16 d0 = load16(wide + i * kBlock) - reference;
    f32x16 d1 = load16(wide + i * kBlock + 16) - reference;
    f32x16 d2 = load16(wide + i * kBlock + 32) - reference;
    f32x16 d3 = load16(wide + i * kBlock + 48) - reference;
    if constexpr (kModel) model += (exp_negative(d0) + exp_negative(d1)) + (exp_negative(d2) + exp_negative(d3));
    if constexpr (kTempered) d0 *= inverse, d1 *= inverse, d2 *= inverse, d3 *= inverse;
    sum[i] = (exp_negative(d0) + exp_negative(d1)) + (exp_negative(d2) + exp_negative(d3));
  }
  for (int i = blocks; i < kBlocksPerTile; ++i) sum[i] = splat(0.0f);
  const f32x4 low = fold_sums(sum[0], sum[1], sum[2], sum[3]), high = fold_sums(sum[4], sum[5], sum[6], sum[7]);
  std::memcpy(tile->block, &low, sizeof low);
  std::memcpy(tile->block + 4, &high, sizeof high);
  if constexpr (kModel) tile->model_sum = fold_sum(model);
}

// Tiles [begin, end) of a row into tiles[begin .. end).
template <bool kTempered, bool kModel, class T>
void read_tiles(const Row<T>& row, float inverse, int64_t begin, int64_t end, TileMass* tiles) {
  alignas(64) float buffer[kTile];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * kTile, last = first + kTile < row.vocab ? first + kTile : row.vocab;
    if (last - first == kTile && !excludes(row, first, last)) {
      tile_mass<kTempered, kModel>(row.x + first, kBlocksPerTile, inverse, tiles + t);
    } else {
      copy_columns(row, first, last, buffer);
      tile_mass<kTempered, kModel>(buffer, static_cast<int>((last - first + kBlock - 1) / kBlock), inverse, tiles + t);
    }
  }
}

// Calls kernel<T>(...) for the type of the logits.
#define EDLM_BY_DTYPE(kernel, ...)                                 \
  (args.dtype == DType::kFloat32    ? kernel<float>(__VA_ARGS__)   \
   : args.dtype == DType::kBFloat16 ? kernel<bf16>(__VA_ARGS__)    \
                                    : kernel<f16>(__VA_ARGS__))

inline double tile_sum(const TileMass& tile) {
  double sum = 0;
  for (float block : tile.block) sum += block;
  return sum;
}

}  // namespace
}  // namespace edlm
