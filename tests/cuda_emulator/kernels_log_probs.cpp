// edlm_cuda_gather, _fold and _backward against sums in double.
#include "log_probs.h"

#include <algorithm>

#include "exact_buffers.h"

namespace edlm::exact {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

// Of a row without its excluded columns, in double.
struct Softmax {
  std::vector<double> x;
  double max = -kInfinity, sum = 0;  // of exp((x - max) / T); NaN where it holds NaN or +inf, or nothing finite

  Softmax(const std::vector<float>& row, const std::vector<int64_t>& forbidden, double temperature) : x(row.begin(), row.end()) {
    for (const int64_t id : forbidden)
      if (id >= 0 && id < static_cast<int64_t>(x.size())) x[id] = -kInfinity;
    bool is_finite = true;
    for (const double v : x) {
      is_finite = is_finite && v < kInfinity;
      max = std::max(max, v);
    }
    for (const double v : x) sum += std::exp((v - max) / temperature);
    if (!is_finite || max == -kInfinity) sum = kNan;
  }
};

struct Task {
  std::vector<std::vector<float>> rows;
  int64_t length = 1, num_tokens = 3, lead = 0, gap = 0, out_lead = 0, out_gap = 0;
  double temperature = 1;
  std::vector<int64_t> forbidden{};
  std::vector<std::vector<float>> grad{};  // [rows][num_tokens], or none: no backward()
};

// The results of each row, as bits.
struct Results {
  std::vector<std::vector<uint32_t>> gathered;  // log-probabilities, then stats
  std::vector<std::vector<float>> grads;
};

template <class T>
class Launch {
 public:
  Launch(const Task& task, const char* what)
      : task_(task),
        n_(static_cast<int64_t>(task.rows.size())),
        vocab_(static_cast<int64_t>(task.rows[0].size())),
        rows_(rounded<T>(task.rows)),
        logits_(n_, vocab_, task.lead, task.gap),
        tokens_(n_ * task.num_tokens),
        forbidden_(task.forbidden),
        log_probs_(n_ * task.num_tokens),
        stats_(2 * n_),
        grad_(n_ * task.num_tokens) {
    present = std::string(what) + ", " + kName<T> + ", V = " + std::to_string(vocab_) + ", " + std::to_string(n_) + " rows, " +
              std::to_string(task.lead) + " before them, T = " + std::to_string(task.temperature);
    logits_.set(task.rows);
    // An id twice, the last column, further ones; in the row before the last an id that is none.
    for (int64_t r = 0; r < n_; ++r)
      for (int64_t k = 0; k < task.num_tokens; ++k)
        tokens_[r * task.num_tokens + k] = (k < 2 ? 0 : vocab_ - 1 - (k - 2) * 7 % vocab_);
    if (n_ > 3) tokens_[(n_ - 1) * task.num_tokens - 1] = n_ % 2 ? -1 : vocab_;
    args_.logits = logits_.data(), args_.dtype = kDType<T>;
    args_.length = task.length, args_.batch = n_ / task.length, args_.vocab = vocab_;
    args_.stride_l = logits_.stride(), args_.stride_b = task.length * logits_.stride();
    args_.tokens = tokens_.data(), args_.num_tokens = task.num_tokens;
    args_.forbidden = forbidden_.data(), args_.num_forbidden = forbidden_.size();
    args_.temperature = task.temperature;
    args_.log_probs = log_probs_.data(), args_.stats = stats_.data(), args_.grad = grad_.data();
  }

