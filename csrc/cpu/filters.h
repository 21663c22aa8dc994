// top-k, top-p, min-p of a row, in this order, from its tiles. See the NOTE in simd.h.
//
// All three keep a prefix of one order: larger logits first, the lower id among equals. So a filter is a cut in it. top-k and top-p find
// theirs by radix selection over the columns that can matter: one pass to collect them, then at most four over what is left; nothing is
// sorted. Masses are doubles: the cut is where the reference's is.
#pragma once

#include <cmath>

#include "../sampling.h"
#include "tiles.h"

namespace edlm {
namespace {

// A larger float has a larger key; both zeros have one.
inline uint32_t key_of(float x) {
  uint32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline float float_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7FFFFFFFu : ~key;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Softmax {
  double max, inverse;
  // Of n keys, eight at a time.
  void weights(const uint32_t* keys, int64_t n, double* out) const {
    f64x8 d;
    for (int j = 0; j < 8; ++j) d[j] = j < n ? static_cast<double>(float_of(keys[j])) : max;
    const f64x8 e = exp_negative((d - max) * inverse);
    std::memcpy(out, &e, sizeof e);
  }
};

// Keys above `key`, and the first `ties` columns whose key it is.
struct Cut {
  uint32_t key;
  int64_t ties;
  int64_t equal;  // columns whose key it is
};

// Where, in descending order, the running weight of keys[0 .. n) reaches `target`: weight 1 each (by_mass false), or the softmax's. The
// keys are reordered and lost. At most eight bits are decided in a pass, the first from where the largest and the least key differ.
inline Cut select_cut(uint32_t* keys, int64_t n, bool by_mass, const Softmax& softmax, double target) {
  uint32_t least = keys[0], largest = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    least = keys[i] < least ? keys[i] : least;
    largest = keys[i] > largest ? keys[i] : largest;
  }
  double before = 0;
  alignas(64) double weight[8];
  int undecided = largest == least ? 0 : 32 - __builtin_clz(largest - least);
  for (;;) {
    const int shift = undecided > 8 ? undecided - 8 : 0, size = 1 << (undecided - shift);
    const auto digit_of = [&](uint32_t key) { return static_cast<int>((key - least) >> shift & static_cast<uint32_t>(size - 1)); };
    double mass[256] = {};
    int64_t count[256] = {};
    for (int64_t i = 0; i < n; i += 8) {
      if (by_mass) softmax.weights(keys + i, n - i, weight);
      for (int64_t j = 0; j < 8 && i + j < n; ++j) {
        const int digit = digit_of(keys[i + j]);
        ++count[digit];
        if (by_mass) mass[digit] += weight[j];
      }
    }
    int digit = size - 1, last = digit;  // last: the lowest digit seen that has keys, where rounding keeps the target out of reach
    for (; digit >= 0; --digit) {
      if (count[digit] == 0) continue;
      last = digit;
      const double here = by_mass ? mass[digit] : static_cast<double>(count[digit]);
      if (before + here >= target) break;
      before += here;
    }
    if (digit < 0) digit = last, before -= by_mass ? mass[last] : static_cast<double>(count[last]);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i)
      if (digit_of(keys[i]) == digit) keys[kept++] = keys[i];
    n = kept;
    undecided = shift;
    if (undecided > 0) continue;
    // All that are left are equal.
    double each = 1;
    if (by_mass) softmax.weights(keys, 1, weight), each = weight[0];
    int64_t ties = 1;
    if (each > 0) ties = static_cast<int64_t>(std::ceil(std::fmin((target - before) / each, 1e15)));
    return {keys[0], ties < 1 ? 1 : ties > n ? n : ties, n};
  }
}

// Keys of the columns with x >= bound, in no order that matters. Returns how many.
template <class T>
int64_t collect(const Row<T>& row, const TileMass* tiles, float bound, uint32_t* keys) {
  int64_t n = 0;
  for (int64_t t = 0; t < num_tiles(row.vocab); ++t) {
    if (tiles[t].max < bound || tiles[t].max == kMinusInf) continue;
    for (int64_t first = t * kTile; first < (t + 1) * kTile && first < row.vocab; first += 16) {
      const f32x16 v = read16(row, first);
      if (!any(v >= bound)) continue;
      float lanes[16];
      std::memcpy(lanes, &v, sizeof lanes);
      for (float x : lanes) {
        keys[n] = key_of(x);
        n += (x >= bound) & (x != kMinusInf);
      }
    }
  }
  return n;
}

// The sum of exp((x - max) / T) in double.
template <class T>
double exact_mass(const Row<T>& row, const TileMass* tiles, const Softmax& softmax) {
  alignas(64) float buffer[kTile];
  f64x8 sum = splat(0.0);
  for (int64_t t = 0; t < num_tiles(row.vocab); ++t) {
    if (tiles[t].max == kMinusInf) continue;
    const int64_t first = t * kTile, last = first + kTile < row.vocab ? first + kTile : row.vocab;
    copy_columns(row, first, last, buffer);
    for (int64_t i = 0; i < last - first; i += 8) sum += exp_negative((widen8(buffer + i) - softmax.max) * softmax.inverse);
  }
  return fold_sum(sum);
}

// The k-th largest maximum of a tile, or -inf: no fewer than k columns are as large.
inline float kth_tile_max(const TileMass* tiles, int64_t n, int64_t k, const Softmax& softmax, uint32_t* keys) {
  if (k > n) return kMinusInf;
  for (int64_t t = 0; t < n; ++t) keys[t] = key_of(tiles[t].max);
  return float_of(select_cut(keys, n, false, softmax, static_cast<double>(k)).key);
}

// The key of the least float x with (x - max) / T >= log(min_p).
inline uint32_t min_p_key(double min_p, const Softmax& softmax) {
  const double line = std::log(min_p);
  uint32_t fails = key_of(kMinusInf), passes = key_of(static_cast<float>(softmax.max));
  while (passes - fails > 1) {
    const uint32_t middle = fails + (passes - fails) / 2;
    ((static_cast<double>(float_of(middle)) - softmax.max) * softmax.inverse >= line ? passes : fails) = middle;
  }
  return passes;
}

// Finds the row's cut and measures the tiles anew. The largest logit always stays, so the row's maximum does.
template <class T>
void filter_row(const SampleArgs& args, Row<T>* row, TileMass* tiles, float max, uint32_t* keys) {
  const int64_t n_tiles = num_tiles(args.vocab);
  const Softmax softmax{max, inverse_temperature(args.temperature)};
  Cut cut{0, 0, 0};  // key 0 is below that of every number: all stay
  int64_t n = -1;
  alignas(64) double weight[8];
  if (args.top_k > 0 && args.top_k < args.vocab) {
    const float bound = kth_tile_max(tiles, n_tiles, args.top_k, softmax, keys);
    n = collect(*row, tiles, bound, keys);
    if (n >= args.top_k) {
      cut = select_cut(keys, n, false, softmax, static_cast<double>(args.top_k));
      if (args.top_p < 1) {  // those that stay, once more: the selection lost them
        const int64_t seen = collect(*row, tiles, float_of(cut.key), keys);
        int64_t ties = 0;
        n = 0;
        for (int64_t i = 0; i < seen; ++i)
          if (keys[i] > cut.key || ties++ < cut.ties) keys[n++] = keys[i];
      }
    }
  }
  if (args.top_p < 1) {
    double total = 0;
    if (n < 0) {
      total = exact_mass(*row, tiles, softmax);
      // Columns so small that all of them together weigh less than what may be cut off.
      const double room = (1 - args.top_p) * total / static_cast<double>(args.vocab);
      const double bound = max + std::log(room) / softmax.inverse;
      n = collect(*row, tiles, bound > -1e38 ? static_cast<float>(bound - 1e-6 * std::fabs(bound)) : kMinusInf, keys);
    } else {
      for (int64_t i = 0; i < n; i += 8) {
        softmax.weights(keys + i, n - i, weight);
        for (int64_t j = 0; j < 8 && i + j < n; ++j) total += weight[j];
      }
    }
    const Cut of_top_k = cut;
    cut = select_cut(keys, n, true, softmax, args.top_p * total);
    if (cut.key == of_top_k.key) cut.equal = of_top_k.equal;
  }
  if (args.min_p > 0) {
    const uint32_t key = min_p_key(args.min_p, softmax);
    if (key > cut.key) cut = {key, 0, -1};  // all of its equals stay
  }

  row->is_cut = true;
  row->cut = cut.key == 0 ? kMinusInf : float_of(cut.key);
  row->tie_end = args.vocab;
  if (cut.ties < cut.equal) {  // the column of the last equal that stays
    int64_t seen = 0;
    alignas(64) float buffer[kTile];
    Row<T> uncut = *row;
    uncut.is_cut = false;
    for (int64_t t = 0; t < n_tiles && seen < cut.ties; ++t) {
      if (tiles[t].max < row->cut) continue;
      const int64_t first = t * kTile, last = first + kTile < args.vocab ? first + kTile : args.vocab;
      copy_columns(uncut, first, last, buffer);
      for (int64_t i = 0; i < last - first && seen < cut.ties; ++i)
        if (buffer[i] == row->cut && ++seen == cut.ties) row->tie_end = first + i + 1;
    }
  }
  const float inverse = static_cast<float>(softmax.inverse);
  for (int64_t t = 0; t < n_tiles; ++t) {
    if (tiles[t].max < row->cut)
      tiles[t] = {kMinusInf, {}, 0, 0};
    else
      read_tiles<true, false>(*row, inverse, t, t + 1, tiles);
  }
}

}  // namespace
}  // namespace edlm
