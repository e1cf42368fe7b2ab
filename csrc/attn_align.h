// attn_align: how far the attention of two paths is apart, row by row, from their queries and keys.
//
// q [2B,H,L,d], k [2B,G,L,d], the intact path's B sequences first; both read the same M rows and K columns.
// x, y are scores (attn_slice.h) of the intact and the corrupted path, A, A' weights over all L keys; p, q
// softmaxes over those columns that both rows see.
//
//     kl         KL_m = sum_k p log(p/q) - p + q      dx = p (log p - log q - KL),  dy = q - p
//     frobenius  F_m  = sum_k (A - A')^2
//                grad_direct = 2 (A - A') A  and  -2 (A - A') A',  from there as in attn_slice
//
// kl needs the M x K scores alone: with R = H/G M rows to a key head 4 R K d operations forward, 12 backward,
// and K columns instead of L keys to read. frobenius adds what attn_slice costs for each path; its
// grad_direct are computed again in the tiles of keys that the pass over L goes through anyhow, so that with
// thousands of columns nothing of size M x K is written either.
#pragma once
#include "attn_slice.h"

struct Align {
  Attn int_, cor;  // the two halves, B sequences each; rows and cols are the same
  bool kl;         // else frobenius
};

struct AlignRows {     // of each path where two: [2B,H,M], else [B,H,M], in the type that is computed in
  void* value;         // KL or F
  void* norm;          // log sum exp: kl over the shared columns, frobenius over all keys
  void* grad_through;  // frobenius: sum of grad_direct over the columns
};

CRYSTAL_WIDTHS(
    int64_t attn_align_units(const Align&);
    // lse_in: frobenius' norm where attention has computed it [2B,H,M], or null
    void attn_align(const Align&, int64_t unit, const void* lse_in, const AlignRows&);
    // g [B,H,M] from above. B G chunks units add to dk [2B,G,L,d] and set dq_parts [chunks,2B,H,M,d], either
    // of which may be null; without teacher_grad the intact half of dk is left alone and that of dq_parts is
    // zero.
    int64_t attn_align_chunks(const Align&, int64_t threads);
    void attn_align_backward(const Align&, int64_t unit, int64_t chunks, const void* g, const AlignRows&,
                             bool teacher_grad, void* dq_parts, void* dk, const int64_t* dk_stride);)
