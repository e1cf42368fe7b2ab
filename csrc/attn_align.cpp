// attn_align: schemas, checks, and the CPU's share of the work among threads. attn_align.h
// says what it computes.
#include "attn_align.h"

#include "attn_glue.h"

namespace crystal {

// q, k of both paths, intact first; rows, cols likewise (both halves alike). -> value [B,H,M], norm [2B,H,M],
// grad_through [2B,H,M] (empty for kl). teacher_grad is backward's
static std::tuple<Tensor, Tensor, Tensor> attn_align(const Tensor& q, const Tensor& k, const Tensor& rows,
                                                     const Tensor& cols, bool kl, double scale,
                                                     const std::optional<Tensor>& lse,
                                                     const std::optional<Tensor>& bias,
                                                     const std::optional<Tensor>& key_padding, bool) {
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  const Align p = halves(t, kl);
  const int64_t B = t.a.B / 2, H = t.a.H, M = t.a.M;
  Tensor value = torch::stable::new_empty(q, {B, H, M}, wide(q)),
         norm = torch::stable::new_empty(value, {2 * B, H, M});
  Tensor grad_through = torch::stable::new_empty(value, {kl ? 0 : 2 * B, H, M});
  const AlignRows out = {value.data_ptr(), norm.data_ptr(), grad_through.data_ptr()};
  const void* given = values(lse, q, norm.numel(), "lse");
  torch::stable::parallel_for(0, CRYSTAL_WIDTH(attn_align_units(p)), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) CRYSTAL_WIDTH(attn_align(p, unit, given, out));
  });
  return {value, norm, grad_through};
}

// g [B,H,M] from above -> dq, dk; an empty tensor for one that is not wanted
static std::tuple<Tensor, Tensor> attn_align_backward(const Tensor& g, const Tensor& q, const Tensor& k,
                                                      const Tensor& rows, const Tensor& cols, bool kl,
                                                      double scale, const Tensor& value, const Tensor& norm,
                                                      const Tensor& grad_through,
                                                      const std::optional<Tensor>& bias,
                                                      const std::optional<Tensor>& key_padding,
                                                      bool teacher_grad, bool want_q, bool want_k) {
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  const Align p = halves(t, kl);
  const Attn& both = t.a;
  const int64_t R = both.B * both.H * both.M;
  const void* above = values(g, q, R / 2, "the gradient from above");
  const AlignRows kept = {values(value, q, R / 2, "value"), values(norm, q, R, "norm"),
                          values(grad_through, q, kl ? 0 : R, "grad_through")};
  Tensor dq = zeros_if(want_q, q), dk = zeros_if(want_k, k);
  if (!R || !both.K || (!want_q && !want_k)) return {dq, dk};
  int64_t dq_stride[4] = {}, dk_stride[4] = {};
  if (want_q) strides_like(dq, q, dq_stride);
  if (want_k) strides_like(dk, k, dk_stride);
  const int64_t chunks = CRYSTAL_WIDTH(attn_align_chunks(p, torch::stable::get_num_threads()));
  Tensor parts = torch::stable::new_empty(q, {want_q ? chunks * R * both.d : 0}, wide(q));
  torch::stable::parallel_for(0, p.int_.B * both.G * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit)
      CRYSTAL_WIDTH(attn_align_backward(p, unit, chunks, above, kept, teacher_grad,
                                        want_q ? parts.data_ptr() : nullptr, want_k ? dk.data_ptr() : nullptr,
                                        dk_stride));
  });
  const int64_t skip = teacher_grad ? 0 : p.int_.B * both.H;  // the intact half's rows stay zero
  if (want_q)
    torch::stable::parallel_for(skip, both.B * both.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit)
        CRYSTAL_WIDTH(attn_add_rows(both, unit, chunks, parts.data_ptr(), dq.data_ptr(), dq_stride));
    });
  return {dq, dk};
}

}  // namespace crystal

STABLE_TORCH_LIBRARY_FRAGMENT(crystal, m) {
  m.def(
      "attn_align(Tensor q, Tensor k, Tensor rows, Tensor cols, bool kl, float scale, Tensor? lse, Tensor? "
      "bias, Tensor? key_padding, "
      "bool teacher_grad) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attn_align_backward(Tensor g, Tensor q, Tensor k, Tensor rows, Tensor cols, bool kl, float scale, "
      "Tensor value, Tensor norm, Tensor grad_through, Tensor? bias, "
      "Tensor? key_padding, bool teacher_grad, bool want_q, bool want_k) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(crystal, CPU, m) {
  m.impl("attn_align", TORCH_BOX(&crystal::attn_align));
  m.impl("attn_align_backward", TORCH_BOX(&crystal::attn_align_backward));
}
