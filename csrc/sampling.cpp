// Bindings of the sampling family: check, allocate, call. The CPU row loop lives here too, since threads are torch's.
#include "sampling.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/report.h"

namespace edlm {

EDLM_KERNEL_TABLE(SampleKernels, kSampleKernels, sample_kernels)

namespace {

// Draws every listed row. Many rows: a thread takes whole rows, and its tiles stay in its cache. Few: threads share the tiles of
// all rows, then draw. The bits are the same.
void sample_rows(const SampleArgs& args, const std::vector<int64_t>& rows, Report& report) {
  const SampleKernels& kernels = sample_kernels();
  const int64_t n = static_cast<int64_t>(rows.size()), tiles = num_tiles(args);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t grain = std::max<int64_t>(1, 16384 / args.vocab);  // small rows travel together
  if (n >= 4 * threads || tiles < 8) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      std::vector<TileMass> mass(tiles);
      std::vector<double> scratch(draw_scratch_doubles(args));
      for (int64_t i = begin; i < end; ++i) {
        kernels.tile_masses(args, rows[i], 0, tiles, mass.data());
        const int64_t code = kernels.draw(args, rows[i], mass.data(), scratch.data());
        if (code >= 0) report.add(4 * rows[i] + code);
      }
    });
    return;
  }
  std::vector<TileMass> mass(n * tiles);
  torch::stable::parallel_for(0, n * tiles, 16, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / tiles, first = begin % tiles, last = std::min(tiles, first + end - begin);
      kernels.tile_masses(args, rows[i], first, last, mass.data() + i * tiles);
      begin += last - first;
    }
  });
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(draw_scratch_doubles(args));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t code = kernels.draw(args, rows[i], mass.data() + i * tiles, scratch.data());
      if (code >= 0) report.add(4 * rows[i] + code);
    }
  });
}

DType dtype_of(const char* op, const Tensor& logits) {
  if (logits.scalar_type() == ScalarType::Float) return DType::kFloat32;
  if (logits.scalar_type() == ScalarType::BFloat16) return DType::kBFloat16;
  fail(op, ": logits: expected float32 or bfloat16, got scalar type ", static_cast<int>(logits.scalar_type()));
}

