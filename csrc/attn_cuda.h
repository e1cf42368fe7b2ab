// Between the glue of the attention operators on the GPU (*_cuda.cpp, with torch) and their kernels (*.cu,
// without). All return CUDA's error.
#pragma once
#include "attn_align.h"

namespace crystal {

constexpr int KEY_SPLITS = 8;  // a row's keys, or a column's rows, are shared among so many blocks at most,
constexpr int ROW_PARTS = 2 * KEY_SPLITS;  // and what is summed along a row among so many warps

// top, sum [ROW_PARTS,B,H,M]: room. The rest as in attn_slice.h. version: see attn_slice.cu.
int attn_slice_forward(int version, const Attn& a, bool weights, const void* lse_in, void* top, void* sum,
                       void* lse_out, void* out, void* stream);
// dq_parts [KEY_SPLITS,B,H,M,d]: room, or null where dq is not wanted; adds to dq and dk.
int attn_slice_backward(int version, const Attn& a, const ScoreGrad& t, void* dq_parts, void* dq,
                        const int64_t* dq_stride, void* dk, const int64_t* dk_stride, void* stream);
// Adds parts [splits,B,H,M,d] to rows of dq [B,H,L,d], those of sequences first .. alone; with G for H, K for
// M and cols for rows: to columns of dk.
int attn_add_rows(const Attn& a, int splits, const void* parts, int64_t first, void* dq,
                  const int64_t* dq_stride, void* stream);

// frobenius, norm given. Room: times [B,L], parts [ROW_PARTS,3,B,H,M] forward, [KEY_SPLITS,B,H,M,d] backward.
// Adds to dq and dk; either may be null.
int attn_frobenius_forward(const Align& p, const AlignRows& rows, void* times, void* parts, void* stream);
int attn_frobenius_backward(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad,
                            void* times, void* parts, void* dq, const int64_t* dq_stride, void* dk,
                            const int64_t* dk_stride, void* stream);

// kl alone. parts: room for the larger of [KEY_SPLITS,2B,H,M,d] and [KEY_SPLITS,2B,G,K,d], of those that are
// wanted. Adds to dq and dk; either may be null.
int attn_kl_forward(const Align& p, const AlignRows& rows, void* stream);
int attn_kl_backward(const Align& p, const void* g, const AlignRows& rows, bool teacher_grad, void* parts,
                     void* dq, const int64_t* dq_stride, void* dk, const int64_t* dk_stride, void* stream);

}  // namespace crystal
