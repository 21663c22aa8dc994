// Log-probabilities of given tokens on a GPU: kernels, then launchers. csrc/cpu/log_probs.cpp does the same on a CPU.
#include "../log_probs.h"

#include "tiles.cuh"

namespace edlm {
namespace {

template <class T>
__device__ Row<T> row_of(const LogProbArgs& args, int64_t r) {
  const int64_t b = args.length == 1 ? r : static_cast<unsigned>(r) / static_cast<unsigned>(args.length), l = r - b * args.length;
  return make_row<T>(args.logits, b * args.stride_b + l * args.stride_l, args.vocab, -1, args.forbidden, args.num_forbidden);
}

// log_probs and stats of a row; NaN where it holds NaN or +inf, or nothing finite.
template <class T>
__device__ void gather_row(const LogProbArgs& args, const Temperature& heat, int64_t r, TileMass* tiles, Board& board, int64_t* invalid) {
  const Total sum = weigh_tiles(tiles, static_cast<int>(num_tiles(args.vocab)), heat.inverse, false, board);
  const Row<T> row = row_of<T>(args, r);
  const double nan = __uint_as_float(0x7FC00000u), log_total = sum.is_finite && sum.max > kMinusInf ? log(sum.total) : nan;
  if (threadIdx.x == 0) {
    args.stats[2 * r] = sum.max;
    args.stats[2 * r + 1] = static_cast<float>(log_total);
  }
#pragma unroll 1
  for (int64_t k = threadIdx.x; k < args.num_tokens; k += kThreads) {
    const int64_t id = args.tokens[r * args.num_tokens + k];
    const bool is_id = id >= 0 && id < args.vocab;
    if (!is_id) report(invalid, r);
    const double log_prob = is_id ? (static_cast<double>(row.at(static_cast<int>(id))) - sum.max) * heat.inverse - log_total : nan;
    args.log_probs[r * args.num_tokens + k] = static_cast<float>(log_prob > 0 ? 0 : log_prob);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    gather(const __grid_constant__ LogProbArgs args, const __grid_constant__ Temperature heat, TileMass* scratch, Phase phase, int parts, bool is_shared, int64_t* invalid) {
  DYN_SHARED(TileMass, in_shared);
  __shared__ Board board;
  const int n = static_cast<int>(num_tiles(args.vocab));
  const int64_t r = blockIdx.x / static_cast<unsigned>(parts);
  if (phase == Phase::kMeasure && blockIdx.x == 0 && threadIdx.x == 0) *invalid = -1;
  TileMass* in_memory = scratch == nullptr ? nullptr : scratch + r * n;
  TileMass* tiles = phase == Phase::kMeasure ? in_memory : gather_tiles(is_shared ? in_shared : nullptr, in_memory, n, phase);
  if (phase != Phase::kFinish) {
    const int share = (n + parts - 1) / parts, begin = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts)) * share;
    read_tiles<T, false>(row_of<T>(args, r), heat.scale, begin, begin + share < n ? begin + share : n, tiles);
  }
  if (phase == Phase::kMeasure) return;
  __syncthreads();
  gather_row<T>(args, heat, r, tiles, board, invalid);
}

// Folds a chunk of the vocabulary into args.running: maximum, sum and the token's logit over the columns so far.
__global__ void __launch_bounds__(kThreads, 4) fold(const __grid_constant__ LogProbArgs args) {
  DYN_SHARED(TileMass, tiles);
  __shared__ Board board;
  const int64_t r = blockIdx.x;
  const int n = static_cast<int>(num_tiles(args.vocab));
  read_tiles<float, false>(row_of<float>(args, r), kLog2E, 0, n, tiles);
  __syncthreads();
  const Total chunk = weigh_tiles(tiles, n, 1.0, false, board);
  if (threadIdx.x > 0) return;
  double* running = args.running + 3 * r;
  const double max = chunk.max > running[0] ? chunk.max : running[0], reference = max == kMinusInf ? 0.0 : max;
  double sum = running[1] * exp(running[0] - reference);
  if (!chunk.is_finite)
    sum = __uint_as_float(0x7FC00000u);
  else if (chunk.max > kMinusInf)
    sum += chunk.total * exp(static_cast<double>(chunk.max) - reference);
  running[0] = max;
  running[1] = sum;
  const int64_t id = args.tokens[r];
  if (id >= 0 && id < args.vocab) running[2] = row_of<float>(args, r).at(static_cast<int>(id));
}

// The gradient of kVec columns, from the logits in dx.
template <class T>
__device__ void differentiate(const LogProbArgs& args, int64_t r, int first, float max, float log_sum, float inverse, float factor, float (&dx)[kVec<T>]) {
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) dx[i] = exp2_fast(((dx[i] - max) * inverse - log_sum) * kLog2E) * factor;
#pragma unroll 1
  for (int64_t k = 0; k < args.num_tokens; ++k) {
    const int64_t at = args.tokens[r * args.num_tokens + k] - first;
    if (at < 0 || at >= kVec<T>) continue;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i)
      if (at == i) dx[i] += args.grad[r * args.num_tokens + k] * inverse;
  }
#pragma unroll 1
  for (int64_t f = 0; f < args.num_forbidden; ++f) {
    const int64_t at = args.forbidden[f] - first;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i)
      if (at == i) dx[i] = 0;
  }
}

