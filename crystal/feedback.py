"""Latents by hidden-state feedback (VaLR; Coconut): a latent's input is the state before it.

B sequences, L their length, D hidden size, H heads, G key/value heads, d head size, R pieces, n length of a
piece, S keys so far, T updates.

    x_t = h_{t-1} for a latent t, else the embedding of token t

h is the state after the final norm, which the head would read. So a latent cannot begin before the position
in front of it is done. Two ways to compute the same:
    recurrence   cuts every sequence before each latent and runs the pieces one after the other over
                 a key/value cache: exact
    parallel     guesses all latents' inputs, runs everything at once, feeds the states back, T times: every
                 update makes at least one more latent of each sequence exact, so it is exact after as many
                 updates as there are latents
Both give gradients through every latent into what precedes it. The cache is our own because transformers
drops its own under activation checkpointing: feedback would then be switched off without a word.
"""
from contextlib import contextmanager

import torch


class KVCache:
    """Keys and values of one piece and of those before it, by layer; a keyword of the model's forward.

    past: the KVCache of the piece before, or None. Nothing is detached: gradients reach the pieces before.
    """

    def __init__(self, past=None):
        self.past = past
        self.held = {}

    def __call__(self, layer, k, v):
        """k, v [B,G,n,d] of this piece after rotary embedding -> those of all pieces so far [B,G,S,d]."""
        if self.past is not None:
            k_past, v_past = self.past.held[layer]
            k = torch.cat([k_past, k], 2)
            v = torch.cat([v_past, v], 2)

        # Checkpointing runs the layer again in backward; later pieces hang on the keys of the first run.
        self.held.setdefault(layer, (k, v))
        return k, v


class Stream:
    """A batch of sequences that grow to the right piece by piece, ragged as they like.

    model: model.Model. layers: decoder layers, counted from 1, whose outputs are wanted
    beside the last states.
    """

    def __init__(self, model, layers=()):
        depth = len(model.layers)
        bad = [i for i in layers if not 1 <= i <= depth]
        if bad:
            raise ValueError(f"layer {bad[0]}: the model has layers 1 to {depth}")
        self.model = model
        self.layers = tuple(layers)

        # Of the pieces so far: their KVCache, and bool [B,S], False at padding.
        self.cache: KVCache | None = None
        self.valid: torch.Tensor | None = None

    def run(self, positions, valid, **inputs):
        """One piece after all that was kept -> (states [B,n,D], outputs, what `keep` wants).

        outputs: {layer: its output [B,n,D]}. positions [3,B,n]; valid: bool [B,n], padding to the
        right. inputs: input_ids, pixel_values and image_grid_thw, or inputs_embeds [B,n,D]. States
        of padding mean nothing.
        """
        # A piece sees all that is no padding in those before it, and itself causally.
        mask, all_valid = None, valid
        if self.valid is not None:
            n = valid.shape[1]
            causal = torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()
            own = causal & valid[:, None, :]                                   # [B,n,n]
            past = self.valid[:, None, :].expand(-1, n, -1)
            mask = torch.cat([past, own], 2)[:, None]                          # [B,1,n,S]
            all_valid = torch.cat([self.valid, valid], 1)

        cache = KVCache(self.cache)
        given = inputs | {"position_ids": positions}
        with outputs_of(self.model, self.layers) as seen:
            h = self.model.decode(given, mask, kv_cache=cache)
        return h, seen, (cache, all_valid)

    def keep(self, piece):
        """Makes a piece that was run part of the past."""
        self.cache, self.valid = piece

        # Each piece holds copies of all before it: where no gradient wants those, a long answer would keep
        # the square of its length.
        if not torch.is_grad_enabled():
            self.cache.past = None


