// Where the bindings of this library run. They are compiled once for CPUs and once, with EDLM_CUDA, for GPUs; a third time for tests, where an
// emulator stands in for the GPU (EDLM_EMULATED) and tensors are the CPU's.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

#if defined(EDLM_EMULATED)
#define EDLM_LIBRARY edlm_emulated
#define EDLM_KEY CPU
#elif defined(EDLM_CUDA)
#define EDLM_LIBRARY edlm
#define EDLM_KEY CUDA
#else
#define EDLM_LIBRARY edlm
#define EDLM_KEY CPU
#endif

#if defined(EDLM_CUDA)

#if !defined(EDLM_EMULATED)
#include <nvtx3/nvToolsExt.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

extern "C" const char* edlm_cuda_error(int error);

namespace edlm {

// The tensors' device and its current stream, for as long as this lives, in an NVTX range named after the op.
class OnDevice {
 public:
#if defined(EDLM_EMULATED)
  OnDevice(const char* op, const Tensor&) : op_(op) {}
#else
  OnDevice(const char* op, const Tensor& like) : op_(op), guard_(like.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
    nvtxRangePushA(op);
  }
  ~OnDevice() { nvtxRangePop(); }
#endif
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  void* stream() const { return stream_; }

  // Of a launch: asynchronous, so it speaks of what the launch asked for, not of what the kernel found.
  void check(int error) const {
    if (error != 0) fail(op_, ": the GPU refused a kernel: ", edlm_cuda_error(error));
  }

 private:
  const char* op_;
  void* stream_ = nullptr;
#if !defined(EDLM_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Memory of a kernel's own, from torch's allocator, which gives it out again only behind the kernel on its stream.
inline Tensor scratch_for(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

}  // namespace edlm

#endif

namespace edlm {

// What a grid of blocks, and columns that are counted by an int, can do. CPUs know no such limits.
inline void check_grid([[maybe_unused]] const char* op, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t columns) {
#if defined(EDLM_CUDA)
  const int64_t most = 0x7FFFFFFF;
  if (rows > most || columns > most - 16384)
    fail(op, ": expected at most 2^31 - 1 rows of at most 2^31 - 16385 columns on a GPU, got ", rows, " rows of ", columns,
         "; call it with fewer rows at a time");
#endif
}

}  // namespace edlm
