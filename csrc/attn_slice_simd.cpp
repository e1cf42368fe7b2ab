// attn_slice on a CPU; attn_slice.h says what and why.
//
// Version 1 is crystal/attention.py: whole R x L arrays through PyTorch's matrix product, widened copies of q
// and k before it. Version 2, this one: tiles of 72 keys stay in the caches between product, exponential and
// product; bf16 is widened while it is packed, and nothing of size R x L is ever written.
#include "attn_tile.h"

namespace WIDTH {

// ---- forward: a unit is at most ROWS rows of one sequence and key head ------------------------------------

int64_t attn_slice_units(const Attn& a) { return a.B * a.G * row_chunks(a); }

template <class In, class T>
static void slice_(const Attn& a, int64_t unit, bool want_weights, const T* lse_in, T* lse_out, T* out) {
  const int64_t R = group_rows(a), from = unit % row_chunks(a) * ROWS, g = unit / row_chunks(a) % a.G,
                b = unit / row_chunks(a) / a.G;
  const Queries<In, T> q(a, b, g, from, R - from < ROWS ? R - from : ROWS);
  Keys<In, T> k(a);
  const int64_t first = (b * a.G + g) * R + from;  // the unit's row 0 in [B,H,M]
  buffer<T> s(KEYS * q.width), norm(q.width);
  if (want_weights) {
    Running<T> sum(padded<T>(q.n));
    for (int64_t j = 0; j <= q.last && !lse_in; j += KEYS) {
      k.range(a, b, g, j, q.last + 1);
      scores(a, b, q, 0, q.n, k, s.p, q.width);
      sum.add(s.p, k.n, q.width);
    }
    for (int64_t r = 0; r < q.n; ++r)
      lse_out[first + r] = norm.p[r] = lse_in ? lse_in[first + r] : sum.lse(r);
  }
  for (int64_t c = 0; c < a.K; c += KEYS) {
    k.columns(a, b, g, c);
    scores(a, b, q, 0, q.n, k, s.p, q.width);
    if (want_weights) weights(s.p, k.n, padded<T>(q.n), q.width, norm.p);
    for (int64_t r = 0; r < q.n; ++r)
      for (int64_t i = 0; i < k.n; ++i) out[(first + r) * a.K + c + i] = s.p[i * q.width + r];
  }
}

void attn_slice(const Attn& a, int64_t unit, bool want_weights, const void* lse_in, void* lse_out, void* out){
#define CALL(In, T)                                                                             \
  slice_<In, T>(a, unit, want_weights, static_cast<const T*>(lse_in), static_cast<T*>(lse_out), \
                static_cast<T*>(out))
    ATTN_TYPES(CALL)
#undef CALL
}

// ---- backward ----------------------------------------------------------------------------------------
// A unit is a range of keys of one sequence and key head, so that each key is written once; of scores, all
// columns.

int64_t attn_backward_chunks(const Attn& a, bool grad_through, int64_t threads) {
  if (!grad_through) return 1;
  const int64_t wanted = (threads + a.B * a.G - 1) / (a.B * a.G);
  return wanted < key_tiles(a) ? wanted : key_tiles(a);
}

template <class In, class T>
static void grad_(const Attn& a, int64_t unit, int64_t chunks, const ScoreGrad& t, T* dq_parts, In* dk,
                  const int64_t* dk_stride) {
  const int64_t chunk = unit % chunks, g = unit / chunks % a.G, b = unit / chunks / a.G, R = group_rows(a);
  const int64_t begin = key_tiles(a) * chunk / chunks * KEYS,
                end = key_tiles(a) * (chunk + 1) / chunks * KEYS;
  const int64_t first = (b * a.G + g) * R, depth = padded<T>(a.d);
  const T *grad_direct = static_cast<const T*>(t.grad_direct) + first * a.K,
          *lse = static_cast<const T*>(t.lse) + first;
  const T* grad_through = t.grad_through ? static_cast<const T*>(t.grad_through) + first : nullptr;
  const int64_t* cols = a.cols + b * a.K;

  const Queries<In, T> q(a, b, g, 0, R);
  Keys<In, T> k(a);
  const int64_t wide = pitch<T>(ROWS);
  buffer<T> s(KEYS * wide), norm(q.width), factor(q.width), dkeys(KEYS * k.ld), dq(dq_parts ? R * k.ld : 0);
  for (int64_t r = 0; grad_through && r < R; ++r) {
    norm.p[r] = lse[r] == NONE<T> ? T(0) : lse[r];  // a row that sees nothing: its scores are all -inf
    factor.p[r] = -grad_through[r];
  }
  const bool by_column = !grad_through;  // then no other key has a gradient
  for (int64_t j = by_column ? 0 : begin; j < (by_column ? a.K : end) && (by_column || j <= q.last);
       j += KEYS) {
    if (by_column)
      k.columns(a, b, g, j);
    else
      k.range(a, b, g, j, q.last + 1);
    dkeys.clear(KEYS * k.ld);
    for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
      const int64_t n = R - r0 < ROWS ? R - r0 : ROWS;
      auto add_direct = [&](int64_t i, int64_t c) {
        for (int64_t r = 0; r < n; ++r) s.p[i * wide + r] += grad_direct[(r0 + r) * a.K + c];
      };
      if (by_column) {
        s.clear(k.n * wide);
        for (int64_t i = 0; i < k.n; ++i) add_direct(i, j + i);
      } else {  // dS = -grad_through P + grad_direct
        scores(a, b, q, r0, n, k, s.p, wide);
        for (int64_t i = 0; i < k.n; ++i)
          for (int64_t r = 0; r < padded<T>(n); r += lanes<T>::N) {
            T* cell = s.p + i * wide + r;
            store(cell, exp(load(cell) - load(norm.p + r0 + r)) * load(factor.p + r0 + r));
          }
        for (int64_t c = 0; c < a.K; ++c)
          if (cols[c] >= j && cols[c] - j < k.n) add_direct(cols[c] - j, c);
      }
      if (dk) product<T, true>(k.n, depth, n, s.p, wide, 1, q.along.p + r0 * q.ld, q.ld, dkeys.p, k.ld);
      if (dq_parts) product<T, true>(n, depth, k.n, s.p, 1, wide, k.rows.p, k.ld, dq.p + r0 * k.ld, k.ld);
    }
    for (int64_t i = 0; dk && i < k.n; ++i)
      if (k.at[i] >= 0)
        add_to(dk + b * dk_stride[0] + g * dk_stride[1] + k.at[i] * dk_stride[2], dk_stride[3], a.d,
               dkeys.p + i * k.ld);
  }
  for (int64_t r = 0; dq_parts && r < R; ++r)
    for (int64_t c = 0; c < a.d; ++c)
      dq_parts[((chunk * a.B * a.G * R) + first + r) * a.d + c] = dq.p[r * k.ld + c] * T(a.scale);
}

