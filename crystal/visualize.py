"""Pictures of a run: what the corruption does, how the losses went, where the answer looks in both paths.

    python -m crystal.visualize --run runs/crystal --data runs/toy/test.jsonl --out runs/crystal/pictures
    python -m crystal.visualize --run runs/crystal --data runs/toy/test.jsonl --html runs/crystal/page.html

What they show, and how they are drawn, is evaluation/figures.py's. --html writes one page instead, which
needs no server and no network: evaluation/inside.py measures for it, and evaluation/page.py writes it.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from crystal import methods
from crystal.evaluation import inside, page
from crystal.evaluation.figures import attention_maps, corruption_grid, loss_curves, read_metrics
from crystal.opening import find, method_flags, open_model
from crystal.runtime import config, data, distributed
from crystal.runtime.config import UserError, layers_of


def spread(records, count):
    """The first `count` records, taking families in turn; records without an image are left out."""
    families = {}
    for r in records:
        if r.images:
            families.setdefault(r.family, []).append(r)
    turns = [
        r
        for rank in range(max(map(len, families.values()), default=0))
        for f in families.values()
        for r in f[rank : rank + 1]
    ]
    return turns[:count]


def read_whole(data_path, image_root):
    """Records, the first broken one of which is raised."""
    records, _ = data.read(data_path, image_root)
    if broken := data.broken(records):
        raise broken[0]
    return records


def pictures(
    run_dir,
    data_path,
    out_dir,
    count=4,
    which="best",
    image_root="",
    attn_layers="all",
    device="cpu",
    method="",
    trust_method=False,
):
    """All pictures of a run -> [paths]: corruptions.png, losses.png, attention.png in out_dir.

    data_path: records, of which `count` spread over families are asked. which: the checkpoint, as in
    opening.open_model. attn_layers: all, last, or indices as in 12,18,24. device: what the model runs on.
    method, trust_method: see methods.of_run. UserError: not a run, no metrics, broken or imageless records.
    """
    if count < 1:
        raise UserError(f"--count {count}: must be at least 1")
    out = Path(out_dir)
    # First: it needs no model, and tells a run from what is none.
    paths = [loss_curves(run_dir, out / "losses.png")]
    chosen = spread(read_whole(data_path, image_root), count)
    if not chosen:
        raise UserError(f"{data_path}: no record with an image")
    paths.append(
        corruption_grid(data.load_image(chosen[0].images[0], chosen[0].where), out / "corruptions.png")
    )
    model, fmt, settings = open_model(run_dir, which, device, method=method, trust_method=trust_method)
    layers = layers_of(attn_layers, len(model.layers))
    paths.append(attention_maps(model, fmt, settings, chosen, out / "attention.png", layers))
    return paths


def write_page(
    run_dir,
    data_path,
    file,
    count=4,
    asked=100,
    which="best",
    image_root="",
    attn_layers="all",
    device="cpu",
    method="",
    trust_method=False,
):
    """A run's page of `count` samples and `asked` questions -> Path of the file.

    data_path: records; empty: those that the run was validated or trained on. attn_layers: whose maps are
    kept. The rest as for `pictures`. The table of interventions is the run's own where it has one of this
    checkpoint, else that of these questions. UserError: not a run, no metrics, broken records, none to ask.
    """
    if count < 1 or asked < count:
        raise UserError(f"--count {count}, --questions {asked}: at least 1, and as many questions as drawn")
    # First: it needs no model, and tells a run from what is none.
    metrics = read_metrics(run_dir)

    model, fmt, settings = open_model(run_dir, which, device, method=method, trust_method=trust_method)
    step = find(run_dir, which).name
    if not data_path:
        data_path = settings.val_data or settings.data
        image_root = image_root or settings.image_root
    if not data_path:
        raise UserError(f"{run_dir}: was trained on scenes made for it; --data names the records to ask")
    records = read_whole(data_path, image_root)
    chosen = spread([record for record in records if record.answer], asked)
    if not chosen:
        raise UserError(f"{data_path}: no record with an image and an answer")

    layers = layers_of(attn_layers, len(model.layers))
    kind = methods.get(settings.method)(settings)
    found = inside.measure(model, fmt, kind, settings, chosen, count, layers, progress=True)
    table, source = inside.evaluated(run_dir, step)
    if not table:
        table = found.reliance
        source += f"Asked for this page: {len(chosen)} questions of {data_path}."

    about = {"name": run_dir, "method": Path(settings.method).stem, "checkpoint": step, "data": data_path}
    about = {name: str(value) for name, value in about.items()}
    text = page.build(about, found, metrics, (table, source))
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def main(argv=None):
    parser = config.OneLineParser(
        prog="visualize.py", description="Pictures of a run: corruptions, losses, the answer's attention."
    )
    parser.add_argument("--run", required=True, help="run directory of train.py")
    method_flags(parser)
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument(
        "--data",
        default="",
        help="records to ask, as for training; with --html empty: what the run was validated or trained on",
    )
    parser.add_argument(
        "--image_root", default="", help="folder that image paths start from; empty: the folder of the data"
    )
    parser.add_argument(
        "--out", default="", help="folder for the pictures; empty: pictures/ in the run directory"
    )
    parser.add_argument("--count", type=int, default=4, help="questions drawn, spread over families")
    parser.add_argument(
        "--html",
        default="",
        help="write this file instead of the pictures: a page that needs neither server nor network",
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=100,
        help="with --html: questions that are answered and looked at, --count of them drawn",
    )
    parser.add_argument(
        "--attn_layers",
        default="all",
        help="layers whose attention is averaged, or kept for a page: all, last, or indices as in 12,18,24",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    check(args, parser)
    how = {
        "which": args.checkpoint,
        "image_root": args.image_root,
        "attn_layers": args.attn_layers,
        "device": distributed.start(args.device).device,
        "method": args.method,
        "trust_method": args.trust_method,
    }
    if args.html:
        file = write_page(args.run, args.data, args.html, args.count, args.questions, **how)
        print(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB")
        return
    out = args.out or Path(args.run) / "pictures"
    for path in pictures(args.run, args.data, out, args.count, **how):
        print(path)


def check(args, parser):
    """UserError for flags that mean nothing together."""
    if args.html and args.out:
        raise UserError("--out changes nothing with --html; leave it out")
    if not args.html and args.questions != parser.get_default("questions"):
        raise UserError("--questions changes nothing without --html; leave it out")
    if not args.html and not args.data:
        raise UserError("--data names the records that are drawn; only with --html it may be left out")


if __name__ == "__main__":
    config.run_cli(main)
