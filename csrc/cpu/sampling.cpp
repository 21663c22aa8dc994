// Tile-mass inverse CDF on a CPU. docs/algorithms.md has the mathematics; ops/sampling.py the reference.
//
// 1. tile_masses: one read of a row in tiles of 512 columns; each leaves its maximum and the sums of its eight blocks.
// 2. draw: the row's log-sum-exp in double; per draw a tile by a double prefix over tile masses, then inside it a block by the block
//    sums and a column by a double prefix over 64 re-read logits, both under the second uniform.
//
// Compiled once per instruction set (cmake/isa.cmake sets EDLM_ISA); see the note in simd.h before calling anything of std.
#include "../sampling.h"

#include <cmath>

#include "filters.h"
#include "tiles.h"
#include "uniforms.h"

#ifndef EDLM_ISA
#error "EDLM_ISA names the instruction set; cmake/isa.cmake defines it"
#endif

namespace edlm {
namespace {

// Row r = b * length + l of the logits.
struct Index {
  int64_t row, b, l;
  Index(const SampleArgs& args, int64_t r) : row(r), b(args.length == 1 ? r : r / args.length), l(r - b * args.length) {}
};

template <class T>
Row<T> row_of(const SampleArgs& args, const Index& at) {
  return {static_cast<const T*>(args.logits) + at.b * args.stride_b + at.l * args.stride_l, args.vocab, args.forbidden,
          args.num_forbidden};
}

// Draws k .. k + 7 of a row.
void uniforms_of(const SampleArgs& args, const Index& at, int64_t k, Uniforms8* u) {
  philox_uniform8(args.seed[at.b], args.position ? args.position[at.row] : at.l, k, args.offset[at.b * args.offset_stride],
                  Purpose::kToken, u);
}

template <class T>
void tile_masses_of(const SampleArgs& args, int64_t r, int64_t begin, int64_t end, TileMass* tiles) {
  const float inverse = static_cast<float>(inverse_temperature(args.temperature));
  if (args.vocab <= kSmallVocab) return;
  if (args.temperature == 1.0)
    read_tiles<false, false>(row_of<T>(args, {args, r}), inverse, begin, end, tiles);
  else
    read_tiles<true, true>(row_of<T>(args, {args, r}), inverse, begin, end, tiles);
}

// A block of 64 columns, in two stages: four groups of sixteen by their sums in float, as the tile's blocks are; then the columns of one
// group in double, so that every column that has mass is within reach of a uniform.
constexpr int kGroup = 16, kGroups = kBlock / kGroup;

struct Block {
  alignas(64) float logits[kBlock];
  double group[kGroups];  // prefix sums
};

template <class T>
void read_block(const Row<T>& row, int64_t first, float max, float inverse, Block* block) {
  f32x16 e[kGroups];
  const bool is_plain = first + kBlock <= row.vocab && !excludes(row, first, first + kBlock);
  for (int g = 0; g < kGroups; ++g) {
    const f32x16 v = is_plain ? load16(row.x + first + kGroup * g) : read16(row, first + kGroup * g);
    std::memcpy(block->logits + kGroup * g, &v, sizeof v);
    e[g] = exp_negative((v - max) * inverse);
  }
  const f32x4 sum = fold_sums(e[0], e[1], e[2], e[3]);
  block->group[0] = sum[0];
  for (int g = 1; g < kGroups; ++g) block->group[g] = block->group[g - 1] + static_cast<double>(sum[g]);
}

// Prefix sums of a group's sixteen columns.
inline void read_group(const float* logits, float max, double inverse, double* prefix) {
  const f64x8 first = scan(exp_negative((widen8(logits) - static_cast<double>(max)) * inverse));
  const f64x8 second = scan(exp_negative((widen8(logits + 8) - static_cast<double>(max)) * inverse)) + first[7];
  store8(prefix, first);
  store8(prefix + 8, second);
}

// The first index whose prefix exceeds target; the last one that has mass where rounding leaves none. For n of 4, 8, 16.
template <int n>
int pick(const double* prefix, double target) {
  int index = 0;
  if constexpr (n % 8 == 0)
    for (int i = 0; i < n; i += 8) index += count_up_to(load8(prefix + i), target);
  else
    for (int i = 0; i < n; ++i) index += prefix[i] <= target;
  if (index < n) return index;
  for (index = n - 1; index > 0 && prefix[index] == prefix[index - 1];) --index;
  return index;
}

struct Column {
  int64_t id;
  double logit;
};

// Which block of its tile the second uniform points at, and what share of that block's mass lies before the draw.
struct Place {
  int64_t tile;
  int block;
  double share;
};

inline Place place_in(const TileMass& tile, int64_t t, double u) {
  alignas(64) double prefix[kBlocksPerTile];
  store8(prefix, scan(widen8(tile.block)));
  const double target = u * prefix[kBlocksPerTile - 1];
  const int b = pick<kBlocksPerTile>(prefix, target);
  return {t, b, (target - (b > 0 ? prefix[b - 1] : 0.0)) / tile.block[b]};
}

// The column there. A share goes from stage to stage, since sums of the same columns differ by rounding, in float and in double.
template <class T>
Column draw_column(const Row<T>& row, const Place& place, const TileMass& tile, double inverse) {
  Block block;
  const int64_t first = place.tile * kTile + place.block * kBlock;
  read_block(row, first, tile.max, static_cast<float>(inverse), &block);
  const double target = place.share * block.group[kGroups - 1];
  const int g = pick<kGroups>(block.group, target);
  const double before = g > 0 ? block.group[g - 1] : 0.0;

  alignas(64) double column[kGroup];
  read_group(block.logits + kGroup * g, tile.max, inverse, column);
  const int i = kGroup * g + pick<kGroup>(column, (target - before) / (block.group[g] - before) * column[kGroup - 1]);
  return {first + i, block.logits[i]};
}

// For each of eight targets the first index whose prefix exceeds it; the last one that has mass where rounding leaves none. Without
// branches, since a draw's path cannot be predicted, and side by side, since each is a chain of loads.
inline void upper_bounds(const double* prefix, int64_t n, const double* target, int64_t* index) {
  for (int j = 0; j < 8; ++j) index[j] = 0;
  for (int64_t size = n; size > 1;) {
    const int64_t half = size / 2;
    for (int j = 0; j < 8; ++j) index[j] += prefix[index[j] + half - 1] <= target[j] ? half : 0;
    size -= half;
  }
  for (int j = 0; j < 8; ++j) {
    index[j] += prefix[index[j]] <= target[j];
    if (index[j] < n) continue;
    for (index[j] = n - 1; index[j] > 0 && prefix[index[j]] == prefix[index[j] - 1];) --index[j];
  }
}

template <class T>
int64_t argmax(const Row<T>& row, const TileMass* tiles, float max) {
  alignas(64) float buffer[kTile];
  for (int64_t t = 0; t < num_tiles(row.vocab); ++t) {
    if (tiles[t].max != max) continue;
    const int64_t first = t * kTile, last = first + kTile < row.vocab ? first + kTile : row.vocab;
    copy_columns(row, first, last, buffer);
    for (int64_t i = 0; i < last - first; ++i)
      if (buffer[i] == max) return first + i;
  }
  return 0;  // not reached: some tile attains the maximum
}

// Whatever the caller does with the report, no id that it reads is out of range.
int64_t fail_row(const SampleArgs& args, const Index& at, int64_t code) {
  for (int64_t k = 0; k < args.num_samples; ++k) {
    const int64_t out = (at.b * args.num_samples + k) * args.length + at.l;
    args.tokens[out] = 0;
    args.log_probs[out] = __builtin_nanf("");
    if (args.model_log_probs) args.model_log_probs[out] = __builtin_nanf("");
  }
  return code;
}

// A row's normaliser: prefix sums of the tiles' masses, measured against the row's maximum.
struct Total {
  int64_t code;  // a BadRow, or -1
  float max;
  double total;        // prefix[num_tiles - 1]
  double model_total;  // of exp(x - max), all columns; where it is asked for
};

// Behind the prefixes: memory has one type.
uint32_t* scratch_keys(const SampleArgs& args, double* scratch) {
  return reinterpret_cast<uint32_t*>(scratch + num_tiles(args.vocab) + 8);
}

template <class T>
Total prefix_of(const SampleArgs& args, Row<T>& row, TileMass* tiles, double* scratch) {
  const int64_t n = num_tiles(args.vocab);
  const double inverse = inverse_temperature(args.temperature);
  Total result{-1, max_of(tiles, n), 0, 0};
  for (int64_t t = 0; t < n; ++t)
    if (!(tiles[t].sum <= 1e30)) result.code = kNonFinite;
  if (result.code < 0 && result.max == kMinusInf) result.code = kNoSupport;
  if (result.code >= 0) return result;

  if (args.model_log_probs != nullptr)
    weigh_tiles(tiles, n, result.max, 1.0, args.temperature != 1.0, [&](int64_t, double mass) { result.model_total += mass; });
  if (is_filtered(args)) filter_row(args, &row, tiles, result.max, scratch_keys(args, scratch));
  weigh_tiles(tiles, n, result.max, inverse, false, [&](int64_t t, double mass) { scratch[t] = result.total += mass; });
  return result;
}

// A rounded log-probability is never above 0.
float bounded(double log_prob) { return static_cast<float>(log_prob < 0 ? log_prob : 0); }

// Where a row's draws go. A copy of its own: what it stores might otherwise, for all that the compiler knows, change `args`.
struct Output {
  int64_t* tokens;
  float *log_probs, *model_log_probs;
  int64_t stride;

