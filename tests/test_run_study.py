"""Studies are run: which runs a table needs, that each is made once, shared, gone on with after a kill, and
kept apart from those of other settings; the shipped studies and their method files.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crystal import compare, demo, evaluate, opening, run_study, train
from crystal.evaluation import reliance, study
from crystal.runtime import checkpoint, distributed
from crystal.runtime.config import UserError

ROOT = Path(__file__).resolve().parents[1]
FILE = """
title = "A table"
about = "Why."
seeds = 2
max_steps = 7
questions = 2
interventions = 1
corruption = "mask=0.5"
flags = "--lr 1 --lora_r 3"
against = ["plain"]
[[rows]]
name = "base"
method = ""
[[rows]]
name = "plain"
method = "sft"
[[rows]]
name = "longer"
method = "sft"
times = 2
flags = "--lr 2"
[[rows]]
name = "mine"
method = "mine.py"
[[claims]]
paper = "table 1"
says = "mine is better"
more = "mine"
less = "plain"
"""
# One right answer of two by `plain`, two by `longer`, none by the base; by `mine` what the test says.
SCORES = {"some": [0, 0], "sft-7": [1, 0], "sft-14": [1, 1], "mine-7": [0, 1]}


@pytest.fixture
def world(tmp_path, records_file, monkeypatch):
    """A study in a folder, records, and a crystal that trains and asks in no time -> what it was told."""
    trained, asked, tested = [], [], []

    def learn(argv):
        trained.append(argv)
        run = Path(argv[argv.index("--output") + 1])
        updates = argv[argv.index("--max_steps") + 1]
        checkpoint.step_dir(run, updates).mkdir(parents=True)
        metrics = [
            {"step": 1, "val_gain": 0.1, "val_gain_pm": 0.2},
            {"step": 2, "val_gain": 0.3, "val_ce": 1.0},
            {"step": 3},
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))

    def open_model(name, device, method):
        stem = Path(name).name.split("-")[0]
        steps = [path.name.split("-")[1] for path in Path(name).glob("checkpoints/step-*")]
        fmt = SimpleNamespace(count=3 * (stem == "mine"), writes_own_latents=False, feeds_back=False)
        return "-".join([stem, *steps]), fmt, method

    def answers(model, fmt, records, **how):
        asked.append((model, [r.id for r in records], how["max_new_tokens"]))
        return [{"family": r.family, "correct": hit} for r, hit in zip(records, SCORES[model])]

    def measure(model, fmt, records, corruption, **how):
        tested.append((model, [r.id for r in records], str(corruption)))
        conditions = [{"condition": c.name, "right": 0.5} for c in reliance.CONDITIONS]
        return {"conditions": conditions, "attention": {"latents": [0.01, 0.03]}}

    monkeypatch.setattr(train, "main", learn)
    monkeypatch.setattr(opening, "open_model", open_model)
    monkeypatch.setattr(evaluate, "answers", answers)
    monkeypatch.setattr(reliance, "measure", measure)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(FILE)
    (tmp_path / "mine.py").write_text("from crystal.methods.livr import Method\n")
    shutil.copytree(records_file.parent, tmp_path / "d")
    data = ["--model", "some", "--data", "d/train.jsonl", "--test", "d/train.jsonl"]

    def run(*flags, name="mine"):
        compare.main(["--study", f"{name}.toml", *data, "--output", "out", *flags])

    return SimpleNamespace(run=run, trained=trained, asked=asked, tested=tested, folder=tmp_path)


def test_it_trains_and_asks_what_the_study_says(world, capsys):
    """Rows within seeds; the study's flags, the command line's, and the row's, in the order that lets the
    later win; the base asked once.
    """
    world.run("--lora_r", "5", "--seeds", "2")
    own = {"sft": [], "longer": ["--lr", "2"], "mine": []}
    methods = {"sft": "sft", "longer": "sft", "mine": "mine.py"}
    assert [argv[:-3] for argv in world.trained] == [
        [
            "--method", methods[row], "--model", "some", "--max_steps", "14" if row == "longer" else "7",
            "--lr", "1", "--lora_r", "3", "--lora_r", "5", *own[row], "--seed", str(seed),
            "--data", "d/train.jsonl",
        ]
        for seed in (0, 1)
        for row in ("sft", "longer", "mine")
    ]  # fmt: skip
    models = ["some", "sft-7", "sft-14", "mine-7", "sft-7", "sft-14", "mine-7"]
    assert world.asked == [(model, ["0", "1"], 8) for model in models]
    assert world.tested == [("mine-7", ["0"], "mask=0.5")] * 2

    said = json.loads((world.folder / "out" / "mine.json").read_text())
    assert {row: sorted(seeds) for row, seeds in said.items()} == {
        "base": ["0"], "plain": ["0", "1"], "longer": ["0", "1"], "mine": ["0", "1"],
    }  # fmt: skip
    mine = said["mine"]["1"]
    assert mine["right"] == "01" and mine["families"] == {"b": [0, 1], "a": [1, 1], "all": [1, 2]}
    assert (mine["latents"], mine["attention"]) == (3, 2.0) and set(mine["conditions"].values()) == {50.0}
    assert mine["carried"] == {"gain": 0.3, "gain_pm": 0.2} and "conditions" not in said["plain"]["0"]
    page = (world.folder / "out" / "mine.md").read_text()
    assert page.strip() in capsys.readouterr().out and "| mine | 2 of 2 | 50.0 ±0.0 | +0.0 ±0.0 |" in page
    assert "| base | as it is | 0.0 ±0.0 | -50.0 ±0.0 |" in page and str(world.folder) not in page
    data = "--model some --data d/train.jsonl --test d/train.jsonl"
    assert f"\npython -m crystal.compare --study mine --seeds 2 {data} --lora_r 5\n" in page
    assert "7 updates a run from `some`; seeds planned: 2; 2 questions, 1 of them" in page
    assert "7 runs are there" in page


def test_runs_are_made_once_and_shared(world):
    """A second seed adds its own; another study takes what is there; other questions are asked of the same
    runs.
    """
    world.run("--seeds", "1")
    assert len(world.trained) == 3
    world.run("--seeds", "1")
    assert len(world.trained) == 3 and len(world.asked) == 4
    world.run()
    assert len(world.trained) == 6 and {argv[argv.index("--seed") + 1] for argv in world.trained[3:]} == {"1"}
    other = FILE.replace('name = "plain"', 'name = "direct"').replace('"plain"', '"direct"')
    (world.folder / "other.toml").write_text(other)
    world.run(name="other")
    assert len(world.trained) == 6 and len(world.asked) == 7
    assert "| direct | 2 of 2 | 50.0 ±0.0 |" in (world.folder / "out" / "other.md").read_text()

    def again(argv):  # its run is there whole
        world.trained.append(argv)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "main", again)
        world.run("--max_new_tokens", "5", "--seeds", "1")
        models = ("some", "sft-7", "sft-14", "mine-7")
        assert world.asked[7:] == [(model, ["0", "1"], 5) for model in models]

        # The same questions elsewhere are the same; others are asked.
        lines = (world.folder / "d" / "train.jsonl").read_text().splitlines()
        (world.folder / "d" / "test.jsonl").write_text("\n".join(lines) + "\n")
        world.run("--max_new_tokens", "5", "--seeds", "1", "--test", "d/test.jsonl")
        assert len(world.asked) == 11
        (world.folder / "d" / "test.jsonl").write_text("\n".join(lines[:2]) + "\n")
        world.run("--max_new_tokens", "5", "--seeds", "1", "--test", "d/test.jsonl")
        assert len(world.asked) == 15


def test_results_of_elsewhere_are_not_run_again(world):
    """A study's JSON in --output is enough: those of its settings and seeds, whichever study they are of."""
    world.run("--seeds", "1")
    results = json.loads((world.folder / "out" / "mine.json").read_text())
    page = (world.folder / "out" / "mine.md").read_text()
    shutil.rmtree(world.folder / "out")
    (world.folder / "out").mkdir()
    (world.folder / "out" / "theirs.json").write_text(json.dumps(results) + "\n")
    (world.folder / "out" / "notes.json").write_text('{"a": 1, "b": {"x": 2, "3": []}}')
    others = json.loads(json.dumps(results))
    others["plain"]["0"]["asked"]["questions"] += 1
    (world.folder / "out" / "zz.json").write_text(json.dumps(others) + "\n")
    world.run("--seeds", "1")
    assert len(world.trained) == 3 and len(world.asked) == 4
    assert (world.folder / "out" / "mine.md").read_text() == page
    world.run()  # the second seed is new
    assert [argv[argv.index("--seed") + 1] for argv in world.trained[3:]] == ["1"] * 3
    shutil.rmtree(world.folder / "out")
    (world.folder / "out").mkdir()
    (world.folder / "out" / "theirs.json").write_text(json.dumps(others) + "\n")
    world.run("--seeds", "1")
    assert len(world.trained) == 7 and "sft-" in world.trained[6][world.trained[6].index("--output") + 1]


