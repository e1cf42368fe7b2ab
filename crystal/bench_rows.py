"""The rows of `bench step`: what one update is of, by crystal and by what else computes the same loss.

    sft, and as its peer plain fine-tuning by transformers and PEFT on the same record
    crystal with each way of sharing latents, and as their peer the two passes that transformers alone lets
    one write: attention returns all its weights [B,H,L,L], and the head reads every position

Nothing is downloaded: the weights are random numbers of the published shapes (widths.py), the tokens the
shipped tiny model's. B pairs, L sequence length, H heads, M answer positions, K latents, V vocabulary.
"""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from crystal import methods, planning, train
from crystal.backbone.widths import SIDE, build
from crystal.evaluation.interventions import recorded, replaced
from crystal.layout import IGNORE
from crystal.methods.crystal import position_mask
from crystal.runtime import data
from crystal.runtime.config import UserError


class Row(NamedTuple):
    """What a row runs: its method's flags, the batch, whether in plain PyTorch, by what, and beside what.

    by: crystal, or what else computes the same loss: peft, or two_passes. peer: the row that does.
    """

    flags: tuple
    batch: int = 1
    reference: bool = False
    by: str = "crystal"
    peer: str = ""


CRYSTAL = ("--method", "crystal", "--corruption", "blur=3")
ROWS = {
    "peft": Row(("--method", "sft"), by="peft"),
    "sft": Row(("--method", "sft"), peer="peft"),
    "two_passes": Row(CRYSTAL, by="two_passes"),
    "kv": Row(CRYSTAL, peer="two_passes"),
    "hidden": Row((*CRYSTAL, "--latent_copy", "hidden"), peer="two_passes"),
    "packed": Row((*CRYSTAL, "--latent_copy", "packed"), peer="two_passes"),
    "all_layers": Row((*CRYSTAL, "--attn_layers", "all")),
    "frobenius": Row((*CRYSTAL, "--attn_layers", "all", "--attn_loss", "frobenius")),
    "plain": Row(CRYSTAL, reference=True),
    "released": Row(("--method", "released", "--corruption", "blur=3")),
    "checkpointing": Row((*CRYSTAL, "--checkpointing")),
    "sft_compile": Row(("--method", "sft", "--compile"), peer="peft"),
    "kv_compile": Row((*CRYSTAL, "--compile"), peer="two_passes"),
    "sft_x4": Row(("--method", "sft"), batch=4),
    "kv_x4": Row(CRYSTAL, batch=4),
}


# --- an update ---


class Update:
    """One update of a row, as often as it is called: it returns the loss.

    model: model.Model. batch: of data.py. forward: batch -> loss. named: (name, parameter) of what trains.
    optimizer, and `after`, what follows it. work: a plan.Run, from which the least operations are known.
    paths: sequences of a pair.
    """

    def __init__(self, row, length, sizes, device, dtype):
        """sizes: the model's name, its decoder's layers and its tower's, as widths.build takes them."""
        torch.manual_seed(0)
        name, layers, vision_layers = sizes
        self.model = model = build(name, layers, vision_layers, device, dtype)
        self.settings = settings = methods.parse([*row.flags, "--lora_dropout", "0"])
        if row.by == "peft":
            self.method = method = methods.get("sft")(settings)
            fmt = method.format(model.tokenizer)
            self.forward, self.named, self.after = by_peft(model, settings)
        else:
            self.method, fmt = method, _ = methods.attach(model, settings)
            way = by_two_passes if row.by == "two_passes" else by_crystal
            self.forward, self.named, self.after = way(model, method, settings, device)
        self.optimizer = train.optimizer_of(self.named, model, settings)

        # The same record B times.
        example = example_of(model, method, fmt, length)
        batch = data.collate([example] * row.batch, model.tokenizer.pad_token_id)
        self.batch = data.to_device(batch, device, dtype)
        self.paths = 2 if method.corruption else 1
        patches = len(example["pixel_values"])
        work = planning.of_model(model, method, settings, example["layout"], patches, nn.ModuleDict())
        self.work = replace(work, batch=row.batch)

    def __call__(self):
        loss = self.loss()
        loss.backward()
        self.update()
        return float(loss.detach())

    def loss(self):
        return self.forward(self.batch)

    def update(self):
        nn.utils.clip_grad_norm_([p for _, p in self.named], self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after()


def example_of(model, method, fmt, length):
    """The example of one record that makes about `length` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        records, _ = data.read(write_record(Path(folder), length))
        examples = data.RecordDataset(
            records, lambda r, n: method.layout(fmt, r, n), model.image_processor, method.corruption,
            copies=fmt.copies,
        )  # fmt: skip
        example = examples[0, 0]
    if "error" in example:
        raise UserError(example["error"])
    return example


def by_crystal(model, method, settings, device):
    """train.py's objective -> (batch -> loss, the parameters that train, what follows an update)."""
    objective = train.Objective(model, method).to(device).train()

    def forward(batch):
        return train.weighted(objective(batch, settings.progress(0)), method, settings)

    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    return forward, named, model.after_update


def by_peft(model, settings):
    """The same adapters by PEFT on transformers' own forward, attention and loss."""
    from peft import LoraConfig, get_peft_model

    hf = model.hf
    hf.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    parts = "|".join(f"(?:{getattr(model.family, part)})" for part in settings.lora_on.split(","))
    linears = [name for name, module in hf.named_modules() if isinstance(module, nn.Linear)]
    adapted = [name for name in linears if re.fullmatch(parts, name)]
    lora = LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules=adapted)
    peft = get_peft_model(hf, lora).train()

    def forward(batch):
        # transformers' labels stand at their own token, crystal's at the one that predicts it.
        labels = batch["targets"].roll(1, 1)
        labels[:, 0] = IGNORE
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
        return peft(**{name: batch[name] for name in names}, labels=labels, use_cache=False).loss

    return forward, [(name, p) for name, p in peft.named_parameters() if p.requires_grad], lambda: None