  void gather(Results* results) {
    Buffer<int64_t> invalid(1);
    Buffer<char> scratch(static_cast<int64_t>(edlm_cuda_gather_scratch(&args_)));
    expect_launched(edlm_cuda_gather(&args_, scratch.data(), invalid.data(), nullptr));
    log_probs_.expect_written("log_probs");
    stats_.expect_written("stats");
    int64_t report = -1;
    for (int64_t r = n_ - 1; r >= 0; --r) {
      const Softmax row(rows_[r], task_.forbidden, task_.temperature);
      const double log_sum = std::log(row.sum);
      expect(is_near(stats_[2 * r + 1], log_sum, 1e-5, 1e-5), "row %ld: log of the sum %g for %g", long(r), stats_[2 * r + 1],
             log_sum);
      if (!std::isnan(log_sum)) expect(stats_[2 * r] == row.max, "row %ld: maximum %g for %g", long(r), stats_[2 * r], row.max);
      std::vector<uint32_t> all{bits(stats_[2 * r]), bits(stats_[2 * r + 1])};
      for (int64_t k = 0; k < task_.num_tokens; ++k) {
        const int64_t id = tokens_[r * task_.num_tokens + k];
        const bool is_id = id >= 0 && id < vocab_;
        if (!is_id) report = r;
        const float got = log_probs_[r * task_.num_tokens + k];
        const double wanted = is_id ? (row.x[id] - row.max) / task_.temperature - log_sum : kNan;
        expect(is_near(got, wanted, 1e-5, 1e-5) && !(got > 0), "row %ld: log-probability %g for %g", long(r), got, wanted);
        all.push_back(bits(got));
      }
      results->gathered.insert(results->gathered.begin(), all);
    }
    expect(invalid[0] == report, "%ld is reported for %ld", long(invalid[0]), long(report));
  }

  // After gather(). In place: over the logits.
  void backward(Results* results, bool is_in_place) {
    Matrix<T> apart(n_, vocab_, task_.out_lead, task_.out_gap);
    apart.forbid_gaps();
    Matrix<T>& out = is_in_place ? logits_ : apart;
    for (int64_t r = 0; r < n_; ++r)
      for (int64_t k = 0; k < task_.num_tokens; ++k) grad_[r * task_.num_tokens + k] = task_.grad[r][k];
    if (!is_in_place)  // a row that does not count is not read
      for (int64_t r = 0; r < n_; ++r)
        if (is_zero(r)) logits_.forbid_row(r);
    args_.grad_logits = out.data(), args_.grad_stride = out.stride();
    expect_launched(edlm_cuda_backward(&args_, nullptr));
    for (int64_t r = 0; r < n_; ++r) {
      check_grads(r, out);
      std::vector<float> all(vocab_);
      for (int64_t c = 0; c < vocab_; ++c) all[c] = to_float(out.row(r)[c]);
      results->grads.push_back(all);
    }
    if (!is_in_place) apart.expect_gaps_unwritten("grad_logits");
  }

 private:
  bool is_zero(int64_t r) const {
    return std::all_of(task_.grad[r].begin(), task_.grad[r].end(), [](float g) { return g == 0; });
  }

  void check_grads(int64_t r, Matrix<T>& out) {
    const Softmax row(rows_[r], task_.forbidden, task_.temperature);
    double total = 0;
    for (const float g : task_.grad[r]) total += g;
    std::vector<double> wanted(vocab_);
    for (int64_t c = 0; c < vocab_; ++c)
      wanted[c] = -total / task_.temperature * std::exp((row.x[c] - row.max) / task_.temperature) / row.sum;
    for (int64_t k = 0; k < task_.num_tokens; ++k)
      if (const int64_t id = tokens_[r * task_.num_tokens + k]; id >= 0 && id < vocab_)
        wanted[id] += task_.grad[r][k] / task_.temperature;
    for (const int64_t id : task_.forbidden)
      if (id >= 0 && id < vocab_) wanted[id] = 0;
    if (is_zero(r)) wanted.assign(vocab_, 0.0);
    constexpr double kRelative = sizeof(T) == 4 ? 1e-5 : std::is_same_v<T, __half> ? 1e-3 : 8e-3;
    for (int64_t c = 0; c < vocab_; ++c) {
      const double got = to_float(out.row(r)[c]);
      expect(out.is_written(r, c), "row %ld: gradient %ld was not written", long(r), long(c));
      expect(is_near(got, wanted[c], 2e-6, kRelative), "row %ld: gradient %ld is %g for %g", long(r), long(c), got, wanted[c]);
    }
  }

