// vocab_kl_ce on the GPU. vocab_kl_ce.h says what it computes, why one pass suffices, and what it must move:
// forward reads the logits of both paths once, backward reads them once and writes as much. Memory is the
// bound: 64 rows of 152064 bf16 logits are 19.5 MB, 28 us forward and 56 us backward at an A40's 696 GB/s.
// A cell of both paths takes two exponentials and some 16 other instructions in either pass (2-byte types).
//
//   1  a block per row, one logit a load, three sweeps forward: maximum, sum of exponentials, expectation
//   2  one sweep: each thread keeps running maxima and rescales what it has when they grow; 16-byte loads
//   3  a row is cut into parts, so that a few rows fill the GPU; a warp merges the parts of a row
//
// The kernels of 2 and 3 are the same, with one part or several.
#include "cuda_common.h"
#include "vocab_kl_ce_cuda.h"

namespace crystal {
namespace {

constexpr int THREADS = 256;

template <class C>
__device__ constexpr C lowest();
template <>
__device__ constexpr float lowest<float>() {
  return -3.0e38f;
}
template <>
__device__ constexpr double lowest<double>() {
  return -1.0e300;
}

// ---- which row of its logits holds n ----------------------------------------------------------------------

// One block. A path has a row at n if it has a label there or n is an answer row: at is the number of
// such n before it.
__global__ void place_rows(VocabArgs a) {
  __shared__ int of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t first = 0;  // of the path at hand
  for (int path = 0; path < 2; ++path) {
    const int64_t* labels = path ? a.t2 : a.t;
    int64_t seen = path && a.R2 < 0 ? first : 0;
    for (int64_t from = 0; from < a.N; from += blockDim.x) {
      const int64_t n = from + threadIdx.x;
      const bool here = n < a.N && (labels[n] >= 0 || a.answer[n]);
      if (n < a.N && labels[n] >= a.V) stop_with("vocab_kl_ce: a target is not below the vocabulary");
      const unsigned together = __ballot_sync(~0u, here);
      if (lane == 0) of_warp[warp] = __popc(together);
      __syncthreads();
      int64_t before = seen + __popc(together & ((1u << lane) - 1));
      for (int w = 0; w < int(blockDim.x) / 32; ++w) {
        if (w < warp) before += of_warp[w];
        seen += of_warp[w];
      }
      if (n < a.N) a.at[path * a.N + n] = here ? before : -1;
      __syncthreads();
    }
    first = seen;
    const bool fits = path == 0 ? (a.R2 < 0 || seen == a.R) : seen == (a.R2 < 0 ? a.R : a.R2);
    if (!fits)
      stop_with("vocab_kl_ce: targets and answer speak of another number of rows than the logits have");
  }
}

// ---- forward ----------------------------------------------------------------------------------------------

// Running sums of one thread, and of a block.
template <class C>
struct Running {
  C m, s, m2, s2, e;
};

// Moves sums to larger maxima.
template <class T, class C>
__device__ inline void raise(Running<C>& r, C m, C m2) {
  const C f = exp_of<T>(r.m - m);
  r.e = f * (r.e + r.s * ((r.m - m) - (r.m2 - m2)));
  r.s *= f;
  r.s2 *= exp_of<T>(r.m2 - m2);
  r.m = m, r.m2 = m2;
}

template <class T, class C>
__device__ inline void add(Running<C>& r, C x, C x2, bool pair) {
  const C a = x - r.m, p = exp_of<T>(a);
  r.s = plus(r.s, p);
  if (pair) {
    const C b = x2 - r.m2;
    r.s2 = plus(r.s2, exp_of<T>(b));
    r.e += p * (a - b);
  }
}

// Sums of a block's threads, in every thread.
template <class T, class C>
__device__ Running<C> of_block(Running<C> r) {
  __shared__ C shared[5][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const C m = warp_max(r.m), m2 = warp_max(r.m2);
  if (lane == 0) shared[0][warp] = m, shared[1][warp] = m2;
  __syncthreads();
  raise<T>(r, warp_max(shared[0][lane % warps]), warp_max(shared[1][lane % warps]));
  const C s = warp_sum(r.s), s2 = warp_sum(r.s2), e = warp_sum(r.e);
  if (lane == 0) shared[2][warp] = s, shared[3][warp] = s2, shared[4][warp] = e;
  __syncthreads();
  r.s = r.s2 = r.e = 0;
  for (int w = 0; w < warps; ++w) r.s += shared[2][w], r.s2 += shared[3][w], r.e += shared[4][w];
  __syncthreads();  // shared may be used again
  return r;
}

// What one block sums up of [from, to) of one row; z2 null: of one path alone. W logits a load.
template <class T, int W>
__device__ Sums sweep(const T* z, const T* z2, int64_t from, int64_t to) {
  typedef typename computed<T>::type C;
  Running<C> r = {lowest<C>(), 0, lowest<C>(), 0, 0};
  const int64_t end = from + (to - from) / W * W;
#pragma unroll(sizeof(T) == 8 ? 1 : 2)
  for (int64_t i = from + int64_t(threadIdx.x) * W; i < end; i += int64_t(blockDim.x) * W) {
    const Pack<T, W> x = *(const Pack<T, W>*)(z + i), x2 = z2 ? *(const Pack<T, W>*)(z2 + i) : Pack<T, W>{};
    C top = widen(x.v[0]), top2 = widen(x2.v[0]);
#pragma unroll
    for (int j = 1; j < W; ++j) top = fmax(top, widen(x.v[j])), top2 = fmax(top2, widen(x2.v[j]));
    if (top > r.m || top2 > r.m2) raise<T>(r, fmax(top, r.m), fmax(top2, r.m2));
#pragma unroll
    for (int j = 0; j < W; ++j) add<T>(r, widen(x.v[j]), widen(x2.v[j]), z2 != nullptr);
  }
  for (int64_t i = end + threadIdx.x; i < to; i += blockDim.x) {  // fewer than W are left
    const C x = widen(z[i]), x2 = z2 ? widen(z2[i]) : C(0);
    if (x > r.m || x2 > r.m2) raise<T>(r, fmax(x, r.m), fmax(x2, r.m2));
    add<T>(r, x, x2, z2 != nullptr);
  }
  r = of_block<T>(r);
  return {double(r.m), double(r.s), double(r.m2), double(r.s2), double(r.e)};
}

// Where part `part` of V logits begins; step is a multiple of W. (A division of long integers here would be
// a call, and spill.)
__device__ inline int64_t cut(int64_t V, int64_t part, int64_t step) {
  return part * step < V ? part * step : V;
}

template <int W>
int64_t step_of(int64_t V, int parts) {
  return (V + int64_t(parts) * W - 1) / (int64_t(parts) * W) * W;
}

template <class T, int W>
__global__ void __launch_bounds__(THREADS) sums_of_parts(VocabArgs a, Sums* work, int parts, int64_t step) {
  const int64_t n = blockIdx.x / parts, part = blockIdx.x % parts, at = a.at[n], at2 = a.at[a.N + n];
  const T *z = at < 0 ? nullptr : (const T*)a.z + at * a.stride,
          *z2 = at2 < 0 ? nullptr : (const T*)a.z2 + at2 * a.stride2;
  const int64_t from = cut(a.V, part, step), to = cut(a.V, part + 1, step);
  Sums sums = {};
  if (a.answer[n]) {
    sums = sweep<T, W>(z, z2, from, to);
  } else {  // what one path holds must not matter to the other
    if (z) sums = sweep<T, W>(z, nullptr, from, to);
    if (z2) {
      const Sums other = sweep<T, W>(z2, nullptr, from, to);
      sums.m2 = other.m, sums.s2 = other.s;
    }
  }
  if (threadIdx.x == 0) work[blockIdx.x] = sums;
}

// The three sweeps of version 1.
template <class T>
__global__ void __launch_bounds__(THREADS) sums_naively(VocabArgs a, Sums* work) {
  typedef typename computed<T>::type C;
  const int64_t n = blockIdx.x, at = a.at[n], at2 = a.at[a.N + n];
  const T *z = at < 0 ? nullptr : (const T*)a.z + at * a.stride,
          *z2 = at2 < 0 ? nullptr : (const T*)a.z2 + at2 * a.stride2;
  Running<C> r = {lowest<C>(), 0, lowest<C>(), 0, 0};
  for (int64_t i = threadIdx.x; i < a.V; i += blockDim.x) {
    if (z) r.m = fmax(r.m, widen(z[i]));
    if (z2) r.m2 = fmax(r.m2, widen(z2[i]));
  }
  r = of_block<T>(r);
  r.s = r.s2 = r.e = 0;
  for (int64_t i = threadIdx.x; i < a.V; i += blockDim.x) {
    if (z) r.s = plus(r.s, exp_of<T>(widen(z[i]) - r.m));
    if (z2) r.s2 = plus(r.s2, exp_of<T>(widen(z2[i]) - r.m2));
  }
  for (int64_t i = threadIdx.x; i < a.V && a.answer[n]; i += blockDim.x) {
    const C x = widen(z[i]) - r.m;
    r.e += exp_of<T>(x) * (x - (widen(z2[i]) - r.m2));
  }
  r = of_block<T>(r);
  if (threadIdx.x == 0) work[n] = {double(r.m), double(r.s), double(r.m2), double(r.s2), double(r.e)};
}

// A warp merges the parts of a row, and writes the row's values.
template <class T>
__global__ void __launch_bounds__(THREADS) values_of_rows(VocabArgs a, const Sums* work, int parts) {
  typedef typename computed<T>::type C;
  const int64_t n = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (n >= a.N) return;  // the whole warp
  Sums x = lane < parts ? work[n * parts + lane] : work[n * parts];
  const double m = warp_max(x.m), m2 = warp_max(x.m2), shift = x.m - m, shift2 = x.m2 - m2;
  const double f = lane < parts ? double(exp_of<C>(C(shift))) : 0,
               f2 = lane < parts ? double(exp_of<C>(C(shift2))) : 0;
  const double s = warp_sum(x.s * f), s2 = warp_sum(x.s2 * f2),
               e = warp_sum(f * (x.e + x.s * (shift - shift2))) / s;
  if (lane) return;
  const int64_t at = a.at[n], at2 = a.at[a.N + n], t = a.t[n], t2 = a.t2[n];
  const double lse = log(s), lse2 = log(s2), kl = e - lse + lse2;
  a.sums[n] = {m, s, m2, s2, a.answer[n] ? e : 0};
  ((C*)a.ce_int)[n] = t < 0 ? C(0) : C(lse - (double(widen(((const T*)a.z)[at * a.stride + t])) - m));
  ((C*)a.ce_cor)[n] = t2 < 0 ? C(0) : C(lse2 - (double(widen(((const T*)a.z2)[at2 * a.stride2 + t2])) - m2));
  ((C*)a.kl)[n] = !a.answer[n] || kl < 0 ? C(0) : C(kl);  // below 0 by rounding alone
}

// ---- backward ---------------------------------------------------------------------------------------------

// What the cells of one row's gradient have in common: u = x - m, and p = e^u / s, of each path.
template <class C>
struct Row {
  C m, m2, norm, norm2, e, g_int, g_cor, g_kl, g_kl_int;
};

// A row's sum of exponentials as probability() wants it. Two-byte types take its logarithm to base 2 into
// the exponent: one instruction less a cell, with an error of |log2 p| * 6e-8.
template <class T, class C>
__device__ inline C norm_of(C s) {
  return sizeof(T) == 2 ? C(log2f(float(s))) : 1 / s;
}
template <class T>
__device__ inline float probability(float u, float norm) {
  return sizeof(T) == 2 ? exp2_fast(fmaf(u, 1.44269504f, -norm)) : times(expf(u), norm);
}
template <class T>
__device__ inline double probability(double u, double norm) {
  return times(exp(u), norm);
}

// One cell of both paths' gradients but for the labels, whose cells have -g more (see own_cell).
template <class T, bool TEACHER, class C>
__device__ inline void cells(const Row<C>& r, C x, C x2, C& y, C& y2) {
  const C u = x - r.m, v = x2 - r.m2, p = probability<T>(u, r.norm), q = probability<T>(v, r.norm2);
  y = times(r.g_int, p);
  if (TEACHER) y += r.g_kl_int * (p * ((u - v) - r.e));
  y2 = times(r.g_cor, q) + r.g_kl * (q - p);
}

// The columns [from, to) of both paths' gradients in an answer row; d or d2 null: that one is not wanted.
template <class T, int W, bool TEACHER, class C>
__device__ inline void both_paths(const Row<C>& r, const T* z, const T* z2, T* d, T* d2, int64_t from,
                                  int64_t to) {
  const int64_t end = from + (to - from) / W * W;
#pragma unroll(sizeof(T) == 8 ? 1 : 2)
  for (int64_t i = from + int64_t(threadIdx.x) * W; i < end; i += int64_t(blockDim.x) * W) {
    const Pack<T, W> x = *(const Pack<T, W>*)(z + i), x2 = *(const Pack<T, W>*)(z2 + i);
    Pack<T, W> y, y2;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      C c, c2;
      cells<T, TEACHER>(r, widen(x.v[j]), widen(x2.v[j]), c, c2);
      y.v[j] = narrow<T>(c), y2.v[j] = narrow<T>(c2);
    }
    if (d) *(Pack<T, W>*)(d + i) = y;
    if (d2) *(Pack<T, W>*)(d2 + i) = y2;
  }
  for (int64_t i = end + threadIdx.x; i < to; i += blockDim.x) {  // fewer than W are left
    C c, c2;
    cells<T, TEACHER>(r, widen(z[i]), widen(z2[i]), c, c2);
    if (d) d[i] = narrow<T>(c);
    if (d2) d2[i] = narrow<T>(c2);
  }
}

// The same where a path's cross entropy is all: g (p - label). With g 0 its logits are not read: 0 times
// what stands there might not be 0.
template <class T, int W, class C>
__device__ inline void one_path(C m, C norm, C g, const T* z, T* d, int64_t from, int64_t to) {
  const int64_t end = from + (to - from) / W * W;
  const bool read = g != 0;
#pragma unroll(sizeof(T) == 8 ? 1 : 2)
  for (int64_t i = from + int64_t(threadIdx.x) * W; i < end; i += int64_t(blockDim.x) * W) {
    const Pack<T, W> x = read ? *(const Pack<T, W>*)(z + i) : Pack<T, W>{};
    Pack<T, W> y;
#pragma unroll
    for (int j = 0; j < W; ++j)
      y.v[j] = narrow<T>(read ? times(g, probability<T>(widen(x.v[j]) - m, norm)) : C(0));
    *(Pack<T, W>*)(d + i) = y;
  }
  for (int64_t i = end + threadIdx.x; i < to; i += blockDim.x)
    d[i] = narrow<T>(read ? times(g, probability<T>(widen(z[i]) - m, norm)) : C(0));
}

template <class T, int W>
__global__ void __launch_bounds__(THREADS) gradients_of_parts(VocabArgs a, int parts, int64_t step) {
  typedef typename computed<T>::type C;
  const int64_t n = blockIdx.x / parts, part = blockIdx.x % parts, at = a.at[n], at2 = a.at[a.N + n],
                t = a.t[n], t2 = a.t2[n];
  const T *z = at < 0 ? nullptr : (const T*)a.z + at * a.stride,
          *z2 = at2 < 0 ? nullptr : (const T*)a.z2 + at2 * a.stride2;
  T *d = at < 0 || !a.d ? nullptr : (T*)a.d + at * a.d_stride,
    *d2 = at2 < 0 || !a.d2 ? nullptr : (T*)a.d2 + at2 * a.d2_stride;
  const Sums s = a.sums[n];
  const C g_kl = a.answer[n] ? ((const C*)a.g_kl)[n] : C(0), g_int = t < 0 ? C(0) : ((const C*)a.g_int)[n],
          g_cor = t2 < 0 ? C(0) : ((const C*)a.g_cor)[n];
  const bool teacher = d && a.teacher_grad, pair = g_kl != 0 && (d2 || teacher);
  // From here on in what the cells are computed in: an A40 has one double unit where it has 64 for floats.
  const Row<C> r = {C(s.m), C(s.m2), norm_of<T>(C(s.s)),   norm_of<T>(C(s.s2)), C(s.e), g_int,
                    g_cor,  g_kl,    teacher ? g_kl : C(0)};
  const int64_t from = cut(a.V, part, step), to = cut(a.V, part + 1, step);

  // The labels' own cells, read before any is written: in place, the gradient lies where the logits lay.
  const bool own = d && t >= from && t < to && g_int != 0 && threadIdx.x == 0,
             own2 = d2 && t2 >= from && t2 < to && g_cor != 0 && threadIdx.x == 0;
  C label = 0, label2 = 0, other;
  if (own && pair && teacher) {
    cells<T, true>(r, widen(z[t]), widen(z2[t]), label, other);
  } else if (own) {
    label = times(g_int, probability<T>(widen(z[t]) - r.m, r.norm));
  }
  if (own2 && pair) {
    cells<T, false>(r, widen(z[t2]), widen(z2[t2]), other, label2);
  } else if (own2) {
    label2 = times(g_cor, probability<T>(widen(z2[t2]) - r.m2, r.norm2));
  }
  __syncthreads();

  if (pair && teacher) {
    both_paths<T, W, true>(r, z, z2, d, d2, from, to);
  } else if (pair) {
    both_paths<T, W, false>(r, z, z2, g_int != 0 ? d : nullptr, d2, from, to);
    if (d && g_int == 0) one_path<T, W>(r.m, r.norm, g_int, z, d, from, to);  // zeros
  } else {
    if (d) one_path<T, W>(r.m, r.norm, g_int, z, d, from, to);
    if (d2) one_path<T, W>(r.m2, r.norm2, g_cor, z2, d2, from, to);
  }

  __syncthreads();
  if (own) d[t] = narrow<T>(label - g_int);
  if (own2) d2[t2] = narrow<T>(label2 - g_cor);
}

// ---- launches ---------------------------------------------------------------------------------------------

// Enough blocks for every GPU of today; each with at least two loads a thread.
int parts_for(const VocabArgs& a, int version, int width) {
  if (version < 3) return 1;
  const int64_t wanted = 2048 / (a.N < 1 ? 1 : a.N), room = a.V / (int64_t(THREADS) * width * 2);
  const int64_t parts = wanted < room ? wanted : room;
  return int(parts < 1 ? 1 : parts > VOCAB_PARTS ? VOCAB_PARTS : parts);
}

// Whether all rows start at a multiple of 16 bytes.
bool aligned(const VocabArgs& a, bool backward, int64_t cell) {
  auto fits = [&](const void* p, int64_t stride) {
    return !p || ((uintptr_t)p % 16 == 0 && stride * cell % 16 == 0);
  };
  return fits(a.z, a.stride) && fits(a.z2, a.stride2) &&
         (!backward || (fits(a.d, a.d_stride) && fits(a.d2, a.d2_stride)));
}

template <class T>
int forward_as(int version, const VocabArgs& a, Sums* work, void* stream) {
  constexpr int W = 16 / sizeof(T);
  int error = LAUNCH((place_rows), 1, 1024, stream, a), parts = 1;
  if (error || !a.N) return error;
  if (version == 1) {
    error = LAUNCH((sums_naively<T>), unsigned(a.N), THREADS, stream, a, work);
  } else if (aligned(a, false, sizeof(T))) {
    parts = parts_for(a, version, W);
    error = LAUNCH((sums_of_parts<T, W>), unsigned(a.N * parts), THREADS, stream, a, work, parts,
                   step_of<W>(a.V, parts));
  } else {
    parts = parts_for(a, version, 1);
    error = LAUNCH((sums_of_parts<T, 1>), unsigned(a.N * parts), THREADS, stream, a, work, parts,
                   step_of<1>(a.V, parts));
  }
  if (error) return error;
  return LAUNCH((values_of_rows<T>), unsigned((a.N + THREADS / 32 - 1) / (THREADS / 32)), THREADS, stream, a,
                work, parts);
}

template <class T>
int backward_as(int version, const VocabArgs& a, void* stream) {
  constexpr int W = 16 / sizeof(T);
  if (!a.N) return 0;
  if (version > 1 && aligned(a, true, sizeof(T))) {
    const int parts = parts_for(a, version, W);
    return LAUNCH((gradients_of_parts<T, W>), unsigned(a.N * parts), THREADS, stream, a, parts,
                  step_of<W>(a.V, parts));
  }
  const int parts = parts_for(a, version, 1);
  return LAUNCH((gradients_of_parts<T, 1>), unsigned(a.N * parts), THREADS, stream, a, parts,
                step_of<1>(a.V, parts));
}

}  // namespace

int vocab_kl_ce_forward(int version, const VocabArgs& a, Sums* work, void* stream) {
  switch (a.type) {
    case Float::f32:
      return forward_as<float>(version, a, work, stream);
    case Float::f64:
      return forward_as<double>(version, a, work, stream);
    case Float::bf16:
      return forward_as<bf16>(version, a, work, stream);
    default:
      return forward_as<f16>(version, a, work, stream);
  }
}

int vocab_kl_ce_backward(int version, const VocabArgs& a, void* stream) {
  switch (a.type) {
    case Float::f32:
      return backward_as<float>(version, a, stream);
    case Float::f64:
      return backward_as<double>(version, a, stream);
    case Float::bf16:
      return backward_as<bf16>(version, a, stream);
    default:
      return backward_as<f16>(version, a, stream);
  }
}

}  // namespace crystal
