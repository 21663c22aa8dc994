// select_candidate, resample and reverse_step on a CPU; the references are in ops/importance.py.
//
// A row's log-weights are read once, as doubles, into the thread's scratch; all sums are of exp(a - max), so that a common shift
// changes nothing. Sums over columns run in the order of the columns, as the cumulative weights of the references do.
//
// Compiled once per instruction set (cmake/isa.cmake sets EDLM_ISA); see the note in simd.h before calling anything of std.
#include "../importance.h"

#include <cmath>

#include "../philox.h"
#include "simd.h"

#ifndef EDLM_ISA
#error "EDLM_ISA names the instruction set; cmake/isa.cmake defines it"
#endif

namespace edlm {
namespace {

const double kInf = __builtin_inf();
const double kNaN = __builtin_nan("");

template <class T>
double value(const T* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  if constexpr (sizeof(T) == sizeof(uint16_t)) {
    return to_float(x);
  } else {
    return x;
  }
}

template <class T>
void read_row_of(const Rows& rows, int64_t row, int64_t n, double* out) {
  const T* p = static_cast<const T*>(rows.data) + row * rows.stride_row;
  if (rows.stride_column == 1) {  // a loop of its own, which the compiler turns into vector loads
    for (int64_t i = 0; i < n; ++i) out[i] = value(p + i);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = value(p + i * rows.stride_column);
  }
}

void read_row(const Rows& rows, int64_t row, int64_t n, double* out) {
  switch (rows.type) {
    case Real::kFloat32: return read_row_of<float>(rows, row, n, out);
    case Real::kFloat64: return read_row_of<double>(rows, row, n, out);
    case Real::kBFloat16: return read_row_of<bf16>(rows, row, n, out);
    case Real::kFloat16: return read_row_of<f16>(rows, row, n, out);
  }
}

// log x for 2^-1000 < x < 2^1000, within an ulp or so: that of fdlibm, eight at a time. A row of K candidates needs K of them.
__attribute__((always_inline)) inline f64x8 log_positive(f64x8 x) {
  const uint64_t one = uint64_t{1023} << 52, half_root = 0x3FE6A09E667F3BCDu;  // 1 and sqrt(1/2)
  const u64x8 bits = reinterpret_cast<u64x8>(x), shifted = bits + (one - half_root);
  const u64x8 exponent = shifted >> 52;  // biased, of x / m
  const f64x8 m = reinterpret_cast<f64x8>(bits - (exponent << 52) + one);  // in [sqrt(1/2), sqrt(2))
  const f64x8 k = reinterpret_cast<f64x8>(exponent | (uint64_t{0x433} << 52)) - (0x1.0p52 + 1023.0);
  const f64x8 f = m - 1.0, s = f / (m + 1.0), z = s * s, half_square = 0.5 * f * f;
  f64x8 p = splat(1.479819860511658591e-01);
  p = p * z + 1.531383769920937332e-01;
  p = p * z + 1.818357216161805012e-01;
  p = p * z + 2.222219843214978396e-01;
  p = p * z + 2.857142874366239149e-01;
  p = p * z + 3.999999999940941908e-01;
  p = p * z + 6.666666666666735130e-01;
  const f64x8 low = s * (half_square + p * z) + k * 1.90821492927058770002e-10;
  return k * 6.93147180369123816490e-01 - ((half_square - low) - f);  // ln 2, its first 33 bits: exact times k
}

double log_positive(double x) { return log_positive(splat(x))[0]; }

// The largest log-weight of a row, or NaN where the row is bad: a NaN, +inf, or no weight at all. Pads a with -inf, to a
// multiple of eight columns.
double maximum(double* a, int64_t n) {
  for (int64_t i = n; i < padded(n); ++i) a[i] = -kInf;
  f64x8 max = splat(-kInf);
  i64x8 fine = max == max;
  for (int64_t i = 0; i < n; i += 8) {
    const f64x8 v = load8(a + i);
    fine &= v < splat(kInf);
    max = max_or_second(v, max);
  }
  int64_t all = -1;
  for (int j = 0; j < 8; ++j) all &= fine[j];
  for (int j = 1; j < 8; ++j) max[0] = max[j] > max[0] ? max[j] : max[0];
  return all && max[0] > -kInf ? max[0] : kNaN;
}

// Whatever the caller does with the report of a bad row, its numbers are those of equal weights.
void make_equal(double* a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] = 0;
}

double uniform(const Streams& streams, int64_t row, int64_t candidate, Purpose purpose) {
  const int64_t seed = streams.seed[row * streams.seed_stride], offset = streams.offset[row * streams.offset_stride];
  return philox_uniform(seed, 0, candidate, offset, purpose).first;
}

// --- select_candidate ----------------------------------------------------------------------------------------------------------

// Energies to log-weights, in place; `other` is scratch. A bad energy leaves a NaN or +inf, which maximum() finds.
void weigh(const SelectArgs& args, int64_t row, double* a, double* other) {
  const int64_t n = args.candidates;
  read_row(args.energy, row, n, a);
  if (args.temperature == 0) {
    int64_t best = 0;
    bool bad = false;
    for (int64_t i = 0; i < n; ++i) {
      bad |= !(a[i] > -kInf);
      if (a[i] < a[best]) best = i;
    }
    bad |= a[best] == kInf;
    for (int64_t i = 0; i < n; ++i) a[i] = -kInf;
    a[best] = bad ? kNaN : 0;
    return;
  }
  // The one place where an energy becomes a weight: low energy is good. +inf stays impossible at any temperature.
  for (int64_t i = 0; i < n; ++i) a[i] = a[i] == kInf ? -kInf : -a[i] / args.temperature;
  if (args.correction.data == nullptr) return;
  read_row(args.correction, row, n, other);
  for (int64_t i = 0; i < n; ++i) a[i] += other[i];
}

// The index of the largest weight, and the log sum of all others, measured against the second largest: against the largest they
// may vanish.
struct Rest {
  int64_t top;
  double log_sum;
};

Rest rest_of(const double* a, int64_t n, double max) {
  Rest rest{0, -kInf};
  while (a[rest.top] != max) ++rest.top;
  double second = -kInf, sum = 0;
  for (int64_t i = 0; i < n; ++i) second = i != rest.top && a[i] > second ? a[i] : second;
  if (second == -kInf) return rest;
  for (int64_t i = 0; i < n; ++i) sum += i == rest.top ? 0.0 : exp_negative(splat(a[i] - second))[0];
  rest.log_sum = second + log_positive(sum);
  return rest;
}

bool select_row(const SelectArgs& args, int64_t row, double* scratch) {
  const int64_t n = args.candidates;
  double *a = scratch, *e = scratch + padded(n);
  weigh(args, row, a, e);
  double max = maximum(a, n);
  const bool good = max == max;
  if (!good) make_equal(a, n), max = 0;

  double sum = 0, squares = 0;
  for (int64_t i = 0; i < n; i += 8) store8(e + i, exp_negative(load8(a + i) - max));
  for (int64_t i = 0; i < n; ++i) {
    sum += e[i];
    squares += e[i] * e[i];
  }
  const double log_sum = log_positive(sum), ess = sum * sum / squares;
  // The largest weight is 1 here. So the others' sum needs care for the largest alone, and only where they left no trace in sum.
  const bool alone = sum == 1 && n > 1 && args.temperature > 0;
  const Rest rest = alone ? rest_of(a, n, max) : Rest{};

  float* log_weights = args.log_weights + row * n;
  for (int64_t i = 0; i < n; ++i) log_weights[i] = static_cast<float>(a[i] - max - log_sum);

  // First index whose cumulative weight exceeds u * sum, never one past the last that has weight. a becomes the sums before each.
  const double target = uniform(args.streams, row, 0, Purpose::kSelect) * sum;
  int64_t index = 0, last = 0;
  double before = 0;
  for (int64_t i = 0; i < n; ++i) {
    a[i] = before;
    before += e[i];
    index += before <= target;
    last += before < sum;
  }
  args.index[row] = index < last ? index : last;
  args.ess[row] = static_cast<float>(ess < 1 ? 1 : ess > n ? n : ess);

  float* loo = args.log_z_loo + row * n;
  if (args.temperature == 0 || n == 1) {
    args.log_z[row] = static_cast<float>(args.temperature == 0 ? kNaN : max);
    for (int64_t i = 0; i < n; ++i) loo[i] = static_cast<float>(kNaN);
    return good;
  }
  args.log_z[row] = static_cast<float>(max + log_sum - args.log_candidates);
  // Sums before and after, never a difference: it would lose the small weights.
  double after = 0;
  for (int64_t i = n - 1; i >= 0; --i) {
    a[i] += after;
    after += e[i];
  }
  for (int64_t i = 0; i < n; i += 8) {
    const f32x8 block = __builtin_convertvector(log_positive(load8(a + i)) + max - args.log_others, f32x8);
    std::memcpy(loo + i, &block, (n - i < 8 ? n - i : 8) * sizeof(float));
  }
  if (alone) loo[rest.top] = static_cast<float>(rest.log_sum - args.log_others);
  return good;
}

// --- resample ------------------------------------------------------------------------------------------------------------------

// w becomes its prefix sums; returns the first index at which they reach the total.
int64_t accumulate(double* w, int64_t n) {
  double sum = 0, before = -1;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    w[i] = sum += w[i];
    last = sum > before ? i : last;
    before = sum;
  }
  return last;
}

