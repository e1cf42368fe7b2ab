// Tiles of scores on a GPU: what the kernels that go over many keys share. Such a kernel is written once,
// over the units that make the products of a tile: FloatUnits, below, for every type, or TensorCores
// (attn_tensor_cores.h) for bfloat16. Either says which cells of a tile a thread holds, makes the scores of a
// tile's rows and keys, and multiplies a tile of their gradients with the keys or the queries.
#pragma once
#include "attn_device.h"

namespace crystal {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

// ---- what a block works at --------------------------------------------------------------------------------

// The tile's keys: those from `from` on, or the columns from the `from`-th on. (i) is the position of key
// i, -1 for none.
struct Keys {
  int from, L;
  __device__ __forceinline__ Keys(const Attn& a, int64_t from) : from(int(from)), L(int(a.L)) {}
  __device__ __forceinline__ int operator()(int i) const { return from + i < L ? from + i : -1; }
  __device__ __forceinline__ void check(const Attn&, int) const {}
};
struct Columns {
  const int64_t* cols;
  int left;
  __device__ __forceinline__ Columns(const Attn& a, int64_t b, int64_t from)
      : cols(a.cols + b * a.K + from), left(int(a.K - from)) {}
  __device__ __forceinline__ int operator()(int i) const { return i < left ? int(cols[i]) : -1; }
  // Each thread looks at one column before any is used.
  __device__ __forceinline__ void check(const Attn& a, int tile) const {
    if (int(threadIdx.x) < tile && int(threadIdx.x) < left) checked(a, cols[threadIdx.x]);
  }
};

// The tile's rows: rows `from` .. of the R = H/G M that share a key head.
template <class On>
struct Rows {
  typedef typename On::In In;
  typedef typename On::C C;
  const In* query[On::T];  // null where there is nothing to read
  int position[On::T], m[On::T];
  C lse[On::T], given[On::T];

  // lse_of and given_of [B,H,M]: what is kept of every row; each may be null, and is then left alone.
  __device__ void read(const Attn& a, int64_t b, int64_t g, int64_t from, const C* lse_of,
                       const C* given_of) {
    const int64_t R = a.H / a.G * a.M;
    for (int i = threadIdx.x; i < On::T; i += THREADS) {
      const bool inside = from + i < R;
      const int64_t at = (b * a.G + g) * R + (inside ? from + i : 0);
      const Row r(a, at);
      query[i] = inside && r.position >= 0 ? crystal::query<In>(a, r) : nullptr;
      position[i] = inside ? int(r.position) : -1;
      m[i] = int(r.m);
      if (lse_of) lse[i] = lse_of[at];
      if (given_of) given[i] = inside ? given_of[at] : C(0);
    }
  }

