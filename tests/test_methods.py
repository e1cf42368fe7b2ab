"""A run directory may come from anywhere: opening one runs no file that it names.

Each command that opens a run is started on one whose method is a file that has turned evil since: it must
leave no trace. Digests are hashlib's of the bytes that the test wrote. The methods themselves have tests of
their own (test_crystal.py and so on), their settings test_config.py.
"""

import hashlib
import json
import pickle
import shutil
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from PIL import Image

import crystal
from crystal import compare, evaluate, export, generate, methods, opening, serve, train, visualize
from crystal.runtime.config import UserError
from data_prep import lavit_teacher
from data_prep.checks import feedback as feedback_check

GOOD = (
    "from crystal.methods.crystal import Method as Crystal\n\n\nclass Method(Crystal):\n    said = 'good'\n"
)
EVIL = "from pathlib import Path\nPath({trace!r}).write_text('I was here')\n" + GOOD


def forget(*paths):
    """A file is run once in a process; the next command of a user's is another process."""
    for path in paths:
        sys.modules.pop(str(path.resolve()), None)


@pytest.fixture(scope="module")
def original(model_dirs, records_file, tmp_path_factory):
    """A run by a file of its own, stopped after the first of two updates -> (run directory, the file)."""
    root = tmp_path_factory.mktemp("own")
    file = root / "mine.py"
    file.write_text(GOOD)
    run = train.main(
        [
            "--method", str(file), "--model", str(model_dirs[True]), "--data", str(records_file),
            "--latents", "3", "--lora_r", "2", "--max_steps", "2", "--save_every", "1", "--keep", "2",
            "--eval_every", "0", "--output", str(root / "run"),
        ]
    )
    shutil.rmtree(run / "checkpoints" / "step-2")
    return run, file


@pytest.fixture
def evil(original, records_file, tmp_path, monkeypatch):
    """The run copied to another place, and the file that it names turned evil -> run, a good file of
    the user's, trace, records.
    """
    run, file = original
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    shutil.copytree(records_file.parent, tmp_path / "records")
    good, trace = tmp_path / "good.py", tmp_path / "trace"
    good.write_text(GOOD)
    file.write_text(EVIL.format(trace=str(trace)))
    forget(file)
    for picture in ("loss_curves", "corruption_grid"):  # drawn before a run is opened, and slow
        monkeypatch.setattr(visualize, picture, lambda *args, **how: None)
    yield moved, good, trace, tmp_path / "records" / records_file.name
    file.write_text(GOOD)
    forget(file, good, moved / "method.py")


