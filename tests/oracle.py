"""Each method once more, slowly, from its paper: a record becomes every loss and every monitored number.

Nothing here imports crystal. One record at a time, no padding and no cache; dense L x L masks and attention
maps; plain loops over pairs, positions, heads and layers; float64. The model is transformers' own class,
loaded from the same directory, with trained weights put in as whole tensors. What is stock stays stock: the
modelling, the chat template, the tokenizer, the image processor and `get_rope_index`. `tests/test_oracle.py`
compares crystal with this.

    common      settings, the model, a record's text and pictures
    sft         cross-entropy on the answer
    crystal     CrystaL, sections 3.1 to 3.4, eq. 3 to 6; the authors' released code differs by RELEASED
    livr        LIVR, section 3.2
    lavit       LaViT, eq. 3 to 9
    valr        VaLR, its method section

L sequence length, D hidden size, H heads, K latents, M answer positions, N image tokens, V vocabulary.
Position t predicts token t + 1. All logarithms are natural.
"""

import colorsys
import functools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DINOv3ViTModel,
)

INF = float("inf")

# --- common: settings ---

COMMON = {
    "seed": 0,
    "turns": "first",
    "lora_r": 16,
    "lora_alpha": 32.0,
    "min_pixels": None,
    "max_pixels": None,
}

# The defaults that the papers give. What only changes how a number is computed is no setting here.
DEFAULTS = {
    "sft": {},
    "crystal": {
        "latents": 8,
        "latent_kind": "diverse",
        "thought": "fixed",
        "labels": "all",
        "corruption": "blur",
        "copied": "latents",
        "ce": "per_path",
        "kl_share": 1.0,
        "answer_positions": "predicting",
        "attn_loss": "kl",
        "attn_heads": "keep",
        "attn_columns": "latents",
        "attn_layers": "last",
        "teacher_grad": False,
        "w_ce_int": 1.0,
        "w_ce_cor": 1.0,
        "w_kl": 1.0,
        "w_attn": 1.0,
    },
    "livr": {
        "latents": 16,
        "latent_kind": "diverse",
        "place": "after",
        "mask": "prompt",
        "latents_see": "all",
        "image_copies": 1,
        "masked": 0.4,
        "max_steps": 4000,
    },
    "lavit": {
        "latents": 4,
        "latent_kind": "diverse",
        "gate": "cosine",
        "gate_warmup": 0.4,
        "gate_start": 1e-6,
        "w_semantics": 0.3,
        "w_gaze": 0.3,
        "gaze_top": 8,
        "max_steps": 1000,
    },
    "valr": {
        "latents": 16,
        "encoders": "tiny",
        "align_layer": 0,
        "w_repa": 0.5,
        "updates": None,
        "first_share": 0.5,
        "max_steps": 4000,
    },
}

# What the authors' released code of CrystaL does and the paper does not say.
RELEASED = {
    "copied": "thought",
    "ce": "pooled",
    "kl_share": 0.1,
    "answer_positions": "span",
    "attn_heads": "mean",
    "attn_columns": "thought",
}
DEFAULTS["released"] = DEFAULTS["crystal"] | RELEASED


def settings(method, **given):
    """A method's settings: its paper's defaults, or those of CrystaL's released code, and what is given."""
    return SimpleNamespace(**{**COMMON, **DEFAULTS[method], **given})


# --- common: the model ---


