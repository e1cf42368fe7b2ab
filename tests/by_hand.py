"""A model made by hand: what it answers under every condition can be told in
advance, without running anything.

Its pictures are uniform; a picture's brightness is its code. Its decoder has two layers that add 60 to every
state. A latent takes the picture's code in, plus 300 for each latent before it, and a word of the question
says what the answer goes by:

    see     the latents; "nothing" without them
    look    the picture; "nothing" if it is hidden
    both    the latents, if the picture is in sight too
    guess   nothing: "white." with latents in the prompt, "pale" without

A code becomes the name of the level that is nearest; latents whose numbers do not agree with each other are
"static". `generate` stands in for crystal.generate's function, and runs the layers as a decoder does, so that
hooks on them see the prompt and one further row.
"""

import json
import math
from types import SimpleNamespace

import torch
from PIL import Image

import crystal.backbone.model
from crystal import methods

LEVELS = {"black": 0, "dark": 60, "grey": 120, "light": 180, "white": 240}
STEP = 60  # what each layer adds: a state put in at the wrong layer is one level off
APART = 300  # between one latent and the next: latents exchanged are two levels and more off
WIDTH = 64  # D


class Layer(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states + STEP


def ingredients(directory, *flags):
    """A real model's tokenizer, image rules and family, and the sequences of a method, by default
    CrystaL's with three latents.
    """
    settings = methods.parse(["--latents", "3", "--lora_r", "2", "--model", str(directory), *flags])
    real = crystal.backbone.model.load(directory)
    method, fmt = methods.attach(real, settings)
    return SimpleNamespace(settings=settings, real=real, method=method, fmt=fmt)


def model_by_hand(real):
    """The model, with the tokenizer, image rules and family of a real one."""
    model = SimpleNamespace(
        layers=[Layer(), Layer()],
        device=torch.device("cpu"),
        hf=SimpleNamespace(dtype=torch.float64),
        name="by hand",
        tokenizer=real.tokenizer,
        image_processor=real.image_processor,
        family=real.family,
    )
    dark, bright = (
        float(real.image_processor(images=[Image.new("RGB", (56, 56), (v,) * 3)])["pixel_values"].mean())
        for v in (0, 255)
    )
    model.code = lambda pixels: 255 * (float(pixels.mean()) - dark) / (bright - dark)
    model.hidden = lambda batch, recorder=None, biases=(): weigh(batch, recorder)
    return model


def weigh(batch, recorder):
    """Attention whose weights are small whole numbers, two heads, two layers: 1 for every token, but 2 for
    latents and 3 for the
    image where the first head of the second layer looks. Any position may be read."""
    B, L = batch["input_ids"].shape
    keys = torch.zeros(B, 1, L, 1, dtype=torch.float64)
    for b in range(B):
        keys[b, 0, batch["latents"][b][batch["latents"][b] >= 0]] = math.log(2)
        keys[b, 0, batch["image"][b][batch["image"][b] >= 0]] = math.log(3)
    look, idle = torch.ones(B, 1, L, 1, dtype=torch.float64), torch.zeros(B, 1, L, 1, dtype=torch.float64)
    recorder(0, torch.cat([idle, idle], 1), keys, 1.0)
    recorder(1, torch.cat([look, idle], 1), keys, 1.0)
    return torch.zeros(B, L, WIDTH, dtype=torch.float64)


def named(code):
    return min(LEVELS, key=lambda name: abs(LEVELS[name] - code))


def sees(biases, b, rows, columns):
    """Whether rows of prompt b see its columns: (bool of each row). A column in part hidden from a row is a
    mistake of the mask's.
    """
    if not columns:
        return torch.zeros(len(rows), dtype=torch.bool)
    hidden = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for bias in biases:
        assert bias.value == -math.inf
        hidden |= bias.queries[b, rows][:, None] & bias.keys[b, columns][None, :]
    assert (hidden.all(1) == hidden.any(1)).all(), "a mask hides half of it"
    return ~hidden.any(1)


def run_layers(model, h):
    for layer in model.layers:
        h = layer(h)
    return h


def generate(model, prompts, fmt, max_new_tokens=64, biases=None, latents="keep", streamer=None):
    """As crystal.generate.generate: prompts of (ids, pixel_values, grid) -> answers."""
    B, L = len(prompts), max(len(ids) for ids, _, _ in prompts)
    ids = torch.full((B, L), model.tokenizer.pad_token_id)
    for b, (prompt, _, _) in enumerate(prompts):
        ids[b, L - len(prompt) :] = torch.tensor(prompt)
    masks = (
        biases({"input_ids": ids, "attention_mask": (ids != model.tokenizer.pad_token_id).long()})
        if biases
        else []
    )

    h = torch.full((B, L, WIDTH), -1e6, dtype=torch.float64)
    places = [[i for i in range(L) if int(ids[b, i]) in fmt.latents] for b in range(B)]
    pictures = [[i for i in range(L) if int(ids[b, i]) == fmt.image] for b in range(B)]
    for b, (_, pixels, _) in enumerate(prompts):
        code = torch.full((len(places[b]),), -1e6, dtype=torch.float64)
        code[sees(masks, b, places[b], pictures[b])] = model.code(pixels)
        h[b, places[b]] = (code + APART * torch.arange(len(code)))[:, None].expand(-1, WIDTH)
    h = run_layers(model, h)
    # The next token, which reads the latents from a cache.
    run_layers(model, torch.zeros(B, 1, WIDTH, dtype=torch.float64))

    said = []
    for b, prompt in enumerate(prompts):
        picture, carried = (bool(sees(masks, b, [L - 1], columns[b])) for columns in (pictures, places))
        said.append(answer(model, fmt, prompt, h[b, places[b]], picture, carried))
    return said


def answer(model, fmt, prompt, states, picture, latents):
    """One answer. states [K,D] of the latents after the last layer; picture, latents: whether the
    last row sees them.
    """
    question = model.tokenizer.decode(prompt[0])
    latents = latents and len(states) > 0
    carried = "nothing"
    if latents:
        codes = states - STEP * len(model.layers) - APART * torch.arange(len(states))[:, None]
        carried = (
            named(float(codes.mean()))
            if float(codes.max() - codes.min()) < 1e-6 and codes.min() > -1e5
            else "static"
        )
    if "see" in question:
        return carried
    if "look" in question:
        return named(model.code(prompt[1])) if picture else "nothing"
    if "both" in question:
        return carried if picture else "nothing"
    return "white." if latents else "pale"


QUESTIONS = [  # question, family, answer; the first two words of the answers to `guess` are the model's alone
    ("see one", "a", "black"),
    ("see one", "a", "white"),
    ("look two, and this question is longer", "a", "dark"),
    ("look two, and this question is longer", "a", "light"),
    ("look two, and this question is longer", "a", "light"),
    ("guess three", "b", "grey"),
    ("both four", "b", "White."),
    ("see five", "c", "grey"),
]
PICTURES = ["black", "white", "dark", "light", "light", "grey", "white", "grey"]


def write_records(folder):
    """The eight questions as JSONL with their pictures, whose pictures are of three sizes -> path."""
    lines = []
    for i, ((question, family, said), level) in enumerate(zip(QUESTIONS, PICTURES)):
        size = [(56, 56), (84, 56), (56, 112)][i % 3]
        Image.new("RGB", size, (LEVELS[level],) * 3).save(folder / f"{i}.png")
        talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": said}]
        lines.append(
            json.dumps({"id": f"q{i}", "image": f"{i}.png", "conversations": talk, "family": family})
        )
    (folder / "hand.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "hand.jsonl"
