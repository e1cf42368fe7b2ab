// What the attention kernels on the GPU share: where a row's query and a key lie, and what a row sees.
#pragma once
#include "cuda_common.h"

namespace crystal {
namespace {

template <class C> __device__ inline C none() { return -C(INFINITY); }

// Row i of [B,H,M]: its sequence, query head and chosen row.
struct Row {
  int64_t b, h, m, position;
  __device__ Row(const Attn& a, int64_t i) : b(i / (a.H * a.M)), h(i / a.M % a.H), m(i % a.M), position(a.rows[b * a.M + m]) {}
};

template <class In> __device__ inline const In* query(const Attn& a, const Row& r) {
  return (const In*)a.q + r.b * a.q_stride[0] + r.h * a.q_stride[1] + (r.position < 0 ? 0 : r.position) * a.q_stride[2];
}
template <class In> __device__ inline const In* key(const Attn& a, int64_t b, int64_t g, int64_t j) {
  return (const In*)a.k + b * a.k_stride[0] + g * a.k_stride[1] + (j < 0 ? 0 : j) * a.k_stride[2];
}

// A product of query and key becomes a score: -inf where chosen row m at `position` does not see key j.
template <class C> __device__ inline C score(const Attn& a, int64_t b, int64_t m, int64_t position, int64_t j, C dot) {
  if (j < 0 || j > position || (a.padding && a.padding[b * a.L + j])) return none<C>();
  return dot * C(a.scale) + (a.bias ? ((const C*)a.bias)[(b * a.M + m) * a.L + j] : C(0));
}

// <q, k> by one thread, and by a warp (the result in every lane).
template <class In, class C> __device__ inline C dot(const Attn& a, const In* q, const In* k) {
  C sum = 0;
  for (int64_t c = 0; c < a.d; ++c) sum += C(widen(q[c * a.q_stride[3]])) * C(widen(k[c * a.k_stride[3]]));
  return sum;
}
template <class In, class C> __device__ inline C warp_dot(const Attn& a, const In* q, const In* k) {
  C sum = 0;
  for (int64_t c = threadIdx.x % 32; c < a.d; c += 32) sum += C(widen(q[c * a.q_stride[3]])) * C(widen(k[c * a.k_stride[3]]));
  return warp_sum(sum);
}

// log sum exp on the way: maximum and the sum of exp beneath it.
template <class In, class C> struct Online {
  C top = none<C>(), sum = 0;
  __device__ void add(C other_top, C other_sum) {
    const C now = other_top > top ? other_top : top;
    if (now == none<C>() && other_top == other_top) return;  // nothing seen on either side
    sum = sum * (top == none<C>() ? C(0) : exp_of<C>(top - now)) + other_sum * (other_top == none<C>() ? C(0) : exp_of<C>(other_top - now));
    top = now;
  }
  __device__ C lse() const { return sum == 0 ? none<C>() : top + log(sum); }
};

// Calls f<In, C>() for the type of q and k.
#define ATTN_DISPATCH(type, f, ...)                            \
  switch (type) {                                              \
    case Float::f32: return f<float, float>(__VA_ARGS__);      \
    case Float::f64: return f<double, double>(__VA_ARGS__);    \
    case Float::bf16: return f<bf16, float>(__VA_ARGS__);      \
    default: return f<f16, float>(__VA_ARGS__);                \
  }

}  // namespace
}  // namespace crystal