// Vectors of sixteen bytes of the gradient that a thread has, to share what is the row's.
constexpr int kVectors = 4;

// The gradient of the logits, from stats. Stores are at addresses that are multiples of sixteen, and loads of the logits beside them follow.
//
// The gradient may be written over the logits, as a thread writes no element but those that it has read: both then begin at one address, and
// the loads are aligned as the stores are.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) backward(const __grid_constant__ LogProbArgs args, float inverse, int blocks_a_row) {
  const int64_t r = blockIdx.x / static_cast<unsigned>(blocks_a_row);
  const int vocab = static_cast<int>(args.vocab);
  T* out = static_cast<T*>(args.grad_logits) + r * args.grad_stride;
  const int lead = static_cast<int>((reinterpret_cast<uintptr_t>(out) & 15) / sizeof(T));
  float total = 0;
  bool is_zero = true;  // a row that does not count is not read
#pragma unroll 1
  for (int64_t k = 0; k < args.num_tokens; ++k) {
    const float grad = args.grad[r * args.num_tokens + k];
    total += grad;
    is_zero = is_zero && grad == 0;
  }
  const float factor = -total * inverse;
  const float max = args.stats[2 * r], log_sum = args.stats[2 * r + 1];
  const Run<T> run = row_of<T>(args, r).run;
  const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(blocks_a_row));
#pragma unroll 1
  for (int j = 0; j < kVectors; ++j) {
    // The first vector may begin before the row, and the last end behind it.
    const int first = ((block * kVectors + j) * kThreads + static_cast<int>(threadIdx.x)) * kVec<T> - lead;
    if (first >= vocab) return;
    const bool is_whole = first >= 0 && first + kVec<T> <= vocab;
    float dx[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) dx[i] = 0;
    if (!is_zero) {
      if (is_whole) {
        load_vector(run, first, dx);
      } else {
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) dx[i] = first + i >= 0 && first + i < vocab ? to_float(run.begin[first + i]) : kMinusInf;
      }
      differentiate<T>(args, r, first, max, log_sum, inverse, factor, dx);
    }
    if (is_whole) {
      union {
        uint4 all;
        T at[kVec<T>];
      } packed{};
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) from_float(dx[i], &packed.at[i]);
      store(packed.all, out + first);
    } else {
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i)
        if (first + i >= 0 && first + i < vocab) from_float(dx[i], out + first + i);
    }
  }
}

// --- launchers ------------------------------------------------------------------------------------------------------------------------

template <class T>
cudaError_t launch_backward(const LogProbArgs& args, cudaStream_t stream) {
  const auto backward_kernel = backward<T>;
  // One vector more than the row has: where it does not begin at a multiple of sixteen bytes.
  const int64_t blocks = (args.vocab / kVec<T> + 2 + kThreads * kVectors - 1) / (kThreads * kVectors);
  LAUNCH(backward_kernel, grid_for(args.batch * args.length * blocks), dim3(kThreads), 0, stream, args,
         static_cast<float>(inverse_temperature(args.temperature)), static_cast<int>(blocks));
  return cudaGetLastError();
}

}  // namespace

extern "C" size_t edlm_cuda_gather_scratch(const LogProbArgs* args) { return plan_rows(args->batch * args->length, args->vocab).scratch; }

extern "C" int edlm_cuda_gather(const LogProbArgs* args, void* scratch, int64_t* invalid, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->batch * args->length == 0) return clear_report(invalid, on);
  switch (args->dtype) {
    case DType::kFloat32: return launch_rows(gather<float>, *args, static_cast<TileMass*>(scratch), invalid, on);
    case DType::kBFloat16: return launch_rows(gather<__nv_bfloat16>, *args, static_cast<TileMass*>(scratch), invalid, on);
    case DType::kFloat16: return launch_rows(gather<__half>, *args, static_cast<TileMass*>(scratch), invalid, on);
  }
  return cudaErrorInvalidValue;
}

extern "C" int edlm_cuda_fold(const LogProbArgs* args, void* stream) {
  if (args->batch == 0) return cudaSuccess;
  const size_t shared = num_tiles(args->vocab) * sizeof(TileMass);
  if (const cudaError_t error = allow_shared(fold, shared); error != cudaSuccess) return error;
  LAUNCH(fold, grid_for(args->batch), dim3(kThreads), shared, static_cast<cudaStream_t>(stream), *args);
  return cudaGetLastError();
}

extern "C" int edlm_cuda_backward(const LogProbArgs* args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->batch * args->length == 0) return cudaSuccess;
  switch (args->dtype) {
    case DType::kFloat32: return launch_backward<float>(*args, on);
    case DType::kBFloat16: return launch_backward<__nv_bfloat16>(*args, on);
    case DType::kFloat16: return launch_backward<__half>(*args, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace edlm
