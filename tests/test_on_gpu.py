"""on_gpu.sh, which has minutes on somebody's GPU: what it promises about its parts is held here, without one.

The parts are mostly the test's own (functions that succeed, fail, hang or have nothing to do), so what the
table has to say is known. The numbers that on_gpu.py judges are written by hand.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import on_gpu
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "on_gpu.sh"
PARTS = ["packages", "card", "scenes", "build", "cpu_train", "tests", "gpu_train", "bench", "kernels", "memcheck", "racecheck", "curves", "step", "peers"]  # noqa: E501


@pytest.fixture
def script(tmp_path):
    """script(*flags, stubs=) -> the process, its folder. stubs: shell text, read after the script's parts."""

    def run(*flags, stubs="", start=subprocess.run, **how):
        folder, own = tmp_path / "out", tmp_path / "stubs.sh"
        own.write_text("".join(f"{part}() {{ echo {part} ran; }}\n" for part in PARTS) + stubs)
        environment = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        environment |= {"ON_GPU_STUBS": str(own) if stubs else "", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return start(["bash", str(SCRIPT), str(folder), *flags], env=environment, **pipes, **how), folder

    return run


def table(folder):
    """{part: (result, why)} of the JSON that the script wrote, in its order."""
    rows = json.loads((folder / "parts.json").read_text())
    return {row["part"]: (row["result"], row["why"]) for row in rows}


def printed_table(text):
    """{part: result} of the last lines on the screen, and the line that counts them."""
    lines = text.splitlines()
    start = max(i for i, line in enumerate(lines) if re.fullmatch(r"part +result +seconds", line))
    rows = [line.split() for line in lines[start + 1 : -2]]
    assert all(row[2].isdigit() for row in rows)
    return {row[0]: row[1] for row in rows}, lines[-1]


# --- the script ---


def test_bash_can_read_it():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


def test_all_parts_run_once_and_the_table_says_so(script):
    done, folder = script(stubs="card() { echo '>> a line for the screen'; echo one for the log; }")
    assert done.returncode == 0, done.stdout
    assert table(folder) == {part: ("passed", "") for part in PARTS}
    rows, counts = printed_table(done.stdout)
    assert rows == {part: "passed" for part in PARTS} and counts == "14 passed, 0 failed, 0 skipped"
    assert "   a line for the screen\n" in done.stdout and "one for the log" not in done.stdout
    log = (folder / "log.txt").read_text()
    assert ">> a line for the screen\none for the log\n" in log
    assert all(log.count(f"{part} ran\n") == 1 for part in PARTS if part != "card")
    assert sorted(path.name for path in folder.iterdir()) == ["log.txt", "parts.json"]


def test_goes_on_after_what_fails_hangs_or_has_nothing_to_do(script, tmp_path):
    """A failure ends a part in its middle; a limit ends what hangs, and what does not listen; 77 is none."""
    stubs = """
        build() { echo about to fail; false; echo went on; }
        tests() { echo $$ >"$FOLDER/hanging"; sleep 60; }
        gpu_train() { trap '' TERM; while true; do sleep 1; done; }
        bench() { return 5; }
        memcheck() { echo looked; echo it is 'not "here"'; return 77; }
        LIMIT[tests]=1 LIMIT[gpu_train]=1
    """
    done, folder = script(stubs=stubs, timeout=60)
    assert done.returncode == 1
    assert table(folder) == {part: ("passed", "") for part in PARTS} | {
        "build": ("failed", "exit code 1"),
        "tests": ("failed", "stopped at its limit of 1 s"),
        "gpu_train": ("failed", "stopped at its limit of 1 s"),
        "bench": ("failed", "exit code 5"),
        "memcheck": ("skipped", "it is not here"),
    }
    rows, counts = printed_table(done.stdout)
    assert rows == {part: result for part, (result, _) in table(folder).items()}
    assert counts == "9 passed, 4 failed, 1 skipped"
    assert "   | about to fail\n" in done.stdout and "went on" not in (folder / "log.txt").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "hanging").read_text()), 0)
    assert not list(tmp_path.glob("tmp.*"))  # its own folder is gone


def test_the_budget_binds_and_the_curves_still_come(script):
    """When time is over no part begins but the comparison of the curves, for which ten seconds are kept."""
    done, folder = script(stubs="BUDGET=12; build() { sleep 60; }", timeout=60)
    assert done.returncode == 1
    found = table(folder)
    assert found["card"] == found["curves"] == ("passed", "")
    result, why = found["build"]
    assert result == "failed" and re.fullmatch(r"stopped at its limit of [12] s", why)
    for part in ("tests", "gpu_train", "bench", "kernels", "memcheck", "racecheck", "step", "peers"):
        assert found[part] == ("failed", "no time left"), part


