"""The card of an export, README.md in merged/ and adapter/: what it is, how it was made, what is known of it.

Everything in it comes from the run: its settings, its best validation, the evaluations that were made of the
very checkpoint that is exported. What nobody measured is said to be unmeasured, with the command that would.
"""

import json
import shlex
from dataclasses import fields
from pathlib import Path

from crystal.opening import content_of, find
from crystal.run_directory import logged_lines
from crystal.runtime import checkpoint

# What a run needs to be made again from other directories, or by other hands: no part of what it learned.
INCIDENTAL = {"output", "resume", "overwrite", "log_every", "workers", "device", "tensorboard"}

KINDS = {
    "merged": "the whole model, an ordinary directory of its family",
    "adapter": "a PEFT adapter: what was trained, without its base",
}
# evaluation/carrying.py has the numbers.
NATS = {
    "gain": "the intact picture's latents, given to the corrupted one, are worth",
    "swap": "another record's latents cost",
}
PAPERS = {
    "crystal": "CrystaL: latents that are shared by an intact and a corrupted path",
    "released": "CrystaL as its authors' code trains it",
    "livr": "LIVR: latents learned behind a mask that hides the image",
    "lavit": "LaViT: latents that follow a teacher's gaze and semantics",
    "valr": "VaLR: latents fed back before each step, aligned to vision encoders",
    "sft": "plain fine-tuning, without latents",
}


