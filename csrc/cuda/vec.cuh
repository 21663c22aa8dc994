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

// A word of elements that are -inf.
template <class T>
__device__ constexpr unsigned minus_inf_word() {
  return 0xFF800000u;
}
template <>
__device__ constexpr unsigned minus_inf_word<__nv_bfloat16>() {
  return 0xFF80FF80u;
}
template <>
__device__ constexpr unsigned minus_inf_word<__half>() {
  return 0xFC00FC00u;
}

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

__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ inline unsigned bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ inline unsigned bits_of(__half x) { return __half_as_ushort(x); }

// A run of elements whose address need not be a multiple of sixteen. Loads are aligned, and never leave the run: its last and first
// elements are read one by one where an aligned load would.
template <class T>
struct Run {
  const T* begin;
  int size;

  // How many bytes the run begins behind a multiple of sixteen: the same for every sixteenth byte of it.
  __device__ unsigned shift() const { return static_cast<unsigned>(reinterpret_cast<uintptr_t>(begin) & 15); }
};

// Sixteen bytes of a run, from one of its elements on that is a multiple of kVec: as they were loaded. Turning them into numbers later, by
// get(), lets a thread have the next ones on their way meanwhile.
template <class T>
struct Window {
  uint4 low, high;

  // Whether aligned loads of the elements from `first` on stay within the run. Else `low` has the elements already.
  __device__ static bool is_whole(const Run<T>& run, int first, unsigned shift) {
    const int lead = static_cast<int>(shift) / static_cast<int>(sizeof(T));
    return first >= lead && first - lead + (lead ? 2 : 1) * kVec<T> <= run.size;
  }

  // kReadOnly: nobody writes these bytes while the kernel runs.
  template <bool kReadOnly>
  __device__ void fetch(const Run<T>& run, int first, unsigned shift) {
    if (is_whole(run, first, shift)) {
      const char* at = reinterpret_cast<const char*>(run.begin + first) - shift;
      low = load<kReadOnly>(at);
      high = shift ? load<kReadOnly>(at + 16) : low;
      return;
    }
    // In a loop that stays one: it runs at the ends of a row, and its registers would be everybody's.
    unsigned word[4] = {minus_inf_word<T>(), minus_inf_word<T>(), minus_inf_word<T>(), minus_inf_word<T>()};
#pragma unroll 1
    for (int i = 0; i < kVec<T> && first + i < run.size; ++i) {
      const unsigned bits = bits_of(read(run.begin + first + i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          if (i == j) word[j] = bits;
        } else {
          if (i == 2 * j) word[j] = (word[j] & 0xFFFF0000u) | bits;
          if (i == 2 * j + 1) word[j] = (word[j] & 0xFFFFu) | bits << 16;
        }
      }
    }
    low = high = make_uint4(word[0], word[1], word[2], word[3]);
  }

  // kVec elements as floats; -inf beyond the run.
  __device__ void get(const Run<T>& run, int first, unsigned shift, float* out) const {
    unsigned w[4] = {low.x, low.y, low.z, low.w};
    if (shift != 0 && is_whole(run, first, shift)) {
      // By whole words, then by what is left: indices that are known when this is compiled, or the words would go to memory.
      unsigned all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      if (shift & 8)
        for (int i = 0; i < 6; ++i) all[i] = all[i + 2];
      if (shift & 4)
        for (int i = 0; i < 5; ++i) all[i] = all[i + 1];
      for (int i = 0; i < 4; ++i) w[i] = sizeof(T) == 4 ? all[i] : __funnelshift_r(all[i], all[i + 1], 8 * (shift & 2));
    }
    unpack(w, out, T{});
  }

 private:
  template <bool kReadOnly>
  __device__ static uint4 load(const char* at) {
    if constexpr (kReadOnly) {
      return __ldg(reinterpret_cast<const uint4*>(at));
    } else {
      return *reinterpret_cast<const uint4*>(at);
    }
  }
};

}  // namespace edlm
