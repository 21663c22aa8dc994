// Reductions and scans over warps and blocks. The order of every sum is fixed by lane and warp, so that results are the same in each run.
#pragma once

#include "launch.cuh"

namespace edlm {

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ inline int warp_of() { return static_cast<int>(threadIdx.x) / kLanes; }

constexpr float kMinusInf = -__builtin_huge_valf();

// A larger float has a larger key; both zeros have one.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float float_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key); }

// Of numbers that are not NaN. One instruction, where shuffles would take five.
__device__ inline float warp_max(float x) { return float_of(__reduce_max_sync(kAllLanes, key_of(x))); }

template <class T>
__device__ T warp_sum(T x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Inclusive prefix sums of groups of `width` lanes.
template <class T>
__device__ T warp_scan(T x, int width = kLanes) {
  const int within = lane_of() & (width - 1);
  for (int step = 1; step < width; step *= 2) {
    const T before = __shfl_up_sync(kAllLanes, x, step, width);
    if (within >= step) x += before;
  }
  return x;
}

// Eight bytes a warp, for what warps tell each other; every function below leaves it free for the next.
struct Board {
  unsigned long long slot[kWarps];

  template <class T>
  __device__ T* as() {
    static_assert(sizeof(T) <= sizeof(slot[0]), "a slot has eight bytes");
    return reinterpret_cast<T*>(slot);
  }
};

__device__ inline float block_max(float x, Board& board) {
  x = warp_max(x);
  if (lane_of() == 0) board.as<float>()[warp_of()] = x;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) x = fmaxf(x, board.as<float>()[w]);
  __syncthreads();
  return x;
}

__device__ inline double block_max(double x, Board& board) {
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, step));
  if (lane_of() == 0) board.as<double>()[warp_of()] = x;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) x = fmax(x, board.as<double>()[w]);
  __syncthreads();
  return x;
}

__device__ inline int block_min(int x, Board& board) {
  x = __reduce_min_sync(kAllLanes, x);
  if (lane_of() == 0) board.as<int>()[warp_of()] = x;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) x = board.as<int>()[w] < x ? board.as<int>()[w] : x;
  __syncthreads();
  return x;
}

template <class T>
__device__ T block_sum(T x, Board& board) {
  x = warp_sum(x);
  if (lane_of() == 0) board.as<T>()[warp_of()] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < kWarps; ++w) x += board.as<T>()[w];
  __syncthreads();
  return x;
}

// Inclusive prefix sums over the threads of a block, and the sum of all. Not monotone for floating numbers, by rounding.
template <class T>
__device__ T block_scan(T x, Board& board, T* total) {
  x = warp_scan(x);
  if (lane_of() == kLanes - 1) board.as<T>()[warp_of()] = x;
  __syncthreads();
  T before = 0, sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp_of()) before = sum;
    sum += board.as<T>()[w];
  }
  __syncthreads();
  *total = sum;
  return before + x;
}

// The first of n ascending numbers that exceeds target; n where none does. `at(i)` gives the i-th.
template <class At, class T>
__device__ int64_t upper_bound(int64_t n, T target, const At& at) {
  int64_t low = 0;
#pragma unroll 1
  while (low < n) {
    const int64_t middle = low + (n - low) / 2;
    if (at(middle) <= target)
      low = middle + 1;
    else
      n = middle;
  }
  return low;
}

}  // namespace edlm
