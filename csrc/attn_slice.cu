// attn_slice, attn_scores and their gradient on the GPU. attn_slice.h says what they compute and what they
// must move: with R = H/G M rows to a key head 2 R L d operations forward and 6 R L d backward. At B 2, L
// 2048, R 448, d 128 that is 1.9 and 5.6 GFLOP: 13 and 38 us at the 150 TFLOP/s of an A40's tensor cores,
// which bfloat16 uses, 50 and 150 us at the 37 TFLOP/s of its float32 units, which other types use. Where
// attention has computed lse, and for scores, only R K d is left, and bytes bound it: some 2 MB, 3 us.
// That is what has to be done. The backward kernels do more: dQ's and dK's each make the scores anew
// (8 R L d), and on tensor cores a gradient is two bfloat16, each multiplied (12 R L d).
//
//   1  a block per row; backward, for dK, a block per key: every product reads query and key from memory
//   2  tiles of scores in registers (attn_device_tiles.h); several blocks share a row's keys, so that a few
//      rows fill the GPU
//   3  for bfloat16, the tiles' products on tensor cores (attn_tensor_cores.h); for the other types as 2
#include "attn_cuda.h"
#include "attn_device_tiles.h"

namespace crystal {
namespace {

// ---- version 1 --------------------------------------------------------------------------------------------

template <class In, class C>
__global__ void __launch_bounds__(THREADS, 2) lse_naive(Attn a, C* top, C* sum) {
  __shared__ C tops[WARPS], sums[WARPS];
  const Row r(a, blockIdx.x);
  const C scale = C(a.scale);
  Online<C> own;
  for (int64_t j = threadIdx.x; j <= r.position; j += THREADS) {
    const C s = score<C>(a, scale, r.b, int(r.m), int(r.position), int(j),
                         dot<In, C>(a, query<In>(a, r), key<In>(a, r.b, r.g, j)));
    own.add(s, s == none<C>() ? C(0) : C(1));
  }
  for (int d = 16; d; d >>= 1) {
    const C other_top = __shfl_xor_sync(~0u, own.top, d), other_sum = __shfl_xor_sync(~0u, own.sum, d);
    own.add(other_top, other_sum);
  }
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = own.top, sums[threadIdx.x / 32] = own.sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < WARPS; ++w) own.add(tops[w], sums[w]);
  top[blockIdx.x] = own.top, sum[blockIdx.x] = own.sum;
}

// dS of one row and key, but for grad_direct.
template <class In, class C>
__device__ __forceinline__ C gradient(const Attn& a, const Row& r, int64_t i, int64_t j, C product,
                                      const ScoreGrad& t) {
  const C s = score<C>(a, C(a.scale), r.b, int(r.m), int(r.position), int(j), product);
  return s == none<C>() ? C(0) : -((const C*)t.grad_through)[i] * exp_of<C>(s - ((const C*)t.lse)[i]);
}

template <class In, class C>
__device__ __forceinline__ C gradient_naive(const Attn& a, int64_t i, int64_t j, const ScoreGrad& t) {
  const Row r(a, i);
  C ds = 0;
  if (t.grad_through && ((const C*)t.grad_through)[i] != 0 && j <= r.position)
    ds = gradient<In, C>(a, r, i, j, dot<In, C>(a, query<In>(a, r), key<In>(a, r.b, r.g, j)), t);
  for (int64_t c = 0; c < a.K; ++c)
    if (a.cols[r.b * a.K + c] == j) ds += ((const C*)t.grad_direct)[i * a.K + c];
  return ds;
}

template <class In, class C>
__global__ void __launch_bounds__(THREADS, 2) backward_row_naive(Attn a, ScoreGrad t, C* parts) {
  __shared__ C ds[THREADS];
  const int64_t i = blockIdx.x;
  const Row r(a, i);
  for (int64_t c0 = 0; c0 < a.d; c0 += THREADS) {
    const int64_t c = c0 + threadIdx.x;
    C sum = 0;
    for (int64_t j0 = 0; j0 <= r.position; j0 += THREADS) {
      __syncthreads();
      ds[threadIdx.x] = j0 + threadIdx.x < a.L ? gradient_naive<In, C>(a, i, j0 + threadIdx.x, t) : C(0);
      __syncthreads();
      for (int64_t j = j0; c < a.d && j < j0 + THREADS && j <= r.position; ++j)
        sum += ds[j - j0] * C(widen(key<In>(a, r.b, r.g, j)[c * a.k_stride[3]]));
    }
    if (c < a.d) parts[i * a.d + c] = sum * C(a.scale);
  }
}

template <class In, class C>
__global__ void __launch_bounds__(THREADS, 2)
    backward_key_naive(Attn a, ScoreGrad t, In* dk, int64_t s0, int64_t s1, int64_t s2, int64_t s3) {
  __shared__ C ds[THREADS];
  const int64_t j = blockIdx.x % a.L, g = blockIdx.x / a.L % a.G, b = blockIdx.x / a.L / a.G,
                R = a.H / a.G * a.M, first = (b * a.G + g) * R;
  for (int64_t c0 = 0; c0 < a.d; c0 += THREADS) {
    const int64_t c = c0 + threadIdx.x;
    C sum = 0;
    for (int64_t r0 = 0; r0 < R; r0 += THREADS) {
      __syncthreads();
      ds[threadIdx.x] =
          r0 + threadIdx.x < R ? gradient_naive<In, C>(a, first + r0 + threadIdx.x, j, t) : C(0);
      __syncthreads();
      for (int64_t r = r0; c < a.d && r < r0 + THREADS && r < R; ++r)
        sum += ds[r - r0] * C(widen(query<In>(a, Row(a, first + r))[c * a.q_stride[3]]));
    }
    In* to = dk + b * s0 + g * s1 + j * s2 + c * s3;
    if (c < a.d) *to = narrow<In>(C(widen(*to)) + sum * C(a.scale));
  }
}

// ---- versions 2 and 3 -------------------------------------------------------------------------------------

// top, sum [splits SHARES,B,H,M]: the log sum exp of each row over a share of its keys.
template <class On>
__global__ void __launch_bounds__(THREADS, 2)
    lse_tiles(Attn a, int splits, typename On::C* top, typename On::C* sum) {
  typedef typename On::C C;
  __shared__ Rows<On> rows;
  __shared__ typename On::Pool pool;
  const int64_t R = a.H / a.G * a.M, all = a.B * a.H * a.M;
  const Place at(a, On::T, R, splits, 1, On::WIDTH);
  rows.read(a, at.b, at.g, at.own0, nullptr, nullptr);
  __syncthreads();
  int from, to;
  share(a.L, On::T, at.split, splits, &from, &to);
  const int last = rows.last([](int) { return true; });
  Online<C> own[On::U];
  for (int j0 = from; j0 < to && j0 <= last; j0 += On::T) {
    C s[On::U][On::V];
    scores<On>(a, rows, at.b, at.g, Keys(a, j0), pool, s);
    add_scores<On>(s, own);
  }
#pragma unroll
  for (int u = 0; u < On::U; ++u) {
    join<On>(own[u]);
    const int64_t r = at.own0 + On::row(u), part = at.split * On::SHARES + On::share_of_row();
    if (threadIdx.x % On::LANES || r >= R) continue;
    top[part * all + (at.b * a.G + at.g) * R + r] = own[u].top;
    sum[part * all + (at.b * a.G + at.g) * R + r] = own[u].sum;
  }
}

// A block per tile of rows and of columns: merges the shares of the rows' log sum exp, then their scores or
// weights. weights: lse_out is given.
template <class On>
__global__ void __launch_bounds__(THREADS, 2)
    columns_tiles(Attn a, int column_tiles, int parts, const typename On::C* top, const typename On::C* sum,
                  const typename On::C* lse_in, typename On::C* lse_out, typename On::C* out) {
  typedef typename On::C C;
  __shared__ Rows<On> rows;
  __shared__ typename On::Pool pool;
  const int64_t R = a.H / a.G * a.M, all = a.B * a.H * a.M;
  const Place at(a, On::T, R, column_tiles, 1, On::WIDTH);
  const int64_t first = (at.b * a.G + at.g) * R + at.own0;
  rows.read(a, at.b, at.g, at.own0, lse_in, nullptr);
  if (lse_out && threadIdx.x < On::T && at.own0 + threadIdx.x < R) {
    const int64_t i = first + threadIdx.x;
    Online<C> own;
    for (int s = 0; s < parts; ++s) own.add(top[s * all + i], sum[s * all + i]);
    if (!lse_in) rows.lse[threadIdx.x] = own.lse();
    if (at.split == 0) lse_out[i] = rows.lse[threadIdx.x];
  }
  if (at.split * On::T >= a.K) return;  // the normalisers alone
  __syncthreads();
  C s[On::U][On::V];
  scores<On>(a, rows, at.b, at.g, Columns(a, at.b, at.split * On::T), pool, s);
#pragma unroll
  for (int u = 0; u < On::U; ++u)
#pragma unroll
    for (int v = 0; v < On::V; ++v) {
      const int row = On::row(u), c = at.split * On::T + On::key(v);
      if (at.own0 + row >= R || c >= a.K) continue;
      const C value = s[u][v];
      out[(first + row) * a.K + c] = !lse_out             ? value
                                     : value == none<C>() ? C(0)
                                                          : exp_of<C>(value - rows.lse[row]);
    }
}

// Whether a column of sequence b lies among keys j0 .. ; the same in every thread.
template <class On>
__device__ __forceinline__ bool a_column_inside(const Attn& a, int64_t b, int64_t j0) {
  bool found = false;
  for (int64_t c = threadIdx.x; c < a.K; c += THREADS)
    found |= a.cols[b * a.K + c] >= j0 && a.cols[b * a.K + c] < j0 + On::T;
  return __syncthreads_or(found);
}

// Adds the columns' own gradient to a tile of them, whose rows begin at the key head's r0-th. A cell belongs
// to one thread, which adds to it in the columns' order: a column may be there twice.
template <class On>
__device__ __forceinline__ void add_direct(const Attn& a, int64_t b, int64_t g, int64_t r0, int64_t j0,
                                           const typename On::C* grad_direct, typename On::Gradients& ds) {
  __shared__ uint32_t inside[WARPS];  // a bit for each of the next THREADS columns
  const int64_t R = a.H / a.G * a.M;
  const int row = threadIdx.x % On::T, keys = THREADS / On::T, first = threadIdx.x / On::T;
  for (int64_t c0 = 0; c0 < a.K; c0 += THREADS) {
    const int64_t c = c0 + threadIdx.x, j = c < a.K ? a.cols[b * a.K + c] - j0 : -1;
    const uint32_t found = __ballot_sync(~0u, j >= 0 && j < On::T);
    __syncthreads();
    inside[threadIdx.x / 32] = found;
    __syncthreads();
    if (r0 + row >= R) continue;
    for (int w = 0; w < WARPS; ++w)
      for (uint32_t bits = inside[w]; bits; bits &= bits - 1) {
        const int64_t column = c0 + 32 * w + __ffs(int(bits)) - 1;
        const int key = int(a.cols[b * a.K + column] - j0);
        if (key % keys != first) continue;
        On::add(ds, row, key, grad_direct[((b * a.G + g) * R + r0 + row) * a.K + column]);
      }
  }
}

// KEYS: a block owns a tile of keys and goes through the rows, dK += dS^T Q. Otherwise it owns rows and goes
// through its share of the keys, dQ = dS K. Of d it owns WIDTH numbers: for the other ones another block
// computes the scores again. Where no row of a tile has a `grad_through` (attention's own backward has
// carried it), the columns' keys alone are computed.
template <class On, bool KEYS>
__global__ void __launch_bounds__(THREADS, 2)
    backward_tiles(Attn a, ScoreGrad t, int splits, typename On::C* parts, typename On::In* dk,
                   Strides to_keys) {
  typedef typename On::C C;
  __shared__ Rows<On> rows;
  __shared__ typename On::Pool pool;
  __shared__ typename On::Gradients ds;
  const int64_t R = a.H / a.G * a.M, mine = KEYS ? a.L : R;
  const Place at(a, On::T, mine, splits, (a.d + On::WIDTH - 1) / On::WIDTH, On::WIDTH);
  typename On::Sums sums = {};
  int from = 0, to = int(R), last = -1;
  if (!KEYS) share(a.L, On::T, at.split, splits, &from, &to);
  if (!KEYS) rows.read(a, at.b, at.g, at.own0, (const C*)t.lse, (const C*)t.grad_through);
  bool inside = KEYS && a_column_inside<On>(a, at.b, at.own0);
  for (int other0 = from; other0 < to && (KEYS || other0 < a.L); other0 += On::T) {
    const int j0 = KEYS ? at.own0 : other0, r0 = KEYS ? other0 : at.own0;
    __syncthreads();
    if (KEYS)
      rows.read(a, at.b, at.g, r0, (const C*)t.lse, (const C*)t.grad_through);
    else
      inside = a_column_inside<On>(a, at.b, j0);
    __syncthreads();
    // Whether a row that sees some of these keys has a gradient at every one.
    if (t.grad_through && (KEYS || other0 == from))
      last = rows.last([&](int i) { return rows.given[i] != C(0); });
    const bool whole = j0 <= last;
    if (!whole && !inside) continue;
    C s[On::U][On::V];
    if (whole) scores<On>(a, rows, at.b, at.g, Keys(a, j0), pool, s);
#pragma unroll
    for (int u = 0; u < On::U; ++u)
#pragma unroll
      for (int v = 0; v < On::V; ++v) {
        const bool seen = whole && s[u][v] != none<C>();
        s[u][v] =
            seen ? -rows.given[On::row(u)] * exp_of<typename On::In>(s[u][v] - rows.lse[On::row(u)]) : C(0);
      }
    On::store(ds, s);
    __syncthreads();
    if (inside) add_direct<On>(a, at.b, at.g, r0, j0, (const C*)t.grad_direct, ds);
    On::template second<KEYS>(a, rows, at.b, at.g, Keys(a, j0), at.d0, ds, pool, sums);
  }
  if (KEYS)
    add_to_keys<On>(a, at.b, at.g, at.own0, at.d0, sums, dk, to_keys);
  else
    write_parts<On>(a, at.own0, R, at.d0, at.split * a.B * a.H * a.M + (at.b * a.G + at.g) * R, sums, parts);
}

// A warp per row, from the first-th on: the first row at a position adds what all rows there have got.
template <class In, class C>
__global__ void __launch_bounds__(THREADS, 2)
    add_rows(Attn a, int splits, const C* parts, int64_t first, In* dq, Strides to) {
  const int64_t i = first + int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, rows = a.B * a.H * a.M;
  if (i >= rows) return;  // the whole warp
  const Row r(a, i);
  const int lane = threadIdx.x % 32;
  if (r.position < 0) return;
  for (int64_t m0 = 0; m0 < a.M; m0 += 32) {
    uint32_t same = __ballot_sync(~0u, m0 + lane < a.M && a.rows[r.b * a.M + m0 + lane] == r.position);
    for (; same; same &= same - 1) {
      const int64_t m = m0 + __ffs(int(same)) - 1;
      if (m < r.m) return;  // an earlier row is there
      const C* from = parts + (r.b * a.H * a.M + r.h * a.M + m) * a.d;
      In* cells = dq + r.b * to.s[0] + r.h * to.s[1] + r.position * to.s[2];
      for (int64_t c = lane; c < a.d; c += 32) {
        C sum = 0;
        for (int s = 0; s < splits; ++s) sum += from[s * rows * a.d + c];
        cells[c * to.s[3]] = narrow<In>(C(widen(cells[c * to.s[3]])) + sum);
      }
    }
  }
}

// ---- launchers --------------------------------------------------------------------------------------------

Strides strides(const int64_t* s) { return s ? Strides{{s[0], s[1], s[2], s[3]}} : Strides{}; }

template <class On>
int forward_as(int version, const Attn& a, bool weights, const void* lse_in, void* top, void* sum,
               void* lse_out, void* out, void* stream) {
  typedef typename On::In In;
  typedef typename On::C C;
  const int64_t rows = a.B * a.H * a.M, T = On::T, blocks = a.B * a.G * ((a.H / a.G * a.M + T - 1) / T);
  int parts = 0, error = 0;
  if (!rows) return 0;
  if (weights && !lse_in) {
    const int splits = version == 1 ? 1 : splits_for(blocks, (a.L + T - 1) / T);
    parts = version == 1 ? 1 : splits * On::SHARES;
    if (version == 1)
      error = LAUNCH((lse_naive<In, C>), unsigned(rows), THREADS, stream, a, (C*)top, (C*)sum);
    else
      error =
          LAUNCH((lse_tiles<On>), unsigned(blocks * splits), THREADS, stream, a, splits, (C*)top, (C*)sum);
    if (error) return error;
  }
  const int64_t column_tiles = a.K > T ? (a.K + T - 1) / T : 1;
  return LAUNCH((columns_tiles<On>), unsigned(blocks * column_tiles), THREADS, stream, a, int(column_tiles),
                parts, (const C*)top, (const C*)sum, (const C*)lse_in, weights ? (C*)lse_out : nullptr,
                (C*)out);
}

template <class On>
int add_rows_as(const Attn& a, int splits, const void* parts, int64_t first, void* dq, const int64_t* to,
                void* stream) {
  typedef typename On::In In;
  typedef typename On::C C;
  const int64_t rows = (a.B - first) * a.H * a.M;
  if (!rows) return 0;
  return LAUNCH((add_rows<In, C>), unsigned((rows + WARPS - 1) / WARPS), THREADS, stream, a, splits,
                (const C*)parts, first * a.H * a.M, (In*)dq, strides(to));
}

template <class On>
int backward_as(int version, const Attn& a, const ScoreGrad& t, void* parts, void* dq,
                const int64_t* dq_stride, void* dk, const int64_t* dk_stride, void* stream) {
  typedef typename On::In In;
  typedef typename On::C C;
  const int64_t rows = a.B * a.H * a.M, T = On::T, slices = (a.d + On::WIDTH - 1) / On::WIDTH,
                key_tiles = (a.L + T - 1) / T;
  const int64_t blocks = a.B * a.G * ((a.H / a.G * a.M + T - 1) / T) * slices;
  const int splits = version == 1 ? 1 : splits_for(blocks, key_tiles);
  int error = 0;
  if (!rows) return 0;
  if (parts && version == 1)
    error = LAUNCH((backward_row_naive<In, C>), unsigned(rows), THREADS, stream, a, t, (C*)parts);
  else if (parts)
    error = LAUNCH((backward_tiles<On, false>), unsigned(blocks * splits), THREADS, stream, a, t, splits,
                   (C*)parts, (In*)nullptr, Strides{});
  if (!error && parts) error = add_rows_as<On>(a, splits, parts, 0, dq, dq_stride, stream);
  if (error || !dk) return error;
  const int64_t* s = dk_stride;
  if (version == 1)
    return LAUNCH((backward_key_naive<In, C>), unsigned(a.B * a.G * a.L), THREADS, stream, a, t, (In*)dk,
                  s[0], s[1], s[2], s[3]);
  return LAUNCH((backward_tiles<On, true>), unsigned(a.B * a.G * key_tiles * slices), THREADS, stream, a, t,
                1, (C*)nullptr, (In*)dk, strides(s));
}

}  // namespace

