// attn_align's kl on the GPU: from torch's tensors to the launchers of attn_align.cu. Schemas: attn_align.cpp.
#include "attn_cuda.h"
#include "attn_glue.h"
#include "cuda_glue.h"

namespace crystal {

static void supported(const Attn& a, bool kl) {
  STD_TORCH_CHECK(kl, "attn_align on a GPU: kl alone");
  STD_TORCH_CHECK(a.d <= 256, "attn_align on a GPU: heads of at most 256 numbers");
}

static std::tuple<Tensor, Tensor, Tensor> align(const Tensor& q, const Tensor& k, const Tensor& rows, const Tensor& cols, bool kl, double scale,
                                                const std::optional<Tensor>&, const std::optional<Tensor>& bias, const std::optional<Tensor>& key_padding, bool) {
  const OnDevice here(q);
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  supported(t.a, kl);
  const Align p = halves(t, kl);
  Tensor value = torch::stable::new_empty(q, {p.int_.B, t.a.H, t.a.M}, wide(q)), norm = torch::stable::new_empty(value, {t.a.B, t.a.H, t.a.M});
  launched(attn_align_forward(p, {value.data_ptr(), norm.data_ptr(), nullptr}, here.stream), "attn_align");
  return {value, norm, torch::stable::new_empty(value, {0, t.a.H, t.a.M})};
}

static std::tuple<Tensor, Tensor> align_backward(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& rows, const Tensor& cols, bool kl, double scale,
                                                 const Tensor& value, const Tensor& norm, const Tensor&, const std::optional<Tensor>& bias,
                                                 const std::optional<Tensor>& key_padding, bool teacher_grad, bool want_q, bool want_k) {
  const OnDevice here(q);
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  supported(t.a, kl);
  const Attn& a = t.a;
  const int64_t R = a.B * a.H * a.M;
  Tensor dq = zeros_if(want_q, q), dk = zeros_if(want_k, k);
  if (!R || !a.K) return {dq, dk};
  Tensor row_parts = torch::stable::new_empty(q, {want_q ? R * a.d : 0}, wide(q)), column_parts = torch::stable::new_empty(q, {want_k ? a.B * a.G * a.K * a.d : 0}, wide(q));
  const AlignRows kept = {values(value, q, R / 2, "value"), values(norm, q, R, "norm"), nullptr};
  launched(attn_align_backward(halves(t, kl), values(g, q, R / 2, "the gradient from above"), kept, teacher_grad, want_q ? row_parts.data_ptr() : nullptr,
                               want_k ? column_parts.data_ptr() : nullptr, here.stream), "attn_align_backward");
  int64_t stride[4];
  if (want_q) {
    strides_like(dq, q, stride);
    launched(attn_add_rows(a, 1, row_parts.data_ptr(), dq.data_ptr(), stride, here.stream), "attn_add_rows");
  }
  if (want_k) {
    Attn columns = a;  // what is done with rows of queries, done with columns of keys
    columns.H = a.G, columns.M = a.K, columns.rows = a.cols;
    strides_like(dk, k, stride);
    launched(attn_add_rows(columns, 1, column_parts.data_ptr(), dk.data_ptr(), stride, here.stream), "attn_add_rows");
  }
  return {dq, dk};
}

}  // namespace crystal

STABLE_TORCH_LIBRARY_IMPL(crystal, GPU, m) {
  m.impl("attn_align", TORCH_BOX(&crystal::align));
  m.impl("attn_align_backward", TORCH_BOX(&crystal::align_backward));
}
