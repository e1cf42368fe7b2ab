// attn_align, kl, on the GPU. attn_align.h says what it computes. A row needs its query and K keys of each path, dot products of d numbers:
// at B 1, L 2048, R 448, K 8, d 128 some 3 MB move and 60 MFLOP are done in all: a few microseconds, most of them launches. So one version:
// a warp takes a row and goes through its columns, lanes side by side along d. Forward twice through the columns, for the normalisers and
// for the sum; backward once for dQ, and a block per column for dK, which goes through the rows that share its key head.
//
// frobenius needs the pass over all keys: attn_frobenius.cu.
//
// Written without a GPU at hand: its logic is tested on a CPU (tests/cuda_on_cpu.h), its speed is not measured.
#include "attn_cuda.h"

#include "attn_device.h"

namespace crystal {
namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int MOST = 8;  // numbers of d that a lane holds at most: d <= 256

// Both paths' scores of row i (of the intact half) and its c-th column; false where either path hides it.
template <class In, class C> __device__ __forceinline__ bool both_scores(const Align& p, const Row& r, int64_t c, C* x, C* y) {
  const Attn& a = p.int_;
  const int64_t j = column(a, r.b, c);
  *x = score<C>(a, r.b, r.m, r.position, j, warp_dot<In, C>(a, query<In>(a, r), key<In>(a, r.b, r.g, j)));
  *y = score<C>(p.cor, r.b, r.m, r.position, j, warp_dot<In, C>(p.cor, query<In>(p.cor, r), key<In>(p.cor, r.b, r.g, j)));
  return *x != none<C>() && *y != none<C>();
}

template <class In, class C> __global__ void __launch_bounds__(THREADS, 4) align_rows(Align p, C* value, C* norm) {
  const Attn& a = p.int_;
  const int64_t i = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, rows = a.B * a.H * a.M;
  if (i >= rows) return;  // the whole warp
  const Row r(a, i);
  Online<In, C> own, own2;
  C x, y, sum = 0;
  for (int64_t c = 0; c < a.K; ++c)
    if (both_scores<In, C>(p, r, c, &x, &y)) own.add(x, 1), own2.add(y, 1);
  const C lse = own.lse(), lse2 = own2.lse();
  for (int64_t c = 0; c < a.K; ++c)
    if (both_scores<In, C>(p, r, c, &x, &y)) {
      const C log_p = x - lse, log_q = y - lse2;
      sum += plus(plus(times(exp_of<C>(log_p), log_p - log_q), -exp_of<C>(log_p)), exp_of<C>(log_q));
    }
  if (threadIdx.x % 32 == 0) value[i] = sum, norm[i] = lse, norm[rows + i] = lse2;
}

// dx and dy of a row and column.
template <class In, class C> __device__ __forceinline__ bool slopes(const Align& p, const Row& r, int64_t i, int64_t c, const C* g, const C* value, const C* norm, C* dx, C* dy) {
  C x, y;
  if (!both_scores<In, C>(p, r, c, &x, &y)) return false;
  const C log_p = x - norm[i], log_q = y - norm[p.int_.B * p.int_.H * p.int_.M + i], u = exp_of<C>(log_p), v = exp_of<C>(log_q);
  *dx = g[i] * u * (log_p - log_q - value[i]);
  *dy = g[i] * (v - u);
  return true;
}

template <class In, class C> __global__ void __launch_bounds__(THREADS, 4)
align_rows_backward(Align p, bool teacher_grad, const C* g, const C* value, const C* norm, C* parts) {
  const Attn& a = p.int_;
  const int64_t i = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, rows = a.B * a.H * a.M;
  if (i >= rows) return;  // the whole warp
  const Row r(a, i);
  const int lane = threadIdx.x % 32;
  C sum[MOST] = {}, sum2[MOST] = {}, dx, dy;
  for (int64_t c = 0; c < a.K; ++c) {
    if (!slopes<In, C>(p, r, i, c, g, value, norm, &dx, &dy)) continue;
    const int64_t j = a.cols[r.b * a.K + c];
    const In *k = key<In>(a, r.b, r.g, j), *k2 = key<In>(p.cor, r.b, r.g, j);
#pragma unroll
    for (int e = 0; e < MOST; ++e) {
      const int64_t at = lane + 32 * e;
      if (at >= a.d) break;
      sum[e] += dx * C(widen(k[at * a.k_stride[3]]));
      sum2[e] += dy * C(widen(k2[at * a.k_stride[3]]));
    }
  }
#pragma unroll
  for (int e = 0; e < MOST; ++e) {
    const int64_t at = lane + 32 * e;
    if (at >= a.d) break;
    parts[i * a.d + at] = teacher_grad ? sum[e] * C(a.scale) : C(0);
    parts[(rows + i) * a.d + at] = sum2[e] * C(a.scale);
  }
}

template <class In, class C> __global__ void __launch_bounds__(THREADS, 4)
align_columns_backward(Align p, bool teacher_grad, const C* g, const C* value, const C* norm, C* parts) {
  __shared__ C shared[WARPS][32 * MOST];
  const Attn& a = p.int_;
  const int64_t c = blockIdx.x % a.K, head = blockIdx.x / a.K % a.G, b = blockIdx.x / a.K / a.G, R = a.H / a.G * a.M;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  C sum[2][MOST] = {}, dx, dy;
  for (int64_t r0 = warp; r0 < R; r0 += WARPS) {
    const int64_t i = (b * a.G + head) * R + r0;
    const Row r(a, i);
    if (!slopes<In, C>(p, r, i, c, g, value, norm, &dx, &dy)) continue;
    const In *q = query<In>(a, r), *q2 = query<In>(p.cor, r);
#pragma unroll
    for (int e = 0; e < MOST; ++e) {
      const int64_t at = lane + 32 * e;
      if (at >= a.d) break;
      sum[0][e] += dx * C(widen(q[at * a.q_stride[3]]));
      sum[1][e] += dy * C(widen(q2[at * a.q_stride[3]]));
    }
  }
#pragma unroll
  for (int path = 0; path < 2; ++path) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < MOST; ++e) shared[warp][lane + 32 * e] = sum[path][e];
    __syncthreads();
    for (int64_t at = threadIdx.x; at < a.d; at += THREADS) {
      C total = 0;
      for (int w = 0; w < WARPS; ++w) total += shared[w][at];
      parts[(((path * a.B + b) * a.G + head) * a.K + c) * a.d + at] = path || teacher_grad ? total * C(a.scale) : C(0);
    }
  }
}