def test_stopped_from_outside_it_says_what_it_knows(script):
    hang = '{0}() {{ echo $$ >"$FOLDER/{0}"; sleep 60; }}\n'
    stubs = hang.format("build") + hang.format("cpu_train")
    process, folder = script(stubs=stubs, start=subprocess.Popen)
    while not ((folder / "build").exists() and (folder / "cpu_train").exists()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert table(folder) == {part: ("passed", "") for part in ("packages", "card", "scenes")} | {
        part: ("failed", "stopped from outside") for part in ("build", "cpu_train")
    }
    assert printed_table(text)[1] == "3 passed, 2 failed, 0 skipped"
    for part in ("build", "cpu_train"):
        pid = int((folder / part).read_text())
        while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.05)


def test_only_some_parts(script):
    done, folder = script("--only", "card,curves", stubs="curves() { false; }")
    assert done.returncode == 1
    assert table(folder) == {"card": ("passed", ""), "curves": ("failed", "exit code 1")}


def test_dry_is_small_on_a_cpu_and_patient(script):
    show = 'echo "$DEVICE, $UPDATES updates, bench $SMALL"; if [ -n "$DRY" ]; then echo dry; fi'
    small = "--rows 3 --vocab 500 --slice 2,40,6,3,4,2,8 --repeats 3"
    for flags, lines, limits in (
        ([], "cuda, 50 updates, bench \n", "limits 60 470"),
        (["--dry"], f"cpu, 3 updates, bench {small}\ndry\n", "limits 360 2400"),
    ):
        stubs = f"card() {{ {show}; }}; echo limits ${{LIMIT[card]}} $BUDGET"
        done, folder = script("--only", "card", *flags, stubs=stubs)
        assert (folder / "log.txt").read_text().endswith(lines) and limits in done.stdout, flags
    # Eight minutes are enough for the budget and for a part that does not listen.
    assert int(re.search(r"^BUDGET=(\d+)$", SCRIPT.read_text(), re.MULTILINE)[1]) + 3 <= 480


def test_what_is_refused(script, tmp_path):
    (tmp_path / "empty").mkdir()
    for flags, says in (
        (["--dri"], "there is no option --dri"),
        (["--only"], "--only needs parts"),
        (["--only", "card,cart"], "--only cart: the parts are packages"),
        (["--wheels", str(tmp_path / "empty")], "no wheels there"),
    ):
        done, _ = script(*flags, stubs="true")
        assert done.returncode == 2 and says in done.stdout, flags
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "say where logs and JSON go" in done.stderr
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Shows in one go") and "set -uo" not in done.stdout
    assert all(re.search(rf"^    {part} ", done.stdout, re.MULTILINE) for part in PARTS)


def test_the_card_can_be_measured_on_a_cpu(script):
    """The script's own part, which a first line that fails would end everywhere."""
    done, folder = script("--dry", "--only", "card")
    assert done.returncode == 0, done.stdout
    found = json.loads((folder / "card.json").read_text())
    assert found["copy_gb_s"] > 0 and found["float32_tflop_s"] > 0 and found["bfloat16_tflop_s"] > 0


def test_without_a_sanitizer_its_parts_are_skipped(script):
    stubs = "find_sanitizer() { return 1; }; memcheck() { sanitize memcheck; }"
    done, folder = script("--only", "memcheck", stubs=stubs)
    assert done.returncode == 0
    assert table(folder) == {"memcheck": ("skipped", "compute-sanitizer is not installed here")}


# --- what the tests' words select ---

COLLECT = """
import sys, pytest
class Names:
    def pytest_collection_finish(self, session):
        print("\\n".join(item.nodeid for item in session.items))
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Names()]))
"""


def names_on_a_gpu(files):
    """Names of the tests that a machine with a GPU would collect from files below tests/.

    Tests run in the places that a machine has (tests/places.py). Here the emulated GPU stands for the real
    one: told of one, the files offer its places, and their names begin with another word.
    """
    found = subprocess.run(
        [sys.executable, "-c", COLLECT, *[f"tests/{file}" for file in files]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"CRYSTAL_CUDA_ON_CPU": "emulated.so"},
    )
    assert found.returncode == 0, found.stderr
    return {
        line.replace("emulated", "cuda") for line in found.stdout.splitlines() if line.startswith("tests/")
    }


def fits(name, words):
    """Whether a name has the words of pytest's -k; `and`, `or`, `not` and brackets are Python's own."""

    def is_there(word):
        return word[0] if word[0] in ("and", "or", "not") else str(word[0] in name)

    return eval(re.sub(r"\w+", is_there, words))