def test_what_was_asked_is_done(world, capsys):
    """--page makes no run, marks what is not there, does not mix settings, and loses none."""
    world.run("--seeds", "1")
    shutil.rmtree(next((world.folder / "out").glob("mine-*-0")))
    capsys.readouterr()
    compare.main(["--study", "mine.toml", "--output", "out", "--page"])
    said = capsys.readouterr().out
    assert len(world.trained) == 3 and "4 result(s) of other settings are kept" in said
    assert said.count("| **not run** |") == 5  # four rows and a claim
    assert "| table 1 | mine is better | mine > plain | accuracy | 0 |  |  | **not run** |" in said

    # Of NAME.json alone where the run's directory is gone, with the settings that made it.
    world.run("--page", "--seeds", "1")
    said = capsys.readouterr().out
    assert "compare --study mine --seeds 1 --model some --data" in said
    assert "other settings" not in said and "| mine | 1 of 1 | 50.0 | +0.0 |" in said
    assert len(world.trained) == 3


def test_the_key_is_of_all_that_makes_a_run(tmp_path, monkeypatch):
    """Flags, updates, the bytes of data, of a method's file and of the tiny base; not where files are, nor
    seeds.
    """
    for name, text in (("x", "{}\n"), ("y", "[]\n"), ("z", "{}\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "mine.toml").write_text(FILE)
    (tmp_path / "mine.py").write_text("from crystal.methods.livr import Method\n")
    chosen = study.read("mine", tmp_path)
    start = {"model": "tiny", "data": "", "test": "", "output": "out"} | run_study.defaults(chosen)

    def key(row="plain", *more, of=chosen, **changed):
        return run_study.Plan(of, of.row(row), SimpleNamespace(**start | changed), list(more)).key

    keys = [
        key(), key("longer"), key("mine"), key("base"), key("plain", "--lr", "3"), key(max_steps=8),
        key(data=str(tmp_path / "x")), key(data=str(tmp_path / "y")), key(model="some"),
        key("base", model="some"),
    ]  # fmt: skip
    assert key(data=str(tmp_path / "z")) == keys[6]
    assert len(set(keys)) == len(keys) and all(len(k) == 12 for k in keys)
    assert key(seeds=9, questions=5) == keys[0]

    shutil.copytree(tmp_path, tmp_path / "moved")
    moved = study.read("mine", tmp_path / "moved")
    assert key("mine", of=moved) == keys[2]
    shutil.copytree(tmp_path / "moved", tmp_path / "edited")
    (tmp_path / "edited" / "mine.py").write_text("from crystal.methods.sft import Method\n")
    assert key("mine", of=study.read("mine", tmp_path / "edited")) != keys[2]

    (tmp_path / "model.safetensors").write_bytes(b"another base")
    monkeypatch.setattr(run_study, "TINY", tmp_path)
    assert key() != keys[0] and key(model="some") == keys[8]


def test_the_tiny_base_is_trained_by_the_demos_flags_in_any_number_of_processes(tmp_path):
    (tmp_path / "mine.toml").write_text(FILE)
    (tmp_path / "mine.py").write_text("from crystal.methods.crystal import Method\n")
    chosen = study.read("mine", tmp_path)
    args = SimpleNamespace(model="tiny", data="", test="", **run_study.defaults(chosen))
    plan = run_study.Plan(chosen, chosen.row("mine"), args, [])
    for world, share in ((1, "16"), (2, "8")):
        recipe = ["--batch_size", share, "--lr", "1e-3", "--lr_tokens", "10", "--eval_records", "64"]
        own = ["--labels", "answer", "--corruption", "blur=8:10", "--max_steps", "7"]
        start = ["--method", str(tmp_path / "mine.py"), "--model", "tiny"]
        wanted = [*start, *recipe, *own, "--lr", "1", "--lora_r", "3", "--seed", "4"]
        assert plan.flags(4, world) == wanted
    run = plan.run(4)
    assert run == Path("runs/studies") / f"mine-{plan.key}-4"
    assert plan.data(distributed.Processes()) == [
        "--data", "runs/studies/toy/train.jsonl", "--val_data", "runs/studies/toy/val.jsonl",
    ]  # fmt: skip


def test_lavits_teacher_is_the_first_row_to_beat(tmp_path, monkeypatch):
    text = FILE.replace('"mine.py"', '"lavit"')
    (tmp_path / "mine.toml").write_text(text)
    chosen = study.read("mine", tmp_path)
    args = SimpleNamespace(model="tiny", data="", test="", **run_study.defaults(chosen))
    plans = {row.name: run_study.Plan(chosen, row, args, []) for row in chosen.rows}
    assert [plan.taught for plan in plans.values()] == [False, False, False, True]
    told = []
    monkeypatch.setattr(demo, "data_of", lambda *of: told.append(of[:3]) or ["DATA"])
    alone, toy, teacher = distributed.Processes(), Path("runs/studies/toy"), plans["plain"].run(0)
    monkeypatch.chdir(tmp_path)
    checkpoint.step_dir(teacher, 7).mkdir(parents=True)
    assert plans["mine"].data(alone) == plans["plain"].data(alone) == ["DATA"]
    assert told == [("lavit", toy, teacher), ("sft", toy, None)]

    # A teacher that is not there, or not at its end, is trained first.
    shutil.rmtree(checkpoint.step_dir(teacher, 7))
    learned = []

    def learn(argv):
        learned.append(argv)
        checkpoint.step_dir(teacher, 7).mkdir(parents=True)

    monkeypatch.setattr(train, "main", learn)
    assert plans["mine"].data(alone) == ["DATA"] and told[2:] == [("sft", toy, None), ("lavit", toy, teacher)]
    assert learned == [[*plans["plain"].flags(0), "DATA", "--output", str(teacher), "--overwrite"]]

    # Another teacher makes another run; none is told.
    (tmp_path / "mine.toml").write_text(text.replace('against = ["plain"]', 'against = ["longer"]'))
    other = study.read("mine", tmp_path)
    assert run_study.Plan(other, other.row("mine"), args, []).key != plans["mine"].key
    (tmp_path / "mine.toml").write_text(text.replace('against = ["plain"]', ""))
    alone = study.read("mine", tmp_path)
    with pytest.raises(UserError, match="mine.toml: row 'mine': another row, its teacher, .* 'against'"):
        run_study.Plan(alone, alone.row("mine"), args, [])


def test_a_methods_data_is_found_once(world, monkeypatch):
    """LaViT's teacher would look at all records again for every row and seed."""
    found, data = [], run_study.Plan.data
    monkeypatch.setattr(run_study.Plan, "data", lambda *of: found.append(of[0].method) or data(*of))
    world.run()
    assert len(world.trained) == 6 and found == ["sft", "mine.py"]


def test_two_processes_make_no_run_twice(world, capsys):
    world.run("--seeds", "1")
    shutil.rmtree(world.folder / "out")
    (world.folder / "out").mkdir()
    plan = Path(world.trained[1][world.trained[1].index("--output") + 1])
    with open(plan.with_suffix(".lock"), "w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        world.run("--seeds", "1")
    assert len(world.trained) == 5 and world.trained[3:] == [world.trained[0], world.trained[2]]
    said = capsys.readouterr().out
    assert "another process is making it" in said and "| longer | **not run** |" in said
    world.run("--seeds", "1")  # theirs ended, without a result
    assert world.trained[5:] == [world.trained[1]]


@pytest.mark.parametrize("flags", [["--methods", "sft"], ["--page"]])
def test_flags_that_mean_nothing_together(world, flags):
    with pytest.raises(UserError, match=flags[0]):
        compare.main([*(["--study", "mine.toml"] if flags[0] == "--methods" else []), *flags])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("mine.json", "{", r"mine.json: is not JSON .*; delete it"),
        ("mine.json", "[]", r"mine.json: is no JSON object; delete it"),
        ("NOTE", "{", r"study.json: is not JSON .*; delete it"),
    ],
)
def test_broken_notes_are_told(world, name, text, message):
    world.run("--seeds", "1")
    place = world.folder / "out" / name
    if name == "NOTE":
        place = next((world.folder / "out").glob("sft-*-0")) / "study.json"
    place.write_text(text)
    with pytest.raises(UserError, match=message):
        world.run("--page", "--seeds", "1")


def test_a_rows_wrong_flag_is_told_before_anything_starts(world, monkeypatch):
    file = world.folder / "mine.toml"
    file.write_text(FILE.replace('"--lr 2"', '"--no_such 2"'))
    monkeypatch.setattr(compare.distributed, "start", lambda: pytest.fail("something was started"))
    with pytest.raises(UserError, match="mine.toml: row 'longer': .*--no_such"):
        world.run()
    file.write_text(FILE.replace('"mine.py"', '"other.py"'))
    with pytest.raises(UserError, match="other.py: no such file"):
        world.run()
    assert not world.trained


KILLED = """
import os, signal
from crystal.methods import sft

class Method(sft.Method):
    def losses(self, model, batch, progress):
        if progress.step == 1 and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch, progress)
"""


def test_a_killed_study_goes_on(model_dirs, records_file, tmp_path):
    """SIGKILL in the second of two updates of the last run: the others are not repeated, it goes on from its
    checkpoint, and then everything is there.
    """
    text = FILE.replace("--lr 1 --lora_r 3", "--batch_size 1 --eval_every 0 --save_every 1 --lora_r 2")
    text = text.replace("max_steps = 7", "max_steps = 2").replace("times = 2\n", "")
    (tmp_path / "mine.toml").write_text(text)
    (tmp_path / "mine.py").write_text(KILLED)
    data = ["--model", str(model_dirs[True]), "--data", str(records_file), "--test", str(records_file)]
    command = [sys.executable, "-m", "crystal.compare", "--study", "mine.toml", "--seeds", "1", *data]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start():
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    first = start()
    assert first.returncode == -signal.SIGKILL, first.stderr
    out = tmp_path / "runs" / "studies"
    assert sorted(json.loads((out / "mine.json").read_text())) == ["base", "longer", "plain"]
    assert "| mine | **not run** |" in (out / "mine.md").read_text()

    second = start()
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("resumed ") == 1 and "step-1 at update 1" in second.stdout
    assert second.stdout.count(" trainable of ") == 1  # nothing else was trained
    assert "| mine | 1 of 1 |" in (out / "mine.md").read_text()


# --- what is shipped ---

STUDIES = sorted(run_study.FOLDER.glob("*.toml"))
each_study = pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)


