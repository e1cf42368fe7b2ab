// The CPU's inner loops of vocab_kl_ce (vocab_kl_ce.h says what and why), one row or part of a row at a time.
//
// A tile of 1024 logits is looked at twice: for its maximum, and, now out of the first-level cache, for its sums. So an exponential is
// taken once and nothing is rescaled but once a tile. Lanes add up floats over a tile at most, tiles are added in double.
#include "vocab_kl_ce.h"

#include "simd.h"

namespace WIDTH {

constexpr int64_t TILE = 1024;
template <class T> constexpr T lowest();  // stands for what is beyond the end of a row: e^lowest is 0
template <> constexpr float lowest<float>() { return -3.0e38f; }
template <> constexpr double lowest<double>() { return -1.0e300; }
template <> constexpr bf16 lowest<bf16>() { return {0xff61}; }  // -3.0e38

template <class T, bool BOTH> static void sums_of(const T* z, const T* z2, int64_t n, Sums* out) {
  typedef typename lanes<T>::V V;
  typedef typename lanes<T>::C C;
  constexpr int STEP = 2 * lanes<T>::N;
  Sums o = {lowest<double>(), 0, lowest<double>(), 0, 0};
  for (int64_t at = 0; at < n; at += TILE) {
    const int64_t end = at + TILE < n ? at + TILE : n, full = at + (end - at) / STEP * STEP;
    const int tail = int(end - full);
    V top = V{} + lowest<C>(), top2 = top;
    auto look = [&](two<V> v, two<V> v2) {
      top = larger(larger(top, v.x), v.y);
      if (BOTH) top2 = larger(larger(top2, v2.x), v2.y);
    };
    for (int64_t i = at; i < full; i += STEP) look(load_two(z + i), BOTH ? load_two(z2 + i) : two<V>{});
    if (tail) look(load_two(z + full, tail, lowest<T>()), BOTH ? load_two(z2 + full, tail, lowest<T>()) : two<V>{});
    const double m = lane_max(top) > o.m ? double(lane_max(top)) : o.m, m2 = BOTH && lane_max(top2) > o.m2 ? double(lane_max(top2)) : o.m2;
    const V shift = V{} + C(m), shift2 = V{} + C(m2);
    V s = {}, s2 = {}, e = {};
    auto add = [&](V x, V x2) {
      const V a = x - shift, p = exp(a);
      s += p;
      if (BOTH) {
        const V b = x2 - shift2;
        s2 += exp(b);
        e += p * (a - b);
      }
    };
    auto add_two = [&](two<V> v, two<V> v2) { add(v.x, v2.x), add(v.y, v2.y); };
    for (int64_t i = at; i < full; i += STEP) add_two(load_two(z + i), BOTH ? load_two(z2 + i) : two<V>{});
    if (tail) add_two(load_two(z + full, tail, lowest<T>()), BOTH ? load_two(z2 + full, tail, lowest<T>()) : two<V>{});
    const Sums tile = {m, lane_sum(s), m2, lane_sum(s2), lane_sum(e)};
    o = merged(o, tile);
  }
  *out = o;
}

template <class T> static void slopes_of(const T* z, const T* z2, T* d, T* d2, int64_t n, const Sums& row, const Slopes& g) {
  typedef typename lanes<T>::V V;
  typedef typename lanes<T>::C C;
  constexpr int STEP = 2 * lanes<T>::N;
  const V m = V{} + C(row.m), m2 = V{} + C(row.m2), e = V{} + C(row.e), over_s = V{} + C(1 / row.s), over_s2 = V{} + C(1 / row.s2);
  const V g_int = V{} + C(g.g_int), g_cor = V{} + C(g.g_cor), g_kl = V{} + C(g.g_kl), g_kl_int = V{} + C(g.g_kl_int);
  auto cell = [&](V x, V x2, V& y, V& y2) {
    V a = {}, b = {}, p = {}, q = {};
    if (z) a = x - m, p = rounded(exp(a) * over_s);
    if (z2) b = x2 - m2, q = rounded(exp(b) * over_s2);
    y = g_int * p;
    y2 = g_cor * q;
    if (z && z2) {
      y += g_kl_int * (p * ((a - b) - e));
      y2 += g_kl * (q - p);
    }
  };
  // The labels' cells, in double and before d may have overwritten z.
  auto at_label = [&](int64_t t, bool second) {
    const double a = z ? widen(z[t]) - row.m : 0, b = z2 ? widen(z2[t]) - row.m2 : 0;
    const double p = z ? __builtin_exp(a) / row.s : 0, q = z2 ? __builtin_exp(b) / row.s2 : 0, both = z && z2;
    return second ? g.g_cor * (q - 1) + both * g.g_kl * (q - p) : g.g_int * (p - 1) + both * g.g_kl_int * (p * ((a - b) - row.e));
  };
  const double own = d && g.label >= 0 ? at_label(g.label, false) : 0, own2 = d2 && g.label2 >= 0 ? at_label(g.label2, true) : 0;
  auto cells = [&](two<V> v, two<V> v2, two<V>& y, two<V>& y2) { cell(v.x, v2.x, y.x, y2.x), cell(v.y, v2.y, y.y, y2.y); };
  two<V> y, y2;
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    cells(z ? load_two(z + i) : two<V>{}, z2 ? load_two(z2 + i) : two<V>{}, y, y2);
    if (d) store_two(d + i, y);
    if (d2) store_two(d2 + i, y2);
  }
  if (const int tail = int(n - i)) {
    cells(z ? load_two(z + i, tail, lowest<T>()) : two<V>{}, z2 ? load_two(z2 + i, tail, lowest<T>()) : two<V>{}, y, y2);
    if (d) store_two(d + i, tail, y);
    if (d2) store_two(d2 + i, tail, y2);
  }
  if (d && g.label >= 0) narrow(d + g.label, own);
  if (d2 && g.label2 >= 0) narrow(d2 + g.label2, own2);
}

template <class T> static void sums(const void* z, const void* z2, int64_t n, Sums* out) {
  if (z && z2) return sums_of<T, true>((const T*)z, (const T*)z2, n, out);
  sums_of<T, false>((const T*)(z ? z : z2), nullptr, n, out);
  if (!z) out->m2 = out->m, out->s2 = out->s;
}

void vocab_kl_ce_sums(Float type, const void* z, const void* z2, int64_t n, Sums* out) {
  if (type == Float::f32) sums<float>(z, z2, n, out);
  if (type == Float::f64) sums<double>(z, z2, n, out);
  if (type == Float::bf16) sums<bf16>(z, z2, n, out);
}

void vocab_kl_ce_slopes(Float type, const void* z, const void* z2, void* d, void* d2, int64_t n, const Sums& row, const Slopes& g) {
  if (type == Float::f32) slopes_of((const float*)z, (const float*)z2, (float*)d, (float*)d2, n, row, g);
  if (type == Float::f64) slopes_of((const double*)z, (const double*)z2, (double*)d, (double*)d2, n, row, g);
  if (type == Float::bf16) slopes_of((const bf16*)z, (const bf16*)z2, (bf16*)d, (bf16*)d2, n, row, g);
}

}  // namespace WIDTH
