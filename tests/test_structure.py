"""The house stays as it is drawn: layers whose imports point up, one concept a file, each file with its test.

HOUSE lists the files of crystal/ in the order in which a reader goes through them. A file may import from its
own layer, without a circle, and from the layers above it.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = [  # one layer a line: folder (the top level has none), then its files
    [("", "corrupt layout attention_bias attention losses latent_copy feedback lora")],
    [
        (
            "runtime",
            "config renamed plan ops ops_gradients sliced_attention machine distributed shard images "
            "sampling sources fields records data sight silhouettes toy toy_steps named_state checkpoint",
        )
    ],
    [("backbone", "files families attention_functions no_pictures model adapter widths record encoders")],
    [("methods", "sft crystal released livr lavit valr")],
    [("", "opening run_directory generate")],
    [
        (
            "evaluation",
            "scoring benchmarks asking predictions figures interventions carrying reliance gaze latent_space "
            "inside charts page_samples page study",
        ),
        ("serving", "chat door rooms lanes engine endpoint"),
    ],
    [
        (
            "",
            "run planning training_data calibrate train evaluate card verify export visualize serve claims "
            "demo run_study compare bench_cases bench bench_measures bench_rows bench_step __main__",
        )
    ],
]
CRYSTAL = ROOT / "crystal"
LAYERS = [
    [CRYSTAL / folder / f"{stem}.py" for folder, stems in layer for stem in stems.split()] for layer in HOUSE
]
ORDER = [path for layer in LAYERS for path in layer]
SPECIFICATION = LAYERS[0]  # the paper: torch and the standard library alone
SOURCES = sorted(CRYSTAL.rglob("*.py"))


def name(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """[(line, dotted name)] of every import of a file, those inside functions too; a relative one
    begins with a dot.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [
                (node.lineno, "." * node.level + ".".join(filter(None, [node.module, alias.name])))
                for alias in node.names
            ]
    return found


def own(path):
    """[(line, file)] of what a file imports from crystal: `from crystal.methods.sft
    import Method` -> crystal/methods/sft.py.
    """
    found = []
    for line, what in imports(path):
        parts = what.split(".")
        if parts[0] != "crystal":
            continue
        # The longest beginning that is a file: what follows it is a name in that file.
        for n in range(len(parts), 0, -1):
            places = [ROOT.joinpath(*parts[:n]).with_suffix(".py"), ROOT.joinpath(*parts[:n]) / "__init__.py"]
            if there := [place for place in places if place.is_file()]:
                found.append((line, there[0]))
                break
    return found


def layer_of(path):
    """The number of a file's layer, from 0; a package's own file belongs to the folder's."""
    if path.name == "__init__.py":
        path = next(p for p in ORDER if p.parent == path.parent)
    return next(number for number, layer in enumerate(LAYERS) if path in layer)


def foreign(path):
    """[(line, package)] of imports from neither crystal nor the standard library."""
    packages = [(line, what.split(".")[0]) for line, what in imports(path)]
    return [
        (line, package)
        for line, package in packages
        if package not in sys.stdlib_module_names and package != "crystal"
    ]


def test_every_file_has_its_place():
    unplaced = [name(path) for path in SOURCES if path not in ORDER and path.name != "__init__.py"]
    assert not unplaced, f"give {unplaced} a place in HOUSE (and in the README's tree)"
    assert [name(path) for path in ORDER if not path.is_file()] == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path != CRYSTAL / "__init__.py"], ids=name)
def test_imports_point_up(path):
    for line, used in own(path):
        assert used != CRYSTAL / "__init__.py", f"{name(path)}:{line} imports crystal itself"
        assert layer_of(used) <= layer_of(path), (
            f"{name(path)}:{line} imports {name(used)}, which stands in a layer below"
        )


def test_no_layer_has_a_circle():
    seen, done = [], set()

    def visit(path):
        assert path not in seen, " -> ".join(name(p) for p in [*seen[seen.index(path) :], path])
        if path not in done:
            seen.append(path)
            for _, used in own(path):
                if used != path:
                    visit(used)
            seen.remove(path)
            done.add(path)

    for path in SOURCES:
        visit(path)


def test_crystal_imports_nothing_from_what_stands_beside_it():
    for path in SOURCES:
        wrong = [(line, what) for line, what in imports(path) if what.split(".")[0] in ("data_prep", "tests")]
        assert not wrong, f"{name(path)}: {wrong}"


@pytest.mark.parametrize("path", SPECIFICATION, ids=name)
def test_the_specification_needs_torch_alone(path):
    """safetensors in lora.py is the one exception: the format in which PEFT keeps adapters on disk."""
    allowed = {"torch"} | ({"safetensors"} if path.stem == "lora" else set())
    wrong = [(line, package) for line, package in foreign(path) if package not in allowed]
    assert not wrong, f"{name(path)}: (line, package) {wrong}"


