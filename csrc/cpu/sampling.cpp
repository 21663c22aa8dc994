// Tile-mass inverse CDF on a CPU. docs/algorithms.md has the mathematics; ops/sampling.py the reference.
//
// 1. tile_masses: one read of a row in tiles of 512 columns; each leaves its maximum and the sums of its eight blocks.
// 2. draw: the row's log-sum-exp in double; per draw a tile by a double prefix over tile masses, then inside it a block by the block
//    sums and a column by a double prefix over 64 re-read logits, both under the second uniform.
//
// Compiled once per instruction set (cmake/isa.cmake sets EDLM_ISA); see the note in simd.h before calling anything of std.
#include "../sampling.h"

#include <cmath>

#include "../philox.h"
#include "simd.h"

#ifndef EDLM_ISA
#error "EDLM_ISA names the instruction set; cmake/isa.cmake defines it"
#endif

namespace edlm {
namespace {

constexpr float kMinusInf = -__builtin_inff();

template <class T>
const T* row_logits(const SampleArgs& args, int64_t row) {
  const int64_t b = row / args.length, l = row % args.length;
  return static_cast<const T*>(args.logits) + b * args.stride_b + l * args.stride_l;
}

bool forbidden_in(const SampleArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < args.num_forbidden; ++i)
    if (args.forbidden[i] >= begin && args.forbidden[i] < end) return true;
  return false;
}

// Columns [begin, end) as floats, the forbidden ones at -inf, padded with -inf up to a multiple of kBlock. The logits stay untouched.
template <class T>
void copy_columns(const SampleArgs& args, const T* x, int64_t begin, int64_t end, float* out) {
  const int count = static_cast<int>(end - begin);
  const int padded = (count + kBlock - 1) / kBlock * kBlock;
  for (int i = 0; i < count; ++i) out[i] = to_float(x[begin + i]);
  for (int i = count; i < padded; ++i) out[i] = kMinusInf;
  for (int64_t i = 0; i < args.num_forbidden; ++i) {
    const int64_t id = args.forbidden[i];
    if (id >= begin && id < end) out[id - begin] = kMinusInf;
  }
}

// exp is 0 below -200, and d may be -inf. 1 / T is rounded to a float here, by at most 6e-8 of itself; only distances inside a tile
// feel it, since tiles are weighed against each other in double.
inline f32x16 tempered(f32x16 d, float inverse) { return max_or_second(splat(-200.0f), d * inverse); }

// `blocks` whole blocks of 64 columns. A NaN or +inf anywhere makes the sum of its block NaN: the maximum passes over
// NaN, but x - max does not.
template <bool kTempered, class T>
void tile_mass(const T* x, int blocks, float inverse, TileMass* tile) {
  f32x16 m0 = splat(kMinusInf), m1 = m0, m2 = m0, m3 = m0;
  for (int i = 0; i < blocks; ++i) {
    m0 = max_or_second(load16(x + i * kBlock), m0);
    m1 = max_or_second(load16(x + i * kBlock + 16), m1);
    m2 = max_or_second(load16(x + i * kBlock + 32), m2);
    m3 = max_or_second(load16(x + i * kBlock + 48), m3);
  }
  const float max = fold_max(max_or_second(max_or_second(m0, m1), max_or_second(m2, m3)));
  tile->max = max;
  // All -inf: measure against 0 instead, so that the sums are 0 rather than NaN, unless there is a NaN.
  const f32x16 reference = splat(max == kMinusInf ? 0.0f : max);
  f32x16 model0 = splat(0.0f), model1 = model0, model2 = model0, model3 = model0;
  for (int i = 0; i < kBlocksPerTile; ++i) {
    if (i >= blocks) {
      tile->block[i] = 0.0f;
      continue;
    }
    // The next tile on its way while this one is exponentiated: without it a row of V = 151936 takes 1.7 times as long. A prefetch past the row's
    // end reads nothing.
    for (size_t line = 0; line < kBlock * sizeof(T); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x + kTile + i * kBlock) + line);
    f32x16 d0 = load16(x + i * kBlock) - reference;
    f32x16 d1 = load16(x + i * kBlock + 16) - reference;
    f32x16 d2 = load16(x + i * kBlock + 32) - reference;
    f32x16 d3 = load16(x + i * kBlock + 48) - reference;
    if constexpr (kTempered) {
      model0 += exp_negative(d0);
      model1 += exp_negative(d1);
      model2 += exp_negative(d2);
      model3 += exp_negative(d3);
      d0 = tempered(d0, inverse), d1 = tempered(d1, inverse), d2 = tempered(d2, inverse), d3 = tempered(d3, inverse);
    }
    tile->block[i] = fold_sum((exp_negative(d0) + exp_negative(d1)) + (exp_negative(d2) + exp_negative(d3)));
  }
  if constexpr (kTempered) tile->model_sum = fold_sum((model0 + model1) + (model2 + model3));
}

