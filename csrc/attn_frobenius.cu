// attn_align, frobenius, on the GPU. attn_align.h says what it computes. Both paths' scores of a tile of rows and keys are computed where they
// are compared, so nothing of size M x K or M x L is ever written, however many columns there are: a key counts as often as it is a column
// (times [B,L], counted once), 0 times if it is none. Per path 2 R L d operations forward, as attn_slice; backward a block needs both paths'
// scores for the one path whose gradient it computes: 10 R L d where attn_slice has 6.
//
// Written without a GPU at hand: its logic is tested on a CPU (tests/cuda_on_cpu.h), its speed is not measured.
#include "attn_cuda.h"

#include "attn_device_tiles.h"

namespace crystal {
namespace {

// How often each key is among the columns.
template <class C> __global__ void __launch_bounds__(THREADS, 2) count_columns(Attn a, C* times) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= a.B * a.L) return;
  int found = 0;
  for (int64_t c = 0; c < a.K; ++c) found += column(a, i / a.L, c) == i % a.L;
  times[i] = C(found);
}

// Where a block stands, from its number: its share of the keys, its numbers of d, its tile of rows (KEYS: of keys), key head and sequence.
struct Place {
  int64_t split, d0, own0, g, b;
  __device__ __forceinline__ Place(const Attn& a, int64_t tile, int64_t mine, int64_t splits, int64_t slices) {
    const int64_t tiles = (mine + tile - 1) / tile;
    int64_t rest = blockIdx.x;
    split = rest % splits, d0 = (rest /= splits) % slices * WIDTH_D, own0 = (rest /= slices) % tiles * tile, g = (rest /= tiles) % a.G, b = rest / a.G;
  }
};

template <class In, class C> __device__ __forceinline__ C weight(const Attn& a, const Tile<In, C>& tile, int64_t b, int row, int64_t j, C product) {
  const C s = score<C>(a, b, tile.m[row], tile.position[row], j, product);
  return s == none<C>() ? C(0) : exp_of<C>(s - tile.lse[row]);
}

// parts [splits,3,B,H,M]: F, and through of both paths, of a share of the keys.
template <class In, class C> __global__ void __launch_bounds__(THREADS, 2) compare_tiles(Align p, const C* norm, const C* times, int splits, C* parts) {
  constexpr int T = TILE<C>, N = T / 16;
  __shared__ Tile<In, C> tile, tile2;
  __shared__ C pool[2 * DEPTH * (T + 1)];
  const Attn& a = p.int_;
  const int64_t R = a.H / a.G * a.M, rows = a.B * a.H * a.M;
  const Place at(a, T, R, splits, 1);
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  tile.read(a, at.b, at.g, at.own0, norm, nullptr);
  tile2.read(p.cor, at.b, at.g, at.own0, norm + rows, nullptr);
  __syncthreads();
  int64_t from, to, last = -1;
  share(a.L, T, at.split, splits, &from, &to);
#pragma unroll 1
  for (int i = 0; i < T; ++i) last = tile.position[i] > last ? tile.position[i] : last;
  C sums[3][N] = {};
  for (int64_t j0 = from; j0 < to && j0 <= last; j0 += T) {
    C s[N][N], s2[N][N];
    multiply<In, C>(a, tile, at.b, at.g, j0, pool, s);
    multiply<In, C>(p.cor, tile2, at.b, at.g, j0, pool, s2);
#pragma unroll
    for (int v = 0; v < N; ++v) {
      const int64_t j = j0 + x + 16 * v;
      const C often = j < a.L ? times[at.b * a.L + j] : C(0);
      if (often == C(0)) continue;
#pragma unroll
      for (int u = 0; u < N; ++u) {
        const C A = weight(a, tile, at.b, y + 16 * u, j, s[u][v]), A2 = weight(p.cor, tile2, at.b, y + 16 * u, j, s2[u][v]), apart = A - A2;
        sums[0][u] += often * apart * apart;
        sums[1][u] += 2 * often * apart * A;
        sums[2][u] -= 2 * often * apart * A2;
      }
    }
  }
#pragma unroll
  for (int u = 0; u < N; ++u)
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      for (int d = 8; d; d >>= 1) sums[n][u] += __shfl_xor_sync(~0u, sums[n][u], d);  // the 16 threads of a row
      const int64_t r = at.own0 + y + 16 * u;
      if (x == 0 && r < R) parts[(at.split * 3 + n) * rows + (at.b * a.G + at.g) * R + r] = sums[n][u];
    }
}