void check_unit_stride(const char* op, const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  if (logits.size(last) < 1 || (logits.size(last) > 1 && logits.stride(last) != 1))
    fail(op, ": logits: expected at least one column and unit stride in the last axis, got shape ", shape_of(logits), " and stride ",
         logits.stride(last));
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Outputs {
  Tensor tokens, log_probs, model_log_probs, invalid;
};

Outputs allocate(const Tensor& like, std::vector<int64_t> shape, double temperature) {
  const std::vector<int64_t> model = temperature == 1.0 ? std::vector<int64_t>{0} : shape;
  return {torch::stable::new_empty(like, shape, ScalarType::Long), torch::stable::new_empty(like, shape, ScalarType::Float),
          torch::stable::new_empty(like, model, ScalarType::Float), torch::stable::new_empty(like, {1}, ScalarType::Long)};
}

SampleArgs arguments(const Tensor& logits, const Tensor& seed, const Tensor& offset, int64_t num_samples, double temperature,
                     Outputs& out) {
  SampleArgs args{};
  args.logits = logits.const_data_ptr();
  args.vocab = logits.size(logits.dim() - 1);
  args.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  args.offset = static_cast<const int64_t*>(offset.const_data_ptr());
  args.offset_stride = offset.numel() == 1 ? 0 : 1;
  args.num_samples = num_samples;
  args.temperature = temperature;
  args.tokens = static_cast<int64_t*>(out.tokens.mutable_data_ptr());
  args.log_probs = static_cast<float*>(out.log_probs.mutable_data_ptr());
  args.model_log_probs = temperature == 1.0 ? nullptr : static_cast<float*>(out.model_log_probs.mutable_data_ptr());
  return args;
}

Result finish(Outputs out, const Report& report) {
  *static_cast<int64_t*>(out.invalid.mutable_data_ptr()) = report.code();
  return {out.tokens, out.log_probs, out.model_log_probs, out.invalid};
}

void check_draw(const char* op, int64_t num_samples, double temperature, const Tensor& seed, const Tensor& offset, int64_t n) {
  if (num_samples < 1) fail(op, ": expected at least one draw a row, got ", num_samples);
  if (!(temperature >= 0 && temperature <= std::numeric_limits<double>::max()))
    fail(op, ": temperature: expected a finite number >= 0, got ", temperature);
  check(op, "seed", seed, ScalarType::Long, {n});
  check(op, "offset", offset, ScalarType::Long, {offset.numel() == 1 ? 1 : n});
}

Result sample_candidates(Tensor logits, Tensor xt, int64_t mask_token_id, int64_t num_candidates, std::optional<Tensor> active,
                         double temperature, Tensor seed, Tensor offset) {
  const char* op = "sample_candidates";
  if (logits.dim() != 3) fail(op, ": logits: expected the shape [B, L, V], got ", shape_of(logits));
  const int64_t batch = logits.size(0), length = logits.size(1);
  check_unit_stride(op, logits);
  check(op, "xt", xt, ScalarType::Long, {batch, length});
  if (active) check(op, "active", *active, ScalarType::Bool, {batch, length});
  check_draw(op, num_candidates, temperature, seed, offset, batch);

  Outputs out = allocate(logits, {batch, num_candidates, length}, temperature);
  SampleArgs args = arguments(logits, seed, offset, num_candidates, temperature, out);
  args.dtype = dtype_of(op, logits);
  args.batch = batch;
  args.length = length;
  args.stride_b = logits.stride(0);
  args.stride_l = logits.stride(1);
  args.forbidden = &mask_token_id;
  args.num_forbidden = 1;

  // Clean and inactive positions carry over; the rest are listed, so that cost follows the rows that are drawn.
  const auto* token = static_cast<const int64_t*>(xt.const_data_ptr());
  const bool* is_active = active ? static_cast<const bool*>(active->const_data_ptr()) : nullptr;
  Report report;
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t l = 0; l < length; ++l) {
      const int64_t row = b * length + l;
      if (token[row] == mask_token_id && (is_active == nullptr || is_active[row])) {
        rows.push_back(row);
        continue;
      }
      if (token[row] < 0 || token[row] >= args.vocab) report.add(4 * row + kOutOfRange);
      for (int64_t k = 0; k < num_candidates; ++k) {
        const int64_t at = (b * num_candidates + k) * length + l;
        args.tokens[at] = token[row];
        args.log_probs[at] = 0.0f;
        if (args.model_log_probs) args.model_log_probs[at] = 0.0f;
      }
    }
  }
  sample_rows(args, rows, report);
  return finish(out, report);
}

Result sample_categorical(Tensor logits, int64_t num_samples, Tensor position, double temperature, Tensor forbidden, Tensor seed,
                          Tensor offset) {
  const char* op = "sample_categorical";
  if (logits.dim() != 2) fail(op, ": logits: expected the shape [N, V], got ", shape_of(logits));
  const int64_t n = logits.size(0);
  check_unit_stride(op, logits);
  check(op, "position", position, ScalarType::Long, {n});
  check(op, "forbidden", forbidden, ScalarType::Long, {-1});
  check_draw(op, num_samples, temperature, seed, offset, n);

  Outputs out = allocate(logits, {n, num_samples}, temperature);
  SampleArgs args = arguments(logits, seed, offset, num_samples, temperature, out);
  args.dtype = dtype_of(op, logits);
  args.batch = n;
  args.length = 1;
  args.stride_b = logits.stride(0);
  args.position = static_cast<const int64_t*>(position.const_data_ptr());
  args.forbidden = static_cast<const int64_t*>(forbidden.const_data_ptr());
  args.num_forbidden = forbidden.numel();

  std::vector<int64_t> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = i;
  Report report;
  sample_rows(args, rows, report);
  return finish(out, report);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edlm, CPU, m) {
  m.impl("sample_candidates", TORCH_BOX(&sample_candidates));
  m.impl("sample_categorical", TORCH_BOX(&sample_categorical));
}

}  // namespace edlm
