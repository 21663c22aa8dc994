// Bindings of the importance family: check, allocate, call. The CPU row loops live here too, since threads are torch's.
#include "importance.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "stream.h"
#if !defined(EDLM_CUDA)
#include "cpu/isa.h"
#include "cpu/report.h"
#endif

namespace edlm {

#if !defined(EDLM_CUDA)
EDLM_KERNEL_TABLE(ImportanceKernels, kImportanceKernels, importance_kernels)
#endif

namespace {

using torch::stable::new_empty;

Rows rows_of(const char* op, const char* name, const Tensor& tensor) {
  check_device(op, name, tensor);
  if (tensor.dim() != 2 || tensor.size(1) < 1)
    fail(op, ": ", name, ": expected two axes and at least one column, got the shape ", shape_of(tensor));
  Rows rows{tensor.const_data_ptr(), Real::kFloat32, tensor.stride(0), tensor.stride(1)};
  switch (tensor.scalar_type()) {
    case ScalarType::Float: break;
    case ScalarType::Double: rows.type = Real::kFloat64; break;
    case ScalarType::BFloat16: rows.type = Real::kBFloat16; break;
    case ScalarType::Half: rows.type = Real::kFloat16; break;
    default:
      fail(op, ": ", name, ": expected float32, float64, bfloat16 or float16, got scalar type ",
           static_cast<int>(tensor.scalar_type()));
  }
  return rows;
}

Streams streams_of(const char* op, const Tensor& seed, const Tensor& offset, int64_t batch) {
  check_strided(op, "seed", seed, ScalarType::Long, {batch});
  const bool one = offset.numel() == 1;
  check_strided(op, "offset", offset, ScalarType::Long, {one ? 1 : batch});
  return {static_cast<const int64_t*>(seed.const_data_ptr()), seed.stride(0),
          static_cast<const int64_t*>(offset.const_data_ptr()), one ? 0 : offset.stride(0)};
}

#if defined(EDLM_CUDA)

void run(const char* op, const SelectArgs& args, int64_t batch, const Tensor& like, int64_t* invalid) {
  check_grid(op, batch, args.candidates);
  const OnDevice here(op, like);
  here.check(edlm_cuda_select(&args, batch, invalid, here.stream()));
}

void run(const char* op, const ResampleArgs& args, int64_t batch, const Tensor& like, int64_t* invalid) {
  check_grid(op, batch, args.particles);
  const OnDevice here(op, like);
  Tensor scratch = scratch_for(like, edlm_cuda_resample_scratch(&args, batch));
  here.check(edlm_cuda_resample(&args, scratch.mutable_data_ptr(), batch, invalid, here.stream()));
}

void run(const char* op, const ReverseArgs& args, int64_t batch, const Tensor& like, int64_t* invalid) {
  check_grid(op, (batch * args.length + 255) / 256, 1);
  const OnDevice here(op, like);
  here.check(edlm_cuda_reverse(&args, batch, invalid, here.stream()));
}

#else

// Rows of n columns among threads, in ranges that are worth a thread; returns what is reported.
template <class Args>
int64_t for_rows(int64_t (*kernel)(const Args&, int64_t, int64_t, double*), const Args& args, int64_t batch, int64_t n) {
  Report report;
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, 2048 / n), [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(scratch_doubles(args));
    const int64_t bad = kernel(args, begin, end, scratch.data());
    if (bad >= 0) report.add(bad);
  });
  return report.code();
}

void run(const char*, const SelectArgs& args, int64_t batch, const Tensor&, int64_t* invalid) {
  *invalid = for_rows(importance_kernels().select, args, batch, args.candidates);
}

void run(const char*, const ResampleArgs& args, int64_t batch, const Tensor&, int64_t* invalid) {
  *invalid = for_rows(importance_kernels().resample, args, batch, args.particles);
}

void run(const char*, const ReverseArgs& args, int64_t batch, const Tensor&, int64_t* invalid) {
  *invalid = -1;
  for (int64_t b = batch - 1; b >= 0; --b) {
    const int64_t i = args.index[b * args.index_stride];
    if (i < 0 || i >= args.candidates) *invalid = b;
  }
  const ImportanceKernels& kernels = importance_kernels();
  torch::stable::parallel_for(0, batch * args.length, 16384, [&](int64_t begin, int64_t end) { kernels.reverse(args, begin, end); });
}

#endif

