"""The table of deliberate faults stays true: each text stands once, each named test exists, no file
is without a fault.
"""

import ast
from collections import Counter
from functools import cache

import pytest
from breaks import BREAKS, ROOT

# What holds no behaviour of its own: proofs that are run by hand and print, and files that only name others.
WITHOUT = {
    f"crystal/{folder}__init__.py" for folder in ("", "runtime/", "backbone/", "evaluation/", "serving/")
}


@cache
def functions_of(path):
    """Names of the test functions that a test file defines."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_names_are_unique():
    assert [name for name, count in Counter(fault.name for fault in BREAKS).items() if count > 1] == []


@pytest.mark.parametrize("file", sorted({fault.file for fault in BREAKS}))
def test_faults_can_be_put_in(file):
    for fault in BREAKS:
        if fault.file == file:
            can_be_put_in(fault)


def can_be_put_in(fault):
    """Asserts that a fault's text stands once, that what is put in its place is valid Python, and
    that its test exists.
    """
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.text) == 1, (
        f"{fault.name}: its text stands {text.count(fault.text)} times in {fault.file}"
    )
    assert fault.wrong != fault.text
    if fault.file.endswith(".py"):
        ast.parse(text.replace(fault.text, fault.wrong))  # a syntax error would be noticed by anything

    place, *rest = fault.test.split()[0].split("::")
    assert (ROOT / place).is_file(), f"{fault.name}: there is no {place}"
    if rest:
        assert rest[0].split("[")[0] in functions_of(ROOT / place), f"{fault.name}: {place} has no {rest[0]}"


def test_every_file_has_a_fault():
    sources = [*ROOT.glob("crystal/**/*.py"), *ROOT.glob("data_prep/**/*.py"), *ROOT.glob("csrc/*.cpp")]
    names = {path.relative_to(ROOT).as_posix() for path in sources if not path.stem.endswith("_cuda")}
    assert sorted(names - WITHOUT - {fault.file for fault in BREAKS}) == []
    assert len(BREAKS) >= 150
