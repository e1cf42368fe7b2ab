"""What corruptions leave of a picture's worth: the probe's numbers, the shares, and the level that is named.

Right values: transformers' own forward on the corrupted pixels, shares and choices by hand.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from crystal import calibrate, train
from crystal.calibrate import Probe
from crystal.runtime import checkpoint
from crystal.runtime.config import UserError

GREY, INTACT = Probe("grey", 2.0, 0.4), Probe("intact", 0.5, 0.8)


def test_shares_by_hand():
    """Of 1.5 nats and 40 points a candidate leaves a fifth and a quarter; one beyond grey less than none."""
    some, none = Probe("blur=5", 1.7, 0.5), Probe("mask=1", 2.3, 0.4)
    assert calibrate.share(some, GREY, INTACT, "ce") == pytest.approx(0.2)
    assert calibrate.share(some, GREY, INTACT, "right") == pytest.approx(0.25)
    assert calibrate.share(none, GREY, INTACT, "ce") == pytest.approx(-0.2)
    assert calibrate.share(none, GREY, INTACT, "right") == 0
    assert math.isnan(calibrate.share(some, GREY, GREY, "right"))


def test_the_table_is_typed_out():
    text = calibrate.table([Probe("blur=5", 1.7, 0.5), Probe("blur=8:10", 2.3, 0.4)], GREY, INTACT)
    assert text == (
        "                 CE    right   left, in CE  in right\n"
        "intact       0.5000   80.0 %         100 %     100 %\n"
        "blur=5       1.7000   50.0 %          20 %      25 %\n"
        "blur=8:10    2.3000   40.0 %         -20 %       0 %\n"
        "grey         2.0000   40.0 %           0 %       0 %"
    )


@pytest.mark.parametrize(
    "nats, taken",
    [
        ((0.6, 1.9, 1.7, 1.8), 1),  # leave 93, 7, 20 and 13 %: the least of those within 15
        ((0.6, 0.8, 1.5), 2),  # 93, 80, 33 %: the nearest to nothing
        ((1.0, 2.4), 1),  # 67, -27 %
        ((2.9, 2.2, 2.05), 1),  # -60, -13, -3 %
        ((2.4, 2.1, 0.7), 1),  # -27, -7, 87 %
    ],
)
def test_the_level_to_take_by_hand(nats, taken):
    candidates = [Probe(f"blur={i}", ce, 0.5) for i, ce in enumerate(nats, 1)]
    assert calibrate.choice(candidates, GREY, INTACT) is candidates[taken]


def test_whether_the_model_sees_by_hand():
    """40 against 80 % of 25 answers: the difference's half width is 1.96 * sqrt(0.24 / 25 + 0.16 / 25) = 24.8
    points; 55 against 80 %, of 25 no, of 100 yes.
    """
    assert calibrate.seen(GREY, INTACT, 25)
    close = Probe("grey", 2.0, 0.55)  # 1.96 * sqrt((0.2475 + 0.16) / n): 25.02 of 25, 12.5 of 100
    assert not calibrate.seen(close, INTACT, 25) and calibrate.seen(close, INTACT, 100)
    assert not calibrate.seen(INTACT, GREY, 10**6)
    assert not calibrate.seen(Probe("grey", 0.4, 0.4), INTACT, 10**6)  # better answers at a worse CE


def test_a_probes_numbers_are_transformers_own(setup):
    """Corrupted pixels go in where the intact ones stand; each record's answer and its end are compared."""
    s = setup("--method", calibrate.__file__, "--corruption", "noise=80")
    b = s.batch
    assert not torch.equal(b["pixel_values"], b["pixel_values_cor"])
    with torch.no_grad():
        found = s.objective(b, s.settings.progress(0))
        logits = s.model.hf(
            input_ids=b["input_ids"], pixel_values=b["pixel_values_cor"], image_grid_thw=b["image_grid_thw"],
            mm_token_type_ids=b["mm_token_type_ids"], attention_mask=b["attention_mask"],
        ).logits
    nats = []
    for i in range(3):
        at = b["targets"][i] >= 0
        nats.append(torch.nn.functional.cross_entropy(logits[i, at], b["targets"][i, at]).item())
    assert float(found["ce"]) == pytest.approx(sum(nats) / 3, abs=1e-6) and float(found["right"]) == 0

    # Targets that greedy decoding would give: all of the first record's, all but one of the second's.
    best = logits.argmax(-1)
    for i in range(2):
        at = (b["targets"][i] >= 0).nonzero()[:, 0]
        b["targets"][i, at] = best[i, at]
    b["targets"][1, at[0]] = (best[1, at[0]] + 1) % 500
    with torch.no_grad():
        assert float(s.objective(b, s.settings.progress(0))["right"]) == pytest.approx(1 / 3)


