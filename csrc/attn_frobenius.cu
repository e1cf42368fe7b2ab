// attn_align, frobenius, on the GPU. attn_align.h says what it computes. Both paths' scores of a tile of rows
// and keys are computed where they are compared, so nothing of size M x K or M x L is ever written, however
// many columns there are: a key counts as often as it is a column (times [B,L], counted once), 0 times if it
// is none. Per path 2 R L d operations forward, as attn_slice; backward a block needs both paths' scores for
// the one path whose gradient it computes: 10 R L d where attn_slice has 6. As there, the kernels of dQ and
// dK each make the scores anew.
#include "attn_cuda.h"
#include "attn_device_tiles.h"

namespace crystal {
namespace {

// How often each key is among the columns: a block counts for THREADS keys.
template <class C>
__global__ void __launch_bounds__(THREADS, 2) count_columns(Attn a, C* times) {
  __shared__ int found[THREADS];
  const int64_t blocks = (a.L + THREADS - 1) / THREADS, b = blockIdx.x / blocks,
                first = blockIdx.x % blocks * THREADS;
  found[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < a.K; c += THREADS) {
    const int64_t j = column(a, b, c) - first;
    if (j >= 0 && j < THREADS) atomicAdd(&found[j], 1);
  }
  __syncthreads();
  if (first + threadIdx.x < a.L) times[b * a.L + first + threadIdx.x] = C(found[threadIdx.x]);
}

// e^(score - lse) of cell (u, v), 0 where it is hidden.
template <class On>
__device__ __forceinline__ typename On::C weight(const Rows<On>& rows, int u, typename On::C score) {
  typedef typename On::C C;
  return score == none<C>() ? C(0) : exp_of<typename On::In>(score - rows.lse[On::row(u)]);
}

// parts [splits SHARES,3,B,H,M]: F, and grad_through of both paths, of a share of the keys.
template <class On>
__global__ void __launch_bounds__(THREADS, 2)
    compare_tiles(Align p, const typename On::C* norm, const typename On::C* times, int splits,
                  typename On::C* parts) {
  typedef typename On::C C;
  __shared__ Rows<On> rows, rows2;
  __shared__ typename On::Pool pool;
  const Attn& a = p.int_;
  const int64_t R = a.H / a.G * a.M, all = a.B * a.H * a.M;
  const Place at(a, On::T, R, splits, 1, On::WIDTH);
  rows.read(a, at.b, at.g, at.own0, norm, nullptr);
  rows2.read(p.cor, at.b, at.g, at.own0, norm + all, nullptr);
  __syncthreads();
  int from, to;
  share(a.L, On::T, at.split, splits, &from, &to);
  const int last = rows.last([](int) { return true; });
  C sums[3][On::U] = {};
  for (int j0 = from; j0 < to && j0 <= last; j0 += On::T) {
    C s[On::U][On::V], s2[On::U][On::V];
    scores<On>(a, rows, at.b, at.g, Keys(a, j0), pool, s);
    scores<On>(p.cor, rows2, at.b, at.g, Keys(a, j0), pool, s2);
#pragma unroll
    for (int v = 0; v < On::V; ++v) {
      const int j = j0 + On::key(v);
      const C often = j < a.L ? times[at.b * a.L + j] : C(0);
      if (often == C(0)) continue;
#pragma unroll
      for (int u = 0; u < On::U; ++u) {
        const C A = weight<On>(rows, u, s[u][v]), A2 = weight<On>(rows2, u, s2[u][v]), apart = A - A2;
        sums[0][u] += often * apart * apart;
        sums[1][u] += 2 * often * apart * A;
        sums[2][u] -= 2 * often * apart * A2;
      }
    }
  }
#pragma unroll
  for (int u = 0; u < On::U; ++u)
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      const C sum = joined<On>(sums[n][u]);
      const int64_t r = at.own0 + On::row(u), part = at.split * On::SHARES + On::share_of_row();
      if (threadIdx.x % On::LANES == 0 && r < R)
        parts[(part * 3 + n) * all + (at.b * a.G + at.g) * R + r] = sum;
    }
}

template <class C>
__global__ void __launch_bounds__(THREADS, 2)
    add_shares(int64_t rows, int splits, const C* parts, C* value, C* grad_through) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= rows) return;
  C sums[3] = {};
  for (int s = 0; s < splits; ++s)
    for (int n = 0; n < 3; ++n) sums[n] += parts[(s * 3 + n) * rows + i];
  value[i] = sums[0], grad_through[i] = sums[1], grad_through[rows + i] = sums[2];
}

