// Between vocab_kl_ce_cuda.cpp (with torch) and vocab_kl_ce.cu (without).
#pragma once
#include "vocab_kl_ce.h"

namespace crystal {

struct VocabArgs {
  Float type;
  int64_t N, V;
  const void *z, *z2;                // logits of both paths; z2 = z where one tensor holds both
  int64_t stride, stride2;           // logits from row to row
  int64_t R, R2;                     // rows of each; R2 = -1 where one tensor holds both
  const int64_t *t, *t2;             // [N] labels, negative for none
  const bool* answer;                // [N]
  int64_t* at;                       // [2,N] rows, written forward
  Sums* sums;                        // [N], written forward
  void *ce_int, *ce_cor, *kl;        // [N], written forward
  const void *g_int, *g_cor, *g_kl;  // [N], read backward
  void *d, *d2;                      // gradients, written backward; null if nobody wants them
  int64_t d_stride, d2_stride;
  bool teacher_grad;
};

constexpr int VOCAB_PARTS = 32;  // a row is cut into so many parts at most

// Both return CUDA's error (0: none). version: see vocab_kl_ce.cu. work: [N * VOCAB_PARTS] sums of parts.
int vocab_kl_ce_forward(int version, const VocabArgs& args, Sums* work, void* stream);
int vocab_kl_ce_backward(int version, const VocabArgs& args, void* stream);

}  // namespace crystal