def test_a_probe_without_a_corruption_is_plain_fine_tuning(setup):
    plain, probe = setup("--method", "sft"), setup("--method", calibrate.__file__)
    assert "pixel_values_cor" not in probe.batch or probe.batch["pixel_values_cor"] is None
    with torch.no_grad():
        right, found = (s.objective(s.batch, s.settings.progress(0))["ce"] for s in (plain, probe))
    assert float(found) == pytest.approx(float(right), abs=1e-12)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A stand-in for train.main: numbers of each probe by its pictures, and what it was asked with."""
    calls = []
    numbers = {
        "intact": (0.5, 0.8), "grey": (2.0, 0.4), "blur=2:5": (0.9, 0.7), "blur=8:10": (1.8, 0.5),
        "mask=0.5": (1.9, 0.45),
    }

    def main(flags):
        settings = calibrate.parse(flags)
        calls.append(settings)
        name = settings.corruption or ("grey" if settings.blind else "intact")
        (settings.run_dir / "checkpoints").mkdir(parents=True)
        ce, right = numbers[name]
        end = {"step": settings.max_steps}
        lines = [end | {"ce": 9.0}, end | {"val_ce": ce, "val_right": right}]
        (settings.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(main=main, calls=calls, numbers=numbers)


def asked(records_file, *flags):
    return ["--data", str(records_file), "--val_data", str(records_file), "--device", "cpu", *flags]


def test_the_command_probes_each_level_with_the_runs_flags(trained, records_file, capsys, monkeypatch):
    """Intact and grey first, then the candidates, then the run's own, each once; all else is the run's."""
    monkeypatch.setattr(calibrate, "seen", lambda grey, intact, count: count == 3)
    flags = [
        "--lr", "3e-3", "--lora_r", "5", "--batch_size", "2", "--labels", "answer", "--w_kl", "2",
        "--seed", "4", "--corruption", "blur", "--output", "runs/mine", "--lora_on", "language,vision",
        "--checkpointing", "--resume", "--max_steps", "900", "--min_pixels", "12544",
    ]
    more = ["--candidates", "blur=8:10  mask=0.5 blur=2:5", "--updates", "7"]
    out = calibrate.main(asked(records_file, *flags, *more), trained.main)

    pictures = [(s.corruption, s.blind) for s in trained.calls]
    assert pictures[:2] == [("", False), ("", True)]
    assert pictures[2:] == [("blur=8:10", False), ("mask=0.5", False), ("blur=2:5", False)]
    for s in trained.calls:
        assert (s.lr, s.lora_r, s.batch_size, s.seed, s.lora_on) == (3e-3, 5, 2, 4, "language,vision")
        assert (s.max_steps, s.eval_every, s.checkpointing) == (7, 7, True)
        assert (s.min_pixels, s.device) == (12544, "cpu")
        assert s.data == s.val_data == str(records_file) and s.overwrite and not s.resume
        assert s.run_dir.parent == out and not (s.run_dir / "checkpoints").exists()
    assert out.as_posix() == "runs/mine-calibration"

    said = capsys.readouterr().out
    # Of 1.5 nats 13, 7 and 73 % are left.
    assert "take --corruption mask=0.5: it leaves 7 % of what a picture is worth in CE" in said
    note = json.loads((out / "calibration.json").read_text())
    assert note["take"] == "mask=0.5" and [probe["name"] for probe in note["probes"]] == [
        "intact", "grey", "blur=8:10", "mask=0.5", "blur=2:5",
    ]
    assert note["probes"][3] == {"name": "mask=0.5", "ce": 1.9, "right": 0.45}
    assert Image.open(out / "calibration.png").width > 600


def test_without_worth_no_level_is_named(trained, records_file, capsys):
    """Three records: 40 against 80 % may be chance."""
    out = calibrate.main(asked(records_file, "--candidates", "mask=0.5"), trained.main)
    said = capsys.readouterr().out
    assert "no level can be named" in said and "--lora_on language,vision,merger" in said
    assert json.loads((out / "calibration.json").read_text())["take"] is None
    assert not (out / "calibration.png").exists()
    assert trained.calls[-1].corruption == "blur=2:5"  # the default of the method


def test_a_probe_that_stops_is_told(trained, records_file, monkeypatch):
    def short(flags):
        trained.main([*flags, "--max_steps", "3"])

    with pytest.raises(UserError, match="intact: stopped before its end"):
        calibrate.main(asked(records_file), short)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--candidates", "blur=x"], "--candidates blur=x: a strength is a number"),
        (["--candidates", "blur smear"], "--candidates .*smear"),
        (["--candidates", " "], "--candidates: names no corruption"),
        (["--updates", "0"], "--updates 0: must be at least 1"),
        (["--data", "x.jsonl"], "--data needs --val_data"),
        (["--eval_records", "0"], "--eval_records 0"),
        (["--tune", "tokens"], "--tune tokens leaves nothing to train"),
        (["--candidate", "blur"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(flags, words):
    with pytest.raises(UserError, match=words):
        train.main(["--calibrate", *flags])


def test_a_methods_own_mode_is_left_out_and_told(trained, records_file, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom crystal import corrupt\n"
        "from crystal.methods import crystal\n"
        "@dataclass(frozen=True)\nclass Settings(crystal.Settings):\n"
        "    corruptions = corrupt.BUILT_IN | {'veil': corrupt.BUILT_IN['blur']}\n"
        "class Method(crystal.Method):\n    Settings = Settings\n"
    )
    flags = ["--method", str(tmp_path / "mine.py"), "--corruption", "veil=3", "--candidates", "mask=0.5"]
    calibrate.main(asked(records_file, *flags), trained.main)
    assert "veil=3: a mode of the method's own, which is not measured" in capsys.readouterr().out
    assert [s.corruption for s in trained.calls] == ["", "", "mask=0.5"]


def test_two_updates_from_end_to_end(model_dirs, records_file, tmp_path, capsys):
    """The door of train.py, real probes, and no run that a later training would stumble over."""
    flags = [
        "--model", str(model_dirs[True]), "--output", str(tmp_path / "run"), "--lora_r", "2",
        "--batch_size", "3", "--eval_records", "3", "--candidates", "noise=90", "--updates", "2",
        "--corruption", "mask=0.5",
    ]
    out = train.main(["--calibrate", *asked(records_file, *flags)])
    said = capsys.readouterr().out
    assert "== probe 4 of 4: mask=0.5, 2 updates" in said and "noise=90 " in said
    probes = {probe["name"]: probe for probe in json.loads((out / "calibration.json").read_text())["probes"]}
    for name, probe in probes.items():
        last = json.loads((out / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert (probe["ce"], probe["right"]) == (last["val_ce"], last["val_right"])
    assert len({probe["ce"] for probe in probes.values()}) == 4
    assert not (tmp_path / "run").exists() and checkpoint.newest(out / "intact") is None
