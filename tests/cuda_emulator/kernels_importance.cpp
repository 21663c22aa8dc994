// edlm_cuda_select, _resample and _reverse against sums in double, one particle after another.
#include "importance.h"

#include <algorithm>
#include <numeric>

#include "exact_buffers.h"
#include "philox.h"

namespace edlm::exact {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
constexpr Real kReal = sizeof(T) == 8              ? Real::kFloat64
                       : sizeof(T) == 4            ? Real::kFloat32
                       : std::is_same_v<T, __half> ? Real::kFloat16
                                                   : Real::kBFloat16;

using Table = std::vector<std::vector<double>>;

// A table in memory: column_step elements from column to column, a gap behind each row, and no element more than that.
template <class T>
class Strided {
 public:
  Strided(const Table& from, int64_t column_step, int64_t gap)
      : step_(column_step),
        stride_(static_cast<int64_t>(from[0].size()) * column_step + gap),
        memory_((static_cast<int64_t>(from.size()) - 1) * stride_ + (static_cast<int64_t>(from[0].size()) - 1) * column_step +
                1) {
    for (int64_t i = 0; i < memory_.size(); ++i) memory_[i] = exact::from<T>(kNan);
    for (size_t r = 0; r < from.size(); ++r)
      for (size_t c = 0; c < from[r].size(); ++c) memory_[r * stride_ + c * step_] = exact::from<T>(from[r][c]);
  }

  Rows rows() { return {memory_.data(), kReal<T>, stride_, step_}; }
  // As T holds it.
  double at(size_t r, size_t c) {
    const T x = memory_[r * stride_ + c * step_];
    if constexpr (std::is_same_v<T, double>) return x;
    return to_float(x);
  }

 private:
  int64_t step_, stride_;
  Buffer<T> memory_;
};

Table table_of(int64_t batch, int64_t n, double scale, Random& random) {
  Table table(batch, std::vector<double>(n));
  for (auto& row : table)
    for (double& x : row) x = scale * random.normal();
  return table;
}

double uniform(Buffer<int64_t>& seed, Buffer<int64_t>& offset, int64_t b, int64_t candidate, Purpose purpose) {
  return philox_uniform(seed[b], 0, candidate, offset[offset.size() == 1 ? 0 : b], purpose).first;
}

struct Keys {
  Buffer<int64_t> seed, offset;

  explicit Keys(int64_t batch) : seed(batch), offset(batch % 2 ? 1 : batch) {
    for (int64_t b = 0; b < batch; ++b) seed[b] = 7919 * b - 3;
    for (int64_t b = 0; b < offset.size(); ++b) offset[b] = 4 + b;
  }
  Streams streams() { return {seed.data(), 1, offset.data(), offset.size() == 1 ? 0 : 1}; }
};

// --- select_candidate ----------------------------------------------------------------------------------------------------------

struct Selected {
  Buffer<int64_t> index, invalid;
  Buffer<float> log_weights, ess, log_z, loo;
  explicit Selected(int64_t batch, int64_t n)
      : index(batch), invalid(1), log_weights(batch * n), ess(batch), log_z(batch), loo(batch * n) {}
};

void check_selected(Selected& out, int64_t b, const std::vector<double>& log_weight, bool is_greedy, double u) {
  const auto n = static_cast<int64_t>(log_weight.size());
  const double max = *std::max_element(log_weight.begin(), log_weight.end());
  std::vector<double> weight(n), before(n + 1);
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    weight[i] = std::exp(log_weight[i] - max);
    before[i + 1] = before[i] + weight[i];
    squares += weight[i] * weight[i];
  }
  const double sum = before[n];
  const int64_t index = out.index[b];
  expect(index >= 0 && index < n, "row %ld: index %ld", long(b), long(index));
  if (index < 0 || index >= n) return;
  expect(weight[index] > 0 && u * sum > before[index] - 1e-12 * sum && u * sum < before[index + 1] + 1e-12 * sum,
         "row %ld: %ld is not where the uniform points", long(b), long(index));
  expect(is_near(out.ess[b], sum * sum / squares, 0, 1e-5), "row %ld: effective size %g", long(b), out.ess[b]);
  const double log_z = is_greedy ? kNan : max + std::log(sum) - std::log(n);
  expect(is_near(out.log_z[b], log_z, 1e-5, 1e-5), "row %ld: log z %g for %g", long(b), out.log_z[b], log_z);
  for (int64_t i = 0; i < n; ++i) {
    const double a = log_weight[i] - max - std::log(sum);
    expect(is_near(out.log_weights[b * n + i], a, 1e-5, 1e-5), "row %ld: log-weight %ld is %g for %g", long(b), long(i),
           out.log_weights[b * n + i], a);
    double others = 0, top = -kInfinity;
    for (int64_t j = 0; j < n; ++j) top = j == i ? top : std::max(top, log_weight[j]);
    for (int64_t j = 0; j < n; ++j) others += j == i ? 0.0 : std::exp(log_weight[j] - top);
    const double loo = is_greedy || n == 1 ? kNan : top == -kInfinity ? -kInfinity : top + std::log(others) - std::log(n - 1);
    expect(is_near(out.loo[b * n + i], loo, 1e-5, 1e-5), "row %ld: without %ld, log z is %g for %g", long(b), long(i),
           out.loo[b * n + i], loo);
  }
}