template <class C> __global__ void __launch_bounds__(THREADS, 2) add_shares(int64_t rows, int splits, const C* parts, C* value, C* through) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= rows) return;
  C sums[3] = {};
  for (int s = 0; s < splits; ++s)
    for (int n = 0; n < 3; ++n) sums[n] += parts[(s * 3 + n) * rows + i];
  value[i] = sums[0], through[i] = sums[1], through[rows + i] = sums[2];
}

// The gradient of one path, COR or the intact one: as backward_tiles in attn_slice.cu, but what is direct is computed from both paths.
template <class In, class C, bool KEYS, bool COR> __global__ void __launch_bounds__(THREADS, 2)
align_tiles_backward(Align p, const C* g, const C* norm, const C* through, const C* times, int splits, C* parts, In* dk, int64_t s0, int64_t s1, int64_t s2, int64_t s3) {
  constexpr int T = TILE<C>, N = T / 16, W = WIDTH_D / 16;
  __shared__ Tile<In, C> tile, tile2;
  __shared__ C pool[2 * DEPTH * (T + 1)], ds[T][T + 1];
  const Attn &a = COR ? p.cor : p.int_, &other = COR ? p.int_ : p.cor;
  const int64_t R = a.H / a.G * a.M, rows = a.B * a.H * a.M;
  const Place at(a, T, KEYS ? a.L : R, splits, (a.d + WIDTH_D - 1) / WIDTH_D);
  const C *lse = norm + COR * rows, *lse2 = norm + !COR * rows;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  C sums[N][W] = {};
  int64_t from = 0, to = R;
  if (!KEYS) share(a.L, T, at.split, splits, &from, &to);
  for (int64_t other0 = from; other0 < to && (KEYS || other0 < a.L); other0 += T) {
    const int64_t j0 = KEYS ? at.own0 : other0, r0 = KEYS ? other0 : at.own0;
    __syncthreads();
    if (KEYS || other0 == from) {
      tile.read(a, at.b, at.g, r0, lse, through + COR * rows);
      tile2.read(other, at.b, at.g, r0, lse2, g);  // `through` of the other path is not needed: its place takes what comes from above
    }
    __syncthreads();
    C s[N][N], z[N][N];
    multiply<In, C>(a, tile, at.b, at.g, j0, pool, s);
    multiply<In, C>(other, tile2, at.b, at.g, j0, pool, z);
#pragma unroll
    for (int u = 0; u < N; ++u)
#pragma unroll
      for (int v = 0; v < N; ++v) {
        const int row = y + 16 * u;
        const int64_t j = j0 + x + 16 * v;
        const C A = weight(a, tile, at.b, row, j, s[u][v]), A2 = weight(other, tile2, at.b, row, j, z[u][v]), often = j < a.L ? times[at.b * a.L + j] : C(0);
        const C slope = A * (2 * often * (A - A2) - tile.through[row]);
        ds[row][x + 16 * v] = A == C(0) || tile2.through[row] == C(0) ? C(0) : tile2.through[row] * slope;
      }
    multiply_second<In, C, KEYS>(a, tile, at.b, at.g, j0, at.d0, ds, pool, sums);
  }
  give<In, C, KEYS>(a, at.b, at.g, at.own0, at.d0, at.split, sums, parts, dk, s0, s1, s2, s3);
}

