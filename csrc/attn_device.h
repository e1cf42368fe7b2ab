// What the attention kernels on the GPU share: where a row's query and a key lie, and what a row sees.
#pragma once
#include "cuda_common.h"

namespace crystal {
namespace {

template <class C>
__device__ inline C none() {
  return -C(INFINITY);
}

// A chosen row's or column's position, -1 for padding. Any other that lies outside the sequence
// would be read, or written, beyond its tensor: whoever reads a.rows or a.cols to find memory by it
// does so through here.
__device__ __forceinline__ int64_t checked(const Attn& a, int64_t position) {
  if (position < -1 || position >= a.L) stop_with("attention: a row or column is not in -1..L-1");
  return position;
}
__device__ __forceinline__ int64_t column(const Attn& a, int64_t b, int64_t c) {
  return checked(a, a.cols[b * a.K + c]);
}

// Row i of [B,H,M]: its sequence, query head, key head and chosen row. There are fewer
// than 2^31: short divisions.
struct Row {
  uint32_t b, h, g, m;
  int64_t position;
  __device__ __forceinline__ Row(const Attn& a, int64_t i) {
    const uint32_t n = uint32_t(i), H = uint32_t(a.H), M = uint32_t(a.M);
    b = n / (H * M), h = n / M % H, g = h / (H / uint32_t(a.G)), m = n % M;
    position = checked(a, a.rows[b * a.M + m]);
  }
};

template <class In>
__device__ __forceinline__ const In* query(const Attn& a, const Row& r) {
  return (const In*)a.q + r.b * a.q_stride[0] + r.h * a.q_stride[1] +
         (r.position < 0 ? 0 : r.position) * a.q_stride[2];
}
template <class In>
__device__ __forceinline__ const In* key(const Attn& a, int64_t b, int64_t g, int64_t j) {
  return (const In*)a.k + b * a.k_stride[0] + g * a.k_stride[1] + (j < 0 ? 0 : j) * a.k_stride[2];
}

// A product of query and key becomes a score: -inf where chosen row m at `position` does not see key j.
// scale: that of a, in C, which whoever makes many scores converts once.
template <class C>
__device__ __forceinline__ C score(const Attn& a, C scale, int64_t b, int m, int position, int j, C dot) {
  if (j < 0 || j > position || (a.padding && a.padding[b * a.L + j])) return none<C>();
  return dot * scale + (a.bias ? ((const C*)a.bias)[(b * a.M + m) * a.L + j] : C(0));
}

// <q, k> by one thread, and by a warp (the result in every lane).
template <class In, class C>
__device__ __forceinline__ C dot(const Attn& a, const In* q, const In* k) {
  C sum = 0;
#pragma unroll 2
  for (int64_t c = 0; c < a.d; ++c) sum += C(widen(q[c * a.q_stride[3]])) * C(widen(k[c * a.k_stride[3]]));
  return sum;
}
template <class In, class C>
__device__ __forceinline__ C warp_dot(const Attn& a, const In* q, const In* k) {
  C sum = 0;
#pragma unroll 2
  for (int64_t c = threadIdx.x % 32; c < a.d; c += 32)
    sum += C(widen(q[c * a.q_stride[3]])) * C(widen(k[c * a.k_stride[3]]));
  return warp_sum(sum);
}

// log sum exp on the way: maximum and the sum of exp beneath it.
template <class C>
struct Online {
  C top = none<C>(), sum = 0;
  __device__ __forceinline__ void add(C other_top, C other_sum) {
    const C now = other_top > top ? other_top : top;
    if (now == none<C>() && other_top == other_top) return;  // nothing seen on either side
    sum = sum * (top == none<C>() ? C(0) : exp_of<C>(top - now)) +
          other_sum * (other_top == none<C>() ? C(0) : exp_of<C>(other_top - now));
    top = now;
  }
  __device__ __forceinline__ C lse() const { return sum == 0 ? none<C>() : top + log(sum); }
};

}  // namespace
}  // namespace crystal
