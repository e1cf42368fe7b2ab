"""What the documents say is true: every block runs and prints what stands under it, every path and
command they name exists.

A page's python blocks run in order in one namespace, in a process of their own, from the root of the
repository. A `text` block right after a python block is what that block prints. A line `...` in it stands for
any number of lines. Under a fence that says `text approximately` numbers may differ and lines be left out;
words may not differ.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_structure import ORDER, SPECIFICATION

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
INDEX = ROOT / "tutorials" / "README.md"
TREE = ROOT / "tutorials" / "tree.md"
PAGES = [README, *sorted((ROOT / "tutorials").glob("*.md"))]
CODE = {".py", ".md", ".cpp", ".cu", ".h", ".toml", ".ini", ".sh"}  # suffixes of the repository's own files
# May as well be a user's.
DATA = {".json", ".jsonl", ".txt", ".png", ".jpg", ".safetensors", ".log", ".jinja"}
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"

# Runs the blocks that it reads, and writes what each printed; the error of the last stands in "error".
RUNNER = """
import contextlib, io, json, sys, traceback
page, blocks, out = sys.argv[1], json.load(sys.stdin), []
namespace = {"__name__": "__main__"}
for line, code in blocks:
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile("\\n" * (line - 1) + code, page, "exec"), namespace)
    except BaseException as problem:
        first = next((f.lineno for f in traceback.extract_tb(problem.__traceback__) if f.filename == page), line)
        error = f"line {first}\\n" + "".join(traceback.format_exception(problem))
    out.append([printed.getvalue(), error])
    if error:
        break