// ---- launchers -----------------------------------------------------------------------------------------------------------------------

template <class C> int count(const Attn& a, void* times, void* stream) {
  return LAUNCH((count_columns<C>), unsigned((a.B * a.L + THREADS - 1) / THREADS), THREADS, stream, a, (C*)times);
}

template <class In, class C> int forward_as(const Align& p, const AlignRows& rows, void* times, void* parts, void* stream) {
  const Attn& a = p.int_;
  const int64_t n = a.B * a.H * a.M, T = TILE<C>, blocks = a.B * a.G * ((a.H / a.G * a.M + T - 1) / T);
  const int splits = splits_for(blocks, (a.L + T - 1) / T);
  if (!n) return 0;
  int error = count<C>(a, times, stream);
  if (!error) error = LAUNCH((compare_tiles<In, C>), unsigned(blocks * splits), THREADS, stream, p, (const C*)rows.norm, (const C*)times, splits, (C*)parts);
  if (error) return error;
  return LAUNCH((add_shares<C>), unsigned((n + THREADS - 1) / THREADS), THREADS, stream, n, splits, (const C*)parts, (C*)rows.value, (C*)rows.through);
}

template <class In, class C, bool COR>
int backward_of(const Align& p, const void* g, const AlignRows& rows, const void* times, void* parts, void* dq, const int64_t* dq_stride, void* dk, const int64_t* s, void* stream) {
  const Attn& a = COR ? p.cor : p.int_;
  const int64_t T = TILE<C>, slices = (a.d + WIDTH_D - 1) / WIDTH_D, key_tiles = (a.L + T - 1) / T, blocks = a.B * a.G * ((a.H / a.G * a.M + T - 1) / T) * slices;
  const int splits = splits_for(blocks, key_tiles);
  In* half = COR && dk ? (In*)dk + a.B * s[0] : (In*)dk;
  int error = 0;
  if (dq) {
    error = LAUNCH((align_tiles_backward<In, C, false, COR>), unsigned(blocks * splits), THREADS, stream, p, (const C*)g, (const C*)rows.norm, (const C*)rows.through,
                   (const C*)times, splits, (C*)parts, (In*)nullptr, 0, 0, 0, 0);
    if (!error) error = attn_add_rows(a, splits, parts, COR ? (In*)dq + a.B * dq_stride[0] : (In*)dq, dq_stride, stream);
  }
  if (error || !dk) return error;
  return LAUNCH((align_tiles_backward<In, C, true, COR>), unsigned(a.B * a.G * key_tiles * slices), THREADS, stream, p, (const C*)g, (const C*)rows.norm,
                (const C*)rows.through, (const C*)times, 1, (C*)nullptr, half, s[0], s[1], s[2], s[3]);
}

template <class In, class C>
int backward_as(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad, void* times, void* parts, void* dq, const int64_t* dq_stride, void* dk, const int64_t* dk_stride,
                void* stream) {
  int error = count<C>(p.int_, times, stream);
  if (!error && teacher_grad) error = backward_of<In, C, false>(p, g, rows, times, parts, dq, dq_stride, dk, dk_stride, stream);
  return error ? error : backward_of<In, C, true>(p, g, rows, times, parts, dq, dq_stride, dk, dk_stride, stream);
}

}  // namespace

int attn_frobenius_forward(const Align& p, const AlignRows& rows, void* times, void* parts, void* stream) {
  ATTN_DISPATCH(p.int_.type, forward_as, p, rows, times, parts, stream)
}
int attn_frobenius_backward(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad, void* times, void* parts, void* dq, const int64_t* dq_stride, void* dk,
                            const int64_t* dk_stride, void* stream) {
  ATTN_DISPATCH(p.int_.type, backward_as, p, g, rows, teacher_grad, times, parts, dq, dq_stride, dk, dk_stride, stream)
}

}  // namespace crystal
