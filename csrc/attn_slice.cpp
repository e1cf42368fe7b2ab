// attn_scores, attn_slice and their gradient: schemas, checks, and the CPU's share of the work among threads.
// attn_slice.h says what they compute.
#include "attn_slice.h"

#include "attn_glue.h"

namespace crystal {

static void forward(const Attn& a, bool weights, const void* lse_in, void* lse_out, void* out) {
  torch::stable::parallel_for(0, CRYSTAL_WIDTH(attn_slice_units(a)), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit)
      CRYSTAL_WIDTH(attn_slice(a, unit, weights, lse_in, lse_out, out));
  });
}

// -> A [B,H,M,K], lse [B,H,M]: the given one, or computed
static std::tuple<Tensor, Tensor> attn_slice(const Tensor& q, const Tensor& k, const Tensor& rows,
                                             const Tensor& cols, double scale,
                                             const std::optional<Tensor>& lse,
                                             const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& key_padding) {
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  Tensor out = torch::stable::new_empty(q, {t.a.B, t.a.H, t.a.M, t.a.K}, wide(q)),
         lse_out = torch::stable::new_empty(q, {t.a.B, t.a.H, t.a.M}, wide(q));
  forward(t.a, true, values(lse, q, lse_out.numel(), "lse"), lse_out.data_ptr(), out.data_ptr());
  return {out, lse_out};
}

// -> S [B,H,M,K]
static Tensor attn_scores(const Tensor& q, const Tensor& k, const Tensor& rows, const Tensor& cols,
                          double scale, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& key_padding) {
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  Tensor out = torch::stable::new_empty(q, {t.a.B, t.a.H, t.a.M, t.a.K}, wide(q));
  forward(t.a, false, nullptr, nullptr, out.data_ptr());
  return out;
}

template <class T>
static bool any(const void* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (static_cast<const T*>(x)[i] != 0) return true;
  return false;
}

// dq [B,H,L,d] += dS K, dk [B,G,L,d] += dS^T Q with dS = grad_direct [B,H,M,K] at the columns, minus
// grad_through [B,H,M] times the softmax. Without grad_through, or where it holds zeros alone, there is no
// pass over L, and lse is not read.
static void attn_backward_(const std::optional<Tensor>& dq, const std::optional<Tensor>& dk, const Tensor& q,
                           const Tensor& k, const Tensor& rows, const Tensor& cols, double scale,
                           const Tensor& grad_direct, const std::optional<Tensor>& grad_through,
                           const std::optional<Tensor>& lse, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& key_padding) {
  const AttnTensors t(q, k, rows, cols, scale, bias, key_padding);
  const Attn& a = t.a;
  const int64_t R = a.B * a.H * a.M;
  ScoreGrad gradients = {values(grad_direct, q, R * a.K, "grad_direct"),
                         values(grad_through, q, R, "grad_through"), values(lse, q, R, "lse")};
  STD_TORCH_CHECK(!grad_through || lse, "attn_backward_: the gradient grad_through the normaliser needs lse");
  if (gradients.grad_through && !(a.type == Float::f64 ? any<double>(gradients.grad_through, R)
                                                       : any<float>(gradients.grad_through, R)))
    gradients.grad_through = nullptr;
  int64_t dq_stride[4], dk_stride[4];
  strides_like(dq, q, dq_stride);
  strides_like(dk, k, dk_stride);
  if (!R || (!dq && !dk)) return;
  const int64_t chunks = CRYSTAL_WIDTH(
      attn_backward_chunks(a, gradients.grad_through != nullptr, torch::stable::get_num_threads()));
  Tensor parts = torch::stable::new_empty(q, {dq ? chunks * R * a.d : 0}, wide(q));
  torch::stable::parallel_for(0, a.B * a.G * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit)
      CRYSTAL_WIDTH(attn_backward(a, unit, chunks, gradients, dq ? parts.data_ptr() : nullptr,
                                  dk ? dk->data_ptr() : nullptr, dk_stride));
  });
  if (!dq) return;
  torch::stable::parallel_for(0, a.B * a.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit)
      CRYSTAL_WIDTH(attn_add_rows(a, unit, chunks, parts.data_ptr(), dq->data_ptr(), dq_stride));
  });
}

// The same, into zeros; an empty tensor for a gradient that is not wanted.
static std::tuple<Tensor, Tensor> attn_backward(
    const Tensor& q, const Tensor& k, const Tensor& rows, const Tensor& cols, double scale,
    const Tensor& grad_direct, const std::optional<Tensor>& grad_through, const std::optional<Tensor>& lse,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& key_padding, bool want_q, bool want_k) {
  const Tensor dq = zeros_if(want_q, q), dk = zeros_if(want_k, k);
  attn_backward_(want_q ? std::optional<Tensor>(dq) : std::nullopt,
                 want_k ? std::optional<Tensor>(dk) : std::nullopt, q, k, rows, cols, scale, grad_direct,
                 grad_through, lse, bias, key_padding);
  return {dq, dk};
}

}  // namespace crystal

STABLE_TORCH_LIBRARY_FRAGMENT(crystal, m) {
  m.def(
      "attn_slice(Tensor q, Tensor k, Tensor rows, Tensor cols, float scale, Tensor? lse, Tensor? bias, "
      "Tensor? key_padding) -> (Tensor, Tensor)");
  m.def(
      "attn_scores(Tensor q, Tensor k, Tensor rows, Tensor cols, float scale, Tensor? bias, Tensor? "
      "key_padding) -> Tensor");
  m.def(
      "attn_backward_(Tensor(a!)? dq, Tensor(b!)? dk, Tensor q, Tensor k, Tensor rows, Tensor cols, float "
      "scale, Tensor grad_direct, Tensor? grad_through, Tensor? lse, "
      "Tensor? bias, Tensor? key_padding) -> ()");
  m.def(
      "attn_backward(Tensor q, Tensor k, Tensor rows, Tensor cols, float scale, Tensor grad_direct, Tensor? "
      "grad_through, Tensor? lse, Tensor? bias, Tensor? key_padding, "
      "bool want_q, bool want_k) -> (Tensor, Tensor)");
  m.def("attn_slice_version(int choose) -> int");  // on the GPU
}

STABLE_TORCH_LIBRARY_IMPL(crystal, CPU, m) {
  m.impl("attn_slice", TORCH_BOX(&crystal::attn_slice));
  m.impl("attn_scores", TORCH_BOX(&crystal::attn_scores));
  m.impl("attn_backward_", TORCH_BOX(&crystal::attn_backward_));
  m.impl("attn_backward", TORCH_BOX(&crystal::attn_backward));
}