print("\\n@@" + json.dumps(out))
"""  # noqa: E501


def fences(text):
    """[(info string, line of its first line, content, does it follow the block before directly)] of
    a page's fenced blocks.
    """
    blocks, end = [], 0
    for found in re.finditer(r"^```([^\n`]*)\n(.*?)^```[ ]*$", text, re.DOTALL | re.MULTILINE):
        directly = bool(blocks) and not text[end : found.start()].strip()
        blocks.append((found[1].strip(), text[: found.start()].count("\n") + 2, found[2], directly))
        end = found.end()
    return blocks


def prose(text):
    """The page without its fenced blocks, its lines where they were."""
    return re.sub(
        r"^```.*?^```[ ]*$", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    )


def agrees(expected, printed, approximately):
    """Whether a page's `expected` is what was `printed`. Approximately: its lines occur there in
    this order, numbers aside.
    """

    def tidy(text):
        lines = [line.rstrip() for line in text.strip("\n").split("\n")]
        return [" ".join(re.sub(NUMBER, "#", line).split()) for line in lines] if approximately else lines

    any_lines = r"(?:.*\n)*"
    between = any_lines if approximately else ""
    pattern = between + "".join(
        (any_lines if line == "..." else re.escape(line) + "\n") + between for line in tidy(expected)
    )
    return re.fullmatch(pattern, "\n".join(tidy(printed)) + "\n") is not None


def name(path):
    return path.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=name)
def test_blocks_run_and_print_what_the_page_says(page):
    blocks = fences(page.read_text())
    python = [i for i, (info, *_) in enumerate(blocks) if info == "python"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        [sys.executable, "-c", RUNNER, name(page)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        input=json.dumps([blocks[i][1:3] for i in python]),
    )
    assert "\n@@" in run.stdout, (
        f"{name(page)}: the page ended its process (exit code {run.returncode})\n{run.stdout}\n{run.stderr}"
    )
    results = json.loads(run.stdout.rpartition("\n@@")[2])
    for i, (printed, error) in zip(python, results):
        assert not error, f"{name(page)}: the block at line {blocks[i][1]} failed at {error}"
        info, line, expected, directly = blocks[i + 1] if i + 1 < len(blocks) else ("", 0, "", False)
        if directly and info.split()[:1] == ["text"]:
            assert info in ("text", "text approximately"), (
                f"{name(page)}:{line - 1}: a fence is `text` or `text approximately`, not {info!r}"
            )
            assert agrees(expected, printed, "approximately" in info), (
                f"{name(page)}:{line}: the page says\n{expected}\nand the block prints\n{printed}"
            )


def test_tutorials_carry_their_number_and_stand_in_the_index():
    index = INDEX.read_text()
    for page in (ROOT / "tutorials").glob("*.md"):
        if page.name[0].isdigit():
            assert page.read_text().startswith(f"# {page.name[:2]}. "), page.name
            assert "```bash" not in page.read_text(), f"{page.name}: a notebook would run it; say shell"
        assert page == INDEX or f"]({page.name})" in index, f"tutorials/README.md does not name {page.name}"


def test_a_page_runs_by_its_number(tmp_path):
    """The page's own blocks, in its order; a number that no page has lists them all."""
    run = [sys.executable, str(ROOT / "tutorials" / "run.py")]
    done = subprocess.run([*run, "01"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [
        content
        for info, _, content, _ in fences((ROOT / "tutorials" / "01_corruption.md").read_text())
        if info == "text"
    ]
    assert expected and all(text in done.stdout for text in expected)
    listed = subprocess.run([*run, "99"], cwd=tmp_path, capture_output=True, text=True)
    assert (
        listed.returncode == 2
        and "  13. The two paths" in listed.stdout
        and len(listed.stdout.splitlines()) == 17
    )


def test_the_eight_files_are_as_long_as_the_readme_says():
    """To a tenth, so that not every change of a line is one of the README."""
    said = re.findall(r"\| \[`(\w+\.py)`\]\(crystal/\1\) \| (\d+) \|", README.read_text())
    assert [file for file, _ in said] == [path.name for path in SPECIFICATION]
    for file, lines in said:
        real = len((ROOT / "crystal" / file).read_text().splitlines())
        assert abs(int(lines) - real) <= real / 10, f"README.md: {file} has {real} lines, not {lines}"


@each_page
def test_paths_exist(page):
    """Paths in backticks, in prose, and links. Those below runs/ are made by commands, and path/to/ stands
    for the reader's own.
    """
    for number, line in enumerate(prose(page.read_text()).split("\n"), 1):
        for code in re.findall(r"`([^`]+)`", line):
            for word in code.split():
                path = word.split("::")[0].strip("\"'.,")
                parts = Path(path).parts
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", path) or parts[0] in ("runs", "path"):
                    continue
                ours = (
                    Path(path).suffix in CODE
                    or ((Path(path).suffix in DATA or path.endswith("/"))
                    and (ROOT / parts[0]).exists())
                )
                assert not ours or (ROOT / path).exists(), f"{name(page)}:{number}: no such file: {path}"
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", line):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{name(page)}:{number}: broken link: {target}"


@each_page
def test_commands_exist(page, capsys, monkeypatch):
    for info, line, content, _ in fences(page.read_text()):
        if info in ("bash", "sh", "shell", "console"):
            for command in commands(content):
                try:
                    check(command, capsys, monkeypatch)
                except AssertionError as error:
                    raise AssertionError(
                        f"{name(page)}, block at line {line}: `{shlex.join(command)}`: {error}"
                    ) from None


def commands(block):
    """The simple commands of a shell block, as lists of words."""
    for line in block.replace("\\\n", " ").split("\n"):
        words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        command = []
        for word in [*words, ";"]:
            if set(word) <= set("&|;"):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"\w+=.*", word):  # settings of the environment come first
                command.append(word)


def check(command, capsys, monkeypatch):
    """Asserts that what a command names is there: make's targets, modules, scripts, and their flags."""
    program, words = Path(command[0]).name, command[1:]
    if program == "make":
        for word in words:
            if not word.startswith("-") and "=" not in word:
                assert re.search(rf"^{re.escape(word)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
                    f"the Makefile has no target {word}"
                )
        return
    if not re.fullmatch(r"python[\d.]*|torchrun|pytest", program):
        return
    while words and words[0] != "-m" and words[0].startswith("-"):  # torchrun's own, or the interpreter's
        words = words[1:]
    if not words or program == "pytest":
        return
    if words[0] == "-m":
        module, words = words[1], words[2:]
        if module.split(".")[0] not in ("crystal", "data_prep"):
            return
        file = ROOT / (module.replace(".", "/") + ".py")
    else:
        file, words = ROOT / words[0], words[1:]
    assert file.is_file(), f"no such file: {name(file)}"
    flags = {word.split("=")[0] for word in words if word.startswith("--")} - {"--help"}
    if flags and file.name != "setup.py":  # whose flags are setuptools'
        # Which has flags of its own.
        method = [words[i : i + 2] for i, word in enumerate(words) if word == "--method"]
        known = flags_of(
            name(file).removesuffix(".py").replace("/", "."),
            capsys,
            monkeypatch,
            *method[0] if method else (),
        )
        if file.stem == "compare":  # hands on what it does not know
            known |= flags_of("crystal.train", capsys, monkeypatch)
        assert flags <= known, f"{name(file)} has no {', '.join(sorted(flags - known))}"


HELP = {}


def flags_of(module, capsys, monkeypatch, *method):
    """Every flag that an entry point's --help lists; asked once, in this process. method: ("--method", its
    name) of a training command.
    """
    if module != "crystal.train" or "".join(method).endswith(".py"):
        method = ()
    key = " ".join((module, *method))
    if key not in HELP:
        monkeypatch.setattr(sys, "argv", [module, *method, "--help"])
        monkeypatch.setattr(sys, "path", list(sys.path))  # scripts put the repository's root first
        with pytest.raises(SystemExit):
            importlib.import_module(module).main()
        HELP[key] = capsys.readouterr().out
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", HELP[key]))


ENTRIES = [
    p
    for folder in ("crystal", "data_prep")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__"' in p.read_text()
]


@pytest.mark.parametrize("module", [name(p).removesuffix(".py").replace("/", ".") for p in ENTRIES])
def test_help_is_readable(module, capsys, monkeypatch):
    """argparse takes a % in a help text for a format, and may print its own insides."""
    assert flags_of(module, capsys, monkeypatch)
    assert "option_strings" not in HELP[module], f"{module}: a % in a help text must be doubled"


# --- the tree ---


def tree():
    """{path: line number} of the tree's page: two spaces a level, then names (x.py, x.md,
    x/), then a comment.
    """
    info, line, content, _ = fences(TREE.read_text())[0]
    found, above = {}, []
    for number, row in enumerate(content.rstrip("\n").split("\n"), line):
        indent = len(row) - len(row.lstrip(" "))
        assert indent % 2 == 0 and indent // 2 <= len(above), (
            f"tree.md:{number}: indentation is two spaces a level"
        )
        above, names = above[: indent // 2], []
        for word in row.split():
            if not re.fullmatch(r"[\w.]+(?:/|\.\w+)", word):
                break
            names.append(word.rstrip("/"))
        assert names, f"tree.md:{number}: a line of the tree begins with a name"
        found |= {"/".join([*above, entry]): number for entry in names}
        above.append(names[-1])
    return found


def test_tree_lists_what_is_there():
    listed = tree()
    for path, number in listed.items():
        assert (ROOT / path).exists(), f"tree.md:{number}: no such file: {path}"
    there = [
        p
        for folder, kind in (("crystal", "**/*.py"), ("data_prep", "**/*.py"), ("tutorials", "*.md"))
        for p in sorted((ROOT / folder).glob(kind))
        if p.stem != "__init__"
    ]
    missing = [name(p) for p in there if name(p) not in listed]
    assert not missing, f"tree.md: the tree leaves out {', '.join(missing)}"


def test_tree_is_in_the_order_of_reading():
    listed = [path for path in tree() if path.startswith("crystal/") and path.endswith(".py")]
    assert listed == [name(path) for path in ORDER], (
        "tree.md: the tree's order is not tests/test_structure.py's HOUSE"
    )


# --- the checks themselves ---


@pytest.mark.parametrize(
    "expected, printed, exactly, approximately",
    [
        ("a 1.0\n", "a 1.0\n", True, True),
        ("a 1.0\n", "a 1.5e-3\n", False, True),
        ("a 1.0\n", "b 1.0\n", False, False),
        ("a\nb\n", "a\n", False, False),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True, True),
        ("a\n...\nd\n", "a\nd\n", True, True),
        ("a\n...\n", "b\n", False, False),
        ("b\nd\n", "a\nb\nc\nd\n", False, True),
        ("d\nb\n", "a\nb\nc\nd\n", False, False),
        ("a -1\n", "a    23,4\n", False, True),
    ],
)
def test_agrees(expected, printed, exactly, approximately):
    assert agrees(expected, printed, False) == exactly and agrees(expected, printed, True) == approximately


@pytest.mark.parametrize(
    "command, problem",
    [
        ("make dmeo", "no target dmeo"),
        ("make demo METHOD=sft", ""),
        ("python -m crystal.trian", "no such file"),
        ("python crystal/train.py --max_stepz 3", "has no --max_stepz"),
        ("torchrun --nproc_per_node=4 crystal/train.py --max_steps 2 --no-resume", ""),
        ("A=1 .venv/bin/python -m crystal.evaluate --latents drop && make nothing", "no target nothing"),
        ("python data_prep/toy.py --out x \\\n  --trian 3", "has no --trian"),
        ("python -m pip install -e . # python -m crystal.nothing", ""),
    ],
)
def test_check(command, problem, capsys, monkeypatch):
    problems = []
    for words in commands(command):
        try:
            check(words, capsys, monkeypatch)
        except AssertionError as error:
            problems.append(str(error))
    assert len(problems) == bool(problem) and problem in "".join(problems)
