// attn_align, kl, on the GPU. attn_align.h says what it computes: of each path the scores of R = H/G M rows
// and K columns, tile by tile, no pass over L. At B 1, L 2048, R 448, K 8, d 128 some 3 MB move and 60 MFLOP
// are done in all, and 34 MB of gradients are zeros to be written: a few microseconds each, most of them
// launches. A block has a tile of rows, for which it goes through the columns twice, once for the normalisers
// and once for the sum; where one tile holds all columns their scores are computed once. Backward a block has
// one path and a tile of rows (dQ) or of columns (dK), and computes both paths' scores.
//
// frobenius needs the pass over all keys: attn_frobenius.cu.
#include "attn_cuda.h"
#include "attn_device_tiles.h"

namespace crystal {
namespace {

// Both paths' scores of a tile of rows and columns; -inf in both where either path hides a cell.
template <class On>
__device__ __forceinline__ void both_scores(const Align& p, const Rows<On>& rows, const Rows<On>& rows2,
                                            int64_t b, int64_t g, int64_t c0, typename On::Pool& pool,
                                            typename On::C (&x)[On::U][On::V],
                                            typename On::C (&y)[On::U][On::V]) {
  typedef typename On::C C;
  const Columns columns(p.int_, b, c0);
  scores<On>(p.int_, rows, b, g, columns, pool, x);
  scores<On>(p.cor, rows2, b, g, columns, pool, y);
#pragma unroll
  for (int u = 0; u < On::U; ++u)
#pragma unroll
    for (int v = 0; v < On::V; ++v)
      if (x[u][v] == none<C>() || y[u][v] == none<C>()) x[u][v] = y[u][v] = none<C>();
}

// What the warps that share a row have found of it, for all of them.
template <class On>
struct Meeting {
  typename On::C top[On::SHARES][On::T], sum[On::SHARES][On::T];
};
template <class On, class C>
__device__ __forceinline__ C lse_of_row(Meeting<On>& meeting, Online<C> own, int u) {
  join<On>(own);
  if (On::SHARES == 1) return own.lse();
  __syncthreads();
  if (threadIdx.x % On::LANES == 0) {
    meeting.top[On::share_of_row()][On::row(u)] = own.top;
    meeting.sum[On::share_of_row()][On::row(u)] = own.sum;
  }
  __syncthreads();
  Online<C> all;
#pragma unroll
  for (int s = 0; s < On::SHARES; ++s) all.add(meeting.top[s][On::row(u)], meeting.sum[s][On::row(u)]);
  return all.lse();
}
template <class On, class C>
__device__ __forceinline__ C sum_of_row(Meeting<On>& meeting, C own, int u) {
  own = joined<On>(own);
  if (On::SHARES == 1) return own;
  __syncthreads();
  if (threadIdx.x % On::LANES == 0) meeting.sum[On::share_of_row()][On::row(u)] = own;
  __syncthreads();
  C all = 0;
#pragma unroll
  for (int s = 0; s < On::SHARES; ++s) all += meeting.sum[s][On::row(u)];
  return all;
}

template <class On>
__global__ void __launch_bounds__(THREADS, 2) kl_tiles(Align p, typename On::C* value, typename On::C* norm) {
  typedef typename On::C C;
  typedef typename On::In In;
  __shared__ Rows<On> rows, rows2;
  __shared__ typename On::Pool pool;
  __shared__ Meeting<On> meeting;
  const Attn& a = p.int_;
  const int64_t R = a.H / a.G * a.M, all = a.B * a.H * a.M;
  const Place at(a, On::T, R, 1, 1, On::WIDTH);
  rows.read(a, at.b, at.g, at.own0, nullptr, nullptr);
  rows2.read(p.cor, at.b, at.g, at.own0, nullptr, nullptr);
  __syncthreads();

  C x[On::U][On::V], y[On::U][On::V];
  Online<C> own[On::U], own2[On::U];
  for (int c0 = 0; c0 < a.K; c0 += On::T) {
    both_scores<On>(p, rows, rows2, at.b, at.g, c0, pool, x, y);
    add_scores<On>(x, own);
    add_scores<On>(y, own2);
  }
  C lse[On::U], lse2[On::U], sum[On::U] = {};
#pragma unroll
  for (int u = 0; u < On::U; ++u) {
    lse[u] = lse_of_row<On>(meeting, own[u], u);
    lse2[u] = lse_of_row<On>(meeting, own2[u], u);
  }
  for (int c0 = 0; c0 < a.K; c0 += On::T) {
    if (a.K > On::T) both_scores<On>(p, rows, rows2, at.b, at.g, c0, pool, x, y);
#pragma unroll
    for (int u = 0; u < On::U; ++u)
#pragma unroll
      for (int v = 0; v < On::V; ++v) {
        if (x[u][v] == none<C>()) continue;
        const C log_p = x[u][v] - lse[u], log_q = y[u][v] - lse2[u], P = exp_of<In>(log_p),
                Q = exp_of<In>(log_q);
        sum[u] += plus(plus(times(P, log_p - log_q), -P), Q);
      }
  }
#pragma unroll
  for (int u = 0; u < On::U; ++u) {
    const C total = sum_of_row<On>(meeting, sum[u], u);
    const int64_t r = at.own0 + On::row(u), i = (at.b * a.G + at.g) * R + r;
    if (threadIdx.x % On::LANES || On::share_of_row() || r >= R) continue;
    value[i] = total;
    norm[i] = lse[u];
    norm[all + i] = lse2[u];
  }
}

// The gradient of one path, COR or the intact one. KEYS: a block owns columns and goes through its share of
// the rows; otherwise it owns rows and goes through its share of the columns. parts [splits,2B,H,M,d] of
// rows, [splits,2B,G,K,d] of columns.
template <class On, bool KEYS, bool COR>
__global__ void __launch_bounds__(THREADS, 2)
    kl_backward(Align p, const typename On::C* g, const typename On::C* value, const typename On::C* norm,
                int splits, typename On::C* parts) {
  typedef typename On::C C;
  typedef typename On::In In;
  __shared__ Rows<On> rows, rows2;
  __shared__ typename On::Pool pool;
  __shared__ typename On::Gradients ds;
  const Attn &a = p.int_, &path = COR ? p.cor : p.int_;
  const int64_t R = a.H / a.G * a.M, all = a.B * a.H * a.M;
  const Place at(a, On::T, KEYS ? a.K : R, splits, (a.d + On::WIDTH - 1) / On::WIDTH, On::WIDTH);
  typename On::Sums sums = {};
  int from, to;
  share(KEYS ? R : a.K, On::T, at.split, splits, &from, &to);
  for (int other0 = from; other0 < to && other0 < (KEYS ? R : a.K); other0 += On::T) {
    const int c0 = KEYS ? at.own0 : other0, r0 = KEYS ? other0 : at.own0;
    __syncthreads();
    if (KEYS || other0 == from) {
      rows.read(a, at.b, at.g, r0, norm, value);
      rows2.read(p.cor, at.b, at.g, r0, norm + all, g);
    }
    __syncthreads();
    C x[On::U][On::V], y[On::U][On::V];
    both_scores<On>(p, rows, rows2, at.b, at.g, c0, pool, x, y);
#pragma unroll
    for (int u = 0; u < On::U; ++u)
#pragma unroll
      for (int v = 0; v < On::V; ++v) {
        const int row = On::row(u);
        C gradient = 0;
        if (x[u][v] != none<C>()) {
          const C log_p = x[u][v] - rows.lse[row], log_q = y[u][v] - rows2.lse[row], P = exp_of<In>(log_p),
                  Q = exp_of<In>(log_q);
          gradient = rows2.given[row] * (COR ? Q - P : P * (log_p - log_q - rows.given[row]));
        }
        x[u][v] = gradient;
      }
    On::store(ds, x);
    const Columns columns(a, at.b, c0);
    On::template second<KEYS>(path, COR ? rows2 : rows, at.b, at.g, columns, at.d0, ds, pool, sums);
  }
  const int64_t mine = KEYS ? a.K : R, heads = a.B * a.G, head = COR * heads + at.b * a.G + at.g;
  write_parts<On>(a, at.own0, mine, at.d0, (at.split * 2 * heads + head) * mine, sums, parts);
}

template <class On>
int forward_as(const Align& p, const AlignRows& rows, void* stream) {
  typedef typename On::C C;
  const Attn& a = p.int_;
  const int64_t blocks = a.B * a.G * ((a.H / a.G * a.M + On::T - 1) / On::T);
  if (!blocks) return 0;
  return LAUNCH((kl_tiles<On>), unsigned(blocks), THREADS, stream, p, (C*)rows.value, (C*)rows.norm);
}

template <class On, bool KEYS, bool COR>
int backward_of(const Align& p, const void* g, const AlignRows& rows, int splits, void* parts, void* stream) {
  typedef typename On::C C;
  const Attn& a = p.int_;
  const int64_t mine = KEYS ? a.K : a.H / a.G * a.M, slices = (a.d + On::WIDTH - 1) / On::WIDTH;
  const int64_t blocks = a.B * a.G * ((mine + On::T - 1) / On::T) * slices * splits;
  return LAUNCH((kl_backward<On, KEYS, COR>), unsigned(blocks), THREADS, stream, p, (const C*)g,
                (const C*)rows.value, (const C*)rows.norm, splits, (C*)parts);
}

template <class On, bool KEYS>
int backward_both(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad, int splits,
                  void* parts, void* stream) {
  const int error = teacher_grad ? backward_of<On, KEYS, false>(p, g, rows, splits, parts, stream) : 0;
  return error ? error : backward_of<On, KEYS, true>(p, g, rows, splits, parts, stream);
}

template <class On>
int backward_as(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad, void* parts,
                void* dq, const int64_t* dq_stride, void* dk, const int64_t* dk_stride, void* stream) {
  typedef typename On::In In;
  const Attn& a = p.int_;
  const int64_t R = a.H / a.G * a.M, T = On::T, slices = (a.d + On::WIDTH - 1) / On::WIDTH,
                row_tiles = (R + T - 1) / T, column_tiles = (a.K + T - 1) / T;
  if (!a.B || !R || !a.K) return 0;
  Attn both = a;
  both.B = 2 * a.B;
  const int64_t first = teacher_grad ? 0 : a.B;  // of the corrupted path alone
  int error = 0;
  if (dq) {
    const int splits = splits_for(a.B * a.G * row_tiles * slices, column_tiles);
    error = backward_both<On, false>(p, g, rows, teacher_grad, splits, parts, stream);
    if (!error) error = attn_add_rows(both, splits, parts, first, dq, dq_stride, stream);
  }
  if (error || !dk) return error;
  const int splits = splits_for(a.B * a.G * column_tiles * slices, row_tiles);
  error = backward_both<On, true>(p, g, rows, teacher_grad, splits, parts, stream);
  both.H = a.G, both.M = a.K,
  both.rows = a.cols;  // what is done with rows of queries, done with columns of keys
  return error ? error : attn_add_rows(both, splits, parts, first, dk, dk_stride, stream);
}

}  // namespace

int attn_kl_forward(const Align& p, const AlignRows& rows, void* stream) {
  ATTN_DISPATCH(p.int_.type, forward_as, p, rows, stream)
}
int attn_kl_backward(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad, void* parts,
                     void* dq, const int64_t* dq_stride, void* dk, const int64_t* dk_stride, void* stream) {
  ATTN_DISPATCH(p.int_.type, backward_as, p, g, rows, teacher_grad, parts, dq, dq_stride, dk, dk_stride,
                stream)
}

}  // namespace crystal
