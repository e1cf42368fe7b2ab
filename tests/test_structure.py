"""The house stays as DESIGN.md says: imports point up the list, one file per concept, each with its test.

ORDER is the order in which a reader goes through the files. A module may import from crystal only what stands before it.
"""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPECIFICATION = "config corrupt layout bottleneck attention losses lora".split()  # torch and the standard library alone
ORDER = SPECIFICATION + ("ops latent_copy feedback families model encoders data processes predictions methods checkpoint export generate benchmarks visualize "
                         "reliance evaluate train chat engine serve bench demo compare").split()
METHODS = "sft crystal livr lavit valr".split()  # one may build on those before it
MODULES = {p.stem: p for p in (ROOT / "crystal").glob("*.py") if p.stem != "__init__"}
METHOD_FILES = {p.stem: p for p in (ROOT / "crystal" / "methods").glob("*.py") if p.stem != "__init__"}
SOURCES = sorted((ROOT / "crystal").rglob("*.py"))


def name(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """[(line, dotted name)] of every import of a file, those inside functions too; a relative one begins with a dot."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, "." * node.level + ".".join(filter(None, [node.module, alias.name]))) for alias in node.names]
    return found


def own(path):
    """[(line, parts after `crystal`)] of a file's imports from crystal: `from crystal.methods.sft import Method` -> [methods, sft, Method]."""
    return [(line, what.split(".")[1:]) for line, what in imports(path) if what.split(".")[0] == "crystal"]


def foreign(path):
    """[(line, package)] of imports from neither crystal nor the standard library."""
    packages = [(line, what.split(".")[0]) for line, what in imports(path)]
    return [(line, package) for line, package in packages if package not in sys.stdlib_module_names and package != "crystal"]


def test_every_module_has_its_place():
    unknown = set(MODULES) - set(ORDER)
    assert not unknown, f"crystal/: give {sorted(unknown)} a place in ORDER (and in the README's tree)"
    unknown = set(METHOD_FILES) - set(METHODS)
    assert not unknown, f"crystal/methods/: give {sorted(unknown)} a place in METHODS"
    assert not [p for p in (ROOT / "crystal").rglob("*.py") if p.parent not in (ROOT / "crystal", ROOT / "crystal" / "methods")]


@pytest.mark.parametrize("module", [m for m in ORDER if m in MODULES])
def test_imports_point_up(module):
    allowed = set(ORDER[: ORDER.index(module)])
    for line, parts in own(MODULES[module]):
        assert parts and parts[0] in allowed, f"crystal/{module}.py:{line} imports crystal.{'.'.join(parts)}, which does not stand before it"


@pytest.mark.parametrize("method", ["__init__", *METHOD_FILES])
def test_methods_build_on_concepts_and_on_earlier_methods(method):
    allowed = set(ORDER[: ORDER.index("methods")])
    siblings = set(METHODS[: METHODS.index(method)]) if method in METHODS else set()
    for line, parts in own(ROOT / "crystal" / "methods" / f"{method}.py"):
        fine = parts and (parts[0] in allowed or (parts[0] == "methods" and len(parts) > 1 and parts[1] in siblings))
        assert fine, f"crystal/methods/{method}.py:{line} imports crystal.{'.'.join(parts)}, which does not stand before it"


@pytest.mark.parametrize("module", SPECIFICATION)
def test_the_specification_needs_torch_alone(module):
    """safetensors in lora.py is the one exception: the format in which PEFT keeps adapters on disk."""
    allowed = {"torch"} | ({"safetensors"} if module == "lora" else set())
    wrong = [(line, package) for line, package in foreign(MODULES[module]) if package not in allowed]
    assert not wrong, f"crystal/{module}.py: (line, package) {wrong}"


def test_only_model_knows_transformers_modelling():
    """families.py asks a family's own code; encoders.py loads vision encoders, the one other kind of model; train.py may ask for transformers' version."""
    for path in SOURCES:
        if path in (MODULES["families"], MODULES["model"], MODULES["encoders"]):
            continue
        used = [(line, what) for line, what in imports(path) if what.split(".")[0] == "transformers"]
        assert not used or path == MODULES["train"], f"{name(path)}: {used}"
        assert all(what == "transformers" for _, what in used), f"{name(path)}: {used}"
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text()))
                      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "transformers"}
        assert attributes <= {"__version__"}, f"{name(path)} uses transformers.{attributes - {'__version__'}}"


def test_only_processes_knows_torch_distributed():
    for path in SOURCES:
        if path != MODULES["processes"]:
            found = re.search(r"torch\.distributed|torch import distributed|DistributedDataParallel|nn\.parallel", path.read_text())
            assert not found, f"{name(path)} says {found[0]!r}: that belongs in crystal/runtime/distributed.py"


def test_imports_are_absolute_and_the_package_is_empty():
    for path in SOURCES:
        relative = [(line, what) for line, what in imports(path) if what.startswith(".")]
        assert not relative, f"{name(path)}: relative imports {relative}"
    assert not (ROOT / "crystal" / "__init__.py").read_text().strip(), "crystal/__init__.py: importing one file must not import others"


def test_no_module_shadows_the_standard_library():
    """`python crystal/x.py` puts crystal/ first on the path: crystal/copy.py would be found instead of copy."""
    names = {p.stem for p in (ROOT / "crystal").iterdir() if p.is_dir() or p.suffix == ".py"}
    assert not names & sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_test(module):
    assert (ROOT / "tests" / f"test_{module}.py").is_file(), f"crystal/{module}.py has no tests/test_{module}.py"


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
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        files = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        files = [p for p in ROOT.rglob("*") if p.relative_to(ROOT).parts[0] not in (".venv", ".git", "runs", "build", "dist", ".pytest_cache")]
    return [p for p in files if p.is_file()]
