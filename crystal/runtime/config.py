"""Settings shared by all methods: one dataclass, its command line and stages.

A field's help is its metadata; its default is the paper's. A method's own settings are a subclass
in the method's own file, with fields and defaults of its own: a fork is one file. `--method` is
looked at first, then its class makes the command line, so `--help` lists what the method knows, and
another method's flag fails.
"""
import argparse
import errno
import os
import re
import select
import signal
import sys
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

from safetensors import SafetensorError

from crystal.corrupt import BUILT_IN, Corruption


class UserError(Exception):
    """A mistake of the user's, told in one clear line; entry points print it and exit with code 2."""


def setting(default, help, choices=None):
    """A field of Settings: its default, its line of --help, and what it may be."""
    return field(default=default, metadata={"help": help, "choices": choices})


def changed(kind, name, default):
    """A field of the settings class `kind` with another default, for a subclass; help and choices stay."""
    (original,) = [f for f in fields(kind) if f.name == name]
    return setting(default, original.metadata["help"], original.metadata["choices"])


@dataclass(frozen=True)
class Stage:
    """A part of a run with a warm-up and decay of its own.

    share: of max_steps. data: records to train on, empty for --data.
    """
    name: str
    share: float
    lr: float
    data: str = ""


@dataclass(frozen=True)
class Progress:
    """Where an update stands in the run.

    step: how many updates came before it. stage: from 0. in_stage, in_run: what fraction of each is behind
    it. Validation and evaluation see the end of the run: the last stage, both fractions 1.
    """
    step: int
    stage: int
    of_stage: float
    of_run: float