void attn_backward(const Attn& a, int64_t unit, int64_t chunks, const ScoreGrad& t, void* dq_parts, void* dk,
                   const int64_t* dk_stride) {
#define CALL(In, T) \
  grad_<In, T>(a, unit, chunks, t, static_cast<T*>(dq_parts), static_cast<In*>(dk), dk_stride)
  ATTN_TYPES(CALL)
#undef CALL
}

template <class In, class T>
static void add_rows_(const Attn& a, int64_t unit, int64_t chunks, T* parts, In* dq, const int64_t* stride) {
  const int64_t b = unit / a.H, h = unit % a.H, all = a.B * a.H * a.M * a.d;
  const int64_t* rows = a.rows + b * a.M;
  T* mine = parts + (b * a.H + h) * a.M * a.d;
  auto earlier = [&](int64_t m) {
    int64_t i = 0;
    while (rows[i] != rows[m]) ++i;
    return i;
  };  // the first row at this position
  for (int64_t m = 0; m < a.M; ++m) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t c = 0; c < a.d; ++c) mine[m * a.d + c] += mine[chunk * all + m * a.d + c];
    if (const int64_t i = earlier(m); i < m)
      for (int64_t c = 0; c < a.d; ++c) mine[i * a.d + c] += mine[m * a.d + c];
  }
  for (int64_t m = 0; m < a.M; ++m) {
    if (rows[m] < 0 || earlier(m) < m) continue;
    add_to(dq + b * stride[0] + h * stride[1] + rows[m] * stride[2], stride[3], a.d, mine + m * a.d);
  }
}

void attn_add_rows(const Attn& a, int64_t unit, int64_t chunks, void* dq_parts, void* dq,
                   const int64_t* dq_stride) {
#define CALL(In, T) \
  add_rows_<In, T>(a, unit, chunks, static_cast<T*>(dq_parts), static_cast<In*>(dq), dq_stride)
  ATTN_TYPES(CALL)
#undef CALL
}

}  // namespace WIDTH
