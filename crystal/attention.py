"""The slice of attention's weights that eq. 5 compares: M chosen rows on K chosen columns, never L x L.

B sequences, L sequence length, H query heads, G key/value heads (H a multiple of G), d head size,
M rows, K columns.

    scores   S_mk = scale <q_m, k_k> + bias_mk, -inf where row m cannot see column k
    lse      lse_m = log sum_j exp S_mj over all L keys that row m sees
    weights  A_mk = exp(S_mk - lse_m): what softmax attention gives to column k, other columns
             included in the sum

Rows m and columns k are positions of one sequence, so causality is col <= row; a query and its key
share a position (training and prefill; decoding with a cache is left out). Attention itself keeps
the last word on its output: nothing here touches it, which is why fused attention can stay on while
its weights are supervised.

This file is the specification of the compiled operators. It builds M x L scores and keeps them
for the backward pass.
"""
import torch
import torch.nn.functional as F

INF = float("inf")


def attn_scores(q, k, rows, cols, *, scale=None, bias=None, key_padding=None):
    """Scaled dot products of chosen rows and columns -> [B,H,M,K], float32 (float64 for float64 inputs).

    q            [B,H,L,d], k [B,G,L,d] any float dtype, after rotary embedding; head h of H reads key
                 head h // (H/G)
    rows, cols   [B,M], [B,K] int64 positions in 0..L-1; -1 pads
    scale        factor of the dot products; d**-0.5 by default
    bias         [B,1,M,L] float, added to the scores of the chosen rows (row m of it belongs to
                 rows[:, m]); -inf blocks
    key_padding  [B,L] bool, True where the key is padding

    -inf, with zero gradient, where the column lies after the row, is padding, is blocked, or either index is
    -1. Raises ValueError for rows or cols of another batch, and TypeError for a key_padding that is not bool
    or a bias that is not float: a mask of ones and zeros would be read the wrong way round, or added to the
    scores where it blocks nothing.
    """
    check(q, k, bias, key_padding, rows, cols)

    # Bias and padding are cut to the columns, as the keys are.
    at = cols.clamp(min=0)
    if bias is not None:
        index = at[:, None, None, :]                                # [B,1,1,K]
        bias = bias.gather(3, index.expand(*bias.shape[:3], -1))    # [B,1,M,K]
    if key_padding is not None:
        key_padding = key_padding.gather(1, at)                     # [B,K]
    return _scores(q, _take(k, cols), rows, cols, scale, bias, key_padding)


def attn_lse(q, k, rows, *, scale=None, bias=None, key_padding=None):
    """log sum exp of a row's scores over all keys that it sees -> [B,H,M], float32 or wider.

    Float64 for float64 inputs. Arguments as in attn_scores. -inf, with zero gradient, for a padded row and
    for one that sees no key.
    """
    check(q, k, bias, key_padding)
    B, _, L, _ = k.shape
    every = torch.arange(L, device=k.device).expand(B, -1)          # [B,L]
    scores = _scores(q, k, rows, every, scale, bias, key_padding)   # [B,H,M,L]

    # logsumexp has a gradient of NaN where all is -inf: such rows get zeros first and their -inf after.
    blind = scores.isneginf().all(-1)                               # [B,H,M]
    lse = scores.masked_fill(blind[..., None], 0.0).logsumexp(-1)
    return lse.masked_fill(blind, -INF)


def attn_slice(q, k, rows, cols, *, scale=None, lse=None, bias=None, key_padding=None):
    """Softmax weights of chosen rows on chosen columns -> A [B,H,M,K], float32 (float64 for float64 inputs).

    Normalised over all keys that the row sees, not over the K columns: a row of A sums to the share of
    attention that the columns get, at most 1 for distinct columns. Exactly 0, with zero gradient, where
    attn_scores is -inf; a row that sees no key is all zeros. Arguments as in attn_scores, and

    lse   [B,H,M], the rows' log sum exp where attention has computed it. Only its value counts: the
          gradient of the normaliser goes to q and k whether or not lse is given or carries a graph, and
          none goes to lse.

    With g = dLoss/dA and P the row's softmax over all keys, dLoss/dS_mj = -P_mj sum_k g_mk A_mk, plus g_mk
    A_mk at j = k.
    """
    how = {"scale": scale, "bias": bias, "key_padding": key_padding}
    scores = attn_scores(q, k, rows, cols, **how)                   # [B,H,M,K]
    norm = attn_lse(q, k, rows, **how)                              # [B,H,M]

    # A row that sees no key has scores of -inf alone, and -inf - (-inf) would be NaN.
    blind = norm.isneginf()
    if lse is not None:
        norm = norm + (lse - norm).detach()  # the value is the given one, the gradient still flows
    norm = norm.masked_fill(blind, 0.0)
    return (scores - norm[..., None]).exp()


def attention_with_slice(q, k, v, rows, cols, *, scale=None, mask=None):
    """Attention's output and its slice -> (out [B,H,L,d] like q, A [B,H,M,K] of attn_slice).

    v     [B,G,L,d]
    mask  None (causal), bool [B,1,L,L], True where a row sees a key, or float [B,1,L,L] added to the scores.
          The slice is that of the masked weights, and causal whatever the mask says.
    """
    bias = None
    if mask is not None:
        mask = additive(mask, q.dtype)
        bias = row_bias(mask, rows)
    out = attend(q, k, v, mask, scale=scale)
    return out, attn_slice(q, k, rows, cols, scale=scale, bias=bias)