def write(out, run, which, settings, fmt, kind):
    """Writes README.md into the directory `out` of an export; kind: "merged" or "adapter"."""
    step = int(find(run, which).name.removeprefix("step-"))
    head = {"pipeline_tag": "image-text-to-text", "tags": ["crystal", "visual-latent-reasoning"]}
    head["library_name"] = "transformers" if kind == "merged" else "peft"
    if settings.model == "tiny":
        head["license"] = "mit"
    elif not Path(settings.model).exists():  # a hub's name; a path of this machine is none
        head["base_model"] = settings.model

    method = settings.method if settings.method in PAPERS else Path(settings.method).name
    front = [f"{name}: {json.dumps(value)}" for name, value in head.items()]
    name, base = Path(settings.output or run).name, Path(settings.model).name
    parts = ["\n".join(["---", *front, "---"])]
    parts.append(f"# {cell(name)}: {cell(method)} on {cell(base)}")
    parts.append(f"This directory is {KINDS[kind]}.")
    parts.append(about(run, settings, fmt, step))
    parts += ["## Measured", *measured(run, which, step)]
    parts += ["## Do its latents carry the answer?", carries(run, which, settings, fmt)]
    parts += ["## How to load it", *loading(settings, fmt, kind)]
    parts += ["## Licence", licence(settings)]
    (out / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def about(run, settings, fmt, step):
    """Base, method, settings and data as a table, and the command that trains the like."""
    file = Path(run) / "config.json"
    made = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    given = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.name in INCIDENTAL or f.name == "method" or value == f.default:
            continue
        flag = f"--{f.name}" if value is not False else f"--no-{f.name}"
        given.append(flag if isinstance(value, bool) else f"{flag} {shlex.quote(str(value))}")
    command = " ".join(["python -m crystal.train --method", shlex.quote(settings.method), *given])

    data = [stage.data or settings.data or "the generated toy scenes" for stage in settings.stages]
    if settings.method in PAPERS:
        method = PAPERS[settings.method]
    else:
        method = f"a method of its own, {Path(settings.method).name}"
    tuned = f"adapters of rank {settings.lora_r}" if settings.tune == "lora" else settings.tune
    pairs = settings.batch_size * settings.accumulation * made.get("world", 1)
    files = [f"`{cell(name)}`" for name in dict.fromkeys(data)]
    versions = [f"{name} {cell(value)}" for name, value in made.get("versions", {}).items()]
    rows = {"base": f"`{cell(settings.model)}`", "method": cell(method), "latents": places(fmt)}
    rows["trained"] = f"{tuned}; {step} updates of {pairs} pairs"
    rows["data"] = ", ".join(files)
    rows["seed"] = settings.seed
    rows["made with"] = ", ".join(versions)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n| --- | --- |\n{table}\n\n```bash\n{command}\n```"


def places(fmt):
    """Where a format's latents stand, in words."""
    if not fmt.count:
        return "none"
    if fmt.feeds_back:
        return f"{fmt.count} before each step, states that the model feeds back to itself"
    if fmt.writes_own_latents:
        return f"{fmt.count}, which the model writes itself after its thought"
    return f"{fmt.count} in the prompt, put there by the chat template"


def measured(run, which, step):
    """What is known of the exported checkpoint, a paragraph each, with the commands."""
    found = []
    best = checkpoint.best(run)
    if best and best["step"] == step:
        found.append(f"`{best['metric']}` {best['value']:.4f} at update {step}, at its best validation.")

    # An evaluation says of which checkpoint it is, by a digest of its content.
    this = content_of(run, which)
    for file in sorted((Path(run) / "evaluation").glob("*.json")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            if said["settings"]["model_sha256"] == this:
                found.append(evaluation(said))
        except (ValueError, KeyError, TypeError, AttributeError):
            found.append(f"`evaluation/{cell(file.name)}` could not be read.")

    for said in reliances(run, which):
        command = asking(said, "--reliance", f"--limit {said['questions']}")
        lines = [f"| {c['condition']} | {100 * c['right']:.1f} |" for c in said["conditions"]]
        table = "\n".join(["| condition | right, % |", "| --- | --- |", *lines])
        title = f"{said['questions']} questions under interventions:"
        found.append(f"{title}\n\n```bash\n{command}\n```\n\n{table}")
    return found or ["Nothing was measured of this checkpoint."]


def evaluation(said):
    """A stored evaluation as its command and a table of shares with intervals."""
    asked = said["settings"]
    more = [f"--latents {asked['latents']}"] if asked["latents"] not in ("keep", "none") else []
    if asked["corruption"]:
        more.append(f"--corruption {shlex.quote(asked['corruption'])}")
    more += [f"--{name}" for name in ("grey", "bottleneck") if asked[name]]
    if asked["limit"]:
        more.append(f"--limit {asked['limit']}")

    # Accuracies by family, or a benchmark's scores.
    lines = ["| | questions | right, % | 95 % interval |", "| --- | --- | --- | --- |"]
    scores = said.get("families") or said.get("scores") or {}
    for name, score in scores.items():
        value = score["right"] if "right" in score else score["score"]
        ends = score["interval"]
        interval = f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else ""
        lines.append(f"| {cell(name)} | {score['rows']} | {100 * value:.1f} | {interval} |")
    return f"```bash\n{asking(asked, *more)}\n```\n\n" + "\n".join(lines)


def asking(said, *more):
    """The command of an evaluation, from what it says of itself."""
    flags = ["--model", said["model"], "--checkpoint", said["checkpoint"], "--data", said["data"]]
    command = shlex.join(["python", "-m", "crystal.evaluate", *map(str, flags)])
    return " ".join([command, *more])


def reliances(run, which):
    """What --reliance found of this checkpoint: of no other, and none that is older than it."""
    manifest = find(run, which) / checkpoint.MANIFEST
    found = []
    for file in sorted((Path(run) / "reliance").glob("*/reliance.json")):
        if file.stat().st_mtime < manifest.stat().st_mtime:
            continue
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        whole = {"checkpoint", "model", "data", "conditions", "questions", "verdict"} <= said.keys()
        if whole and find(run, said["checkpoint"]) == find(run, which):
            found.append(said)
    return found


def carries(run, which, settings, fmt):
    """Whether the latents were shown to carry the answer, by what, or the command that would show it."""
    if not fmt.count:
        return "It has none."
    command = f"python -m crystal.evaluate --model {shlex.quote(str(run))} --data DATA"
    if fmt.feeds_back or fmt.writes_own_latents:
        return f"Not measured. `{command}` with and without `--latents drop` would tell."
    command += " --reliance"
    verdicts = [said["verdict"] for said in reliances(run, which)]
    if verdicts:
        return "\n\n".join(verdicts)

    # Failing that, what the last validation up to this checkpoint told.
    step = int(find(run, which).name.removeprefix("step-"))
    log = Path(run) / "metrics.jsonl"
    lines = logged_lines(log) if log.exists() else []
    lines = [line for line in lines if "val_swap" in line and line["step"] <= step]
    if lines:
        said = " ".join(in_nats(lines[-1]))
        return f"{said} In answers it was not measured; `{command}` would."
    return f"Not measured. `{command}` would tell."


def in_nats(line):
    """A validation's line of metrics.jsonl -> sentences: what its latents were worth to the answer."""
    told = []
    for name, what in NATS.items():
        if f"val_{name}" in line:
            value, half = line[f"val_{name}"], line[f"val_{name}_pm"]
            shown = "they carry something" if value > half else "that they carry anything is not shown by it"
            numbers = f"{value:.3f} ±{half:.3f} nats of the answer"
            told.append(f"At update {line['step']} {what} {numbers}: {shown}.")
    return told


def loading(settings, fmt, kind):
    """How each tool loads the directory DIR, three lines each."""
    asks = "python -m crystal.generate --model DIR --image photo.jpg --question QUESTION"
    found = [f"crystal (`import crystal; crystal.open(DIR)` in Python):\n\n```bash\n{asks}\n```"]
    rule = ""
    if fmt.feeds_back:
        found.append(
            "Its latents are states that it feeds back to itself, which crystal alone computes. The tools "
            "below answer without them, as long as nothing lets the model write `<latent>`."
        )
        rule = ', bad_words=["<latent>"]'

    if kind == "adapter":
        base = cell(settings.model) if settings.model != "tiny" else "crystal/assets/tiny"
        block = (
            f'base = AutoModelForImageTextToText.from_pretrained("{base}")\n'
            'model = PeftModel.from_pretrained(base, "DIR")\n'
            'tokenizer = AutoTokenizer.from_pretrained("DIR")  # its chat template holds the latents'
        )
        found.append(f"peft:\n\n```python\n{block}\n```")
        if fmt.feeds_back:
            found.append(f"There give `generate` the rule `suppress_tokens=[{fmt.latent_start_id}]`.")
        found.append("vLLM takes no adapter that trains rows of the vocabulary: give it `merged/`.")
        return found

    block = (
        'model, processor = AutoModelForImageTextToText.from_pretrained("DIR"), '
        'AutoProcessor.from_pretrained("DIR")\n'
        "inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, "
        'return_dict=True, return_tensors="pt")\n'
        "answer = processor.batch_decode(model.generate(**inputs, max_new_tokens=64)"
        '[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)'
    )
    found.append(f"transformers (`AutoProcessor` needs torchvision):\n\n```python\n{block}\n```")
    found.append(
        f'vLLM:\n\n```python\nllm = LLM("DIR")\n'
        f"rules = SamplingParams(temperature=0, max_tokens=64{rule})\nanswer = llm.chat(messages, rules)\n```"
    )
    if not fmt.feeds_back:
        found.append(
            "lmms-eval takes it as the model of its family that it is (`--model_args pretrained=DIR`), "
            "VLMEvalKit through `python -m crystal.serve --model DIR`. Tools that write prompts of their own "
            "(LLaMA-Factory, ms-swift by default), and TRL's trainer, drop the latents."
        )
    return found


def licence(settings):
    """Under what it may be used: what comes from the base keeps the base's."""
    if settings.model == "tiny":
        return "MIT, as crystal and the base that it ships."
    return f"That of its base, `{cell(settings.model)}`, whose weights it changes; see there."


def cell(text):
    """Text of a user as one line that no table or code span of Markdown breaks at."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return shown.replace("|", "¦").replace("`", "'")
