// attn_slice, attn_scores and their gradient on the GPU. attn_slice.h says what they compute and what they must move: with R = H/G M rows to
// a key head 2 R L d operations forward and 6 R L d backward; at B 2, L 2048, R 448, d 128 that is 1.9 and 5.6 GFLOP, 13 and 38 us at the
// 150 TFLOP/s of an A40's tensor cores, 50 and 150 us at the 37 TFLOP/s of its float32 units, which is what is used here. Where attention has
// computed lse, and for scores, only R K d is left, and bytes bound it: some 2 MB, 3 us.
//
//   1  a block per row; backward, for dK, a block per key: every product of a query and a key reads both from memory
//   2  tiles of scores in registers (attn_device_tiles.h); a row's keys are shared among several blocks, so that few rows fill the GPU
//
// Written without a GPU at hand: their logic is tested on a CPU (tests/cuda_on_cpu.h), their speed is not measured.
#include "attn_cuda.h"

#include "attn_device_tiles.h"

namespace crystal {
namespace {

// ---- version 1 -----------------------------------------------------------------------------------------------------------------------

template <class In, class C> __global__ void __launch_bounds__(THREADS, 2) lse_naive(Attn a, C* top, C* sum) {
  __shared__ C tops[WARPS], sums[WARPS];
  const Row r(a, blockIdx.x);
  Online<In, C> own;
  for (int64_t j = threadIdx.x; j <= r.position; j += THREADS) {
    const C s = score<C>(a, r.b, r.m, r.position, j, dot<In, C>(a, query<In>(a, r), key<In>(a, r.b, r.g, j)));
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

// dS of one row and key, but for the direct part.
template <class In, class C> __device__ __forceinline__ C slope(const Attn& a, const Row& r, int64_t i, int64_t j, C product, const Through& t) {
  const C s = score<C>(a, r.b, r.m, r.position, j, product);
  return s == none<C>() ? C(0) : -((const C*)t.through)[i] * exp_of<C>(s - ((const C*)t.lse)[i]);
}

template <class In, class C> __device__ __forceinline__ C slope_naive(const Attn& a, int64_t i, int64_t j, const Through& t) {
  const Row r(a, i);
  C ds = 0;
  if (t.through && ((const C*)t.through)[i] != 0 && j <= r.position) ds = slope<In, C>(a, r, i, j, dot<In, C>(a, query<In>(a, r), key<In>(a, r.b, r.g, j)), t);
  for (int64_t c = 0; c < a.K; ++c)
    if (a.cols[r.b * a.K + c] == j) ds += ((const C*)t.direct)[i * a.K + c];
  return ds;
}

template <class In, class C> __global__ void __launch_bounds__(THREADS, 2) backward_row_naive(Attn a, Through t, C* parts) {
  __shared__ C ds[THREADS];
  const int64_t i = blockIdx.x;
  const Row r(a, i);
  for (int64_t c0 = 0; c0 < a.d; c0 += THREADS) {
    const int64_t c = c0 + threadIdx.x;
    C sum = 0;
    for (int64_t j0 = 0; j0 <= r.position; j0 += THREADS) {
      __syncthreads();
      ds[threadIdx.x] = j0 + threadIdx.x < a.L ? slope_naive<In, C>(a, i, j0 + threadIdx.x, t) : C(0);
      __syncthreads();
      for (int64_t j = j0; c < a.d && j < j0 + THREADS && j <= r.position; ++j) sum += ds[j - j0] * C(widen(key<In>(a, r.b, r.g, j)[c * a.k_stride[3]]));
    }
    if (c < a.d) parts[i * a.d + c] = sum * C(a.scale);
  }
}

template <class In, class C> __global__ void __launch_bounds__(THREADS, 2) backward_key_naive(Attn a, Through t, In* dk, int64_t s0, int64_t s1, int64_t s2, int64_t s3) {
  __shared__ C ds[THREADS];
  const int64_t j = blockIdx.x % a.L, g = blockIdx.x / a.L % a.G, b = blockIdx.x / a.L / a.G, R = a.H / a.G * a.M, first = (b * a.G + g) * R;
  for (int64_t c0 = 0; c0 < a.d; c0 += THREADS) {
    const int64_t c = c0 + threadIdx.x;
    C sum = 0;
    for (int64_t r0 = 0; r0 < R; r0 += THREADS) {
      __syncthreads();
      ds[threadIdx.x] = r0 + threadIdx.x < R ? slope_naive<In, C>(a, first + r0 + threadIdx.x, j, t) : C(0);
      __syncthreads();
      for (int64_t r = r0; c < a.d && r < r0 + THREADS && r < R; ++r) sum += ds[r - r0] * C(widen(query<In>(a, Row(a, first + r))[c * a.q_stride[3]]));
    }
    In* to = dk + b * s0 + g * s1 + j * s2 + c * s3;
    if (c < a.d) *to = narrow<In>(C(widen(*to)) + sum * C(a.scale));
  }
}

// ---- version 2 -----------------------------------------------------------------------------------------------------------------------

template <class In, class C> __global__ void __launch_bounds__(THREADS, 2) lse_tiles(Attn a, int splits, C* top, C* sum) {
  constexpr int T = TILE<C>, N = T / 16;
  __shared__ Tile<In, C> tile;
  __shared__ C pool[2 * DEPTH * (T + 1)];
  const int64_t R = a.H / a.G * a.M, tiles = (R + T - 1) / T, split = blockIdx.x % splits, r0 = blockIdx.x / splits % tiles * T;
  const int64_t g = blockIdx.x / splits / tiles % a.G, b = blockIdx.x / splits / tiles / a.G;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  tile.read(a, b, g, r0, nullptr, nullptr);
  __syncthreads();
  int64_t from, to, last = -1;
  share(a.L, T, split, splits, &from, &to);
#pragma unroll 1
  for (int i = 0; i < T; ++i) last = tile.position[i] > last ? tile.position[i] : last;
  Online<In, C> own[N];
  for (int64_t j0 = from; j0 < to && j0 <= last; j0 += T) {
    C s[N][N];
    multiply<In, C>(a, tile, b, g, j0, pool, s);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int row = y + 16 * u;
      C most = none<C>(), total = 0;
#pragma unroll
      for (int v = 0; v < N; ++v) {
        s[u][v] = score<C>(a, b, tile.m[row], tile.position[row], j0 + x + 16 * v, s[u][v]);
        most = s[u][v] > most || s[u][v] != s[u][v] ? s[u][v] : most;
      }
#pragma unroll
      for (int v = 0; v < N; ++v) total += s[u][v] == none<C>() ? C(0) : exp_of<C>(s[u][v] - most);
      own[u].add(most, total);
    }
  }
#pragma unroll
  for (int u = 0; u < N; ++u) {
    for (int d = 8; d; d >>= 1) {  // the 16 threads of a row
      const C other_top = __shfl_xor_sync(~0u, own[u].top, d), other_sum = __shfl_xor_sync(~0u, own[u].sum, d);
      own[u].add(other_top, other_sum);
    }
    const int64_t r = r0 + y + 16 * u, at = split * a.B * a.H * a.M + (b * a.G + g) * R + r;
    if (x == 0 && r < R) top[at] = own[u].top, sum[at] = own[u].sum;
  }
}

// A warp per row: merges the shares of its log sum exp, then column by column.
template <class In, class C> __global__ void __launch_bounds__(THREADS, 2) columns(Attn a, int splits, const C* top, const C* sum, const C* lse_in, C* lse_out, C* out) {
  const int64_t i = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, rows = a.B * a.H * a.M;
  if (i >= rows) return;  // the whole warp
  const Row r(a, i);
  Online<In, C> own;
  for (int s = 0; s < splits; ++s) own.add(top[s * rows + i], sum[s * rows + i]);
  const C lse = lse_in ? lse_in[i] : own.lse();
  if (lse_out && threadIdx.x % 32 == 0) lse_out[i] = lse;
  for (int64_t c = 0; c < a.K; ++c) {
    const int64_t j = column(a, r.b, c);
    const C s = score<C>(a, r.b, r.m, r.position, j, warp_dot<In, C>(a, query<In>(a, r), key<In>(a, r.b, r.g, j)));
    if (threadIdx.x % 32 == 0) out[i * a.K + c] = !lse_out ? s : s == none<C>() ? C(0) : exp_of<C>(s - lse);
  }
}

// KEYS: a block owns a tile of keys and goes through the rows, dK += dS^T Q. Otherwise it owns rows and goes through its share of the keys,
// dQ = dS K. Of d it owns WIDTH_D numbers: for the other ones another block computes the scores again. Where all rows of a tile have a
// `through` of 0 (attention's own backward has carried it), the columns' keys alone are computed.
template <class In, class C, bool KEYS> __global__ void __launch_bounds__(THREADS, 2)
backward_tiles(Attn a, Through t, int splits, C* parts, In* dk, int64_t s0, int64_t s1, int64_t s2, int64_t s3) {
  constexpr int T = TILE<C>, N = T / 16, W = WIDTH_D / 16;
  __shared__ Tile<In, C> tile;
  __shared__ C pool[2 * DEPTH * (T + 1)], ds[T][T + 1];
  const int64_t R = a.H / a.G * a.M, mine = KEYS ? a.L : R, tiles = (mine + T - 1) / T, slices = (a.d + WIDTH_D - 1) / WIDTH_D;
  int64_t rest = blockIdx.x;
  const int64_t split = rest % splits, d0 = (rest /= splits) % slices * WIDTH_D, own0 = (rest /= slices) % tiles * T, g = (rest /= tiles) % a.G, b = rest / a.G;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  C sums[N][W] = {};
  int64_t from = 0, to = R;
  if (!KEYS) share(a.L, T, split, splits, &from, &to);
  if (!KEYS) tile.read(a, b, g, own0, (const C*)t.lse, (const C*)t.through);
  for (int64_t other0 = from; other0 < to && (KEYS || other0 < a.L); other0 += T) {
    const int64_t j0 = KEYS ? own0 : other0, r0 = KEYS ? other0 : own0;
    bool inside = false;  // a column among these keys; the same in every thread
    for (int64_t c = 0; c < a.K; ++c) inside |= a.cols[b * a.K + c] >= j0 && a.cols[b * a.K + c] < j0 + T;
    if (!t.through && !inside) continue;
    __syncthreads();
    if (KEYS) tile.read(a, b, g, r0, (const C*)t.lse, (const C*)t.through);
    __syncthreads();
    bool whole = false;  // the tile has a gradient at every key; the same in every thread
#pragma unroll 1
    for (int i = 0; t.through && i < T && !whole; ++i) whole = tile.through[i] != 0;
    if (!whole && !inside) continue;
    C s[N][N] = {};
    if (whole) multiply<In, C>(a, tile, b, g, j0, pool, s);
#pragma unroll
    for (int u = 0; u < N; ++u)
#pragma unroll
      for (int v = 0; v < N; ++v) {
        const int row = y + 16 * u, column = x + 16 * v;
        C value = 0;
        if (whole) {
          const C z = score<C>(a, b, tile.m[row], tile.position[row], j0 + column, s[u][v]);
          value = z == none<C>() ? C(0) : -tile.through[row] * exp_of<C>(z - tile.lse[row]);
        }
        ds[row][column] = value;
      }
    __syncthreads();
    for (int64_t c = 0; inside && c < a.K; ++c) {
      const int64_t column = a.cols[b * a.K + c] - j0, row = threadIdx.x;
      if (column >= 0 && column < T && row < T && r0 + row < R) ds[row][column] += ((const C*)t.direct)[((b * a.G + g) * R + r0 + row) * a.K + c];
    }
    multiply_second<In, C, KEYS>(a, tile, b, g, j0, d0, ds, pool, sums);
  }
  give<In, C, KEYS>(a, b, g, own0, d0, split, sums, parts, dk, s0, s1, s2, s3);
}

// A block per row: the first row at a position adds what all rows there have got.
template <class In, class C> __global__ void __launch_bounds__(THREADS, 2) add_rows(Attn a, int splits, const C* parts, In* dq, int64_t s0, int64_t s1, int64_t s2, int64_t s3) {
  const Row r(a, blockIdx.x);
  if (r.position < 0) return;
  for (int64_t m = 0; m < r.m; ++m)
    if (a.rows[r.b * a.M + m] == r.position) return;
  for (int64_t c = threadIdx.x; c < a.d; c += THREADS) {
    C sum = 0;
    for (int64_t m = r.m; m < a.M; ++m)
      for (int s = 0; s < splits && a.rows[r.b * a.M + m] == r.position; ++s) sum += parts[((s * a.B + r.b) * a.H * a.M + r.h * a.M + m) * a.d + c];
    In* to = dq + r.b * s0 + r.h * s1 + r.position * s2 + c * s3;
    *to = narrow<In>(C(widen(*to)) + sum);
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------------------------

template <class In, class C> int forward_as(int version, const Attn& a, bool weights, const void* lse_in, void* top, void* sum, void* lse_out, void* out, void* stream) {
  const int64_t rows = a.B * a.H * a.M, T = TILE<C>, row_tiles = (a.H / a.G * a.M + T - 1) / T, blocks = a.B * a.G * row_tiles;
  int splits = 0, error = 0;
  if (!rows) return 0;
  if (weights && !lse_in) {
    splits = version == 1 ? 1 : splits_for(blocks, (a.L + T - 1) / T);
    if (version == 1) error = LAUNCH((lse_naive<In, C>), unsigned(rows), THREADS, stream, a, (C*)top, (C*)sum);
    else error = LAUNCH((lse_tiles<In, C>), unsigned(blocks * splits), THREADS, stream, a, splits, (C*)top, (C*)sum);
    if (error) return error;
  }
  return LAUNCH((columns<In, C>), unsigned((rows + WARPS - 1) / WARPS), THREADS, stream, a, splits, (const C*)top, (const C*)sum, (const C*)lse_in,
                weights ? (C*)lse_out : nullptr, (C*)out);
}

template <class In, class C> int add_rows_as(const Attn& a, int splits, const void* parts, void* dq, const int64_t* s, void* stream) {
  if (!(a.B * a.H * a.M)) return 0;
  return LAUNCH((add_rows<In, C>), unsigned(a.B * a.H * a.M), THREADS, stream, a, splits, (const C*)parts, (In*)dq, s[0], s[1], s[2], s[3]);
}

template <class In, class C>
int backward_as(int version, const Attn& a, const Through& t, void* parts, void* dq, const int64_t* dq_stride, void* dk, const int64_t* s, void* stream) {
  const int64_t rows = a.B * a.H * a.M, T = TILE<C>, slices = (a.d + WIDTH_D - 1) / WIDTH_D, key_tiles = (a.L + T - 1) / T;
  const int64_t blocks = a.B * a.G * ((a.H / a.G * a.M + T - 1) / T) * slices;
  const int splits = version == 1 ? 1 : splits_for(blocks, key_tiles);
  int error = 0;
  if (!rows) return 0;
  if (parts && version == 1) error = LAUNCH((backward_row_naive<In, C>), unsigned(rows), THREADS, stream, a, t, (C*)parts);
  else if (parts) error = LAUNCH((backward_tiles<In, C, false>), unsigned(blocks * splits), THREADS, stream, a, t, splits, (C*)parts, (In*)nullptr, 0, 0, 0, 0);
  if (!error && parts) error = add_rows_as<In, C>(a, splits, parts, dq, dq_stride, stream);
  if (error || !dk) return error;
  if (version == 1) return LAUNCH((backward_key_naive<In, C>), unsigned(a.B * a.G * a.L), THREADS, stream, a, t, (In*)dk, s[0], s[1], s[2], s[3]);
  return LAUNCH((backward_tiles<In, C, true>), unsigned(a.B * a.G * key_tiles * slices), THREADS, stream, a, t, 1, (C*)nullptr, (In*)dk, s[0], s[1], s[2], s[3]);
}

}  // namespace

int attn_slice_forward(int version, const Attn& a, bool weights, const void* lse_in, void* top, void* sum, void* lse_out, void* out, void* stream) {
  ATTN_DISPATCH(a.type, forward_as, version, a, weights, lse_in, top, sum, lse_out, out, stream)
}
int attn_slice_backward(int version, const Attn& a, const Through& t, void* parts, void* dq, const int64_t* dq_stride, void* dk, const int64_t* dk_stride, void* stream) {
  ATTN_DISPATCH(a.type, backward_as, version, a, t, parts, dq, dq_stride, dk, dk_stride, stream)
}
int attn_add_rows(const Attn& a, int splits, const void* parts, void* dq, const int64_t* dq_stride, void* stream) {
  ATTN_DISPATCH(a.type, add_rows_as, a, splits, parts, dq, dq_stride, stream)
}

}  // namespace crystal
