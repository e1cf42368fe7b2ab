// Building blocks of the attention kernels on a CPU: a product of small tiles, and the packing
// of queries and keys.
//
// Scores are held transposed, S^T [keys][rows], a vector holding rows of attention: then the softmax over
// keys needs no sum across a vector, and the three products (S^T = K Q^T, dQ += dS K, dK = dS^T Q) all have
// the form of `product` below, which reads one operand number by number and the other in vectors, in
// whatever order they lie.
#pragma once
#include <stdlib.h>

#include "attn_slice.h"
#include "simd.h"

namespace WIDTH {

constexpr int BLOCK =
    BYTES == 64 ? 12 : 6;  // rows of a block of `product`: its 2 BLOCK sums fit the registers
constexpr int KEYS = 72;   // keys of a tile, a multiple of BLOCK
constexpr int ROWS = 224;  // rows of a tile: 72 x 224 scores stay in the second-level cache
template <class T>
constexpr int PAIR = 2 * lanes<T>::N;  // lanes of two vectors
template <class T>
constexpr T NONE = -T(__builtin_inf());

template <class T>
struct buffer {  // n numbers at a multiple of 64 bytes, zeros
  T* p;
  explicit buffer(int64_t n) : p(static_cast<T*>(aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64))) {
    clear(n);
  }
  buffer(const buffer&) = delete;
  ~buffer() { free(p); }
  void clear(int64_t n) { __builtin_memset(static_cast<void*>(p), 0, n * sizeof(T)); }
};

// n rounded up to whole pairs of vectors; and the distance of rows of n numbers: beyond that an odd count of
// cache lines, so that the cells of one column do not share the sets of a cache.
template <class T>
static inline int64_t padded(int64_t n) {
  return (n + PAIR<T> - 1) / PAIR<T> * PAIR<T>;
}
template <class T>
static inline int64_t pitch(int64_t n) {
  const int64_t line = 64 / sizeof(T);
  return ((padded<T>(n) + line - 1) / line | 1) * line;
}

// ---- a product of small matrices ----------------------------------------------------------------------
// C [rows][cols] (+)= A B with A(i,p) = a[i a_row + p a_step] and B(p,j) = b[p b_step + j].
// cols is a multiple of PAIR.

template <class T, int R, bool ADD>
static inline void block(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
                         T* c, int64_t c_row) {
  typedef typename lanes<T>::V V;
  constexpr int N = lanes<T>::N;
  V x[R], y[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    x[i] = ADD ? load(c + i * c_row) : V{};
    y[i] = ADD ? load(c + i * c_row + N) : V{};
  }
  for (int64_t p = 0; p < depth; ++p, a += a_step, b += b_step) {
    const V u = load(b), v = load(b + N);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const T s = a[i * a_row];
      x[i] += u * s;
      y[i] += v * s;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    store(c + i * c_row, x[i]);
    store(c + i * c_row + N, y[i]);
  }
}

template <class T, bool ADD, int R = BLOCK>  // min(rows, BLOCK) rows
static inline void some(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b,
                        int64_t b_step, T* c, int64_t c_row) {
  if (rows >= R) return block<T, R, ADD>(depth, a, a_row, a_step, b, b_step, c, c_row);
  if constexpr (R > 1) some<T, ADD, R - 1>(rows, depth, a, a_row, a_step, b, b_step, c, c_row);
}

template <class T, bool ADD>
static void product(int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t a_row, int64_t a_step,
                    const T* b, int64_t b_step, T* c, int64_t c_row) {
  for (int64_t j = 0; j < cols; j += PAIR<T>)
    for (int64_t i = 0; i < rows; i += BLOCK)
      some<T, ADD>(rows - i, depth, a + i * a_row, a_row, a_step, b + j, b_step, c + i * c_row + j, c_row);
}

// ---- packing ----------------------------------------------------------------------------------------------

// to = factor * n numbers of q or k, `step` apart; and to += from, rounded to their type.
template <class In, class T>
static inline void unpack(const In* from, int64_t step, int64_t n, T factor, T* to) {
  int64_t i = 0;
  for (; step == 1 && i + lanes<T>::N <= n; i += lanes<T>::N) store(to + i, load(from + i) * factor);
  for (; i < n; ++i) to[i] = widen(from[i * step]) * factor;
}
template <class In, class T>
static inline void add_to(In* to, int64_t step, int64_t n, const T* from) {
  int64_t i = 0;
  for (; step == 1 && i + lanes<T>::N <= n; i += lanes<T>::N) store(to + i, load(to + i) + load(from + i));
  for (; i < n; ++i) narrow(to + i * step, widen(to[i * step]) + from[i]);
}

static inline int64_t group_rows(const Attn& a) { return a.H / a.G * a.M; }  // R
static inline int64_t row_chunks(const Attn& a) { return (group_rows(a) + ROWS - 1) / ROWS; }
static inline int64_t key_tiles(const Attn& a) { return (a.L + KEYS - 1) / KEYS; }

// Rows from .. from+n of the R of one sequence and key head: row r is head r / M of the group, chosen
// row r % M.
template <class In, class T>
struct Queries {
  int64_t from, n, width, ld, last;  // width: pitch over rows, ld: pitch over d; last: their last position
  T least;                           // their first one
  buffer<T> across, along, at;       // scale q as [d][width] and as [n][ld]; positions, -1 padding

