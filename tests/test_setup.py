"""setup.py: what is built for which GPUs, by how many, and what the packages hold."""

import importlib.util
import re
import subprocess
import sys
import tarfile
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
    project = setuptools.Distribution({"name": "crystal", "ext_modules": script.asked["ext_modules"]})
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
    assert sources <= names and "crystal/assets/tiny/config.json" in names and "setup.py" in names
