// Bindings of the log-probability family: check, allocate, call.
#include "log_probs.h"

#include <tuple>

#include "stream.h"
#if !defined(EDLM_CUDA)
#include "cpu/isa.h"
#include "cpu/report.h"
#include "rows.h"
#endif

namespace edlm {

#if !defined(EDLM_CUDA)
EDLM_KERNEL_TABLE(LogProbKernels, kLogProbKernels, log_prob_kernels)
#endif

namespace {

// logits [B, L, V], tokens [B, L, K].
LogProbArgs arguments(const char* op, const Tensor& logits, const Tensor& tokens, const Tensor& forbidden, double temperature) {
  if (logits.dim() != 3) fail(op, ": logits: expected the shape [B, L, V], got ", shape_of(logits));
  if (!(temperature > 0)) fail(op, ": temperature: expected a positive number, got ", temperature);
  LogProbArgs args{};
  args.dtype = check_logits(op, logits);
  args.logits = logits.const_data_ptr();
  args.batch = logits.size(0);
  args.length = logits.size(1);
  args.vocab = logits.size(2);
  check_grid(op, args.batch * args.length, args.vocab);
  args.stride_b = logits.stride(0);
  args.stride_l = logits.stride(1);
  check(op, "tokens", tokens, ScalarType::Long, {args.batch, args.length, -1});
  args.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  args.num_tokens = tokens.size(2);
  check(op, "forbidden", forbidden, ScalarType::Long, {-1});
  args.forbidden = static_cast<const int64_t*>(forbidden.const_data_ptr());
  args.num_forbidden = forbidden.numel();
  args.temperature = temperature;
  return args;
}

#if defined(EDLM_CUDA)

void gather_rows(const char* op, const LogProbArgs& args, const Tensor& logits, int64_t* invalid) {
  const OnDevice here(op, logits);
  Tensor scratch = scratch_for(logits, edlm_cuda_gather_scratch(&args));
  here.check(edlm_cuda_gather(&args, scratch.mutable_data_ptr(), invalid, here.stream()));
}

void fold_rows(const char* op, const LogProbArgs& args, const Tensor& chunk) {
  const OnDevice here(op, chunk);
  here.check(edlm_cuda_fold(&args, here.stream()));
}

void backward_rows(const char* op, const LogProbArgs& args, const Tensor& logits) {
  const OnDevice here(op, logits);
  here.check(edlm_cuda_backward(&args, here.stream()));
}

#else

void gather_rows(const char*, const LogProbArgs& args, const Tensor&, int64_t* invalid) {
  const LogProbKernels& kernels = log_prob_kernels();
  const bool is_small = args.vocab <= kSmallVocab;
  Report report;
  for_each_row(
      args.batch * args.length, args.vocab, 0,
      [&](int64_t r, int64_t begin, int64_t end, TileMass* tiles) {
        if (!is_small) kernels.tile_masses(args, r, begin, end, tiles);
      },
      [&](int64_t r, TileMass* tiles, double*) {
        if (!kernels.gather(args, r, tiles)) report.add(r);
      });
  *invalid = report.code();
}

void fold_rows(const char*, const LogProbArgs& args, const Tensor&) {
  const LogProbKernels& kernels = log_prob_kernels();
  for_each_row(
      args.batch, args.vocab, 0,
      [&](int64_t r, int64_t begin, int64_t end, TileMass* tiles) { kernels.tile_masses(args, r, begin, end, tiles); },
      [&](int64_t r, TileMass* tiles, double*) { kernels.fold(args, r, tiles); });
}

// Rows times tiles, in the order in which they lie in memory.
void backward_rows(const char*, const LogProbArgs& args, const Tensor&) {
  const LogProbKernels& kernels = log_prob_kernels();
  const int64_t tiles = num_tiles(args.vocab);
  torch::stable::parallel_for(0, args.batch * args.length * tiles, 32, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t r = begin / tiles, first = begin % tiles, last = std::min(tiles, first + end - begin);
      kernels.backward(args, r, first, last);
      begin += last - first;
    }
  });
}

#endif

