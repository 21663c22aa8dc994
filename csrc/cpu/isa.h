// Which instruction sets were compiled in, and which one runs. Chosen once, at the first call.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace edlm {

// 0 baseline, 1 x86-64-v3 (AVX2, FMA), 2 x86-64-v4 (AVX-512).
inline int isa_supported() {
#if defined(EDLM_HAVE_X86_ISA)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c"))
    return 1;
#endif
  return 0;
}

inline const char* isa_name(int level) {
  constexpr const char* names[] = {"baseline", "x86_64_v3", "x86_64_v4"};
  return names[level];
}

// EDLM_CPU_ISA=baseline|x86_64_v3|x86_64_v4 overrides the choice: the one environment variable, for tests.
inline int isa_level() {
  static const int level = [] {
    const int supported = isa_supported();
    const char* wanted = std::getenv("EDLM_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return supported;
    for (int i = 0; i <= supported; ++i)
      if (std::strcmp(wanted, isa_name(i)) == 0) return i;
    std::string known;
    for (int i = 0; i <= supported; ++i) known += (i ? ", " : "") + std::string(isa_name(i));
    throw std::runtime_error("EDLM_CPU_ISA: expected one of " + known + " on this processor, got " + wanted);
  }();
  return level;
}

}  // namespace edlm

// EDLM_KERNEL_TABLE(SampleKernels, kSampleKernels, sample_kernels): csrc/cpu/<family>.cpp defines kSampleKernels in the namespace of
// each instruction set; sample_kernels() is the one that this processor runs. For use inside namespace edlm.
#if defined(EDLM_HAVE_X86_ISA)
#define EDLM_KERNEL_TABLE(Type, kTable, function)                                         \
  namespace baseline {                                                                    \
  extern const Type kTable;                                                               \
  }                                                                                       \
  namespace x86_64_v3 {                                                                   \
  extern const Type kTable;                                                               \
  }                                                                                       \
  namespace x86_64_v4 {                                                                   \
  extern const Type kTable;                                                               \
  }                                                                                       \
  static inline const Type& function() {                                                  \
    const int level = isa_level();                                                        \
    return level == 2 ? x86_64_v4::kTable : level == 1 ? x86_64_v3::kTable : baseline::kTable; \
  }
#else
#define EDLM_KERNEL_TABLE(Type, kTable, function) \
  namespace baseline {                            \
  extern const Type kTable;                       \
  }                                               \
  static inline const Type& function() { return baseline::kTable; }
#endif
