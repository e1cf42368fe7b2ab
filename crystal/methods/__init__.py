"""A method composes the concepts; one file each, a screen or two. The diff between two files is the lesson.

`--method name` takes a built-in one, `--method path/to/mine.py` a user's own: a class `Method(settings)`,
which inherits from sft's (or another's) what it does not change:
    Settings          config.Settings, or a subclass in the method's file: settings of its
                      own, defaults, weights, stages
    corruption        how its second image is made: function (image [3,H,W] in [0,1], generator) -> the same
                      shape; None without one. A corrupt.Corruption reads `--corruption`; Settings.corruptions
                      are the modes that it may name
    tokens            the new special tokens that it adds to the vocabulary
    format(tokenizer) -> layout.Format, which makes the prompt to generate from, and the export's template
    layout(fmt, record, image_tokens, stage) -> layout.Layout; stage -1 is the last one, validation's
    extras(record, images) -> {name: tensor [n,..]}, put into the batch as [B,n,..], padded with zeros
    modules(model)    -> nn.ModuleDict of extra trainable heads (may be empty)
    for_workers()     -> {attribute: value}, what layout and extras read of what `modules` has found out
    hidden(model, batch, recorder, biases) -> the last states without losses, for evaluation's looks inside
    biases(model, batch) -> [attention_bias.AttentionBias], the mask of `evaluate --bottleneck`
    losses(model, batch, progress) -> {name: scalar}, each the mean over the batch's pairs; a config.Progress
    monitored         names among them that are logged and not trained
    repeats           whether `losses` runs the decoder more than once, as fed-back latents do (--shard full)
    metric            the name of the loss, or "loss" for their sum, whose least value at a validation
                      makes the best checkpoint
"""
import hashlib
import importlib
import importlib.util
import pickle
import sys
from dataclasses import fields, replace
from importlib.abc import SourceLoader
from pathlib import Path

from crystal.backbone.model import prepare
from crystal.runtime import config, renamed
from crystal.runtime.config import UserError

OPENERS = ("<answer>", "<latent>", "<|latent_0|>")  # what only a method can have put into a template
COPY = "method.py"  # in a run directory: the file of a method that is not built in, as it was when it ran
_sources = {}       # path of such a file -> its bytes as they were run


def get(name):
    """A method's name or file -> its class. UserError if there is none."""
    if name.endswith(".py"):
        module = of_file(name)
    else:
        known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
        if name not in known:
            raise UserError(f"--method {name}: known are {', '.join(known)}, or give the path of a .py file")
        module = importlib.import_module(f"crystal.methods.{name}")

    if not hasattr(module, "Method"):
        raise UserError(f"--method {name}: defines no class Method")
    if not issubclass(module.Method, importlib.import_module("crystal.methods.sft").Method):
        raise UserError(
            f"--method {name}: its class Method must inherit from crystal.methods.sft's, or another method's"
        )
    return module.Method


def of_file(name):
    """A method's file -> its module, run once, so that its classes are the same for all who ask."""
    if not Path(name).is_file():
        raise UserError(f"--method {name}: no such file")
    key = str(Path(name).resolve())
    if key in sys.modules:
        return sys.modules[key]

    try:
        return run_source(key, Path(name).read_bytes())
    except SyntaxError as error:
        raise UserError(f"--method {name}: line {error.lineno}: {error.msg}") from None
    except TypeError as error:
        if "non-frozen dataclass" not in str(error):
            raise
        raise UserError(
            f"--method {name}: settings do not change once they are made; write @dataclass(frozen=True)"
        ) from None


def run_source(key, source):
    """The path of a method's file and the bytes in it -> the module that they make, known by the path."""
    spec = importlib.util.spec_from_file_location(key, key)
    assert spec is not None and isinstance(spec.loader, SourceLoader)  # of a .py file
    module = sys.modules[key] = importlib.util.module_from_spec(spec)
    _sources[key] = source
    try:
        exec(spec.loader.source_to_code(source, key), vars(module))
    except BaseException:
        del sys.modules[key]
        raise
    return module


def parse(argv=None):
    """argv -> Settings of the method that it names.

    A file's path is kept whole, so that its run opens from anywhere.
    """
    renamed.check_flags(sys.argv[1:] if argv is None else argv)
    settings = config.parse(argv, lambda name: get(name).Settings)
    if settings.method.endswith(".py"):
        settings = replace(settings, method=str(Path(settings.method).resolve()))
    return settings


def fingerprint(name):
    """What a run says of the file that made it -> {"method_sha256": digest}; {} of a built-in method."""
    if not name.endswith(".py"):
        return {}
    get(name)
    # Of what was run: the file may have been edited since, or be gone with an older run directory.
    return {"method_sha256": hashlib.sha256(_sources[str(Path(name).resolve())]).hexdigest()}


def same_method(state, name):
    """Whether a method's name or file is what a checkpoint was made by: a file may have moved."""
    saved, digest = state["settings"]["method"], state.get("method_sha256")
    moved = digest is not None and fingerprint(name).get("method_sha256") == digest
    return saved == name or moved


def keep_copy(name, run):
    """Puts the file of a method that is not built in into the run directory, as it was run."""
    if name.endswith(".py"):
        get(name)
        (Path(run) / COPY).write_bytes(_sources[str(Path(name).resolve())])


