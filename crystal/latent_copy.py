"""The dual path (section 3.3): intact latents replace the corrupted path's at every decoder layer.

B pairs, L sequence length, D hidden size, G key/value heads, d head size. Both paths run in one batch of 2B rows, the
intact half first; they share token ids, image grids and positions, so a position means the same in both.

Two ways of sharing that give the same logits, losses and gradients:
    hidden   the paper's words: before each layer, rows of hidden states are replaced
    kv       a layer mixes rows in attention alone, where another row is seen only through its key and value; so it is
             enough to replace those: 2 G d numbers a row instead of D (1024 instead of 3584 in Qwen2.5-VL-7B)
Gradient flows through the copy into the intact path: that is what crystallises the latents.
"""
import torch


class LatentCopy:
    """What one forward of both paths shares; it travels as a keyword of the model's forward to every layer.

    copied: bool [B,L], the rows that the corrupted path takes from the intact one.
    realisation: "hidden" or "kv".
    """

    def __init__(self, copied, realisation):
        if realisation not in ("hidden", "kv"):
            raise ValueError(f"realisation {realisation!r}: choose hidden or kv")
        self.copied, self.realisation = copied, realisation

    def states(self, h):
        """h [2B,L,D], a layer's input -> the same with the corrupted half's copied rows replaced (`hidden`)."""
        if self.realisation != "hidden":
            return h
        return _share(h, self.copied[:, :, None])  # [B,L,1]

    def keys_values(self, k, v):
        """k, v [2B,G,L,d] after rotary embedding -> the same with the copied columns replaced (`kv`)."""
        if self.realisation != "kv":
            return k, v
        mask = self.copied[:, None, :, None]  # [B,1,L,1]
        return _share(k, mask), _share(v, mask)


def _share(x, mask):
    x_int, x_cor = x.chunk(2)
    return torch.cat([x_int, torch.where(mask, x_int, x_cor)])


def dual_forward(model, batch, copied, realisation, tap=None):
    """Both paths through the model -> last hidden states (h_int [B,L,D], h_cor [B,L,D]).

    batch: see data.py; `pixel_values_cor` holds the corrupted images. copied: bool [B,L], or None for two paths that
    share nothing. tap: an attention.AttentionTap whose rows and columns are those of both halves, [2B, ...].
    """
    twice = dict(
        input_ids=batch["input_ids"].repeat(2, 1),
        attention_mask=batch["attention_mask"].repeat(2, 1),
        pixel_values=torch.cat([batch["pixel_values"], batch["pixel_values_cor"]]),
        image_grid_thw=batch["image_grid_thw"].repeat(2, 1),
        position_ids=model.positions(batch).repeat(1, 2, 1),  # [3,2B,L]
    )
    copy = None if copied is None else LatentCopy(copied, realisation)
    return model.hidden(twice, latent_copy=copy, tap=tap).chunk(2)
