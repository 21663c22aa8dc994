// Checks of what a binding was handed: the sentence names the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "tiles.h"

namespace edlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// Whether this library's kernels may read a tensor. Which of several GPUs it is on is compared in Python alone.
inline bool is_here(const Tensor& tensor) {
#if defined(EDLM_CUDA) && !defined(EDLM_EMULATED)
  return tensor.is_cuda();
#else
  return tensor.is_cpu();
#endif
}

inline void check_device(const char* op, const char* name, const Tensor& tensor) {
  if (!is_here(tensor)) fail(op, ": ", name, ": expected on the device of the other tensors; move it there with .to(device)");
}

// Python checks users' arguments; these guard kernels against callers of torch.ops.edlm.* itself. -1 is any size.
inline void check_strided(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                          std::initializer_list<int64_t> shape, bool contiguous = false) {
  check_device(op, name, tensor);
  bool same = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.scalar_type() == dtype &&
              (!contiguous || tensor.is_contiguous());
  std::string expected;
  int64_t i = 0;
  for (int64_t size : shape) {
    same = same && (size < 0 || tensor.size(i) == size);
    expected += (i++ ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  if (!same)
    fail(op, ": ", name, ": expected a ", contiguous ? "contiguous " : "", "tensor of scalar type ", static_cast<int>(dtype),
         " and shape [", expected, "], got scalar type ", static_cast<int>(tensor.scalar_type()), " and shape ", shape_of(tensor));
}

inline void check(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  check_strided(op, name, tensor, dtype, shape, true);
}

// The dtype of logits with unit stride in V; anything else is an error.
inline DType check_logits(const char* op, const Tensor& logits) {
  check_device(op, "logits", logits);
  const int64_t last = logits.dim() - 1;
  if (logits.size(last) < 1 || (logits.size(last) > 1 && logits.stride(last) != 1))
    fail(op, ": logits: expected at least one column and unit stride in the last axis, got shape ", shape_of(logits), " and stride ",
         logits.stride(last));
  if (logits.scalar_type() == ScalarType::Float) return DType::kFloat32;
  if (logits.scalar_type() == ScalarType::BFloat16) return DType::kBFloat16;
  if (logits.scalar_type() == ScalarType::Half) return DType::kFloat16;
  fail(op, ": logits: expected float32, bfloat16 or float16, got scalar type ", static_cast<int>(logits.scalar_type()));
}

}  // namespace edlm
