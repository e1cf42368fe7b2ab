"""Installs crystal: `pip install --no-build-isolation -e .` (or `make setup`, which
also makes the environment). The distribution is called crystal-latents, the package crystal. Where torch or a
compiler is missing, as torch is where pip builds in isolation, the operators are left out.

`python setup.py build_ext --inplace` builds the compiled operators of csrc/ into crystal/_C.so, and into
crystal/_C_cuda.so where nvcc is; neither a GPU nor the network is needed, torch may be a CPU build. Both use
LibTorch's stable ABI, and no Python ABI at all: one build serves torch 2.10 and later, and every Python. What
is built is said in one line. Environment:

    CRYSTAL_CUDA   auto (default): the CUDA part where nvcc is found; 1: build it or fail; 0: leave it out
    CXX, NVCC      the compilers, where they are not on the path
    MAX_JOBS       how many compilers run side by side; as many as ninja likes without it
    TORCH_CUDA_ARCH_LIST   GPUs to build for, as torch's extensions read it: "8.6;9.0+PTX"
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WORK = "build/csrc"  # objects, ninja's file, nvcc's logs with the register report
GPUS = "80", "86", "90"  # A100, A40, H100; later ones compile the last one's PTX when they load it
# A file *_simd.cpp is compiled once for each vector width; the operators choose among them at run time.
WIDTHS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
}
TORCH_TARGET = "0x020a000000000000"  # 2.10


def compiler(variable, names):
    """$variable where it is set, else the first of names; None if there is no such program."""
    own = os.environ.get(variable, "")
    if own:
        return own if shutil.which(own.split()[0]) else None
    return next((path for name in names if (path := shutil.which(name))), None)


def wants_cuda(nvcc):
    """CRYSTAL_CUDA and what is there -> (build it?, why)."""
    choice = os.environ.get("CRYSTAL_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"CRYSTAL_CUDA={choice}: choose auto, 1 or 0")
    if choice == "1" and not nvcc:
        sys.exit(
            "CRYSTAL_CUDA=1, but there is no nvcc: install the CUDA toolkit, set NVCC, or leave "
            "CRYSTAL_CUDA at auto"
        )
    if choice == "0" or not nvcc:
        return False, "CRYSTAL_CUDA=0" if choice == "0" else "no nvcc found"
    built, ptx = gpus()
    return True, ", ".join(f"sm_{gpu}" for gpu in built) + (" and PTX" if ptx else "")


def gpus():
    """TORCH_CUDA_ARCH_LIST, or the usual ones -> (GPUs to compile for, those whose PTX is kept too)."""
    asked = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked == [""]:
        return list(GPUS), [GPUS[-1]]
    found = [re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", word) for word in asked]
    said = f"TORCH_CUDA_ARCH_LIST={' '.join(asked)}"
    if not all(found):
        sys.exit(f"{said}: compute capabilities are wanted, as in 8.6;9.0+PTX")
    numbers = ["".join(match.groups()[:3]) for match in found]
    if any(int(match[1]) < 8 for match in found):
        sys.exit(f"{said}: the kernels need compute capability 8.0 or more")
    return numbers, [number for number, match in zip(numbers, found) if match[4]]


def jobs():
    """MAX_JOBS as ninja's flag; nothing where it is not set."""
    most = os.environ.get("MAX_JOBS", "")
    if most and not (most.isdigit() and int(most)):
        sys.exit(f"MAX_JOBS={most}: a number of at least 1 is wanted")
    return ["-j", most] if most else []


def steps(out, nvcc):
    """Every command of the build as (kind, output, inputs, {variable: value}); objects first, then what
    is linked from them.
    """
    spec = importlib.util.find_spec("torch")  # without the seconds that its import takes
    torch = Path(spec.submodule_search_locations[0])
    include = shlex.quote(str(torch / "include"))
    common = f"-std=c++17 -O3 -DNDEBUG -DTORCH_TARGET_VERSION={TORCH_TARGET} -Icsrc -I{include}"
    sources = sorted(
        p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").iterdir() if p.suffix in (".cpp", ".cu")
    )
    native = os.uname().machine in ("x86_64", "AMD64")
    found, cpu, cuda = [], [], []
    for source in sources:
        stem = f"{WORK}/{Path(source).stem}"
        if source.endswith((".cu", "_cuda.cpp")) and not nvcc:
            continue
        if source.endswith(".cu"):
            found.append(("nvcc", f"{stem}.cu.o", [source], {"flags": common}))
            cuda.append(f"{stem}.cu.o")
        elif source.endswith("_cuda.cpp"):
            found.append(("nvcc", f"{stem}.o", [source], {"flags": common}))
            cuda.append(f"{stem}.o")
        elif source.endswith("_simd.cpp"):
            # Elsewhere the portable one alone.
            for name, flags in WIDTHS.items() if native else [("portable", "")]:
                found.append(
                    ("cxx", f"{stem}.{name}.o", [source], {"flags": f"{common} {flags} -DWIDTH={name}"})
                )
                cpu.append(f"{stem}.{name}.o")
        else:
            found.append(("cxx", f"{stem}.o", [source], {"flags": common}))
            cpu.append(f"{stem}.o")
    # Torch's library is loaded by the time that ours is: no path is recorded.
    libs = f"-L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu"
    found.append(("link", f"{out}/_C.so", cpu, {"libs": libs}))
    if nvcc:
        found.append(("nvlink", f"{out}/_C_cuda.so", cuda, {"libs": libs}))
    return found


