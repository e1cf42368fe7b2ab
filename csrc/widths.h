// Between an operator's glue (with torch) and its CPU kernels (without): three copies of each kernel, one per
// vector width, and the choice.
#pragma once
#include <cstdint>

enum class Float { f32, f64, bf16, f16 };  // storage types; the CPU kernels know the first three

// CRYSTAL_WIDTHS(void f(int);) declares portable::f, avx2::f and avx512::f; CRYSTAL_WIDTH(f(1)) calls
// the one in use.
#if defined(__x86_64__)
#define CRYSTAL_WIDTHS(...) \
  namespace portable {      \
  __VA_ARGS__               \
  }                         \
  namespace avx2 {          \
  __VA_ARGS__               \
  }                         \
  namespace avx512 {        \
  __VA_ARGS__               \
  }
#define CRYSTAL_WIDTH(...)                               \
  (crystal::vector_bits() == 512   ? avx512::__VA_ARGS__ \
   : crystal::vector_bits() == 256 ? avx2::__VA_ARGS__   \
                                   : portable::__VA_ARGS__)
#else
#define CRYSTAL_WIDTHS(...) \
  namespace portable {      \
  __VA_ARGS__               \
  }
#define CRYSTAL_WIDTH(...) portable::__VA_ARGS__
#endif

namespace crystal {
int64_t vector_bits();  // 512, 256 or 128; see ops.cpp
}
