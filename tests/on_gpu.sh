#!/usr/bin/env bash
# Shows in one go, offline and in at most eight minutes, what has to be seen first on a machine with a GPU.
#
#     tests/on_gpu.sh FOLDER                    logs and JSON go to FOLDER; the last lines say what passed
#     tests/on_gpu.sh FOLDER --wheels DIR       first installs the wheels in DIR, for this run alone
#     tests/on_gpu.sh FOLDER --dry              without a GPU: every part that can be tried there, smaller
#     tests/on_gpu.sh FOLDER --only card,build  these parts alone
#     PYTHON=python3.12 tests/on_gpu.sh ..      another Python than python3
#
# The machine has Linux, Python 3.11 or newer with torch and numpy, g++ and nvcc. What else crystal needs may
# come as wheels. A connected machine makes them, in the repository's root, here for Python 3.12 (35 MB):
#
#     pip download --only-binary=:all: --python-version 3.12 --dest wheels \
#         --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
#         $(grep -E '^(transformers|safetensors|pillow|ninja|tqdm|pytest|pytest-xdist|setuptools|wheel)=' \
#           requirements.txt)
#     rm wheels/numpy-*    # the machine's own, which fits its torch, stays
#
# Wheels win over what the machine has. Of a machine that has most of it, wheels of what it lacks are enough.
#
# A part has a time limit of its own, and the next one begins whatever became of it. Exit code 0: none failed.
#
#     packages     wheels installed, versions
#     card         name, driver, clocks, bandwidth of a copy, best matrix products
#     scenes       toy scenes, and what LaViT's teacher sees in them (on the CPU, beside the build)
#     build        the compiled operators for CPU and CUDA
#     cpu_train    50 updates of every method on the CPU, float32, plain PyTorch (beside build and tests)
#     tests        the suite's CUDA part; a test that finds no GPU fails
#     gpu_train    50 updates of every method on the GPU, bfloat16 and float32, compiled operators
#     bench        every operator against plain PyTorch and its other peers
#     kernels      what each version of the kernels takes
#     memcheck     compute-sanitizer on every operator, forward and backward: memory accesses
#     racecheck    the same: races in shared memory
#     curves       the losses of gpu_train against those of cpu_train; peak memory
#     step         a whole update of Qwen2.5-VL-7B's widths, method by method
#     peers        bench with torch.compile and FlexAttention too: these take longest, so they come last
set -uo pipefail

PARTS="packages card scenes build cpu_train tests gpu_train bench kernels memcheck racecheck curves step peers"

# Seconds that each part may take. All of them together would be too much: the budget for the whole binds too.
declare -A LIMIT=(
    [packages]=60 [card]=60 [scenes]=120 [build]=180 [cpu_train]=240 [tests]=130 [gpu_train]=90
    [bench]=80 [kernels]=30 [memcheck]=75 [racecheck]=75 [curves]=20 [step]=190 [peers]=120
)
BUDGET=470

# Tests by words in their names (pytest's -k). The first are all that need a GPU; others emulate one.
CUDA_TESTS="cuda and not on_the_cpu"
SANITIZED="test_values_and_gradients and cuda and (several or ragged) and (float32 or bfloat16)"
DRY_TESTS="test_values_and_gradients and cpu and several and float32"

OPERATORS=vocab,align,slice,frobenius,attention,layer

# ---- what was asked for --------------------------------------------------------------------------------

refuse() {
    echo "on_gpu.sh: $1" >&2
    exit 2
}

FOLDER="" WHEELS="" DRY="" ONLY=$PARTS
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) WHEELS=${2:-}; [ -n "$WHEELS" ] || refuse "--wheels needs a folder"; shift ;;
        --only) ONLY=${2:-}; [ -n "$ONLY" ] || refuse "--only needs parts: $PARTS"; shift ;;
        --dry) DRY=1 ;;
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) refuse "there is no option $1; --help lists them" ;;
        *) FOLDER=$1 ;;
    esac
    shift
