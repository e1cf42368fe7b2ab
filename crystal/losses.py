"""The terms of CrystaL's objective, eq. 4 to 6, as pure functions of tensors.

They are the specification. Where crystal was built with its compiled operators, training runs the functions
of the same names in runtime/ops.py: `ce_rows`, `vocab_kl_ce` and `attn_align`, which are tested against
these. All others run as they stand.

B pairs, N rows of logits of all pairs concatenated, V vocabulary, H heads, M answer positions, K columns.
`int` and `cor` are the intact and the corrupted path. All logarithms are natural: losses are in nats.

Everything reduces to one number per pair, [B], and stops there: the caller averages over the pairs of the
global batch, so that a pair counts the same whatever shares a process, a forward or an update with it. The
teacher is detached by the caller, or not: every function has gradients to both sides. Inputs of any float
dtype; computed and returned in float32 at least (float64 for float64).
"""
import math

import torch
import torch.nn.functional as F

from crystal.attention import attn_scores, attn_slice

# --- rows of logits: cross entropy and eq. 4 ---

def ce_rows(logits, targets):
    """Cross entropy of each row, -log P(target) -> [N]. logits [N,V]; targets [N] int64 in 0..V-1.

    There is no target to ignore: rows without a label are never computed.
    """
    log_p = _wide(logits).log_softmax(-1)                                   # [N,V]
    return -log_p.gather(1, targets[:, None])[:, 0]


def kl_rows(logits_int, logits_cor):
    """KL(P_int || P_cor) of each row, summed over the vocabulary (eq. 4 before its mean) -> [N].

    Logits [N,V], finite. Exactly 0 with exactly zero gradients for equal logits.
    """
    log_p = _wide(logits_int).log_softmax(-1)                               # [N,V]
    log_q = _wide(logits_cor).log_softmax(-1)
    return _kl(log_p, log_q)


def vocab_kl_ce(
    logits_int, logits_cor, targets_int, targets_cor, answer, *, teacher_grad=True, in_place=False
):
    """What eq. 4 and both cross entropies read of the logits, row by row -> (ce_int, ce_cor, kl), [N] each.

    n runs over N positions of the sequences. A path has a row of logits at n if it has a label there or if n
    is an answer row, and its rows stand in the order of n.

    logits_int    [R,V], the intact path's rows
    logits_cor    [R',V], the corrupted path's; None if they follow the intact ones in logits_int, as one
                  product with the head leaves them: their gradient is then one tensor too, and nothing
                  is split or joined
    targets_int   [N] int64, label of the intact path at n; negative for none (ce_int is 0 there)
    targets_cor   [N], the corrupted path's
    answer        [N] bool, rows of the KL (kl is 0 elsewhere)
    teacher_grad  False: KL does not move the intact path
    in_place      the logits are the caller's to give up: in a backward pass that does not retain its
                  graph their memory may become that of their gradient, and another backward that
                  needs their values raises

    Raises ValueError if targets and answer do not speak of R and R' rows.
    """
    # Which of the N positions has a row of logits in each path.
    in_int = (targets_int >= 0) | answer                                    # [N]
    in_cor = (targets_cor >= 0) | answer                                    # [N]
    rows = [int(in_int.sum()), int(in_cor.sum())]
    given = [len(logits_int), None if logits_cor is None else len(logits_cor)]
    if given not in (rows, [sum(rows), None]):
        raise ValueError(
            f"targets and answer speak of {rows[0]} intact and {rows[1]} corrupted rows, "
            f"which the logits have not: {given}"
        )
    if logits_cor is None:
        logits_int, logits_cor = logits_int.split(rows)

    # Cross entropy where a path has a label, 0 elsewhere.
    ce_int = _ce_at(logits_int, targets_int, in_int)
    ce_cor = _ce_at(logits_cor, targets_cor, in_cor)

    # KL at the answer positions, of which both paths have a row each.
    teacher = logits_int if teacher_grad else logits_int.detach()
    kl = kl_rows(teacher[answer[in_int]], logits_cor[answer[in_cor]])
    nowhere = kl.new_zeros(len(answer))                                     # [N]
    return ce_int, ce_cor, nowhere.masked_scatter(answer, kl)


