// vocab_kl_ce on the GPU: from torch's tensors to the launchers of vocab_kl_ce.cu. Its
// schemas stand in vocab_kl_ce.cpp.
#include "vocab_kl_ce_cuda.h"

#include "cuda_glue.h"

namespace crystal {

static int64_t version = 3;

// vocab_kl_ce_version(choose): which of the kernels in vocab_kl_ce.cu serve from now on, 1 to 3; 0 changes
// nothing. For tests and measurements.
static int64_t choose_version(int64_t choose) {
  STD_TORCH_CHECK(choose >= 0 && choose <= 3, "vocab_kl_ce_version: 0 to 3, not ", choose);
  return choose ? version = choose : version;
}

static VocabArgs args_of(const Tensor& logits, const std::optional<Tensor>& cor, const Tensor& t,
                         const Tensor& t2, const Tensor& answer) {
  for (const Tensor* x : {&logits, cor ? &*cor : &logits}) {
    on_one_device(logits, *x);
    STD_TORCH_CHECK(
        x->dim() == 2 && x->size(1) == logits.size(1) && x->scalar_type() == logits.scalar_type() &&
            (x->size(1) < 2 || x->stride(1) == 1),
        "vocab_kl_ce: logits must be [rows,V] of one vocabulary and dtype, those of a row side by side");
  }
  for (const Tensor* x : {&t, &t2, &answer}) {
    on_one_device(logits, *x);
    STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == answer.size(0) && x->is_contiguous() &&
                        x->scalar_type() == (x == &answer ? ScalarType::Bool : ScalarType::Long),
                    "vocab_kl_ce: targets must be int64 [N], answer bool [N], contiguous");
  }
  VocabArgs a = {};
  a.type = float_type(logits), a.N = answer.size(0), a.V = logits.size(1);
  a.z = logits.data_ptr(), a.z2 = cor ? cor->data_ptr() : a.z;
  a.stride = logits.stride(0), a.stride2 = cor ? cor->stride(0) : a.stride;
  a.R = logits.size(0), a.R2 = cor ? cor->size(0) : -1;
  a.t = (const int64_t*)t.data_ptr(), a.t2 = (const int64_t*)t2.data_ptr(),
  a.answer = (const bool*)answer.data_ptr();
  return a;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits,
                                                                  const std::optional<Tensor>& cor,
                                                                  const Tensor& t, const Tensor& t2,
                                                                  const Tensor& answer, bool, bool) {
  VocabArgs a = args_of(logits, cor, t, t2, answer);
  const OnDevice here(logits);
  Tensor ce_int = torch::stable::new_empty(logits, {a.N}, wide(logits)),
         ce_cor = torch::stable::new_empty(ce_int, {a.N}), kl = torch::stable::new_empty(ce_int, {a.N});
  Tensor sums = torch::stable::new_empty(logits, {a.N, 5}, ScalarType::Double),
         at = torch::stable::new_empty(t, {2, a.N});
  Tensor work = torch::stable::new_empty(sums, {a.N * VOCAB_PARTS, 5});
  a.ce_int = ce_int.data_ptr(), a.ce_cor = ce_cor.data_ptr(), a.kl = kl.data_ptr(),
  a.sums = (Sums*)sums.data_ptr(), a.at = (int64_t*)at.data_ptr();
  launched(vocab_kl_ce_forward(int(version), a, (Sums*)work.data_ptr(), here.stream), "vocab_kl_ce");
  return {ce_int, ce_cor, kl, sums, at};
}

static void gradients(VocabArgs a, const Tensor& logits, const Tensor& g_int, const Tensor& g_cor,
                      const Tensor& g_kl, const Tensor& sums, const Tensor& at, bool teacher_grad) {
  for (const Tensor* g : {&g_int, &g_cor, &g_kl}) {
    on_one_device(logits, *g);
    STD_TORCH_CHECK(g->is_contiguous() && g->numel() == a.N && g->scalar_type() == wide(logits),
                    "vocab_kl_ce: gradients from above must be contiguous [N]");
  }
  a.g_int = g_int.data_ptr(), a.g_cor = g_cor.data_ptr(), a.g_kl = g_kl.data_ptr(),
  a.sums = (Sums*)sums.data_ptr(), a.at = (int64_t*)at.data_ptr();
  a.teacher_grad = teacher_grad;
  const OnDevice here(logits);
  launched(vocab_kl_ce_backward(int(version), a, here.stream), "vocab_kl_ce_backward");
}

static std::tuple<Tensor, Tensor> backward(const Tensor& g_int, const Tensor& g_cor, const Tensor& g_kl,
                                           const Tensor& logits, const std::optional<Tensor>& cor,
                                           const Tensor& t, const Tensor& t2, const Tensor& answer,
                                           const Tensor& sums, const Tensor& at, bool teacher_grad,
                                           bool want_int, bool want_cor) {
  VocabArgs a = args_of(logits, cor, t, t2, answer);
  want_int |= !cor;
  Tensor d = torch::stable::new_empty(logits, {want_int ? a.R : 0, a.V}),
         d2 = torch::stable::new_empty(logits, {want_cor && cor ? a.R2 : 0, a.V});
  a.d = want_int ? d.data_ptr() : nullptr, a.d2 = !cor ? a.d : want_cor ? d2.data_ptr() : nullptr;
  a.d_stride = a.d2_stride = a.V;
  gradients(a, logits, g_int, g_cor, g_kl, sums, at, teacher_grad);
  return {d, d2};
}

static void backward_(const Tensor& g_int, const Tensor& g_cor, const Tensor& g_kl, const Tensor& logits,
                      const std::optional<Tensor>& cor, const Tensor& t, const Tensor& t2,
                      const Tensor& answer, const Tensor& sums, const Tensor& at, bool teacher_grad,
                      bool want_int, bool want_cor) {
  VocabArgs a = args_of(logits, cor, t, t2, answer);
  a.d = want_int || !cor ? (void*)a.z : nullptr, a.d2 = want_cor || !cor ? (void*)a.z2 : nullptr;
  a.d_stride = a.stride, a.d2_stride = a.stride2;
  gradients(a, logits, g_int, g_cor, g_kl, sums, at, teacher_grad);
}

}  // namespace crystal

STABLE_TORCH_LIBRARY_IMPL(crystal, CompositeExplicitAutograd, m) {
  m.impl("vocab_kl_ce_version", TORCH_BOX(&crystal::choose_version));
}

STABLE_TORCH_LIBRARY_IMPL(crystal, GPU, m) {
  m.impl("vocab_kl_ce", TORCH_BOX(&crystal::forward));
  m.impl("vocab_kl_ce_backward", TORCH_BOX(&crystal::backward));
  m.impl("vocab_kl_ce_backward_", TORCH_BOX(&crystal::backward_));
}
