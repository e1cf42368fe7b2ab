"""The dual path (section 3.3): intact latents replace the corrupted path's at every decoder layer.

B pairs, L sequence length, P length of a packed sequence, D hidden size, H query heads, G key/value heads, d
head size. Both paths share token ids, image grids and positions, so a position means the same in both.

Three ways of sharing that give the same logits, losses and gradients:
    hidden   the paper's words: both paths in one batch of 2B sequences, the intact half first; before each
             layer, the hidden states of copied positions are replaced
    kv       the same batch; a layer mixes positions in attention alone, where another position is seen only
             through its key and value, so it is enough to replace those: 2 G d numbers instead of D (1024
             instead of 3584 in Qwen2.5-VL-7B)
    packed   one sequence a pair, in which what both paths share stands once; a block mask keeps them apart
Gradient flows through the copy into the intact path: that is what crystallises the latents.
"""
from dataclasses import dataclass
from functools import partial

import torch

from crystal.attention_bias import AttentionBias


class LatentCopy:
    """What one forward of both paths shares; it travels as a keyword of the model's forward to every layer.

    copied: bool [B,L], the positions that the corrupted path takes from the intact one. realisation:
    "hidden", where `states` copies before every decoder layer (see `copy_before_each`), or "kv", where
    `keys_values` copies within every layer: backbone/attention_functions.py calls it.
    """

    def __init__(self, copied, realisation):
        if realisation not in ("hidden", "kv"):
            raise ValueError(f"realisation {realisation!r}: choose hidden, kv or packed")
        self.copied = copied
        self.realisation = realisation

    def states(self, h):
        """h [2B,L,D] before a layer -> the same with the corrupted half's copied rows replaced (`hidden`)."""
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
    """Hooks the copy before each decoder layer; a forward without a LatentCopy passes unchanged."""
    for layer in layers:
        layer.register_forward_pre_hook(copy_states, with_kwargs=True)


def copy_states(layer, args, kwargs):
    """The hook: hidden states [2B,L,D] before a layer become those of section 3.3, if the forward asks.

    transformers gives the states by position or by name, and the LatentCopy among the keywords.
    """
    copy = kwargs.get("latent_copy")
    if copy is None:
        return None
    if args:
        h, *others = args
        return (copy.states(h), *others), kwargs

    h = copy.states(kwargs["hidden_states"])
    return args, {**kwargs, "hidden_states": h}


def _share(x, mask):
    """x [2B,..] -> the same with the corrupted half's masked entries replaced by the intact half's.

    The intact half stands first; mask broadcasts over a half. Gradient flows through the copy
    into the intact half.
    """
    x_int, x_cor = x.chunk(2)
    return torch.cat([x_int, torch.where(mask, x_int, x_cor)])


@dataclass
class Packed:
    """Both paths of every pair in one right-padded sequence of length P; what they share stands once:

        prefix | I_cor Q thought | I_int Q thought latents | rest and answer (int) | rest and answer (cor)

    Copied positions are stored once, at the end of part 3; part 2 has none. Where the whole thought is copied
    (`released`): prefix | I_cor Q | I_int Q thought | answer (int) | answer (cor).

    source           [B,P], the position in the unpacked sequence that a packed one stands for; -1 pads
    at_int, at_cor   [B,L], where an unpacked position of a path stands in the packed sequence (the corrupted
                     path's copied ones: at the intact one); 0 at padding
    blocks           attention_bias.AttentionBias: who may not look at whom, beyond causality
    """

    source: torch.Tensor
    at_int: torch.Tensor
    at_cor: torch.Tensor
    blocks: list

    def unpack(self, x):
        """x [B,h,P,d] -> [2B,h,L,d], the intact half first, as the other realisations have it."""
        h, d = x.shape[1], x.shape[3]
        paths = []
        for at in (self.at_int, self.at_cor):
            index = at[:, None, :, None]                                               # [B,1,L,1]
            paths.append(x.gather(2, index.expand(-1, h, -1, d)))
        return torch.cat(paths)


def pack(attention_mask, image, copied):
    """attention_mask [B,L]; image bool [B,L], the image tokens; copied bool [B,L] -> Packed.

    Raises ValueError where the copied positions are not one run: a position of the corrupted path's own
    between two of them would have to stand before one and after the other.
    """
    B, L = attention_mask.shape
    device = attention_mask.device
    at_int = torch.zeros(B, L, dtype=torch.long, device=device)
    at_cor = torch.zeros_like(at_int)
    sources, parts = [], []
    for b in range(B):
        bounds = parts_of(attention_mask[b], image[b], copied[b], b)

        # The packed sequence of a pair: the unpacked position of each of its own, and the part
        # that it belongs to.
        source = torch.cat([torch.arange(lo, hi, device=device) for lo, hi in bounds])
        lengths = torch.tensor([hi - lo for lo, hi in bounds], device=device)
        part = torch.arange(len(bounds), device=device).repeat_interleave(lengths)
        sources.append(source)
        parts.append(part)

        # The intact path is parts 0, 2 and 3; the corrupted one 0, 1 and 4, and the copied
        # positions of part 2.
        place = torch.arange(len(source), device=device)
        for at, own in ((at_int, (0, 2, 3)), (at_cor, (0, 1, 4))):
            mine = torch.isin(part, torch.tensor(own, device=device))
            at[b, source[mine]] = place[mine]
    at_cor = torch.where(copied, at_int, at_cor)

    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_value=-1)
    source, part = pad(sources), pad(parts)                                            # [B,P] each

    # The intact path may not look at part 1, nor the corrupted one at what of parts 2 and 3 is not copied.
    intact = (part == 2) | (part == 3)                                                 # [B,P]
    shared = copied.gather(1, source.clamp(min=0)) & (part == 2)
    blocks = [AttentionBias(intact, part == 1), AttentionBias(part == 4, intact & ~shared)]
    return Packed(source, at_int, at_cor, blocks)