int64_t* longs(Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }
float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_candidate(Tensor energy, double temperature,
                                                                            std::optional<Tensor> log_correction, Tensor seed,
                                                                            Tensor offset) {
  const char* op = "select_candidate";
  SelectArgs args{};
  args.energy = rows_of(op, "energy", energy);
  const int64_t batch = energy.size(0), k = args.candidates = energy.size(1);
  args.log_candidates = std::log(static_cast<double>(k));
  args.log_others = std::log(static_cast<double>(k - 1));
  if (log_correction) {
    args.correction = rows_of(op, "log_correction", *log_correction);
    check_strided(op, "log_correction", *log_correction, log_correction->scalar_type(), {batch, k});
  }
  if (!(temperature >= 0)) fail(op, ": temperature: expected a number >= 0, got ", temperature);
  args.temperature = temperature;
  args.streams = streams_of(op, seed, offset, batch);

  Tensor index = new_empty(energy, {batch}, ScalarType::Long), invalid = new_empty(energy, {1}, ScalarType::Long);
  Tensor log_weights = new_empty(energy, {batch, k}, ScalarType::Float), loo = new_empty(energy, {batch, k}, ScalarType::Float);
  Tensor ess = new_empty(energy, {batch}, ScalarType::Float), log_z = new_empty(energy, {batch}, ScalarType::Float);
  args.index = longs(index);
  args.log_weights = floats(log_weights);
  args.ess = floats(ess);
  args.log_z = floats(log_z);
  args.log_z_loo = floats(loo);
  run(op, args, batch, energy, longs(invalid));
  return {index, log_weights, ess, log_z, loo, invalid};
}

std::tuple<Tensor, Tensor> resample(Tensor log_weights, int64_t scheme, Tensor seed, Tensor offset) {
  const char* op = "resample";
  if (scheme < kSystematic || scheme > kResidual) fail(op, ": scheme: expected 0 .. 3, got ", scheme);
  ResampleArgs args{};
  args.log_weights = rows_of(op, "log_weights", log_weights);
  const int64_t batch = log_weights.size(0), n = args.particles = log_weights.size(1);
  args.scheme = static_cast<Scheme>(scheme);
  args.streams = streams_of(op, seed, offset, batch);

  Tensor ancestors = new_empty(log_weights, {batch, n}, ScalarType::Long);
  Tensor invalid = new_empty(log_weights, {1}, ScalarType::Long);
  args.ancestors = longs(ancestors);
  run(op, args, batch, log_weights, longs(invalid));
  return {ancestors, invalid};
}

std::tuple<Tensor, Tensor> reverse_step(Tensor xt, Tensor x0, Tensor index, Tensor open_time, Tensor s) {
  const char* op = "reverse_step";
  if (xt.dim() != 2) fail(op, ": xt: expected the shape [B, L], got ", shape_of(xt));
  if (x0.dim() != 3 || x0.size(1) < 1) fail(op, ": x0: expected the shape [B, K, L] with K >= 1, got ", shape_of(x0));
  const int64_t batch = xt.size(0), length = xt.size(1), candidates = x0.size(1);
  const bool one = s.numel() == 1, is_double = open_time.scalar_type() == ScalarType::Double;
  const ScalarType time = is_double ? ScalarType::Double : ScalarType::Float;
  check_strided(op, "xt", xt, ScalarType::Long, {batch, length});
  check_strided(op, "x0", x0, ScalarType::Long, {batch, candidates, length});
  check_strided(op, "index", index, ScalarType::Long, {batch});
  check_strided(op, "open_time", open_time, time, {batch, length});
  check_strided(op, "s", s, time, {one ? 1 : batch});

  Tensor xs = new_empty(xt, {batch, length}), invalid = new_empty(xt, {1});
  ReverseArgs args{};
  args.length = length;
  args.candidates = candidates;
  args.xt = static_cast<const int64_t*>(xt.const_data_ptr());
  args.xt_stride_b = xt.stride(0);
  args.xt_stride_l = xt.stride(1);
  args.x0 = static_cast<const int64_t*>(x0.const_data_ptr());
  args.x0_stride_b = x0.stride(0);
  args.x0_stride_k = x0.stride(1);
  args.x0_stride_l = x0.stride(2);
  args.index = static_cast<const int64_t*>(index.const_data_ptr());
  args.index_stride = index.stride(0);
  args.open_time = open_time.const_data_ptr();
  args.is_double = is_double;
  args.open_stride_b = open_time.stride(0);
  args.open_stride_l = open_time.stride(1);
  args.s = s.const_data_ptr();
  args.s_stride = one ? 0 : s.stride(0);
  args.xs = longs(xs);

  run(op, args, batch, xt, longs(invalid));
  return {xs, invalid};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EDLM_LIBRARY, EDLM_KEY, m) {
  m.impl("select_candidate", TORCH_BOX(&select_candidate));
  m.impl("resample", TORCH_BOX(&resample));
  m.impl("reverse_step", TORCH_BOX(&reverse_step));
}

}  // namespace edlm
