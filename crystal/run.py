"""A run in Python: ask it, make its batches, look at its losses, its attention and its latents.

    run = crystal.open("runs/crystal")
    run.answer("photo.jpg", "What is left of the cup?")
    batch = run.batch([{"image": picture, "conversations": [...]}])
    run.forward(batch).terms["kl"]

B pairs, L sequence length, D hidden size, H heads, M queries, K keys or latents.
Everything is computed as training and evaluation compute it, by the same functions; nothing is stored.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from crystal import methods
from crystal.attention import AttentionRecorder, attn_slice
from crystal.evaluation.interventions import recorded
from crystal.generate import ask
from crystal.latent_copy import dual_forward
from crystal.opening import exported_settings, find, open_model
from crystal.runtime import checkpoint, config, data


@dataclass
class Forward:
    """What a method makes of a batch.

    terms: {name: scalar}, monitored ones too. h_int, h_cor: last states [B,L,D] of both paths. h_cor is
    None where the method has one path. Nobody may read a copied position of it: there each way of
    copying leaves something else.
    """

    terms: dict
    h_int: torch.Tensor
    h_cor: torch.Tensor | None


@dataclass
class Attention:
    """Softmax weights of one record: A_int and A_cor {layer: [H,M,K]}.

    The queries [M] and keys [K] are positions in the sequence. A_cor is None where the method has one path.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    A_int: dict
    A_cor: dict | None


class Run:
    """A model to ask and to look into.

    name: a run directory, an export, "tiny", "tiny-crystal", a model's directory or a hub name.
    checkpoint: of a run, "best", "last" or a step. device: "auto", "cpu" or "cuda". min_pixels,
    max_pixels: bounds on an image's area. method, trust_method: which file may be run if the run's method
    is a file of its own, see methods.of_run. UserError, in one line, if it cannot be opened.

    model: backbone.model.Model. format: layout.Format. settings, method: the run's, those that an export's
    crystal.json names, plain fine-tuning's for what is neither.
    """

    def __init__(
        self,
        name="tiny",
        checkpoint="best",
        device="auto",
        min_pixels=None,
        max_pixels=None,
        method="",
        trust_method=False,
    ):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = name
        self.checkpoint = checkpoint
        self.model, self.format, settings = open_model(
            name,
            checkpoint,
            device,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            method=method,
            trust_method=trust_method,
        )

        self.is_run = settings is not None
        told = settings or exported_settings(name)
        self.settings: Any = told or config.Settings(method="sft")
        self.method = methods.get(self.settings.method)(self.settings)

    def answer(self, image, question, max_new_tokens=64, latents="keep"):
        """The answer to a question, greedily.

        image: a path, a PIL image, bytes of a file, a list of these, or None. latents: "keep" the thought and
        its latents in the prompt, or "drop" them. A `<image>` typed in the question is text.
        """
        return ask(self.model, self.format, images_of(image), question, max_new_tokens, latents)

    def records(self, given, image_root=None):
        """Records as a user has them -> list of data.Record.

        given: a path to a JSON or JSONL file, a dictionary in any format that such a file may have, or a
        list of these; a dictionary's images may also be PIL images or bytes. RecordError, in one line,
        for a broken one.
        """
        if isinstance(given, dict):
            given = [given]
        if isinstance(given, list):
            return data.of_dictionaries(given, image_root)

        found, _ = data.read(given, image_root or "", self.settings.turns)
        for record in found:
            if isinstance(record, data.RecordError):
                raise record
        return found

    def batch(self, records, image_root=None, seed=None):
        """Records, as `records` takes them -> the batch that training sees, on the model's device.

        data.Batch says what is in it. seed: of the corruption; None takes the run's.
        """
        records = self.records(records, image_root)
        examples = data.RecordDataset(
            records,
            lambda record, n: self.method.layout(self.format, record, n),
            self.model.image_processor,
            self.method.corruption,
            self.settings.seed if seed is None else seed,
            copies=self.format.copies,
            extras=self.method.extras,
        )

        built = [examples.build(i, 0) | {"bad": []} for i in range(len(records))]
        batch = data.collate(built, self.model.tokenizer.pad_token_id)
        return data.to_device(batch, self.model.device, self.model.hf.dtype)

    @cached_property
    def heads(self):
        """The heads that the method trained beside the model, as a ModuleDict; often empty.

        LaViT's semantics and VaLR's projections are such heads.
        """
        heads = self.method.modules(self.model).to(self.model.device)
        named = [(f"heads.{name}", p) for name, p in heads.named_parameters() if p.requires_grad]
        if self.is_run and named:
            directory = find(self.name, self.checkpoint)
            files, _ = checkpoint.load(directory)
            saved = files["trainable.safetensors"]
            own = {n: t for n, t in saved.items() if n.startswith("heads.")}
            checkpoint.load_parameters(named, own, directory)
        return heads.eval()

    def forward(self, batch):
        """Both paths of a batch and every term of its loss, with the graph -> Forward.

        The terms are those at the end of the run's curriculum.
        """
        # The method's losses reach its heads by themselves, once they have been made.
        assert self.heads is not None
        terms = self.method.losses(self.model, batch, self.settings.progress(self.settings.max_steps))
        h_int, h_cor = self.paths(batch)
        return Forward(terms, h_int, h_cor)

    def paths(self, batch, recorder=None):
        """The last states of both paths, without a loss -> (h_int, h_cor), [B,L,D] each.

        h_cor is None where the method has one path.
        """
        if self.method.corruption is None:
            return self.method.hidden(self.model, batch, recorder), None
        return dual_forward(self.model, batch, self.method.copied(batch), self.settings.latent_copy, recorder)

    @torch.no_grad()
    def attention(self, record, queries=None, keys=None, layers=None):
        """Where one record's answer looks, in both paths -> Attention.

        record: as `records` takes it. queries: positions; None: those that predict the answer. keys:
        positions; None: the latents, or the image where there are none. layers: those to read; None: all.
        """
        batch = self.batch(record)
        device = batch["input_ids"].device

        if queries is None:
            queries = batch["answer_positions"]
        else:
            queries = torch.as_tensor([list(queries)], device=device)
        if keys is None:
            keys = batch["latents"] if batch["latents"].shape[1] else batch["image"]
        else:
            keys = torch.as_tensor([list(keys)], device=device)
        layers = range(len(self.model.layers)) if layers is None else layers

        copies = 1 if self.method.corruption is None else 2
        recorder = AttentionRecorder(layers, queries.repeat(copies, 1), keys.repeat(copies, 1), attn_slice)
        self.paths(batch, recorder)

        A_int = {layer: A[0] for layer, A in recorder.slices.items()}
        A_cor = {layer: A[1] for layer, A in recorder.slices.items()} if copies == 2 else None
        return Attention(queries[0], keys[0], A_int, A_cor)

    @torch.no_grad()
    def latents(self, record):
        """The states of one record's latents on the intact image -> [layers + 1,K,D].

        They are those before each decoder layer and after the last.
        """
        batch = self.batch(record)
        where = batch["latents"]
        with recorded(self.model, where) as states:
            last = self.method.hidden(self.model, batch)

        before = torch.stack(states[-len(self.model.layers) :])[:, 0]  # [layers,K,D]
        after = last[0, where[0]][None]  # [1,K,D]
        return torch.cat([before, after])


def images_of(given):
    """What a user gives as image -> a list of images."""
    if given is None:
        return []
    return given if isinstance(given, list) else [given]
