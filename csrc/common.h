// What every operator's glue to torch uses. The kernels themselves (*_simd.cpp, *.cu) know nothing of torch:
// they get pointers and sizes.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "widths.h"

namespace crystal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Float float_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::Double:
      return Float::f64;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::f16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, "wants float32, float64, bfloat16 or float16");
  return Float::f32;
}

// What values are computed and returned in: float64 for float64, else float32.
inline ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace crystal