// The gradient of one path, COR or the intact one: as backward_tiles in attn_slice.cu, but grad_direct is
// computed from both paths.
template <class On, bool KEYS, bool COR>
__global__ void __launch_bounds__(THREADS, 2)
    frobenius_backward(Align p, const typename On::C* g, const typename On::C* norm,
                       const typename On::C* grad_through, const typename On::C* times, int splits,
                       typename On::C* parts, typename On::In* dk, Strides to_keys) {
  typedef typename On::C C;
  __shared__ Rows<On> rows, rows2;
  __shared__ typename On::Pool pool;
  __shared__ typename On::Gradients ds;
  const Attn &a = COR ? p.cor : p.int_, &other = COR ? p.int_ : p.cor;
  const int64_t R = a.H / a.G * a.M, all = a.B * a.H * a.M;
  const Place at(a, On::T, KEYS ? a.L : R, splits, (a.d + On::WIDTH - 1) / On::WIDTH, On::WIDTH);
  const C *lse = norm + COR * all, *lse2 = norm + !COR * all;
  typename On::Sums sums = {};
  int from = 0, to = int(R);
  if (!KEYS) share(a.L, On::T, at.split, splits, &from, &to);
  for (int other0 = from; other0 < to && (KEYS || other0 < a.L); other0 += On::T) {
    const int j0 = KEYS ? at.own0 : other0, r0 = KEYS ? other0 : at.own0;
    __syncthreads();
    if (KEYS || other0 == from) {
      rows.read(a, at.b, at.g, r0, lse, grad_through + COR * all);
      rows2.read(other, at.b, at.g, r0, lse2, g);
    }
    __syncthreads();
    if (rows.last([&](int i) { return rows2.given[i] != C(0); }) < j0)
      continue;  // no row with a gradient sees these keys
    C s[On::U][On::V], s2[On::U][On::V];
    scores<On>(a, rows, at.b, at.g, Keys(a, j0), pool, s);
    scores<On>(other, rows2, at.b, at.g, Keys(a, j0), pool, s2);
#pragma unroll
    for (int v = 0; v < On::V; ++v) {
      const int j = j0 + On::key(v);
      const C often = j < a.L ? times[at.b * a.L + j] : C(0);
#pragma unroll
      for (int u = 0; u < On::U; ++u) {
        const int row = On::row(u);
        const C A = weight<On>(rows, u, s[u][v]), A2 = weight<On>(rows2, u, s2[u][v]),
                above = rows2.given[row];
        const C gradient = A * (2 * often * (A - A2) - rows.given[row]);
        s[u][v] = A == C(0) || above == C(0) ? C(0) : above * gradient;
      }
    }
    On::store(ds, s);
    On::template second<KEYS>(a, rows, at.b, at.g, Keys(a, j0), at.d0, ds, pool, sums);
  }
  if (KEYS)
    add_to_keys<On>(a, at.b, at.g, at.own0, at.d0, sums, dk, to_keys);
  else
    write_parts<On>(a, at.own0, R, at.d0, at.split * all + (at.b * a.G + at.g) * R, sums, parts);
}

// ---- launchers --------------------------------------------------------------------------------------------