std::tuple<Tensor, Tensor, Tensor> gather(Tensor logits, Tensor tokens, double temperature, Tensor forbidden) {
  const char* op = "gather_log_probs";
  LogProbArgs args = arguments(op, logits, tokens, forbidden, temperature);
  Tensor log_probs = torch::stable::new_empty(logits, {args.batch, args.length, args.num_tokens}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(logits, {args.batch, args.length, 2}, ScalarType::Float);
  Tensor invalid = torch::stable::new_empty(logits, {1}, ScalarType::Long);
  args.log_probs = static_cast<float*>(log_probs.mutable_data_ptr());
  args.stats = static_cast<float*>(stats.mutable_data_ptr());
  gather_rows(op, args, logits, static_cast<int64_t*>(invalid.mutable_data_ptr()));
  return {log_probs, stats, invalid};
}

Tensor gather_backward(Tensor grad, Tensor logits, Tensor tokens, Tensor stats, double temperature, Tensor forbidden) {
  const char* op = "gather_log_probs_backward";
  LogProbArgs args = arguments(op, logits, tokens, forbidden, temperature);
  check(op, "grad", grad, ScalarType::Float, {args.batch, args.length, args.num_tokens});
  check(op, "stats", stats, ScalarType::Float, {args.batch, args.length, 2});
  Tensor out = torch::stable::new_empty(logits, {args.batch, args.length, args.vocab});
  args.grad = static_cast<const float*>(grad.const_data_ptr());
  args.stats = const_cast<float*>(static_cast<const float*>(stats.const_data_ptr()));
  args.grad_logits = out.mutable_data_ptr();
  args.grad_stride = args.vocab;
  backward_rows(op, args, logits);
  return out;
}

// chunk float32 [N, C], tokens [N]; running float64 [N, 3]; stats and grad float32.
LogProbArgs chunk_arguments(const char* op, const Tensor& chunk, const Tensor& tokens, const Tensor& forbidden) {
  check(op, "chunk", chunk, ScalarType::Float, {-1, -1});
  if (chunk.size(1) < 1) fail(op, ": chunk: expected at least one column, got the shape ", shape_of(chunk));
  check(op, "tokens", tokens, ScalarType::Long, {chunk.size(0)});
  check(op, "forbidden", forbidden, ScalarType::Long, {-1});
  LogProbArgs args{};
  args.logits = chunk.const_data_ptr();
  args.batch = chunk.size(0);
  check_grid(op, args.batch, chunk.size(1));
  args.length = 1;
  args.vocab = args.stride_b = chunk.size(1);
  args.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  args.num_tokens = 1;
  args.forbidden = static_cast<const int64_t*>(forbidden.const_data_ptr());
  args.num_forbidden = forbidden.numel();
  args.temperature = 1;
  return args;
}

void linear_fold(Tensor running, Tensor chunk, Tensor tokens, Tensor forbidden) {
  const char* op = "linear_fold";
  LogProbArgs args = chunk_arguments(op, chunk, tokens, forbidden);
  check(op, "running", running, ScalarType::Double, {args.batch, 3});
  args.running = static_cast<double*>(running.mutable_data_ptr());
  fold_rows(op, args, chunk);
}

void linear_grad(Tensor chunk, Tensor grad, Tensor tokens, Tensor stats, Tensor forbidden) {
  const char* op = "linear_grad";
  LogProbArgs args = chunk_arguments(op, chunk, tokens, forbidden);
  check(op, "grad", grad, ScalarType::Float, {args.batch});
  check(op, "stats", stats, ScalarType::Float, {args.batch, 2});
  args.grad = static_cast<const float*>(grad.const_data_ptr());
  args.stats = const_cast<float*>(static_cast<const float*>(stats.const_data_ptr()));
  args.grad_logits = chunk.mutable_data_ptr();
  args.grad_stride = args.vocab;
  backward_rows(op, args, chunk);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EDLM_LIBRARY, EDLM_KEY, m) {
  m.impl("gather_log_probs", TORCH_BOX(&gather));
  m.impl("gather_log_probs_backward", TORCH_BOX(&gather_backward));
  m.impl("linear_fold", TORCH_BOX(&linear_fold));
  m.impl("linear_grad", TORCH_BOX(&linear_grad));
}

}  // namespace edlm
