"""What a run needs, by arithmetic on sizes: memory of a GPU by part, operations and hours of the run.

No weights are read and nothing is run: `python -m crystal.train --plan` (planning.py) finds the sizes, this
file does the sums. B pairs of a forward, L positions of a sequence, T positions of a forward (B x paths x L),
N rows of logits, D hidden size, I width of the MLP, H query heads, G key/value heads, d head size, V
vocabulary, r rank, e bytes of a number that is computed with.

    weights       a number that trains is kept in float32, one that does not in the type of computing
    gradients     4 bytes of each number that trains
    optimiser     AdamW's two moments, 8 bytes of each
    copies        what is made of weights to compute with them: autocast's and the adapters' rounded ones;
                  where they are sharded, the layers that are gathered at one time
    activations   what the forward keeps for the backward, counted storage by storage
    working       what the backward needs beside it: gradients of the logits or of one layer's MLP, and with
                  --checkpointing what that layer keeps
    context       what CUDA takes for itself

Weights, gradients and moments of sharded runs are cut into as many parts as there are GPUs, the vocabulary
aside. The tests hold activations and copies to what autograd keeps, within 3 %, and operations to torch's
FlopCounterMode, within 1 %. Left out: fragments of the allocator, communication, validation, data loading.
"""

from dataclasses import dataclass, replace

CONTEXT = 1.0e9  # bytes: the CUDA context with its libraries


@dataclass(frozen=True)
class Blocks:
    """A stack of `count` transformer layers with gated MLPs: the decoder's, or the vision tower's."""

    count: int
    D: int
    I: int  # noqa: E741 (as the papers have it)
    H: int
    G: int
    d: int
    seen: int = 0  # of a tower: keys that a patch sees, all layers together

    @property
    def Q(self):
        return self.H * self.d

    @property
    def KV(self):
        return self.G * self.d

    @property
    def linears(self):
        """(inputs, outputs) of the seven matrices: q, k, v, o, gate, up, down."""
        keys = (self.D, self.KV)
        up = (self.D, self.I)
        return [(self.D, self.Q), keys, keys, (self.Q, self.D), up, up, (self.I, self.D)]

    @property
    def products(self):
        """Numbers in the matrices of one layer."""
        return sum(a * b for a, b in self.linears)


@dataclass(frozen=True)
class Counts:
    """How many numbers a model has: those that train and those that do not, in its layers and around them."""

    trained_layers: int
    trained_rest: int
    frozen_layers: int
    frozen_rest: int
    vocabulary: int  # of embedding and head, of which new tokens alone train, in numbers of their own

    @property
    def trained(self):
        return self.trained_layers + self.trained_rest

    @property
    def all(self):
        return self.trained + self.frozen_layers + self.frozen_rest + self.vocabulary


@dataclass(frozen=True)
class Run:
    """What is planned. batch: B on one GPU; paths: sequences of a pair; rows: of logits, of one pair.

    patches: of all images of a pair's paths, merged by fours into image tokens. new_tokens: rows of the
    vocabulary that train. on_vision: whether the tower has adapters. masked: whether attention has a mask
    other than causal. repeats: whether one forward runs the decoder several times, as fed-back latents do;
    pieces: keys that each such time after the first sees, of one sequence.
    """

    text: Blocks
    vision: Blocks
    vocabulary: int
    counts: Counts
    tune: str
    length: int = 0
    rows: int = 0
    patches: int = 0
    batch: int = 1
    paths: int = 1
    accumulation: int = 1
    gpus: int = 1
    shard: str = "none"
    checkpointing: bool = False
    rank: int = 16
    dropout: float = 0.0
    new_tokens: int = 0
    on_vision: bool = False
    masked: bool = False
    pieces: tuple = ()
    repeats: bool = False
    bytes: int = 2  # e
    on_gpu: bool = True

    @property
    def positions(self):
        """T."""
        return self.batch * self.paths * self.length

    @property
    def autocast(self):
        """Whether weights are kept in float32 and rounded at each use: all train, and none is sharded."""
        return self.tune == "full" and self.bytes == 2 and self.shard == "none"


# --- memory ---


def memory(run):
    """Bytes on one GPU -> {part: bytes}; the parts add up."""
    return shared_out(run) | {
        "copies": copies(run),
        "activations": activations(run),
        "working": working(run),
        "context": CONTEXT if run.on_gpu else 0,
    }


def shared_out(run):
    """Weights, gradients and moments, those that sharding cuts."""
    counts, n = run.counts, run.gpus if run.shard == "full" else 1
    frozen = 4 if run.autocast else run.bytes
    wide = max(4, run.bytes)
    cut = frozen * (counts.frozen_layers + counts.frozen_rest) + wide * counts.trained
    moments = 2 * wide * counts.trained
    return {
        "weights": cut / n + frozen * counts.vocabulary,
        "gradients": wide * counts.trained / n,
        "optimiser": moments / n,
    }


