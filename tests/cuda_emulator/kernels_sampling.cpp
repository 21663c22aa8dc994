// edlm_cuda_sample against laws in double: which columns may be drawn, where the uniforms point, log-probabilities, reports.
#include "sampling.h"

#include <algorithm>
#include <numeric>

#include "exact_buffers.h"
#include "philox.h"

namespace edlm::exact {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Way {
  const char* name;
  double temperature;
  int64_t top_k;
  double top_p, min_p;
};

constexpr Way kWays[] = {
    {"plain", 1.0, 0, 1.0, 0.0},  {"tempered", 0.7, 0, 1.0, 0.0}, {"greedy", 0.0, 3, 0.5, 0.5}, {"top-k", 1.0, 5, 1.0, 0.0},
    {"top-p", 1.3, 0, 0.85, 0.0}, {"min-p", 1.0, 0, 1.0, 0.05},   {"all", 0.8, 20, 0.9, 0.02},  {"one", 1.0, 1, 1e-6, 1.0},
};

// What a launch is asked for; rows are (b, l), l < length.
struct Task {
  Way way;
  std::vector<std::vector<float>> rows;
  int64_t length = 1, draws = 3, lead = 0, gap = 0, mask = -1;
  std::vector<int64_t> xt{};   // or none
  std::vector<char> active{};  // or none
  std::vector<int64_t> forbidden{}, position{};
  bool is_alike = false;  // all sequences have one seed, so that equal rows are drawn from equally
};

struct Draws {
  std::vector<int64_t> tokens;
  std::vector<uint32_t> log_probs, model_log_probs;
  bool operator==(const Draws&) const = default;
};

// A row's law in double: code -1, or that of a bad row.
struct Law {
  int64_t code = -1, argmax = 0;
  std::vector<double> x, mass, before;  // logits without excluded ones; masses of what filters keep; their prefixes, exclusive
  double max = -kInfinity, log_total = 0, log_model_total = 0;
};

Law law_of(std::vector<double> x, const Way& way) {
  Law law;
  const auto n = static_cast<int64_t>(x.size());
  for (const double v : x) {
    if (std::isnan(v) || v == kInfinity) law.code = kNonFinite;
    law.max = std::max(law.max, v);
  }
  if (law.code == kNonFinite) return law;
  if (law.max == -kInfinity) {
    law.code = kNoSupport;
    return law;
  }
  law.argmax = std::find(x.begin(), x.end(), law.max) - x.begin();
  const double inverse = way.temperature == 0 ? 1.0 : 1.0 / way.temperature;
  std::vector<int64_t> kept;
  double model = 0;
  for (int64_t c = 0; c < n; ++c) {
    if (x[c] > -kInfinity) kept.push_back(c);
    model += std::exp(x[c] - law.max);
  }
  const bool is_filtered = way.top_k > 0 || way.top_p < 1 || way.min_p > 0;
  if (is_filtered) std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) { return x[a] > x[b]; });
  const auto weight = [&](int64_t c) { return std::exp((x[c] - law.max) * inverse); };
  const auto total_of = [&] {
    return std::accumulate(kept.begin(), kept.end(), 0.0, [&](double sum, int64_t c) { return sum + weight(c); });
  };
  if (way.top_k > 0 && way.top_k < static_cast<int64_t>(kept.size())) kept.resize(way.top_k);
  if (way.top_p < 1) {
    const double target = way.top_p * total_of();
    double sum = 0;
    size_t count = 0;
    while (count < kept.size() && sum < target) sum += weight(kept[count++]);
    kept.resize(std::max<size_t>(count, 1));
  }
  if (way.min_p > 0) std::erase_if(kept, [&](int64_t c) { return (x[c] - law.max) * inverse < std::log(way.min_p); });
  law.mass.assign(n, 0.0);
  for (const int64_t c : kept) law.mass[c] = weight(c);
  law.before.assign(n + 1, 0.0);
  std::partial_sum(law.mass.begin(), law.mass.end(), law.before.begin() + 1);
  law.log_total = std::log(total_of());
  law.log_model_total = std::log(model);
  law.x = std::move(x);
  return law;
}

// Whether u points at [begin, end) of a whole of `total`, but for what rounding in float moves.
bool points_at(double u, double begin, double end, double total) {
  const double near = 2e-5 * total;
  return u * total > begin - near && u * total < end + near;
}

template <class T>
class Launch {
 public:
  Launch(const Task& task, const SampleArgs& args, Buffer<int64_t>& tokens, Buffer<float>& log_probs,
         Buffer<float>* model_log_probs)
      : task_(task), args_(args), tokens_(tokens), log_probs_(log_probs), model_(model_log_probs), rows_(rounded<T>(task.rows)) {}