def attend(q, k, v, mask=None, *, scale=None, dropout=0.0, causal=True):
    """PyTorch's fused attention -> [B,H,L,d] like q.

    q [B,H,L,d], k and v [B,G,J,d]; H a multiple of G, J keys, as many as rows where it is causal
    mask    [B,1,L,J], bool, True where a row sees a key, or float added to the scores; None: causal, or every
            key where causal is False
    """
    # Under a mask the fused attentions of a GPU want a key head for every query head; PyTorch would take its
    # plain one instead, which writes L x L.
    if mask is not None and q.is_cuda:
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)

    shared = q.shape[1] != k.shape[1]
    causal = mask is None and causal
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal, enable_gqa=shared
    )


def additive(mask, dtype):
    """A mask as attention takes it, bool or float -> float, -inf where blocked."""
    if mask.is_floating_point():
        return mask.to(dtype)
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, -INF)


def row_bias(mask, rows):
    """Of an additive mask [B,1,L,L] the chosen rows -> [B,1,M,L]."""
    return _take(mask, rows)


class AttentionRecorder:
    """Reads the slice of chosen layers during one forward; make a new one for each forward.

    It travels as a keyword of the model's forward to the attention function, which calls
    recorder(layer, q, k, scale) with the q and k that attention uses; the result lies in
    recorder.slices once the forward is done.

    layers             set of decoder layers to read, counted from 0
    rows, cols         [B,M], [B,K] as in attn_scores, B the batch that attention
                       sees (both paths: intact half first)
    read               attn_slice, attn_scores, which needs no pass over all L keys, or a function called as
                       these two are: a compiled one (ops.py), or one that goes straight to a loss
    bias, key_padding  as in attn_scores, where attention has them; right padding needs neither
    """

    def __init__(self, layers, rows, cols, read=attn_slice, *, bias=None, key_padding=None):
        self.layers = set(layers)
        self.rows = rows
        self.cols = cols
        self.read = read
        self.bias = bias
        self.key_padding = key_padding
        self._slices = {}

    def __call__(self, layer, q, k, scale=None):
        """q [B,H,L,d], k [B,G,L,d] of decoder layer `layer`; does nothing in a layer that was not chosen."""
        if layer not in self.layers:
            return
        how = {"scale": scale, "bias": self.bias, "key_padding": self.key_padding}
        values = self.read(q, k, self.rows, self.cols, **how)

        # Checkpointing runs the layer again in backward. That run must save the same tensors, so the slice is
        # always computed; the loss hangs on the first one, so a later one is dropped.
        self._slices.setdefault(layer, values)

    def mean(self):
        """The mean over the chosen layers of what was read, once the forward is done."""
        return torch.stack(list(self.slices.values())).mean(0)

    @property
    def slices(self):
        """{layer: [B,H,M,K], or what the function returned}, in order of layers.

        RuntimeError while a chosen one is missing.
        """
        missing = sorted(self.layers - self._slices.keys())
        if missing:
            raise RuntimeError(
                f"AttentionRecorder: layers {missing} wrote no slice; wrote: {sorted(self._slices)}. "
                "Has the forward run, does the model have these layers, and does its attention function call "
                "the recorder?"
            )
        return dict(sorted(self._slices.items()))


def in_turn(*recorders):
    """Several recorders as one, for a forward that is read in more than one way."""

    def record(layer, q, k, scale=None):
        for recorder in recorders:
            recorder(layer, q, k, scale)

    return record


def _scores(q, k, rows, cols, scale, bias, key_padding):
    """attn_scores after k [B,G,K,d], bias [B,1,M,K] and key_padding [B,K] have been cut to the columns."""
    B, H, _, d = q.shape
    G, K = k.shape[1:3]
    M = rows.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = d**-0.5 if scale is None else scale

    # The heads of a group are stacked as rows of one product, so that no key is repeated.
    q = _take(q, rows).to(dtype)                                    # [B,H,M,d]
    q = q.reshape(B, G, H // G * M, d) * scale
    k = k.to(dtype).transpose(2, 3)                                 # [B,G,d,K]
    with torch.autocast(q.device.type, enabled=False):  # it would take the product in half precision
        scores = q @ k                                              # [B,G,H/G M,K]
    scores = scores.view(B, H, M, K)

    # Hidden are columns after the row (a row at -1 precedes every column), padding, and what a bias blocks.
    later = cols[:, None, :] > rows[:, :, None]                     # [B,M,K]
    hidden = later | (cols < 0)[:, None, :]
    if key_padding is not None:
        hidden = hidden | key_padding[:, None, :]
    hidden = hidden[:, None]                                        # [B,1,M,K]
    if bias is not None:
        scores = scores + bias.to(dtype)
        hidden = hidden | bias.isneginf()
    return scores.masked_fill(hidden, -INF)


def _take(x, at):
    """x [B,h,L,d], positions [B,M] -> [B,h,M,d]; -1 reads position 0, which the caller hides."""
    h, d = x.shape[1], x.shape[3]
    index = at.clamp(min=0)[:, None, :, None]                       # [B,1,M,1]
    return x.gather(2, index.expand(-1, h, -1, d))


def check(q, k, bias, key_padding, rows=None, cols=None):
    """Raises ValueError or TypeError for what attn_scores says it does."""
    for name, at in (("rows", rows), ("cols", cols)):
        if at is not None and len(at) != len(q):
            raise ValueError(
                f"{name} holds positions of {len(at)} sequences, the batch {len(q)}; where both paths are "
                "one batch, positions are given for both (repeat(2, 1))"
            )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if key_padding is not None and key_padding.dtype != torch.bool:
        raise TypeError(f"key_padding is {key_padding.dtype}: it must be bool, True where the key is padding")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias is {bias.dtype}: it must be float, added to the scores, -inf to block")