COMMANDS = {
    "evaluate": lambda run, data: (evaluate, ["--model", run, "--data", data, "--device", "cpu"]),
    "reliance": lambda run, data: (
        evaluate,
        ["--model", run, "--data", data, "--device", "cpu", "--reliance"],
    ),
    "diagnose": lambda run, data: (
        evaluate,
        ["--model", run, "--data", data, "--device", "cpu", "--diagnose"],
    ),
    "generate": lambda run, data: (generate, ["--model", run, "--question", "What?", "--device", "cpu"]),
    "visualize": lambda run, data: (visualize, ["--run", run, "--data", data, "--device", "cpu"]),
    "serve": lambda run, data: (serve, ["--model", run, "--port", "0", "--device", "cpu"]),
    "export": lambda run, data: (export, ["--run", run]),
    "teacher": lambda run, data: (lavit_teacher, ["--teacher", run, "--data", data, "--device", "cpu"]),
    "feedback": lambda run, data: (feedback_check, ["--run", run, "--data", data]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_the_file_that_a_run_names(evil, name):
    run, _, trace, records = evil
    command, flags = COMMANDS[name](str(run), str(records))
    with pytest.raises(
        UserError, match=r"step-1: made by .*mine\.py, a method of its own, .*--method FILE .*--trust_method"
    ) as refused:
        command.main(flags)
    assert "\n" not in str(refused.value) and not trace.exists()
    assert not (run / "merged").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_both_answers(evil, name, monkeypatch):
    """What the flags say arrives where the decision is made."""
    run, good, _, records = evil
    command, flags = COMMANDS[name](str(run), str(records))

    class Asked(Exception):
        pass

    def decide(state, directory, method="", trust=False):
        assert directory == run / "checkpoints" / "step-1"
        raise Asked(method, trust)

    monkeypatch.setattr(methods, "of_run", decide)
    for given, expected in (
        ([], ("", False)),
        (["--method", str(good)], (str(good), False)),
        (["--trust_method"], ("", True)),
    ):
        with pytest.raises(Asked) as asked:
            command.main([*flags, *given])
        assert asked.value.args == expected


def test_python_verify_compare_and_a_second_stage_run_it_neither(evil, model_dirs, capsys):
    """crystal.open refuses as the commands do; who verifies reads; who compares or trains named a method."""
    run, _, trace, records = evil
    with pytest.raises(UserError, match="no file is run because a run names it"):
        crystal.open(str(run))
    with pytest.raises(SystemExit):
        export.main(["--verify", str(run)])
    assert "step-1: whole" in capsys.readouterr().out

    # A run of another method's under the name of one that is to be compared.
    out = run.parent / "compared"
    shutil.copytree(run, out / "sft-0")
    flags = ["--methods", "sft", "--seeds", "1", "--max_steps", "2", "--model", str(model_dirs[True])]
    with pytest.raises(UserError, match=r"was made with --method .*mine\.py', not 'sft'"):
        compare.main([*flags, "--data", str(records), "--test", str(records), "--output", str(out)])
    with pytest.raises(UserError):
        more = ["--data", str(records), "--max_steps", "1", "--output", str(run.parent / "second")]
        train.main(["--model", str(run), *more])

    # An export that names it, by itself and as the base of a second stage.
    merged = run.parent / "merged"
    shutil.copytree(model_dirs[True], merged)
    (merged / "crystal.json").write_text(json.dumps({"method": str(run / "method.py"), "latents": 3}))
    (run / "method.py").write_text(EVIL.format(trace=str(trace)))
    with pytest.raises(UserError, match="a method of its own"):
        crystal.open(str(merged))
    train.main(["--model", str(merged), *more])
    assert not trace.exists()


@pytest.mark.parametrize("chosen", ["copy", "file"])
def test_what_the_user_names_or_trusts_is_run(evil, chosen, capsys):
    """The method that answers is the chosen file's, the settings name it, and the evil one stays unread."""
    run, good, trace, _ = evil
    how = {"trust_method": True} if chosen == "copy" else {"method": str(good)}
    _, fmt, settings = opening.open_model(run, **how)
    assert settings.method == str(run / "method.py" if chosen == "copy" else good) and fmt.count == 3
    assert methods.get(settings.method).said == "good" and not trace.exists()
    assert capsys.readouterr().err == ""  # the user's file is the run's to the byte: nothing to tell


def resumed(run, method, model, records):
    """train.main's flags for a resume of the original run by this method."""
    return [
        "--method", str(method), "--model", str(model), "--data", str(records), "--latents", "3",
        "--lora_r", "2", "--max_steps", "2", "--save_every", "1", "--keep", "2", "--eval_every", "0",
        "--output", str(run), "--resume",
    ]


def test_a_resume_runs_no_other_method(evil, model_dirs, records_file, tmp_path):
    """Neither a built-in one nor a file elsewhere that differs, and never the one that the run names."""
    run, _, trace, _ = evil
    other = tmp_path / "other.py"
    other.write_text(GOOD + "# another\n")
    for method in (other, "crystal"):
        with pytest.raises(UserError, match=r"was made with --method .*mine\.py', not .*; a resume keeps it"):
            train.main(resumed(run, method, model_dirs[True], records_file))
    assert not trace.exists()


def test_a_resume_takes_the_same_file_from_another_place(evil, model_dirs, records_file, capsys):
    """The same to the byte: what the run was made by, wherever it lies now."""
    run, good, trace, _ = evil
    train.main(resumed(run, good, model_dirs[True], records_file))
    state = json.loads((run / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["settings"]["method"] == str(good) and not trace.exists()
    assert "note: " not in capsys.readouterr().err


def test_a_run_keeps_the_file_and_its_digest(original):
    run, file = original
    digest = hashlib.sha256(GOOD.encode()).hexdigest()
    assert (run / "method.py").read_text() == GOOD
    assert json.loads((run / "config.json").read_text())["method_sha256"] == digest
    state = json.loads((run / "checkpoints" / "step-1" / "state.json").read_text())
    assert state["method_sha256"] == digest and state["settings"]["method"] == str(file)


def test_the_digest_is_of_what_was_run_not_of_later_edits(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(GOOD)
    methods.get(str(file))
    file.write_text(GOOD + "# edited while the run went on\n")
    assert methods.fingerprint(str(file)) == {"method_sha256": hashlib.sha256(GOOD.encode()).hexdigest()}
    methods.keep_copy(str(file), tmp_path)
    assert (tmp_path / "method.py").read_text() == GOOD


def test_an_edited_file_is_told_and_a_resume_keeps_the_new_one(
    original, model_dirs, records_file, tmp_path, capsys
):
    """A resume names its file itself; where it was edited since, one line says so, and the run's copy
    is the new one.
    """
    run, file = original
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    edited = GOOD + "# mended\n"
    file.write_text(edited)
    forget(file)
    capsys.readouterr()
    try:
        train.main(resumed(moved, file, model_dirs[True], records_file))
    finally:
        file.write_text(GOOD)
        forget(file)
    notes = capsys.readouterr().err.splitlines()
    assert [line for line in notes if line.startswith("note: ")] == [
        f"note: {file} is not the file that {moved}/checkpoints/step-1 was made by (SHA-256 differs); it "
        "is used all the same"
    ]
    assert (moved / "method.py").read_text() == edited
    assert (
        json.loads((moved / "config.json").read_text())["method_sha256"]
        == hashlib.sha256(edited.encode()).hexdigest()
    )


def state_of(method, digest=None):
    return {"settings": {"method": method}} | ({"method_sha256": digest} if digest else {})


def test_the_rule_by_cases(tmp_path, capsys):
    """Every combination of what a run says and what the user says."""
    directory = tmp_path / "run" / "checkpoints" / "step-3"
    directory.mkdir(parents=True)
    mine, copy = tmp_path / "mine.py", tmp_path / "run" / "method.py"
    mine.write_text(GOOD)
    digest = hashlib.sha256(GOOD.encode()).hexdigest()
    own, old, built_in = state_of("/elsewhere/x.py", digest), state_of("/elsewhere/x.py"), state_of("livr")
    decide = methods.of_run

    # A built-in name needs nothing, and may be said.
    assert (
        decide(built_in, directory)
        == decide(built_in, directory, "livr")
        == decide(built_in, directory, trust=True)
        == "livr"
    )
    # The user's own file is run; that a run without a digest says nothing of it is no harm.
    assert decide(own, directory, str(mine)) == decide(old, directory, str(mine)) == str(mine)

    for state, answers, says in (
        (built_in, ("sft",), "was made with --method 'livr', not 'sft'"),
        (built_in, (str(mine),), "was made with --method 'livr', not"),
        (own, ("crystal",), "was made with --method '/elsewhere/x.py', not 'crystal'"),
        (own, (), "no file is run because a run names it"),
        (own, (str(mine), True), "two answers to one question"),
        (own, (str(tmp_path / "none.py"),), "none.py: no such file"),
        (own, ("", True), "method.py: no such file"),
        (state_of(7), ("", True), "its state names no method"),
    ):
        with pytest.raises(UserError, match=says):
            decide(state, directory, *answers)

    # The copy is run if it is what the checkpoint was made by.
    copy.write_text(GOOD)
    assert decide(own, directory, trust=True) == str(copy)
    with pytest.raises(UserError, match="says no SHA-256 of its method"):
        decide(old, directory, trust=True)
    copy.write_text(GOOD + "# changed\n")
    with pytest.raises(
        UserError, match=r"method\.py: not the file that .*step-3 was made by \(SHA-256 differs\)"
    ):
        decide(own, directory, trust=True)
    assert capsys.readouterr().err == ""

    # A file of the user's that differs is used, and told.
    mine.write_text(GOOD + "# another\n")
    assert decide(own, directory, str(mine)) == str(mine)
    assert (
        capsys.readouterr().err
        == f"note: {mine} is not the file that {directory} was made by (SHA-256 differs); it is used all the same\n"  # noqa: E501
    )


def test_what_is_no_run_takes_no_method(model_dirs, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(EVIL.format(trace=str(tmp_path / "trace")))
    with pytest.raises(UserError, match="--method .*mine.py: .* is no run of train.py"):
        opening.open_model(str(model_dirs[True]), method=str(mine))
    assert not (tmp_path / "trace").exists()


def test_a_built_in_run_keeps_no_file(model_dirs, records_file, tmp_path):
    run = train.main(
        [
            "--method", "sft", "--model", str(model_dirs[True]), "--data", str(records_file), "--lora_r", "2",
            "--max_steps", "1", "--eval_every", "0", "--output", str(tmp_path / "run"),
        ]
    )
    assert not (run / "method.py").exists() and "method_sha256" not in json.loads(
        (run / "config.json").read_text()
    )
    assert opening.open_model(run)[2].method == "sft"


def test_settings_do_not_change(tmp_path):
    """They were checked when they were made. A method's file that declares them otherwise is told
    so in one line.
    """
    for name in ("sft", "crystal", "released", "livr", "lavit", "valr"):
        settings = methods.parse(["--method", name])
        with pytest.raises(FrozenInstanceError):
            settings.latents = 3
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom crystal.methods import crystal\n\n@dataclass\nclass "
        "Settings(crystal.Settings):\n    mine: int = 3\n"
    )
    with pytest.raises(UserError) as refused:
        methods.get(str(file))
    assert (
        str(refused.value)
        == f"--method {file}: settings do not change once they are made; write @dataclass(frozen=True)"
    )


# --- in a loader's workers ---


@pytest.mark.parametrize("name", ["sft", "crystal", "released", "livr", "lavit", "valr"])
def test_a_recipe_is_made_anew_from_settings(setup, name):
    """Pickled, it brings no weights, and makes the same of a record as the method that has seen the model."""
    more = {"valr": ["--encoders", "own,tiny"], "lavit": ["--w_gaze", "0", "--w_semantics", "0"]}
    s = setup("--method", name, *more.get(name, []))
    images = [Image.new("RGB", (40, 60), "teal")]
    for stage in (0, -1):
        recipe = methods.Recipe(s.method, s.fmt, stage)
        sent = pickle.dumps(recipe)
        there = pickle.loads(sent)
        assert there.method is not s.method and there.method.settings == s.settings
        assert not any(isinstance(x, torch.nn.Module) for x in vars(there.method).values())
        assert there.layout(s.records[1], [4, 4]) == recipe.layout(s.records[1], [4, 4])
        assert there()["corruption"] == s.method.corruption and set(there()) == set(recipe())

        ours, theirs = s.method.extras(s.records[0], images), there()["extras"](s.records[0], images)
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[n]) for n, x in ours.items())
        assert (name == "valr") == bool(ours)


def test_a_worker_gets_what_a_method_has_found_out_of_the_model(setup):
    """LaViT refuses a teacher's V_sem of another length than the model's hidden size, in a worker too."""
    s = setup("--method", "lavit")
    there = pickle.loads(pickle.dumps(methods.Recipe(s.method, s.fmt)))
    assert there.method.size == s.method.size == s.model.hf.config.text_config.hidden_size