def parts_of(attention_mask, image, copied, b):
    """The five parts of pair b's packed sequence, as (start, end) of unpacked positions.

    attention_mask, image and copied [L] are pair b's. ValueError as in `pack`.
    """
    n = int(attention_mask.sum())
    first = int(image.int().argmax())  # the prefix ends where the first image begins
    run = copied.nonzero()[:, 0].tolist()
    start = end = n
    if run:
        start = run[0]
        end = run[-1] + 1
    if len(run) not in (0, end - start):
        raise ValueError(f"pair {b}: realisation packed needs the copied positions in one run, not at {run}")
    return [(0, first), (first, start), (first, end), (end, n), (end, n)]


def dual_forward(model, batch, copied, realisation, recorder=None):
    """Both paths through the model -> last hidden states (h_int [B,L,D], h_cor [B,L,D]).

    batch: see data.py; `pixel_values_cor` holds the corrupted images. copied: bool [B,L], or None for
    two paths that share nothing. recorder: an attention.AttentionRecorder whose rows and columns are
    those of both halves, [2B, ...]. Nobody may read a copied position of h_cor: there each realisation
    leaves something else. ValueError for an unknown realisation, a batch without corrupted images, and for
    `packed` where the copied positions are not one run.
    """
    if batch.get("pixel_values_cor") is None:
        raise ValueError(
            "dual_forward: the batch holds no corrupted images (pixel_values_cor); give data.RecordDataset "
            "the method's corruption"
        )
    if realisation == "packed":
        return packed_forward(model, batch, copied, recorder)

    # One batch of 2B: the intact half, then the corrupted one, which differs in its pixels alone.
    alike = ("input_ids", "attention_mask", "image_grid_thw")
    twice = {name: batch[name].repeat(2, 1) for name in alike}
    twice["pixel_values"] = torch.cat([batch["pixel_values"], batch["pixel_values_cor"]])
    twice["position_ids"] = model.positions(batch).repeat(1, 2, 1)                     # [3,2B,L]
    copy = None if copied is None else LatentCopy(copied, realisation)
    h = model.hidden(twice, latent_copy=copy, recorder=recorder)                       # [2B,L,D]
    return h.chunk(2)


def packed_forward(model, batch, copied, recorder=None):
    """dual_forward's packed realisation: one sequence a pair, P < 2L.

    There is no copy, since a copied position stands once.
    """
    image = batch["mm_token_type_ids"] == 1                                            # [B,L]
    if copied is None:
        copied = torch.zeros_like(image)
    p = pack(batch["attention_mask"], image, copied)
    real = p.source >= 0                                                               # [B,P]
    at = p.source.clamp(min=0)
    ids = batch["input_ids"].gather(1, at)
    positions = model.positions(batch).gather(2, at.expand(3, -1, -1))                 # [3,B,P]
    inputs = {
        "input_ids": ids.masked_fill(~real, model.tokenizer.pad_token_id),
        "attention_mask": real.long(),
        "position_ids": positions,
        **packed_images(model, batch, image),
    }

    # Queries and keys go to the recorder as the unpacked paths have them: there causality alone
    # says who sees whom.
    def unpacked(layer, q, k, scale):
        recorder(layer, p.unpack(q), p.unpack(k), scale)

    h = model.hidden(inputs, recorder=unpacked if recorder else None, biases=p.blocks)  # [B,P,D]
    return p.unpack(h[:, None])[:, 0].chunk(2)


def packed_images(model, batch, image):
    """Pixels and grids of both paths as the packed sequence has them: a pair's corrupted images first."""
    grids = batch["image_grid_thw"]                                                    # [I,3]

    # Whose each image is: the tokens up to its end, among the tokens of the pairs up to each.
    ends = torch.tensor(model.image_tokens(grids), device=image.device).cumsum(0)      # [I]
    owner = torch.searchsorted(image.sum(1).cumsum(0), ends)                           # [I]
    own = [grids[owner == b] for b in range(len(image))]

    # The patches of each pair, corrupted and intact.
    patches = [sum(model.image_processor.rows(grid)) for grid in own]
    cor = batch["pixel_values_cor"].split(patches)
    intact = batch["pixel_values"].split(patches)
    pixels = [x for both in zip(cor, intact) for x in both]
    twice = [grid.repeat(2, 1) for grid in own]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(twice)}