def test_every_selection_selects():
    """The words that choose tests still fit the names that there are, and each choice is of its kind."""
    script = SCRIPT.read_text()
    cuda = names_on_a_gpu(["test_ops.py", "test_sliced_attention.py", "test_kernels.py", "test_corrupt.py"])
    cpu = {name.replace("cuda", "cpu") for name in cuda}
    of = {"CUDA_TESTS": cuda, "SANITIZED": cuda, "DRY_TESTS": cpu}

    chosen = {}
    for variable in ("CUDA_TESTS", "SANITIZED", "DRY_TESTS"):
        words = re.search(rf'^{variable}="(.*)"$', script, re.MULTILINE)[1]
        chosen[variable] = {name for name in of[variable] if fits(name.lower(), words)}
    for file in ("test_ops.py", "test_sliced_attention.py", "test_kernels.py", "test_corrupt.py"):
        assert any(file in name for name in chosen["CUDA_TESTS"]), file
        assert file in script
    assert chosen["SANITIZED"] < chosen["CUDA_TESTS"] and chosen["DRY_TESTS"]
    assert not any("on_the_cpu" in name for name in chosen["CUDA_TESTS"])
    for operator in ("vocab_kl_ce", "attn_slice", "attn_scores", "attn_align"):
        assert any(operator in name for name in chosen["SANITIZED"]), operator


def test_the_sanitizers_filter_fits_every_kernel():
    """compute-sanitizer looks at kernels with `crystal` in their mangled names: that of the namespace."""
    kernels = [path for path in ROOT.glob("csrc/*.cu") if "__global__" in path.read_text()]
    assert kernels
    for path in kernels:
        text = path.read_text()
        assert 0 <= text.find("namespace crystal {") < text.find("__global__"), path.name


# --- what on_gpu.py judges ---


def judge(*argv):
    """on_gpu.py's command -> what it ends with: 0, or what it says."""
    try:
        on_gpu.main([str(word) for word in argv])
    except SystemExit as end:
        # A text, even an empty one, is exit code 1.
        return 0 if end.code in (0, None) else end.code
    return 0


@pytest.mark.parametrize(
    "cases, passes, line",
    [
        (
            "<testcase name='a'/><testcase name='b'><skipped/></testcase>",
            True,
            "1 passed, 0 failed, 1 skipped",
        ),
        ("<testcase name='b'><skipped/></testcase>", False, "0 passed, 0 failed, 1 skipped"),
        ("", False, "0 passed, 0 failed, 0 skipped"),
        (
            "<testcase name='c'><failure/></testcase><testcase name='d'><error/></testcase>",
            False,
            "0 passed, 2 failed, 0 skipped",
        ),
    ],
    ids=["one passed", "all skipped", "none selected", "all failed"],
)
def test_a_selection_in_which_nothing_passed_fails(tmp_path, capsys, cases, passes, line):
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert (judge("counted", tmp_path / "junit.xml") == 0) == passes
    assert f">> {line}\n" in capsys.readouterr().out
    assert judge("counted", tmp_path / "none.xml") == "pytest left no report"