  // The last position among those rows that are `wanted(i)`, after a barrier: every warp finds it for itself.
  template <class Wanted>
  __device__ __forceinline__ int last(const Wanted& wanted) const {
    int found = -1;
#pragma unroll
    for (int i = threadIdx.x % 32; i < On::T; i += 32)
      if (wanted(i) && position[i] > found) found = position[i];
    for (int d = 16; d; d >>= 1) {
      const int other = __shfl_xor_sync(~0u, found, d);
      found = other > found ? other : found;
    }
    return found;
  }
};

// Where a block stands, from its number: its share, its numbers of d, its tile of what it owns,
// key head and sequence.
struct Place {
  int split, d0, own0, g, b;
  // mine: how many rows or keys there are to own, in tiles of `tile`. Short divisions: there are
  // fewer than 2^31 blocks.
  __device__ __forceinline__ Place(const Attn& a, int tile, int64_t mine, int splits, int slices, int width) {
    const uint32_t tiles = (uint32_t(mine) + tile - 1) / tile, G = uint32_t(a.G);
    uint32_t rest = blockIdx.x;
    split = int(rest % splits);
    rest /= splits;
    d0 = int(rest % slices * width);
    rest /= slices;
    own0 = int(rest % tiles * tile);
    rest /= tiles;
    g = int(rest % G);
    b = int(rest / G);
  }
};

// Share `split` of `splits` of n things in tiles of `size`, as [from, to); splits: at most KEY_SPLITS.
__device__ inline void share(int64_t n, int size, int split, int splits, int* from, int* to) {
  const uint32_t tiles = (uint32_t(n) + size - 1) / size;
  *from = int(tiles * split / splits) * size;
  *to = int(tiles * (split + 1) / splits) * size;
}

// Blocks that share what others own: as many as 132 multiprocessors hold at once, two each.
int splits_for(int64_t blocks, int64_t tiles) {
  int splits = 1;
  while (splits < KEY_SPLITS && splits * 2 <= tiles && blocks * splits * 2 <= 264) splits *= 2;
  return splits;
}

// Products of a tile become scores.
template <class On, class Where>
__device__ __forceinline__ void scores(const Attn& a, const Rows<On>& rows, int64_t b, int64_t g,
                                       const Where& keys, typename On::Pool& pool,
                                       typename On::C (&s)[On::U][On::V]) {
  typedef typename On::C C;
  keys.check(a, On::T);
  On::products(a, rows, b, g, keys, pool, s);
  const C scale = C(a.scale);
#pragma unroll
  for (int v = 0; v < On::V; ++v) {
    const int j = keys(On::key(v));
#pragma unroll
    for (int u = 0; u < On::U; ++u) {
      const int position = rows.position[On::row(u)];
      s[u][v] = score<C>(a, scale, b, rows.m[On::row(u)], position, j, s[u][v]);
    }
  }
}

// Adds a tile's scores to the log sum exp of the thread's rows.
template <class On, class C>
__device__ __forceinline__ void add_scores(const C (&s)[On::U][On::V], Online<C> (&own)[On::U]) {
#pragma unroll
  for (int u = 0; u < On::U; ++u) {
    C most = none<C>(), total = 0;
#pragma unroll
    for (int v = 0; v < On::V; ++v) most = s[u][v] > most || s[u][v] != s[u][v] ? s[u][v] : most;
#pragma unroll
    for (int v = 0; v < On::V; ++v)
      total += s[u][v] == none<C>() ? C(0) : exp_of<typename On::In>(s[u][v] - most);
    own[u].add(most, total);
  }
}

// Joins what the threads of a row have found of it: then each has it.
template <class On, class C>
__device__ __forceinline__ void join(Online<C>& own) {
  for (int d = On::LANES / 2; d; d >>= 1) {
    const C top = __shfl_xor_sync(~0u, own.top, d), sum = __shfl_xor_sync(~0u, own.sum, d);
    own.add(top, sum);
  }
}
template <class On, class C>
__device__ __forceinline__ C joined(C sum) {
  for (int d = On::LANES / 2; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  return sum;
}

// What a block has summed goes to `parts`, [splits,B,H,M,d] of rows or [splits,B,G,K,d] of columns: first is
// the block's own one there.
template <class On>
__device__ __forceinline__ void write_parts(const Attn& a, int64_t own0, int64_t mine, int64_t d0,
                                            int64_t first, const typename On::Sums& sums,
                                            typename On::C* parts) {
  typedef typename On::C C;
  On::each(sums, [&](int i, int n, C sum) {
    const int64_t c = d0 + n;
    if (own0 + i < mine && c < a.d) parts[(first + own0 + i) * a.d + c] = sum * C(a.scale);
  });
}

// .. or is added to dk [B,G,L,d], whose strides are s.
struct Strides {
  int64_t s[4];
};
template <class On>
__device__ __forceinline__ void add_to_keys(const Attn& a, int64_t b, int64_t g, int64_t own0, int64_t d0,
                                            const typename On::Sums& sums, typename On::In* dk,
                                            const Strides& to) {
  typedef typename On::C C;
  On::each(sums, [&](int i, int n, C sum) {
    const int64_t j = own0 + i, c = d0 + n;
    if (j >= a.L || c >= a.d) return;
    typename On::In* cell = dk + b * to.s[0] + g * to.s[1] + j * to.s[2] + c * to.s[3];
    *cell = narrow<typename On::In>(C(widen(*cell)) + sum * C(a.scale));
  });
}

// ---- the units that every GPU and type has ----------------------------------------------------------------

// Thread (y, x) of 16 x 16 holds rows y + 16 u and keys x + 16 v.
template <class In_, class C_>
struct FloatUnits {
  typedef In_ In;
  typedef C_ C;
  static constexpr int T = sizeof(C) == 4 ? 64 : 32;  // rows and keys of a tile
  static constexpr int U = T / 16, V = T / 16;        // of which a thread holds so many
  static constexpr int LANES = 16, SHARES = 1;  // threads of a warp, and warps, that hold cells of one row
  static constexpr int WIDTH = 64;              // numbers of d that a block sums
  static constexpr int DEPTH = 32;              // numbers of d at a time in products()
  static constexpr int STEPS = sizeof(C) == 4 ? 4 : 2;  // as many as registers allow
  typedef C Sums[U][WIDTH / 16];
  struct Pool {
    C numbers[2 * DEPTH * (T + 1)];
  };
  struct Gradients {
    C cells[T][T + 1];
  };
  static_assert(2 * DEPTH * (T + 1) >= T * WIDTH, "the second product's tile shares the first one's memory");

  static __device__ __forceinline__ int row(int u) { return threadIdx.x / 16 + 16 * u; }
  static __device__ __forceinline__ int key(int v) { return threadIdx.x % 16 + 16 * v; }
  static __device__ __forceinline__ int share_of_row() { return 0; }

  // <q, k> of the tile's rows and keys.
  template <class Where>
  static __device__ __forceinline__ void products(const Attn& a, const Rows<FloatUnits>& rows, int64_t b,
                                                  int64_t g, const Where& keys, Pool& pool, C (&sums)[U][V]) {
    C(*qs)[T + 1] = (C(*)[T + 1]) pool.numbers, (*ks)[T + 1] = (C(*)[T + 1])(pool.numbers + DEPTH * (T + 1));
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int v = 0; v < V; ++v) sums[u][v] = 0;
    for (int64_t c0 = 0; c0 < a.d; c0 += DEPTH) {
      __syncthreads();
#pragma unroll 2  // more need more registers than there are
      for (int i = threadIdx.x; i < T * DEPTH;
           i += THREADS) {  // neighbours read side by side, and write to different banks
        const int64_t c = c0 + i % DEPTH;
        const int j = keys(i / DEPTH);
        const In* q = rows.query[i / DEPTH];
        qs[i % DEPTH][i / DEPTH] = q && c < a.d ? C(widen(q[c * a.q_stride[3]])) : C(0);
        ks[i % DEPTH][i / DEPTH] =
            j >= 0 && c < a.d ? C(widen(crystal::key<In>(a, b, g, j)[c * a.k_stride[3]])) : C(0);
      }
      __syncthreads();
#pragma unroll STEPS
      for (int c = 0; c < DEPTH; ++c) {
        C p[U], r[V];
#pragma unroll
        for (int u = 0; u < U; ++u) p[u] = qs[c][row(u)];
#pragma unroll
        for (int v = 0; v < V; ++v) r[v] = ks[c][key(v)];
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
          for (int v = 0; v < V; ++v) sums[u][v] += p[u] * r[v];
      }
    }
  }

  // The gradients of a tile's cells, which all threads write, each its own.
  static __device__ __forceinline__ void store(Gradients& ds, const C (&s)[U][V]) {
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int v = 0; v < V; ++v) ds.cells[row(u)][key(v)] = s[u][v];
  }
  static __device__ __forceinline__ void add(Gradients& ds, int row, int key, C value) {
    ds.cells[row][key] += value;
  }

