// Sixteen bytes at a time from rows that begin anywhere: the last of three dtypes' loads, conversions and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"

namespace edlm {

// Elements of sixteen bytes.
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half* out) { *out = __float2half_rn(x); }

// One element, through the read-only path.
__device__ inline float read(const float* p) { return __ldg(p); }
__device__ inline __nv_bfloat16 read(const __nv_bfloat16* p) {
  return __ushort_as_bfloat16(__ldg(reinterpret_cast<const unsigned short*>(p)));
}
__device__ inline __half read(const __half* p) { return __ushort_as_half(__ldg(reinterpret_cast<const unsigned short*>(p))); }

// The elements of sixteen bytes, as four words, as floats.
__device__ inline void unpack(const unsigned (&w)[4], float* out, float) {
  for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(w[i]);
}

__device__ inline void unpack(const unsigned (&w)[4], float* out, __nv_bfloat16) {
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(w[i] << 16);
    out[2 * i + 1] = __uint_as_float(w[i] & 0xFFFF0000u);
  }
}

__device__ inline void unpack(const unsigned (&w)[4], float* out, __half) {
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(w[i])));
    out[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(w[i] >> 16)));
  }
}

// Sixteen bytes that begin `shift` bytes into two neighbouring sixteens, in their word kWord = shift / 4, as floats.
template <class T, int kWord>
__device__ void shifted(uint4 low, uint4 high, unsigned shift, float* out) {
  const unsigned all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  unsigned w[4];
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      w[i] = all[i + kWord];
    } else {
      w[i] = __funnelshift_r(all[i + kWord], all[i + kWord + 1], 8 * (shift & 2));
    }
  }
  unpack(w, out, T{});
}

// Sixteen bytes in one instruction. Of an assignment nvcc makes four for sm_80 and sm_90.
__device__ inline void store(const uint4& value, void* at) {
#if defined(EDLM_EMULATED)
  *static_cast<uint4*>(at) = value;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(at)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

// A run of elements, which may begin anywhere.
template <class T>
struct Run {
  const T* begin;
  int size;

  // How many bytes behind a multiple of sixteen: the same at every sixteenth byte of it.
  __device__ unsigned shift() const { return static_cast<unsigned>(reinterpret_cast<uintptr_t>(begin) & 15); }
};

// kVec elements of a run from `first` on, as floats. The loads are aligned, and within the run: where they would not be, elements are read one
// by one. These bytes may be written by the same thread later: they are not read through the read-only path.
template <class T>
__device__ void load_vector(const Run<T>& run, int first, float* out) {
  const unsigned shift = static_cast<unsigned>(reinterpret_cast<uintptr_t>(run.begin + first) & 15);
  const int lead = static_cast<int>(shift / sizeof(T));
  const auto* at = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(run.begin + first) - shift);
  if (shift == 0) {
    const uint4 v = *at;
    unpack({v.x, v.y, v.z, v.w}, out, T{});
  } else if (first < lead || first - lead + 2 * kVec<T> > run.size) {
    for (int i = 0; i < kVec<T>; ++i) out[i] = to_float(run.begin[first + i]);
  } else {
    const uint4 low = at[0], high = at[1];
    switch (shift / 4) {
      case 0: shifted<T, 0>(low, high, shift, out); break;
      case 1: shifted<T, 1>(low, high, shift, out); break;
      case 2: shifted<T, 2>(low, high, shift, out); break;
      default: shifted<T, 3>(low, high, shift, out); break;
    }
  }
}

}  // namespace edlm
