// Tiles of scores from bfloat16 on a GPU's tensor cores (sm_80 and later): the same tile as FloatUnits', with
// another layout of its cells.
//
// A warp's instruction multiplies 16 x 16 by 16 x 8 numbers. Products of two bfloat16 are exact in float32,
// in which they are summed: scores are as good as those of the float units. A gradient dS is not bfloat16: it
// is cut into two of them, high + low, 17 bits of it in all, and each is multiplied: twice the instructions,
// and gradients as good as float32's.
#pragma once
#include "attn_device_tiles.h"

namespace crystal {
namespace {

#ifdef __CUDACC__
// Four matrices of 8 x 8 two-byte numbers from shared memory: lanes 8 i .. 8 i + 7 say where the rows of
// the i-th begin, 16 aligned bytes each. Every lane gets two numbers of each, as `multiply_16_8_16` wants
// them; transposed if asked.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const bf16* row) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(row));
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
}

// sums [16,8] += a [16,16] b [16,8]. Lane l holds of sums rows l/4 and l/4 + 8, in each numbers 2
// (l%4) and the next.
__device__ __forceinline__ void multiply_16_8_16(float& s0, float& s1, float& s2, float& s3,
                                                 const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(s0), "+f"(s1), "+f"(s2), "+f"(s3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Warp w of eight holds rows 16 (w%4) .. and keys 32 (w/4) .. of a tile of 64 x 64.
struct TensorCores {
  typedef bf16 In;
  typedef float C;
  static constexpr int T = 64, U = 2, V = 8;
  static constexpr int LANES = 4, SHARES = 2;
  static constexpr int WIDTH = 128;
  static constexpr int DEPTH = 64;
  static constexpr int ROOM =
      8;  // numbers between two rows in shared memory: eight rows lie in different banks
  typedef float Sums[WIDTH / 16][4];
  struct Pool {
    alignas(16) bf16 numbers[2 * T * (DEPTH + ROOM)];
  };
  struct Gradients {
    alignas(16) bf16 high[T][T + ROOM];
    alignas(16) bf16 low[T][T + ROOM];
  };
  static_assert(2 * T * (DEPTH + ROOM) >= T * (WIDTH + ROOM),
                "the second product's tile shares the first one's memory");

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int rows_of_warp() { return threadIdx.x / 32 % 4 * 16; }
  static __device__ __forceinline__ int share_of_row() { return threadIdx.x / 128; }
  static __device__ __forceinline__ int row(int u) { return rows_of_warp() + lane() / 4 + 8 * u; }
  static __device__ __forceinline__ int key(int v) {
    return 32 * share_of_row() + 8 * (v / 2) + 2 * (lane() % 4) + v % 2;
  }

  // Whether every row of x begins at 16 aligned bytes and has its numbers side by side, so that
  // eight are one load.
  static __device__ __forceinline__ bool packed(const void* x, const int64_t (&stride)[4], int64_t d) {
    return stride[3] == 1 && (uint64_t(x) % 16 | (stride[0] | stride[1] | stride[2] | d) % 8) == 0;
  }

  // Numbers c0 .. of d of the tile's T rows or keys, whose i-th begins at `begin(i)` (null: zeros), to shared
  // memory; N of each.
  template <int N, class Begin>
  static __device__ __forceinline__ void fetch(bf16* to, const Begin& begin, int c0, int d, int64_t step,
                                               bool packed) {
    struct alignas(16) Eight {
      uint32_t x[4];
    };
    if (packed) {
#pragma unroll 2  // more need more registers than there are
      for (int e = 0; e < T * N / 8; e += THREADS) {
        const int i = (threadIdx.x + e) / (N / 8), n = (threadIdx.x + e) % (N / 8) * 8;
        const bf16* from = begin(i);
        Eight numbers = {};
        if (from && c0 + n < d) numbers = *(const Eight*)(from + c0 + n);
        *(Eight*)(to + i * (N + ROOM) + n) = numbers;
      }
    } else {
#pragma unroll 1
      for (int e = threadIdx.x; e < T * N; e += THREADS) {
        const int i = e / N, n = e % N;
        const bf16* from = begin(i);
        to[i * (N + ROOM) + n] = from && c0 + n < d ? from[(c0 + n) * step] : bf16{0};
      }
    }
  }

  // Where a key begins, null for none.
  template <class Where>
  struct KeyOf {
    const bf16* first;
    const int stride;
    const Where& keys;
    __device__ __forceinline__ KeyOf(const Attn& a, int64_t b, int64_t g, const Where& keys)
        : first(crystal::key<bf16>(a, b, g, 0)), stride(int(a.k_stride[2])), keys(keys) {}
    __device__ __forceinline__ const bf16* operator()(int i) const {
      const int j = keys(i);
      return j < 0 ? nullptr : first + int64_t(j) * stride;
    }
  };

  template <class Where>
  static __device__ __forceinline__ void products(const Attn& a, const Rows<TensorCores>& rows, int64_t b,
                                                  int64_t g, const Where& keys, Pool& pool,
                                                  float (&s)[U][V]) {
    bf16 *qs = pool.numbers, *ks = pool.numbers + T * (DEPTH + ROOM);
    const bool packed_q = packed(a.q, a.q_stride, a.d), packed_k = packed(a.k, a.k_stride, a.d);
    const auto query_of = [&](int i) { return rows.query[i]; };
    const KeyOf<Where> key_of(a, b, g, keys);
    const int d = int(a.d);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int v = 0; v < V; ++v) s[u][v] = 0;
    for (int c0 = 0; c0 < d; c0 += DEPTH) {
      __syncthreads();
      fetch<DEPTH>(qs, query_of, c0, d, a.q_stride[3], packed_q);
      fetch<DEPTH>(ks, key_of, c0, d, a.k_stride[3], packed_k);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < DEPTH; k += 16) {
        if (c0 + k >= d) break;
        uint32_t q[4], x[4];
        load_matrices<false>(q, qs + (rows_of_warp() + lane() % 16) * (DEPTH + ROOM) + k + lane() / 16 * 8);
#pragma unroll
        for (int v = 0; v < V; v += 4) {  // two times eight keys
          const int j = 32 * share_of_row() + 4 * v + lane() / 16 * 8 + lane() % 8;
          load_matrices<false>(x, ks + j * (DEPTH + ROOM) + k + lane() / 8 % 2 * 8);
          multiply_16_8_16(s[0][v], s[0][v + 1], s[1][v], s[1][v + 1], q, x[0], x[1]);
          multiply_16_8_16(s[0][v + 2], s[0][v + 3], s[1][v + 2], s[1][v + 3], q, x[2], x[3]);
        }
      }
    }
  }

  static __device__ __forceinline__ void store(Gradients& ds, const float (&s)[U][V]) {
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int v = 0; v < V; v += 2) {  // two neighbours
        const Pack<bf16, 2> high = {{narrow<bf16>(s[u][v]), narrow<bf16>(s[u][v + 1])}};
        const Pack<bf16, 2> low = {
            {narrow<bf16>(s[u][v] - widen(high.v[0])), narrow<bf16>(s[u][v + 1] - widen(high.v[1]))}};
        *(Pack<bf16, 2>*)&ds.high[row(u)][key(v)] = high;
        *(Pack<bf16, 2>*)&ds.low[row(u)][key(v)] = low;
      }
  }
  static __device__ __forceinline__ void add(Gradients& ds, int row, int key, float value) {
    const float sum = widen(ds.high[row][key]) + widen(ds.low[row][key]) + value;
    ds.high[row][key] = narrow<bf16>(sum);
    ds.low[row][key] = narrow<bf16>(sum - widen(ds.high[row][key]));
  }