  // sums += dS Keys, or with KEYS dS^T Queries, of numbers d0 .. of d. ds: written by all threads before.
  template <bool KEYS, class Where>
  static __device__ __forceinline__ void second(const Attn& a, const Rows<FloatUnits>& rows, int64_t b,
                                                int64_t g, const Where& keys, int64_t d0, const Gradients& ds,
                                                Pool& pool, Sums& sums) {
    constexpr int W = WIDTH / 16;
    C* numbers = pool.numbers;  // of the other side, [T][WIDTH]
    __syncthreads();
#pragma unroll 2
    for (int i = threadIdx.x; i < T * WIDTH; i += THREADS) {
      const int64_t c = d0 + i % WIDTH;
      const int j = keys(i / WIDTH);
      const In* q = rows.query[i / WIDTH];
      if (KEYS)
        numbers[i] = q && c < a.d ? C(widen(q[c * a.q_stride[3]])) : C(0);
      else
        numbers[i] = j >= 0 && c < a.d ? C(widen(crystal::key<In>(a, b, g, j)[c * a.k_stride[3]])) : C(0);
    }
    __syncthreads();
#pragma unroll STEPS
    for (int i = 0; i < T; ++i) {
      C p[U], r[W];
#pragma unroll
      for (int u = 0; u < U; ++u)
        p[u] = KEYS ? ds.cells[i][threadIdx.x / 16 + 16 * u] : ds.cells[threadIdx.x / 16 + 16 * u][i];
#pragma unroll
      for (int v = 0; v < W; ++v) r[v] = numbers[i * WIDTH + threadIdx.x % 16 + 16 * v];
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int v = 0; v < W; ++v) sums[u][v] += p[u] * r[v];
    }
  }

  // f(which of the tile's own, which number of the block's, sum) of all that a thread has summed.
  template <class F>
  static __device__ __forceinline__ void each(const Sums& sums, const F& f) {
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int v = 0; v < WIDTH / 16; ++v)
        f(threadIdx.x / 16 + 16 * u, threadIdx.x % 16 + 16 * v, sums[u][v]);
  }
};

}  // namespace
}  // namespace crystal

#include "attn_tensor_cores.h"

// Calls f<On> on the units for the type of q and k.
#define ATTN_DISPATCH(type, f, ...)                      \
  switch (type) {                                        \
    case Float::f32:                                     \
      return f<FloatUnits<float, float>>(__VA_ARGS__);   \
    case Float::f64:                                     \
      return f<FloatUnits<double, double>>(__VA_ARGS__); \
    case Float::bf16:                                    \
      return f<TensorCores>(__VA_ARGS__);                \
    default:                                             \
      return f<FloatUnits<f16, float>>(__VA_ARGS__);     \
  }
