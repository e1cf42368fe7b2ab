// attn_slice, attn_scores and their gradient on the GPU: from torch's tensors to the launchers
// of attn_slice.cu. Schemas: attn_slice.cpp.
#include "attn_cuda.h"
#include "attn_glue.h"
#include "cuda_glue.h"

namespace crystal {

static int64_t version = 3;

// attn_slice_version(choose): which of the kernels in attn_slice.cu serve from now on, 1 to 3; 0 changes
// nothing. For tests and measurements.
static int64_t choose_version(int64_t choose) {
  STD_TORCH_CHECK(choose >= 0 && choose <= 3, "attn_slice_version: 0 to 3, not ", choose);
  return choose ? version = choose : version;
}

static std::tuple<Tensor, Tensor> slice(const Tensor& q, const Tensor& k, const Tensor& rows,
                                        const Tensor& cols, double scale, const std::optional<Tensor>& lse,
                                        const std::optional<Tensor>& bias,
                                        const std::optional<Tensor>& key_padding) {
  const OnDevice here(q);
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  const Attn& a = t.a;
  Tensor out = torch::stable::new_empty(q, {a.B, a.H, a.M, a.K}, wide(q)),
         lse_out = torch::stable::new_empty(q, {a.B, a.H, a.M}, wide(q));
  Tensor room = torch::stable::new_empty(q, {2, lse ? 0 : ROW_PARTS, a.B, a.H, a.M}, wide(q));
  char* top = (char*)room.data_ptr();
  launched(attn_slice_forward(int(version), a, true, values(lse, q, lse_out.numel(), "lse"), top,
                              top + room.numel() / 2 * room.element_size(), lse_out.data_ptr(),
                              out.data_ptr(), here.stream),
           "attn_slice");
  return {out, lse_out};
}

static Tensor scores(const Tensor& q, const Tensor& k, const Tensor& rows, const Tensor& cols, double scale,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& key_padding) {
  const OnDevice here(q);
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  Tensor out = torch::stable::new_empty(q, {t.a.B, t.a.H, t.a.M, t.a.K}, wide(q));
  launched(attn_slice_forward(int(version), t.a, false, nullptr, nullptr, nullptr, nullptr, out.data_ptr(),
                              here.stream),
           "attn_scores");
  return out;
}

static void backward_(const std::optional<Tensor>& dq, const std::optional<Tensor>& dk, const Tensor& q,
                      const Tensor& k, const Tensor& rows, const Tensor& cols, double scale,
                      const Tensor& grad_direct, const std::optional<Tensor>& grad_through,
                      const std::optional<Tensor>& lse, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& key_padding) {
  const OnDevice here(q);
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  const int64_t R = t.a.B * t.a.H * t.a.M;
  const ScoreGrad gradients = {values(grad_direct, q, R * t.a.K, "grad_direct"),
                               values(grad_through, q, R, "grad_through"), values(lse, q, R, "lse")};
  STD_TORCH_CHECK(!grad_through || lse, "attn_backward_: the gradient grad_through the normaliser needs lse");
  int64_t dq_stride[4], dk_stride[4];
  strides_like(dq, q, dq_stride);
  strides_like(dk, k, dk_stride);
  Tensor parts = torch::stable::new_empty(q, {dq ? KEY_SPLITS * R * t.a.d : 0}, wide(q));
  launched(attn_slice_backward(int(version), t.a, gradients, dq ? parts.data_ptr() : nullptr,
                               dq ? dq->data_ptr() : nullptr, dq_stride, dk ? dk->data_ptr() : nullptr,
                               dk_stride, here.stream),
           "attn_backward");
}

static std::tuple<Tensor, Tensor> backward(
    const Tensor& q, const Tensor& k, const Tensor& rows, const Tensor& cols, double scale,
    const Tensor& grad_direct, const std::optional<Tensor>& grad_through, const std::optional<Tensor>& lse,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& key_padding, bool want_q, bool want_k) {
  const Tensor dq = zeros_if(want_q, q), dk = zeros_if(want_k, k);
  backward_(want_q ? std::optional<Tensor>(dq) : std::nullopt,
            want_k ? std::optional<Tensor>(dk) : std::nullopt, q, k, rows, cols, scale, grad_direct,
            grad_through, lse, bias, key_padding);
  return {dq, dk};
}

}  // namespace crystal

STABLE_TORCH_LIBRARY_IMPL(crystal, CompositeExplicitAutograd, m) {
  m.impl("attn_slice_version", TORCH_BOX(&crystal::choose_version));
}

STABLE_TORCH_LIBRARY_IMPL(crystal, GPU, m) {
  m.impl("attn_slice", TORCH_BOX(&crystal::slice));
  m.impl("attn_scores", TORCH_BOX(&crystal::scores));
  m.impl("attn_backward_", TORCH_BOX(&crystal::backward_));
  m.impl("attn_backward", TORCH_BOX(&crystal::backward));
}
