// select_candidate, resample and reverse_step on a GPU: kernels, then launchers. csrc/cpu/importance.cpp does the same on a CPU.
#include "../importance.h"

#include "../philox.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace edlm {
namespace {

__device__ double nan() { return __uint_as_float(0x7FC00000u); }
__device__ double infinity() { return -static_cast<double>(kMinusInf); }

__device__ double value_at(const Rows& rows, int64_t row, int64_t column) {
  const int64_t at = row * rows.stride_row + column * rows.stride_column;
  switch (rows.type) {
    case Real::kFloat32: return static_cast<const float*>(rows.data)[at];
    case Real::kFloat64: return static_cast<const double*>(rows.data)[at];
    case Real::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(rows.data)[at]);
    case Real::kFloat16: return to_float(static_cast<const __half*>(rows.data)[at]);
  }
  return 0;
}

__device__ double uniform(const Streams& streams, int64_t row, int64_t candidate, Purpose purpose) {
  const int64_t seed = streams.seed[row * streams.seed_stride], offset = streams.offset[row * streams.offset_stride];
  return philox_uniform(seed, 0, candidate, offset, purpose).first;
}

template <class T>
__device__ T warp_largest(T x) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// --- select_candidate: a warp a row ---------------------------------------------------------------------------------------------

// The one place where an energy becomes a weight: low energy is good. +inf stays impossible at any temperature.
__device__ double log_weight(const SelectArgs& args, int64_t row, int64_t i) {
  const double e = value_at(args.energy, row, i);
  const double a = e == infinity() ? -infinity() : -e / args.temperature;
  return args.correction.data == nullptr ? a : a + value_at(args.correction, row, i);
}

struct Best {
  bool is_bad;
  int64_t index;
};

// The lowest index of the lowest energy.
__device__ Best lowest(const SelectArgs& args, int64_t row) {
  double least = infinity();
  int64_t index = args.candidates;
  bool is_bad = false;
  for (int64_t i = lane_of(); i < args.candidates; i += kLanes) {
    const double e = value_at(args.energy, row, i);
    is_bad |= !(e > -infinity());
    if (e < least) least = e, index = i;
  }
  const double all = -warp_largest(-least);
  index = -warp_largest(-(least == all ? index : args.candidates));
  return {static_cast<bool>(__any_sync(kAllLanes, is_bad)) || all == infinity(), index < args.candidates ? index : 0};
}