done
[ -n "$FOLDER" ] || refuse "say where logs and JSON go: tests/on_gpu.sh FOLDER"
[ -z "$WHEELS" ] || compgen -G "$WHEELS/*.whl" >/dev/null || refuse "--wheels $WHEELS: no wheels there"
ONLY=${ONLY//,/ }
for name in $ONLY; do
    [[ " $PARTS " == *" $name "* ]] || refuse "--only $name: the parts are $PARTS"
done
mkdir -p "$FOLDER" || exit 2
FOLDER=$(cd "$FOLDER" && pwd)
WHEELS=${WHEELS:+$(cd "$WHEELS" && pwd)}
cd "$(dirname "$0")/.." || exit 2
rm -f "$FOLDER/log.txt"  # of an earlier run

WORK=$(mktemp -d)  # what nobody wants to see later: it goes at the end
PYTHON=${PYTHON:-python3}
CORES=$(nproc)
DEVICE=cuda UPDATES=50 SMALL=""
if [ -n "$DRY" ]; then
    # Two cores take longer than a GPU and sixteen of them.
    DEVICE=cpu UPDATES=3 SMALL="--rows 3 --vocab 500 --slice 2,40,6,3,4,2,8 --repeats 3" BUDGET=2400
    for name in $PARTS; do
        LIMIT[$name]=$((6 * LIMIT[$name]))
    done
fi
export FOLDER WHEELS DRY WORK PYTHON CORES DEVICE UPDATES SMALL CUDA_TESTS SANITIZED DRY_TESTS OPERATORS
export PATH="$WORK/site/bin:$PATH:/usr/local/cuda/bin"
export PYTHONPATH="$WORK/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive
export TRITON_CACHE_DIR="$WORK/triton" TORCHINDUCTOR_CACHE_DIR="$WORK/inductor"

# ---- the parts -----------------------------------------------------------------------------------------
# Each is a function that runs in a shell of its own and ends at the first command that fails. What it prints
# is its log; lines that begin with ">> " are shown on the screen too. Exit code 77: it does not apply here,
# and the last line says why.

packages() {
    if [ -n "$WHEELS" ]; then
        "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" --no-deps --no-compile --upgrade \
            --target "$WORK/site" "$WHEELS"/*.whl
    fi
    "$PYTHON" tests/on_gpu.py versions
}

card() {
    "$PYTHON" tests/on_gpu.py card --device "$DEVICE" --out "$FOLDER/card.json"
}

scenes() {
    export CUDA_VISIBLE_DEVICES=""
    "$PYTHON" -m data_prep.toy --out "$WORK/scenes" --train $((8 * UPDATES)) --val 8 --test 8
    "$PYTHON" -m data_prep.lavit_teacher --teacher tiny --data "$WORK/scenes/train.jsonl" --keep all \
        --batch_size 64 --max_new_tokens 8 --dtype float32
}

build() {
    local cuda=1
    if [ -n "$DRY" ] && ! command -v nvcc; then
        echo ">> no nvcc here: the operators for the CPU alone"
        cuda=0
    fi
    CRYSTAL_CUDA=$cuda "$PYTHON" setup.py --quiet build_ext --inplace
    echo ">> built in $SECONDS s on $CORES cores"
}

# Runs pytest with the arguments given, under the program in UNDER where there is one. A selection in which no
# test passed is a failure.
pytest_and_count() {
    local code=0
    OMP_NUM_THREADS=1 ${UNDER:-} "$PYTHON" -m pytest -p no:cacheprovider --tb=short --durations=3 \
        --junitxml "$WORK/junit-$$.xml" "$@" || code=$?
    "$PYTHON" tests/on_gpu.py counted "$WORK/junit-$$.xml"
    return "$code"
}

tests() {
    if [ -n "$DRY" ]; then
        pytest_and_count tests/test_ops.py -k "$DRY_TESTS"
        return
    fi
    # Processes share a GPU well here: most of a test is Python.
    local side_by_side=""
    if "$PYTHON" -c "import xdist"; then
        side_by_side="-n $((CORES < 10 ? CORES : 10)) --dist worksteal"
    fi
    pytest_and_count --require-cuda $side_by_side tests/test_ops.py tests/test_sliced_attention.py \
        tests/test_kernels.py tests/test_corrupt.py -k "$CUDA_TESTS"
}

train() {
    "$PYTHON" tests/on_gpu.py train --device "$1" --dtype "$2" --out "$3" --updates "$UPDATES" \
        --scenes "$WORK/scenes"
}

cpu_train() {
    export CUDA_VISIBLE_DEVICES="" CRYSTAL_OPS=reference
    train cpu float32 "$WORK/cpu"
}

gpu_train() {
    export CRYSTAL_OPS=require
    local code=0
    # TF32 would make of float32 something between the two types.
    NVIDIA_TF32_OVERRIDE=0 train "$DEVICE" float32 "$WORK/float32" &
    train "$DEVICE" bfloat16 "$WORK/bfloat16" || code=1
    wait $! || code=1
    return "$code"
}

curves() {
    "$PYTHON" tests/on_gpu.py curves --cpu "$WORK/cpu" --gpu "$WORK/bfloat16" "$WORK/float32" \
        --out "$FOLDER/training.json"
}

measure() {
    local operators=$1 out=$2 code=0
    shift 2
    CRYSTAL_OPS=require "$PYTHON" -m crystal.bench --device "$DEVICE" --only "$operators" --out "$out" \
        $SMALL "$@" || code=$?
    "$PYTHON" tests/on_gpu.py times "$out" "$operators"
    return "$code"
}

bench() { measure "$OPERATORS" "$FOLDER/bench.json" --no-compile; }

kernels() {
    if [ -n "$DRY" ]; then
        echo "the versions are a GPU's"
        return 77
    fi
    CRYSTAL_OPS=require "$PYTHON" tests/on_gpu.py kernels --out "$FOLDER/kernels.json"
}

step() {
    if [ -n "$DRY" ]; then
        "$PYTHON" -m crystal.bench step --model tiny --device cpu --repeats 1 --out "$FOLDER/step.json"
        return
    fi
    "$PYTHON" -m crystal.bench step --device cuda --lengths 0,2048 --repeats 3 --out "$FOLDER/step.json"
}

peers() {
    if [ -n "$DRY" ]; then
        OPERATORS=vocab  # torch.compile takes a minute for each
    fi
    measure "$OPERATORS" "$FOLDER/peers.json"
}

# Prints where compute-sanitizer is: on the path, beside nvcc, in a toolkit's own folder, or among the wheels.
find_sanitizer() {
    local nvcc beside="" found
    nvcc=$(command -v nvcc) && beside=$(dirname "$(readlink -f "$nvcc")")
    for found in "$(command -v compute-sanitizer)" "$beside/compute-sanitizer" \
            /usr/local/cuda/bin/compute-sanitizer /usr/local/cuda/compute-sanitizer/compute-sanitizer \
            "$WORK"/site/nvidia/*/bin/compute-sanitizer; do
        if [ -x "$found" ]; then
            echo "$found"
            return
        fi
    done
    return 1
}

sanitize() {
    local program
    if ! program=$(find_sanitizer); then
        echo "compute-sanitizer is not installed here"
        return 77
    fi
    "$program" --version
    if [ -n "$DRY" ]; then
        echo "compute-sanitizer is here, a GPU is not"
        return 77
    fi
    # crystal's kernels alone are looked at. A filter that fits none of them would find nothing wrong either.
    if ! grep -h "Compiling entry function" build/csrc/*.cu.o.log | grep crystal >/dev/null; then
        echo "no kernel has crystal in its name, or none was built"
        return 1
    fi
    # torch keeps freed memory, in which an access beyond a tensor goes unseen; without that it is an error.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    UNDER="$program --tool $1 --kernel-name kns=crystal --error-exitcode 9 --print-limit 20"
    # It waits for a program's first use of CUDA, after seconds of Python; by default no more than ten.
    UNDER="$UNDER --report-api-errors no --show-backtrace device --launch-timeout 0"
    pytest_and_count --require-cuda tests/test_ops.py -k "$SANITIZED"
}

memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

# ---- running them --------------------------------------------------------------------------------------

# Runs a part within its limit and the budget. Its log and its line of the table go to WORK.
run() {
    local name=$1 began=$SECONDS reserve=10 limit code=0 result=passed why=""
    if [[ " $ONLY " != *" $name "* ]]; then
        return
    fi
    # The comparison of the curves is short, and much before it was for its sake: seconds are kept for it.
    if [ "$name" = curves ]; then
        reserve=0
    fi
    limit=$((BUDGET - reserve - SECONDS))
    limit=$((limit < LIMIT[$name] ? limit : LIMIT[$name]))
    if [ "$limit" -lt 1 ]; then
        echo "failed 0 no time left" >"$WORK/$name.result"
        return
    fi
    # In the background, because bash hears of a signal while it waits, and not while it runs a command.
    timeout --kill-after 3 "$limit" bash -uo pipefail -ec "$name" >"$WORK/$name.log" 2>&1 </dev/null &
    echo "$! $began" >"$WORK/$name.process"
    wait $! || code=$?
    rm -f "$WORK/$name.process"
    case $code in
        0) ;;
        77) result=skipped why=$(tail -n 1 "$WORK/$name.log") ;;
        124 | 137) result=failed why="stopped at its limit of $limit s" ;;
        *) result=failed why="exit code $code" ;;
    esac
    echo "$result $((SECONDS - began)) $why" >"$WORK/$name.result"
}

# Shows what became of a part, and adds its log to FOLDER's.
tell() {
    local name=$1 log="$WORK/$1.log" result seconds why headline
    if [ ! -f "$WORK/$name.result" ]; then
        return
    fi
    read -r result seconds why <"$WORK/$name.result"
    headline="== $name: $result in $seconds s${why:+ ($why)}"
    echo "$headline"
    if [ ! -f "$log" ]; then
        return
    fi
    sed -n 's/^>> /   /p' "$log"
    if [ "$result" = failed ]; then
        tail -n 15 "$log" | cut -c 1-200 | sed 's/^/   | /'
    fi
    # A sanitizer may have the same thing to say a million times.
    {
        echo "$headline"
        if [ "$(wc -c <"$log")" -gt 2000000 ]; then
            head -c 1000000 "$log"
            printf '\n.. the middle is left out ..\n'
            tail -c 1000000 "$log"
        else
            cat "$log"
        fi
    } >>"$FOLDER/log.txt"
}

# Prints the table, writes it as JSON, and ends the script: exit code 1 where a part failed.
finish() {
    local name result seconds why entries="" line
    local -A count=([passed]=0 [failed]=0 [skipped]=0)
    printf '\n%-12s %-8s %7s\n' part result seconds
    for name in $PARTS; do
        if [ ! -f "$WORK/$name.result" ]; then
            continue
        fi
        read -r result seconds why <"$WORK/$name.result"
        count[$result]=$((count[$result] + 1))
        printf '%-12s %-8s %7s%s\n' "$name" "$result" "$seconds" "${why:+  $why}"
        printf -v line '{"part": "%s", "result": "%s", "seconds": %s, "why": "%s"}' \
            "$name" "$result" "$seconds" "${why//[\"\\]/}"
        entries="${entries:+$entries, }$line"
    done
    echo "[$entries]" >"$FOLDER/parts.json"
    rm -rf "$WORK"
    echo "logs and JSON are in $FOLDER; $SECONDS s"
    echo "${count[passed]} passed, ${count[failed]} failed, ${count[skipped]} skipped"
    [ "${count[failed]}" -eq 0 ]
    exit
}

# Stopped from outside: what still runs is ended, and what is known is told.
stopped() {
    trap - TERM INT
    local name process began
    kill $(jobs -pr) 2>/dev/null  # those first that would begin the next part
    for name in $PARTS; do
        if [ -f "$WORK/$name.process" ]; then
            read -r process began <"$WORK/$name.process"
            kill "$process" 2>/dev/null
            echo "failed $((SECONDS - began)) stopped from outside" >"$WORK/$name.result"
            tell "$name"
        fi
    done
    finish
}

# The test of this script puts parts of its own in the place of these.
if [ -n "${ON_GPU_STUBS:-}" ]; then
    source "$ON_GPU_STUBS"
fi
export -f $PARTS pytest_and_count train measure find_sanitizer sanitize

# ---- in what order -------------------------------------------------------------------------------------
# What is needed first comes first. The GPU has one part at a time, but for the sanitizers, which time
# nothing; what runs on the CPU alone runs beside the parts before its result is needed.

main() {
    trap stopped TERM INT
    for name in packages card; do
        run "$name"
        tell "$name"
    done
    {
        run scenes
        touch "$WORK/scenes.ended"
        run cpu_train
    } &
    beside=$!
    for name in build tests; do
        run "$name"
        tell "$name"
    done
    until [ -f "$WORK/scenes.ended" ]; do
        sleep 0.2
    done
    tell scenes
    for name in gpu_train bench kernels; do
        run "$name"
        tell "$name"
    done
    run memcheck &
    memcheck=$!
    run racecheck
    wait "$memcheck"
    tell memcheck
    tell racecheck
    wait "$beside"
    tell cpu_train
    for name in curves step peers; do
        run "$name"
        tell "$name"
    done
    finish
}

main  # read as a whole before it runs: who edits this file meanwhile does no harm
