// Bindings of the sampling family: check, allocate, call. The CPU row loop lives here too, since threads are torch's.
#include "sampling.h"

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "stream.h"
#if !defined(EDLM_CUDA)
#include "cpu/isa.h"
#include "cpu/report.h"
#include "rows.h"
#endif

namespace edlm {

#if !defined(EDLM_CUDA)
EDLM_KERNEL_TABLE(SampleKernels, kSampleKernels, sample_kernels)
#endif

namespace {

#if !defined(EDLM_CUDA)
void sample_rows(const SampleArgs& args, const std::vector<int64_t>& rows, Report& report) {
  const SampleKernels& kernels = sample_kernels();
  for_each_row(
      static_cast<int64_t>(rows.size()), args.vocab, draw_scratch_doubles(args),
      [&](int64_t i, int64_t begin, int64_t end, TileMass* tiles) { kernels.tile_masses(args, rows[i], begin, end, tiles); },
      [&](int64_t i, TileMass* tiles, double* scratch) {
        const int64_t code = kernels.draw(args, rows[i], tiles, scratch);
        if (code >= 0) report.add(4 * rows[i] + code);
      });
}
#endif

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Outputs {
  Tensor tokens, log_probs, model_log_probs, invalid;
};

// How the draws are made: what both ops take beside their logits.
struct Proposal {
  int64_t num_samples;
  double temperature;
  int64_t top_k;
  double top_p, min_p;
};

SampleArgs arguments(const char* op, const Tensor& logits, const Proposal& how, const Tensor& seed, const Tensor& offset, int64_t n) {
  if (how.num_samples < 1) fail(op, ": expected at least one draw a row, got ", how.num_samples);
  if (!(how.temperature >= 0 && how.temperature <= std::numeric_limits<double>::max()))
    fail(op, ": temperature: expected a finite number >= 0, got ", how.temperature);
  if (how.top_k < 0) fail(op, ": top_k: expected 0 (all) or more, got ", how.top_k);
  if (!(how.top_p > 0 && how.top_p <= 1)) fail(op, ": top_p: expected a number in (0, 1], got ", how.top_p);
  if (!(how.min_p >= 0 && how.min_p <= 1)) fail(op, ": min_p: expected a number in [0, 1], got ", how.min_p);
  check(op, "seed", seed, ScalarType::Long, {n});
  check(op, "offset", offset, ScalarType::Long, {offset.numel() == 1 ? 1 : n});
  SampleArgs args{};
  args.dtype = check_logits(op, logits);
  args.logits = logits.const_data_ptr();
  args.vocab = logits.size(logits.dim() - 1);
  check_grid(op, logits.numel() / args.vocab, args.vocab);
  args.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  args.offset = static_cast<const int64_t*>(offset.const_data_ptr());
  args.offset_stride = offset.numel() == 1 ? 0 : 1;
  args.num_samples = how.num_samples;
  args.temperature = how.temperature;
  args.top_k = how.top_k;
  args.top_p = how.top_p;
  args.min_p = how.min_p;
  return args;
}

// Model log-probabilities that would equal the proposal's are not written twice.
Outputs allocate(SampleArgs* args, const Tensor& like, const std::vector<int64_t>& shape) {
  const bool same = args->temperature == 1.0 && !is_filtered(*args);
  const std::vector<int64_t> model = same ? std::vector<int64_t>{0} : shape;
  Outputs out{torch::stable::new_empty(like, shape, ScalarType::Long), torch::stable::new_empty(like, shape, ScalarType::Float),
              torch::stable::new_empty(like, model, ScalarType::Float), torch::stable::new_empty(like, {1}, ScalarType::Long)};
  args->tokens = static_cast<int64_t*>(out.tokens.mutable_data_ptr());
  args->log_probs = static_cast<float*>(out.log_probs.mutable_data_ptr());
  args->model_log_probs = same ? nullptr : static_cast<float*>(out.model_log_probs.mutable_data_ptr());
  return out;
}

#if defined(EDLM_CUDA)

// Rows are looked at on the device: which of them are drawn is nothing that the host waits for.
Result run(const char* op, const SampleArgs& args, const Tensor& logits, Outputs out) {
  const OnDevice here(op, logits);
  Tensor scratch = scratch_for(logits, edlm_cuda_sample_scratch(&args));
  here.check(edlm_cuda_sample(&args, scratch.mutable_data_ptr(), static_cast<int64_t*>(out.invalid.mutable_data_ptr()), here.stream()));
  return {out.tokens, out.log_probs, out.model_log_probs, out.invalid};
}

#else

Result finish(Outputs out, const Report& report) {
  *static_cast<int64_t*>(out.invalid.mutable_data_ptr()) = report.code();
  return {out.tokens, out.log_probs, out.model_log_probs, out.invalid};
}

// The masked rows are listed first, so that cost follows them.
Result run(const char*, SampleArgs args, const Tensor&, Outputs out) {
  Report report;
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < args.batch * args.length; ++row) {
    if (args.xt == nullptr || (args.xt[row] == args.mask && (args.active == nullptr || args.active[row]))) {
      rows.push_back(row);
      continue;
    }
    const bool is_id = args.xt[row] >= 0 && args.xt[row] < args.vocab;
    if (!is_id) report.add(4 * row + kOutOfRange);
    const int64_t b = row / args.length, l = row - b * args.length;
    for (int64_t k = 0; k < args.num_samples; ++k) {
      const int64_t at = (b * args.num_samples + k) * args.length + l;
      args.tokens[at] = is_id ? args.xt[row] : 0;
      args.log_probs[at] = 0.0f;
      if (args.model_log_probs) args.model_log_probs[at] = 0.0f;
    }
  }
  if (args.mask >= 0) args.forbidden = &args.mask, args.num_forbidden = 1;
  sample_rows(args, rows, report);
  return finish(out, report);
}

#endif

Result sample_candidates(Tensor logits, Tensor xt, int64_t mask_token_id, int64_t num_candidates, std::optional<Tensor> active,
                         double temperature, int64_t top_k, double top_p, double min_p, Tensor seed, Tensor offset) {
  const char* op = "sample_candidates";
  if (logits.dim() != 3) fail(op, ": logits: expected the shape [B, L, V], got ", shape_of(logits));
  const int64_t batch = logits.size(0), length = logits.size(1);
  check(op, "xt", xt, ScalarType::Long, {batch, length});
  if (active) check(op, "active", *active, ScalarType::Bool, {batch, length});
  SampleArgs args = arguments(op, logits, {num_candidates, temperature, top_k, top_p, min_p}, seed, offset, batch);
  Outputs out = allocate(&args, logits, {batch, num_candidates, length});
  args.batch = batch;
  args.length = length;
  args.stride_b = logits.stride(0);
  args.stride_l = logits.stride(1);
  args.mask = mask_token_id;
  args.xt = static_cast<const int64_t*>(xt.const_data_ptr());
  args.active = active ? static_cast<const bool*>(active->const_data_ptr()) : nullptr;
  return run(op, args, logits, out);
}

Result sample_categorical(Tensor logits, int64_t num_samples, Tensor position, double temperature, int64_t top_k, double top_p,
                          double min_p, Tensor forbidden, Tensor seed, Tensor offset) {
  const char* op = "sample_categorical";
  if (logits.dim() != 2) fail(op, ": logits: expected the shape [N, V], got ", shape_of(logits));
  const int64_t n = logits.size(0);
  check(op, "position", position, ScalarType::Long, {n});
  check(op, "forbidden", forbidden, ScalarType::Long, {-1});
  SampleArgs args = arguments(op, logits, {num_samples, temperature, top_k, top_p, min_p}, seed, offset, n);
  Outputs out = allocate(&args, logits, {n, num_samples});
  args.batch = n;
  args.length = 1;
  args.stride_b = logits.stride(0);
  args.position = static_cast<const int64_t*>(position.const_data_ptr());
  args.forbidden = static_cast<const int64_t*>(forbidden.const_data_ptr());
  args.num_forbidden = forbidden.numel();

  args.mask = -1;
  return run(op, args, logits, out);
}

}  // namespace

#if !defined(EDLM_CUDA)
// For tests, which alone call it, with what it does not check: the law of a draw from one float32 row, as the compiled kernel has it. Returns
// -1, or a BadRow code.
extern "C" __attribute__((visibility("default"))) int64_t edlm_sampling_law(const float* logits, int64_t vocab, double temperature,
                                                                            int64_t top_k, double top_p, double min_p, double* probs) {
  SampleArgs args{};
  args.logits = logits;
  args.batch = args.length = args.num_samples = 1;
  args.vocab = args.stride_b = vocab;
  args.temperature = temperature;
  args.top_k = top_k;
  args.top_p = top_p;
  args.min_p = min_p;
  std::vector<TileMass> tiles(num_tiles(vocab));
  std::vector<double> scratch(draw_scratch_doubles(args));
  sample_kernels().tile_masses(args, 0, 0, num_tiles(vocab), tiles.data());
  return sample_kernels().law(args, 0, tiles.data(), scratch.data(), probs);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(EDLM_LIBRARY, EDLM_KEY, m) {
  m.impl("sample_candidates", TORCH_BOX(&sample_candidates));
  m.impl("sample_categorical", TORCH_BOX(&sample_categorical));
}

}  // namespace edlm