__global__ void __launch_bounds__(kThreads) select(const __grid_constant__ SelectArgs args, int64_t batch, int64_t* invalid) {
  const int64_t row = blockIdx.x * int64_t{kWarps} + warp_of(), n = args.candidates;
  if (row >= batch) return;  // a whole warp
  const int lane = lane_of();
  const bool is_greedy = args.temperature == 0;
  const Best best = is_greedy ? lowest(args, row) : Best{false, 0};

  // The largest log-weight. A NaN, +inf or no weight at all is bad.
  double max = -infinity();
  bool is_bad = best.is_bad;
  if (!is_greedy) {
    for (int64_t i = lane; i < n; i += kLanes) {
      const double a = log_weight(args, row, i);
      is_bad |= !(a < infinity());
      max = a > max ? a : max;
    }
    max = warp_largest(max);
    is_bad = __any_sync(kAllLanes, is_bad) || max == -infinity();
  }
  // Whatever the caller does with the report of a bad row, its numbers are those of equal weights.
  if (is_bad && lane == 0) report(invalid, row);
  if (is_bad || is_greedy) max = 0;
  const auto log_weight_of = [&](int64_t i) {
    return is_bad ? 0.0 : is_greedy ? (i == best.index ? 0.0 : -infinity()) : log_weight(args, row, i);
  };

  double sum = 0, squares = 0;
  for (int64_t i = lane; i < n; i += kLanes) {
    const double e = exp(log_weight_of(i) - max);
    sum += e;
    squares += e * e;
  }
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  const double log_sum = log(sum), ess = sum * sum / squares;

  // First index whose cumulative weight exceeds u * sum, never one without weight. The sums before each candidate are kept in the two outputs
  // that are written last: a double in two floats.
  float *log_weights = args.log_weights + row * n, *loo = args.log_z_loo + row * n;
  const double target = uniform(args.streams, row, 0, Purpose::kSelect) * sum;
  int64_t index = -1, last = 0;
  double carry = 0;
  for (int64_t first = 0; first < n; first += kLanes) {
    const int64_t i = first + lane;
    const double e = i < n ? exp(log_weight_of(i) - max) : 0.0;
    const double prefix = warp_scan(e), shifted = __shfl_up_sync(kAllLanes, prefix, 1), before = carry + (lane > 0 ? shifted : 0.0);
    if (i < n) {
      log_weights[i] = static_cast<float>(before);
      loo[i] = static_cast<float>(before - log_weights[i]);
    }
    const unsigned some = __ballot_sync(kAllLanes, e > 0), hits = __ballot_sync(kAllLanes, carry + prefix > target) & some;
    if (index < 0 && hits) index = first + __ffs(static_cast<int>(hits)) - 1;
    if (some) last = first + 31 - __clz(static_cast<int>(some));
    carry += __shfl_sync(kAllLanes, prefix, kLanes - 1);
  }
  if (lane == 0) {
    args.index[row] = index < 0 ? last : index;
    args.ess[row] = static_cast<float>(ess < 1 ? 1 : ess > n ? n : ess);
    args.log_z[row] = static_cast<float>(is_greedy ? nan() : n == 1 ? max : max + log_sum - args.log_candidates);
  }

  // The largest weight is 1 here. So the others' sum needs care for the largest alone, and only where they left no trace in sum: it is then
  // measured against the second largest.
  const bool is_alone = sum == 1 && n > 1 && !is_greedy;
  int64_t top = n;
  double rest = -infinity();
  if (is_alone) {
    for (int64_t i = lane; i < n && top == n; i += kLanes) top = log_weight_of(i) == max ? i : n;
    top = -warp_largest(-top);
    double second = -infinity();
    for (int64_t i = lane; i < n; i += kLanes) second = i != top ? fmax(second, log_weight_of(i)) : second;
    second = warp_largest(second);
    if (second > -infinity()) {
      double others = 0;
      for (int64_t i = lane; i < n; i += kLanes) others += i == top ? 0.0 : exp(log_weight_of(i) - second);
      rest = second + log(warp_sum(others));
    }
  }
  // Sums before and after, never a difference: it would lose the small weights.
  double after = 0;
  for (int64_t first = (n - 1) / kLanes * kLanes; first >= 0; first -= kLanes) {
    const int64_t i = first + lane;
    const double a = i < n ? log_weight_of(i) : -infinity(), e = exp(a - max);
    double suffix = e;
    for (int step = 1; step < kLanes; step *= 2) {
      const double behind = __shfl_down_sync(kAllLanes, suffix, step);
      if (lane + step < kLanes) suffix += behind;
    }
    const double next = __shfl_down_sync(kAllLanes, suffix, 1);
    if (i < n) {
      const double others = (static_cast<double>(log_weights[i]) + loo[i]) + (after + (lane + 1 < kLanes ? next : 0.0));
      log_weights[i] = static_cast<float>(a - max - log_sum);
      const double log_others = i == top ? rest : log(others) + max;
      loo[i] = static_cast<float>(is_greedy || n == 1 ? nan() : log_others - args.log_others);
    }
    after += __shfl_sync(kAllLanes, suffix, 0);
  }
}

// --- resample: a block a row --------------------------------------------------------------------------------------------------------

// values[0 .. n) become their inclusive prefix sums. Returns the last.
template <class T>
__device__ T accumulate(T* values, int64_t n, Board& board) {
  T carry = 0;
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    T total;
    const T prefix = block_scan<T>(i < n ? values[i] : T{0}, board, &total);
    if (i < n) values[i] = carry + prefix;
    carry += total;
  }
  __syncthreads();
  return carry;
}

