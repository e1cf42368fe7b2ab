// From torch's tensors to what the attention kernels are given, with the checks that keep them inside memory.
// For CPU and CUDA glue.
#pragma once
#include "attn_align.h"
#include "common.h"

namespace crystal {

struct AttnTensors {  // owns what the pointers of `a` point to
  Attn a;
  Tensor rows, cols;
  std::optional<Tensor> bias, padding;

  AttnTensors(const Tensor& q, const Tensor& k, const Tensor& rows_in, const Tensor& cols_in, double scale,
              const std::optional<Tensor>& bias_in, const std::optional<Tensor>& padding_in)
      : rows(torch::stable::contiguous(rows_in)), cols(torch::stable::contiguous(cols_in)) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && rows.dim() == 2 && cols.dim() == 2,
                    "attention: q [B,H,L,d], k [B,G,L,d], rows [B,M], cols [B,K]");
    a = {q.size(0),
         q.size(1),
         k.size(1),
         q.size(2),
         q.size(3),
         rows.size(1),
         cols.size(1),
         float_type(q),
         q.data_ptr(),
         k.data_ptr(),
         {},
         {},
         (const int64_t*)rows.data_ptr(),
         (const int64_t*)cols.data_ptr(),
         scale,
         nullptr,
         nullptr};
    STD_TORCH_CHECK(k.size(0) == a.B && k.size(2) == a.L && k.size(3) == a.d && rows.size(0) == a.B &&
                        cols.size(0) == a.B,
                    "attention: q, k, rows and cols must agree in batch, q and k in length and head size");
    STD_TORCH_CHECK(a.G && a.H % a.G == 0, a.H, " query heads cannot share ", a.G, " key heads evenly");
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), "attention: q and k must have one dtype");
    STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && cols.scalar_type() == ScalarType::Long,
                    "attention: rows and cols must be int64");
    STD_TORCH_CHECK(a.L < (1 << 24), "attention: at most 2^24 positions");  // they are compared as floats
    for (int i = 0; i < 4; ++i) a.q_stride[i] = q.stride(i), a.k_stride[i] = k.stride(i);
    for (const Tensor* x : {&k, &rows_in, &cols_in}) on_device(*x, q);
    if (bias_in) {
      on_device(*bias_in, q);
      STD_TORCH_CHECK(bias_in->dim() == 4 && bias_in->size(0) == a.B && bias_in->size(1) == 1 &&
                          bias_in->size(2) == a.M && bias_in->size(3) == a.L,
                      "attention: bias must be [B,1,M,L]");
      bias = torch::stable::contiguous(torch::stable::to(*bias_in, wide(q)));
      a.bias = bias->data_ptr();
    }
    if (padding_in) {
      on_device(*padding_in, q);
      STD_TORCH_CHECK(padding_in->scalar_type() == ScalarType::Bool && padding_in->dim() == 2 &&
                          padding_in->size(0) == a.B && padding_in->size(1) == a.L,
                      "attention: key_padding must be bool [B,L]");
      padding = torch::stable::contiguous(*padding_in);
      a.padding = (const bool*)padding->data_ptr();
    }
#ifndef CRYSTAL_ON_CPU
    // On a GPU the kernels look for themselves (attn_device.h): nothing waits for the positions to come back.
    if (q.is_cpu()) {
      for (int64_t i = 0; i < rows.numel(); ++i)
        STD_TORCH_CHECK(a.rows[i] >= -1 && a.rows[i] < a.L, "attention: row ", a.rows[i], " is not in -1..",
                        a.L - 1);
      for (int64_t i = 0; i < cols.numel(); ++i)
        STD_TORCH_CHECK(a.cols[i] >= -1 && a.cols[i] < a.L, "attention: column ", a.cols[i],
                        " is not in -1..", a.L - 1);
    }
#endif
  }

  static void on_device(const Tensor& x, const Tensor& q) {
    STD_TORCH_CHECK(x.is_cuda() == q.is_cuda() && x.get_device_index() == q.get_device_index(),
                    "attention: all tensors must be on one device");
  }
};

// A contiguous tensor of the given numel in the type that is computed in, or null.
inline void* values(const std::optional<Tensor>& x, const Tensor& q, int64_t numel, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == wide(q) && x->is_contiguous() && x->numel() == numel,
                  "attention: ", name, " has a wrong dtype, shape or layout");
  AttnTensors::on_device(*x, q);
  return x->data_ptr();
}

// The halves of what is given for both paths; rows and cols [B,..] are those of each.
inline Align halves(const AttnTensors& t, bool kl) {
  STD_TORCH_CHECK(t.a.B % 2 == 0, "attn_align: the batch holds both paths, so it is even");
  Align p = {t.a, t.a, kl};
  const int64_t B = p.int_.B = p.cor.B = t.a.B / 2, wide = t.a.type == Float::f64 ? 8 : 4,
                cell = t.a.type == Float::f64   ? 8
                       : t.a.type == Float::f32 ? 4
                                                : 2;
  p.cor.q = (const char*)t.a.q + B * t.a.q_stride[0] * cell;
  p.cor.k = (const char*)t.a.k + B * t.a.k_stride[0] * cell;
  if (t.a.bias) p.cor.bias = (const char*)t.a.bias + B * t.a.M * t.a.L * wide;
  if (t.a.padding) p.cor.padding = t.a.padding + B * t.a.L;
  return p;
}

// The strides of a gradient d of x.
inline void strides_like(const std::optional<Tensor>& d, const Tensor& x, int64_t* stride) {
  for (int i = 0; d && i < 4; ++i) {
    STD_TORCH_CHECK(d->dim() == 4 && d->size(i) == x.size(i) && d->scalar_type() == x.scalar_type(),
                    "attention: dq and dk have the shapes and dtype of q and k");
    stride[i] = d->stride(i);
  }
}

// Zeros like x, or an empty tensor for a gradient that is not wanted.
inline Tensor zeros_if(bool wanted, const Tensor& x) {
  return wanted ? torch::stable::new_zeros(x, x.sizes()) : torch::stable::new_empty(x, {0});
}

}  // namespace crystal