def dense_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """softmax(q k / sqrt d + mask) v, head by head, in the inputs' precision. Vision has no mask."""
    group = query.shape[1] // key.shape[1]
    out, maps = [], []
    for head in range(query.shape[1]):
        scores = query[0, head] @ key[0, head // group].T * scaling
        if attention_mask is not None:
            scores = scores + attention_mask[0, 0]
        A = scores.softmax(-1)
        maps.append(A)
        out.append(A @ value[0, head // group])
    return torch.stack(out, 1)[None], torch.stack(maps)[None]


AttentionInterface.register("oracle", dense_attention)


@functools.cache
def stock(directory):
    """transformers' own model of a directory, in float64, and its parameters as they were loaded."""
    how = {"dtype": torch.float64, "attn_implementation": "oracle"}
    hf = AutoModelForImageTextToText.from_pretrained(directory, **how).eval()
    return hf.requires_grad_(False), dict(hf.named_parameters(remove_duplicate=False))


@functools.cache
def tokenizer(directory, new_tokens):
    """The directory's tokenizer, with new special tokens at the first free ids."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    new = {"additional_special_tokens": list(new_tokens)}
    tokenizer.add_special_tokens(new, replace_extra_special_tokens=False)
    return tokenizer


@functools.cache
def image_processor(directory, min_pixels, max_pixels):
    """The directory's image processor; None keeps its own bounds."""
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    bounds = {name: value for name, value in bounds.items() if value is not None}
    return AutoImageProcessor.from_pretrained(directory, backend="pil", **bounds)


class Net:
    """A stock model with some of its weights replaced, its tokenizer and its image processor.

    weights: {name of a parameter in the stock model: tensor}, which may hang on a graph. heads: {name:
    tensor} of what a method adds beside the model. One Net of a directory lives at a time: the next
    one takes its modules.
    """

    def __init__(self, directory, tokenizer, processor, weights=None, heads=None):
        self.tokenizer, self.processor, self.heads = tokenizer, processor, heads or {}
        self.hf, frozen = stock(directory)

        # A plain tensor takes a parameter's place, so that gradients reach whatever it was made from.
        for name, tensor in {**frozen, **(weights or {})}.items():
            parent, _, child = name.rpartition(".")
            module = self.hf.get_submodule(parent)
            module._parameters.pop(child, None)
            vars(module).pop(child, None)  # the Net before
            setattr(module, child, tensor)

        self.text = self.hf.model.language_model
        self.head = self.hf.lm_head.weight
        self.end = self.id("<|im_end|>")
        self.image = self.id("<|image_pad|>")

    def id(self, token):
        return self.tokenizer.convert_tokens_to_ids(token)

    def log_probabilities(self, h):
        """h [D] -> log P of the next token [V]."""
        return (self.head @ h).log_softmax(-1)

    def embed(self, ids, pixels):
        """Token ids and pixels -> the decoder's input [L,D]: image tokens are the vision tower's features."""
        x = self.hf.get_input_embeddings().weight[torch.tensor(ids)]
        if pixels is None:
            return x
        features = torch.cat(self.hf.model.get_image_features(*pixels).pooler_output)
        x = list(x)
        for n, t in enumerate(t for t, token in enumerate(ids) if token == self.image):
            x[t] = features[n]
        return torch.stack(x)

    def positions(self, ids, pixels):
        """M-RoPE's positions [3,1,L], the model's own."""
        kinds = torch.tensor([[int(token == self.image) for token in ids]])
        grid = None if pixels is None else pixels[1]
        return self.hf.model.get_rope_index(torch.tensor([ids]), kinds, image_grid_thw=grid)[0]

    def run(self, x, positions, bias=None, swap=None):
        """The decoder over x [L,D] -> last states; each layer's map [H,L,L], input and output [L,D].

        bias: [L,L], added to all scores beside causality. swap: (positions, inputs): before layer l the
        states at these positions become those of inputs[l].
        """
        L = len(x)
        mask = torch.full((L, L), -INF, dtype=torch.float64).triu(1)
        if bias is not None:
            mask = mask + bias
        inputs, outputs, hooks = [], [], []

        def before(layer, args):
            h = args[0]
            if swap is not None:
                at, lent = swap
                h = h.clone()
                h[0, at] = lent[len(inputs)][at]
            inputs.append(h[0])
            return (h, *args[1:])

        def after(layer, args, out):
            outputs.append(out[0])

        for layer in self.text.layers:
            hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        seen = self.text(
            inputs_embeds=x[None], position_ids=positions, attention_mask=mask[None, None], use_cache=False,
            output_attentions=True,
        )
        for hook in hooks:
            hook.remove()
        maps = [A[0] for A in seen.attentions]  # of each layer [H,L,L]
        return SimpleNamespace(h=seen.last_hidden_state[0], maps=maps, inputs=inputs, outputs=outputs)


def adapted(W, A, B, alpha, r):
    """LoRA (Hu et al. 2022, section 4.1): the weight with its low-rank update, W + alpha / r B A."""
    return W + alpha / r * (B @ A)


def with_rows(W, ids, rows):
    """A vocabulary matrix with new rows at `ids`, one after the other."""
    lines = list(W)
    for i, row in zip(ids, rows):
        lines[i] = row
    return torch.stack(lines)


# --- common: a record's text and pictures ---


def latent_names(s):
    """The K latent tokens in their order: all different, or one and the same (CrystaL, table 3)."""
    return [f"<|latent_{k if s.latent_kind == 'diverse' else 0}|>" for k in range(s.latents)]


def conversation(record, number=0):
    """A record -> [(role, text)] up to answer `number`, that answer, how many pictures were seen."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = []
    for turn in record.get("conversations") or record["messages"]:
        who = turn.get("from") or turn["role"]
        turns.append((roles.get(who, who), turn.get("value") or turn["content"]))

    # A file that leaves the markers out means that the pictures come first.
    names = pictures_of(record)
    if names and not any("<image>" in text for _, text in turns):
        first = [role for role, _ in turns].index("user")
        turns[first] = ("user", "<image>" * len(names) + turns[first][1])

    answers = []
    for i, (role, text) in enumerate(turns):
        seen = sum(text.count("<image>") for _, text in turns[:i])
        if role == "assistant" and (seen or not names):
            answers.append((turns[:i], text.strip(), seen))
    return answers[number]


def pictures_of(record):
    """Names of a record's picture files."""
    names = record.get("images", record.get("image", []))
    return [names] if isinstance(names, str) else names


def prompt(net, turns, copies=1):
    """The stock template's text up to where the assistant speaks, an `<|image_pad|>` for each picture."""
    messages = []
    for role, text in turns:
        content = []
        for i, part in enumerate(text.replace("<image>\n", "<image>").split("<image>")):
            if i:
                content += [{"type": "image"}] * copies
            if part:
                content.append({"type": "text", "text": part})
        messages.append({"role": role, "content": content})
    return net.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def pixels_of(net, pictures):
    """RGB pictures -> what the vision tower takes: (pixels, grid); None without any."""
    if not pictures:
        return None
    out = net.processor(images=pictures, return_tensors="pt")
    return out["pixel_values"].double(), out["image_grid_thw"]


def tokens(net, text, pixels):
    """The stock tokenizer's ids of a text, each `<|image_pad|>` as often as its picture has tokens."""
    grids = [] if pixels is None else pixels[1].tolist()
    counts = [t * h * w // net.processor.merge_size**2 for t, h, w in grids]
    ids = []
    for token in net.tokenizer.encode(text, add_special_tokens=False):
        ids += [token] * counts.pop(0) if token == net.image else [token]
    assert not counts
    return ids


class Sequence:
    """One record as the model reads it: token ids, pixels, positions, and where things stand.

    said: the position of the first token that is not the prompt's. image, latents: positions. answer: the
    position of the answer's first token, `<answer>` itself where there is one.
    """

    def __init__(self, net, asked, said, pixels, latents=(), opens=None):
        self.pixels = pixels
        self.ids = tokens(net, asked + said, pixels)
        self.said = len(tokens(net, asked, pixels))
        self.positions = net.positions(self.ids, pixels)
        marked = {net.id(name) for name in latents}
        self.latents = [t for t, token in enumerate(self.ids) if token in marked]
        self.image = [t for t, token in enumerate(self.ids) if token == net.image]
        self.answer = self.said
        if opens:
            self.answer = max(t for t, token in enumerate(self.ids) if token == net.id(opens))

    def __len__(self):
        return len(self.ids)


def mean(values):
    """The mean of a list of scalars."""
    return sum(values) / len(values)


def cross_entropy(net, h, ids, at):
    """-log P(token t + 1) of the states at each position t of `at` -> list of scalars."""
    return [-net.log_probabilities(h[t])[ids[t + 1]] for t in at]


def kl(log_p, log_q):
    """KL(p || q) of two distributions given by their logarithms."""
    return (log_p.exp() * (log_p - log_q)).sum()


def mass(maps, queries, columns):
    """The share of the queries' attention that the columns get: mean over layers, heads and queries."""
    shares = [A[head, t][columns].sum() for A in maps for head in range(len(A)) for t in queries]
    return mean(shares).detach()


def open_pictures(record, folder, count):
    """The first `count` pictures of a record."""
    return [Image.open(Path(folder) / name).convert("RGB") for name in pictures_of(record)[:count]]


def layers_of(text, count):
    """Which layers `last`, `all` or a list of indices names, of `count`."""
    if text == "last":
        return [count - 1]
    if text == "all":
        return list(range(count))
    return sorted({int(i) % count for i in text.split(",")})


# --- sft: plain supervised fine-tuning ---


def sft(net, record, folder, s, number=0):
    """Mean cross-entropy of the answer's tokens and of the `<|im_end|>` after them."""
    turns, answer, seen = conversation(record, number)
    pixels = pixels_of(net, open_pictures(record, folder, seen))
    x = Sequence(net, prompt(net, turns), f"{answer}<|im_end|>", pixels)
    h = net.run(net.embed(x.ids, pixels), x.positions).h
    return {"ce": mean(cross_entropy(net, h, x.ids, range(x.said - 1, len(x) - 1)))}


# --- crystal: eq. 3, the corrupted picture ---

# eta ~ U(low, high) where the settings give no range: the released code's for blur, appendix A.3's levels for
# the others, and for crop and impulse, which have none there, those of the documentation.
ETA = {
    "blur": (2.0, 5.0),
    "mask": (0.2, 0.8),
    "crop": (0.2, 0.8),
    "jigsaw": (0.2, 0.8),
    "color": (0.5, 2.0),
    "noise": (15.0, 50.0),
    "impulse": (0.01, 0.12),
}


def hashed(*numbers):
    """The documented hash of whole numbers to a seed: a corruption depends on nothing but these."""
    seed = 0
    for n in numbers:
        seed = (seed ^ (n + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        seed = seed ^ (seed >> 31)
    return seed // 2


def corrupted(picture, s, place, n):
    """Eq. 3: I_cor = C(I; eta, S). place: (seed, epoch, index of the record); n: which of its pictures."""
    g = torch.Generator().manual_seed(hashed(*place, n))
    x = np.asarray(picture).astype(float) / 255  # [h,w,3]
    for part in s.corruption.split(","):
        mode, _, given = part.partition("=")  # mode, mode=eta or mode=low:high
        ends = [float(end) for end in given.split(":")] if given else ETA[mode]
        low, high = ends[0], ends[-1]
        eta = low + (high - low) * float(torch.rand((), generator=g))
        x = CORRUPTIONS[mode](x, eta, g).clip(0, 1)
    return Image.fromarray((x * 255).round().astype(np.uint8))


def draw(g, *shape):
    """Numbers of U[0, 1), in float64."""
    return torch.rand(shape, generator=g, dtype=torch.float64).numpy()


def blurred(x, radius, g):
    """Gaussian blur as two matrices of kernels, cut at 4 radii; beyond an edge its pixel repeats."""
    reach = math.ceil(4 * radius)

    def matrix(n):
        G = np.zeros((n, n))
        for i in range(n):
            for t in range(-reach, reach + 1):
                G[i, min(max(i + t, 0), n - 1)] += math.exp(-t * t / (2 * radius * radius))
        return G / G.sum(1, keepdims=True)

    return np.einsum("ia,abc,jb->ijc", matrix(x.shape[0]), x, matrix(x.shape[1]), optimize=True)


def window(share, height, width, g, stretch):
    """Top, left, height and width of a rectangle with `share` of the area, its place uniform."""
    u, v, w = draw(g, 3)
    aspect = min(stretch, 1 / share) ** (2 * u - 1)
    sides = [math.sqrt(share * aspect) * height, math.sqrt(share / aspect) * width]
    short = int(sides[1] <= sides[0])  # rounded first; the other makes up the area
    sides[short] = max(round(sides[short]), 1)
    sides[1 - short] = min(max(round(share * height * width / sides[short]), 1), (height, width)[1 - short])
    h, w_ = sides
    return int(v * (height - h + 1)), int(w * (width - w_ + 1)), h, w_


def masked(x, share, g):
    """One rectangle becomes black."""
    top, left, h, w = window(share, *x.shape[:2], g, 3.3)
    x = x.copy()
    x[top : top + h, left : left + w] = 0
    return x


def cropped(x, share, g):
    """What a window leaves, drawn to the whole size."""
    top, left, h, w = window(1 - share, *x.shape[:2], g, 1.0)
    kept = torch.from_numpy(x[top : top + h, left : left + w]).permute(2, 0, 1)[None]
    drawn = torch.nn.functional.interpolate(kept, x.shape[:2], mode="bilinear", align_corners=False)
    return drawn[0].permute(1, 2, 0).numpy()


def shuffled(x, share, g):
    """4 x 4 tiles, of which round(16 share) change places along a cycle."""
    h, w = x.shape[0] // 4, x.shape[1] // 4
    moved = torch.randperm(16, generator=g)[: round(16 * share)].tolist()
    out = x.copy()
    for to, origin in zip(moved, moved[-1:] + moved[:-1]):
        a, b = divmod(to, 4)
        c, d = divmod(origin, 4)
        out[a * h : a * h + h, b * w : b * w + w] = x[c * h : c * h + h, d * w : d * w + w]
    return out


def recoloured(x, s, g):
    """Brightness, contrast, saturation in 1 +- s, hue turned by up to s / 4, clipped after each."""
    u = draw(g, 4)
    low, high = max(0, 1 - s), 1 + s
    brightness, contrast, saturation = low + (high - low) * u[:3]
    turn = min(s / 4, 0.5) * (2 * u[3] - 1)
    luma = np.array([0.299, 0.587, 0.114])
    x = (x * brightness).clip(0, 1)
    x = ((1 - contrast) * (x @ luma).mean() + contrast * x).clip(0, 1)
    x = ((1 - saturation) * (x @ luma)[..., None] + saturation * x).clip(0, 1)
    for row in x:
        for pixel in row:
            hue, satur, value = colorsys.rgb_to_hsv(*pixel)
            pixel[:] = colorsys.hsv_to_rgb((hue + turn) % 1, satur, value)
    return x


def noisy(x, sigma, g):
    """Gaussian noise of sigma / 255 on every value."""
    height, width, _ = x.shape
    return x + sigma / 255 * torch.randn(3, height, width, generator=g).permute(1, 2, 0).double().numpy()


def impulses(x, share, g):
    """Half of `share` of the pixels become black, the other half white."""
    u = draw(g, *x.shape[:2])
    x = x.copy()
    x[u < share] = 1
    x[u < share / 2] = 0
    return x


CORRUPTIONS = {
    "blur": blurred,
    "mask": masked,
    "crop": cropped,
    "jigsaw": shuffled,
    "color": recoloured,
    "noise": noisy,
    "impulse": impulses,
}


# --- crystal: section 3, both variants ---

CRYSTAL_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
THOUGHT = "Because the feature of the image is"


def crystal(net, record, folder, s, place, number=0, pixels_cor=None):
    """Eq. 4 to 6's terms of one pair, and the share of attention that the latents get in each path.

    place: (seed, epoch, index), which the corruption is drawn from. pixels_cor: the corrupted pixels, where
    the caller has checked them against `corrupted` and wants rounding to play no part.
    """
    # Section 3.1: <think> thought, K latents. </think> <answer> R </answer>
    turns, answer, seen = conversation(record, number)
    steps = record.get("cot") or []
    steps = [steps] if isinstance(steps, str) else steps
    thought = " ".join(steps) if s.thought == "cot" and steps else THOUGHT
    said = f"<think> {thought}{''.join(latent_names(s))}. </think><answer>{answer}</answer><|im_end|>"

    # Section 3.2: the same with a corrupted picture.
    pictures = open_pictures(record, folder, seen)
    pixels = pixels_of(net, pictures)
    if pixels_cor is None:
        spoiled = [corrupted(picture, s, place, n) for n, picture in enumerate(pictures)]
        pixels_cor, _ = pixels_of(net, spoiled)
    x = Sequence(net, prompt(net, turns), said, pixels, latent_names(s), "<answer>")

    # Section 3.3: the corrupted path's latents are the intact path's, at every decoder layer.
    whole_thought = list(range(x.said, x.answer))
    copied = whole_thought if s.copied == "thought" else x.latents
    intact = net.run(net.embed(x.ids, pixels), x.positions)
    cor = net.run(net.embed(x.ids, (pixels_cor, pixels[1])), x.positions, swap=(copied, intact.inputs))

    # Omega_A of eq. 4: the positions that predict R and what follows it, or (released) the answer's own.
    last = len(x) - 1
    omega = list(range(x.answer, last if s.answer_positions == "predicting" else len(x)))

    # Section 3.4: the cross-entropies. No loss reads a copied position of the corrupted path.
    first = x.said - 1 if s.labels == "all" else x.answer
    label_int = range(first, last)
    if s.ce == "pooled":
        label_cor = [t for t in label_int if t in omega]
    else:
        label_cor = [t for t in label_int if t not in copied]
    ce_int = cross_entropy(net, intact.h, x.ids, label_int)
    ce_cor = cross_entropy(net, cor.h, x.ids, label_cor)
    if s.ce == "pooled":
        terms = {"ce": mean(ce_int + ce_cor)}
    else:
        terms = {"ce_int": mean(ce_int), "ce_cor": mean(ce_cor)}

    # Eq. 4: mean over M of KL(P_int || P_cor), or over its largest share.
    teacher = intact.h if s.teacher_grad else intact.h.detach()
    head = net.head if s.teacher_grad else net.head.detach()
    divergences = []
    for t in omega:
        log_p = (head @ teacher[t]).log_softmax(-1)
        divergences.append(kl(log_p, net.log_probabilities(cor.h[t])))
    kept = max(1, math.floor(round(s.kl_share * len(omega), 6)))
    terms["kl"] = mean(sorted(divergences, key=float, reverse=True)[:kept])

    # Eq. 5: the two paths' attention from Omega_A to the columns, mean over the layers.
    columns = {"latents": x.latents, "thought": whole_thought, "all": x.image + x.latents}[s.attn_columns]
    layers = layers_of(s.attn_layers, len(net.text.layers))
    distances = []
    for layer in layers:
        A_int = intact.maps[layer] if s.teacher_grad else intact.maps[layer].detach()
        distances.append(attention_distance(s, A_int, cor.maps[layer], omega, columns))
    terms["attn"] = mean(distances)

    # Beside the losses: what the latents get.
    terms["mass_int"] = mass([intact.maps[layer] for layer in layers], omega, x.latents)
    terms["mass_cor"] = mass([cor.maps[layer] for layer in layers], omega, x.latents)
    return terms


def attention_distance(s, A_int, A_cor, omega, columns):
    """Eq. 5 of one layer, A [H,L,L], in one of table 4's kinds."""
    # Released: heads are averaged before they are compared.
    if s.attn_heads == "mean":
        A_int, A_cor = A_int.mean(0, keepdim=True), A_cor.mean(0, keepdim=True)
    cells = [(head, t) for head in range(len(A_int)) for t in omega]

    # KL of the rows, renormalised over the columns: mean over heads and positions.
    if s.attn_loss == "kl":
        rows = []
        for head, t in cells:
            p, q = A_int[head, t][columns], A_cor[head, t][columns]
            rows.append(kl((p / p.sum()).log(), (q / q.sum()).log()))
        return mean(rows)

    # The squared Frobenius norm over all heads, or its mean over the cells.
    squares = [((A_int[head, t] - A_cor[head, t])[columns] ** 2).sum() for head, t in cells]
    return sum(squares) / (len(cells) * len(columns) if s.attn_loss == "mse" else 1)


# --- livr: its section 3.2 ---


def livr(net, record, folder, s, step=0, number=0):
    """Cross-entropy on the answer, under the bottleneck in stage 1, and what attention the latents get.

    step: the update, which the stage follows from.
    """
    turns, answer, seen = conversation(record, number)
    pictures = []
    for picture in open_pictures(record, folder, seen):
        pictures += [picture] * s.image_copies
    pixels = pixels_of(net, pictures)

    # The latents end the user's last turn; `before` puts them between the last image and the question.
    asked, latents = prompt(net, turns, s.image_copies), "".join(latent_names(s))
    if s.place == "before":
        head, tail = asked.rsplit("<|vision_end|>", 1)
        asked = f"{head}<|vision_end|>{latents}{tail}"
    else:
        head, tail = asked.rsplit("<|im_end|>", 1)
        asked = f"{head}{latents}<|im_end|>{tail}"
    x = Sequence(net, asked, f"{answer}<|im_end|>", pixels, latent_names(s))
    L, predicting = len(x), range(x.said - 1, len(x) - 1)

    # Stage 1: neither prompt nor answer sees the image; latents see everything. The two tokens around
    # an image have seen nothing but images, so they count as image. A token before the first image has
    # no image to see.
    bias = torch.zeros(L, L, dtype=torch.float64)
    if step < round(s.masked * s.max_steps):
        visual = {net.id(name) for name in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")}
        for q in range(L):
            for k in range(q):
                to_image = x.ids[k] in visual
                is_text = x.ids[q] not in visual and q not in x.latents
                # Answer-only masking begins where the first token of the answer is predicted.
                blind = is_text and (s.mask == "prompt" or q >= predicting[0])
                if blind and to_image:
                    bias[q, k] = -INF
                if s.latents_see == "image" and q in x.latents and not to_image and k not in x.latents:
                    bias[q, k] = -INF

    seen = net.run(net.embed(x.ids, pixels), x.positions, bias)
    terms = {"ce": mean(cross_entropy(net, seen.h, x.ids, predicting))}
    if x.latents:
        terms["mass"] = mass(seen.maps[-1:], predicting, x.latents)
    return terms


# --- lavit: eq. 3 to 9 ---


def lavit(net, record, folder, s, step=0, number=0):
    """Cross-entropy through the gate, semantics (eq. 6), gaze (eq. 7), and what attention the latents get."""
    turns, answer, seen = conversation(record, number)
    pixels = pixels_of(net, open_pictures(record, folder, seen))

    # K latents before the answer; `<answer>` opens the response: its prediction of R's first
    # token is gated too.
    asked = prompt(net, turns) + "".join(latent_names(s)) + "<answer>"
    x = Sequence(net, asked, f"{answer}<|im_end|>", pixels, latent_names(s))
    predicting = range(x.said - 1, len(x) - 1)

    # Eq. 5: gamma(t); table 3's controls are 0 until T_w, and 1 always.
    T_w = s.gate_warmup * s.max_steps
    if s.gate == "open" or step >= T_w:
        gamma = 1.0
    elif s.gate == "hard":
        gamma = 0.0
    else:
        gamma = s.gate_start + (1 - s.gate_start) / 2 * (1 - math.cos(math.pi * step / T_w))

    # Eq. 4: B_gate = ln gamma(t) on the scores from the response to the image.
    bias = torch.zeros(len(x), len(x), dtype=torch.float64)
    for q in predicting:
        for k in x.image:
            bias[q, k] = math.log(gamma) if gamma else -INF
    seen = net.run(net.embed(x.ids, pixels), x.positions, bias)
    terms = {"ce": mean(cross_entropy(net, seen.h, x.ids, predicting))}
    terms["mass"] = mass(seen.maps[-1:], predicting, x.latents)

    # Eq. 6: 1 - cosine of the last latent, through a two-layer MLP with GELU, and the teacher's V_sem.
    if s.w_semantics:
        h_z = seen.h[x.latents[-1]]
        hidden = net.heads["semantics.0.weight"] @ h_z + net.heads["semantics.0.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        phi = net.heads["semantics.2.weight"] @ hidden + net.heads["semantics.2.bias"]
        terms["semantics"] = 1 - cosine(phi, teacher(record, folder, "v_sem").double())

    # Eq. 7: KL(A_traj || A_student), summed over the latents; A_student is the mean over layers and heads.
    if s.w_gaze:
        merge = net.processor.merge_size
        grids = [(h // merge, w // merge) for _, h, w in pixels[1].tolist()]
        seen_by_teacher = teacher(record, folder, "gaze").double()
        A_traj = gaze(seen_by_teacher, teacher(record, folder, "gaze_grid").tolist(), grids, s.gaze_top)
        terms["gaze"] = 0
        for t in x.latents:
            A = mean([A[head, t] for A in seen.maps for head in range(len(A))])[x.image]
            A = A / A.sum()
            terms["gaze"] = terms["gaze"] + sum(p * (p.log() - q.log()) for p, q in zip(A_traj, A) if p > 0)
    return terms


def teacher(record, folder, name):
    """What the teacher left of a record."""
    return load_file(Path(folder) / record["features"]["lavit"])[f"{record['id']}/{name}"]


def cosine(a, b):
    """The cosine of two vectors."""
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def gaze(A, grids, to, top):
    """A teacher's attention on its grids -> [N] on the student's, the `top` largest kept (section 4.1)."""
    drawn = []
    for (rows, columns), (new_rows, new_columns) in zip(grids, to):
        part, A = A[: rows * columns].view(rows, columns), A[rows * columns :]
        for r in range(new_rows):
            for c in range(new_columns):
                y = (r + 0.5) * rows / new_rows - 0.5
                x = (c + 0.5) * columns / new_columns - 0.5
                drawn.append(bilinear(part, y, x))
    drawn = torch.stack(drawn)
    order = sorted(range(len(drawn)), key=lambda n: (-float(drawn[n]), n))
    kept = torch.zeros_like(drawn)
    kept[order[:top]] = drawn[order[:top]]
    return kept / kept.sum()


def bilinear(part, y, x):
    """The value of a grid between its cells; beyond the border the border's."""
    rows, columns = part.shape
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
    top, left = min(int(y), rows - 1), min(int(x), columns - 1)
    low, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    upper = part[top, left] * (1 - (x - left)) + part[top, right] * (x - left)
    lower = part[low, left] * (1 - (x - left)) + part[low, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


# --- valr: its method section ---

VALR_TAGS = ["<latent>", "</latent>", "<answer>", "</answer>"]


def valr(net, record, folder, s, step=0, number=0):
    """Cross-entropy of what the model writes itself, and in stage 2 L_REPA of the fed-back latents."""
    turns, answer, seen = conversation(record, number)
    pictures = open_pictures(record, folder, seen)
    pixels = pixels_of(net, pictures)
    steps = record.get("cot") or [""]
    steps = [steps] if isinstance(steps, str) else steps

    # v, q -> (latents, step) x N -> a. A latent's token is never read: padding stands for it.
    latents = step >= round(s.first_share * s.max_steps)
    segment = f"<latent>{net.tokenizer.pad_token * s.latents}</latent>" if latents else ""
    said = "".join(segment + (f"{text}\n" if text else "") for text in steps)
    said += f"<answer>{answer}</answer><|im_end|>"
    x = Sequence(net, prompt(net, turns), said, pixels, opens="<answer>")
    fed = [t for t, token in enumerate(x.ids) if token == net.tokenizer.pad_token_id]
    assert len(fed) == (len(steps) * s.latents if latents else 0)

    # E_t+1 = [E_t; h_t]: the state before a latent, after the final norm, is its input.
    embedded = net.embed(x.ids, pixels)
    seen = feed_back(net, x, embedded, fed, s.updates)

    # Labels: neither the latents nor `</latent>`, which is forced behind the last of a segment.
    forced = set(fed) | {t for t, token in enumerate(x.ids) if token == net.id("</latent>")}
    labelled = [t for t in range(x.said - 1, len(x) - 1) if t + 1 not in forced]
    terms = {"ce": mean(cross_entropy(net, seen.h, x.ids, labelled))}
    if not latents or s.encoders == "none":
        return terms

    # L_REPA = -1/(N P) sum of cosines over segments and patches, mean over the encoders.
    layer = s.align_layer or max(1, round(len(net.text.layers) * 12 / 28))
    losses = []
    for m, name in enumerate(s.encoders.split(",")):
        if name == "own":
            F = embedded[x.image].detach()
        else:
            F = encoder_features(name, record, folder, pictures).double()  # [P,E]
        cosines = []
        for n in range(0, len(fed), s.latents):
            f = seen.outputs[layer - 1][fed[n : n + s.latents]]  # [K,D]
            for p in range(len(F)):
                at = min(max((p + 0.5) * s.latents / len(F) - 0.5, 0), s.latents - 1)
                low = int(at)
                high = min(low + 1, s.latents - 1)
                drawn = f[low] * (1 - (at - low)) + f[high] * (at - low)
                cosines.append(cosine(projection(net, m, drawn), F[p]))
        losses.append(-mean(cosines))
    return terms | {"repa": mean(losses)}


def feed_back(net, x, embedded, fed, updates):
    """The decoder's pass with every latent's input in place.

    updates None: the recurrence, by running the whole prefix again for each latent. Otherwise so many updates
    of all latents at once, their first guess the state in front of the first one.
    """
    inputs = list(embedded)
    if updates is None:
        for t in fed:
            inputs[t] = net.run(torch.stack(inputs[:t]), x.positions[:, :, :t]).h[t - 1]
        return net.run(torch.stack(inputs), x.positions)

    if fed:
        start = net.run(torch.stack(inputs[: fed[0]]), x.positions[:, :, : fed[0]]).h[-1]
        for t in fed:
            inputs[t] = start
    seen = net.run(torch.stack(inputs), x.positions)
    for _ in range(updates if fed else 0):
        for t in fed:
            inputs[t] = seen.h[t - 1]
        seen = net.run(torch.stack(inputs), x.positions)
    return seen


def projection(net, m, f):
    """psi of encoder number m: two layers with SiLU."""
    hidden = net.heads[f"{m}.0.weight"] @ f + net.heads[f"{m}.0.bias"]
    hidden = hidden * torch.sigmoid(hidden)
    return net.heads[f"{m}.2.weight"] @ hidden + net.heads[f"{m}.2.bias"]


@functools.cache
def tiny_encoder():
    """The encoder `tiny`: a DINOv3 of four small layers, as it lies in the package."""
    folder = Path(__file__).parents[1] / "crystal" / "assets" / "encoder"
    return DINOv3ViTModel.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def encoder_features(name, record, folder, pictures):
    """Patch features [P,E] of all pictures, one after the other: precomputed ones, or those of `tiny`."""
    if name.startswith("features:"):
        stored = load_file(Path(folder) / record["features"][name.split(":")[1]])
        return torch.cat([stored[f"{record['id']}/{n}"] for n in range(len(pictures))])
    assert name == "tiny"
    found = []
    for picture in pictures:
        x = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255).permute(2, 0, 1)[None]
        x = torch.nn.functional.interpolate(x, (112, 112), mode="bilinear", antialias=True).clamp(0, 1)
        average, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x - average[:, None, None]) / spread[:, None, None]
        found.append(tiny_encoder()(pixel_values=x).last_hidden_state[0, 1:])  # behind the class token
    return torch.cat(found)