  Output(const SampleArgs& args, const Index& at) : stride(args.length) {
    const int64_t first = at.b * args.num_samples * args.length + at.l;
    tokens = args.tokens + first;
    log_probs = args.log_probs + first;
    model_log_probs = args.model_log_probs ? args.model_log_probs + first : nullptr;
  }

  void write(int64_t k, int64_t id, float log_prob, float model_log_prob) const {
    tokens[k * stride] = id;
    log_probs[k * stride] = log_prob;
    if (model_log_probs) model_log_probs[k * stride] = model_log_prob;
  }
};

template <class T>
int64_t draw_large(const SampleArgs& args, int64_t r, TileMass* tiles, double* scratch) {
  const int64_t n = num_tiles(args.vocab);
  const Index at(args, r);
  Row<T> row = row_of<T>(args, at);
  const Total sum = prefix_of(args, row, tiles, scratch);
  if (sum.code >= 0) return fail_row(args, at, sum.code);

  const double inverse = inverse_temperature(args.temperature);
  const Output out(args, at);
  const double max = sum.max, log_total = std::log(sum.total);
  const double log_model_total = args.model_log_probs ? std::log(sum.model_total) : 0;
  if (args.temperature == 0) {
    const int64_t id = argmax(row, tiles, sum.max);
    for (int64_t k = 0; k < args.num_samples; ++k) out.write(k, id, 0, bounded(-log_model_total));
    return -1;
  }
  Uniforms8 u;
  double target[8];
  int64_t tile[8];
  Place place[8];
  for (int64_t k = 0; k < args.num_samples; k += 8) {
    const int draws = args.num_samples - k < 8 ? static_cast<int>(args.num_samples - k) : 8;
    uniforms_of(args, at, k, &u);
    for (int j = 0; j < 8; ++j) target[j] = u.first[j] * sum.total;
    upper_bounds(scratch, n, target, tile);
    for (int j = 0; j < draws; ++j) {
      place[j] = place_in(tiles[tile[j]], tile[j], u.second[j]);
      const T* x = row.x + place[j].tile * kTile + place[j].block * kBlock;  // most likely in the second cache level by now
      for (size_t line = 0; line < kBlock * sizeof(T); line += 64) __builtin_prefetch(reinterpret_cast<const char*>(x) + line);
    }
    for (int j = 0; j < draws; ++j) {
      const Column column = draw_column(row, place[j], tiles[tile[j]], inverse);
      const double d = column.logit - max;
      out.write(k + j, column.id, bounded(d * inverse - log_total), bounded(d - log_model_total));
    }
  }
  return -1;
}

// --- rows of few columns: one prefix in double over all of them ----------------------------------------------------------------------

struct SmallRow {
  float max;
  int count, last;  // columns, in whole eights; the last one that has mass
  double total, model_total;
  alignas(64) float logits[kSmallVocab];
  alignas(64) double prefix[kSmallVocab];
};

template <class T>
void read_small(const Row<T>& row, double inverse, bool has_model, SmallRow* small) {
  small->count = static_cast<int>(row.vocab + 7) / 8 * 8;
  f32x16 max = splat(kMinusInf);
  for (int i = 0; i < row.vocab; i += 16) {
    const f32x16 v = read16(row, i);
    std::memcpy(small->logits + i, &v, sizeof v);
    max = max_or_second(v, max);
  }
  small->max = fold_max(max);
  const float reference = small->max == kMinusInf ? 0.0f : small->max;
  f32x16 model = splat(0.0f);
  alignas(64) float mass[kSmallVocab];
  for (int i = 0; i < row.vocab; i += 16) {
    const f32x16 d = load16(small->logits + i) - reference;
    const f32x16 e = exp_negative(d * static_cast<float>(inverse));
    if (has_model) model += exp_negative(d);
    std::memcpy(mass + i, &e, sizeof e);
  }
  double carry = 0;
  for (int i = 0; i < small->count; i += 8) {
    const f64x8 prefix = scan(widen8(mass + i)) + carry;
    std::memcpy(small->prefix + i, &prefix, sizeof prefix);
    carry = prefix[7];
  }
  small->total = carry;
  small->model_total = fold_sum(model);
  for (small->last = small->count - 1; small->last > 0 && !(small->prefix[small->last - 1] < carry);) --small->last;
}

// Also applies the filters, and says what is wrong with the row: a BadRow, or -1.
template <class T>
int64_t prepare_small(const SampleArgs& args, Row<T>& row, double* scratch, SmallRow* small) {
  const double inverse = inverse_temperature(args.temperature);
  read_small(row, inverse, args.model_log_probs != nullptr, small);
  if (!(small->total <= 1e30)) return kNonFinite;
  if (small->max == kMinusInf) return kNoSupport;
  if (!is_filtered(args)) return -1;
  const double model_total = small->model_total;
  TileMass tile;
  tile.max = small->max;
  filter_row(args, &row, &tile, small->max, scratch_keys(args, scratch));
  read_small(row, inverse, false, small);
  small->model_total = model_total;
  return -1;
}

template <class T>
int64_t draw_small(const SampleArgs& args, int64_t r, double* scratch) {
  const Index at(args, r);
  Row<T> row = row_of<T>(args, at);
  Uniforms8 u;
  uniforms_of(args, at, 0, &u);  // a long chain, beside which the row is read
  SmallRow small;
  const int64_t code = prepare_small(args, row, scratch, &small);
  if (code >= 0) return fail_row(args, at, code);

  const Output out(args, at);
  const int64_t num_samples = args.num_samples;
  const double log_total = std::log(small.total), log_model_total = args.model_log_probs ? std::log(small.model_total) : 0;
  if (args.temperature == 0) {
    int id = 0;
    while (small.logits[id] != small.max) ++id;
    for (int64_t k = 0; k < num_samples; ++k) out.write(k, id, 0, bounded(-log_model_total));
    return -1;
  }
  alignas(64) float log_probs[kSmallVocab], model_log_probs[kSmallVocab];
  const double inverse = inverse_temperature(args.temperature);
  for (int i = 0; i < small.count; i += 8) {
    const f64x8 d = widen8(small.logits + i) - static_cast<double>(small.max);
    narrow8(min_with_0(d * inverse - log_total), log_probs + i);
    if (args.model_log_probs) narrow8(min_with_0(d - log_model_total), model_log_probs + i);
  }
  for (int64_t k = 0; k < num_samples; k += 8) {
    if (k > 0) uniforms_of(args, at, k, &u);
    f64x8 target;
    std::memcpy(&target, u.second, sizeof target);  // there is one tile, for the first to choose from
    target *= small.total;
    i64x8 index = {}, odd = {};  // two chains
    for (int i = 0; i < small.count; i += 8) {
      for (int j = 0; j < 8; j += 2) {
        index = count_where(index, splat(small.prefix[i + j]), target);
        odd = count_where(odd, splat(small.prefix[i + j + 1]), target);
      }
    }
    index += odd;
    int64_t ids[8];
    std::memcpy(ids, &index, sizeof index);
    for (int64_t j = 0; j < 8 && k + j < num_samples; ++j) {
      const int64_t id = ids[j] < small.last ? ids[j] : small.last;
      out.write(k + j, id, log_probs[id], args.model_log_probs ? model_log_probs[id] : 0.0f);
    }
  }
  return -1;
}

template <class T>
int64_t draw_of(const SampleArgs& args, int64_t row, TileMass* tiles, double* scratch) {
  return args.vocab <= kSmallVocab ? draw_small<T>(args, row, scratch) : draw_large<T>(args, row, tiles, scratch);
}

template <class T>
int64_t law_of(const SampleArgs& args, int64_t r, TileMass* tiles, double* scratch, double* probs) {
  Row<T> row = row_of<T>(args, {args, r});
  if (args.vocab <= kSmallVocab) {
    SmallRow small;
    const int64_t code = prepare_small(args, row, scratch, &small);
    for (int64_t i = 0; code < 0 && i < args.vocab; ++i)
      probs[i] = (small.prefix[i] - (i > 0 ? small.prefix[i - 1] : 0.0)) / small.total;
    return code;
  }
  const Total sum = prefix_of(args, row, tiles, scratch);
  if (sum.code >= 0) return sum.code;
  const double inverse = inverse_temperature(args.temperature);
  Block block;
  for (int64_t t = 0; t < num_tiles(args.vocab); ++t) {
    const double p_tile = (scratch[t] - (t > 0 ? scratch[t - 1] : 0.0)) / sum.total;
    for (int b = 0; b < kBlocksPerTile && t * kTile + b * kBlock < args.vocab; ++b) {
      const int64_t first = t * kTile + b * kBlock;
      read_block(row, first, tiles[t].max, static_cast<float>(inverse), &block);
      for (int g = 0; g < kGroups; ++g) {
        const double mass = block.group[g] - (g > 0 ? block.group[g - 1] : 0.0);
        const double p_group = mass > 0 ? p_tile * tiles[t].block[b] / tiles[t].sum * mass / block.group[kGroups - 1] : 0.0;
        alignas(64) double column[kGroup];
        read_group(block.logits + kGroup * g, tiles[t].max, inverse, column);
        for (int i = 0; i < kGroup && first + kGroup * g + i < args.vocab; ++i)
          probs[first + kGroup * g + i] =
              mass > 0 ? p_group * (column[i] - (i > 0 ? column[i - 1] : 0.0)) / column[kGroup - 1] : 0.0;
      }
    }
  }
  return -1;
}

void tile_masses(const SampleArgs& args, int64_t row, int64_t begin, int64_t end, TileMass* tiles) {
  EDLM_BY_DTYPE(tile_masses_of, args, row, begin, end, tiles);
}

int64_t draw(const SampleArgs& args, int64_t row, TileMass* tiles, double* scratch) {
  return EDLM_BY_DTYPE(draw_of, args, row, tiles, scratch);
}

int64_t law(const SampleArgs& args, int64_t row, TileMass* tiles, double* scratch, double* probs) {
  return EDLM_BY_DTYPE(law_of, args, row, tiles, scratch, probs);
}

}  // namespace

namespace EDLM_ISA {
extern const SampleKernels kSampleKernels;
const SampleKernels kSampleKernels{tile_masses, draw, law};
}  // namespace EDLM_ISA

}  // namespace edlm
