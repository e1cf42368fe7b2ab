// attn_slice: softmax weights of M chosen query rows on K chosen key columns, normalised over all keys
// that a row sees.
//
// B sequences, L length, H query heads, G key heads of d numbers; the rows of the H/G heads that share a key
// head are stacked: R = H/G M.
//
//     S_mk = scale <q_m, k_k> + bias_mk,  -inf where hidden          scores
//     A_mk = exp(S_mk - lse_m),  lse_m = log sum_j exp S_mj          weights, over all L keys
//
// With P_mj = exp(S_mj - lse_m), g = dLoss/dA, grad_direct_mk = g_mk A_mk and grad_through_m = sum_k
// grad_direct_mk, the scores' gradient is
//
//     dS_mj = -grad_through_m P_mj,  plus grad_direct_mk at j = k;     dQ = scale dS K,  dK = scale dS^T Q
//
// of which only P has the size R x L, and P is computed again where it is used. For the scores
// alone grad_through is 0 and all of it is R x K: no pass over L. Likewise in the forward where
// attention has computed lse.
//
// Operations, per sequence and key head: 2 R L d forward, 6 R L d backward, and 2 R L exponentials. Bytes: K,
// dK and the chosen rows of Q and dQ once each: at R 448 and bf16 some 450 operations a byte, so matrix
// products bound it; with lse given or for scores, bytes do.
#pragma once
#include "widths.h"

struct Attn {  // what all attention kernels are given
  int64_t B, H, G, L, d, M, K;
  Float type;                        // of q and k
  const void *q, *k;                 // [B,H,L,d], [B,G,L,d]
  int64_t q_stride[4], k_stride[4];  // in numbers
  const int64_t *rows, *cols;        // [B,M], [B,K]; -1 pads
  double scale;
  const void* bias;     // [B,M,L] in the type that is computed in, or null
  const bool* padding;  // [B,L], true where the key is padding, or null
};

struct ScoreGrad {  // what the gradient is given; [B,H,M,K] and [B,H,M], in the type that is computed in
  const void* grad_direct;
  const void* grad_through;  // null: zeros; lse is not read where it is 0
  const void* lse;
};

CRYSTAL_WIDTHS(
    // A unit is a share of the work that nothing else writes to; units run in any order, side by side.
    int64_t attn_slice_units(const Attn&);
    // weights: out = A, lse computed, or copied from lse_in where that is given. Otherwise out = S and
    // lse_out is left alone.
    void attn_slice(const Attn&, int64_t unit, bool weights, const void* lse_in, void* lse_out, void* out);
    // Adds to dk [B,G,L,d] and sets dq_parts [chunks,B,H,M,d]; either may be null. B G chunks units.
    int64_t attn_backward_chunks(const Attn&, bool grad_through, int64_t threads);
    void attn_backward(const Attn&, int64_t unit, int64_t chunks, const ScoreGrad&, void* dq_parts, void* dk,
                       const int64_t* dk_stride);
    // Adds the chunks of dq_parts to dq [B,H,L,d]. B H units.
    void attn_add_rows(const Attn&, int64_t unit, int64_t chunks, void* dq_parts, void* dq,
                       const int64_t* dq_stride);)
