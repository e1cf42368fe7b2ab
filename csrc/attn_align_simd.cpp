// attn_align on a CPU; attn_align.h says what and why.
//
// Version 1 is losses.attn_align in plain PyTorch: slices written out, widened copies of q and k, for
// frobenius M x L scores kept. Version 2, this one: both paths' tiles of scores lie in the caches side by
// side, and only sums over a row leave them.
#include "attn_align.h"
#include "attn_tile.h"

namespace WIDTH {

int64_t attn_align_units(const Align& p) { return p.int_.B * p.int_.G * row_chunks(p.int_); }

// Calls f(x, y) for every pair of vectors of two tiles, in which it may change them.
template <class T, class F>
static inline void pairs(T* x, T* y, int64_t keys, int64_t width, int64_t ld, F f) {
  for (int64_t i = 0; i < keys; ++i)
    for (int64_t r = 0; r < width; r += lanes<T>::N) {
      typename lanes<T>::V u = load(x + i * ld + r), v = load(y + i * ld + r);
      f(i, r, u, v);
      store(x + i * ld + r, u);
      store(y + i * ld + r, v);
    }
}

template <class V>
static inline auto either_hidden(V x, V y) {
  const V none = V{} - __builtin_inff();
  return (x == none) | (y == none);
}

template <class In, class T>
static void align_(const Align& p, int64_t unit, const T* lse_in, const AlignRows& out) {
  typedef typename lanes<T>::V V;
  const Attn& a = p.int_;
  const int64_t R = group_rows(a), from = unit % row_chunks(a) * ROWS, g = unit / row_chunks(a) % a.G,
                b = unit / row_chunks(a) / a.G;
  const int64_t n = R - from < ROWS ? R - from : ROWS, half = a.B * a.H * a.M,
                first = (b * a.G + g) * R + from, wide = padded<T>(n);
  const Queries<In, T> q(a, b, g, from, n), q2(p.cor, b, g, from, n);
  Keys<In, T> k(a), k2(a);
  buffer<T> s(KEYS * q.width), s2(KEYS * q.width), norm(q.width), norm2(q.width), value(q.width),
      grad_through(q.width), through2(q.width);
  T *norms = static_cast<T*>(out.norm) + first, *throughs = static_cast<T*>(out.grad_through) + first;
  auto tile =
      [&](int64_t c) {  // scores of the columns from c on; of kl, what either path hides is hidden in both
        k.columns(a, b, g, c);
        k2.columns(p.cor, b, g, c);
        scores(a, b, q, 0, n, k, s.p, q.width);
        scores(p.cor, b, q2, 0, n, k2, s2.p, q.width);
        if (p.kl)
          pairs(s.p, s2.p, k.n, wide, q.width, [](int64_t, int64_t, V& x, V& y) {
            const auto hidden = either_hidden(x, y);
            x = hidden ? V{} + NONE<T> : x;
            y = hidden ? V{} + NONE<T> : y;
          });
      };

  Running<T> sum(wide), sum2(wide);
  if (p.kl) {
    for (int64_t c = 0; c < a.K; c += KEYS) {
      tile(c);
      sum.add(s.p, k.n, q.width);
      sum2.add(s2.p, k.n, q.width);
    }
  } else if (!lse_in) {
    for (int64_t j = 0; j <= q.last; j += KEYS) {
      k.range(a, b, g, j, q.last + 1);
      scores(a, b, q, 0, n, k, s.p, q.width);
      sum.add(s.p, k.n, q.width);
      k2.range(p.cor, b, g, j, q.last + 1);
      scores(p.cor, b, q2, 0, n, k2, s2.p, q.width);
      sum2.add(s2.p, k2.n, q.width);
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    norms[r] = norm.p[r] = lse_in && !p.kl ? lse_in[first + r] : sum.lse(r);
    norms[half + r] = norm2.p[r] = lse_in && !p.kl ? lse_in[half + first + r] : sum2.lse(r);
  }

  for (int64_t c = 0; c < a.K; c += KEYS) {
    if (!p.kl || a.K > KEYS) tile(c);  // else it is still there
    if (p.kl) {
      pairs(s.p, s2.p, k.n, wide, q.width, [&](int64_t, int64_t r, V& x, V& y) {
        const V log_p = x - load(norm.p + r), log_q = y - load(norm2.p + r), u = exp(log_p), v = exp(log_q);
        // The last two cancel in the sum; with them a cell is flat where p = q, and what rounding does to it
        // is of second order.
        const V cell = u * (log_p - log_q) - u + v;
        store(value.p + r, load(value.p + r) + (x == V{} + NONE<T> ? V{} : cell));
      });
    } else {
      weights(s.p, k.n, wide, q.width, norm.p);
      weights(s2.p, k.n, wide, q.width, norm2.p);
      pairs(s.p, s2.p, k.n, wide, q.width, [&](int64_t, int64_t r, V& x, V& y) {
        const V apart = x - y;
        store(value.p + r, load(value.p + r) + apart * apart);
        store(grad_through.p + r, load(grad_through.p + r) + apart * x * T(2));
        store(through2.p + r, load(through2.p + r) - apart * y * T(2));
      });
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    static_cast<T*>(out.value)[first + r] = value.p[r];
    if (!p.kl) throughs[r] = grad_through.p[r], throughs[half + r] = through2.p[r];
  }
}

void attn_align(const Align& p, int64_t unit, const void* lse_in, const AlignRows& out) {
  const Attn& a = p.int_;
#define CALL(In, T) align_<In, T>(p, unit, static_cast<const T*>(lse_in), out)
  ATTN_TYPES(CALL)
#undef CALL
}

// kl: a unit goes through the columns of one sequence and key head. frobenius: through a range of its keys.
int64_t attn_align_chunks(const Align& p, int64_t threads) {
  const int64_t wanted = p.kl ? 1 : (threads + p.int_.B * p.int_.G - 1) / (p.int_.B * p.int_.G);
  return wanted < key_tiles(p.int_) ? wanted : key_tiles(p.int_);
}

template <class In, class T>
struct AlignPath {  // what the backward pass holds of one path
  const Attn& a;
  Queries<In, T> q;
  Keys<In, T> k;
  buffer<T> s, norm, grad_through, dkeys, dq;
  AlignPath(const Attn& a, int64_t b, int64_t g, int64_t R)
      : a(a),
        q(a, b, g, 0, R),
        k(a),
        s(KEYS * pitch<T>(ROWS)),
        norm(q.width),
        grad_through(q.width),
        dkeys(KEYS * k.ld),
        dq(R * k.ld) {}
};

template <class In, class T>
static void align_backward_(const Align& p, int64_t unit, int64_t chunks, const T* g_rows,
                            const AlignRows& kept, bool teacher_grad, T* dq_parts, In* dk,
                            const int64_t* dk_stride) {
  typedef typename lanes<T>::V V;
  const Attn& a = p.int_;
  const int64_t chunk = unit % chunks, g = unit / chunks % a.G, b = unit / chunks / a.G, R = group_rows(a);
  const int64_t half = a.B * a.H * a.M, first = (b * a.G + g) * R, depth = padded<T>(a.d),
                ld = pitch<T>(ROWS);
  const int64_t* cols = a.cols + b * a.K;
  AlignPath<In, T> paths[2] = {{p.int_, b, g, R}, {p.cor, b, g, R}};
  buffer<T> gradient(paths[0].q.width), value(paths[0].q.width);
  for (int64_t r = 0; r < R; ++r) {
    gradient.p[r] = g_rows[first + r];
    value.p[r] = static_cast<T*>(kept.value)[first + r];
    for (int64_t i = 0; i < 2; ++i) {
      const T norm = static_cast<T*>(kept.norm)[i * half + first + r];
      paths[i].norm.p[r] = norm == NONE<T> ? T(0) : norm;  // a row that sees nothing: its scores are all -inf
      if (!p.kl)
        paths[i].grad_through.p[r] = gradient.p[r] * static_cast<T*>(kept.grad_through)[i * half + first + r];
    }
  }
  const int64_t last = paths[0].q.last, tiles = key_tiles(a);
  const int64_t begin = p.kl ? 0 : tiles * chunk / chunks * KEYS,
                end = p.kl ? a.K : tiles * (chunk + 1) / chunks * KEYS;
  for (int64_t j = begin; j < end && (p.kl || j <= last); j += KEYS) {
    T times[KEYS] = {};  // how often a key of this tile is a column
    for (auto& path : paths) {
      if (p.kl)
        path.k.columns(path.a, b, g, j);
      else
        path.k.range(path.a, b, g, j, last + 1);
      path.dkeys.clear(KEYS * path.k.ld);
    }
    for (int64_t c = 0; c < a.K && !p.kl; ++c)
      if (cols[c] >= j && cols[c] < j + KEYS) times[cols[c] - j] += 1;
    for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
      const int64_t n = R - r0 < ROWS ? R - r0 : ROWS;
      for (auto& path : paths) scores(path.a, b, path.q, r0, n, path.k, path.s.p, ld);
      const T *norm = paths[0].norm.p + r0, *norm2 = paths[1].norm.p + r0;
      if (p.kl) {
        pairs(paths[0].s.p, paths[1].s.p, paths[0].k.n, padded<T>(n), ld,
              [&](int64_t, int64_t r, V& x, V& y) {
                const auto hidden = either_hidden(x, y);
                const V up = load(gradient.p + r0 + r), log_p = x - load(norm + r),
                        log_q = y - load(norm2 + r), u = exp(log_p), v = exp(log_q);
                x = hidden ? V{} : up * u * (log_p - log_q - load(value.p + r0 + r));
                y = hidden ? V{} : up * (v - u);
              });
      } else {
        weights(paths[0].s.p, paths[0].k.n, padded<T>(n), ld, norm);
        weights(paths[1].s.p, paths[1].k.n, padded<T>(n), ld, norm2);
        pairs(paths[0].s.p, paths[1].s.p, paths[0].k.n, padded<T>(n), ld,
              [&](int64_t i, int64_t r, V& x, V& y) {
                const V apart = (x - y) * (load(gradient.p + r0 + r) * (T(2) * times[i]));
                x = x * (apart - load(paths[0].grad_through.p + r0 + r));
                y = y * (-apart - load(paths[1].grad_through.p + r0 + r));
              });
      }
      for (auto& path : paths) {
        if (&path == paths && !teacher_grad) continue;
        if (dk)
          product<T, true>(path.k.n, depth, n, path.s.p, ld, 1, path.q.along.p + r0 * path.q.ld, path.q.ld,
                           path.dkeys.p, path.k.ld);
        if (dq_parts)
          product<T, true>(n, depth, path.k.n, path.s.p, 1, ld, path.k.rows.p, path.k.ld,
                           path.dq.p + r0 * path.k.ld, path.k.ld);
      }
    }
    for (int64_t half_of = teacher_grad ? 0 : 1; dk && half_of < 2; ++half_of) {
      const auto& path = paths[half_of];
      for (int64_t i = 0; i < path.k.n; ++i)
        if (path.k.at[i] >= 0)
          add_to(dk + (half_of * a.B + b) * dk_stride[0] + g * dk_stride[1] + path.k.at[i] * dk_stride[2],
                 dk_stride[3], a.d, path.dkeys.p + i * path.k.ld);
    }
  }
  for (int64_t i = 0; dq_parts && i < 2; ++i)
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < a.d; ++c)
        dq_parts[((2 * chunk + i) * half + first + r) * a.d + c] =
            paths[i].dq.p[r * paths[i].k.ld + c] * T(a.scale);
}

void attn_align_backward(const Align& p, int64_t unit, int64_t chunks, const void* g, const AlignRows& kept,
                         bool teacher_grad, void* dq_parts, void* dk, const int64_t* dk_stride) {
  const Attn& a = p.int_;
#define CALL(In, T)                                                                     \
  align_backward_<In, T>(p, unit, chunks, static_cast<const T*>(g), kept, teacher_grad, \
                         static_cast<T*>(dq_parts), static_cast<In*>(dk), dk_stride)
  ATTN_TYPES(CALL)
#undef CALL
}

}  // namespace WIDTH
