"""What a run trains on and is validated on: records read, a set for each stage, batches in their order."""

from contextlib import nullcontext, redirect_stdout

from crystal import methods
from crystal.runtime import data, distributed, sampling
from crystal.runtime.config import UserError


def open_data(settings, method, model, fmt, procs):
    """Settings -> (training RecordDataset of each stage, validation's or None, messages of broken records).

    What was dropped is printed.
    """
    root, val = settings.image_root, settings.val_data
    train = [stage.data or settings.data for stage in settings.stages]
    if not all(train):
        root = toy_scenes(settings, procs)
        train = [path or f"{root}/train.jsonl" for path in train]
        val = val or f"{root}/val.jsonl"

    # Stages may share a file, which is read once.
    sources = [("train", path) for path in dict.fromkeys(train)]
    if val:
        sources.append(("val", val))
    known, problems = {}, []
    for split, path in sources:
        records, broken, dropped = read_records(path, root, settings)
        problems += [str(error) for error in broken]
        if split == "val":
            records = records[: settings.eval_records]
        known[split, path] = records

        said = f"{split}: {len(records)} records of {path}"
        if dropped:
            said += f"; {dropped} later turns left out (--turns all makes records of them)"
        if broken:
            said += f"; {len(broken)} broken ones skipped, see {settings.run_dir}/bad_records.jsonl"
        procs.print(said)

    def examples(split, path, stage):
        recipe = methods.Recipe(method, fmt, stage)
        return data.RecordDataset(
            known[split, path],
            recipe.layout,
            model.image_processor,
            method.corruption,
            seed=settings.seed + (split == "val"),
            skip=settings.on_bad_record == "skip" and split == "train",
            copies=fmt.copies,
            extras=method.extras,
            grey=settings.blind,
            recipe=recipe,
        )

    train_sets = [examples("train", path, i) for i, path in enumerate(train)]
    last_stage = len(train) - 1
    val_set = examples("val", val, last_stage) if val else None
    return train_sets, val_set, problems


def toy_folder(seed):
    """Where the scenes of a seed lie: a run with another seed does not write over them."""
    return f"runs/toy-{seed}" if seed else "runs/toy"


def toy_scenes(settings, procs):
    """Generates the toy scenes, once, by the first process -> their folder."""
    from crystal.runtime import toy

    folder = toy_folder(settings.seed)
    with procs.main_process_first(), nullcontext() if procs.is_first else redirect_stdout(None):
        toy.generate(folder, seed=settings.seed)
    return folder


def read_records(path, root, settings):
    """A file's records -> (whole ones, broken ones' errors, number of turns dropped).

    UserError as --on_bad_record says.
    """
    found, dropped = data.read(path, root, settings.turns)
    broken = data.broken(found)
    if broken and settings.on_bad_record == "stop":
        more = f" (and {len(broken) - 1} more broken records)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0]}{more}; --on_bad_record skip leaves them out")
    if len(broken) > 0.01 * len(found):
        raise UserError(
            f"{path}: {len(broken)} of {len(found)} records are broken, more than 1 %; the first: {broken[0]}"
        )
    return data.whole(found), broken, dropped


def stage_batches(stage, examples, step, settings, pad, procs):
    """This rank's batches of a stage (from 0), from update `step` on; a stage that lies behind has none."""
    start, stop = settings.span(stage)
    order = sampling.BatchSampler(
        len(examples), settings.batch_size, settings.accumulation, procs.rank, procs.world,
        seed=settings.seed, start=max(start, step), stop=stop,
    )
    if step < stop:
        yield from data.loader(examples, order, pad, settings.workers, distributed.ignore_signals)
