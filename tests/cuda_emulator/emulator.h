// CUDA C++ kernels as host code: what a .cu file sees when g++ compiles it with `-include emulator.h` instead of nvcc.
//
// Every CUDA thread of a block is a fiber (fiber.cpp); blocks run one after another, those of a cooperative launch by turns. Threads
// give way at barriers and at warp primitives only, in an order that is chosen: forward, reverse or random. Shared memory holds 0xFF
// bytes (NaN, -1) before each block. A kernel that breaks a rule of the machine (a barrier that not all reach, a shuffle from a lane
// that is not there) is stopped with a sentence that names the kernel, the block, the thread, the file and the line.
//
// Sources keep four conventions, for which csrc/cuda has the real spelling: LAUNCH, LAUNCH_COOP, DYN_SHARED, and no cub.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "machine.h"

#define EDLM_EMULATED 1

#undef __device__
#undef __global__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __device__
#define __global__
#define __host__
#define __constant__ static
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // one block at a time: one copy. As an ordinary global it has AddressSanitizer's redzones
#else
// Blocks that are alive together have threads of the operating system. All of it is in one segment, which is filled before a block.
#define __shared__ static thread_local
#endif
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulator {

struct Shape {
  dim3 grid, block;
  size_t dynamic_shared;
  bool is_cooperative;
};

template <class Kernel, class... Args>
void launch_kernel(const char* name, Kernel kernel, const Shape& shape, cudaStream_t, Args... args) {
  auto body = [=] { kernel(args...); };
  const auto run = [](void* b) { (*static_cast<decltype(body)*>(b))(); };
  launch({name, reinterpret_cast<const void*>(kernel), shape.grid, shape.block, shape.dynamic_shared, shape.is_cooperative, run, &body});
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a warp primitive takes up to eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  return from_bits<T>(meet(WarpOp::kShuffle, mask, to_bits(value), source, false, site));
}

}  // namespace emulator

#define threadIdx (emulator::self().index)
#define blockIdx (emulator::self().block)
#define blockDim (emulator::self().block_size)
#define gridDim (emulator::self().grid_size)
#define warpSize 32

// Where a primitive was called: evaluated at the caller.
#define EMULATOR_SITE emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

// --- barriers and warp primitives ------------------------------------------------------------------------------------------------

inline void __syncthreads(EMULATOR_SITE) { emulator::barrier(0, site); }
inline int __syncthreads_count(int p, EMULATOR_SITE) { return emulator::barrier(p, site).count; }
inline int __syncthreads_or(int p, EMULATOR_SITE) { return emulator::barrier(p, site).any; }
inline int __syncthreads_and(int p, EMULATOR_SITE) { return emulator::barrier(p, site).all; }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMULATOR_SITE) { emulator::meet(emulator::WarpOp::kSync, mask, 0, 0, false, site); }

