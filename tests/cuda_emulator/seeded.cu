// A kernel with faults to choose from: does the emulator still bite? Sums of rows, a block of 128 threads a row pair, by the means that
// the package's kernels use: shuffles, shared memory, barriers, asynchronous copies. `fault` 0 is right.
#ifndef EDLM_EMULATED
#error "for the emulator only"
#endif

constexpr int kThreads = 128, kWarps = kThreads / 32;

enum Fault {
  kNone,
  kMissingBarrier,
  kMissingBarrierBeforeReuse,
  kShuffleInBranch,
  kReadPastRow,
  kWrongSlot,
  kDivergentBarrier,
  kUnwrittenShared,
  kUnwrittenDynamicShared,
  kMissingWait,
  kMissingSyncwarp,
  kSyncwarpOfHalf,
  kLaneOutsideMask,
  kReturnedLane,
  kShortDynamicShared,
  kMisaligned,
};

__device__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, offset);
  return v;
}

__global__ void sum_rows(const float* x, float* out, int rows, int columns, int fault) {
  __shared__ float partial[kWarps + 1];
  __shared__ float exchange[kThreads];
  __shared__ __align__(16) float staged[kThreads * 4];
  DYN_SHARED(float, spare);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (fault == kReturnedLane && thread == 5) return;
  for (int row = static_cast<int>(blockIdx.x) * 2; row < static_cast<int>(blockIdx.x) * 2 + 2 && row < rows; ++row) {
    const float* at = x + row * columns;
    float sum = 0;
    // Whole fours come by asynchronous copies, the rest one by one.
    for (int first = 0; first + 4 * kThreads <= columns; first += 4 * kThreads) {
      if (fault == kMisaligned) {
        sum += reinterpret_cast<const float4*>(at + first + 1)->x;
        continue;
      }
      __pipeline_memcpy_async(staged + 4 * thread, at + first + 4 * thread, 16);
      __pipeline_commit();
      if (fault != kMissingWait) __pipeline_wait_prior(0);
      for (int i = 0; i < 4; ++i) sum += staged[4 * thread + i];
      if (fault == kMissingWait) __pipeline_wait_prior(0);
    }
    const int end = columns + (fault == kReadPastRow ? 1 : 0);
    for (int i = columns / (4 * kThreads) * (4 * kThreads) + thread; i < end; i += kThreads) sum += at[i];

    if (fault == kShuffleInBranch) {
      if (thread < 100) sum = warp_sum(sum);
    } else {
      sum = warp_sum(sum);
    }
    if (fault == kLaneOutsideMask && lane < 16) sum = __shfl_sync(0x0000FFFFu, sum, 20);
    exchange[thread] = sum;
    if (fault == kSyncwarpOfHalf)
      __syncwarp(lane < 16 ? 0x0000FFFFu : 0xFFFF0000u);
    else if (fault != kMissingSyncwarp)
      __syncwarp();
    // Every lane has the warp's sum: its neighbour's is the same.
    sum = exchange[thread ^ (fault == kSyncwarpOfHalf && lane >= 16 ? 16 : 1)];
    spare[thread] = sum;
    const float last = __shfl_sync(0xFFFFFFFFu, sum, 31);
    if (lane == 0) partial[fault == kWrongSlot && warp == kWarps - 1 ? warp - 1 : warp] = (sum + last) / 2;
    if (fault == kDivergentBarrier) {
      if (warp == 0) __syncthreads();
    } else if (fault != kMissingBarrier) {
      __syncthreads();
    }
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[w];
    if (fault == kUnwrittenShared) total += partial[kWarps];
    if (fault == kUnwrittenDynamicShared) total += spare[kThreads];
    if (thread == 0 || thread == kThreads - 1) atomicAdd(out + row, total / 2);  // what the first and the last thread see
    if (fault != kMissingBarrierBeforeReuse) __syncthreads();
  }
}

extern "C" int sum_rows_launch(const float* x, float* out, int rows, int columns, int fault) {
  const size_t shared = (kThreads + (fault == kShortDynamicShared ? -1 : fault == kUnwrittenDynamicShared ? 1 : 0)) * sizeof(float);
  LAUNCH(sum_rows, dim3((rows + 1) / 2), dim3(kThreads), shared, nullptr, x, out, rows, columns, fault);
  return static_cast<int>(cudaGetLastError());
}
