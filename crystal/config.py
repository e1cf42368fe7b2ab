"""Every setting of crystal: one dataclass, its command line, and the two presets.

A field's help is its metadata; its default is the `paper` preset. `--preset released` changes the fields in which the
authors' released code differs from their paper, and a flag given by hand wins over either. Unknown flags fail.
"""
import argparse
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

# The authors' released code (github yangzhangok/crystal, bc08a90) where it differs from the paper.
PRESETS = {
    "paper": {},
    "released": dict(copied="thought", ce="pooled", kl_share=0.1, answer_rows="span", attn_heads="mean",
                     attn_columns="thought", lora_on="language,vision,merger", lora_dropout=0.01),
}


class UserError(Exception):
    """A mistake of the user's, told in one clear line; entry points print it and exit with code 2."""


def setting(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    # what to train on what
    method: str = setting("crystal", "sft, crystal, or the path of a file of your own that defines Method")
    preset: str = setting("paper", "whose choices to follow where paper and released code differ", tuple(PRESETS))
    model: str = setting("tiny", "tiny (shipped), a directory in Hugging Face layout, or a hub name")
    data: str = setting("", "training records, JSON or JSONL; empty: toy scenes, generated once")
    val_data: str = setting("", "validation records; empty: the toy scenes' own, or none with --data")
    image_root: str = setting("", "folder that image paths start from; empty: the folder of the data file")
    output: str = setting("", "run directory; empty: runs/METHOD")
    seed: int = setting(0, "fixes data order, corruption, initial adapters and dropout")
    # the sequence (section 3.1; table 3)
    latents: int = setting(8, "K, latent tokens in the thought")
    latent_kind: str = setting("diverse", "K tokens of their own, or one token K times", ("diverse", "identical"))
    thought: str = setting("fixed", "words before the latents: one fixed phrase, or the record's cot", ("fixed", "cot"))
    labels: str = setting("all", "labels of CE: all that the assistant says, or the answer alone (the thought stands in the prompt anyway)", ("all", "answer"))
    turns: str = setting("first", "train on the first turn with an image, or make one record per turn", ("first", "all"))
    # the corruption (eq. 3; table 5)
    corruption: str = setting("blur", "mode S", ("blur", "mask", "crop", "jigsaw", "color", "noise", "impulse"))
    strength_low: float = setting(None, "lower end of the uniform strength eta; default: the mode's own range")
    strength_high: float = setting(None, "upper end of the uniform strength eta; default: the mode's own range")
    # the dual path (section 3.3)
    realisation: str = setting("kv", "how latents are shared: rows of hidden states, or of keys and values", ("hidden", "kv"))
    copied: str = setting("latents", "rows that the corrupted path takes from the intact one", ("latents", "thought"))
    # the losses (eq. 4 to 6; table 4)
    ce: str = setting("per_path", "a token mean per path and their sum, or one mean over both paths' tokens", ("per_path", "pooled"))
    kl_share: float = setting(1.0, "KL is the mean over this share of a pair's answer rows, the largest ones")
    answer_rows: str = setting("predicting", "rows of KL and attention: those that predict the answer, or its own positions", ("predicting", "span"))
    attn_loss: str = setting("kl", "kind of eq. 5", ("kl", "frobenius", "mse"))
    attn_heads: str = setting("keep", "compare heads one by one, or their mean", ("keep", "mean"))
    attn_columns: str = setting("latents", "columns of eq. 5; all: image and latents", ("latents", "thought", "all"))
    attn_layers: str = setting("last", "last, all, or indices as in 12,18,24")
    teacher_grad: bool = setting(False, "let KL and attention loss move the intact path too")
    w_ce_int: float = setting(1.0, "weight of CE_int (and of the pooled CE)")
    w_ce_cor: float = setting(1.0, "weight of CE_cor")
    w_kl: float = setting(1.0, "weight of L_kl")
    w_attn: float = setting(1.0, "weight of L_attn")
    # what trains
    tune: str = setting("lora", "low-rank adapters, or every weight of the language model", ("lora", "full"))
    lora_r: int = setting(16, "rank of the adapters")
    lora_alpha: float = setting(32.0, "scale alpha; an adapter counts alpha / r")
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    lora_on: str = setting("language", "comma-separated parts that get adapters: language, vision, merger")
    # the optimiser (appendix A.1; the rest as released)
    max_steps: int = setting(4000, "optimiser updates")
    batch_size: int = setting(1, "pairs per process and forward")
    accumulation: int = setting(1, "forwards per update")
    lr: float = setting(2e-4, "peak learning rate")
    lr_rows: float = setting(1.0, "learning rate of the new tokens' rows, in multiples of --lr; small models with large embeddings need more")
    weight_decay: float = setting(0.1, "AdamW decay; never on the vocabulary's rows")
    warmup: float = setting(0.05, "share of the steps that warms up linearly; a cosine to 0 follows")
    clip: float = setting(1.0, "largest norm of the gradient")
    # how it runs
    device: str = setting("auto", "auto, cpu or cuda")
    dtype: str = setting("auto", "of the frozen weights; auto: bfloat16 on a GPU, float32 elsewhere", ("auto", "float32", "bfloat16", "float64"))
    checkpointing: bool = setting(False, "recompute activations in the backward pass (non-reentrant)")
    workers: int = setting(0, "processes that prepare batches")
    min_pixels: int = setting(None, "images are scaled up to at least this area; default: the model's own")
    max_pixels: int = setting(None, "images are scaled down to at most this area; default: the model's own")
    on_bad_record: str = setting("stop", "stop at a broken record, or skip, count and list it (above 1 % stop)", ("stop", "skip"))
    # what it writes
    eval_every: int = setting(250, "validate every so many steps, and at the end; 0: never")
    eval_records: int = setting(256, "validation records used")
    save_every: int = setting(500, "checkpoint every so many steps, and at the end")
    keep: int = setting(2, "checkpoints kept, beside the best")
    log_every: int = setting(10, "steps between two printed lines where there is no terminal")
    resume: bool = setting(False, "go on from the newest checkpoint in --output that verifies")
    overwrite: bool = setting(False, "start anew where --output holds a run already; it is deleted")
    tensorboard: bool = setting(False, "write TensorBoard events too")

    def __post_init__(self):
        """Checks what argparse cannot; raises UserError naming the flag."""
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in choices:
                raise UserError(f"--{f.name} {value}: choose one of {', '.join(choices)}")
        for name in ("latents", "max_steps", "batch_size", "accumulation", "lora_r", "keep", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("eval_every", "eval_records", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        if not 0 < self.kl_share <= 1:
            raise UserError(f"--kl_share {self.kl_share}: must be above 0 and at most 1")
        if not 0 <= self.warmup < 1:
            raise UserError(f"--warmup {self.warmup}: a share of the steps, at least 0 and below 1")
        if min(self.lr, self.lr_rows, self.clip) <= 0:
            raise UserError("--lr, --lr_rows and --clip must be positive")
        if (self.strength_low is None) != (self.strength_high is None):
            raise UserError("--strength_low and --strength_high go together")
        if self.strength_low is not None and not 0 <= self.strength_low <= self.strength_high:
            raise UserError(f"--strength_low {self.strength_low} --strength_high {self.strength_high}: need 0 <= low <= high")
        if self.attn_heads == "mean" and self.attn_loss != "kl":
            raise UserError(f"--attn_heads mean goes with --attn_loss kl, not {self.attn_loss}")
        parts = self.lora_on.split(",")
        if not parts or set(parts) - {"language", "vision", "merger"}:
            raise UserError(f"--lora_on {self.lora_on}: comma-separated language, vision, merger")
        if self.attn_layers not in ("last", "all"):
            try:
                [int(i) for i in self.attn_layers.split(",")]
            except ValueError:
                raise UserError(f"--attn_layers {self.attn_layers}: last, all, or indices as in 12,18,24") from None

    @property
    def run_dir(self):
        return Path(self.output or f"runs/{Path(self.method).stem}")

    @property
    def weights(self):
        """Weight of each loss term by its name (eq. 6; 1 each in paper and released code)."""
        return {"ce": self.w_ce_int, "ce_int": self.w_ce_int, "ce_cor": self.w_ce_cor, "kl": self.w_kl, "attn": self.w_attn}

    def layers(self, count):
        """Indices of the layers of eq. 5 in a model of `count` decoder layers; negative indices count from the end."""
        if self.attn_layers in ("last", "all"):
            return {count - 1} if self.attn_layers == "last" else set(range(count))
        chosen = {int(i) for i in self.attn_layers.split(",")}
        if bad := [i for i in chosen if not -count <= i < count]:
            raise UserError(f"--attn_layers {bad[0]}: the model has {count} layers")
        return {i % count for i in chosen}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists every flag)")


def parse(argv=None):
    """argv (list of str, or None for sys.argv) -> Settings. Defaults, then the preset, then what was given by hand."""
    parser = OneLineParser(prog="train.py", description="Train a visual latent reasoning method.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    for f in fields(Settings):
        kind = {int: int, float: float, bool: None, str: str}[f.type]
        extra = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": kind, "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"].replace("%", "%%"), **extra)
    # A second look without defaults tells what was given by hand, which a preset must not overwrite.
    given = vars(parser.parse_args(argv, argparse.Namespace(**{f.name: _ABSENT for f in fields(Settings)})))
    given = {name: value for name, value in given.items() if value is not _ABSENT}
    return Settings(**{**PRESETS[given.get("preset", "paper")], **given})


_ABSENT = object()


def run_cli(main):
    """Runs an entry point: a user's mistake is one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