// First of n ascending prefixes that exceeds target, n where none does. No branches, since a draw's path cannot be predicted.
int64_t upper_bound(const double* prefix, int64_t n, double target) {
  const double* base = prefix;
  for (int64_t size = n; size > 1;) {
    const int64_t half = size / 2;
    base = base[half - 1] <= target ? base + half : base;
    size -= half;
  }
  return base - prefix + (*base <= target ? 1 : 0);
}

// Draws particles [begin, n) by their own uniforms from prefix sums, and counts the copies.
void draw(const ResampleArgs& args, int64_t row, int64_t begin, const double* prefix, int64_t last, int64_t* copies) {
  const int64_t n = args.particles;
  for (int64_t i = begin; i < n; ++i) {
    const double u = uniform(args.streams, row, i, Purpose::kResample);
    const int64_t index = upper_bound(prefix, n, u * prefix[n - 1]);
    ++copies[index < last ? index : last];
  }
}

bool resample_row(const ResampleArgs& args, int64_t row, double* w) {
  const int64_t n = args.particles;
  int64_t* out = args.ancestors + row * n;
  read_row(args.log_weights, row, n, w);
  double max = maximum(w, n);
  const bool good = max == max;
  if (!good) make_equal(w, n), max = 0;
  for (int64_t i = 0; i < n; i += 8) store8(w + i, exp_negative(load8(w + i) - max));

  if (args.scheme == kSystematic || args.scheme == kStratified) {
    // Positions ascend: one walk along both.
    const int64_t last = accumulate(w, n);
    const double total = w[n - 1], shared = uniform(args.streams, row, 0, Purpose::kResample);
    int64_t k = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double u = args.scheme == kSystematic ? shared : uniform(args.streams, row, i, Purpose::kResample);
      const double target = (static_cast<double>(i) + u) / static_cast<double>(n) * total;
      while (k < last && w[k] <= target) ++k;
      out[i] = k;
    }
    return good;
  }

  int64_t certain = 0;  // copies that no uniform decides
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
  if (args.scheme == kResidual) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += w[i];
    for (int64_t i = 0; i < n; ++i) {
      const double expected = static_cast<double>(n) * (w[i] / sum);
      const double whole = std::floor(expected + 1e-9), left = expected - whole;  // n * (1 / n) may fall just short of 1
      out[i] = static_cast<int64_t>(whole);
      certain += out[i];
      w[i] = left > 0 ? left : 0;
    }
  }
  if (certain < n) draw(args, row, certain, w, accumulate(w, n), out);
  // Counts to ancestors, ascending. The counts move out of the way first.
  for (int64_t i = 0; i < n; ++i) w[i] = static_cast<double>(out[i]);
  int64_t at = 0;
  for (int64_t i = 0; i < n; ++i)
    for (auto copies = static_cast<int64_t>(w[i]); copies > 0 && at < n; --copies) out[at++] = i;
  return good;
}

