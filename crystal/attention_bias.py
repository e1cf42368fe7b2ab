"""Who may look at what: (query rows, key columns, bias) expanded to the additive mask that all layers share.

B sequences, L length, M chosen rows. A method says which rows see which columns with what bias added to
their scores: -inf blocks (LIVR's bottleneck), ln gamma dims (LaViT's gate). One [B,1,L,L] tensor serves
every head and layer; none is built where no method asks for one. A row that would see nothing sees itself,
so that no softmax is empty.
"""
from dataclasses import dataclass

import torch


@dataclass
class AttentionBias:
    """A value added to the scores of every pair of some queries and some keys.

    queries, keys: bool [B,L]. value: -inf blocks the pair.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    value: float = float("-inf")


def row_biases(biases, rows, dtype=torch.float32):
    """What biases add to the scores of chosen rows -> [B,1,M,L] of `dtype`, or None without any.

    An AttentionRecorder takes it as its bias. rows [B,M], -1 pads. Causality is the recorder's own.
    """
    at = rows.clamp(min=0)
    added = None
    for bias in biases:
        queries = bias.queries.gather(1, at)                                # [B,M]
        cells = queries[:, None, :, None] & bias.keys[:, None, None, :]     # [B,1,M,L]
        value = filled(cells, bias.value, dtype)
        added = value if added is None else added + value
    return added


def additive_mask(biases, attention_mask, dtype=torch.float32):
    """Causality, padding and biases in one tensor [B,1,L,L] of `dtype`, to be added to attention's scores.

    attention_mask: [B,L], 1 for tokens and 0 for padding. Biases that meet in a cell add up.
    """
    B, L = attention_mask.shape
    device = attention_mask.device

    # Every row sees itself and what stands before it, unless that is padding.
    causal = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    seen = causal & attention_mask.bool()[:, None, :]                       # [B,L,L]
    mask = torch.zeros(B, L, L, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))
    for bias in biases:
        cells = bias.queries[:, :, None] & bias.keys[:, None, :]            # [B,L,L]
        mask = mask + filled(cells, bias.value, dtype)

    # A row that would see nothing sees itself.
    empty = (mask == float("-inf")).all(-1)                                 # [B,L]
    itself = torch.eye(L, dtype=torch.bool, device=device)
    mask = mask.masked_fill(empty[:, :, None] & itself, 0.0)
    return mask[:, None]


def filled(cells, value, dtype):
    """`value` where `cells` (bool) is True, 0 elsewhere.

    Not a product with the cells: 0 times -inf is not a number.
    """
    value = torch.as_tensor(value, dtype=dtype, device=cells.device)
    return torch.where(cells, value, torch.zeros_like(value))