def copies(run):
    """Bytes of weights that are made to compute with."""
    counts, e = run.counts, run.bytes
    if run.shard == "full" and run.repeats:
        # Gathered once for all pieces, whose gradients are added up before they are shared.
        return e * (counts.all - counts.vocabulary) + 4 * counts.trained
    if run.shard == "full":
        # Two layers, one at work and one on its way; what stands around the layers; a layer's gradients, as
        # they come and in float32 to be added up.
        layer = (counts.trained_layers + counts.frozen_layers) / run.text.count
        around = counts.trained_rest + counts.frozen_rest
        return e * (2 * layer + around) + (e + 4) * counts.trained_layers / run.text.count

    if run.autocast:
        # Every matrix that trains is kept rounded until the backward pass, and the head is.
        return 2 * (run.text.count * run.text.products + run.vocabulary * run.text.D)
    if run.tune == "lora" and e == 2:
        return 2 * (run.counts.trained_layers + (run.counts.trained_rest if run.on_vision else 0))
    return 0


def activations(run):
    """Bytes that the forward keeps for the backward."""
    text, e, T = run.text, run.bytes, run.positions
    layers = text.count * a_layer(run)
    if run.checkpointing:
        layers = text.count * T * text.D * (4 if run.autocast else e)
    elif run.tune != "tokens" and not run.new_tokens:
        layers -= T * (4 * text.D + 4)  # nothing before the first norm trains

    # The angles of the positions; the last norm's input, and what it scales; places of the new tokens.
    around = T * (2 * e * text.d + 4 * text.D + 4 + e * run.new_tokens)
    if run.tune == "full":
        around += T * text.D * (4 if run.autocast else e)
    if run.masked and e > 2:
        around += kept_by_mask(run)  # the one that came is the one that every layer takes

    # Logits, and the states before them.
    rows = run.batch * run.rows
    head = rows * run.vocabulary * e
    if run.new_tokens:
        head += rows * text.D * e
    return layers + around + head + (kept_by_tower(run) if run.on_vision else 0)


def a_layer(run):
    """Bytes that one layer of the decoder keeps of a whole forward."""
    kept = run.positions * kept_by_layer(run.text, run) + kept_by_pieces(run)
    if run.masked and run.bytes == 2:
        kept += kept_by_mask(run)  # rounded anew in every layer
    if run.masked and run.on_gpu:
        kept += 2 * run.bytes * (run.text.Q - run.text.KV) * run.positions  # keys repeated for every head
    return kept


def kept_by_tower(run):
    """Bytes that a vision tower with adapters keeps; q, k and v come from one matrix and stay one tensor."""
    vision, e, D = run.vision, run.bytes, run.vision.D
    merger = 4 * D + 3 * e * D
    if run.checkpointing:
        return run.batch * run.patches * (vision.count * e * D + merger)
    fused = 2 * (e + where_bytes(run)) * D if run.dropout else 2 * e * run.rank
    layers = vision.count * (kept_by_layer(vision, run) + 2 * e * D - fused)
    return run.batch * run.patches * (layers + merger)


def kept_by_layer(blocks, run):
    """Bytes that one layer keeps of one position."""
    D, I, Q, KV, e = blocks.D, blocks.I, blocks.Q, blocks.KV, run.bytes  # noqa: E741
    norms = 2 * (4 * D + 4)  # two inputs in float32, and the factor of each
    attention = e * (2 * Q + 2 * KV) + 4 * blocks.H  # q, k, v, what comes out, and its normalisers
    mlp = e * 3 * I  # gate, its SiLU, up
    kept = norms + attention + mlp
    if run.tune == "tokens":
        return kept

    if run.tune == "full":
        # A norm that trains keeps what it scales; matrices keep their inputs, which autocast rounds for each.
        scaled = 2 * D * (4 if run.autocast else e)
        inputs = (5 if run.autocast else 2) * D + I
        return kept + scaled + e * inputs

    low = e * run.rank * len(blocks.linears)
    if not run.dropout:
        return kept + low + e * (2 * D + I)

    # Every adapter drops for itself, and keeps what it left and where.
    return kept + low + (e + where_bytes(run)) * sum(inputs for inputs, _ in blocks.linears)


def where_bytes(run):
    """Bytes in which dropout keeps what it dropped: a bool on a GPU, a factor on a CPU."""
    return 1 if run.on_gpu else run.bytes


def kept_by_mask(run):
    """Bytes of one mask [B,1,L,L]."""
    return run.batch * run.paths * run.length**2 * run.bytes


def kept_by_pieces(run):
    """Bytes that one layer keeps of keys and values where latents are fed back: copied once a piece."""
    heads = run.text.Q if run.on_gpu else run.text.KV
    return run.batch * run.paths * 2 * run.bytes * heads * sum(run.pieces)