// Lanes are taken modulo the width; one that would leave its group of `width` lanes reads itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
  const int group = emulator::self().lane & ~(width - 1);
  return emulator::shuffle(mask, value, group | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, EMULATOR_SITE) {
  const int lane = emulator::self().lane, source = lane ^ other, end = (lane & ~(width - 1)) + width;
  return emulator::shuffle(mask, value, source < end ? source : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATOR_SITE) {
  const int lane = emulator::self().lane, within = lane & (width - 1);
  return emulator::shuffle(mask, value, within + static_cast<int>(distance) < width ? lane + static_cast<int>(distance) : lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATOR_SITE) {
  const int lane = emulator::self().lane, within = lane & (width - 1);
  return emulator::shuffle(mask, value, within >= static_cast<int>(distance) ? lane - static_cast<int>(distance) : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATOR_SITE) {
  return static_cast<unsigned>(emulator::meet(emulator::WarpOp::kBallot, mask, p != 0, 0, false, site));
}
inline int __all_sync(unsigned mask, int p, EMULATOR_SITE) {
  return static_cast<int>(emulator::meet(emulator::WarpOp::kAll, mask, p != 0, 0, false, site));
}
inline int __any_sync(unsigned mask, int p, EMULATOR_SITE) {
  return static_cast<int>(emulator::meet(emulator::WarpOp::kAny, mask, p != 0, 0, false, site));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_SITE) {
  return static_cast<unsigned>(emulator::meet(emulator::WarpOp::kMatch, mask, emulator::to_bits(value), 0, false, site));
}

#define EMULATOR_REDUCE(name, op)                                                                               \
  inline unsigned name(unsigned mask, unsigned v, EMULATOR_SITE) {                                              \
    return static_cast<unsigned>(emulator::meet(emulator::WarpOp::op, mask, v, 0, false, site));                \
  }                                                                                                             \
  inline int name(unsigned mask, int v, EMULATOR_SITE) {                                                        \
    return static_cast<int>(emulator::meet(emulator::WarpOp::op, mask, static_cast<uint32_t>(v), 0, true, site)); \
  }
EMULATOR_REDUCE(__reduce_add_sync, kAdd)
EMULATOR_REDUCE(__reduce_min_sync, kMin)
EMULATOR_REDUCE(__reduce_max_sync, kMax)
EMULATOR_REDUCE(__reduce_and_sync, kAnd)
EMULATOR_REDUCE(__reduce_or_sync, kOr)
EMULATOR_REDUCE(__reduce_xor_sync, kXor)
#undef EMULATOR_REDUCE

// --- fences and atomics: one fiber runs at a time. As on the device, atomics order nothing without a fence --------------------------

inline void __threadfence() {
  emulator::give_way();
  emulator::fence();
}
inline void __threadfence_block() { emulator::give_way(); }
inline void __nanosleep(unsigned) { emulator::sleep(); }

namespace emulator {

// `next(old)` gives what is written. Relaxed operations tell ThreadSanitizer that these accesses do not race with each other.
template <class T, class Next>
T change(T* at, const Next& next) {
  give_way();
  T old;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  atomic_read(at);
  T value = next(old);
  __atomic_store(at, &value, __ATOMIC_RELAXED);
  atomic_written(at);
  return old;
}

}  // namespace emulator

#define EMULATOR_ATOMIC(name, result)                                              \
  template <class T>                                                               \
  T name(T* at, std::type_identity_t<T> value) {                                   \
    return emulator::change(at, [=](T old) { return static_cast<T>(result); });    \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicExch, ((void)old, value))
EMULATOR_ATOMIC(atomicMax, old < value ? value : old)
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef EMULATOR_ATOMIC

template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulator::change(at, [=](T old) { return old == expected ? value : old; });
}

// --- asynchronous copies: done at the wait, so that a missing wait reads what was there before ---------------------------------------

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) { emulator::copy_async(to, from, bytes); }
inline void __pipeline_commit() { emulator::copy_commit(); }
inline void __pipeline_wait_prior(size_t but) { emulator::copy_wait(but); }

// --- arithmetic -------------------------------------------------------------------------------------------------------------------

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(emulator::to_bits(x)); }
inline int __float_as_int(float x) { return static_cast<int>(emulator::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return emulator::from_bits<float>(x); }
inline float __int_as_float(int x) { return emulator::from_bits<float>(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32) | low) >> (shift & 31));
}

// --- reads of global memory that are counted ------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* p) {
  emulator::count_read(p, sizeof(T));
  return *p;
}

#define DYN_SHARED(T, name) T* name = static_cast<T*>(emulator::self().dynamic_shared)
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulator::launch_kernel(#kernel, kernel, {grid, block, shared, false}, stream __VA_OPT__(, ) __VA_ARGS__)
#define LAUNCH_COOP(kernel, grid, block, shared, stream, ...) \
  emulator::launch_kernel(#kernel, kernel, {grid, block, shared, true}, stream __VA_OPT__(, ) __VA_ARGS__)
inline cudaError_t cudaGetLastError() { return emulator::take_error(); }

// --- the runtime, as far as launchers use it: a device of two multiprocessors ----------------------------------------------------

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10 : 2;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  emulator::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : emulator::sentence(); }