template <class T>
void select(int64_t batch, int64_t n, double temperature, bool has_correction, bool is_bad, double scale) {
  present = std::string("select, ") + kName<T> + ", " + std::to_string(batch) + " x " + std::to_string(n) +
            ", T = " + std::to_string(temperature) + (has_correction ? ", corrected" : "") + (is_bad ? ", bad rows" : "") +
            ", scale " + std::to_string(scale);
  Random random(static_cast<uint64_t>(n));
  Table energies = table_of(batch, n, scale, random);
  if (n > 2) energies[0][n / 2] = kInfinity;  // impossible, and not bad
  if (is_bad && batch > 4) {
    energies[batch - 1][n - 1] = kNan;
    energies[3][0] = -kInfinity;
    energies[4].assign(n, kInfinity);
  }
  Strided<T> energy(energies, 2, 3);
  Strided<T> correction(table_of(batch, n, 1.0, random), 1, 0);
  Keys keys(batch);
  Selected out(batch, n);
  SelectArgs args{};
  args.energy = energy.rows();
  if (has_correction) args.correction = correction.rows();
  args.candidates = n, args.temperature = temperature;
  args.log_candidates = std::log(n), args.log_others = std::log(n - 1);
  args.streams = keys.streams();
  args.index = out.index.data(), args.log_weights = out.log_weights.data(), args.ess = out.ess.data(),
  args.log_z = out.log_z.data();
  args.log_z_loo = out.loo.data();
  expect_launched(edlm_cuda_select(&args, batch, out.invalid.data(), nullptr));
  out.index.expect_written("index");
  out.log_weights.expect_written("log_weights");
  out.ess.expect_written("ess");
  out.log_z.expect_written("log_z");
  out.loo.expect_written("log_z_loo");
  int64_t report = -1;
  const bool is_greedy = temperature == 0;
  for (int64_t b = batch - 1; b >= 0; --b) {
    std::vector<double> weights(n), row(n);
    bool is_fit = true;
    for (int64_t i = 0; i < n; ++i) {
      row[i] = energy.at(b, i);
      is_fit = is_fit && row[i] > -kInfinity;
      weights[i] = row[i] == kInfinity ? -kInfinity : -row[i] / temperature + (has_correction ? correction.at(b, i) : 0.0);
    }
    const auto least = std::min_element(row.begin(), row.end());
    is_fit = is_fit && *least < kInfinity;
    if (!is_fit) report = b;
    if (is_greedy || !is_fit) weights.assign(n, is_fit ? -kInfinity : 0.0);
    if (is_greedy && is_fit) weights[least - row.begin()] = 0;
    check_selected(out, b, weights, is_greedy, uniform(keys.seed, keys.offset, b, 0, Purpose::kSelect));
  }
  expect(out.invalid[0] == report, "%ld is reported for %ld", long(out.invalid[0]), long(report));
}

// --- resample ------------------------------------------------------------------------------------------------------------------

