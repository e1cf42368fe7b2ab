"""The dual path (section 3.3): intact latents replace the corrupted path's at every decoder layer.

B pairs, L sequence length, P length of a packed sequence, D hidden size, H query heads, G key/value heads, d head size.
Both paths share token ids, image grids and positions, so a position means the same in both.

Three ways of sharing that give the same logits, losses and gradients:
    hidden   the paper's words: both paths in one batch of 2B rows, the intact half first; before each layer, rows of
             hidden states are replaced
    kv       the same batch; a layer mixes rows in attention alone, where another row is seen only through its key and
             value; so it is enough to replace those: 2 G d numbers a row instead of D (1024 instead of 3584 in Qwen2.5-VL-7B)
    packed   one sequence a pair, in which what both paths share stands once; a block mask keeps them apart
Gradient flows through the copy into the intact path: that is what crystallises the latents.
"""
from dataclasses import dataclass

import torch

from crystal.attention_bias import AttentionBias


class LatentCopy:
    """What one forward of both paths shares; it travels as a keyword of the model's forward to every layer.

    copied: bool [B,L], the positions that the corrupted path takes from the intact one.
    realisation: "hidden", where `states` copies before every decoder layer (see `copy_before_each`), or "kv", where
    `keys_values` copies within every layer: the model's attention function (backbone/model.py) calls it.
    """

    def __init__(self, copied, realisation):
        if realisation not in ("hidden", "kv"):
            raise ValueError(f"realisation {realisation!r}: choose hidden, kv or packed")
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


def copy_before_each(layers):
    """Hooks the copy before each of a model's decoder layers; a forward without a LatentCopy passes through unchanged."""
    for layer in layers:
        layer.register_forward_pre_hook(copy_states, with_kwargs=True)


def copy_states(layer, args, kwargs):
    """The hook: hidden states [2B,L,D] on their way into a layer become those of section 3.3, if the forward asks for it.

    transformers gives the states by position or by name, and the LatentCopy among the keywords.
    """
    copy = kwargs.get("latent_copy")
    if copy is None:
        return None
    if args:
        return (copy.states(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": copy.states(kwargs["hidden_states"])}


def _share(x, mask):
    """x [2B,..], the intact half first; mask, which broadcasts over a half -> x with the corrupted half's masked entries replaced.

    Gradient flows through the copy into the intact half.
    """
    x_int, x_cor = x.chunk(2)
    return torch.cat([x_int, torch.where(mask, x_int, x_cor)])


@dataclass
class Packed:
    """Both paths of every pair in one sequence of P rows, right-padded; what both have in common stands once:

        prefix | I_cor Q thought | I_int Q thought latents | rest and answer (int) | rest and answer (cor)

    The copied rows end the third part; the second is empty of them. Where the whole thought is copied (`released`):
    prefix | I_cor Q | I_int Q thought | answer (int) | answer (cor).

    source           [B,P], the position in the unpacked sequence that a packed row stands for; -1 pads
    at_int, at_cor   [B,L], where an unpacked position of a path stands in the packed sequence (the corrupted path's copied
                     ones: at the intact row); 0 at padding
    blocks           attention_bias.AttentionBias: who may not look at whom, beyond causality
    """
    source: torch.Tensor
    at_int: torch.Tensor
    at_cor: torch.Tensor
    blocks: list

    def unpack(self, x):
        """x [B,h,P,d] -> [2B,h,L,d], the intact half first, as the other realisations have it."""
        take = lambda at: x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        return torch.cat([take(self.at_int), take(self.at_cor)])


def pack(attention_mask, image, copied):
    """attention_mask [B,L]; image bool [B,L], the image tokens; copied bool [B,L] -> Packed.

    Raises ValueError where copied rows are not one run of positions: a row of the corrupted path's own between two of
    them would have to stand before one and after the other.
    """
    (B, L), device = attention_mask.shape, attention_mask.device
    at = torch.zeros(2, B, L, dtype=torch.long, device=device)
    rows, parts = [], []
    for b in range(B):
        n, first = int(attention_mask[b].sum()), int(image[b].int().argmax())  # the prefix ends where the first image begins
        run = copied[b].nonzero()[:, 0].tolist() or [n]
        start, end = run[0], run[-1] + 1 if copied[b].any() else n
        if int(copied[b].sum()) not in (0, end - start):
            raise ValueError(f"pair {b}: realisation packed needs the copied rows in one run, not at {run}")
        bounds = [(0, first), (first, start), (first, end), (end, n), (end, n)]
        rows.append(torch.cat([torch.arange(*bound, device=device) for bound in bounds]))
        parts.append(torch.cat([torch.full((hi - lo,), i, device=device) for i, (lo, hi) in enumerate(bounds)]))
        place = torch.arange(len(rows[b]), device=device)
        for path, own in enumerate(((0, 2, 3), (0, 1, 4))):
            mine = torch.isin(parts[b], torch.tensor(own, device=device))
            at[path, b, rows[b][mine]] = place[mine]
    at_int, at_cor = at
    source = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)  # [B,P]
    part = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1)   # [B,P]
    lent = copied.gather(1, source.clamp(min=0)) & (part == 2)                          # [B,P], the rows that both paths see
    blocks = [AttentionBias((part == 2) | (part == 3), part == 1), AttentionBias(part == 4, (part == 2) & ~lent | (part == 3))]
    return Packed(source, at_int, torch.where(copied, at_int, at_cor), blocks)


