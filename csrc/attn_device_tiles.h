// Tiles of scores on the GPU, for kernels that go over all keys: 64 x 64 of them in registers, 16 to a thread, from slices of 32 numbers of d
// in shared memory; backward, dS goes from registers to the second product through shared memory.
#pragma once
#include "attn_device.h"

namespace crystal {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
template <class C> constexpr int TILE = sizeof(C) == 4 ? 64 : 32;  // rows and keys of a tile
constexpr int DEPTH = 32;                                        // numbers of d at a time, first product
constexpr int WIDTH_D = 64;                                      // numbers of d of a block, second product

// What a block knows of its tile of rows; a tile of keys is `from` and the block's b and g.
template <class In, class C> struct Tile {
  const In* query[TILE<C>];  // null beyond the rows
  int64_t position[TILE<C>], m[TILE<C>];
  C lse[TILE<C>], through[TILE<C>];

  // Rows from .. of the key head's R; what is kept of every row, [B,H,M], may be null.
  __device__ void read(const Attn& a, int64_t b, int64_t g, int64_t from, const C* lse_of, const C* through_of) {
    const int64_t R = a.H / a.G * a.M;
    for (int i = threadIdx.x; i < TILE<C>; i += THREADS) {
      const bool inside = from + i < R;
      const int64_t at = (b * a.G + g) * R + (inside ? from + i : 0);
      const Row r(a, at);
      query[i] = inside && r.position >= 0 ? crystal::query<In>(a, r) : nullptr;
      position[i] = inside ? r.position : -1, m[i] = r.m;
      if (lse_of) lse[i] = lse_of[at];
      if (through_of) through[i] = inside ? through_of[at] : C(0);
    }
  }
};

// Products of a tile's rows and the keys from j0 on: thread (y, x) of 16 x 16 gets rows y + 16 u and keys x + 16 v. pool: shared memory.
template <class In, class C> __device__ __forceinline__ void multiply(const Attn& a, const Tile<In, C>& tile, int64_t b, int64_t g, int64_t j0, C* pool, C (&sums)[TILE<C> / 16][TILE<C> / 16]) {
  constexpr int T = TILE<C>, N = T / 16;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  C(*qs)[T + 1] = (C(*)[T + 1])pool, (*ks)[T + 1] = (C(*)[T + 1])(pool + DEPTH * (T + 1));
#pragma unroll
  for (int u = 0; u < N; ++u)
#pragma unroll
    for (int v = 0; v < N; ++v) sums[u][v] = 0;
  for (int64_t c0 = 0; c0 < a.d; c0 += DEPTH) {
    __syncthreads();
#pragma unroll 2  // more need more registers than there are
    for (int i = threadIdx.x; i < T * DEPTH; i += THREADS) {  // neighbours read side by side, and write to different banks
      const int64_t c = c0 + i % DEPTH, j = j0 + i / DEPTH;
      const In* q = tile.query[i / DEPTH];
      qs[i % DEPTH][i / DEPTH] = q && c < a.d ? C(widen(q[c * a.q_stride[3]])) : C(0);
      ks[i % DEPTH][i / DEPTH] = j < a.L && c < a.d ? C(widen(key<In>(a, b, g, j)[c * a.k_stride[3]])) : C(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < DEPTH; ++c) {
      C p[N], r[N];
#pragma unroll
      for (int u = 0; u < N; ++u) p[u] = qs[c][y + 16 * u], r[u] = ks[c][x + 16 * u];
#pragma unroll
      for (int u = 0; u < N; ++u)
#pragma unroll
        for (int v = 0; v < N; ++v) sums[u][v] += p[u] * r[v];
    }
  }
}

// Tiles `split` of `splits` of n, as [from, to).
__device__ inline void share(int64_t n, int64_t size, int64_t split, int64_t splits, int64_t* from, int64_t* to) {
  const int64_t tiles = (n + size - 1) / size;
  *from = tiles * split / splits * size, *to = tiles * (split + 1) / splits * size;
}

// sums += dS Keys, or with KEYS dS^T Queries, of numbers d0 .. of d: thread (y, x) gets rows (or keys) y + 16 u and numbers x + 16 v.
// ds: written by all threads before.
template <class In, class C, bool KEYS>
__device__ __forceinline__ void multiply_second(const Attn& a, const Tile<In, C>& tile, int64_t b, int64_t g, int64_t j0, int64_t d0, const C (*ds)[TILE<C> + 1], C* pool,
                                                C (&sums)[TILE<C> / 16][WIDTH_D / 16]) {
  constexpr int T = TILE<C>, N = T / 16, W = WIDTH_D / 16;
  static_assert(2 * DEPTH * (T + 1) >= T * WIDTH_D, "the second product's tile shares the first one's memory");
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  __syncthreads();
#pragma unroll 2
  for (int i = threadIdx.x; i < T * WIDTH_D; i += THREADS) {  // the other side's numbers [T][WIDTH_D]
    const int64_t c = d0 + i % WIDTH_D, j = j0 + i / WIDTH_D;
    const In* q = tile.query[i / WIDTH_D];
    if (KEYS) pool[i] = q && c < a.d ? C(widen(q[c * a.q_stride[3]])) : C(0);
    else pool[i] = j < a.L && c < a.d ? C(widen(key<In>(a, b, g, j)[c * a.k_stride[3]])) : C(0);
  }
  __syncthreads();
#pragma unroll 4
  for (int i = 0; i < T; ++i) {
    C p[N], r[W];
#pragma unroll
    for (int u = 0; u < N; ++u) p[u] = KEYS ? ds[i][y + 16 * u] : ds[y + 16 * u][i];
#pragma unroll
    for (int v = 0; v < W; ++v) r[v] = pool[i * WIDTH_D + x + 16 * v];
#pragma unroll
    for (int u = 0; u < N; ++u)
#pragma unroll
      for (int v = 0; v < W; ++v) sums[u][v] += p[u] * r[v];
  }
}

// What a block has summed goes to its share of parts [splits,B,H,M,d], or with KEYS is added to dk.
template <class In, class C, bool KEYS>
__device__ __forceinline__ void give(const Attn& a, int64_t b, int64_t g, int64_t own0, int64_t d0, int64_t split, const C (&sums)[TILE<C> / 16][WIDTH_D / 16], C* parts, In* dk,
                                     int64_t s0, int64_t s1, int64_t s2, int64_t s3) {
  const int64_t R = a.H / a.G * a.M, mine = KEYS ? a.L : R;
#pragma unroll
  for (int u = 0; u < TILE<C> / 16; ++u)
#pragma unroll
    for (int v = 0; v < WIDTH_D / 16; ++v) {
      const int64_t at = own0 + threadIdx.x / 16 + 16 * u, c = d0 + threadIdx.x % 16 + 16 * v;
      if (at >= mine || c >= a.d) continue;
      if (KEYS) {
        In* cell = dk + b * s0 + g * s1 + at * s2 + c * s3;
        *cell = narrow<In>(C(widen(*cell)) + sums[u][v] * C(a.scale));
      } else {
        parts[(split * a.B * a.H * a.M + (b * a.G + g) * R + at) * a.d + c] = sums[u][v] * C(a.scale);
      }
    }
}

// Blocks that share a row's keys: enough to fill a GPU of 132 multiprocessors twice.
int splits_for(int64_t blocks, int64_t tiles) {
  int splits = 1;
  while (splits < KEY_SPLITS && splits * 2 <= tiles && blocks * splits < 264) splits *= 2;
  return splits;
}

}  // namespace
}  // namespace crystal
