// What the CUDA operators' glue to torch (*_cuda.cpp) shares: the device, its current stream, and the
// check of every launch.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "common.h"

#ifdef CRYSTAL_ON_CPU  // a test's build: the kernels run on the CPU's tensors (tests/cuda_on_cpu.h)
#define GPU CPU
namespace crystal {
struct OnDevice {
  void* stream = nullptr;
  explicit OnDevice(const Tensor&) {}
};
inline void on_one_device(const Tensor&, const Tensor&) {}
inline void launched(int, const char*) {}
}  // namespace crystal
#else

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#define GPU CUDA
namespace crystal {

// The stream that torch computes on. This one function lives in torch's CUDA library, which a CPU build of
// torch has not: looked up when it is needed, it lets the operators be built, and loaded, beside either.
inline void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? (Get)dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get && get(device, &stream) == 0, "torch does not tell its current CUDA stream");
  return stream;
}

// Makes x's device the current one while it lives, and knows its stream.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  explicit OnDevice(const Tensor& x)
      : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
};

inline void on_one_device(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(y.is_cuda() && x.get_device_index() == y.get_device_index(),
                  "all tensors must be on one GPU");
}

// Raises what a launcher of a *.cu file returned.
inline void launched(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, name, ": ", cudaGetErrorString(cudaError_t(error)));
}

}  // namespace crystal
#endif