// Scratch: prefix sums of the weights, as whole numbers, whose sums ascend and have no order; then copies of each particle.
__global__ void __launch_bounds__(kThreads)
    resample(const __grid_constant__ ResampleArgs args, void* scratch, int64_t batch, int64_t* invalid) {
  __shared__ Board board;
  const int64_t row = blockIdx.x, n = args.particles, thread = threadIdx.x;
  auto* weights = static_cast<unsigned long long*>(scratch) + row * n;
  int* copies = reinterpret_cast<int*>(static_cast<unsigned long long*>(scratch) + batch * n) + row * n;
  int64_t* out = args.ancestors + row * n;

  double max = -infinity();
  int is_bad = 0;
  for (int64_t i = thread; i < n; i += kThreads) {
    const double a = value_at(args.log_weights, row, i);
    is_bad |= !(a < infinity());
    max = a > max ? a : max;
  }
  is_bad = __syncthreads_or(is_bad);
  max = block_max(max, board);
  is_bad |= max == -infinity();
  if (is_bad && thread == 0) report(invalid, row);
  const auto weight_of = [&](int64_t i) { return is_bad ? 1.0 : exp(value_at(args.log_weights, row, i) - max); };

  int bits = 0;
  while ((int64_t{1} << bits) < n) ++bits;
  const double unit = ldexp(1.0, 62 - bits);
  const bool is_residual = args.scheme == kResidual;
  int certain = 0;  // copies that no uniform decides
  if (is_residual) {
    double sum = 0;
    for (int64_t i = thread; i < n; i += kThreads) sum += weight_of(i);
    sum = block_sum(sum, board);
    for (int64_t i = thread; i < n; i += kThreads) {
      const double expected = static_cast<double>(n) * (weight_of(i) / sum);
      const double whole = floor(expected + 1e-9), left = expected - whole;  // n * (1 / n) may fall just short of 1
      copies[i] = static_cast<int>(whole);
      certain += copies[i];
      weights[i] = left > 0 ? static_cast<unsigned long long>(left * unit + 0.5) : 0;
    }
    certain = block_sum(certain, board);
  } else {
    for (int64_t i = thread; i < n; i += kThreads) {
      copies[i] = 0;
      weights[i] = static_cast<unsigned long long>(weight_of(i) * unit + 0.5);
    }
  }
  __syncthreads();
  const double total = static_cast<double>(accumulate(weights, n, board));
  // The first particle whose prefix exceeds the target, never one past the last that has weight.
  const auto pick = [&](double target) {
    const auto prefix = [&](int64_t i) { return static_cast<double>(weights[i]); };
    const int64_t at = upper_bound(n, target, prefix);
    return at < n ? at : upper_bound(n, total * (1 - 0x1.0p-52), prefix);
  };
  if (args.scheme == kSystematic || args.scheme == kStratified) {
    for (int64_t i = thread; i < n; i += kThreads) {
      const double u = uniform(args.streams, row, args.scheme == kSystematic ? 0 : i, Purpose::kResample);
      const int64_t at = pick((static_cast<double>(i) + u) / static_cast<double>(n) * total);
      out[i] = at < n ? at : n - 1;
    }
    return;
  }
  for (int64_t i = certain + thread; i < n; i += kThreads) {
    const int64_t at = pick(uniform(args.streams, row, i, Purpose::kResample) * total);
    atomicAdd(&copies[at < n ? at : n - 1], 1);
  }
  __syncthreads();
  // Counts to ancestors, ascending.
  accumulate(copies, n, board);
  for (int64_t i = thread; i < n; i += kThreads) {
    const int64_t at = upper_bound(n, static_cast<int>(i), [&](int64_t j) { return copies[j]; });
    out[i] = at < n ? at : n - 1;
  }
}

// --- reverse_step: a thread a position ------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads) reverse(const __grid_constant__ ReverseArgs args, int64_t batch, int64_t* invalid) {
  const int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (at < batch && (args.index[at * args.index_stride] < 0 || args.index[at * args.index_stride] >= args.candidates)) report(invalid, at);
  if (at >= batch * args.length) return;
  const int64_t b = at / args.length, l = at - b * args.length;
  int64_t k = args.index[b * args.index_stride];
  k = k < 0 ? 0 : k < args.candidates ? k : args.candidates - 1;
  const T time = static_cast<const T*>(args.open_time)[b * args.open_stride_b + l * args.open_stride_l];
  const bool opens = time >= static_cast<const T*>(args.s)[b * args.s_stride];
  args.xs[at] = opens ? args.x0[b * args.x0_stride_b + k * args.x0_stride_k + l * args.x0_stride_l]
                      : args.xt[b * args.xt_stride_b + l * args.xt_stride_l];
}

int64_t blocks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

}  // namespace

extern "C" int edlm_cuda_select(const SelectArgs* args, int64_t batch, int64_t* invalid, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = clear_report(invalid, on);
  if (error != cudaSuccess || batch == 0) return error;
  LAUNCH(select, grid_for(blocks_of(batch, kWarps)), dim3(kThreads), 0, on, *args, batch, invalid);
  return cudaGetLastError();
}

extern "C" size_t edlm_cuda_resample_scratch(const ResampleArgs* args, int64_t batch) {
  return batch * args->particles * (sizeof(unsigned long long) + sizeof(int));
}

extern "C" int edlm_cuda_resample(const ResampleArgs* args, void* scratch, int64_t batch, int64_t* invalid, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = clear_report(invalid, on);
  if (error != cudaSuccess || batch == 0) return error;
  LAUNCH(resample, grid_for(batch), dim3(kThreads), 0, on, *args, scratch, batch, invalid);
  return cudaGetLastError();
}

extern "C" int edlm_cuda_reverse(const ReverseArgs* args, int64_t batch, int64_t* invalid, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = clear_report(invalid, on);
  if (error != cudaSuccess || batch == 0) return error;
  const auto reverse_kernel = args->is_double ? reverse<double> : reverse<float>;
  LAUNCH(reverse_kernel, grid_for(blocks_of(batch * (args->length > 0 ? args->length : 1), kThreads)), dim3(kThreads), 0, on, *args, batch, invalid);
  return cudaGetLastError();
}

}  // namespace edlm