template <class C>
int count(const Attn& a, void* times, void* stream) {
  return LAUNCH((count_columns<C>), unsigned(a.B * ((a.L + THREADS - 1) / THREADS)), THREADS, stream, a,
                (C*)times);
}

template <class On>
int forward_as(const Align& p, const AlignRows& rows, void* times, void* parts, void* stream) {
  typedef typename On::C C;
  const Attn& a = p.int_;
  const int64_t n = a.B * a.H * a.M, T = On::T, blocks = a.B * a.G * ((a.H / a.G * a.M + T - 1) / T);
  const int splits = splits_for(blocks, (a.L + T - 1) / T);
  if (!n) return 0;
  int error = count<C>(a, times, stream);
  if (!error)
    error = LAUNCH((compare_tiles<On>), unsigned(blocks * splits), THREADS, stream, p, (const C*)rows.norm,
                   (const C*)times, splits, (C*)parts);
  if (error) return error;
  return LAUNCH((add_shares<C>), unsigned((n + THREADS - 1) / THREADS), THREADS, stream, n,
                splits * On::SHARES, (const C*)parts, (C*)rows.value, (C*)rows.grad_through);
}

template <class On, bool COR>
int backward_of(const Align& p, const void* g, const AlignRows& rows, const void* times, void* parts,
                void* dq, const int64_t* dq_stride, void* dk, const int64_t* s, void* stream) {
  typedef typename On::In In;
  typedef typename On::C C;
  const Attn& a = COR ? p.cor : p.int_;
  const int64_t T = On::T, slices = (a.d + On::WIDTH - 1) / On::WIDTH, key_tiles = (a.L + T - 1) / T,
                blocks = a.B * a.G * ((a.H / a.G * a.M + T - 1) / T) * slices;
  const int splits = splits_for(blocks, key_tiles);
  int error = 0;
  if (dq) {
    error = LAUNCH((frobenius_backward<On, false, COR>), unsigned(blocks * splits), THREADS, stream, p,
                   (const C*)g, (const C*)rows.norm, (const C*)rows.grad_through, (const C*)times, splits,
                   (C*)parts, (In*)nullptr, Strides{});
    if (!error)
      error =
          attn_add_rows(a, splits, parts, 0, COR ? (In*)dq + a.B * dq_stride[0] : (In*)dq, dq_stride, stream);
  }
  if (error || !dk) return error;
  In* half = COR ? (In*)dk + a.B * s[0] : (In*)dk;
  return LAUNCH((frobenius_backward<On, true, COR>), unsigned(a.B * a.G * key_tiles * slices), THREADS,
                stream, p, (const C*)g, (const C*)rows.norm, (const C*)rows.grad_through, (const C*)times, 1,
                (C*)nullptr, half, Strides{{s[0], s[1], s[2], s[3]}});
}

template <class On>
int backward_as(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad, void* times,
                void* parts, void* dq, const int64_t* dq_stride, void* dk, const int64_t* dk_stride,
                void* stream) {
  int error = count<typename On::C>(p.int_, times, stream);
  if (!error && teacher_grad)
    error = backward_of<On, false>(p, g, rows, times, parts, dq, dq_stride, dk, dk_stride, stream);
  return error ? error
               : backward_of<On, true>(p, g, rows, times, parts, dq, dq_stride, dk, dk_stride, stream);
}

}  // namespace

int attn_frobenius_forward(const Align& p, const AlignRows& rows, void* times, void* parts, void* stream) {
  ATTN_DISPATCH(p.int_.type, forward_as, p, rows, times, parts, stream)
}
int attn_frobenius_backward(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad,
                            void* times, void* parts, void* dq, const int64_t* dq_stride, void* dk,
                            const int64_t* dk_stride, void* stream) {
  ATTN_DISPATCH(p.int_.type, backward_as, p, g, rows, teacher_grad, times, parts, dq, dq_stride, dk,
                dk_stride, stream)
}

}  // namespace crystal