def plans(file, **changed):
    chosen = run_study.read(file.stem)
    args = SimpleNamespace(**run_study.defaults(chosen) | {"model": "tiny", "data": "", "test": ""} | changed)
    return chosen, args, [run_study.Plan(chosen, row, args, []) for row in chosen.rows]


@each_study
def test_every_shipped_study_can_be_run(file):
    """Flags that train.py takes, a run of its own for each row, and plain fine-tuning first to beat."""
    chosen, _, rows = plans(file)
    keys = [plan.key for plan in rows]
    assert len(set(keys)) == len(keys) and chosen.claims
    assert {claim.measure for claim in chosen.claims} <= study.MEASURES.keys()
    first = chosen.row(chosen.against[0])
    assert (first.method, first.flags, first.times) == ("sft", "", 1)


def test_every_shipped_page_is_of_its_results(tmp_path, monkeypatch):
    """NAME.md is what NAME.json gives, whatever the base is today, and the index says which are there."""
    monkeypatch.setattr(run_study.Plan, "made", lambda plan, outcome: True)
    index = (run_study.FOLDER / "README.md").read_text()
    for file in STUDIES:
        results, page = file.with_suffix(".json"), file.with_suffix(".md")
        assert results.is_file() == page.is_file() == (f"]({page.name})" in index)
        if not page.is_file():
            continue
        shutil.copy(results, tmp_path)
        chosen, args, _ = plans(file, output=str(tmp_path))
        assert run_study.write_page(chosen, args, []) == page.read_text()
        assert (tmp_path / results.name).read_text() == results.read_text()