def by_two_passes(model, method, settings, device):
    """Eq. 6 with one pass a path, eager attention that returns its weights, and logits of every position.

    The copy is hooks that take the latents' states before each layer from the pass before.
    """
    hf = model.hf.train()
    hf.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    names = ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")

    def run(batch, pixels):
        inputs = {name: batch[name] for name in names} | {"pixel_values": batch[pixels]}
        return hf(**inputs, output_attentions=True, use_cache=False)

    def forward(batch):
        latents, answer = batch["latents"], batch["answer_positions"]
        with recorded(model, latents) as states:
            intact = run(batch, "pixel_values")
        with replaced(model, latents, states):
            corrupted = run(batch, "pixel_values_cor")

        # CE of either path; no label that a copied position predicts counts for the corrupted one.
        labels = batch["targets"]
        copied = position_mask(latents, labels.shape[1])
        ce = token_means(intact.logits, labels)
        ce = ce + token_means(corrupted.logits, labels.masked_fill(copied, IGNORE))

        # Eq. 4 and 5, of every pair in turn; the intact path teaches.
        others = []
        for b, rows in enumerate(answer):
            rows = rows[rows >= 0]
            p, q = (out.logits[b, rows].float().log_softmax(-1) for out in (intact, corrupted))
            others.append(F.kl_div(q, p.detach(), reduction="none", log_target=True).sum(-1).mean())
            p, q = (seen(out.attentions[-1][b], rows, latents[b]) for out in (intact, corrupted))
            others.append(F.kl_div(q.log(), p.detach(), reduction="none").sum(-1).mean())
        return ce + torch.stack(others).sum() / len(answer)

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return forward, named, model.after_update


def seen(weights, rows, columns):
    """Attention's weights [H,L,L] of rows on columns, renormalised over these -> [H,M,K]."""
    chosen = weights[:, rows][..., columns].float()
    return chosen / chosen.sum(-1, keepdim=True)


def token_means(logits, labels):
    """Cross-entropy of logits [B,L,V], a token mean per pair, averaged over the pairs."""
    pairs = [F.cross_entropy(z.float(), y, ignore_index=IGNORE) for z, y in zip(logits, labels)]
    return torch.stack(pairs).mean()


def write_record(folder, length):
    """One record, a picture of noise and a question that make about `length` tokens -> its path."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    question = " ".join(["red"] * max(1, length - 330))
    talk = [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": "red blue green red blue green red blue"},
    ]
    path = folder / "record.json"
    path.write_text(json.dumps([{"id": "0", "image": "noise.png", "conversations": talk}]))
    return path
