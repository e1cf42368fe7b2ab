"""Deliberate faults, each with the test that must notice it.

    python tests/breaks.py                     put every fault in, one at a time, and print what no test noticed
    python tests/breaks.py NAME ..             these alone; a name may end in * (crystal-*)
    python tests/breaks.py --jobs 4 --list     how many run side by side; names only

A suite that passes says little about what it would notice. This table says it: each fault is one that a developer could
make, put into a copy of the repository in place of the right text, and the test that it names must then fail. First every
named test runs on the unbroken copy, because a test that fails anyway notices nothing.

A new concept brings its faults with it. `tests/test_breaks.py` keeps that every text still stands exactly once.
The whole table takes half an hour on two cores; it is no part of `make test`.
"""
import argparse
import fnmatch
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Every test runs in a process of its own, forked from one that has imported the slow libraries, and nothing of crystal.
PROCESSES = multiprocessing.get_context("forkserver")
SLOW = ["pytest", "numpy", "PIL.Image", "safetensors.torch", "torch", "transformers", "transformers.generation.utils",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"]
LIMIT = 600  # seconds for one test; one that hangs has not noticed anything


class Break(NamedTuple):
    """One fault: in `file`, `text` (which stands there once) becomes `wrong`."""
    name: str         # unique; begins with the stem of the file
    file: str         # from the repository's root
    text: str
    wrong: str
    consequence: str  # what would go wrong, for somebody who uses crystal
    test: str         # arguments of pytest that must fail: a node id, or a file and -k


# ---- methods, layout, latent copy, losses, attention (tests/test_oracle.py and the tests of each concept) --------------

METHODS = [
]

# ---- settings: config, model, adapters, families, encoders ------------------------------------------------------------

SETTINGS = [
]

# ---- commands and data preparation ------------------------------------------------------------------------------------

COMMANDS = [
]

# ---- the loop: train, checkpoint, processes ---------------------------------------------------------------------------

LOOP = [
]

# ---- data and corruption ----------------------------------------------------------------------------------------------

DATA = [
]

# ---- measures: evaluation, reliance, benchmarks, the endpoint ---------------------------------------------------------

MEASURES = [
]

# ---- operators: ops.py, csrc's CPU part, setup ------------------------------------------------------------------------

OPERATORS = [
    # ops.py: the choice, the bindings, what backward is given
    Break("ops-default-is-reference", "crystal/ops.py", """os.environ.get("CRYSTAL_OPS", "auto")""", """os.environ.get("CRYSTAL_OPS", "reference")""",
          "Compiled operators run only where somebody asks for them.", "tests/test_ops.py::test_training_reaches_the_operators"),
    Break("ops-reference-is-ignored", "crystal/ops.py", """    if mode == "reference":
        return""", """    if mode == "plain":
        return""", "CRYSTAL_OPS=reference runs the compiled operators.", "tests/test_ops.py::test_training_reaches_the_operators"),
    Break("ops-require-falls-back", "crystal/ops.py", """if problem and mode == "require":""", """if problem and mode == "never":""",
          "A missing build is used as plain PyTorch although compiled operators are required.", "tests/test_ops.py::test_choice_without_the_extension"),
    Break("ops-require-serves-anything", "crystal/ops.py", """        if mode == "require":
            raise""", """        if mode == "never":
            raise""", "Required operators fall back to plain PyTorch for a type that is not compiled.", "tests/test_ops.py::test_what_is_not_served"),
    Break("ops-bf16-not-served", "crystal/ops.py", """CPU = {torch.float64, torch.float32, torch.bfloat16}""", """CPU = {torch.float64, torch.float32}""",
          "bf16 training on a CPU runs without compiled operators.", "tests/test_ops.py::test_served_types"),
    Break("ops-said-at-every-call", "crystal/ops.py", """        _said.append(choice()[2])
        (write or""", """        _said[:] = []
        (write or""", "The choice is not said.", "tests/test_ops.py::test_choice_is_said_once"),
    Break("ops-slice-never-compiled", "crystal/ops.py", """if _wants(bias) or not served("attn_slice", q):
        return attention.attn_slice(""", """if True or not served("attn_slice", q):
        return attention.attn_slice(""", "LaViT and the monitored masses always run the plain slice.", "tests/test_ops.py::test_training_reaches_the_operators"),
    Break("ops-align-never-compiled", "crystal/ops.py", """("mse", "keep")) or _wants(bias)""", """("mse", "keep")) or q.requires_grad""",
          "Training compares plain slices; the operator runs in tests alone.", "tests/test_ops.py::test_training_reaches_the_operators"),
    Break("ops-paths-swapped-gradients", "crystal/ops.py", """return grads[0] if want_int else None, grads[1] if want_cor else None,""",
          """return grads[1] if want_int else None, grads[0] if want_cor else None,""", "Each path's logits get the other path's gradient.", "tests/test_kernels.py::test_vocabulary"),
    Break("ops-gradients-above-swapped", "crystal/ops.py", """for g in (g_int, g_cor, g_kl)]""", """for g in (g_cor, g_int, g_kl)]""",
          "The cross entropies' gradients are exchanged: unnoticed where both weigh the same.", "tests/test_kernels.py::test_vocabulary"),
    Break("ops-teacher-flag-lost", "crystal/ops.py", """key_padding, ctx.teacher_grad = inputs""", """key_padding, _ = inputs
    ctx.teacher_grad = True""", "The detached teacher is moved by eq. 5.", "tests/test_kernels.py::test_align"),
    Break("ops-scale-ignored", "crystal/ops.py", """return q.shape[-1] ** -0.5 if scale is None else scale""", """return q.shape[-1] ** -0.5""",
          "A model's own attention scale is ignored.", "tests/test_kernels.py::test_scores"),
    Break("ops-mse-is-frobenius", "crystal/ops.py", """return total if kind == "frobenius" else total / losses""", """return total if kind != "kl" else total / losses""",
          "mse sums its cells instead of averaging them.", "tests/test_kernels.py::test_align"),
    Break("ops-padding-lost-backward", "crystal/ops.py", """direct, direct.sum(-1), lse, bias, key_padding, *ctx""", """direct, direct.sum(-1), lse, bias, None, *ctx""",
          "The slice's gradient flows to padded keys.", "tests/test_kernels.py::test_slice"),
    Break("ops-through-left-out", "crystal/ops.py", """direct, direct.sum(-1), lse, bias, key_padding, *ctx""", """direct, 0 * direct.sum(-1), lse, bias, key_padding, *ctx""",
          "No gradient goes through the softmax's normaliser.", "tests/test_kernels.py::test_slice"),
    Break("ops-wanted-gradient-dropped", "crystal/ops.py", """return [grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad)]""",
          """return [grad if all(ctx.needs_input_grad[:2]) else None for grad, wanted in zip(grads, ctx.needs_input_grad)]""",
          "Keys without a gradient leave the queries without one.", "tests/test_ops.py::test_combinations"),
    Break("ops-ce-rows-of-the-other-path", "crystal/ops.py", """dtype=torch.bool))[0]""", """dtype=torch.bool))[1]""",
          "Plain fine-tuning's cross entropy is 0.", "tests/test_ops.py::test_tokens_that_cannot_be"),

    # csrc on the CPU
    Break("vocab_kl_ce-label-beyond-the-first-part", "csrc/vocab_kl_ce.cpp", """label < from + count ? label - from : -1""", """label < count ? label - from : -1""",
          "A label beyond the first 16,384 logits has no -1 in its gradient.", "tests/test_kernels.py::test_vocabulary"),
    Break("vocab_kl_ce-first-logit-of-a-part", "csrc/vocab_kl_ce.cpp", """return label >= from &&""", """return (label > from || !from) &&""",
          "The label at the first logit of a part has no -1.", "tests/test_kernels.py::test_vocabulary"),
    Break("vocab_kl_ce-last-part-left-out", "csrc/vocab_kl_ce.cpp", """for (int64_t i = 1; i < parts; ++i) row = merged""", """for (int64_t i = 1; i < parts - 1; ++i) row = merged""",
          "The last part of a row is not in its sum.", "tests/test_kernels.py::test_vocabulary"),
    Break("vocab_kl_ce-kl-everywhere", "csrc/vocab_kl_ce.cpp", """const double g_both = both[n] ? value(g_kl, n) : 0;""", """const double g_both = value(g_kl, n);""",
          "Positions outside the answer get a gradient of the KL.", "tests/test_kernels.py::test_vocabulary"),
    Break("vocab_kl_ce-merged-without-rescaling", "csrc/vocab_kl_ce.h", """return {m, x.s * fx + y.s * fy, m2,""", """return {m, x.s * fx + y.s, m2,""",
          "Parts with another maximum are summed as if they had the same.", "tests/test_kernels.py::test_vocabulary"),
    Break("vocab_kl_ce_simd-second-label", "csrc/vocab_kl_ce_simd.cpp", """narrow(d2 + g.label2, own2);""", """narrow(d2 + g.label, own2);""",
          "The corrupted path's -1 lies at the intact path's label.", "tests/test_kernels.py::test_vocabulary"),
    Break("vocab_kl_ce_simd-tail-not-summed", "csrc/vocab_kl_ce_simd.cpp", """      if (tail) add_two(""", """      if (tail > 1) add_two(""",
          "One logit beyond whole vectors is left out of the sum.", "tests/test_kernels.py::test_vocabulary"),
    Break("simd-store-one-short", "csrc/simd.h", """for (int i = 0; i < n; ++i) p[i] = y[i];""", """for (int i = 0; i + 1 < n; ++i) p[i] = y[i];""",
          "The last logit of a row has no gradient.", "tests/test_kernels.py::test_vocabulary"),
    Break("simd-exponential-coarse", "csrc/simd.h", """template <int DEGREE = 6> static inline vfloat exp""", """template <int DEGREE = 4> static inline vfloat exp""",
          "float32 exponentials have the errors that bfloat16 hides.", "tests/test_ops.py::test_values_and_gradients"),
    Break("common-float-is-double", "csrc/common.h", """case ScalarType::BFloat16: return Float::bf16;""", """case ScalarType::BFloat16: return Float::f16;""",
          "bfloat16 is taken for half precision.", "tests/test_kernels.py::test_scores"),
    Break("widths-portable-everywhere", "csrc/widths.h", """== 256 ? avx2::__VA_ARGS__""", """== 256 ? portable::__VA_ARGS__""",
          "AVX2 machines run the slow copy.", "tests/test_ops.py::test_every_width_runs_its_own_kernels"),
    Break("ops_cpp-width-not-checked", "csrc/ops.cpp", """if (bits) chosen = bits;""", """if (bits) chosen = 128;""", "The width that was chosen is not the one that runs.", "tests/test_ops.py::test_place"),
    Break("attn_glue-row-not-checked", "csrc/attn_glue.h", """STD_TORCH_CHECK(a.rows[i] >= -1 && a.rows[i] < a.L,""", """STD_TORCH_CHECK(a.rows[i] >= -1 && a.rows[i] <= a.L,""",
          "Row L reads and writes behind its head.", "tests/test_ops.py::test_positions_outside_the_sequence"),
    Break("attn_glue-column-not-checked", "csrc/attn_glue.h", """STD_TORCH_CHECK(a.cols[i] >= -1 &&""", """STD_TORCH_CHECK(a.cols[i] >= -2 &&""",
          "Column -2 is taken for padding.", "tests/test_ops.py::test_positions_outside_the_sequence"),
    Break("attn_device-no-trap", "csrc/attn_device.h", """position < -1 || position >= a.L)""", """position < -1 || position > a.L)""",
          "On a GPU row L writes outside its tensor.", "tests/test_ops.py::test_cuda_kernels_on_the_cpu"),
    Break("attn_slice-through-always-dropped", "csrc/attn_slice.cpp", """static_cast<const T*>(x)[i] != 0) return true;""", """static_cast<const T*>(x)[i] != 0) return i > 0;""",
          "Where the first row has a gradient through its normaliser, all rows lose theirs.", "tests/test_kernels.py::test_slice"),
    Break("attn_slice-one-chunk-of-many", "csrc/attn_slice.cpp", """CRYSTAL_WIDTH(attn_add_rows(a, unit, chunks, parts""", """CRYSTAL_WIDTH(attn_add_rows(a, unit, 1, parts""",
          "With several threads the queries' gradient comes from a share of the keys.", "tests/test_kernels.py::test_threads"),
    Break("attn_slice_simd-last-columns", "csrc/attn_slice_simd.cpp", """out[(first + r) * a.K + c + i] =""", """out[(first + r) * a.K + i] =""",
          "Columns beyond the first 72 overwrite the first ones.", "tests/test_kernels.py::test_scores"),
    Break("attn_slice_simd-rows-beyond-a-tile", "csrc/attn_slice_simd.cpp", """s.p[i * wide + r] += direct[(r0 + r) * a.K + c];""", """s.p[i * wide + r] += direct[r * a.K + c];""",
          "Rows beyond the first 224 get the first ones' gradients.", "tests/test_kernels.py::test_scores"),
    Break("attn_slice_simd-repeated-row", "csrc/attn_slice_simd.cpp", """mine[i * a.d + c] += mine[m * a.d + c];""", """mine[i * a.d + c] = mine[m * a.d + c];""",
          "A position that is chosen twice keeps one gradient of two.", "tests/test_ops.py::test_values_and_gradients"),
    Break("attn_tile-causality", "csrc/attn_tile.h", """if (!nobody && T(j) <= q.least) continue;""", """if (!nobody && T(j) <= q.last) continue;""",
          "Rows see keys that lie after them.", "tests/test_kernels.py::test_slice"),
    Break("attn_tile-key-head", "csrc/attn_tile.h", """const int64_t h = g * (a.H / a.G) + (from + r) / a.M,""", """const int64_t h = g + (from + r) / a.M * a.G,""",
          "Query heads are grouped in the wrong order.", "tests/test_kernels.py::test_scores"),
    Break("attn_tile-bias-row", "csrc/attn_tile.h", """m = (q.from + first) % a.M; r < n;""", """m = 0; r < n;""", "Rows beyond a tile get another row's mask.", "tests/test_kernels.py::test_slice"),
    Break("attn_align-chunks-not-added", "csrc/attn_align.cpp", """attn_add_rows(both, unit, chunks, parts""", """attn_add_rows(both, unit, 1, parts""",
          "With several threads frobenius' gradient comes from a share of the keys.", "tests/test_kernels.py::test_threads"),
    Break("attn_align-teacher-moves", "csrc/attn_align.cpp", """unit, chunks, above, kept, teacher_grad,""", """unit, chunks, above, kept, true,""",
          "The detached teacher's keys get a gradient.", "tests/test_kernels.py::test_align"),
    Break("attn_align_simd-columns-beyond-a-tile", "csrc/attn_align_simd.cpp", """if (!p.kl || a.K > KEYS) tile(c);""", """if (!p.kl) tile(c);""",
          "More than 72 columns: the KL compares the last tile with itself.", "tests/test_kernels.py::test_align"),
    Break("attn_align_simd-repeated-column", "csrc/attn_align_simd.cpp", """times[cols[c] - j] += 1;""", """times[cols[c] - j] = 1;""",
          "A column that is chosen twice has half its gradient.", "tests/test_ops.py::test_values_and_gradients"),
    Break("attn_align_simd-hidden-in-one-path", "csrc/attn_align_simd.cpp", """return (x == none) | (y == none);""", """return (x == none) & (y == none);""",
          "A cell hidden in one path alone makes the KL infinite.", "tests/test_kernels.py::test_align"),

    # setup.py: what is built
    Break("setup-no-avx2", "setup.py", """"avx2": "-mavx2 -mfma -mf16c",""", """"avx2": "",""", "The AVX2 copy is the portable one.", "tests/test_ops.py::test_commands_of_the_build"),
    Break("setup-not-optimised", "setup.py", """-std=c++17 -O3 -DNDEBUG""", """-std=c++17 -DNDEBUG""", "Operators are compiled without optimisation.", "tests/test_ops.py::test_commands_of_the_build"),
    Break("setup-no-target-version", "setup.py", """TORCH_TARGET = "0x020a""", """TORCH_TARGET = "0x020b""",
          "The build needs a newer torch than requirements ask for.", "tests/test_ops.py::test_commands_of_the_build"),
    Break("setup-no-h100", "setup.py", """"86", "90"  # A100""", """"86"  # A100""", "No code for an H100.", "tests/test_ops.py::test_commands_of_the_build"),
    Break("setup-width-not-named", "setup.py", """-DWIDTH={name}""", """-DWIDTH=portable""", "Every copy of the kernels calls itself portable.", "tests/test_ops.py::test_commands_of_the_build"),
    Break("setup-cuda-although-0", "setup.py", """if choice == "0" or not nvcc:""", """if not nvcc:""", "CRYSTAL_CUDA=0 builds the CUDA part all the same.", "tests/test_ops.py::test_commands_of_the_build"),
]

BREAKS = METHODS + SETTINGS + COMMANDS + LOOP + DATA + MEASURES + OPERATORS


# ---- putting them in --------------------------------------------------------------------------------------------------

def copy_of_the_repository(to, built):
    """The files that git knows or would know, and what was compiled; with `built` the objects too, so that a rebuild is short."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    compiled = [path.relative_to(ROOT).as_posix() for path in (ROOT / "crystal").glob("*.so")]
    for name in listed.stdout.splitlines() + compiled:
        if (ROOT / name).is_file():  # one that was deleted and not yet committed is listed too
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    if built and (ROOT / "build").is_dir():
        shutil.copytree(ROOT / "build", to / "build", copy_function=shutil.copy2)


def run_test(test, where):
    """Runs pytest with the arguments `test` in a copy -> (its exit code, or None after LIMIT seconds; what it printed)."""
    output = Path(f"{where}.txt")
    process = PROCESSES.Process(target=inside, args=(test.split(), str(where), str(output)))
    process.start()
    process.join(LIMIT)
    late = process.is_alive()
    if late:
        os.killpg(process.pid, signal.SIGKILL)  # with whatever the test has started
        process.join()
    printed = output.read_text(errors="replace")
    output.unlink()
    return None if late else process.exitcode, printed


def inside(arguments, where, output):
    """What the process of one test does: pytest in the folder `where`, all that it prints into a file."""
    os.setsid()
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(where)
    sys.path.insert(0, where)  # before an installed crystal
    os.environ |= {"PYTHONPATH": where, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True

    import pytest
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))


def rebuild(where):
    """Compiles a copy's operators for the CPU -> what went wrong, or nothing."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=where, env=os.environ | {"CRYSTAL_CUDA": "0"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode else ""


def put_in(fault):
    """Puts one fault into a copy and runs its test -> (verdict, seconds, what pytest printed)."""
    started = time.monotonic()
    compiled = fault.file.startswith("csrc/") or fault.file == "setup.py"
    with tempfile.TemporaryDirectory(prefix="break-") as folder:
        where = Path(folder)
        copy_of_the_repository(where, compiled)
        text = (where / fault.file).read_text()
        if text.count(fault.text) != 1:
            return f"its text stands {text.count(fault.text)} times", 0.0, ""
        (where / fault.file).write_text(text.replace(fault.text, fault.wrong))
        if compiled and (problem := rebuild(where)):
            return "does not compile", time.monotonic() - started, problem
        code, printed = run_test(fault.test, where)
    verdict = {0: "NOT NOTICED", 1: "noticed", 2: "noticed", None: "no answer"}.get(code, f"pytest ended with {code}")
    return verdict, time.monotonic() - started, printed


def tests_that_pass(tests, jobs):
    """Runs each test on an unbroken copy -> those that pass; the others are printed."""
    with tempfile.TemporaryDirectory(prefix="unbroken-") as folder:
        copy_of_the_repository(Path(folder), False)
        with ThreadPoolExecutor(jobs) as pool:
            ended = list(pool.map(lambda test: run_test(test, Path(folder)), tests))
    for test, (code, printed) in zip(tests, ended):
        if code != 0:
            print(f"without any fault, {test} ends with {code}:\n{printed}", flush=True)
    return {test for test, (code, _) in zip(tests, ended) if code == 0}


def main():
    parser = argparse.ArgumentParser(description="Puts deliberate faults into a copy and prints which no test notices.")
    parser.add_argument("names", nargs="*", help="faults to put in; all of them if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many run side by side")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--verbose", action="store_true", help="print what pytest printed, too")
    options = parser.parse_args()

    chosen = [fault for fault in BREAKS if not options.names or any(fnmatch.fnmatch(fault.name, name) for name in options.names)]
    if not chosen:
        sys.exit(f"no fault is named {' or '.join(options.names)}; --list prints the names")
    if options.list:
        print("\n".join(f"{fault.name:50} {fault.file}" for fault in chosen))
        return

    os.environ["OMP_NUM_THREADS"] = "1"
    PROCESSES.set_forkserver_preload(SLOW)
    fine = tests_that_pass(list(dict.fromkeys(fault.test for fault in chosen)), options.jobs)
    missed = [fault for fault in chosen if fault.test not in fine]
    noticed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, (verdict, seconds, printed) in zip(chosen, pool.map(put_in, chosen)):
            print(f"{verdict:12} {fault.name:50} {seconds:5.0f} s  {fault.test}", flush=True)
            if options.verbose or verdict not in ("noticed", "NOT NOTICED"):
                print(printed, flush=True)
            if verdict != "noticed":
                missed.append(fault)
            elif fault.test in fine:
                noticed += 1

    print(f"\n{noticed} of {len(chosen)} faults noticed ({100 * noticed / len(chosen):.1f} %)")
    for fault in missed:
        print(f"  not noticed: {fault.name} ({fault.file}): {fault.consequence}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
