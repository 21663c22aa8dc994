// Log-probabilities on a CPU: the same read of a row as sampling's (tiles.h), and a second pass for the gradient.
#include "../log_probs.h"

#include <cmath>

#include "tiles.h"

#ifndef EDLM_ISA
#error "EDLM_ISA names the instruction set; cmake/isa.cmake defines it"
#endif

namespace edlm {
namespace {

template <class T>
Row<T> row_of(const LogProbArgs& args, int64_t r) {
  const int64_t b = r / args.length, l = r - b * args.length;
  return {static_cast<const T*>(args.logits) + b * args.stride_b + l * args.stride_l, args.vocab, args.forbidden, args.num_forbidden};
}

template <class T>
void tile_masses_of(const LogProbArgs& args, int64_t r, int64_t begin, int64_t end, TileMass* tiles) {
  const float inverse = static_cast<float>(inverse_temperature(args.temperature));
  if (args.temperature == 1.0)
    read_tiles<false, false>(row_of<T>(args, r), inverse, begin, end, tiles);
  else
    read_tiles<true, false>(row_of<T>(args, r), inverse, begin, end, tiles);
}

// The logit of a column; -inf where it is forbidden.
template <class T>
float logit_at(const Row<T>& row, int64_t id) {
  return read16(row, id)[0];
}

// A row of few columns, all at once: its maximum, and the sum of exp((x - max) / T).
template <class T>
double sum_small(const Row<T>& row, float inverse, float* max) {
  f32x16 v[kSmallVocab / 16], top = splat(kMinusInf), sum = splat(0.0f);
  const int n = static_cast<int>(row.vocab + 15) / 16;
  for (int i = 0; i < n; ++i) {
    v[i] = read16(row, 16 * i);
    top = max_or_second(v[i], top);
  }
  *max = fold_max(top);
  for (int i = 0; i < n; ++i) sum += exp_negative((v[i] - *max) * inverse);
  return fold_sum(sum);
}

template <class T>
bool gather_of(const LogProbArgs& args, int64_t r, const TileMass* tiles) {
  const Row<T> row = row_of<T>(args, r);
  const double inverse = inverse_temperature(args.temperature);
  const int64_t n = num_tiles(args.vocab), num_tokens = args.num_tokens;
  float max;
  double total = 0;
  if (args.vocab <= kSmallVocab) {
    total = sum_small(row, static_cast<float>(inverse), &max);
  } else {
    max = max_of(tiles, n);
    weigh_tiles(tiles, n, max, inverse, false, [&](int64_t, double mass) { total += mass; });
  }
  // The sum is NaN where a NaN or +inf is, and where all maxima are -inf.
  const double lse = total <= 1e30 ? std::log(total) : __builtin_nan("");
  args.stats[2 * r] = max;
  args.stats[2 * r + 1] = static_cast<float>(lse);
  bool valid = true;
  for (int64_t k = 0; k < num_tokens; ++k) {
    const int64_t id = args.tokens[r * num_tokens + k];
    const bool is_id = id >= 0 && id < args.vocab;
    valid = valid && is_id;
    const double log_prob = is_id ? (static_cast<double>(logit_at(row, id)) - max) * inverse - lse : __builtin_nan("");
    args.log_probs[r * num_tokens + k] = static_cast<float>(log_prob > 0 ? 0 : log_prob);
  }
  return valid;
}

template <class T>
void fold_of(const LogProbArgs& args, int64_t r, const TileMass* tiles) {
  double* running = args.running + 3 * r;
  const int64_t n = num_tiles(args.vocab);
  const double here = max_of(tiles, n), max = here > running[0] ? here : running[0];
  const double reference = max == kMinusInf ? 0.0 : max;  // nothing finite yet: sums are 0, or NaN
  double sum = running[1] * std::exp(running[0] - reference);
  weigh_tiles(tiles, n, reference, 1.0, false, [&](int64_t, double mass) { sum += mass; });
  running[0] = max;
  running[1] = sum;
  const int64_t id = args.tokens[r];
  if (id >= 0 && id < args.vocab) running[2] = logit_at(row_of<T>(args, r), id);
}

template <class T>
void backward_of(const LogProbArgs& args, int64_t r, int64_t begin, int64_t end) {
  const Row<T> row = row_of<T>(args, r);
  const float inverse = static_cast<float>(inverse_temperature(args.temperature));
  const float max = args.stats[2 * r], lse = args.stats[2 * r + 1];
  const int64_t* tokens = args.tokens + r * args.num_tokens;
  const float* grad = args.grad + r * args.num_tokens;
  float total = 0;
  bool is_zero = true;
  for (int64_t k = 0; k < args.num_tokens; ++k) total += grad[k], is_zero = is_zero && grad[k] == 0;
  const float scale = -total * inverse;
  T* out = static_cast<T*>(args.grad_logits) + r * args.grad_stride;
  alignas(64) float dx[kTile];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * kTile, last = first + kTile < args.vocab ? first + kTile : args.vocab;
    if (is_zero) {
      std::memset(out + first, 0, (last - first) * sizeof(T));  // a row that does not count is not read
      continue;
    }
    const bool is_whole = last - first == kTile && !excludes(row, first, last);
    for (int i = 0; i < last - first; i += 16) {
      if (i % 64 == 0)
        for (size_t line = 0; line < kBlock * sizeof(T); line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(row.x + first + i) + kNear + line);
      const f32x16 x = is_whole ? load16(row.x + first + i) : read16(row, first + i);
      const f32x16 p = exp_negative((x - max) * inverse - lse);
      const f32x16 d = p * scale;
      std::memcpy(dx + i, &d, sizeof d);
    }
    for (int64_t k = 0; k < args.num_tokens; ++k) {
      const int64_t at = tokens[k] - first;
      if (at >= 0 && at < last - first) dx[at] += grad[k] * inverse;
    }
    for (int64_t i = 0; !is_whole && i < args.num_forbidden; ++i) {
      const int64_t at = args.forbidden[i] - first;
      if (at >= 0 && at < last - first) dx[at] = 0;
    }
    store(dx, last - first, out + first);
  }
}

void tile_masses(const LogProbArgs& args, int64_t row, int64_t begin, int64_t end, TileMass* tiles) {
  EDLM_BY_DTYPE(tile_masses_of, args, row, begin, end, tiles);
}

bool gather(const LogProbArgs& args, int64_t row, const TileMass* tiles) { return EDLM_BY_DTYPE(gather_of, args, row, tiles); }

void fold(const LogProbArgs& args, int64_t row, const TileMass* tiles) { EDLM_BY_DTYPE(fold_of, args, row, tiles); }

void backward(const LogProbArgs& args, int64_t row, int64_t begin, int64_t end) {
  EDLM_BY_DTYPE(backward_of, args, row, begin, end);
}

}  // namespace

namespace EDLM_ISA {
extern const LogProbKernels kLogProbKernels;
const LogProbKernels kLogProbKernels{tile_masses, gather, fold, backward};
}  // namespace EDLM_ISA

}  // namespace edlm