@contextmanager
def outputs_of(model, layers):
    """While it lasts, a forward fills the yielded dictionary: {layer, from 1: its output [B,n,D]}."""
    seen = {}

    def keep(layer):
        # These hooks only record, so it does not matter that checkpointing's recomputation skips them.
        return lambda module, args, out: seen.setdefault(layer, out)

    hooks = [model.layers[i - 1].register_forward_hook(keep(i)) for i in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def recurrence(model, inputs, latents, layers=()):
    """The exact states, piece by piece -> (h [B,L,D] after the final norm, {layer: its output [B,L,D]}).

    inputs: a right-padded batch of data.py, images before the latents. latents: bool [B,L], positions whose
    input is the state before them; their token ids are not read. layers: see Stream. It runs one forward more
    than the longest sequence has latents. Keys and values are copied once a piece, so training keeps about
    R/2 times the cache of one forward. Raises ValueError for a latent at position 0 or in padding, and for an
    image after a latent.
    """
    starts, lengths = pieces(inputs, latents)                                  # [B,R] each
    positions = model.positions(inputs)                                        # [3,B,L]
    embed = model.hf.get_input_embeddings()
    stream, outs = Stream(model, layers), []
    fed = torch.empty(0)  # the state in front of the next piece
    for r, (start, length) in enumerate(zip(starts.T, lengths.T)):
        at, valid = window(start, length)                                      # [B,n]

        # Every piece but the first begins with a latent, whose input is the state in front of it.
        if r == 0:
            given = first_piece(inputs, at)
        else:
            x = embed(inputs["input_ids"].gather(1, at))                       # [B,n,D]
            x = torch.cat([fed.to(x.dtype), x[:, 1:]], 1)
            given = {"inputs_embeds": x}
        h, seen, piece = stream.run(take(positions, at), valid, **given)
        stream.keep(piece)
        outs.append({0: h, **seen})

        # A sequence without a piece in this round has no further one, and whatever is fed to it is padding.
        last = (length - 1).clamp(min=0)                                       # [B]
        fed = states_at(h, last[:, None])                                      # [B,1,D]
    return whole(outs, starts, lengths, latents.shape[1])


def parallel(model, inputs, latents, updates, layers=()):
    """The states after T fixed-point updates of all latents at once; arguments and result as in `recurrence`.

    updates: T >= 0. What precedes the first latent runs once; the rest runs T + 1 times, the last to be read.
    The first guess for every latent is the state in front of the first one, which is exact for that one, so
    that T = n - 1 is exact for n latents. Gradients flow through all updates.
    """
    if updates < 0:
        raise ValueError(f"{updates} updates: at least 0")
    starts, lengths = pieces(inputs, latents)
    if starts.shape[1] == 1:  # no latents at all
        return recurrence(model, inputs, latents, layers)

    # Two pieces a sequence: what precedes its first latent, and all the rest.
    start, start_rest = starts[:, 0], starts[:, 1]
    length, length_rest = lengths[:, 0], lengths[:, 1:].sum(1)                 # [B] each
    positions = model.positions(inputs)
    stream = Stream(model, layers)

    at, valid = window(start, length)
    given = first_piece(inputs, at)
    first, seen, piece = stream.run(take(positions, at), valid, **given)
    stream.keep(piece)
    outs = [{0: first, **seen}]
    before = states_at(first, length[:, None] - 1)                             # [B,1,D]

    # The rest, again and again: each latent's input is the state before it, as the last round left it.
    at, valid = window(start_rest, length_rest)                                # [B,n]
    at_rest = take(positions, at)                                              # [3,B,n]
    embed = model.hf.get_input_embeddings()
    x = embed(inputs["input_ids"].gather(1, at))                               # [B,n,D]
    fed = (latents.gather(1, at) & valid)[:, :, None]                          # [B,n,1]
    guess = before.expand_as(x)
    for _ in range(updates + 1):
        given = torch.where(fed, guess.to(x.dtype), x)
        h, seen, _ = stream.run(at_rest, valid, inputs_embeds=given)
        guess = torch.cat([before, h[:, :-1]], 1)
    outs.append({0: h, **seen})

    starts = torch.stack([start, start_rest], 1)
    lengths = torch.stack([length, length_rest], 1)
    return whole(outs, starts, lengths, latents.shape[1])


def forward(model, inputs, latents, updates=None, layers=()):
    """`recurrence` for updates None, else `parallel` with so many."""
    if updates is None:
        return recurrence(model, inputs, latents, layers)
    return parallel(model, inputs, latents, updates, layers)


@contextmanager
def filled(model, h, latents):
    """While it lasts, a plain forward takes the latents' inputs from h [B,L,D], `recurrence`'s states.

    So it leaves h again: one pass over whole sequences, for whatever watches attention. latents: bool [B,L].
    """
    before = torch.cat([h[:, :1], h[:, :-1]], 1)                               # [B,L,D]
    fed = latents[:, :, None]

    def fill(module, args, x):
        return torch.where(fed, before.to(x.dtype), x)

    hook = model.hf.get_input_embeddings().register_forward_hook(fill)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def parallel_error(model, inputs, latents, updates):
    """How far `parallel` is from `recurrence` after each T in `updates` -> {T: (latents, rest)}.

    Relative errors |h_T - h| / |h| in the Euclidean norm over all latents, and over all positions behind a
    first latent that are none.
    """
    exact, _ = recurrence(model, inputs, latents)
    begun = latents.cumsum(1) > 0
    behind = begun & inputs["attention_mask"].bool() & ~latents

    def error(h, at):
        h, right = h[at], exact[at]
        return float((h - right).norm() / right.norm())

    found = {}
    for T in updates:
        h, _ = parallel(model, inputs, latents, T)
        found[T] = (error(h, latents), error(h, behind))
    return found


# --- where the pieces are ---

def pieces(inputs, latents):
    """Every sequence cut before each of its latents -> (starts, lengths), int64 [B,R] each.

    A sequence with fewer pieces than R has the missing ones with length 0.
    """
    B, L = latents.shape
    ends = inputs["attention_mask"].sum(1)[:, None]                            # [B,1]
    place = torch.arange(L, device=latents.device).expand(B, L)
    nowhere = (place == 0) | (place >= ends)
    if bool((latents & nowhere).any()):
        raise ValueError("a latent needs a token before it and may not lie in padding")

    image = inputs["mm_token_type_ids"].bool()
    begun = latents.cumsum(1) > 0
    if bool((image & begun).any()):
        raise ValueError("images must stand before the first latent")

    # The latents' positions in order; a sequence with fewer of them is cut at its end again and again.
    most = int(latents.sum(1).max())
    cuts = place.masked_fill(~latents, L).sort(1).values
    cuts = torch.minimum(cuts[:, :most], ends)                                 # [B,R-1]
    starts = torch.cat([torch.zeros_like(ends), cuts], 1)
    stops = torch.cat([cuts, ends], 1)
    return starts, stops - starts


def window(start, length):
    """Positions of one piece of each sequence -> (at [B,n], 0 where padded, valid: bool [B,n])."""
    offset = torch.arange(int(length.max()), device=start.device)
    valid = offset < length[:, None]
    at = start[:, None] + offset
    return at.masked_fill(~valid, 0), valid


def first_piece(inputs, at):
    """The piece that holds the images, as the model's forward takes it."""
    n = at.shape[1]
    piece = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    return piece | {"input_ids": inputs["input_ids"][:, :n]}


def take(positions, at):
    """positions [3,B,L], at [B,n] -> [3,B,n]."""
    return positions.gather(2, at.expand(3, -1, -1))


def states_at(h, at):
    """h [B,n,D], at [B,m] -> [B,m,D]."""
    index = at[:, :, None]
    return h.gather(1, index.expand(-1, -1, h.shape[2]))


def whole(outs, starts, lengths, L):
    """Outputs of the pieces [B,n,D] -> (states, {layer: states}), [B,L,D] each."""
    # Where each position of the sequence lies in the pieces laid one after the other.
    place = torch.zeros(len(starts), L, dtype=torch.long, device=starts.device)
    offset = 0
    for start, length in zip(starts.T, lengths.T):
        at, valid = window(start, length)                                      # [B,n]
        row, column = valid.nonzero(as_tuple=True)
        place[row, at[row, column]] = offset + column
        offset += at.shape[1]

    gathered = {}
    for name in outs[0]:
        x = torch.cat([out[name] for out in outs], 1)                          # [B,S,D]
        gathered[name] = states_at(x, place)
    return gathered.pop(0), gathered