def working(run):
    """Bytes that the backward pass needs at its widest place."""
    logits = 2 * run.batch * run.rows * run.vocabulary * run.bytes
    mlp = 4 * run.positions * run.text.I * run.bytes
    again = a_layer(run) if run.checkpointing else 0
    return max(logits, mlp + again)


# --- operations ---


def flops(run):
    """Operations of one forward and backward on one GPU: products of matrices, two for each cell."""
    text, B, T = run.text, run.batch, run.positions
    sequences = B * run.paths
    again = 1 if run.checkpointing else 0

    # A layer: forward, the gradient of its input, and of what trains. Causal attention has half of its cells.
    product = 2 * text.products
    adapters = 0
    if run.tune == "lora":
        adapters = 2 * run.rank * sum(a + b for a, b in text.linears)
    trains = {"full": product, "lora": adapters, "tokens": 0}[run.tune]
    layer = T * ((2 + again) * (product + adapters) + trains)
    cells = run.length**2 * (2 if run.masked else 1)
    attention = sequences * (7 + 2 * again) * cells * text.Q
    decoder = text.count * (layer + attention)

    # Where no token trains, nothing wants the gradient of the first layer's input.
    if run.tune == "lora" and not run.new_tokens:
        outputs = text.Q + 2 * text.KV
        decoder -= T * 2 * text.D * (outputs + 3 * run.rank)

    # Rows of the vocabulary that train have a product with every position, forward and backward.
    rows = B * run.rows
    tokens = run.new_tokens * text.D * (4 * T + 6 * rows)
    head = 4 * rows * text.D * run.vocabulary + tokens
    return decoder + head + tower_flops(run)


def tower_flops(run):
    """Operations of the vision tower on a pair's patches: forward alone, unless it has adapters."""
    vision, P = run.vision, run.batch * run.patches
    matrices = 4 * vision.D**2 + 3 * vision.D * vision.I
    patch = 2 * 3 * 14 * 14 * vision.D
    merged = 4 * vision.D
    merger = merged * merged + merged * run.text.D
    seen = 2 * vision.Q * vision.seen
    forward = 2 * P * (vision.count * matrices + patch + seen) + 2 * P // 4 * merger
    if not run.on_vision:
        return forward

    # With adapters: backward too, with five products in attention for two; the first input needs none.
    again = 1 if run.checkpointing else 0
    in_blocks = vision.count * (9 * vision.D + 3 * vision.I)
    widths = in_blocks + (3 * merged + run.text.D) // 4
    low = 2 * P * run.rank * widths
    first = 2 * P * vision.D * (3 * vision.D + run.rank)
    unneeded = first + 2 * P * patch
    return (2 + again) * forward + (3 + again) * low + P * seen - unneeded


def hours(run, steps, tflop_s):
    """Hours of `steps` updates at so many TFLOP/s on each GPU."""
    return steps * run.accumulation * flops(run) / (tflop_s * 1e12) / 3600


# --- what to change ---


def advice(run, room):
    """What to set, where the run needs more than `room` bytes: the first that is enough -> (words, Run).

    In this order, from what costs least: smaller batches that add up to the same update, recomputed
    activations, sharding, both, and both on more GPUs. (None, run) where none is enough.
    """
    candidates = smaller_batches(run)
    light = replace(run, batch=1, accumulation=run.batch * run.accumulation)
    small = "" if light == run else f"--batch_size 1 --accumulation {light.accumulation} "
    candidates.append((f"{small}--checkpointing", replace(light, checkpointing=True)))
    if run.gpus > 1:
        candidates += sharded(light, small, f"{run.gpus} GPUs")
    for gpus in (2, 4, 8, 16, 32, 64):
        if gpus > run.gpus:
            candidates += sharded(replace(light, gpus=gpus), small, f"{gpus} GPUs")

    for words, changed in candidates:
        if changed != run and sum(memory(changed).values()) <= room:
            return words, changed
    return None, run


def sharded(run, flags, where):
    """[(words, Run)]: the run cut into shards, without and with recomputed activations."""
    cut = replace(run, shard="full")
    light = replace(cut, checkpointing=True)
    plain = f"{flags}--shard full on {where}"
    return [(plain, cut), (f"{flags}--shard full --checkpointing on {where}", light)]


def smaller_batches(run):
    """[(flags, Run)] with batches that divide the run's, the largest first."""
    found = []
    for batch in range(run.batch - 1, 0, -1):
        if run.batch % batch == 0:
            accumulation = run.accumulation * run.batch // batch
            smaller = replace(run, batch=batch, accumulation=accumulation)
            found.append((f"--batch_size {batch} --accumulation {accumulation}", smaller))
    return found
