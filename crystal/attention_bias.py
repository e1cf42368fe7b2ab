"""Who may look at what: (query rows, key columns, bias) expanded to the additive mask that all layers share.

B sequences, L length. A method says which rows see which columns with what bias added to their scores: -inf blocks
(LIVR's bottleneck), ln gamma dims (LaViT's gate). One [B,1,L,L] tensor serves every head and layer; none is built
where no method asks for one. A row that would see nothing sees itself, so that no softmax is empty.
"""
from dataclasses import dataclass

import torch


@dataclass
class AttentionBias:
    """queries, keys: bool [B,L]; value: added to the scores of every (query, key) pair of them, -inf to block."""
    queries: torch.Tensor
    keys: torch.Tensor
    value: float = float("-inf")


def row_biases(biases, rows, dtype=torch.float32):
    """What biases add to the scores of chosen rows [B,M], -1 pads -> [B,1,M,L] of `dtype`, for an AttentionRecorder, which knows causality; None without any."""
    at = rows.clamp(min=0)
    added = None
    for bias in biases:
        cells = bias.queries.gather(1, at)[:, None, :, None] & bias.keys[:, None, None, :]
        value = torch.where(cells, torch.as_tensor(bias.value, dtype=dtype, device=rows.device), torch.zeros((), dtype=dtype, device=rows.device))
        added = value if added is None else added + value
    return added


def additive_mask(biases, attention_mask, dtype=torch.float32):
    """Causality, padding and biases in one tensor [B,1,L,L] of `dtype`, to be added to attention's scores.

    attention_mask: [B,L], 1 for tokens and 0 for padding. Biases that meet in a cell add up.
    """
    B, L = attention_mask.shape
    device = attention_mask.device
    seen = torch.ones(L, L, dtype=torch.bool, device=device).tril() & attention_mask.bool()[:, None, :]  # [B,L,L]
    mask = torch.zeros(B, L, L, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))
    for bias in biases:
        cells = bias.queries[:, :, None] & bias.keys[:, None, :]
        # where, not a product with the cells: 0 times -inf is not a number
        mask = mask + torch.where(cells, torch.as_tensor(bias.value, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device))
    empty = (mask == float("-inf")).all(-1)  # [B,L]
    mask = mask.masked_fill(empty[:, :, None] & torch.eye(L, dtype=torch.bool, device=device), 0.0)
    return mask[:, None]
