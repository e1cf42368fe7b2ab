"""setup.py: what is built for which GPUs, by how many, and what the packages hold."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch):
    """setup.py as a module, which sets nothing up, and what it asked setuptools for."""
    asked = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    spec = importlib.util.spec_from_file_location("crystal_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.asked = asked
    return module


@pytest.mark.parametrize(
    "listed, built, ptx",
    [
        ("", ["80", "86", "90"], ["90"]),
        ("8.6", ["86"], []),
        ("8.6;9.0a+PTX", ["86", "90a"], ["90a"]),
        (" 8.0, 12.0+PTX ", ["80", "120"], ["120"]),
    ],
)
def test_gpus_are_those_of_torchs_variable(script, monkeypatch, listed, built, ptx):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert script.gpus() == (built, ptx)
    command = script.rules("g++", "nvcc")["nvcc"]
    assert command.count("-gencode") == len(built) + len(ptx)
    assert all(f"code=sm_{gpu} " in command for gpu in built)
    assert all(f"code=compute_{gpu} " in command for gpu in ptx)
    monkeypatch.setenv("CRYSTAL_CUDA", "auto")
    assert (" and PTX" in script.wants_cuda("nvcc")[1]) == bool(ptx)


@pytest.mark.parametrize("listed, words", [("Ampere", "as in 8.6;9.0+PTX"), ("7.5", "8.0 or more")])
def test_gpus_that_are_none_are_one_line(script, monkeypatch, listed, words):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST={listed}: .*{re.escape(words)}"):
        script.gpus()


def test_jobs(script, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert script.jobs() == []
    monkeypatch.setenv("MAX_JOBS", "3")
    assert script.jobs() == ["-j", "3"]
    for wrong in ("0", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(SystemExit, match=f"MAX_JOBS={wrong}: a number"):
            script.jobs()


def test_a_wheel_serves_every_python_of_its_platform(script):
    project = setuptools.Distribution({"name": "crystal-latents", "ext_modules": script.asked["ext_modules"]})
    wheel = script.asked["cmdclass"]["bdist_wheel"](project)
    wheel.ensure_finalized()
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none") and platform.startswith("linux_")


def test_the_source_distribution_can_be_built_from(tmp_path):
    """Every file of csrc/, and the assets that the package ships."""
    done = subprocess.run(
        [
            sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "sdist",
            "--dist-dir", str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    others = {"crystal/assets/tiny/config.json", "setup.py", "tests/oracle.py", "data_prep/toy.py"}
    others |= {"crystal/assets/page/page.js", "crystal/assets/page/page.css"}
    assert sources | others <= names and not any(name.endswith((".so", ".pyc")) for name in names)


@pytest.mark.parametrize(
    "without, words", [("torch", "no torch (which pip"), ("compiler", "no C++ compiler (g++, or CXX)")]
)
def test_without_torch_or_a_compiler_no_operators_are_built_and_it_is_said(
    script, monkeypatch, capsys, without, words
):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None if without == "torch" else name)
    monkeypatch.setattr(script, "compiler", lambda variable, names: None if without == "compiler" else "g++")
    monkeypatch.setattr(script, "steps", lambda *_: pytest.fail("something is built"))
    monkeypatch.setenv("CRYSTAL_CUDA", "0")
    script.build("nowhere")
    said = capsys.readouterr().out
    assert words in said and said.endswith("compiled operators not built; plain PyTorch serves instead\n")

    monkeypatch.setenv("CRYSTAL_CUDA", "1")
    monkeypatch.setattr(script, "wants_cuda", lambda nvcc: (True, "sm_80"))
    with pytest.raises(SystemExit, match=f"CRYSTAL_CUDA=1, but there is {re.escape(words)}"):
        script.build("nowhere")


def test_the_oldest_versions_that_are_tested_are_those_that_are_promised():
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    tested = (ROOT / "requirements-oldest.txt").read_text().splitlines()
    lowest = {}
    for line in promised:
        if match := re.match(r"(\w+)>=([\d.]+)", line):
            lowest[match[1]] = match[2]
    assert lowest.keys() == {"torch", "transformers"}
    for name, version in lowest.items():
        assert f"{name}=={version}.0" in tested
    files = re.search(r"^QUICK = (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert len(files) > 5 and all((ROOT / "tests" / f"test_{stem}.py").is_file() for stem in files)


def test_only_crystal_is_installed():
    """Every package of crystal/, and none of a name that others may have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent for path in (ROOT / "crystal").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == packages
    assert project["project"]["scripts"] == {"crystal-latents": "crystal.__main__:main"}


INSTALLED = """
import importlib.metadata, subprocess, sys, sysconfig
from pathlib import Path
import crystal
from crystal.runtime import ops
home = Path(sysconfig.get_path("purelib"))
assert Path(crystal.__file__).is_relative_to(home), crystal.__file__
assert not (home / "data_prep").exists() and not (home / "tests").exists()
assert importlib.metadata.version("crystal-latents") == crystal.__version__
print(ops.choice()[2])
print(crystal.open("tiny", device="cpu").answer(None, "How many legs has a cat?"))
program = Path(sys.executable).with_name("crystal-latents")
print(subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip())
"""


def test_a_wheel_installs_into_an_environment_of_its_own_and_runs(tmp_path):
    """Built from a copy, in which nothing but the sources lies; what it depends on is this environment's."""
    source = tmp_path / "source"
    listed = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("crystal", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in listed:
        shutil.copy2(ROOT / name, source)
    if (ROOT / "build" / "csrc").is_dir():  # what is compiled already need not be again
        shutil.copytree(ROOT / "build" / "csrc", source / "build" / "csrc")

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    environment = os.environ | {"CRYSTAL_CUDA": "0", "CRYSTAL_OPS": "auto", "PYTHONPATH": ""}
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(tmp_path), str(source)]
    done = subprocess.run([*pip, *build], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("crystal_latents-*-py3-none-linux_*.whl")

    venv.create(tmp_path / "own", with_pip=False)
    python = tmp_path / "own" / "bin" / "python"
    put = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run([*pip, *put], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    (home,) = (tmp_path / "own" / "lib").glob("python3*/site-packages")
    (home / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run(
        [python, "-c", INSTALLED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    operators, answer, version = done.stdout.splitlines()
    assert answer and version == "0.1.0"
    compiled = shutil.which(os.environ.get("CXX", "g++")) is not None
    assert ("compiled" in operators) == compiled, operators
