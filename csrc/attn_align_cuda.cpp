// attn_align on the GPU: from torch's tensors to the launchers of attn_align.cu (kl) and attn_frobenius.cu
// (and mse, which is frobenius by its cells). Schemas: attn_align.cpp.
#include <algorithm>

#include "attn_cuda.h"
#include "attn_glue.h"
#include "cuda_glue.h"

namespace crystal {

static Tensor room(const Tensor& q, int64_t numbers) {
  return torch::stable::new_empty(q, {numbers}, wide(q));
}

static std::tuple<Tensor, Tensor, Tensor> align(const Tensor& q, const Tensor& k, const Tensor& rows,
                                                const Tensor& cols, bool kl, double scale,
                                                const std::optional<Tensor>& lse,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& key_padding, bool) {
  const OnDevice here(q);
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  const Align p = halves(t, kl);
  const int64_t B = p.int_.B, R = t.a.B * t.a.H * t.a.M;
  Tensor value = torch::stable::new_empty(q, {B, t.a.H, t.a.M}, wide(q)),
         norm = torch::stable::new_empty(value, {t.a.B, t.a.H, t.a.M});
  Tensor grad_through = torch::stable::new_empty(value, {kl ? 0 : t.a.B, t.a.H, t.a.M});
  const AlignRows out = {value.data_ptr(), norm.data_ptr(), grad_through.data_ptr()};
  if (kl) {
    launched(attn_kl_forward(p, out, here.stream), "attn_align");
    return {value, norm, grad_through};
  }
  Attn both = t.a;  // the normalisers alone
  both.K = 0;
  Tensor tops = room(q, lse ? 0 : ROW_PARTS * R), sums = room(q, lse ? 0 : ROW_PARTS * R),
         times = room(q, B * t.a.L), parts = room(q, ROW_PARTS * 3 * (R / 2));
  launched(attn_slice_forward(3, both, true, values(lse, q, R, "lse"), tops.data_ptr(), sums.data_ptr(),
                              out.norm, nullptr, here.stream),
           "attn_align");
  launched(attn_frobenius_forward(p, out, times.data_ptr(), parts.data_ptr(), here.stream), "attn_align");
  return {value, norm, grad_through};
}

static std::tuple<Tensor, Tensor> align_backward(const Tensor& g, const Tensor& q, const Tensor& k,
                                                 const Tensor& rows, const Tensor& cols, bool kl,
                                                 double scale, const Tensor& value, const Tensor& norm,
                                                 const Tensor& grad_through,
                                                 const std::optional<Tensor>& bias,
                                                 const std::optional<Tensor>& key_padding, bool teacher_grad,
                                                 bool want_q, bool want_k) {
  const OnDevice here(q);
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  const Attn& a = t.a;
  const Align p = halves(t, kl);
  const int64_t R = a.B * a.H * a.M;
  Tensor dq = zeros_if(want_q, q), dk = zeros_if(want_k, k);
  if (!R || !a.K) return {dq, dk};
  const void* above = values(g, q, R / 2, "the gradient from above");
  const AlignRows kept = {values(value, q, R / 2, "value"), values(norm, q, R, "norm"),
                          values(grad_through, q, kl ? 0 : R, "grad_through")};
  int64_t dq_stride[4] = {}, dk_stride[4] = {};
  if (want_q) strides_like(dq, q, dq_stride);
  if (want_k) strides_like(dk, k, dk_stride);
  void *to_q = want_q ? dq.data_ptr() : nullptr, *to_k = want_k ? dk.data_ptr() : nullptr;
  const int64_t of_rows = want_q ? R : 0, of_columns = kl && want_k ? a.B * a.G * a.K : 0;
  if (kl) {
    Tensor parts = room(q, KEY_SPLITS * std::max(of_rows, of_columns) * a.d);
    launched(attn_kl_backward(p, above, kept, teacher_grad, parts.data_ptr(), to_q, dq_stride, to_k,
                              dk_stride, here.stream),
             "attn_align_backward");
    return {dq, dk};
  }
  Tensor times = room(q, a.B / 2 * a.L), parts = room(q, KEY_SPLITS * (of_rows / 2) * a.d);
  launched(attn_frobenius_backward(p, above, kept, teacher_grad, times.data_ptr(), parts.data_ptr(), to_q,
                                   dq_stride, to_k, dk_stride, here.stream),
           "attn_align_backward");
  return {dq, dk};
}

}  // namespace crystal

STABLE_TORCH_LIBRARY_IMPL(crystal, GPU, m) {
  m.impl("attn_align", TORCH_BOX(&crystal::align));
  m.impl("attn_align_backward", TORCH_BOX(&crystal::align_backward));
}