def test_only_the_backbone_knows_transformers_modelling():
    """run_directory.py may ask for transformers' version."""
    for path in SOURCES:
        if path.parent == CRYSTAL / "backbone":
            continue
        used = [(line, what) for line, what in imports(path) if what.split(".")[0] == "transformers"]
        assert not used or path == CRYSTAL / "run_directory.py", f"{name(path)}: {used}"
        assert all(what == "transformers" for _, what in used), f"{name(path)}: {used}"
        attributes = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "transformers"
        }
        assert attributes <= {"__version__"}, f"{name(path)} uses transformers.{attributes - {'__version__'}}"


def test_two_files_know_torch_distributed():
    for path in SOURCES:
        if path not in (CRYSTAL / "runtime" / "distributed.py", CRYSTAL / "runtime" / "shard.py"):
            found = re.search(
                r"torch\.distributed|torch import distributed|DistributedDataParallel|nn\.parallel",
                path.read_text(),
            )
            assert not found, (
                f"{name(path)} says {found[0]!r}: that belongs in crystal/runtime/distributed.py, or shard.py"
            )


def test_imports_are_absolute_and_the_package_imports_nothing():
    for path in SOURCES:
        relative = [(line, what) for line, what in imports(path) if what.startswith(".")]
        assert not relative, f"{name(path)}: relative imports {relative}"
    outside = [
        node
        for node in ast.parse((CRYSTAL / "__init__.py").read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not outside, "crystal/__init__.py: importing one file must not import others"


def test_no_module_shadows_the_standard_library():
    """`python crystal/x.py` puts crystal/ first on the path, where crystal/copy.py would be `copy`."""
    names = {p.stem for p in CRYSTAL.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert not names & sys.stdlib_module_names


@pytest.mark.parametrize("path", ORDER, ids=name)
def test_every_file_has_a_test(path):
    stem = path.stem.strip("_")  # __main__.py's is test_main.py
    assert (ROOT / "tests" / f"test_{stem}.py").is_file(), f"{name(path)} has no tests/test_{stem}.py"


def test_no_file_names_a_machine():
    """Paths and package hosts of the machine that a file was written on mean nothing elsewhere."""
    path = r"(?<![\w.>}/-])/(?:work|root|opt|home)(?:/|\b)"
    host = r"(?:index[-_]url|trusted[-_]host|artifactory|\bnexus\b|//\d+\.\d+\.\d+\.\d+)"
    wrong = []
    for file in repository_files():
        if file == Path(__file__).resolve():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, pictures
        for number, line in enumerate(text.splitlines(), 1):
            for found in re.finditer(f"{path}|{host}", line, re.IGNORECASE):
                if "//127.0.0.1" not in found[0]:
                    wrong.append(f"{name(file)}:{number}: {found[0]}")
    assert not wrong, "\n".join(wrong)


def repository_files():
    """What git tracks or would; without git, whatever is not hidden, built or generated."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        files = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        files = [
            p
            for p in ROOT.rglob("*")
            if p.relative_to(ROOT).parts[0] not in (".venv", ".git", "runs", "build", "dist", ".pytest_cache")
        ]
    return [p for p in files if p.is_file()]


def test_the_linter_has_nothing_to_say():
    """`make lint`: the rules and their exceptions stand in pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_operators_sources_are_formatted():
    """`make lint`: Google's style at 110 columns, as .clang-format says; comments are held to 110 here."""
    program = Path(sys.executable).with_name("clang-format")
    sources = [p for p in (ROOT / "csrc").iterdir() if p.suffix in (".cpp", ".h", ".cu")]
    sources += (ROOT / "tests").glob("*.h")
    done = subprocess.run(
        [program, "--dry-run", "-Werror", *sources], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    long = [
        f"{p.name}:{number}"
        for p in sources
        for number, line in enumerate(p.read_text().splitlines(), 1)
        if len(line) > 110
    ]
    assert not long


def is_bool(node):
    """Whether an expression is a comparison, `and`, `or`, or bool(..)."""
    return (
        isinstance(node, (ast.Compare, ast.BoolOp))
        or getattr(getattr(node, "func", None), "id", "") == "bool"
    )


def test_statements_ask_one_thing_at_a_time():
    """No list times a bool, no conditional inside a conditional, no lambda with a name."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{name(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.IfExp):
                parts = (node.body, node.test, node.orelse)
                if any(isinstance(part, ast.IfExp) for part in parts):
                    found.append(f"{where}: a conditional inside a conditional")
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                found.append(f"{where}: a lambda with a name")
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                sides = (node.left, node.right)
                if any(isinstance(x, ast.List) for x in sides) and any(is_bool(x) for x in sides):
                    found.append(f"{where}: a list times a bool")
    assert not found, "\n".join(found)


def test_the_type_checker_has_nothing_to_say(tmp_path):
    """mypy over crystal/: the method contract, batches, the run in Python are annotated."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
