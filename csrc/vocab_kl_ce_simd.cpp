// The CPU's inner loops of vocab_kl_ce (vocab_kl_ce.h says what and why), one row or part of a row at a time.
//
// A row is read once, but for its first tile of logits, which is looked at for its maximum before:
// exponentials are taken from there, and from a new maximum only where a later tile goes far beyond it. Lanes
// add up floats over a tile at most, tiles are added in double.
#include "simd.h"
#include "vocab_kl_ce.h"

namespace WIDTH {

constexpr int64_t TILE = 32 * BYTES;  // 1024 with AVX2: so many sums to a lane, whatever the width
template <class T>
constexpr T lowest();  // stands for what is beyond the end of a row: e^lowest is 0
template <>
constexpr float lowest<float>() {
  return -3.0e38f;
}
template <>
constexpr double lowest<double>() {
  return -1.0e300;
}
template <>
constexpr bf16 lowest<bf16>() {
  return {0xff61};
}  // -3.0e38

template <class T, bool BOTH>
static void sums_of(const T* z, const T* z2, int64_t n, Sums* out) {
  typedef typename lanes<T>::V V;
  typedef typename lanes<T>::C C;
  constexpr int STEP = 2 * lanes<T>::N, DEGREE = sizeof(T) == 2 ? 5 : 6;
  // A difference of two floats is rounded, the more the larger it is; that of two bfloat16 is not.
  constexpr double FAR = sizeof(T) == 2 ? 8 : 1;
  auto most_of_first = [n](const T* x) -> double {
    V top = V{} + lowest<C>();
    auto look = [&](two<V> v) { top = larger(larger(top, v.x), v.y); };
    for (int64_t i = 0; i < TILE && i < n; i += STEP)
      look(i + STEP <= n ? load_two(x + i) : load_two(x + i, int(n - i), lowest<T>()));
    return lane_max(top);
  };
  Sums o = {most_of_first(z), 0, BOTH ? most_of_first(z2) : double(lowest<C>()), 0, 0};
  for (int64_t at = 0; at < n; at += TILE) {
    const int64_t end = at + TILE < n ? at + TILE : n, full = at + (end - at) / STEP * STEP;
    const int tail = int(end - full);
    V s, s2, e, top, top2;
    for (;;) {
      const V shift = V{} + C(o.m), shift2 = V{} + C(o.m2);
      s = s2 = e = V{}, top = top2 = V{} + lowest<C>();
      auto add = [&](V x, V x2) {
        const V a = x - shift, p = exp<DEGREE>(a);
        top = larger(top, x);
        s += p;
        if (BOTH) {
          const V b = x2 - shift2;
          top2 = larger(top2, x2);
          s2 += exp<DEGREE>(b);
          e += p * (a - b);
        }
      };
      auto add_two = [&](two<V> v, two<V> v2) { add(v.x, v2.x), add(v.y, v2.y); };
      for (int64_t i = at; i < full; i += STEP) add_two(load_two(z + i), BOTH ? load_two(z2 + i) : two<V>{});
      if (tail)
        add_two(load_two(z + full, tail, lowest<T>()),
                BOTH ? load_two(z2 + full, tail, lowest<T>()) : two<V>{});
      const double most = lane_max(top), most2 = lane_max(top2);
      if (!(most > o.m + FAR) && !(most2 > o.m2 + FAR)) break;
      o = merged(o, Sums{most > o.m ? most : o.m, 0, most2 > o.m2 ? most2 : o.m2, 0, 0});
    }
    o.s += lane_sum(s), o.s2 += lane_sum(s2), o.e += lane_sum(e);
  }
  *out = o;
}

template <class T>
static void gradients_of(const T* z, const T* z2, T* d, T* d2, int64_t n, const Sums& row, const Above& g) {
  typedef typename lanes<T>::V V;
  typedef typename lanes<T>::C C;
  constexpr int STEP = 2 * lanes<T>::N;
  constexpr bool COARSE = sizeof(T) == 2;  // bfloat16's rounding hides an exponential's of degree 4
  const V m = V{} + C(row.m), m2 = V{} + C(row.m2), e = V{} + C(row.e), over_s = V{} + C(1 / row.s),
          over_s2 = V{} + C(1 / row.s2);
  auto all = [](double x) {
    return V{} + (x == x ? C(x) : C(__builtin_nan("")));
  };  // a NaN that rounding leaves one
  const V g_int = all(g.g_int), g_cor = all(g.g_cor), g_kl = all(g.g_kl), g_kl_int = all(g.g_kl_int);
  auto cell = [&](V x, V x2, V& y, V& y2) {
    V a = {}, b = {}, p = {}, q = {};
    if (z) a = x - m, p = rounded((COARSE ? exp<4>(a) : exp(a)) * over_s);
    if (z2) b = x2 - m2, q = rounded((COARSE ? exp<4>(b) : exp(b)) * over_s2);
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
    const double p = z ? __builtin_exp(a) / row.s : 0, q = z2 ? __builtin_exp(b) / row.s2 : 0;
    const bool both = z && z2;
    const double kl = !both ? 0 : second ? g.g_kl * (q - p) : g.g_kl_int * (p * ((a - b) - row.e));
    return kl + (second ? g.g_cor * (q - 1) : g.g_int * (p - 1));
  };
  const double own = d && g.label >= 0 ? at_label(g.label, false) : 0,
               own2 = d2 && g.label2 >= 0 ? at_label(g.label2, true) : 0;
  auto cells = [&](two<V> v, two<V> v2, two<V>& y, two<V>& y2) {
    cell(v.x, v2.x, y.x, y2.x), cell(v.y, v2.y, y.y, y2.y);
  };
  two<V> y, y2;
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    cells(z ? load_two(z + i) : two<V>{}, z2 ? load_two(z2 + i) : two<V>{}, y, y2);
    if (d) store_two(d + i, y);
    if (d2) store_two(d2 + i, y2);
  }
  if (const int tail = int(n - i)) {
    cells(z ? load_two(z + i, tail, lowest<T>()) : two<V>{},
          z2 ? load_two(z2 + i, tail, lowest<T>()) : two<V>{}, y, y2);
    if (d) store_two(d + i, tail, y);
    if (d2) store_two(d2 + i, tail, y2);
  }
  if (d && g.label >= 0) narrow(d + g.label, own);
  if (d2 && g.label2 >= 0) narrow(d2 + g.label2, own2);
}

template <class T>
static void sums(const void* z, const void* z2, int64_t n, Sums* out) {
  if (z && z2) return sums_of<T, true>((const T*)z, (const T*)z2, n, out);
  sums_of<T, false>((const T*)(z ? z : z2), nullptr, n, out);
  if (!z) out->m2 = out->m, out->s2 = out->s;
}

void vocab_kl_ce_sums(Float type, const void* z, const void* z2, int64_t n, Sums* out) {
  if (type == Float::f32) sums<float>(z, z2, n, out);
  if (type == Float::f64) sums<double>(z, z2, n, out);
  if (type == Float::bf16) sums<bf16>(z, z2, n, out);
}

void vocab_kl_ce_gradients(Float type, const void* z, const void* z2, void* d, void* d2, int64_t n,
                           const Sums& row, const Above& g) {
  if (type == Float::f32) gradients_of((const float*)z, (const float*)z2, (float*)d, (float*)d2, n, row, g);
  if (type == Float::f64)
    gradients_of((const double*)z, (const double*)z2, (double*)d, (double*)d2, n, row, g);
  if (type == Float::bf16) gradients_of((const bf16*)z, (const bf16*)z2, (bf16*)d, (bf16*)d2, n, row, g);
}

}  // namespace WIDTH
