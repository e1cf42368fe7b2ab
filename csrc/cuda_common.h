// What the CUDA kernels share. A *.cu file knows nothing of torch: its launchers get pointers, sizes and a
// stream, and return CUDA's error.
//
// The kernels are also compiled for the CPU, where tests/cuda_on_cpu.h runs them thread by thread: a test of
// their logic on machines without a GPU. For that they keep to what is in this file: shared memory,
// __syncthreads, shuffles of all 32 lanes, and LAUNCH instead of <<< >>>.
#pragma once
#include <cstdint>
#include <cstdio>

#include "widths.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Launches kernel (in parentheses where it has commas) and returns the launch's error.
#define UNWRAP(...) __VA_ARGS__
#define LAUNCH(kernel, blocks, threads, stream, ...) \
  (UNWRAP kernel<<<(blocks), (threads), 0, (cudaStream_t)(stream)>>>(__VA_ARGS__), cudaGetLastError())
// For input that is wrong: a kernel cannot throw. The launch fails and CUDA reports it
// at the next synchronisation.
#define stop_with(message) (printf("%s\n", message), __trap())
#else
#include "cuda_on_cpu.h"
#endif

namespace crystal {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What a storage type is computed in.
template <class T>
struct computed {
  typedef float type;
};
template <>
struct computed<double> {
  typedef double type;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <class T>
__device__ inline T narrow(typename computed<T>::type x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline double narrow<double>(double x) {
  return x;
}
#ifdef __CUDACC__
__device__ inline float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <>
__device__ inline f16 narrow<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#else
inline float widen(f16 x) {
  _Float16 y;
  __builtin_memcpy(&y, &x, 2);
  return y;
}
template <>
inline bf16 narrow<bf16>(float x) {
  return {to_bf16(x)};
}
inline float exp2_fast(float x) { return exp2f(x); }
template <>
inline f16 narrow<f16>(float x) {
  _Float16 y = x;
  f16 z;
  __builtin_memcpy(&z, &y, 2);
  return z;
}
#endif

// e^x. For 2-byte types by the hardware's 2^x: one multiplication and one special function, error
// about |x| * 1e-7.
template <class T>
__device__ inline float exp_of(float x) {
  return sizeof(T) == 2 ? exp2_fast(x * 1.44269504f) : expf(x);
}
template <class T>
__device__ inline double exp_of(double x) {
  return exp(x);
}

// Products and sums that the compiler must not fuse: what is done to p and to q gives the same bits, and p *
// a - q * a exactly 0 if p = q.
__device__ inline float times(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double times(double x, double y) { return __dmul_rn(x, y); }
__device__ inline float plus(float x, float y) { return __fadd_rn(x, y); }
__device__ inline double plus(double x, double y) { return __dadd_rn(x, y); }

// W values that lie side by side; 16 bytes of them, aligned, are one load or store.
template <class T, int W>
struct alignas(W * sizeof(T)) Pack {
  T v[W];
};

template <class C>
__device__ inline C warp_max(C x) {
  for (int d = 16; d; d >>= 1) {
    const C y = __shfl_xor_sync(~0u, x, d);
    x = y > x ? y : x;
  }
  return x;
}
template <class C>
__device__ inline C warp_sum(C x) {
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

}  // namespace
}  // namespace crystal
