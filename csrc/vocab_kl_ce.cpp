// vocab_kl_ce: schema, checks, and its work on the CPU. vocab_kl_ce.h says what it computes.
//
// Every row is cut into parts of 16384 logits, whatever the number of cores, so that results do not depend on
// it. ATen's pool shares the parts among its threads; the sums of a row's parts are merged in order.
#include "vocab_kl_ce.h"

#include <cstring>
#include <vector>

#include "common.h"

namespace crystal {

constexpr int64_t PART = 16384;

// Rows of both paths as the kernels see them. Without logits_cor the intact path's rows stand first in
// logits_int, the corrupted one's after them.
struct Rows {
  char *z, *z2;             // first row of each
  int64_t stride, stride2;  // bytes from row to row
  int64_t R, R2, V, cell;   // rows, vocabulary, bytes of a logit
};

static void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "vocab_kl_ce: logits must be [rows,V]");
  STD_TORCH_CHECK(logits.size(1) < 2 || logits.stride(1) == 1,
                  "vocab_kl_ce: the logits of a row must lie side by side");
}

static Rows rows_of(const Tensor& logits, const std::optional<Tensor>& cor) {
  check_logits(logits);
  const int64_t cell = int64_t(logits.element_size());
  char* z = (char*)logits.data_ptr();
  if (!cor)
    return {z,
            z,
            logits.stride(0) * cell,
            logits.stride(0) * cell,
            logits.size(0),
            logits.size(0),
            logits.size(1),
            cell};
  check_logits(*cor);
  STD_TORCH_CHECK(cor->size(1) == logits.size(1) && cor->scalar_type() == logits.scalar_type(),
                  "vocab_kl_ce: both paths need one vocabulary and dtype");
  return {z,
          (char*)cor->data_ptr(),
          logits.stride(0) * cell,
          cor->stride(0) * cell,
          logits.size(0),
          cor->size(0),
          logits.size(1),
          cell};
}

static void check_labels(const Tensor& targets_int, const Tensor& targets_cor, const Tensor& answer) {
  STD_TORCH_CHECK(
      targets_int.scalar_type() == ScalarType::Long && targets_cor.scalar_type() == ScalarType::Long,
      "vocab_kl_ce: targets must be int64");
  STD_TORCH_CHECK(answer.scalar_type() == ScalarType::Bool, "vocab_kl_ce: answer must be bool");
  for (const Tensor* x : {&targets_int, &targets_cor, &answer})
    STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == answer.size(0) && x->is_contiguous(),
                    "vocab_kl_ce: targets and answer must be contiguous [N]");
}