  const Task& task_;
  int64_t n_, vocab_;
  std::vector<std::vector<float>> rows_;
  Matrix<T> logits_;
  Buffer<int64_t> tokens_, forbidden_;
  Buffer<float> log_probs_, stats_, grad_;
  LogProbArgs args_{};
};

template <class T>
Results run(const Task& task, const char* what, bool is_in_place = false) {
  Results results;
  Launch<T> launch(task, what);
  launch.gather(&results);
  if (!task.grad.empty()) launch.backward(&results, is_in_place);
  return results;
}

// One row at every offset, by a block each, and alone, so that several blocks measure it: the same to the bit.
template <class T>
void run_alike(int64_t vocab, double temperature) {
  Random random(static_cast<uint64_t>(vocab));
  Task task{.rows = {}, .temperature = temperature};
  std::vector<float> row = make_row_of(Content::kNormal, vocab, random);
  row[0] = 1;
  task.rows.assign(kOffsets<T> + 1, row);
  task.gap = (kOffsets<T> + 1 - vocab % kOffsets<T>) % kOffsets<T>;
  task.num_tokens = 1;
  const Results whole = run<T>(task, "gather, alike");
  for (size_t r = 1; r < task.rows.size(); ++r)
    expect(r + 2 == task.rows.size() || whole.gathered[r] == whole.gathered[0], "row %zu differs in its bits from the first", r);
  task.rows.resize(1);
  for (task.lead = 0; task.lead < kOffsets<T>; task.lead += vocab > 5000 ? 3 : 1)
    expect(run<T>(task, "gather, alone").gathered[0] == whole.gathered[0],
           "a row alone differs in its bits from one among others");
}

// Rows of every kind, excluded columns, gradients of some.
template <class T>
void run_mixed(int64_t vocab, double temperature, bool is_in_place) {
  Random random(static_cast<uint64_t>(vocab) + 1);
  Task task{.rows = {},
            .length = is_in_place ? 1 : 3,
            .num_tokens = is_in_place ? 1 : 4,
            .lead = 1,
            .gap = 2,
            .out_lead = 3,
            .out_gap = 1};
  task.temperature = temperature;
  task.forbidden = {vocab - 1, -1, vocab / 2, vocab, vocab / 2};
  constexpr Content contents[] = {Content::kNormal, Content::kTies,     Content::kNan,
                                  Content::kNormal, Content::kInfinite, Content::kNothing};
  for (const Content content : contents) task.rows.push_back(make_row_of(content, vocab, random));
  run<T>(task, "gather, mixed");
  for (auto& row : task.rows) row = make_row_of(Content::kNormal, vocab, random);
  for (auto& row : task.rows) row[0] = 1;
  task.forbidden[2] = vocab == 1 ? -7 : vocab / 2;
  task.forbidden[4] = task.forbidden[2], task.forbidden[0] = vocab == 1 ? 1 : vocab - 1;
  task.grad.assign(6, std::vector<float>(task.num_tokens));
  for (size_t r = 0; r < 6; ++r)
    for (float& g : task.grad[r]) g = r == 1 ? 0.0f : static_cast<float>(random.normal());
  const Results apart = run<T>(task, "backward, mixed");
  if (is_in_place)
    expect(run<T>(task, "backward, in place", true).grads == apart.grads, "in place, gradients differ in their bits");
}

// Logits and gradients at all pairs of offsets.
template <class T>
void run_offsets(int64_t vocab) {
  Random random(static_cast<uint64_t>(vocab) + 2);
  std::vector<float> row = make_row_of(Content::kNormal, vocab, random);
  row[0] = 1;
  Task task{.rows = {}, .num_tokens = 2};
  task.rows.assign(kOffsets<T>, row);
  task.grad.assign(kOffsets<T>, {0.5f, -2.0f});
  task.gap = (kOffsets<T> + 1 - vocab % kOffsets<T>) % kOffsets<T>;
  task.out_gap = (kOffsets<T> - vocab % kOffsets<T>) % kOffsets<T>;
  for (task.out_lead = 0; task.out_lead < kOffsets<T>; ++task.out_lead) {
    const Results results = run<T>(task, "backward, offsets");
    for (size_t r = 1; r < task.rows.size(); ++r)
      expect(r + 2 == task.rows.size() || results.grads[r] == results.grads[0], "row %zu differs in its bits from the first", r);
  }
}

// A vocabulary in chunks, each folded into what the others have left.
void run_fold(const std::vector<int64_t>& chunks) {
  Random random(chunks.size());
  constexpr Content contents[] = {Content::kNormal, Content::kTies,     Content::kNan,
                                  Content::kWide,   Content::kInfinite, Content::kNothing};
  constexpr int64_t kRows = 6;
  present = "fold";
  int64_t vocab = 0;
  for (const int64_t chunk : chunks) vocab += chunk;
  std::vector<std::vector<float>> rows;
  for (const Content content : contents) rows.push_back(make_row_of(content, vocab, random));
  const std::vector<int64_t> forbidden{vocab - 1, vocab / 3};
  Buffer<double> running(3 * kRows);
  Buffer<int64_t> tokens(kRows);
  for (int64_t r = 0; r < kRows; ++r) running[3 * r] = -kInfinity, running[3 * r + 1] = running[3 * r + 2] = 0;
  int64_t first = 0;
  const auto token_of = [&](int64_t r) { return r == 1 ? vocab - 1 : r == 3 ? 0 : (r * 977 + 5) % vocab; };
  for (const int64_t chunk : chunks) {
    std::vector<std::vector<float>> part;
    for (const auto& row : rows) part.emplace_back(row.begin() + first, row.begin() + first + chunk);
    Matrix<float> logits(kRows, chunk, 0, 0);
    logits.set(part);
    Buffer<int64_t> excluded(2);
    for (int64_t i = 0; i < 2; ++i) excluded[i] = forbidden[i] - first;
    for (int64_t r = 0; r < kRows; ++r) tokens[r] = token_of(r) - first;
    LogProbArgs args{};
    args.logits = logits.data(), args.batch = kRows, args.length = 1, args.vocab = args.stride_b = chunk;
    args.tokens = tokens.data(), args.num_tokens = 1, args.forbidden = excluded.data(), args.num_forbidden = 2;
    args.temperature = 1, args.running = running.data();
    expect_launched(edlm_cuda_fold(&args, nullptr));
    first += chunk;
  }
  for (int64_t r = 0; r < kRows; ++r) {
    const Softmax row(rows[r], forbidden, 1.0);
    const double sum = contents[r] == Content::kNothing ? 0.0 : row.sum;
    expect(is_near(running[3 * r + 1], sum, 0, 1e-5), "row %ld: sum %g for %g", long(r), running[3 * r + 1], sum);
    expect(std::isnan(sum) || running[3 * r] == row.max, "row %ld: maximum %g for %g", long(r), running[3 * r], row.max);
    expect(is_near(running[3 * r + 2], row.x[token_of(r)], 0, 0), "row %ld: the token's logit is %g", long(r),
           running[3 * r + 2]);
  }
}

template <class T>
void run_many(bool is_long_too) {
  for (const int64_t vocab : {1, 27, 128, 129, 511, 512, 513, 1025, 4100, 50258}) {
    if (vocab > 5000 && !is_long_too) continue;
    for (const double temperature : {1.0, 0.6}) run_alike<T>(vocab, temperature);
    run_mixed<T>(vocab, 0.8, false);
    if (vocab < 5000) run_mixed<T>(vocab, 1.0, true);
  }
  for (const int64_t vocab : {2, 9, 27, 256 * kOffsets<T> - 1}) run_offsets<T>(vocab);
}

}  // namespace

void run_log_probs(Size size) {
  if (size == Size::kFew) {
    Random random(5);
    Task task{.rows = {make_row_of(Content::kNormal, 4700, random)}, .grad = {{1, -2, 3}}};
    run<__nv_bfloat16>(task, "gather, alone");
    run<float>(task, "gather, alone");
    run_mixed<__half>(1100, 0.8, false);
    run_fold({700, 513});
    return;
  }
  run_many<__nv_bfloat16>(size == Size::kMany);
  for (const auto& chunks : {std::vector<int64_t>{1, 30}, {512, 511, 2}, {5000, 5000, 3}}) run_fold(chunks);
  if (size == Size::kSome) return;
  run_many<float>(true);
  run_many<__half>(true);
  // So many columns that a row's tiles stay in memory.
  Random random(6);
  Task task{.rows = {make_row_of(Content::kNormal, 2457700, random)}, .lead = 3};
  run<__nv_bfloat16>(task, "gather, a million");
}

}  // namespace edlm::exact
