#!/usr/bin/env bash
# Everything that a GPU is wanted for, within ten minutes: benchmarks/gpu.sh OUTPUT_FOLDER
#
# Tests, comparisons with fla-core (if python finds it: put its wheel on PYTHONPATH), lengths, launch settings, crossovers.
# Each part has a limit and a log of its own; what fails or runs late does not stop the next. PYTHON names the interpreter.
# The package's own tables are left alone: the tuned ones are written into the folder.
set -uo pipefail

out=${1:?usage: benchmarks/gpu.sh OUTPUT_FOLDER}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -d)}
began=$SECONDS

# part NAME SECONDS COMMAND...: run it under its limit, with its output in NAME.log
part() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    [ "$status" -eq 124 ] && status="out of time"
    echo "$name: $((SECONDS - start)) s, status $status" | tee -a "$out/summary.log"
}

# Compile what the timed parts need, many at once: the timed parts then find machine code in the cache. What other programs'
# run-time tuning concluded meanwhile, on a busy card, is thrown away.
compile_ahead() {
    local shares=4 operators
    operators=$("$python" -m benchmarks --list | awk '$1 ~ /^(chunk|fused|parallel)_|_step/ { print $1 }' | sort -u)
    for operator in $operators; do
        "$python" -m benchmarks --only "^$operator " --sections rows --ways eager --seconds 0.01 &
    done
    for ((i = 0; i < shares; i++)); do
        "$python" -m benchmarks.tuning.kernels --compile-only "$i/$shares" --limit 100 &
    done
    wait
}

: >"$out/summary.log"
part about 30 bash -c "nvidia-smi; $python -m pip list"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: nothing was measured" | tee -a "$out/summary.log"
    exit 1
fi

# Triton 3.4 to 3.7.0 miscompiled a gated gradient of this kind on Hopper. If ours is wrong, no other number counts.
gated_gradient() {
    "$python" -c 'import torch, triton; print("Triton", triton.__version__, "on", torch.cuda.get_device_name())'
    "$python" -m pytest -q -p no:cacheprovider tests/contract/test_numbers.py -k "simple_gla and cuda and ragged"
}
export -f gated_gradient
export python
part gated_gradient 60 bash -c gated_gradient
head -n 1 "$out/gated_gradient.log" | tee -a "$out/summary.log"

export -f compile_ahead
part ahead 120 bash -c compile_ahead &
part tests 150 "$python" -m pytest -q -n "${WORKERS:-6}" -k cuda --continue-on-collection-errors -p no:cacheprovider
wait
find "$TRITON_CACHE_DIR" -name '*.autotune.json' -delete

part bench 190 "$python" -m benchmarks --seconds 0.4 --sections rows,overhead,sweep --limit 170 --json "$out/cuda.json" --plots "$out"
part first_call 25 "$python" -m benchmarks --only '^(chunk_simple_gla|simple_gla_step_) ' --sections first-call --json "$out/first_call.json"
part crossovers 45 "$python" -m benchmarks.tuning.crossovers --seconds 0.02 --longest 512 --results "$out" --table "$out/crossovers.json"
part tune 130 "$python" -m benchmarks.tuning.kernels --limit 115 --table "$out/launch.json" --json "$out/tune.json"

echo "all: $((SECONDS - began)) s" | tee -a "$out/summary.log"
tar -czf "$out/everything.tar.gz" -C "$out" --exclude=everything.tar.gz .
grep -hE 'FAILED|Error' "$out"/*.log | sort | uniq -c | sort -rn | head -20
exit 0
