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

// How far ahead of what is exponentiated logits are fetched, in bytes: into the second cache level from four pages on, which the
// processor's own prefetchers do not cross, and from there into the first. Beyond the end of the logits a prefetch reads nothing.
constexpr size_t kFar = 16384, kNear = 4096;

template <class T>
void fetch_ahead(const T* block) {
  for (size_t line = 0; line < kBlock * sizeof(T); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(block) + kFar + line, 0, 2);
    __builtin_prefetch(reinterpret_cast<const char*>(block) + kNear + line, 0, 3);
  }
}

// A tile before it is exponentiated: its maximum, and its columns as floats, in a buffer of its own where they are not floats yet.
template <class T>
class Front {
 public:
  void begin() {
    for (f32x16& max : max_) max = splat(kMinusInf);
  }

  // A block of 64 columns at x, the i-th of its tile.
  void add(const T* x, int i) {
    f32x16 v[4];
    if constexpr (sizeof(T) == sizeof(float)) {
      for (int j = 0; j < 4; ++j) v[j] = load16(x + 16 * j);
      if (i == 0) wide_ = x;
    } else {
      load32(x, v, v + 1);
      load32(x + 32, v + 2, v + 3);
      std::memcpy(buffer_ + i * kBlock, v, sizeof v);
    }
    for (int j = 0; j < 4; ++j) max_[j] = max_or_second(v[j], max_[j]);
  }

  float max() const { return fold_max(max_or_second(max_or_second(max_[0], max_[1]), max_or_second(max_[2], max_[3]))); }

  const float* block(int i) const {
    if constexpr (sizeof(T) == sizeof(float))
      return wide_ + i * kBlock;
    else
      return buffer_ + i * kBlock;
  }

 private:
  f32x16 max_[4];
  alignas(64) float buffer_[sizeof(T) == sizeof(float) ? 16 : kTile];
  const float* wide_;
};

// The masses of the tile in `front`, of so many whole blocks, while `next` is filled with the tile at `ahead`: a maximum takes long to be
// known, and would otherwise be waited for once a tile.
//
// A NaN or +inf anywhere makes the sum of its block NaN: the maximum passes over NaN, but x - max does not. 1 / T is rounded to a float here,
// by at most 6e-8 of itself; only distances inside a tile feel it, since tiles are weighed against each other in double.
template <bool kTempered, bool kModel, class T>
void tile_mass(const Front<T>& front, int blocks, float inverse, TileMass* tile, const T* ahead, Front<T>* next) {
  const float max = front.max();
  tile->max = max;
  // All -inf: measure against 0 instead, so that the sums are 0 rather than NaN, unless there is a NaN.
  const f32x16 reference = splat(max == kMinusInf ? 0.0f : max);
  f32x16 sum[kBlocksPerTile], model = splat(0.0f);
  next->begin();
  for (int i = 0; i < blocks; ++i) {
    fetch_ahead(ahead + i * kBlock);
    next->add(ahead + i * kBlock, i);
    const float* x = front.block(i);
    f32x16 d[4];
    for (int j = 0; j < 4; ++j) d[j] = load16(x + 16 * j) - reference;
    if constexpr (kModel) model += (exp_negative(d[0]) + exp_negative(d[1])) + (exp_negative(d[2]) + exp_negative(d[3]));
    if constexpr (kTempered)
      for (int j = 0; j < 4; ++j) d[j] *= inverse;
    sum[i] = (exp_negative(d[0]) + exp_negative(d[1])) + (exp_negative(d[2]) + exp_negative(d[3]));
  }
  for (int i = blocks; i < kBlocksPerTile; ++i) sum[i] = splat(0.0f);
  const f32x4 low = fold_sums(sum[0], sum[1], sum[2], sum[3]), high = fold_sums(sum[4], sum[5], sum[6], sum[7]);
  std::memcpy(tile->block, &low, sizeof low);
  std::memcpy(tile->block + 4, &high, sizeof high);
  tile->sum = fold_sum(widen8(tile->block));
  if constexpr (kModel) tile->model_sum = fold_sum(model);
}

// Tiles [begin, end) of a row into tiles[begin .. end).
template <bool kTempered, bool kModel, class T>
void read_tiles(const Row<T>& row, float inverse, int64_t begin, int64_t end, TileMass* tiles) {
  const auto is_plain = [&](int64_t t) { return (t + 1) * kTile <= row.vocab && !excludes(row, t * kTile, (t + 1) * kTile); };
  Front<T> fronts[2];
  for (int64_t t = begin; t < end;) {
    if (!is_plain(t)) {
      const int64_t first = t * kTile, last = first + kTile < row.vocab ? first + kTile : row.vocab;
      const int blocks = static_cast<int>((last - first + kBlock - 1) / kBlock);
      alignas(64) float buffer[kTile];
      copy_columns(row, first, last, buffer);
      Front<float> front, unused;
      front.begin();
      for (int i = 0; i < blocks; ++i) front.add(buffer + i * kBlock, i);
      tile_mass<kTempered, kModel, float>(front, blocks, inverse, tiles + t++, buffer, &unused);
      continue;
    }
    // A run of tiles that are read in place; after the last one, itself again, for nothing.
    int64_t last = t;
    while (last + 1 < end && is_plain(last + 1)) ++last;
    fronts[0].begin();
    for (int i = 0; i < kBlocksPerTile; ++i) fronts[0].add(row.x + t * kTile + i * kBlock, i);
    for (int side = 0; t <= last; ++t, side ^= 1)
      tile_mass<kTempered, kModel>(fronts[side], kBlocksPerTile, inverse, tiles + t, row.x + (t < last ? t + 1 : t) * kTile,
                                   fronts + (side ^ 1));
  }
}

// Calls kernel<T>(...) for the type of the logits.
#define EDLM_BY_DTYPE(kernel, ...)                                 \
  (args.dtype == DType::kFloat32    ? kernel<float>(__VA_ARGS__)   \
   : args.dtype == DType::kBFloat16 ? kernel<bf16>(__VA_ARGS__)    \
                                    : kernel<f16>(__VA_ARGS__))

inline float max_of(const TileMass* tiles, int64_t n) {
  float max = kMinusInf;
  for (int64_t t = 0; t < n; ++t) max = tiles[t].max > max ? tiles[t].max : max;
  return max;
}

// Calls add(t, mass), for t < n in order, with each tile's mass measured against `max`: sums of its blocks (or its model_sum, at temperature 1)
// times exp((its maximum - max) / T). In double, since this is where tiles are weighed against each other.
template <class Add>
void weigh_tiles(const TileMass* tiles, int64_t n, double max, double inverse, bool is_model, const Add& add) {
  for (int64_t t = 0; t < n; t += 8) {
    f64x8 d = splat(0.0);
    for (int64_t j = 0; j < 8 && t + j < n; ++j) d[j] = static_cast<double>(tiles[t + j].max) - max;
    const f64x8 scale = exp_negative(d * inverse);
    for (int64_t j = 0; j < 8 && t + j < n; ++j) add(t + j, (is_model ? tiles[t + j].model_sum : tiles[t + j].sum) * scale[j]);
  }
}

}  // namespace
}  // namespace edlm
