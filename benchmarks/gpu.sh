#!/usr/bin/env bash
# Measures a CUDA machine in ten minutes: its hardware and packages, the kit's tests in both half precisions, waits for the GPU,
# every named recipe, speed, two processes, and phantoms from training to a submission. Works with or without internet.
#
#   bash benchmarks/gpu.sh            on a GPU, the most valuable part first, in less than nine minutes
#   bash benchmarks/gpu.sh --small    the smallest size, which takes minutes on a CPU, too
#
# If a part fails or hangs, the others still run. Exit status 1 if any part failed. Environment variables (defaults):
#   OUT           folder of the results: a table, and a log per part (runs/gpu)
#   WHEELS        folder of wheels of packages that this machine lacks, see benchmarks/gpu/wheels.txt (none)
#   PYTHON        the Python to use (.venv/bin/python if it exists, else python3)
#   LIMIT         seconds for all parts together (530)
#   PARTS         list of the parts, in a folder with their scripts (benchmarks/gpu/parts.txt)
set -uo pipefail
{  # bash reads the whole block before it runs it, so the file may be edited while it runs
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-runs/gpu} LIMIT=${LIMIT:-530} PARTS=${PARTS:-benchmarks/gpu/parts.txt}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$OUT"
awk '/^[^#]/ { sub(/-.*/, "", $1); print $1 }' "$PARTS" | while read -r name; do rm -f "$OUT/$name.log"; done
table=$OUT/table.md scratch=$(mktemp -d) failed=0 child=
grace=5  # seconds between SIGTERM and SIGKILL
export PYTHONUNBUFFERED=1
# As on Kaggle's T4s: a newer GPU would choose bfloat16 and not show the problems of float16.
export KIT_PRECISION=${KIT_PRECISION:-16-mixed}

finish() {
    [ -n "$child" ] && kill "$child" 2>/dev/null && wait "$child"
    rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 143' TERM INT

row() { echo "| $1 | $2 | $3 | $4 |" | tee -a "$table"; }

{ echo "| part | result | seconds | figures |"; echo "|---|---|---|---|"; } | tee "$table"

if [ -n "${WHEELS:-}" ]; then
    # Into a separate folder, which leaves the machine's own packages unchanged.
    if timeout 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" \
        "$WHEELS"/*.whl >"$OUT/wheels.log" 2>&1; then
        rm "$OUT/wheels.log"
    else
        row wheels "failed, see wheels.log" "$SECONDS" "$(tail -n 1 "$OUT/wheels.log")"
        failed=1
    fi
fi
export PYTHONPATH=$scratch/site:$PWD${PYTHONPATH:+:$PYTHONPATH}

while read -r name limit script arguments <&3; do
    case $name in '' | '#'*) continue ;; esac
    remaining=$((LIMIT - SECONDS - grace))
    if [ "$remaining" -lt 1 ]; then
        row "$name" "no time left" 0 ""
        failed=1
        continue
    fi
    [ "$remaining" -lt "$limit" ] && limit=$remaining
    # Parts whose names differ only after a dash share a log, because some machines return only a few files.
    log=$OUT/${name%%-*}.log
    echo "== $name: $script $arguments" >>"$log"
    log_size=$(stat -c %s "$log") start=$SECONDS
    # shellcheck disable=SC2086  # $arguments is split into words on purpose
    timeout --kill-after="$grace" "$limit" "$PYTHON" "$(dirname "$PARTS")/$script" $arguments "$@" >>"$log" 2>&1 3<&- &
    child=$!
    wait "$child"
    code=$? child=
    case $code in
    0) result=ok ;;
    124 | 137) result="stopped after $limit s" ;;
    *) result="failed, exit status $code" ;;
    esac
    [ "$code" = 0 ] || failed=1
    figures=$(tail -c +$((log_size + 1)) "$log" | grep '^figures: ' | tail -n 1)
    row "$name" "$result" $((SECONDS - start)) "${figures#figures: }"
done 3<"$PARTS"
echo "$SECONDS s in total; logs are in $OUT" | tee -a "$table"
exit "$failed"
}
