// Blocks that work together, with faults to choose from: they hear from each other by a ticket, by the grid's sync(), by waiting for
// the block before. `fault` 0 is right.
#ifndef EDLM_EMULATED
#error "for the emulator only"
#endif

#include <cooperative_groups.h>

constexpr int kThreads = 64, kBlocks = 4;

enum Fault {
  kNone,
  kMissingFenceBeforeTicket,
  kFenceBeforeWrite,
  kMissingFenceAfterTicket,
  kTwoThreadsWrite,
  kBlocksWrite,
  kMissingGridSync,
  kNotCooperative,
  kReturnedBlock,
  kMissingFenceInChain,
};

// The sum over a block of the block's part of x, in thread 0.
__device__ float sum_part(const float* x, int n) {
  __shared__ float second;
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int i = static_cast<int>(blockIdx.x) * kThreads + thread; i < n; i += kBlocks * kThreads) sum += x[i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (thread == 32) second = sum;
  __syncthreads();
  return sum + second;
}

// The block that comes last adds up what all have written.
__global__ void sum_by_ticket(const float* x, float* partial, unsigned* ticket, float* out, int n, int fault) {
  __shared__ bool is_last;
  const int thread = static_cast<int>(threadIdx.x);
  const float sum = sum_part(x, n);
  if (thread == 0) {
    if (fault == kFenceBeforeWrite) __threadfence();
    partial[blockIdx.x] = sum;
    if (fault != kMissingFenceBeforeTicket && fault != kFenceBeforeWrite) __threadfence();
    is_last = atomicAdd(ticket, 1u) == kBlocks - 1;
    if (fault != kMissingFenceAfterTicket) __threadfence();
    if (fault == kBlocksWrite) out[1] = 1;
  }
  __syncthreads();
  if (!is_last) return;
  float total = 0;
  for (int b = 0; b < kBlocks; ++b) total += partial[b];
  if (thread == 0 || (fault == kTwoThreadsWrite && thread == kThreads - 1)) out[0] = total;
  if (thread == 0) atomicExch(ticket, 0u);
}

// Each block adds up what all have written.
__global__ void sum_by_grid(const float* x, float* partial, float* out, int n, int fault) {
  DYN_SHARED(float, spare);
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const float sum = sum_part(x, n);
  for (int round = 0; round < 2; ++round) {
    spare[thread] = sum * static_cast<float>(1 + round);
    if (thread == 0) partial[block] = spare[0];
    if (fault == kReturnedBlock && block == 1) return;
    if (fault != kMissingGridSync) cooperative_groups::this_grid().sync();
    float total = 0;
    for (int b = 0; b < kBlocks; ++b) total += partial[b];
    if (thread == 0) out[round * kBlocks + block] = total;
    if (fault != kMissingGridSync) cooperative_groups::this_grid().sync();
  }
}

// Each block waits for the one before, and adds its part.
__global__ void sum_by_chain(const float* x, unsigned* ticket, float* out, int n, int fault) {
  const float sum = sum_part(x, n);
  if (threadIdx.x != 0) return;
  while (atomicAdd(ticket, 0u) != blockIdx.x) __nanosleep(100);
  if (fault != kMissingFenceInChain) __threadfence();
  out[0] += sum;
  if (fault != kMissingFenceInChain) __threadfence();
  atomicAdd(ticket, 1u);
}

extern "C" int sum_by_ticket_launch(const float* x, float* partial, unsigned* ticket, float* out, int n, int fault) {
  LAUNCH(sum_by_ticket, dim3(kBlocks), dim3(kThreads), 0, nullptr, x, partial, ticket, out, n, fault);
  return static_cast<int>(cudaGetLastError());
}

extern "C" int sum_by_grid_launch(const float* x, float* partial, float* out, int n, int fault) {
  const size_t shared = kThreads * sizeof(float);
  if (fault == kNotCooperative)
    LAUNCH(sum_by_grid, dim3(kBlocks), dim3(kThreads), shared, nullptr, x, partial, out, n, fault);
  else
    LAUNCH_COOP(sum_by_grid, dim3(kBlocks), dim3(kThreads), shared, nullptr, x, partial, out, n, fault);
  return static_cast<int>(cudaGetLastError());
}

extern "C" int sum_by_chain_launch(const float* x, unsigned* ticket, float* out, int n, int fault) {
  LAUNCH_COOP(sum_by_chain, dim3(kBlocks), dim3(kThreads), 0, nullptr, x, ticket, out, n, fault);
  return static_cast<int>(cudaGetLastError());
}