  // Looks at a row's draws, and returns the code that it is to report.
  int64_t check(int64_t r) {
    const bool is_drawn = task_.xt.empty() || (task_.xt[r] == args_.mask && (task_.active.empty() || task_.active[r]));
    if (is_drawn) return check_drawn(r);
    const bool is_id = task_.xt[r] >= 0 && task_.xt[r] < args_.vocab;
    for (int64_t k = 0; k < args_.num_samples; ++k) {
      const int64_t at = index(r, k);
      expect(tokens_[at] == (is_id ? task_.xt[r] : 0), "row %ld: token %ld is not the one it had", long(r), long(tokens_[at]));
      expect(log_probs_[at] == 0 && (!model_ || (*model_)[at] == 0), "row %ld keeps its token for sure", long(r));
    }
    return is_id ? -1 : int64_t{kOutOfRange};
  }

  int64_t index(int64_t r, int64_t k) const {
    const int64_t b = r / args_.length, l = r % args_.length;
    return (b * args_.num_samples + k) * args_.length + l;
  }

 private:
  int64_t check_drawn(int64_t r) {
    std::vector<double> x(rows_[r].begin(), rows_[r].end());
    if (args_.mask >= 0 && args_.mask < args_.vocab) x[args_.mask] = -kInfinity;
    for (const int64_t id : task_.forbidden)
      if (id >= 0 && id < args_.vocab) x[id] = -kInfinity;
    const Law law = law_of(std::move(x), task_.way);
    for (int64_t k = 0; k < args_.num_samples; ++k) {
      const int64_t at = index(r, k), id = tokens_[at];
      const float log_prob = log_probs_[at], model = model_ ? (*model_)[at] : log_prob;
      expect(id >= 0 && id < args_.vocab, "row %ld: token %ld is out of range", long(r), long(id));
      if (id < 0 || id >= args_.vocab) continue;
      if (law.code >= 0) {
        expect(id == 0 && std::isnan(log_prob) && std::isnan(model), "row %ld is bad, got %ld, %g", long(r), long(id), log_prob);
        continue;
      }
      const double inverse = task_.way.temperature == 0 ? 1.0 : 1.0 / task_.way.temperature, d = law.x[id] - law.max;
      const double wanted = args_.temperature == 0 ? 0.0 : d * inverse - law.log_total, wanted_model = d - law.log_model_total;
      expect(is_near(log_prob, wanted, 1e-5, 1e-5) && log_prob <= 0, "row %ld: log-probability %g for %g", long(r), log_prob,
             wanted);
      expect(is_near(model, wanted_model, 1e-5, 1e-5) && model <= 0, "row %ld: the model's %g for %g", long(r), model,
             wanted_model);
      if (args_.temperature == 0) {
        expect(id == law.argmax, "row %ld: %ld for the largest, %ld", long(r), long(id), long(law.argmax));
      } else {
        check_draw(r, k, id, law);
      }
    }
    return law.code;
  }

  void check_draw(int64_t r, int64_t k, int64_t id, const Law& law) {
    const int64_t b = r / args_.length, position = args_.position ? task_.position[r] : r % args_.length;
    const Uniforms u = philox_uniform(args_.seed[b], position, k, args_.offset[b * args_.offset_stride], Purpose::kToken);
    const int64_t tile = id / kTile, first = tile * kTile, end = std::min(first + kTile, args_.vocab);
    expect(law.mass[id] > 0, "row %ld: %ld cannot be drawn", long(r), long(id));
    expect(points_at(u.first, law.before[first], law.before[end], law.before[args_.vocab]) || args_.vocab <= kTile,
           "row %ld: tile %ld is not where the first uniform points", long(r), long(tile));
    expect(points_at(u.second, law.before[id] - law.before[first], law.before[id + 1] - law.before[first],
                     law.before[end] - law.before[first]),
           "row %ld: %ld is not where the second uniform points", long(r), long(id));
  }

  const Task& task_;
  const SampleArgs& args_;
  Buffer<int64_t>& tokens_;
  Buffer<float>&log_probs_, *model_;
  std::vector<std::vector<float>> rows_;
};