def write_runs(folder, losses):
    """A metrics.jsonl of these losses for every method."""
    lines = [{"loss": loss, "peak_memory_gb": 0.5 + i, "tokens_per_s": 10.0} for i, loss in enumerate(losses)]
    for method in on_gpu.METHODS:
        (folder / method).mkdir(parents=True)
        (folder / method / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# The CPU's losses are 3, 1, 1: of a difference d the first is d / 4, the others d / 2.
@pytest.mark.parametrize(
    "losses, says",
    [
        ([3.04, 1.02, 1.0], ""),  # 0.01 and a mean of 0.0067
        ([3.4, 1.0, 1.0], "off by 1.0e-01 at update 1, by 3.3e-02 on average"),
        ([3.0, 1.4, 1.8], "off by 0.0e+00 at update 1, by 2.0e-01 on average"),
        ([2.6, 1.0, 1.0], "off by 1.0e-01 at update 1"),  # below is as bad as above
        ([3.0, 1.0, float("nan")], "off by 0.0e+00 at update 1, by nan on average"),
        ([3.0, 1.0], "2 updates, and 3 on the CPU"),
    ],
    ids=["near", "first", "later", "below", "nan", "short"],
)
def test_curves_are_held_to_the_tolerance(tmp_path, capsys, monkeypatch, losses, says):
    monkeypatch.setattr(on_gpu, "TOLERANCE", {"float32": (1e-9, 1e-9), "bfloat16": (0.05, 0.1)})
    cpu, half, single = folders = [tmp_path / name for name in ("cpu", "bfloat16", "float32")]
    for folder, values in zip(folders, ([3.0, 1.0, 1.0], losses, [3.0, 1.0, 1.0])):
        write_runs(folder, values)
    ended = judge("curves", "--cpu", cpu, "--gpu", half, single, "--out", tmp_path / "t.json")
    if not says:
        assert ended == 0
        row = json.loads((tmp_path / "t.json").read_text())["rows"][0]
        assert (row["method"], row["dtype"]) == ("sft", "bfloat16")
        assert (row["peak_memory_gb"], row["tokens_per_s"]) == (2.5, 10.0)
        assert row["off_at_1"] == pytest.approx(0.01) and row["off_on_average"] == pytest.approx(0.02 / 3)
        assert row["largest_off"] == pytest.approx(0.01)
        line = "sft 3.0000 1.0000 1.0000 3.0400 1.0200 1.0000 1.0e-02 6.7e-03 1.0e-02 2.500"
        assert line in " ".join(capsys.readouterr().out.split())
        return
    for method, line in zip(on_gpu.METHODS, ended.splitlines(), strict=True):
        assert line.startswith(f"{method}, bfloat16: ") and says in line


def test_curves_without_runs_fail(tmp_path):
    ended = judge("curves", "--cpu", tmp_path, "--gpu", tmp_path / "float32", "--out", tmp_path / "t.json")
    assert ended.splitlines()[0] == "sft, float32: 0 updates, and 0 on the CPU"


def test_times_name_what_is_missing(tmp_path, capsys):
    ours = {"forward_ms": 1.0, "backward_ms": 2.0, "share_of_floor": 0.5, "peak_bytes": 3e6}
    rows = [
        {"operator": "vocab", "peer": "compiled"} | ours,
        {"operator": "vocab", "peer": "eager", "times_ours": 4.0},
        {"operator": "vocab", "peer": "Liger", "cannot_run": "no"},
        {"operator": "slice", "peer": "eager", "times_ours": 4.0},
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    assert judge("times", tmp_path / "bench.json", "vocab") == 0
    line = "1.000 + 2.000 ms, 50% of the floor, peak 3.0 MB; times ours: eager 4.00, Liger did not run"
    assert capsys.readouterr().out == f">> vocab     {line}\n"
    assert judge("times", tmp_path / "bench.json", "vocab,slice,align") == "not measured: slice, align"
    assert judge("times", tmp_path / "none.json", "vocab") == "not measured: vocab"


def test_every_method_is_trained_alike_on_both_sides(monkeypatch, tmp_path):
    """One command for each method that there is, with what was asked for; a failure is one."""
    asked, codes = [], {"livr": 3}

    def run(command, stdout, stderr, env):
        asked.append(command)
        return subprocess.CompletedProcess(command, codes.get(command[command.index("--method") + 1], 0))

    monkeypatch.setattr(on_gpu.subprocess, "run", run)
    flags = ["train", "--device", "cpu", "--dtype", "bfloat16", "--updates", 7, "--scenes", "scenes"]
    flags += ["--out", tmp_path / "runs"]
    assert judge(*flags) == 1
    methods = {path.stem for path in (ROOT / "crystal" / "methods").glob("*.py")} - {"__init__"}
    assert {command[command.index("--method") + 1] for command in asked} == methods == set(on_gpu.METHODS)
    from crystal.methods import parse

    for command in asked:
        settings = parse(command[3:])  # every flag is one that the method has
        assert (settings.device, settings.dtype, settings.max_steps) == ("cpu", "bfloat16", 7)
        assert (settings.lora_dropout, settings.eval_every) == (0, 0)
        assert settings.run_dir == tmp_path / "runs" / settings.method
        assert settings.data == f"scenes/train{'.lavit' * (settings.method == 'lavit')}.jsonl"
    codes.clear()
    assert judge(*flags) == 0


def test_without_a_gpu_the_card_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", "")
    assert judge("card", "--device", "cuda", "--out", tmp_path / "card.json") == "torch sees no GPU"
    assert ">> nvidia-smi gave no answer" in capsys.readouterr().out


def test_versions_tell_what_is_missing(monkeypatch, capsys):
    assert judge("versions") == 0 and "torch is built for CUDA" in capsys.readouterr().out
    monkeypatch.setattr(on_gpu, "version_of", lambda package: "" if package in ("pillow", "ninja") else "1")
    assert judge("versions").startswith("missing: pillow; the head of tests/on_gpu.sh")