template <class T>
void tile_masses_of(const SampleArgs& args, int64_t row, int64_t begin, int64_t end, TileMass* tiles) {
  const T* x = row_logits<T>(args, row);
  const bool is_tempered = args.model_log_probs != nullptr;
  const float inverse = static_cast<float>(inverse_temperature(args));
  alignas(64) float buffer[kTile];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * kTile, last = first + kTile < args.vocab ? first + kTile : args.vocab;
    const int blocks = static_cast<int>((last - first + kBlock - 1) / kBlock);
    if (last - first == kTile && !forbidden_in(args, first, last)) {
      is_tempered ? tile_mass<true>(x + first, blocks, inverse, tiles + t) : tile_mass<false>(x + first, blocks, inverse, tiles + t);
    } else {
      copy_columns(args, x, first, last, buffer);
      is_tempered ? tile_mass<true>(buffer, blocks, inverse, tiles + t) : tile_mass<false>(buffer, blocks, inverse, tiles + t);
    }
  }
}

// First index whose prefix exceeds target; the last one that has mass where rounding leaves none. Without branches, since a draw's
// path cannot be predicted.
int64_t upper_bound(const double* prefix, int64_t n, double target) {
  const double* base = prefix;
  for (int64_t size = n; size > 1;) {
    const int64_t half = size / 2;
    base = base[half - 1] <= target ? base + half : base;
    size -= half;
  }
  int64_t index = base - prefix + (*base <= target ? 1 : 0);
  if (index < n) return index;
  for (index = n - 1; index > 0 && prefix[index] == prefix[index - 1];) --index;
  return index;
}

double tile_sum(const TileMass& tile) {
  double sum = 0;
  for (float block : tile.block) sum += block;
  return sum;
}

struct Column {
  int64_t id;
  double logit;
};

// A column of the tile, in proportion to exp(x / T), by the second uniform.
template <class T>
Column draw_column(const SampleArgs& args, const T* x, int64_t t, const TileMass& tile, double inverse, double u) {
  double left = u * tile_sum(tile);
  int chosen = 0;
  for (int i = 0; i < kBlocksPerTile; ++i) {
    if (tile.block[i] == 0.0f) continue;
    chosen = i;
    if (left < tile.block[i]) break;
    left -= tile.block[i];
  }
  // What is left, as a share of the block: its sum in double differs from the one in float by rounding, and every column that has
  // mass must stay within reach.
  const double share = left / tile.block[chosen];

  const int64_t first = t * kTile + chosen * kBlock;
  const int64_t last = first + kBlock < args.vocab ? first + kBlock : args.vocab;
  alignas(64) float logits[kBlock];
  copy_columns(args, x, first, last, logits);
  // Prefixes of eight groups of eight, then of the eight in the chosen group: a serial prefix over 64 would be one long chain.
  alignas(64) double p[kBlock];
  double group[8];
  for (int g = 0; g < 8; ++g) {
    f64x8 d;
    for (int j = 0; j < 8; ++j) d[j] = logits[8 * g + j];
    const f64x8 e = exp_negative((d - static_cast<double>(tile.max)) * inverse);
    std::memcpy(p + 8 * g, &e, sizeof e);
    group[g] = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
  }
  for (int g = 1; g < 8; ++g) group[g] += group[g - 1];
  const double target = share * group[7];
  const int64_t g = upper_bound(group, 8, target);
  double* column = p + 8 * g;
  for (int i = 1; i < 8; ++i) column[i] += column[i - 1];
  const int64_t i = 8 * g + upper_bound(column, 8, target - (g > 0 ? group[g - 1] : 0.0));
  return {first + i, logits[i]};
}