// logits_int [R,V], logits_cor [R',V] or none, targets [N], answer [N] -> ce_int, ce_cor, kl [N] (0 where
// there is none), sums [N,5] float64, at [2,N]: which row of its logits holds n, -1 for none.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits_int,
                                                                  const std::optional<Tensor>& logits_cor,
                                                                  const Tensor& targets_int,
                                                                  const Tensor& targets_cor,
                                                                  const Tensor& answer, bool, bool) {
  const Rows rows = rows_of(logits_int, logits_cor);
  check_labels(targets_int, targets_cor, answer);
  const Float type = float_type(logits_int);
  const int64_t N = answer.size(0), V = rows.V, parts = (V + PART - 1) / PART;
  Tensor ce_int = torch::stable::new_zeros(logits_int, {N}, wide(logits_int)),
         ce_cor = torch::stable::new_zeros(ce_int, {N}), kl = torch::stable::new_zeros(ce_int, {N});
  Tensor sums = torch::stable::new_zeros(logits_int, {N, 5}, ScalarType::Double),
         at = torch::stable::new_empty(targets_int, {2, N});
  const int64_t *t = (const int64_t*)targets_int.data_ptr(), *t2 = (const int64_t*)targets_cor.data_ptr();
  const bool* both = (const bool*)answer.data_ptr();
  int64_t *at_int = (int64_t*)at.data_ptr(), *at_cor = at_int + N, seen = 0, seen2 = 0;
  for (int64_t n = 0; n < N; ++n) {
    STD_TORCH_CHECK(t[n] < V && t2[n] < V, "vocab_kl_ce: a target is not below the vocabulary's ", V);
    at_int[n] = t[n] >= 0 || both[n] ? seen++ : -1;
    at_cor[n] = t2[n] >= 0 || both[n] ? seen2++ : -1;
  }
  if (!logits_cor)
    for (int64_t n = 0; n < N; ++n) at_cor[n] += at_cor[n] >= 0 ? seen : 0;
  const bool fits = logits_cor ? seen == rows.R && seen2 == rows.R2 : seen + seen2 == rows.R;
  STD_TORCH_CHECK(fits, "vocab_kl_ce: targets and answer speak of ", seen, " intact and ", seen2,
                  " corrupted rows, the logits have ", rows.R, logits_cor ? " and " : " together",
                  logits_cor ? std::to_string(rows.R2) : "");

  std::vector<Sums> of_part(N * parts);
  torch::stable::parallel_for(0, N * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / parts, from = i % parts * PART, count = std::min(PART, V - from);
      const char* z = at_int[n] < 0 ? nullptr : rows.z + at_int[n] * rows.stride + from * rows.cell;
      const char* z2 = at_cor[n] < 0 ? nullptr : rows.z2 + at_cor[n] * rows.stride2 + from * rows.cell;
      if (z && z2 && !both[n]) {  // no KL between them: what one path holds must not matter to the other
        Sums other;
        CRYSTAL_WIDTH(vocab_kl_ce_sums(type, z, nullptr, count, &of_part[i]));
        CRYSTAL_WIDTH(vocab_kl_ce_sums(type, nullptr, z2, count, &other));
        of_part[i].m2 = other.m2, of_part[i].s2 = other.s2;
      } else if (z || z2) {
        CRYSTAL_WIDTH(vocab_kl_ce_sums(type, z, z2, count, &of_part[i]));
      }
    }
  });
  for (int64_t n = 0; n < N; ++n) {
    if (at_int[n] < 0 && at_cor[n] < 0) continue;
    Sums row = of_part[n * parts];
    for (int64_t i = 1; i < parts; ++i) row = merged(row, of_part[n * parts + i]);
    row.e = both[n] ? row.e / row.s : 0;
    ((Sums*)sums.data_ptr())[n] = row;
    auto logit = [&](const char* z, int64_t v) -> double {
      if (type == Float::f32) return ((const float*)z)[v];
      if (type == Float::f64) return ((const double*)z)[v];
      const uint32_t bits = uint32_t(((const uint16_t*)z)[v]) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    };
    auto set = [&](const Tensor& x, double value) {
      if (type == Float::f64)
        ((double*)x.data_ptr())[n] = value;
      else
        ((float*)x.data_ptr())[n] = float(value);
    };
    if (t[n] >= 0) set(ce_int, log(row.s) - (logit(rows.z + at_int[n] * rows.stride, t[n]) - row.m));
    if (t2[n] >= 0) set(ce_cor, log(row.s2) - (logit(rows.z2 + at_cor[n] * rows.stride2, t2[n]) - row.m2));
    if (both[n]) {
      const double value = row.e - log(row.s) + log(row.s2);
      set(kl, value < 0 ? 0 : value);  // by rounding alone
    }
  }
  return {ce_int, ce_cor, kl, sums, at};
}

// Writes the gradients of rows into rows d, which may be the same memory; null pointers for a path
// whose gradient nobody wants.
static void gradients(const Rows& rows, char* d, int64_t stride, char* d2, int64_t stride2,
                      const Tensor& g_int, const Tensor& g_cor, const Tensor& g_kl, const Tensor& targets_int,
                      const Tensor& targets_cor, const Tensor& answer, const Tensor& sums, const Tensor& at,
                      Float type, bool teacher_grad) {
  check_labels(targets_int, targets_cor, answer);
  const int64_t N = answer.size(0), V = rows.V, parts = (V + PART - 1) / PART;
  for (const Tensor* g : {&g_int, &g_cor, &g_kl})
    STD_TORCH_CHECK(g->is_contiguous() && g->numel() == N &&
                        (g->scalar_type() == ScalarType::Double) == (type == Float::f64),
                    "vocab_kl_ce: gradients from above must be contiguous [N]");
  const int64_t *t = (const int64_t*)targets_int.data_ptr(), *t2 = (const int64_t*)targets_cor.data_ptr();
  const int64_t *at_int = (const int64_t*)at.data_ptr(), *at_cor = at_int + N;
  const bool* both = (const bool*)answer.data_ptr();
  auto value = [&](const Tensor& g, int64_t n) {
    return type == Float::f64 ? ((const double*)g.data_ptr())[n] : ((const float*)g.data_ptr())[n];
  };
  torch::stable::parallel_for(0, N * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / parts, from = i % parts * PART, count = std::min(PART, V - from);
      const char* z = at_int[n] < 0 ? nullptr : rows.z + at_int[n] * rows.stride + from * rows.cell;
      const char* z2 = at_cor[n] < 0 ? nullptr : rows.z2 + at_cor[n] * rows.stride2 + from * rows.cell;
      char* y = z && d ? d + at_int[n] * stride + from * rows.cell : nullptr;
      char* y2 = z2 && d2 ? d2 + at_cor[n] * stride2 + from * rows.cell : nullptr;
      auto inside = [&](int64_t label) { return label >= from && label < from + count ? label - from : -1; };
      const double g_both = both[n] ? value(g_kl, n) : 0;
      const Above g = {t[n] < 0 ? 0 : value(g_int, n),
                       t2[n] < 0 ? 0 : value(g_cor, n),
                       g_both,
                       teacher_grad ? g_both : 0,
                       inside(t[n]),
                       inside(t2[n])};
      const Sums& row = ((const Sums*)sums.data_ptr())[n];
      // A path's rows are not read for a gradient that nothing asks for: 0 times what stands there
      // might not be 0.
      if (g.g_kl != 0 && (y2 || (y && teacher_grad))) {
        CRYSTAL_WIDTH(vocab_kl_ce_gradients(type, z, z2, y, y2, count, row, g));
        continue;
      }
      if (y && g.g_int != 0)
        CRYSTAL_WIDTH(vocab_kl_ce_gradients(type, z, nullptr, y, nullptr, count, row, g));
      else if (y)
        std::memset(y, 0, count * rows.cell);
      if (y2 && g.g_cor != 0)
        CRYSTAL_WIDTH(vocab_kl_ce_gradients(type, nullptr, z2, nullptr, y2, count, row, g));
      else if (y2)
        std::memset(y2, 0, count * rows.cell);
    }
  });
}

