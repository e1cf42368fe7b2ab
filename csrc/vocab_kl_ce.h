// vocab_kl_ce: cross entropy of two paths and the KL between them, row by row of their logits.
//
// N rows, V vocabulary. A row n has logits z (intact path) and z' (corrupted path), of which one may be
// absent; p, q are their softmaxes, t, t' their labels, y, y' the one-hot rows of these:
//
//     ce_int = log sum exp z - z_t             d/dz  =  g_int (p - y)  +  g_kl p (log p - log q - KL)
//     ce_cor = log sum exp z' - z'_t'          d/dz' =  g_cor (q - y') +  g_kl (q - p)
//     KL     = sum p (log p - log q)
//
// with g the gradients that come from above. One pass suffices for all three values: with m, m' the maxima of
// the row and a = z - m, b = z' - m', it keeps  s = sum e^a,  s' = sum e^b,  e = sum e^a (a - b) / s,  and
// KL = e - log s + log s'. A larger maximum found on the way rescales what was summed: s by f = e^(m_old -
// m_new), and e, which holds m and m', by e <- f (e + s (shift' - shift)). The gradient needs the five
// numbers and no sum: log p - log q - KL = (a - b) - e. Equal logits give e = 0 and s = s', so a KL of
// exactly 0 and, p and q being equal to the bit, a gradient of exactly 0.
//
// Bytes: forward reads both logits once, backward reads them once and writes as much: 3 x 2 N V
// bytes-per-logit, the least with gradients that follow what comes from above. (To write them in the forward
// would take 2 x 2 N V, and fix those weights there.) Operations: 2 exponentials a cell and pass, about 50
// flops. At 10 flop/byte a GPU and a CPU with wide vectors are bound by memory.
#pragma once
#include <math.h>

#include "widths.h"

// What one pass over a part of a row leaves behind: e not yet divided by s. Of a whole row and divided,
// what the gradient needs.
struct Sums {
  double m, s;    // intact: maximum, sum of exponentials
  double m2, s2;  // corrupted
  double e;       // sum e^a (a - b)
};

// Of two parts of one row.
static inline Sums merged(const Sums& x, const Sums& y) {
  const double m = x.m > y.m ? x.m : y.m, m2 = x.m2 > y.m2 ? x.m2 : y.m2;
  const double fx = x.m == m ? 1 : exp(x.m - m), fy = y.m == m ? 1 : exp(y.m - m);
  const double fx2 = x.m2 == m2 ? 1 : exp(x.m2 - m2), fy2 = y.m2 == m2 ? 1 : exp(y.m2 - m2);
  return {m, x.s * fx + y.s * fy, m2, x.s2 * fx2 + y.s2 * fy2,
          fx * (x.e + x.s * ((x.m - m) - (x.m2 - m2))) + fy * (y.e + y.s * ((y.m - m) - (y.m2 - m2)))};
}

// From above, what the gradient of one row needs; labels are places in the part at hand, -1 for none.
struct Above {
  double g_int, g_cor, g_kl;  // g_kl acts on the corrupted side
  double g_kl_int;            // and this on the intact one: g_kl, or 0 where the teacher is detached
  int64_t label, label2;
};

CRYSTAL_WIDTHS(
    // n logits of z and z2 (either may be null) -> sums
    void vocab_kl_ce_sums(Float type, const void* z, const void* z2, int64_t n, Sums* sums);
    // n cells of the gradients d of z and d2 of z2; each may be null, and may be the memory of z or z2
    // itself
    void vocab_kl_ce_gradients(Float type, const void* z, const void* z2, void* d, void* d2, int64_t n,
                               const Sums& row, const Above& g);)