def rules(cxx, nvcc):
    """kind -> its command, with ninja's $in, $out, $flags and $libs."""
    built, ptx = gpus()
    targets = [(gpu, f"sm_{gpu}") for gpu in built] + [(gpu, f"compute_{gpu}") for gpu in ptx]
    gencode = " ".join(f"-gencode arch=compute_{gpu},code={code}" for gpu, code in targets)
    warn = "-Wall -Wextra -Wno-psabi -Wno-unused-parameter"
    return {
        "cxx": f"{cxx} -MMD -MF $out.d $flags {warn} -fPIC -fvisibility=hidden -c $in -o $out",
        "link": f"{cxx} -shared $in -o $out $libs",
        # What ptxas says about registers and spills is kept beside the object: a test reads it.
        "nvcc": f"{nvcc} -MMD -MF $out.d $flags {gencode} --threads 2 -Xptxas -v "
        "-Xcompiler -fPIC,-fvisibility=hidden -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        # With CUDA's runtime inside it loads beside any torch.
        "nvlink": f"{nvcc} -shared $in -o $out $libs",
    }


def build(out):
    """Brings out/_C.so and out/_C_cuda.so up to date and prints one line about them. Compile
    errors end the program.
    """
    cxx, nvcc = (
        compiler("CXX", ("g++", "c++", "clang++")),
        compiler("NVCC", ("nvcc", "/usr/local/cuda/bin/nvcc")),
    )
    cuda, why = wants_cuda(nvcc)
    lacks = None
    if not cxx:
        lacks = "no C++ compiler (g++, or CXX)"
    elif not importlib.util.find_spec("torch"):
        lacks = "no torch (which pip install --no-build-isolation lets the build see)"
    if lacks:
        if os.environ.get("CRYSTAL_CUDA") == "1":
            sys.exit(f"CRYSTAL_CUDA=1, but there is {lacks}")
        print(f"crystal: {lacks} found, compiled operators not built; plain PyTorch serves instead")
        return
    if not cuda:
        nvcc = None
        (ROOT / out / "_C_cuda.so").unlink(missing_ok=True)  # an older build's would not fit
    todo, commands = steps(out, nvcc), rules(cxx, nvcc)
    (ROOT / WORK).mkdir(parents=True, exist_ok=True)
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    # The environment's own first: a distribution's may be too old.
    ninja = compiler("NINJA", (Path(sys.executable).with_name("ninja"), "ninja"))
    if ninja:
        text = f"ninja_required_version = 1.3\nbuilddir = {WORK}\n" + "".join(
            f"rule {kind}\n command = {command}\n"
            + (" depfile = $out.d\n deps = gcc\n" if "-MF" in command else "")
            for kind, command in commands.items()
        )
        for kind, output, inputs, variables in todo:
            text += f"build {output}: {kind} {' '.join(inputs)}\n" + "".join(
                f" {name} = {value}\n" for name, value in variables.items()
            )
        (ROOT / WORK / "build.ninja").write_text(text)
        ran = subprocess.run(
            [ninja, "--quiet", *jobs(), "-f", f"{WORK}/build.ninja"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        done = ran.returncode
        if done or "warning" in ran.stdout:
            print(ran.stdout, file=sys.stderr)
    else:  # everything anew, in the same order

        def run(step):
            kind, output, inputs, variables = step
            command = commands[kind].replace("$in", " ".join(inputs)).replace("$out", output)
            for name, value in variables.items():
                command = command.replace(f"${name}", value)
            return subprocess.run(command, shell=True, cwd=ROOT).returncode

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            done = max(pool.map(run, [step for step in todo if "link" not in step[0]])) or max(
                map(run, [step for step in todo if "link" in step[0]])
            )
    if done:
        sys.exit(
            "crystal: the compiled operators could not be built (messages above); CRYSTAL_CUDA=0 leaves "
            "the CUDA part out, "
            "and without any of them plain PyTorch serves"
        )
    print(
        "crystal: compiled operators ready for "
        f"CPU{f' and CUDA ({why})' if cuda else f'; not for CUDA ({why})'}"
    )


class Build(build_ext):
    def run(self):
        inplace = self.inplace or getattr(self, "editable_mode", False)
        build("crystal" if inplace else os.path.relpath(Path(self.build_lib) / "crystal", ROOT))

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """The operators use no Python ABI: one wheel of a platform serves every Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("crystal._C", sources=[])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