  Queries(const Attn& a, int64_t b, int64_t g, int64_t from, int64_t n)
      : from(from),
        n(n),
        width(pitch<T>(n)),
        ld(pitch<T>(a.d)),
        last(-1),
        least(T(1e9)),
        across(a.d * width),
        along(n * ld),
        at(width) {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t h = g * (a.H / a.G) + (from + r) / a.M, position = a.rows[b * a.M + (from + r) % a.M];
      at.p[r] = T(position);
      if (T(position) < least) least = T(position);
      if (position > last) last = position;
      if (position < 0) continue;
      const In* q =
          static_cast<const In*>(a.q) + b * a.q_stride[0] + h * a.q_stride[1] + position * a.q_stride[2];
      unpack(q, a.q_stride[3], a.d, T(a.scale), along.p + r * ld);
      for (int64_t c = 0; c < a.d; ++c) across.p[c * width + r] = along.p[r * ld + c];
    }
  }
};

// Up to KEYS keys of one sequence and key head, anywhere; position -1 gives zeros.
template <class In, class T>
struct Keys {
  int64_t n, ld, at[KEYS];
  buffer<T> rows;  // [KEYS][ld]

  explicit Keys(const Attn& a) : n(0), ld(pitch<T>(a.d)), rows(KEYS * ld) {}
  void range(const Attn& a, int64_t b, int64_t g, int64_t from, int64_t to) {
    n = to - from < KEYS ? to - from : KEYS;
    for (int64_t i = 0; i < n; ++i) at[i] = from + i;
    read(a, b, g);
  }
  void columns(const Attn& a, int64_t b, int64_t g, int64_t from) {
    n = a.K - from < KEYS ? a.K - from : KEYS;
    for (int64_t i = 0; i < n; ++i) at[i] = a.cols[b * a.K + from + i];
    read(a, b, g);
  }
  void read(const Attn& a, int64_t b, int64_t g) {
    for (int64_t i = 0; i < n; ++i) {
      const In* k = static_cast<const In*>(a.k) + b * a.k_stride[0] + g * a.k_stride[1] +
                    (at[i] < 0 ? 0 : at[i]) * a.k_stride[2];
      unpack(k, a.k_stride[3], a.d, at[i] < 0 ? T(0) : T(1), rows.p + i * ld);
    }
  }
};

// S^T [keys][ld] of rows first .. first+n of q (first a multiple of ROWS): products, bias, and -inf where a
// row does not see a key.
template <class In, class T>
static void scores(const Attn& a, int64_t b, const Queries<In, T>& q, int64_t first, int64_t n,
                   const Keys<In, T>& k, T* s, int64_t ld) {
  typedef typename lanes<T>::V V;
  const int64_t wide = padded<T>(n);
  product<T, false>(k.n, wide, a.d, k.rows.p, k.ld, 1, q.across.p + first, q.width, s, ld);
  for (int64_t i = 0; i < k.n; ++i) {
    T* row = s + i * ld;
    const int64_t j = k.at[i];
    const bool nobody = j < 0 || (a.padding && a.padding[b * a.L + j]);
    if (!nobody && a.bias) {
      const T* bias = static_cast<const T*>(a.bias) + b * a.M * a.L + j;
      for (int64_t r = 0, m = (q.from + first) % a.M; r < n; ++r, m = m + 1 < a.M ? m + 1 : 0)
        row[r] += bias[m * a.L];
    }
    if (!nobody && T(j) <= q.least) continue;  // everybody
    const V position = V{} + (nobody ? T(2e9) : T(j));
    for (int64_t r = 0; r < wide; r += lanes<T>::N)
      store(row + r, load(q.at.p + first + r) < position ? V{} + NONE<T> : load(row + r));
  }
}

// log sum exp over keys of each of `width` rows, from tiles of S^T: a running maximum, and the sum
// of exp beneath it.
template <class T>
struct Running {
  int64_t width;
  buffer<T> top, sum;
  explicit Running(int64_t width) : width(width), top(width), sum(width) {
    for (int64_t r = 0; r < width; ++r) top.p[r] = NONE<T>;
  }
  void add(const T* s, int64_t keys, int64_t ld) {
    typedef typename lanes<T>::V V;
    for (int64_t r = 0; r < width; r += lanes<T>::N) {
      const V before = load(top.p + r);
      V now = before;
      for (int64_t i = 0; i < keys; ++i) now = larger(now, load(s + i * ld + r));
      const V base = now == V{} + NONE<T> ? V{} : now;  // no key seen yet: -inf - (-inf) would be NaN
      V total = load(sum.p + r) * exp(before - base);
      for (int64_t i = 0; i < keys; ++i) total += exp(load(s + i * ld + r) - base);
      store(top.p + r, now);
      store(sum.p + r, total);
    }
  }
  T lse(int64_t r) const { return sum.p[r] == 0 ? NONE<T> : top.p[r] + T(__builtin_log(double(sum.p[r]))); }
};

// exp(s - lse) in place, 0 for a hidden cell whatever lse is.
template <class T>
static void weights(T* s, int64_t keys, int64_t width, int64_t ld, const T* lse) {
  typedef typename lanes<T>::V V;
  for (int64_t i = 0; i < keys; ++i)
    for (int64_t r = 0; r < width; r += lanes<T>::N) {
      const V x = load(s + i * ld + r);
      store(s + i * ld + r, x == V{} + NONE<T> ? V{} : exp(x - load(lse + r)));
    }
}

// CALL(In, T) for the type of q and k, and the type that is computed in.
#define ATTN_TYPES(CALL)    \
  switch (a.type) {         \
    case Float::f64:        \
      CALL(double, double); \
      break;                \
    case Float::bf16:       \
      CALL(bf16, float);    \
      break;                \
    default:                \
      CALL(float, float);   \
  }

}  // namespace WIDTH
