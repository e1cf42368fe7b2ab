// Vectors of the CPU kernels. A file *_simd.cpp is compiled three times, for 128-bit vectors of any machine,
// AVX2 and AVX-512, each time into a namespace of its own (WIDTH: portable, avx2, avx512), and common.h's
// CRYSTAL_WIDTH calls the one that fits the machine. The vectors are the compiler's own (GCC's and Clang's
// vector_size): + - * / and comparisons work on all lanes, x ? a : b selects.
//
// A *_simd.cpp must include nothing that defines inline functions (no torch, no STL): the linker
// keeps one copy of such a function, and an AVX-512 copy of it would stop an older machine.
// Everything here is therefore static.
#pragma once
#include <cstdint>

namespace WIDTH {

#if defined(CRYSTAL_BYTES)  // wider than the machine's, each operation several instructions: for a test
constexpr int BYTES = CRYSTAL_BYTES;
#elif defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

struct bf16 {  // the upper half of a float
  uint16_t bits;
};

typedef float vfloat __attribute__((vector_size(BYTES)));
typedef double vdouble __attribute__((vector_size(BYTES)));
typedef int32_t vint __attribute__((vector_size(BYTES)));
typedef uint32_t vuint __attribute__((vector_size(BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(BYTES / 2)));

// Arithmetic of a storage type T: C is what one computes in, V a vector of it, N its lanes.
template <class T>
struct lanes {
  typedef float C;
  typedef vfloat V;
  static constexpr int N = BYTES / 4;
};
template <>
struct lanes<double> {
  typedef double C;
  typedef vdouble V;
  static constexpr int N = BYTES / 8;
};

static inline vfloat load(const float* p) {
  vfloat x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
static inline vdouble load(const double* p) {
  vdouble x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
static inline vfloat load(const bf16* p) {
  vhalf x;
  __builtin_memcpy(&x, p, sizeof x);
  return (vfloat)(__builtin_convertvector(x, vuint) << 16);
}

static inline void store(float* p, vfloat x) { __builtin_memcpy(p, &x, sizeof x); }
static inline void store(double* p, vdouble x) { __builtin_memcpy(p, &x, sizeof x); }
// Rounded to bfloat16 in the upper halves: to the nearest, ties to even; NaN stays NaN.
static inline vuint nearest_bf16(vfloat x) {
  const vuint bits = (vuint)x, even = bits + 0x7fff + ((bits >> 16) & 1);
  return (vuint)(x == x ? (vint)even : (vint)(bits | 0x10000));
}
static inline void store(bf16* p, vfloat x) {
  vhalf half = __builtin_convertvector(nearest_bf16(x) >> 16, vhalf);
  __builtin_memcpy(p, &half, sizeof half);
}

// 2N cells as two vectors, in an order that is T's own: for work that goes cell by cell. bf16 cells are
// taken apart into those at even and at odd places, which is a shift and a mask where neighbours would have
// to cross the vector.
template <class V>
struct two {
  V x, y;
};
static inline two<vfloat> load_two(const float* p) { return {load(p), load(p + lanes<float>::N)}; }
static inline two<vdouble> load_two(const double* p) { return {load(p), load(p + lanes<double>::N)}; }
static inline two<vfloat> load_two(const bf16* p) {
  vuint both;
  __builtin_memcpy(&both, p, sizeof both);
  return {(vfloat)(both << 16), (vfloat)(both & 0xffff0000u)};
}
static inline void store_two(float* p, two<vfloat> v) { store(p, v.x), store(p + lanes<float>::N, v.y); }
static inline void store_two(double* p, two<vdouble> v) { store(p, v.x), store(p + lanes<double>::N, v.y); }
// Ties away from zero: two instructions instead of seven. NaN stays NaN as arithmetic makes it, and as
// a bfloat16 holds it.
static inline void store_two(bf16* p, two<vfloat> v) {
  const vuint both = ((vuint)v.x + 0x8000) >> 16 | (((vuint)v.y + 0x8000) & 0xffff0000u);
  __builtin_memcpy(p, &both, sizeof both);
}

// The first n < 2N cells; the others are read as fill, and not written.
template <class T>
static inline auto load_two(const T* p, int n, T fill) {
  T x[2 * lanes<T>::N];
  for (int i = 0; i < 2 * lanes<T>::N; ++i) x[i] = i < n ? p[i] : fill;
  return load_two(x);
}
template <class T>
static inline void store_two(T* p, int n, two<typename lanes<T>::V> v) {
  T y[2 * lanes<T>::N];
  store_two(y, v);
  for (int i = 0; i < n; ++i) p[i] = y[i];
}

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
static inline void narrow(float* p, double x) { *p = float(x); }
static inline void narrow(double* p, double x) { *p = x; }
static inline void narrow(bf16* p, double x) {
  p->bits = uint16_t(nearest_bf16(vfloat{} + float(x))[0] >> 16);
}

// The larger of each lane; a NaN in x is dropped (what follows meets it again).
static inline vfloat larger(vfloat m, vfloat x) { return x > m ? x : m; }
static inline vdouble larger(vdouble m, vdouble x) { return x > m ? x : m; }

template <class V>
static inline auto lane_max(V x) {
  auto m = x[0];
  for (unsigned i = 1; i < sizeof x / sizeof m; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
template <class V>
static inline double lane_sum(V x) {  // in double: in float every lane would add a rounding of the largest
  double s = x[0];
  for (unsigned i = 1; i < sizeof x / sizeof x[0]; ++i) s += x[i];
  return s;
}

// x, rounded to its type: the compiler may otherwise fuse a product with the sum that follows it, and p * a -
// q * a would not be 0 for equal p and q.
template <class V>
static inline V rounded(V x) {
#if defined(CRYSTAL_BYTES)
  asm("" : "+m"(x));
#elif defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+w"(x));
#endif
  return x;
}

// e^x for x <= 88 with a relative error of about 1e-7; 0 below -87, NaN for NaN. x = n ln 2 + r with |r| <=
// ln 2 / 2; e^r by 1 + r + r^2 P(r), P fitted for the least relative error, 3e-9; 2^n by its bits. DEGREES 5
// and 4, with errors of 1e-7 and 5e-6, are for what is computed from bfloat16, and rounded to it.
template <int DEGREE = 6>
static inline vfloat exp(vfloat x) {
  vfloat t =
      x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  const vfloat n = t - 12582912.0f;
#if defined(__FMA__)
  const vfloat r = x - n * 0.693147182f;
#else  // the product is rounded: n times ln 2's first 9 bits is not
  const vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;
#endif
  vfloat y;
  if constexpr (DEGREE == 4) {
    y = r * 0.0412773687693f + 0.1675360090171f;
    y = y * r + 0.5000512617641f;
  } else if constexpr (DEGREE == 5) {
    y = r * 0.0083125013763f + 0.0418903319975f;
    y = y * r + 0.1666711538957f;
    y = y * r + 0.4999923030635f;
  } else {
    y = r * 0.0013814540580f + 0.0083687454462f;
    y = y * r + 0.0416683889925f;
    y = y * r + 0.1666652113199f;
    y = y * r + 0.4999999403954f;
  }
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  y *= (vfloat)(((vint)t << 23) + 0x3f800000);
  return x < -87.0f ? (vfloat){} : y;
}

template <int DEGREE = 6>
static inline vdouble exp(vdouble x) {  // lane by lane: float64 is for checking gradients
  for (unsigned i = 0; i < sizeof x / 8; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace WIDTH