def of_run(state, directory, method="", trust=False):
    """A checkpoint's state and directory -> the method to open it by: a name, or a file that may be run.

    A run directory may come from anywhere, so the file that it names is never run for that alone. `method`
    (--method FILE) is a file of the user's choice; one that differs from the run's is told on stderr and
    used. `trust` (--trust_method) takes the run's own copy, if it is still the one that the checkpoint was
    made by. UserError in every other case.
    """
    saved, digest = state["settings"]["method"], state.get("method_sha256")
    if not isinstance(saved, str):
        raise UserError(f"{directory}: its state names no method")

    # A file may stand for the run's file, and a name only for itself.
    own = saved.endswith(".py")
    fits = method.endswith(".py") if own else method == saved
    if method and not fits:
        raise UserError(f"{directory}: was made with --method {saved!r}, not {method!r}")
    if not own:
        return saved

    copy = Path(directory).parent.parent / COPY
    if method and trust:
        raise UserError("--method and --trust_method are two answers to one question; give one of them")
    if method:
        file = Path(method)
    elif trust:
        file = copy
    else:
        raise UserError(
            f"{directory}: made by {saved}, a method of its own, and no file is run because a run names it; "
            f"--method FILE runs a file of yours, --trust_method the run's copy {copy}"
        )
    if not file.is_file():
        raise UserError(f"{file}: no such file; --method FILE names the one that the run was made by")

    if digest and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        if not method:
            raise UserError(
                f"{file}: not the file that {directory} was made by (SHA-256 differs); "
                "read it, and if it is right name it by --method"
            )
        print(
            f"note: {file} is not the file that {directory} was made by (SHA-256 differs); "
            "it is used all the same",
            file=sys.stderr,
        )
    elif not digest and not method:
        raise UserError(f"{directory}: says no SHA-256 of its method; --method FILE runs a file of yours")
    return str(file.resolve())


def saved_settings(saved, where):
    """A run's settings as they were saved (dict) -> Settings of its method.

    A setting that came after the run has its default, which is said on stderr. UserError naming `where`
    for one that the method does not know.
    """
    kind = get(saved["method"]).Settings
    known = {f.name: f.default for f in fields(kind)}
    if unknown := sorted(saved.keys() - known.keys()):
        raise UserError(
            f"{where}: saved by another version of {saved['method']}: it knows no setting "
            f"{', '.join(unknown)}"
        )

    if since := [name for name in known if name not in saved]:
        filled = ", ".join(f"{name} {known[name]!r}" for name in since)
        print(f"note: {where} was saved before there were these settings: {filled}", file=sys.stderr)
    try:
        return kind(**saved)
    except TypeError as error:
        raise UserError(f"{where}: its settings are not what was saved: {error}") from None


def attach(model, settings):
    """Makes a loaded model trainable by the settings' method -> (Method, Format of its sequences).

    An export is trained by its base's chat template, since its own writes its method's latents already.
    UserError for a template that writes what the method would write once more.
    """
    method = get(settings.method)(settings)
    if model.base_template is not None:
        model.tokenizer.chat_template = model.base_template
    check_template(model, method.tokens)
    prepare(model, settings, method.tokens)
    return method, method.format(model.tokenizer)


def check_template(model, tokens):
    """UserError if a chat template opens an answer with tags or latents, which would then stand twice.

    tokens: those that the method adds. No method can be told from a template, so every method's are refused.
    """
    asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    prompt = model.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    twice = [token for token in dict.fromkeys([*tokens, *OPENERS]) if token in prompt]
    if twice:
        raise UserError(
            f"{model.name}: its chat template writes {twice[0]} before an answer, which would stand there "
            "twice; take the base that it was made from, export that run anew, or give its "
            "chat_template.jinja a bare generation prompt"
        )


# --- in a loader's workers ---

class Recipe:
    """What a method makes of a record, in the process that trains and in the workers of its loader.

    A worker that is no fork of it gets objects pickled, which classes and lambdas of a user's file cannot be.
    So this pickles as the method's settings, and a worker makes the method anew from them.
    """

    def __init__(self, method, fmt, stage=-1):
        self.method = method
        self.fmt = fmt
        self.stage = stage

    def layout(self, record, image_tokens):
        """The method's layout of a record, in this stage."""
        return self.method.layout(self.fmt, record, image_tokens, self.stage)

    def __call__(self):
        """What a data.RecordDataset has of a method -> {its attribute: value}."""
        return {"layout": self.layout, "corruption": self.method.corruption, "extras": self.method.extras}

    def __reduce__(self):
        settings = self.method.settings
        name = settings.method
        source = _sources.get(name)  # as it was run: the file may have been edited since
        values = {f.name: getattr(settings, f.name) for f in fields(settings)}
        own = self.method.for_workers()
        for attribute, value in own.items():
            try:
                pickle.dumps(value)
            except Exception as error:  # whatever an object of the user's own raises
                raise UserError(
                    f"--workers: self.{attribute} of the method {name} cannot be given to another process "
                    f"({error}): leave it out of for_workers, or prepare batches in this one (--workers 0)"
                ) from None
        return remade, (source, values, own, self.fmt.tokenizer, self.stage)


def remade(source, values, own, tokenizer, stage):
    """What a Recipe was pickled as -> the Recipe, its method made anew."""
    name = values["method"]
    if source is not None and name not in sys.modules:
        run_source(name, source)
    kind = get(name)
    method = kind(kind.Settings(**values))
    vars(method).update(own)
    return Recipe(method, method.format(tokenizer), stage)