// Runs a task, looks at all that it writes, and returns the draws of every row.
template <class T>
std::vector<Draws> sample(const Task& task, const char* what) {
  const auto rows = static_cast<int64_t>(task.rows.size()), vocab = static_cast<int64_t>(task.rows[0].size());
  present = std::string("sample ") + what + ", " + kName<T> + ", " + task.way.name + ", V = " + std::to_string(vocab) + ", " +
            std::to_string(rows) + " rows, " + std::to_string(task.lead) + " before them";
  SampleArgs args{};
  args.dtype = kDType<T>;
  args.length = task.length, args.batch = rows / task.length, args.vocab = vocab;
  args.num_samples = task.draws;
  args.mask = task.mask;
  args.temperature = task.way.temperature, args.top_k = task.way.top_k, args.top_p = task.way.top_p, args.min_p = task.way.min_p;
  const bool has_offsets = args.batch % 2 == 0 && !task.is_alike;

  Matrix<T> logits(rows, vocab, task.lead, task.gap);
  logits.set(task.rows);
  args.logits = logits.data();
  args.stride_l = logits.stride(), args.stride_b = task.length * logits.stride();
  Buffer<int64_t> seed(args.batch), offset(has_offsets ? args.batch : 1), xt(task.xt), forbidden(task.forbidden),
      position(task.position);
  Buffer<char> active(task.active);
  for (int64_t b = 0; b < args.batch; ++b) seed[b] = task.is_alike ? 11 : 1000003 * b + 7;
  for (int64_t b = 0; b < offset.size(); ++b) offset[b] = 5 + b;
  args.seed = seed.data();
  args.offset = offset.data(), args.offset_stride = has_offsets ? 1 : 0;
  args.forbidden = forbidden.data(), args.num_forbidden = forbidden.size();
  args.xt = task.xt.empty() ? nullptr : xt.data();
  args.active = task.active.empty() ? nullptr : reinterpret_cast<const bool*>(active.data());
  args.position = task.position.empty() ? nullptr : position.data();

  const int64_t n = rows * args.num_samples;
  Buffer<int64_t> tokens(n), invalid(1);
  Buffer<float> log_probs(n), model(n);
  const bool has_model = task.way.temperature != 1.0 || is_filtered(args);
  args.tokens = tokens.data(), args.log_probs = log_probs.data(), args.model_log_probs = has_model ? model.data() : nullptr;
  Buffer<char> scratch(static_cast<int64_t>(edlm_cuda_sample_scratch(&args)));
  expect_launched(edlm_cuda_sample(&args, scratch.data(), invalid.data(), nullptr));

  tokens.expect_written("tokens");
  log_probs.expect_written("log_probs");
  if (has_model) model.expect_written("model_log_probs");
  Launch<T> launch(task, args, tokens, log_probs, has_model ? &model : nullptr);
  int64_t report = -1;
  std::vector<Draws> draws(rows);
  for (int64_t r = rows - 1; r >= 0; --r) {
    // Equal rows are looked at once: the caller compares their bits.
    if (const int64_t code = task.is_alike && r > 0 ? -1 : launch.check(r); code >= 0) report = 4 * r + code;
    for (int64_t k = 0; k < args.num_samples; ++k) {
      const int64_t at = launch.index(r, k);
      draws[r].tokens.push_back(tokens[at]);
      draws[r].log_probs.push_back(bits(log_probs[at]));
      if (has_model) draws[r].model_log_probs.push_back(bits(model[at]));
    }
  }
  expect(invalid[0] == report, "%ld is reported for %ld", long(invalid[0]), long(report));
  return draws;
}

// One row at every offset, by a block each; then alone, so that several blocks measure it. All draws are the same to the bit.
template <class T>
void sample_alike(const Way& way, Content content, int64_t vocab, bool is_split_everywhere) {
  Random random(static_cast<uint64_t>(vocab));
  Task task{.way = way, .rows = {}};
  task.rows.assign(kOffsets<T> + 1, make_row_of(content, vocab, random));
  task.rows[0][0] = 1;  // or a row of one column might have nothing
  for (auto& row : task.rows) row = task.rows[0];
  task.gap = (kOffsets<T> + 1 - vocab % kOffsets<T>) % kOffsets<T>;
  task.draws = 12;
  task.position.assign(task.rows.size(), 3);
  task.is_alike = true;
  const std::vector<Draws> whole = sample<T>(task, "alike");
  for (size_t r = 1; r < whole.size(); ++r) expect(whole[r] == whole[0], "row %zu differs in its bits from the first", r);
  task.rows.resize(1);
  task.position.resize(1);
  for (int lead = is_split_everywhere ? 0 : kOffsets<T> - 1; lead < kOffsets<T>; ++lead) {
    task.lead = lead;
    expect(sample<T>(task, "alone")[0] == whole[0], "a row alone differs in its bits from one among others");
  }
}