// Gradients of logits_int and logits_cor; one that is not wanted, or that logits_int's
// holds already, is empty.
static std::tuple<Tensor, Tensor> backward(const Tensor& g_int, const Tensor& g_cor, const Tensor& g_kl,
                                           const Tensor& logits_int, const std::optional<Tensor>& logits_cor,
                                           const Tensor& targets_int, const Tensor& targets_cor,
                                           const Tensor& answer, const Tensor& sums, const Tensor& at,
                                           bool teacher_grad, bool want_int, bool want_cor) {
  const Rows rows = rows_of(logits_int, logits_cor);
  want_int |= !logits_cor;
  Tensor d = torch::stable::new_empty(logits_int, {want_int ? rows.R : 0, rows.V});
  Tensor d2 = torch::stable::new_empty(logits_int, {want_cor && logits_cor ? rows.R2 : 0, rows.V});
  char *to = want_int ? (char*)d.data_ptr() : nullptr, *to2 = !logits_cor ? to
                                                              : want_cor  ? (char*)d2.data_ptr()
                                                                          : nullptr;
  gradients(rows, to, rows.V * rows.cell, to2, rows.V * rows.cell, g_int, g_cor, g_kl, targets_int,
            targets_cor, answer, sums, at, float_type(logits_int), teacher_grad);
  return {d, d2};
}

// The same, written over the logits.
static void backward_(const Tensor& g_int, const Tensor& g_cor, const Tensor& g_kl, const Tensor& logits_int,
                      const std::optional<Tensor>& logits_cor, const Tensor& targets_int,
                      const Tensor& targets_cor, const Tensor& answer, const Tensor& sums, const Tensor& at,
                      bool teacher_grad, bool want_int, bool want_cor) {
  const Rows rows = rows_of(logits_int, logits_cor);
  gradients(rows, want_int || !logits_cor ? rows.z : nullptr, rows.stride,
            want_cor || !logits_cor ? rows.z2 : nullptr, rows.stride2, g_int, g_cor, g_kl, targets_int,
            targets_cor, answer, sums, at, float_type(logits_int), teacher_grad);
}

}  // namespace crystal

STABLE_TORCH_LIBRARY_FRAGMENT(crystal, m) {
  m.def("vocab_kl_ce_version(int choose) -> int");  // of the CUDA kernels alone
  m.def(
      "vocab_kl_ce(Tensor logits_int, Tensor? logits_cor, Tensor targets_int, Tensor targets_cor, Tensor "
      "answer, "
      "bool teacher_grad, bool in_place) -> (Tensor ce_int, Tensor ce_cor, Tensor kl, Tensor sums, Tensor "
      "at)");  // the two flags are for the backward pass
  m.def(
      "vocab_kl_ce_backward(Tensor g_int, Tensor g_cor, Tensor g_kl, Tensor logits_int, Tensor? logits_cor, "
      "Tensor targets_int, Tensor targets_cor, Tensor answer, "
      "Tensor sums, Tensor at, bool teacher_grad, bool want_int, bool want_cor) -> (Tensor, Tensor)");
  m.def(
      "vocab_kl_ce_backward_(Tensor g_int, Tensor g_cor, Tensor g_kl, Tensor(a!) logits_int, Tensor(b!)? "
      "logits_cor, Tensor targets_int, Tensor targets_cor, Tensor answer, "
      "Tensor sums, Tensor at, bool teacher_grad, bool want_int, bool want_cor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(crystal, CPU, m) {
  m.impl("vocab_kl_ce", TORCH_BOX(&crystal::forward));
  m.impl("vocab_kl_ce_backward", TORCH_BOX(&crystal::backward));
  m.impl("vocab_kl_ce_backward_", TORCH_BOX(&crystal::backward_));
}
