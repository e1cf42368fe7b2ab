"""reliance_check.py and its two method files: what it trains, asks and expects, and
whom the bottleneck blinds.

Right values: command lines and records written out, spans of a sequence found by the names of its tokens, the
cross entropy by log_softmax.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crystal import methods
from crystal.backbone.model import Model
from crystal.methods.crystal import LatentThought
from crystal.runtime import toy
from data_prep.checks import reliance as reliance_check

FILES = Path(reliance_check.__file__).parent


@pytest.mark.parametrize(
    "used, code",
    [
        ({"open": False, "bottleneck": True}, 0),
        ({"open": True, "bottleneck": True}, 1),
        ({"open": False, "bottleneck": False}, 1),
    ],
)
def test_the_flags_choose_runs_and_questions(setup, monkeypatch, tmp_path, capsys, used, code):
    """Two seeds of both kinds; of the scenes one family, the first so many of its test questions; each model
    asked under its own mask.
    """
    monkeypatch.chdir(tmp_path)
    trained, asked, scenes = [], [], toy.generate
    s = setup(dtype=torch.float32)

    def learn(argv):
        trained.append(argv)
        run = Path(argv[argv.index("--output") + 1])
        run.mkdir(parents=True)
        return run

    def measure(model, fmt, records, **how):
        name = Path(trained[-1][1]).stem.removeprefix("reliance_")
        asked.append(
            (
                model,
                fmt,
                [r.id for r in records],
                {r.family for r in records},
                {n: x for n, x in how.items() if n != "biases"},
                how["biases"](s.batch),
            )
        )
        return {"used": used[name]}

    monkeypatch.setattr(toy, "generate", lambda out, seed: scenes(out, seed, 10, 10, 15))
    monkeypatch.setattr(reliance_check.train, "main", learn)
    monkeypatch.setattr(
        reliance_check.opening,
        "open_model",
        lambda run, device, method: (
            s.model,
            s.fmt,
            SimpleNamespace(method=trained[-1][1], latents=3, latent_kind="diverse"),
        ),
    )
    monkeypatch.setattr(reliance_check.reliance, "measure", measure)
    monkeypatch.setattr(reliance_check.reliance, "text", lambda result: f"used: {result['used']}")
    with pytest.raises(SystemExit) as ended:
        reliance_check.main(
            [
                "--methods", "bottleneck,open", "--seeds", "4", "7", "--max_steps", "9", "--family", "depth",
                "--questions", "2", "--output", "to",
            ]
        )
    assert ended.value.code == code

    names = ["bottleneck-4", "open-4", "bottleneck-7", "open-7"]
    fixed = [
        "--batch_size", "16", "--lr", "1e-3", "--lr_tokens", "4", "--labels", "answer", "--eval_every", "40",
        "--eval_records", "96", "--log_every", "40", "--save_every", "1000", "--overwrite",
    ]
    assert trained == [
        [
            "--method",
            str(FILES / f"reliance_{name.split('-')[0]}.py"),
            "--data",
            "to/train.jsonl",
            "--val_data",
            "to/val.jsonl",
            "--image_root",
            "runs/toy",
            "--output",
            f"to/{name}",
            "--seed",
            name[-1],
            "--max_steps",
            "9",
            *fixed,
        ]
        for name in names
    ]
    for split, count in (("train", 2), ("val", 2), ("test", 3)):  # every fifth question is about depth
        lines = [json.loads(line) for line in Path(f"to/{split}.jsonl").read_text().splitlines()]
        assert len(lines) == count and {line["family"] for line in lines} == {"depth"}
    for (model, fmt, ids, families, how, biases), seed, name in zip(asked, (4, 4, 7, 7), names):
        assert (model, fmt, ids, families) == (s.model, s.fmt, ["test-000003", "test-000008"], {"depth"})
        assert how == {"batch_size": 50, "max_new_tokens": 4, "seed": seed}
        assert len(biases) == ("bottleneck" in name)
    said = capsys.readouterr().out
    for name in names:
        kind, seed = name.split("-")
        right = used[kind] == {"open": False, "bottleneck": True}[kind]
        assert (
            f"{kind}, seed {seed}: {'as expected' if right else 'NOT AS EXPECTED'}\nused: {used[kind]}"
            in said
        )
        assert json.loads(Path("to", name, "reliance.json").read_text()) == {"used": used[kind]}


def test_the_open_method_learns_from_cross_entropy_alone(setup):
    """CrystaL's sequence and labels, no second path, no mask: the mean over pairs of the token means."""
    s = setup("--method", str(FILES / "reliance_open.py"), "--labels", "answer")
    assert (
        s.batch["pixel_values_cor"] is None
        and s.method.monitored == ()
        and s.method.biases(s.model, s.batch) == []
    )
    losses = s.method.losses(s.model, s.batch, None)
    assert list(losses) == ["ce"] and losses["ce"].requires_grad
    with torch.no_grad():
        logp, means = s.model.hf.lm_head(s.model.hidden(s.batch)).log_softmax(-1), []
    for row, targets in zip(logp, s.batch["targets"].tolist()):
        terms = [-float(row[t, target]) for t, target in enumerate(targets) if target >= 0]
        means.append(sum(terms) / len(terms))
    assert float(losses["ce"].detach()) == pytest.approx(sum(means) / len(means), rel=1e-9)


@pytest.mark.parametrize("kind", ["diverse", "identical"])
def test_the_bottleneck_leaves_the_answer_the_latents_alone(setup, monkeypatch, kind):
    """From the row that predicts the answer on, nothing between the first image token and that row is seen
    but latents, padded left or right.
    """
    s = setup("--method", str(FILES / "reliance_bottleneck.py"), "--latent_kind", kind)
    told, hidden = [], Model.hidden
    monkeypatch.setattr(
        Model, "hidden", lambda self, batch, **how: told.append(how["biases"]) or hidden(self, batch, **how)
    )
    s.method.losses(s.model, s.batch, None)

    def expected(ids, first_row):
        names = s.model.tokenizer.convert_ids_to_tokens(ids)
        image = names.index("<|image_pad|>")
        rows = [at >= first_row for at in range(len(ids))]
        return rows, [
            image <= at < first_row and not name.startswith("<|latent_") for at, name in enumerate(names)
        ]

    for [bias] in (told[0], s.method.biases(s.model, s.batch)):
        for b, ids in enumerate(s.batch["input_ids"].tolist()):
            rows, keys = expected(ids, int(s.batch["answer_positions"][b, 0]))
            assert bias.queries[b].tolist() == rows and bias.keys[b].tolist() == keys and sum(keys) > 4
        assert bias.value == float("-inf")

    # A prompt to generate from, padded to the left: its last row alone.
    ids = s.batch["input_ids"][:1, : int(s.batch["answer_positions"][0, 0]) + 1]
    left = torch.nn.functional.pad(ids, (3, 0), value=s.model.tokenizer.pad_token_id)
    [bias] = s.method.biases(
        s.model, {"input_ids": left, "answer_positions": torch.tensor([[left.shape[1] - 1]])}
    )
    rows, keys = expected(left[0].tolist(), left.shape[1] - 1)
    assert bias.queries[0].tolist() == rows and sum(rows) == 1 and bias.keys[0].tolist() == keys
    kind = methods.get(str(FILES / "reliance_bottleneck.py"))
    assert issubclass(kind, LatentThought) and s.method.corruption is None