template <class In, class C> int forward_as(const Align& p, const AlignRows& rows, void* stream) {
  const int64_t n = p.int_.B * p.int_.H * p.int_.M;
  if (!n) return 0;
  return LAUNCH((align_rows<In, C>), unsigned((n + WARPS - 1) / WARPS), THREADS, stream, p, (C*)rows.value, (C*)rows.norm);
}

template <class In, class C> int backward_as(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad, void* row_parts, void* column_parts, void* stream) {
  const Attn& a = p.int_;
  const int64_t n = a.B * a.H * a.M;
  if (!n || !a.K) return 0;
  int error = 0;
  if (row_parts) error = LAUNCH((align_rows_backward<In, C>), unsigned((n + WARPS - 1) / WARPS), THREADS, stream, p, teacher_grad, (const C*)g, (const C*)rows.value,
                                (const C*)rows.norm, (C*)row_parts);
  if (error || !column_parts) return error;
  return LAUNCH((align_columns_backward<In, C>), unsigned(a.B * a.G * a.K), THREADS, stream, p, teacher_grad, (const C*)g, (const C*)rows.value, (const C*)rows.norm, (C*)column_parts);
}

}  // namespace

int attn_align_forward(const Align& p, const AlignRows& rows, void* stream) { ATTN_DISPATCH(p.int_.type, forward_as, p, rows, stream) }
int attn_align_backward(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad, void* row_parts, void* column_parts, void* stream) {
  ATTN_DISPATCH(p.int_.type, backward_as, p, g, rows, teacher_grad, row_parts, column_parts, stream)
}

}  // namespace crystal