def dual_forward(model, batch, copied, realisation, recorder=None):
    """Both paths through the model -> last hidden states (h_int [B,L,D], h_cor [B,L,D]).

    batch: see data.py; `pixel_values_cor` holds the corrupted images. copied: bool [B,L], or None for two paths that
    share nothing. recorder: an attention.AttentionRecorder whose rows and columns are those of both halves, [2B, ...].
    Nobody may read a copied row of h_cor: there each realisation leaves something else.
    ValueError for an unknown realisation, and for `packed` where the copied rows are not one run of positions.
    """
    if realisation == "packed":
        return packed_forward(model, batch, copied, recorder)
    twice = dict(
        input_ids=batch["input_ids"].repeat(2, 1),
        attention_mask=batch["attention_mask"].repeat(2, 1),
        pixel_values=torch.cat([batch["pixel_values"], batch["pixel_values_cor"]]),
        image_grid_thw=batch["image_grid_thw"].repeat(2, 1),
        position_ids=model.positions(batch).repeat(1, 2, 1),  # [3,2B,L]
    )
    copy = None if copied is None else LatentCopy(copied, realisation)
    return model.hidden(twice, latent_copy=copy, recorder=recorder).chunk(2)


def packed_forward(model, batch, copied, recorder=None):
    """dual_forward in its packed realisation: one sequence a pair, P < 2L rows, and no copy, for the row stands once."""
    image = batch["mm_token_type_ids"] == 1                                            # [B,L]
    p = pack(batch["attention_mask"], image, torch.zeros_like(image) if copied is None else copied)
    real, at = p.source >= 0, p.source.clamp(min=0)                                    # [B,P] each
    # Images in sequence order: each pair's corrupted ones, then its intact ones.
    grids = batch["image_grid_thw"]                                                    # [I,3]
    ends = torch.tensor(model.image_tokens(grids), device=image.device).cumsum(0)      # [I], tokens up to each image's end
    owner = torch.searchsorted(image.sum(1).cumsum(0), ends)                           # [I], whose each image is
    grids = [grids[owner == b] for b in range(len(image))]
    patches = [sum(model.image_processor.rows(g)) for g in grids]
    pixels = zip(batch["pixel_values_cor"].split(patches), batch["pixel_values"].split(patches))
    inputs = dict(
        input_ids=batch["input_ids"].gather(1, at).masked_fill(~real, model.tokenizer.pad_token_id),
        attention_mask=real.long(),
        pixel_values=torch.cat([x for both in pixels for x in both]),
        image_grid_thw=torch.cat([g.repeat(2, 1) for g in grids]),
        position_ids=model.positions(batch).gather(2, at[None].expand(3, -1, -1)),     # [3,B,P], those of the unpacked sequence
    )
    # Queries and keys go to the recorder as the unpacked paths have them: there causality alone says who sees whom.
    unpacked = recorder and (lambda layer, q, k, scale: recorder(layer, p.unpack(q), p.unpack(k), scale))
    h = model.hidden(inputs, recorder=unpacked, biases=p.blocks)                            # [B,P,D]
    return p.unpack(h[:, None])[:, 0].chunk(2)