int attn_slice_forward(int version, const Attn& a, bool weights, const void* lse_in, void* top, void* sum,
                       void* lse_out, void* out, void* stream) {
  if (version < 3 && a.type == Float::bf16)
    return forward_as<FloatUnits<bf16, float>>(version, a, weights, lse_in, top, sum, lse_out, out, stream);
  ATTN_DISPATCH(a.type, forward_as, version, a, weights, lse_in, top, sum, lse_out, out, stream)
}
int attn_slice_backward(int version, const Attn& a, const ScoreGrad& t, void* parts, void* dq,
                        const int64_t* dq_stride, void* dk, const int64_t* dk_stride, void* stream) {
  if (version < 3 && a.type == Float::bf16)
    return backward_as<FloatUnits<bf16, float>>(version, a, t, parts, dq, dq_stride, dk, dk_stride, stream);
  ATTN_DISPATCH(a.type, backward_as, version, a, t, parts, dq, dq_stride, dk, dk_stride, stream)
}
int attn_add_rows(const Attn& a, int splits, const void* parts, int64_t first, void* dq,
                  const int64_t* dq_stride, void* stream) {
  ATTN_DISPATCH(a.type, add_rows_as, a, splits, parts, first, dq, dq_stride, stream)
}

}  // namespace crystal