@dataclass(frozen=True)
class Settings:
    """What every method has; a method's own class adds fields, and may change defaults."""

    # Fewest latents: a method that can do without has 0.
    least_latents = 1

    # {name: corrupt.Mode}: what --corruption may name, here and in evaluate; a method's file may add its own.
    corruptions = BUILT_IN

    # What to train on what
    method: str = setting(
        "crystal",
        "sft, crystal, released, livr, lavit, valr, or the path of a file of your own that "
        "defines Method",
    )
    model: str = setting(
        "tiny",
        "tiny (shipped), a directory in Hugging Face layout, or a hub name",
    )
    init_from: str = setting(
        "", "a run whose trained weights this one begins with, such as a first stage with other settings"
    )
    data: str = setting(
        "", "training records: JSON, JSONL, Parquet, a set on the hub; empty: toy scenes, generated once"
    )
    val_data: str = setting(
        "",
        "validation records; empty: the toy scenes' own, or none with --data",
    )
    image_root: str = setting(
        "",
        "folder that image paths start from; empty: the folder of the data file",
    )
    output: str = setting("", "run directory; empty: runs/METHOD, with --blind runs/METHOD-blind")
    seed: int = setting(0, "fixes data order, corruption, initial adapters and dropout")

    # The sequence
    latents: int = setting(8, "K, latent tokens")
    latent_kind: str = setting(
        "diverse",
        "K tokens of their own, or one token K times",
        ("diverse", "identical"),
    )
    turns: str = setting(
        "first",
        "train on the first turn with an image, or make one record per turn",
        ("first", "all"),
    )

    blind: bool = setting(
        False,
        "replace every picture by a grey one of its size: what the questions alone give away",
    )

    # What trains
    tune: str = setting(
        "lora",
        "low-rank adapters, every weight of the language model, or nothing but the new tokens' "
        "rows",
        ("lora", "full", "tokens"),
    )
    lora_r: int = setting(16, "rank of the adapters")
    lora_alpha: float = setting(32.0, "scale alpha; an adapter counts alpha / r")
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    lora_on: str = setting(
        "language",
        "comma-separated parts that get adapters: language, vision, merger",
    )

    # The optimiser (appendix A.1; the rest as released)
    max_steps: int = setting(4000, "optimiser updates")
    batch_size: int = setting(1, "pairs per process and forward")
    accumulation: int = setting(1, "forwards per update")
    lr: float = setting(2e-4, "peak learning rate")
    lr_tokens: float = setting(
        1.0,
        "learning rate of the new tokens' rows, in multiples of --lr; small models with large "
        "embeddings need more",
    )
    weight_decay: float = setting(0.1, "AdamW decay; never on the vocabulary's rows")
    warmup: float = setting(0.05, "share of a stage's steps that warms up linearly")
    decay: str = setting("cosine", "way from the peak to 0 after the warm-up", ("cosine", "linear"))
    clip: float = setting(1.0, "largest norm of the gradient")

    # How it runs
    device: str = setting("auto", "auto, cpu or cuda")
    dtype: str = setting(
        "auto",
        "of the frozen weights; auto: bfloat16 on a GPU, float32 elsewhere",
        ("auto", "float32", "bfloat16", "float64"),
    )
    checkpointing: bool = setting(
        False,
        "recompute activations in the backward pass (non-reentrant)",
    )
    compile: bool = setting(
        False,
        "torch.compile for the decoder layers: less memory, but slower where launches take the time",
    )
    shard: str = setting(
        "none",
        "of several processes each has the whole model, or its part of every layer (FSDP2)",
        ("none", "full"),
    )
    workers: int = setting(0, "processes that prepare batches")
    min_pixels: int = setting(
        None,
        "images are scaled up to at least this area; default: the model's own",
    )
    max_pixels: int = setting(
        None,
        "images are scaled down to at most this area; default: the model's own",
    )
    on_bad_record: str = setting(
        "stop",
        "stop at a broken record, or skip, count and list it (above 1 % stop)",
        ("stop", "skip"),
    )

    # What it writes
    eval_every: int = setting(250, "validate every so many steps, and at the end; 0: never")
    eval_records: int = setting(256, "validation records used")
    save_every: int = setting(500, "checkpoint every so many steps, and at the end")
    keep: int = setting(2, "checkpoints kept, beside the best")
    log_every: int = setting(10, "steps between two printed lines where there is no terminal")
    resume: bool | str = setting(
        False,
        "go on from the newest checkpoint in --output that verifies; auto: and start where there is none",
    )
    overwrite: bool = setting(False, "start anew where --output holds a run already; it is deleted")
    tensorboard: bool = setting(False, "write TensorBoard events too")

    def __post_init__(self):
        """Checks what argparse cannot; raises UserError naming the flag."""
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in choices:
                raise UserError(f"--{f.name} {value}: choose one of {', '.join(choices)}")
            if value != value:  # NaN, which every check below lets pass
                raise UserError(f"--{f.name} nan: a number is needed")

        if self.latents < self.least_latents:
            raise UserError(f"--latents {self.latents}: must be at least {self.least_latents}")

        for name in ("max_steps", "batch_size", "accumulation", "lora_r", "keep", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("eval_every", "eval_records", "workers", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")

        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: a whole number, at least 0 and below 2^63")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: a share, at least 0 and below 1")
        if not 0 <= self.warmup < 1:
            raise UserError(f"--warmup {self.warmup}: a share of the steps, at least 0 and below 1")
        if min(self.lr, self.lr_tokens, self.clip) <= 0:
            raise UserError("--lr, --lr_tokens and --clip must be positive")

        parts = self.lora_on.split(",")
        if not parts or set(parts) - {"language", "vision", "merger"}:
            raise UserError(f"--lora_on {self.lora_on}: comma-separated language, vision, merger")

    @property
    def run_dir(self):
        name = Path(self.method).stem + ("-blind" if self.blind else "")
        return Path(self.output or f"runs/{name}")

    @property
    def weights(self):
        """Weight of each loss term by its name (eq. 6).

        A method with more terms adds theirs; a term without a weight is an error.
        """
        return {"ce": 1.0}

    @property
    def stages(self):
        """The run's stages in order; their shares sum to 1."""
        return [Stage("", 1.0, self.lr)]

    def span(self, stage):
        """First update of stage number `stage` (from 0), and the first after it."""
        shares = [s.share for s in self.stages]
        return tuple(round(sum(shares[:i]) * self.max_steps) for i in (stage, stage + 1))

    def progress(self, step):
        """Progress of update `step` (from 0); step = max_steps is the end of the run."""
        last = len(self.stages) - 1
        stage = next((i for i in range(last) if step < self.span(i)[1]), last)

        start, stop = self.span(stage)
        of_stage = (step - start) / (stop - start) if stop > start else 1.0
        return Progress(step, stage, of_stage, step / self.max_steps)


def corruption_of(text, modes=BUILT_IN):
    """--corruption -> corrupt.Corruption. UserError if it is none."""
    try:
        return Corruption(text, modes)
    except ValueError as error:
        raise UserError(f"--corruption {error}") from None


def layers_of(text, count):
    """--attn_layers and its like -> indices in a model of `count` decoder layers.

    last, all, or 12,18,24; negative ones count from the end.
    """
    if text in ("last", "all"):
        return {count - 1} if text == "last" else set(range(count))

    try:
        chosen = {int(i) for i in text.split(",")}
    except ValueError:
        raise UserError(f"--attn_layers {text}: last, all, or indices as in 12,18,24") from None
    if bad := [i for i in chosen if not -count <= i < count]:
        raise UserError(f"--attn_layers {bad[0]}: the model has {count} layers")
    return {i % count for i in chosen}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag raises UserError: one line, no usage text."""

    hint = "--help lists every flag"

    def error(self, message):
        raise UserError(f"{message} ({self.hint})")


def parse(argv=None, settings_of=lambda method: Settings):
    """argv (list of str, or None for sys.argv) -> Settings of the method that it names.

    What is not given has the method's default. settings_of: a method's name or file -> its Settings class.
    Entry points use methods.parse, which knows them all.
    """
    look = OneLineParser(add_help=False, allow_abbrev=False)
    look.add_argument("--method", default=Settings.method)
    method = look.parse_known_args(argv)[0].method
    kind = settings_of(method)

    parser = OneLineParser(
        prog="train.py",
        description="Train a visual latent reasoning method; --method x --help lists the settings of x.",
        epilog="--plan says what the run would need, and runs nothing; --plan --help lists what it takes: "
        "--gpus, --gpu, --memory, --tflop_s, --image, --length. --calibrate measures what corruptions leave "
        "of a picture, and trains nothing else; --calibrate --help: --candidates, --updates.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.hint = f"--method {method} --help lists every flag"

    types = typing.get_type_hints(kind)
    for f in fields(kind):
        extra = {"type": types[f.name], "choices": f.metadata["choices"]}
        if types[f.name] is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        if f.name == "resume":  # a switch that may also say when
            extra = {"nargs": "?", "const": True, "choices": ("auto",)}
        default = method if f.name == "method" else f.default
        text = f.metadata["help"].replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=default, help=text, **extra)
    parser.add_argument(
        "--no-resume", dest="resume", action="store_false", default=argparse.SUPPRESS, help="takes it back"
    )
    return kind(**vars(parser.parse_args(argv)))


# What a user can cause and mend: no space, no permission, a wrong place or name. Others are faults of ours.
USERS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


def run_cli(main):
    """Runs an entry point: a user's mistake is one line on stderr and exit code 2, Ctrl-C one and 130.

    Where whoever reads what is printed has gone (`| head -1`), it ends without a word, and with 141 as in
    a shell.
    """
    try:
        try:
            main()
        except SystemExit:  # as --help and --version end
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        leave(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, SafetensorError) as error:
        said = str(error) if isinstance(error, UserError) else from_the_system(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        leave(2)


def nobody_reads():
    """Whether standard output is a pipe whose other end is closed; other broken pipes are faults of ours."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))


def leave(code):
    """Ends this process; one of several that torchrun started ends without taking the interpreter apart.

    A process group that nobody closed may abort meanwhile, and the exit code would be that of the abort.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def from_the_system(error):
    """An error of reading or writing as one line that names the file, None if no user can have caused it.

    safetensors writes its files itself, and tells the system's error by its number in its text.
    """
    if isinstance(error, OSError) and error.errno is None and error.__cause__ is not None:
        # What was being done is said already, and the system's own error is behind it.
        return str(error) if from_the_system(error.__cause__) else None
    if isinstance(error, OSError):
        number, where = error.errno, error.filename
    else:
        told = re.search(r"os error (\d+)", str(error))
        number, where = int(told[1]) if told else None, None
    if number not in USERS:
        return None
    return f"{where if where is not None else 'a file'}: {os.strerror(number)}"