  // Rows i0 .. (KEYS: keys) and numbers k .. of the other side of a tile of gradients, as the first
  // factor of a product.
  template <bool KEYS>
  static __device__ __forceinline__ void load_gradients(uint32_t (&x)[4], const bf16 (&cells)[T][T + ROOM],
                                                        int i0, int k) {
    if (KEYS)
      load_matrices<true>(x, &cells[k + lane() / 16 * 8 + lane() % 8][i0 + lane() / 8 % 2 * 8]);
    else
      load_matrices<false>(x, &cells[i0 + lane() % 16][k + lane() / 16 * 8]);
  }

  template <bool KEYS, class Where>
  static __device__ __forceinline__ void second(const Attn& a, const Rows<TensorCores>& rows, int64_t b,
                                                int64_t g, const Where& keys, int d0, const Gradients& ds,
                                                Pool& pool, Sums& sums) {
    bf16* numbers = pool.numbers;  // of the other side, [T][WIDTH + ROOM]
    const int d = int(a.d);
    __syncthreads();
    if (KEYS)
      fetch<WIDTH>(
          numbers, [&](int i) { return rows.query[i]; }, d0, d, a.q_stride[3], packed(a.q, a.q_stride, a.d));
    else
      fetch<WIDTH>(numbers, KeyOf<Where>(a, b, g, keys), d0, d, a.k_stride[3], packed(a.k, a.k_stride, a.d));
    __syncthreads();
#pragma unroll
    for (int k = 0; k < T; k += 16) {
      uint32_t high[4], low[4], x[4];
      load_gradients<KEYS>(high, ds.high, rows_of_warp(), k);
      load_gradients<KEYS>(low, ds.low, rows_of_warp(), k);
#pragma unroll
      for (int n = 0; n < WIDTH / 16; n += 2) {  // two times eight numbers
        const int c = WIDTH / 2 * share_of_row() + 8 * n;
        if (d0 + c >= d) break;
        load_matrices<true>(
            x, numbers + (k + lane() / 8 % 2 * 8 + lane() % 8) * (WIDTH + ROOM) + c + lane() / 16 * 8);
        multiply_16_8_16(sums[n][0], sums[n][1], sums[n][2], sums[n][3], high, x[0], x[1]);
        multiply_16_8_16(sums[n][0], sums[n][1], sums[n][2], sums[n][3], low, x[0], x[1]);
        multiply_16_8_16(sums[n + 1][0], sums[n + 1][1], sums[n + 1][2], sums[n + 1][3], high, x[2], x[3]);
        multiply_16_8_16(sums[n + 1][0], sums[n + 1][1], sums[n + 1][2], sums[n + 1][3], low, x[2], x[3]);
      }
    }
  }

  template <class F>
  static __device__ __forceinline__ void each(const Sums& sums, const F& f) {
#pragma unroll
    for (int n = 0; n < WIDTH / 16; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        f(row(e / 2), WIDTH / 2 * share_of_row() + 8 * n + 2 * (lane() % 4) + e % 2, sums[n][e]);
  }
};

}  // namespace
}  // namespace crystal
