// The library `crystal` of operators. Each operator adds itself in a file of its own: name.cpp (schema,
// checks, the work of the CPU), name_cuda.cpp and name.cu (the work of the GPU). Gradients and fake kernels
// are registered in crystal/runtime/ops.py.
#include "common.h"

namespace crystal {

static int64_t detected() {
#if defined(CRYSTAL_BYTES)
  return 8 * CRYSTAL_BYTES;
#elif defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return 512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return 256;
#endif
  return 128;
}

static int64_t chosen = detected();

int64_t vector_bits() { return chosen; }

// vector_bits(choose): bits of the vectors that the CPU kernels use from now on, at most what this
// machine has: 512 (AVX-512), 256 (AVX2) or 128 (any machine). 0 changes nothing. Returns what is in use.
// For tests and measurements.
static int64_t choose_vector_bits(int64_t bits) {
  STD_TORCH_CHECK(bits == 0 || bits == 128 || bits == 256 || bits == 512,
                  "vector_bits: 0, 128, 256 or 512, not ", bits);
  STD_TORCH_CHECK(bits <= detected(), "vector_bits: this CPU has ", detected(), ", not ", bits);
  if (bits) chosen = bits;
  return chosen;
}

}  // namespace crystal

STABLE_TORCH_LIBRARY(crystal, m) { m.def("vector_bits(int choose) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(crystal, CompositeExplicitAutograd, m) {
  m.impl("vector_bits", TORCH_BOX(&crystal::choose_vector_bits));
}