// Rows of every kind side by side: drawn ones, carried ones, bad ones.
template <class T>
void sample_mixed(const Way& way, int64_t vocab, int64_t mask) {
  Random random(static_cast<uint64_t>(vocab) + 1);
  Task task{.way = way, .rows = {}, .length = 3, .draws = 2, .lead = 1, .gap = 3, .mask = mask};
  constexpr Content contents[] = {Content::kNormal, Content::kTies,     Content::kNan,     Content::kNormal, Content::kWide,
                                  Content::kNormal, Content::kInfinite, Content::kNothing, Content::kTies};
  for (const Content content : contents) task.rows.push_back(make_row_of(content, vocab, random));
  task.xt = {mask, 0, mask, vocab, mask, mask, mask, mask, mask};
  task.active = {1, 1, 1, 1, 1, 0, 1, 1, 1};
  for (const int64_t token : {vocab, int64_t{-1}, int64_t{1} << 40, vocab - 1}) {
    if (token != vocab && &way != kWays) continue;
    task.xt[3] = token;
    sample<T>(task, "mixed");
  }
  std::swap(task.rows[2], task.rows[8]);  // the first report is another's
  task.active.clear();
  sample<T>(task, "mixed");
}

// Excluded columns, in any order, some of them elsewhere; a NaN among them does not count.
template <class T>
void sample_forbidden(const Way& way, int64_t vocab) {
  Random random(static_cast<uint64_t>(vocab) + 2);
  Task task{.way = way, .rows = {}, .draws = 9, .gap = 1};
  for (int r = 0; r < 2; ++r) {
    task.rows.push_back(make_row_of(Content::kNormal, vocab, random));
    task.rows.back()[vocab / 2] = std::numeric_limits<float>::quiet_NaN();
  }
  task.forbidden = {vocab - 1, vocab / 2, -1, 0, vocab / 2, vocab, vocab + 100, int64_t{1} << 40};
  sample<T>(task, "forbidden");
}

// So many short rows that they fill a block, and some of another.
template <class T>
void sample_short(const Way& way, int64_t vocab) {
  Random random(static_cast<uint64_t>(vocab) + 3);
  Task task{.way = way, .rows = {}, .draws = 2};
  for (int r = 0; r < 37; ++r) task.rows.push_back(make_row_of(r == 33 ? Content::kNan : Content::kTies, vocab, random));
  task.xt.assign(37, task.mask);
  task.xt[30] = 0, task.xt[35] = -2;
  sample<T>(task, "short");
}

template <class T>
void sample_many(bool is_long_too) {
  Random random(2);
  Task often{.way = kWays[6],
             .rows = {make_row_of(Content::kNormal, 700, random), make_row_of(Content::kTies, 700, random)},
             .draws = 513};
  sample<T>(often, "often");
  for (const Way& way : {kWays[0], kWays[1], kWays[2]})
    for (const int64_t vocab : {1, 27, 128}) sample_short<T>(way, vocab);
  for (const int64_t vocab : {1, 27, 128, 129, 511, 512, 513, 1025, 4100, 50258}) {
    const bool is_long = vocab > 5000;
    if (is_long && !is_long_too) continue;
    for (const Way& way : kWays) {
      if (is_long && &way != kWays && &way != kWays + 6) continue;
      sample_alike<T>(way, way.top_k > 0 ? Content::kTies : Content::kNormal, vocab, !is_long && vocab > 1025);
      if (!is_long) sample_forbidden<T>(way, vocab);
    }
    if (is_long) continue;
    for (const int way : {0, 2, 6}) sample_mixed<T>(kWays[way], vocab, vocab - 1);
    sample_mixed<T>(kWays[1], vocab, vocab + 3);
  }
}

template <class T>
void sample_few() {
  Random random(1);
  for (const Way& way : {kWays[0], kWays[2], kWays[6]}) {
    Task task{.way = way, .rows = {}, .draws = 9, .gap = 1};
    task.rows = {make_row_of(Content::kTies, 4700, random)};
    sample<T>(task, "alone");
    task.rows.assign(5, make_row_of(Content::kNormal, 1100, random));
    task.xt = {task.mask, task.mask, 7, 5000, 7};
    sample<T>(task, "few");
  }
  // More draws than a block has threads.
  Task often{.way = kWays[0], .rows = {make_row_of(Content::kNormal, 700, random)}, .draws = 300};
  sample<T>(often, "often");
  Task small{.way = kWays[1], .rows = {}};
  small.rows = {make_row_of(Content::kNormal, 27, random), make_row_of(Content::kNormal, 27, random)};
  sample<T>(small, "small");
}

}  // namespace

void run_sampling(Size size) {
  if (size == Size::kFew) {
    sample_few<__nv_bfloat16>();
    sample_few<float>();
    return;
  }
  sample_many<__nv_bfloat16>(size == Size::kMany);
  if (size == Size::kSome) return;
  sample_many<float>(true);
  sample_many<__half>(true);
}

// So many columns that a row's tiles stay in memory.
void run_sampling_of_a_million() {
  Random random(3);
  for (const Way& way : {kWays[0], kWays[6]}) {
    Task task{.way = way, .rows = {make_row_of(Content::kNormal, 2457700, random)}, .draws = 2, .lead = 5};
    sample<__nv_bfloat16>(task, "a million");
  }
}

}  // namespace edlm::exact