// The particle that a uniform in [0, 1) of the whole points at.
int64_t pick(const std::vector<double>& prefix, double u) {
  const auto at = std::upper_bound(prefix.begin(), prefix.end(), u * prefix.back()) - prefix.begin();
  return std::min<int64_t>(at, static_cast<int64_t>(prefix.size()) - 1);
}

std::vector<int64_t> ancestors_of(const std::vector<double>& log_weight, Scheme scheme, Keys& keys, int64_t b) {
  const auto n = static_cast<int64_t>(log_weight.size());
  const double max = *std::max_element(log_weight.begin(), log_weight.end());
  std::vector<double> weight(n), prefix(n);
  for (int64_t i = 0; i < n; ++i) weight[i] = std::exp(log_weight[i] - max);
  const double sum = std::accumulate(weight.begin(), weight.end(), 0.0);
  std::vector<int64_t> chosen;
  if (scheme == kResidual) {
    for (int64_t i = 0; i < n; ++i) {
      const double expected = static_cast<double>(n) * (weight[i] / sum), whole = std::floor(expected + 1e-9);
      chosen.insert(chosen.end(), static_cast<size_t>(whole), i);
      weight[i] = std::max(0.0, expected - whole);
    }
  }
  std::partial_sum(weight.begin(), weight.end(), prefix.begin());
  for (auto i = static_cast<int64_t>(chosen.size()); i < n; ++i) {
    const double u = uniform(keys.seed, keys.offset, b, scheme == kSystematic ? 0 : i, Purpose::kResample);
    const bool is_even = scheme == kSystematic || scheme == kStratified;
    chosen.push_back(pick(prefix, is_even ? (static_cast<double>(i) + u) / static_cast<double>(n) : u));
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

template <class T>
void resample(int64_t batch, int64_t n, Scheme scheme, double scale) {
  present = std::string("resample, ") + kName<T> + ", " + std::to_string(batch) + " x " + std::to_string(n) + ", scheme " +
            std::to_string(scheme) + ", scale " + std::to_string(scale);
  Random random(static_cast<uint64_t>(n) + scheme);
  Table weights = table_of(batch, n, scale, random);
  if (n > 2) weights[0][n - 1] = weights[0][0] = -kInfinity;
  if (batch > 3) {
    weights[batch - 1][n / 2] = kNan;
    weights[2][0] = kInfinity;
    weights[1].assign(n, -kInfinity);
  }
  Strided<T> log_weights(weights, 3, 1);
  Keys keys(batch);
  Buffer<int64_t> ancestors(batch * n), invalid(1);
  ResampleArgs args{log_weights.rows(), n, scheme, keys.streams(), ancestors.data()};
  Buffer<char> scratch(static_cast<int64_t>(edlm_cuda_resample_scratch(&args, batch)));
  expect_launched(edlm_cuda_resample(&args, scratch.data(), batch, invalid.data(), nullptr));
  ancestors.expect_written("ancestors");
  int64_t report = -1;
  for (int64_t b = batch - 1; b >= 0; --b) {
    std::vector<double> row(n);
    bool is_fit = false;
    for (int64_t i = 0; i < n; ++i) row[i] = log_weights.at(b, i), is_fit = is_fit || row[i] > -kInfinity;
    for (int64_t i = 0; i < n; ++i) is_fit = is_fit && row[i] < kInfinity;
    if (!is_fit) report = b, row.assign(n, 0.0);
    const std::vector<int64_t> wanted = ancestors_of(row, scheme, keys, b);
    for (int64_t i = 0; i < n; ++i)
      expect(ancestors[b * n + i] == wanted[i], "row %ld: ancestor %ld is %ld for %ld", long(b), long(i),
             long(ancestors[b * n + i]), long(wanted[i]));
  }
  expect(invalid[0] == report, "%ld is reported for %ld", long(invalid[0]), long(report));
}

// --- reverse_step --------------------------------------------------------------------------------------------------------------

template <class T>
void reverse(int64_t batch, int64_t length, int64_t candidates, bool is_bad) {
  present = std::string("reverse, ") + kName<T> + ", " + std::to_string(batch) + " x " + std::to_string(length) +
            (is_bad ? ", bad rows" : "");
  Random random(static_cast<uint64_t>(length));
  // Columns are two elements apart, and all there is behind the last is its own.
  const auto extent = [&](int64_t rows) { return (rows * length - 1) * 2 + 1; };
  Buffer<int64_t> xt(extent(batch)), x0(extent(batch * candidates)), index(2 * batch - 1), xs(batch * length), invalid(1);
  Buffer<T> open_time(extent(batch)), s(batch % 2 ? 1 : batch);
  for (int64_t i = 0; i < xt.size(); ++i) xt[i] = i % 2 ? -99 : 1000 + i;
  for (int64_t i = 0; i < x0.size(); ++i) x0[i] = i % 2 ? -99 : 1000000 + i;
  for (int64_t i = 0; i < open_time.size(); ++i) open_time[i] = i % 2 ? T{-1} : static_cast<T>(random.below(8) / 8.0);
  for (int64_t i = 0; i < s.size(); ++i) s[i] = static_cast<T>(0.5);
  for (int64_t i = 0; i < index.size(); ++i) index[i] = i % 2 ? -99 : random.below(candidates);
  if (is_bad) index[2 * (batch - 1)] = -1, index[2 * (batch / 2)] = candidates;
  ReverseArgs args{};
  args.length = length, args.candidates = candidates;
  args.xt = xt.data(), args.xt_stride_b = 2 * length, args.xt_stride_l = 2;
  args.x0 = x0.data(), args.x0_stride_b = 2 * candidates * length, args.x0_stride_k = 2 * length, args.x0_stride_l = 2;
  args.index = index.data(), args.index_stride = 2;
  args.open_time = open_time.data(), args.is_double = sizeof(T) == 8, args.open_stride_b = 2 * length, args.open_stride_l = 2;
  args.s = s.data(), args.s_stride = s.size() == 1 ? 0 : 1;
  args.xs = xs.data();
  expect_launched(edlm_cuda_reverse(&args, batch, invalid.data(), nullptr));
  xs.expect_written("xs");
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t k = std::clamp<int64_t>(index[2 * b], 0, candidates - 1);
    for (int64_t l = 0; l < length; ++l) {
      const int64_t at = 2 * (b * length + l),
                    wanted = open_time[at] >= s[s.size() == 1 ? 0 : b] ? x0[2 * ((b * candidates + k) * length + l)] : xt[at];
      expect(xs[b * length + l] == wanted, "(%ld, %ld) is %ld for %ld", long(b), long(l), long(xs[b * length + l]), long(wanted));
    }
  }
  expect(invalid[0] == (is_bad ? batch / 2 : -1), "%ld is reported", long(invalid[0]));
}

template <class T>
void run(bool is_all) {
  for (const int64_t n : {1, 5, 32, 33, 100})
    for (const double temperature : {1.0, 0.5, 0.0})
      for (const double scale : {1.0, 200.0})
        for (const bool is_bad : {false, true}) select<T>(scale > 1 ? 10 : 9, n, temperature, is_all || scale > 1, is_bad, scale);
  for (const int64_t n : {1, 7, 256, 300})
    for (const Scheme scheme : {kSystematic, kStratified, kMultinomial, kResidual})
      for (const double scale : {0.0, 1.0, 20.0}) resample<T>(scale > 0 ? 4 : 3, n, scheme, scale);
}

}  // namespace

void run_importance(Size size) {
  if (size == Size::kFew) {
    select<float>(5, 33, 0.5, true, true, 1.0);
    select<float>(2, 33, 0.0, false, false, 1.0);
    for (const Scheme scheme : {kSystematic, kMultinomial, kResidual}) resample<float>(1, 300, scheme, 1.0);
    reverse<float>(4, 70, 3, true);
    return;
  }
  run<__nv_bfloat16>(true);
  if (size == Size::kMany) {
    run<float>(false);
    run<double>(true);
    run<__half>(true);
  }
  for (const bool is_bad : {false, true}) {
    reverse<float>(4, 70, 3, is_bad);
    reverse<double>(3, 300, 1, is_bad);
    reverse<float>(1, 1, 5, is_bad);
  }
}

}  // namespace edlm::exact