def _ce_at(logits, targets, here):
    """A path's cross entropy at all N positions, 0 without a label -> [N].

    logits [R,V]: the path's rows, R of the N positions. here: bool [N], True at these.
    """
    label = targets >= 0
    values = ce_rows(logits[label[here]], targets[label])
    nowhere = values.new_zeros(len(targets))                                # [N]
    return nowhere.masked_scatter(label, values)


def mean_per_pair(values, pair, pairs, share=1.0):
    """Mean of each pair's rows -> [B]. values [N]; pair [N] int64 in 0..B-1, whose row it is; pairs = B.

    share in (0, 1]: below 1 only the largest max(1, floor(share n)) of a pair's n values enter, and only they
    have a gradient (the released code's KL, share 0.1). A pair without rows gives 0 that still has a graph.
    One mean over rows of several kinds (the released code's CE: thought and both answers) is this function on
    the concatenation of their values and pairs. Raises ValueError for a share or a pair out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share}: must be above 0 and at most 1")

    means, used = [], 0
    for b in range(pairs):
        own = values[pair == b]                                             # [n]
        used += len(own)
        if share < 1 and len(own):
            # 0.29 * 100 is 28.999999999999996: the small number makes the floor that of
            # the decimals as written.
            largest = max(1, math.floor(share * len(own) + 1e-9))
            own = own.topk(largest).values
        means.append(own.sum() / max(1, len(own)))

    lost = len(values) - used
    if lost:
        raise ValueError(f"{lost} of {len(values)} rows belong to no pair in 0..{pairs - 1}")
    return torch.stack(means)


# --- slices of attention: eq. 5 of one layer; the caller averages over the chosen layers ---
#
# A [B,H,M,K] are softmax weights (attention.attn_slice), S [B,H,M,K] scores (attention.attn_scores); rows
# [B,M] and cols [B,K] their positions, -1 where padded.

def attn_frobenius(A_int, A_cor):
    """Eq. 5: squared Frobenius norm of A_int - A_cor, summed over heads, rows and columns -> [B].

    Padded and hidden cells are 0 in both slices and add nothing. 0 without rows or columns.
    """
    difference = _wide(A_int) - _wide(A_cor)
    return difference.square().sum((1, 2, 3))


def attn_mse(A_int, A_cor, rows, cols):
    """Mean squared difference of the weights -> [B]: eq. 5 over the number of its cells (table 4, "MSE").

    Cells are heads x rows x columns less the padded ones; causally hidden cells count. 0
    without rows or columns.
    """
    return attn_frobenius(A_int, A_cor) / cells(A_int.shape[1], rows, cols)


def attn_kl(S_int, S_cor, rows, cols):
    """KL(int || cor) over the columns, mean over rows and heads -> [B] (table 4, "KL").

    Weights renormalised over the columns are the softmax of the K scores, whatever the other keys got: scores
    suffice. A cell hidden (-inf) in either path is left out of both. A row that sees no column counts in the
    mean with 0; padded rows do not count. 0 without rows, with exactly zero gradients for equal scores.
    """
    padded = (cols < 0)[:, None, None, :]
    hidden = S_int.isneginf() | S_cor.isneginf() | padded                   # [B,H,M,K]

    # Filled with a number so large that log p = log q there: p = q = 0 gives 0, and where all is hidden
    # p = q = 1/K does too. With -inf it would be NaN.
    log_p = _wide(S_int).masked_fill(hidden, -1e30).log_softmax(-1)
    log_q = _wide(S_cor).masked_fill(hidden, -1e30).log_softmax(-1)
    kl = _kl(log_p, log_q)                                                  # [B,H,M]
    return mean_rows(kl, rows)


def attn_kl_heads_mean(A_int, A_cor, rows, cols):
    """The released code's eq. 5: KL(int || cor) of weights averaged over heads -> [B].

    The weights are renormalised over the columns before they are compared. KL is summed over columns, its
    mean taken over rows. Averaging comes before renormalising, so a head counts by the attention that it
    gives to the columns: this needs true weights, not scores. A weight of 0 (hidden, or too small for its
    dtype) is read as the smallest normal number, with zero gradient, so that no logarithm is infinite: a row
    without weight on any column counts with 0. Padded rows do not count. 0 without rows.
    """
    log_p = _log_share(_wide(A_int).mean(1), cols)                          # [B,M,K]
    log_q = _log_share(_wide(A_cor).mean(1), cols)
    kl = _kl(log_p, log_q)                                                  # [B,M]
    return mean_rows(kl[:, None], rows)


def slice_kind(kind, heads):
    """Which slice attn_loss(kind, heads, ...) compares: "scores" (no normaliser over L) or "weights"."""
    return "scores" if (kind, heads) == ("kl", "keep") else "weights"


def attn_loss(kind, heads, X_int, X_cor, rows, cols):
    """Eq. 5 of one layer in one of its kinds -> [B].

    kind: "kl", "frobenius" or "mse". heads: "keep" compares head by head; "mean" averages them
    first (kl alone). X_int, X_cor [B,H,M,K]: scores or weights, as slice_kind(kind, heads) says.
    Raises ValueError for another choice.
    """
    if (kind, heads) == ("kl", "keep"):
        return attn_kl(X_int, X_cor, rows, cols)
    if (kind, heads) == ("kl", "mean"):
        return attn_kl_heads_mean(X_int, X_cor, rows, cols)
    if (kind, heads) == ("frobenius", "keep"):
        return attn_frobenius(X_int, X_cor)
    if (kind, heads) == ("mse", "keep"):
        return attn_mse(X_int, X_cor, rows, cols)
    raise ValueError(
        f"attention loss {kind!r} with heads {heads!r}: "
        "choose kl, frobenius or mse with keep, or kl with mean"
    )


def attn_align(
    kind, heads, q, k, rows, cols, *, scale=None, lse=None, bias=None, key_padding=None, teacher_grad=True
):
    """Eq. 5 of one layer straight from the queries and keys of both paths -> [B].

    q, k                    [2B,H,L,d], [2B,G,L,d], the intact path's B sequences first
    rows, cols              [B,M], [B,K]: the same for both paths
    scale, bias, key_padding, lse  as in attention.attn_slice, [2B, ...]; "kl" with heads "keep" reads no lse
    teacher_grad            False: the intact path gets no gradient

    kind, heads and what is raised: as in attn_loss.
    """
    # One slice for both paths, whose rows and columns stand at the same positions.
    both = rows.repeat(2, 1), cols.repeat(2, 1)
    how = {"scale": scale, "bias": bias, "key_padding": key_padding}
    if slice_kind(kind, heads) == "scores":
        X = attn_scores(q, k, *both, **how)                                 # [2B,H,M,K]
    else:
        X = attn_slice(q, k, *both, lse=lse, **how)

    X_int, X_cor = X.chunk(2)
    if not teacher_grad:
        X_int = X_int.detach()
    return attn_loss(kind, heads, X_int, X_cor, rows, cols)


# --- eq. 6 ---

def total(terms, weights):
    """Eq. 6: sum of weights[name] * terms[name] -> scalar.

    A term without a weight raises KeyError, so that none drops out unnoticed.
    """
    return sum(weights[name] * term for name, term in terms.items())


# --- VaLR: latents aligned to the patches of frozen encoders ---

def upsample_latents(f, P):
    """States of the K latents of one segment, drawn out linearly along K to P patches -> [*,P,D]. f [*,K,D].

    Patch p sits at (p + 1/2) K / P - 1/2 between the latents, and beyond the outer ones takes theirs.
    P = K changes nothing.
    """
    *leading, K, D = f.shape
    channels = f.reshape(-1, K, D).transpose(1, 2)                          # [n,D,K]
    drawn = F.interpolate(channels, size=P, mode="linear", align_corners=False)
    return drawn.transpose(1, 2).reshape(*leading, P, D)


def patch_alignment(f_hat, f):
    """L_REPA of one pair and one encoder: -1/(NP) sum of cosine(f_hat, f) over N segments and P patches.

    f_hat [N,P,E]: up-sampled and projected latents (the paper's F hat). f [P,E]: the encoder's patch
    features, the same for all segments, or [N,P,E]. Returns a scalar in [-1, 1].
    """
    f = _wide(f).expand_as(f_hat)                                           # [N,P,E]
    cosine = F.cosine_similarity(_wide(f_hat), f, dim=-1)                   # [N,P]
    return -cosine.mean()


# --- LaViT: what a teacher saw and where it looked (its eq. 6 and 7; K latents, N image tokens) ---

def semantics(predicted, V_sem):
    """Eq. 6 of LaViT: 1 - cosine of predicted and V_sem -> [B] in [0, 2].

    predicted [B,E]: the projected latent. V_sem [B,E]: the teacher's semantics.
    """
    predicted = _wide(predicted)
    return 1 - F.cosine_similarity(predicted, V_sem.to(predicted.dtype), dim=-1)


def gaze(A, target, cols):
    """Eq. 7 of LaViT: KL(teacher's gaze || a latent's), summed over the latents -> [B].

    A [B,K,N]: the latents' attention weights on the image, already averaged over layers and heads;
    renormalised here over the N columns. target [B,N]: probabilities, 0 where the teacher's top-k left
    nothing: such a column counts through A's normalisation alone. A pair whose target is all 0 has no gaze to
    learn and gives 0. cols [B,N]: positions, -1 padded.
    """
    log_q = _log_share(_wide(A), cols)                                      # [B,K,N]
    p = _wide(target)                                                       # [B,N]

    # Where p is 0 its logarithm is so small that p log p is exactly 0.
    tiny = torch.finfo(p.dtype).tiny
    log_p = p.clamp(min=tiny).log()
    log_p = log_p.masked_fill(p == 0, -1e30)                                # [B,N]
    kl = _kl(log_p[:, None].expand_as(log_q), log_q)                        # [B,K]
    return kl.sum(1).masked_fill(~p.any(-1), 0.0)


# --- what they share ---

def _wide(x):
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kl(log_p, log_q):
    """KL of normalised log probabilities over the last axis; finite where they are.

    sum p (log p - log q) - p + q: the last two cancel in the sum, p and q being normalised. Cell by cell they
    make it q (x log x - x + 1) >= 0 with x = p / q, flat at x = 1, so that p = q gives a gradient of exactly
    0 and not of round-off.
    """
    p = log_p.exp()
    q = log_q.exp()
    terms = p * (log_p - log_q) - p + q
    return terms.sum(-1)


def _log_share(A, cols):
    """log of weights A [B,M,K] renormalised over the columns."""
    padded = (cols < 0)[:, None, :]
    tiny = torch.finfo(A.dtype).tiny
    log_A = A.clamp(min=tiny).log().masked_fill(padded, -1e30)

    # The softmax of logarithms divides by their sum.
    return log_A.log_softmax(-1)


def cells(H, rows, cols):
    """How many cells a slice has that are not padding, at least 1 -> [B]."""
    M = (rows >= 0).sum(1)                                                  # [B]
    K = (cols >= 0).sum(1)
    return (H * M * K).clamp(min=1)


def mean_rows(values, rows):
    """values [B,H,M] -> [B], mean over heads and rows that are not padding."""
    H = values.shape[1]
    valid = rows >= 0                                                       # [B,M]
    count = H * valid.sum(1)                                                # [B]
    summed = values.masked_fill(~valid[:, None], 0.0).sum((1, 2))
    return summed / count.clamp(min=1)