template <class T>
int64_t argmax(const SampleArgs& args, const T* x, const TileMass* tiles, int64_t n, float max) {
  alignas(64) float buffer[kTile];
  for (int64_t t = 0; t < n; ++t) {
    if (tiles[t].max != max) continue;
    const int64_t first = t * kTile, last = first + kTile < args.vocab ? first + kTile : args.vocab;
    copy_columns(args, x, first, last, buffer);
    for (int64_t i = 0; i < last - first; ++i)
      if (buffer[i] == max) return first + i;
  }
  return 0;  // not reached: some tile attains the maximum
}

double clamp_max_0(double x) { return x < 0 ? x : 0; }

// Whatever the caller does with the report, no id that it reads is out of range.
int64_t fail_row(const SampleArgs& args, int64_t b, int64_t l, int64_t code) {
  for (int64_t k = 0; k < args.num_samples; ++k) {
    const int64_t out = (b * args.num_samples + k) * args.length + l;
    args.tokens[out] = 0;
    args.log_probs[out] = __builtin_nanf("");
    if (args.model_log_probs) args.model_log_probs[out] = __builtin_nanf("");
  }
  return code;
}

template <class T>
int64_t draw_of(const SampleArgs& args, int64_t row, const TileMass* tiles, double* scratch) {
  const int64_t b = row / args.length, l = row % args.length, n = num_tiles(args);
  const T* x = row_logits<T>(args, row);
  float max = kMinusInf;
  for (int64_t t = 0; t < n; ++t) {
    if (!(tile_sum(tiles[t]) <= 1e30)) return fail_row(args, b, l, kNonFinite);
    max = tiles[t].max > max ? tiles[t].max : max;
  }
  if (max == kMinusInf) return fail_row(args, b, l, kNoSupport);

  const double inverse = inverse_temperature(args);
  double* prefix = scratch;
  double total = 0, model_total = 0;
  for (int64_t t = 0; t < n; t += 8) {
    f64x8 d;
    for (int64_t j = 0; j < 8; ++j) d[j] = t + j < n ? static_cast<double>(tiles[t + j].max) - max : 0.0;
    const f64x8 scale = exp_negative(d * inverse);
    for (int64_t j = 0; j < 8 && t + j < n; ++j) prefix[t + j] = total += tile_sum(tiles[t + j]) * scale[j];
    if (args.model_log_probs == nullptr) continue;
    const f64x8 model_scale = exp_negative(d);
    for (int64_t j = 0; j < 8 && t + j < n; ++j) model_total += tiles[t + j].model_sum * model_scale[j];
  }
  const double log_model_total = std::log(model_total);
  const double log_total = std::log(total);

  const int64_t offset = args.offset[b * args.offset_stride];
  const int64_t position = args.position ? args.position[row] : l;
  const int64_t greedy = args.temperature > 0 ? -1 : argmax(args, x, tiles, n, max);
  for (int64_t k = 0; k < args.num_samples; ++k) {
    const int64_t out = (b * args.num_samples + k) * args.length + l;
    Column column{greedy, max};
    double log_prob = 0;
    if (greedy < 0) {
      const Uniforms u = philox_uniform(args.seed[b], position, k, offset, Purpose::kToken);
      const int64_t t = upper_bound(prefix, n, u.first * total);
      column = draw_column(args, x, t, tiles[t], inverse, u.second);
      log_prob = clamp_max_0((column.logit - max) * inverse - log_total);
    }
    args.tokens[out] = column.id;
    args.log_probs[out] = static_cast<float>(log_prob);
    if (args.model_log_probs) args.model_log_probs[out] = static_cast<float>(clamp_max_0((column.logit - max) - log_model_total));
  }
  return -1;
}

void tile_masses(const SampleArgs& args, int64_t row, int64_t begin, int64_t end, TileMass* tiles) {
  args.dtype == DType::kFloat32 ? tile_masses_of<float>(args, row, begin, end, tiles)
                                : tile_masses_of<bf16>(args, row, begin, end, tiles);
}

int64_t draw(const SampleArgs& args, int64_t row, const TileMass* tiles, double* scratch) {
  return args.dtype == DType::kFloat32 ? draw_of<float>(args, row, tiles, scratch) : draw_of<bf16>(args, row, tiles, scratch);
}

}  // namespace

namespace EDLM_ISA {
extern const SampleKernels kSampleKernels;
const SampleKernels kSampleKernels{tile_masses, draw};
}  // namespace EDLM_ISA

}  // namespace edlm
