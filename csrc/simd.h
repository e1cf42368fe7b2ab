// Vectors of the CPU kernels. A file *_simd.cpp is compiled three times, for 128-bit vectors of any machine, AVX2 and AVX-512, each time
// into a namespace of its own (WIDTH: portable, avx2, avx512), and common.h's CRYSTAL_WIDTH calls the one that fits the machine.
// The vectors are the compiler's own (GCC's and Clang's vector_size): + - * / and comparisons work on all lanes, x ? a : b selects.
//
// A *_simd.cpp must include nothing that defines inline functions (no torch, no STL): the linker keeps one copy of such a function, and
// an AVX-512 copy of it would stop an older machine. Everything here is therefore static.
#pragma once
#include <cstdint>

namespace WIDTH {

#if defined(__AVX512F__)
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
template <class T> struct lanes { typedef float C; typedef vfloat V; static constexpr int N = BYTES / 4; };
template <> struct lanes<double> { typedef double C; typedef vdouble V; static constexpr int N = BYTES / 8; };

static inline vfloat load(const float* p) { vfloat x; __builtin_memcpy(&x, p, sizeof x); return x; }
static inline vdouble load(const double* p) { vdouble x; __builtin_memcpy(&x, p, sizeof x); return x; }
static inline vfloat load(const bf16* p) {
  vhalf x;
  __builtin_memcpy(&x, p, sizeof x);
  return (vfloat)(__builtin_convertvector(x, vuint) << 16);
}

static inline void store(float* p, vfloat x) { __builtin_memcpy(p, &x, sizeof x); }
static inline void store(double* p, vdouble x) { __builtin_memcpy(p, &x, sizeof x); }
static inline void store(bf16* p, vfloat x) {  // to the nearest, ties to even; NaN stays NaN
  vuint bits = (vuint)x;
  vuint even = bits + 0x7fff + ((bits >> 16) & 1);
  bits = (vuint)(x == x ? (vint)even : (vint)(bits | 0x10000));
  vhalf half = __builtin_convertvector(bits >> 16, vhalf);
  __builtin_memcpy(p, &half, sizeof half);
}

// The first n < N lanes; the others are read as fill, and not written.
template <class T> static inline typename lanes<T>::V load(const T* p, int n, T fill) {
  T x[lanes<T>::N];
  for (int i = 0; i < lanes<T>::N; ++i) x[i] = i < n ? p[i] : fill;
  return load(x);
}
template <class T> static inline void store(T* p, int n, typename lanes<T>::V x) {
  T y[lanes<T>::N];
  store(y, x);
  for (int i = 0; i < n; ++i) p[i] = y[i];
}

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(bf16 x) { uint32_t bits = uint32_t(x.bits) << 16; float y; __builtin_memcpy(&y, &bits, 4); return y; }
static inline void narrow(float* p, double x) { *p = float(x); }
static inline void narrow(double* p, double x) { *p = x; }
static inline void narrow(bf16* p, double x) { vfloat v = {}; v[0] = float(x); store(p, 1, v); }

// The larger of each lane; a NaN in x is dropped (what follows meets it again).
static inline vfloat larger(vfloat m, vfloat x) { return x > m ? x : m; }
static inline vdouble larger(vdouble m, vdouble x) { return x > m ? x : m; }

template <class V> static inline auto lane_max(V x) {
  auto m = x[0];
  for (unsigned i = 1; i < sizeof x / sizeof m; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
template <class V> static inline auto lane_sum(V x) {
  auto s = x[0];
  for (unsigned i = 1; i < sizeof x / sizeof s; ++i) s += x[i];
  return s;
}

// x, rounded to its type: the compiler may otherwise fuse a product with the sum that follows it, and p * a - q * a would not be 0
// for equal p and q.
template <class V> static inline V rounded(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+w"(x));
#endif
  return x;
}

// e^x for x <= 88 with a relative error of about 1e-7; 0 below -87, NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor
// series up to r^7 / 7! (the rest is below 6e-9), and 2^n by adding n to the exponent.
static inline vfloat exp(vfloat x) {
  vfloat t = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  vfloat n = t - 12582912.0f;
  vfloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in few bits
  vfloat y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  y = (vfloat)((vint)y + ((vint)t << 23));
  return x < -87.0f ? (vfloat){} : y + (x - x);  // x - x is 0, or NaN
}

static inline vdouble exp(vdouble x) {  // lane by lane: float64 is for checking gradients
  for (unsigned i = 0; i < sizeof x / 8; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace WIDTH
