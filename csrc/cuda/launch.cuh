// How kernels are launched: three words that the emulator of tests/cuda_emulator spells in its own way.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#if !defined(EDLM_EMULATED)
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define DYN_SHARED(T, name)                                    \
  extern __shared__ __align__(16) unsigned char edlm_shared[]; \
  T* name = reinterpret_cast<T*>(edlm_shared)
#endif

namespace edlm {

// All kernels that need more than a warp for a row use blocks of this size.
constexpr int kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Of blocks, or rows, in a grid: bindings refuse more. A loop over several in a block would cost the registers that it keeps things in.
static inline dim3 grid_for(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

static inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// Bytes of static shared memory that no kernel here exceeds.
constexpr int kStaticShared = 8 << 10;

// A kernel may have more than 48 KiB of shared memory, static and dynamic, only when it was asked for. Always for as much as there is: two
// threads that launch one kernel may not take it from each other.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= (48 << 10) - kStaticShared) return cudaSuccess;
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticShared;
  const cudaError_t error = static_cast<int64_t>(bytes) > most
                                ? cudaErrorInvalidValue
                                : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) (void)cudaGetLastError();  // it is told here: the next launch has done nothing wrong
  return error;
}

// The report of a launch: the smallest code of a bad row, -1 where all are good. As an unsigned number -1 is the largest.
__device__ inline void report(int64_t* invalid, int64_t code) {
  atomicMin(reinterpret_cast<unsigned long long*>(invalid), static_cast<unsigned long long>(code));
}

static inline cudaError_t clear_report(int64_t* invalid, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(invalid, 0xFF, sizeof *invalid, stream);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

}  // namespace edlm