// --- reverse_step --------------------------------------------------------------------------------------------------------------

template <class T>
void open_positions(const T* open_time, T s, const int64_t* chosen, const int64_t* xt, int64_t n, int64_t* __restrict xs) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t open = chosen[i], stay = xt[i];  // both are read, or the loop would have branches
    xs[i] = open_time[i] >= s ? open : stay;
  }
}

template <class T>
void reverse_of(const ReverseArgs& args, int64_t begin, int64_t end) {
  const bool dense = args.xt_stride_l == 1 && args.x0_stride_l == 1 && args.open_stride_l == 1;
  while (begin < end) {
    const int64_t b = begin / args.length, l = begin % args.length;
    const int64_t n = args.length - l < end - begin ? args.length - l : end - begin;
    int64_t k = args.index[b * args.index_stride];
    k = k < 0 ? 0 : k < args.candidates ? k : args.candidates - 1;
    const T s = static_cast<const T*>(args.s)[b * args.s_stride];
    const T* open_time = static_cast<const T*>(args.open_time) + b * args.open_stride_b + l * args.open_stride_l;
    const int64_t* chosen = args.x0 + b * args.x0_stride_b + k * args.x0_stride_k + l * args.x0_stride_l;
    const int64_t* xt = args.xt + b * args.xt_stride_b + l * args.xt_stride_l;
    int64_t* xs = args.xs + begin;
    if (dense) {
      open_positions(open_time, s, chosen, xt, n, xs);
    } else {
      for (int64_t i = 0; i < n; ++i)
        xs[i] = open_time[i * args.open_stride_l] >= s ? chosen[i * args.x0_stride_l] : xt[i * args.xt_stride_l];
    }
    begin += n;
  }
}

// --- the table -----------------------------------------------------------------------------------------------------------------

int64_t select(const SelectArgs& args, int64_t begin, int64_t end, double* scratch) {
  int64_t bad = -1;
  for (int64_t row = begin; row < end; ++row)
    if (!select_row(args, row, scratch) && bad < 0) bad = row;
  return bad;
}

int64_t resample(const ResampleArgs& args, int64_t begin, int64_t end, double* scratch) {
  int64_t bad = -1;
  for (int64_t row = begin; row < end; ++row)
    if (!resample_row(args, row, scratch) && bad < 0) bad = row;
  return bad;
}

void reverse(const ReverseArgs& args, int64_t begin, int64_t end) {
  args.is_double ? reverse_of<double>(args, begin, end) : reverse_of<float>(args, begin, end);
}

}  // namespace

namespace EDLM_ISA {
extern const ImportanceKernels kImportanceKernels;
const ImportanceKernels kImportanceKernels{select, resample, reverse};
}  // namespace EDLM_ISA

}  // namespace edlm