def test_the_index_has_every_study_and_an_example_that_is_one(tmp_path):
    index = (run_study.FOLDER / "README.md").read_text()
    assert all(f"| [{file.stem}]({file.name}) |" in index for file in STUDIES)
    (tmp_path / "mine.toml").write_text(index.partition("```toml\n")[2].partition("```")[0])
    example = study.read("mine", tmp_path)
    assert [row.name for row in example.rows] == ["sft", "eight", "one"] and example.seeds == 3


def token_means(model, hidden, targets):
    """Mean over pairs of the token means of -log p, by log_softmax."""
    means = []
    for row, labels in zip(model.hf.lm_head(hidden).log_softmax(-1), targets.tolist()):
        terms = [-float(row[t, label]) for t, label in enumerate(labels) if label >= 0]
        means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


def test_the_copy_can_be_cut(setup):
    """CE_cor is then that of the corrupted picture alone, through its own latents; CrystaL's is another."""
    flags = ["--labels", "answer", "--corruption", "blur=9"]
    cut = setup("--method", str(run_study.FOLDER / "crystal_copy_cut.py"), *flags)
    whole = setup("--method", "crystal", *flags)
    with torch.no_grad():
        losses, others = (s.method.losses(s.model, s.batch, None) for s in (cut, whole))
        corrupted = {**cut.batch, "pixel_values": cut.batch["pixel_values_cor"]}
        own = token_means(cut.model, cut.model.hidden(corrupted), cut.batch["targets"])
    assert float(losses["ce_cor"]) == pytest.approx(own, rel=1e-9)
    assert float(others["ce_cor"]) != pytest.approx(own, rel=1e-6)
    assert float(losses["ce_int"]) == pytest.approx(float(others["ce_int"]), rel=1e-9)
    assert set(losses) == set(others) and losses["kl"] > 0 and losses["attn"] > 0


def test_pictures_are_seen_intact_and_corrupted(setup):
    s = setup("--method", str(run_study.FOLDER / "sft_corrupted.py"), "--corruption", "noise=40")
    assert str(s.method.corruption) == "noise=40" and s.method.tokens == []
    assert s.settings.weights == {"ce": 1.0, "ce_cor": 1.0}
    with torch.no_grad():
        losses = s.method.losses(s.model, s.batch, None)
        corrupted = {**s.batch, "pixel_values": s.batch["pixel_values_cor"]}
        wanted = [token_means(s.model, s.model.hidden(b), s.batch["targets"]) for b in (s.batch, corrupted)]
    assert [float(losses[name]) for name in ("ce", "ce_cor")] == pytest.approx(wanted, rel=1e-9)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-6)
