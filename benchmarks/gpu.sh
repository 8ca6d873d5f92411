#!/usr/bin/env bash
# Spends a GPU's ten minutes: what is there, the kit's own tests in both half precisions, waits, every named recipe, speed, two
# processes, and phantoms from training to a submission. For any CUDA machine, with internet or without.
#
#   bash benchmarks/gpu.sh            on a GPU, the most valuable part first, in less than nine minutes
#   bash benchmarks/gpu.sh --small    the smallest size, which a CPU ends in minutes, too
#
# A part that fails or hangs costs no other. Exits with 1 if any did not end well. From the environment:
#   OUT           folder of the results, a table and a log a part (runs/gpu)
#   WHEELS        folder of wheels of what this machine lacks, see benchmarks/gpu/wheels.txt (none)
#   PYTHON        (.venv/bin/python where there is one, else python3)
#   LIMIT         seconds for everything (530)
#   PARTS         list of the parts, in a folder with their scripts (benchmarks/gpu/parts.txt)
set -uo pipefail
{  # read whole before it begins, so that it may be edited while it runs
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-runs/gpu} LIMIT=${LIMIT:-530} PARTS=${PARTS:-benchmarks/gpu/parts.txt}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$OUT"
awk '/^[^#]/ { sub(/-.*/, "", $1); print $1 }' "$PARTS" | while read -r name; do rm -f "$OUT/$name.log"; done
table=$OUT/table.md scratch=$(mktemp -d) failed=0 child=
grace=5  # seconds from asking a part to end until it is killed
export PYTHONUNBUFFERED=1
# What Kaggle's T4s compute in; a newer GPU would choose bfloat16, and never meet its faults.
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
    # Beside the machine's own packages, which stay as they are.
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
    left=$((LIMIT - SECONDS - grace))
    if [ "$left" -lt 1 ]; then
        row "$name" "no time left" 0 ""
        failed=1
        continue
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    # Parts whose names differ after a dash share a log: what is fetched from a machine may be limited to a few files.
    log=$OUT/${name%%-*}.log
    echo "== $name: $script $arguments" >>"$log"
    before=$(stat -c %s "$log") began=$SECONDS
    # shellcheck disable=SC2086  # arguments are words
    timeout --kill-after="$grace" "$limit" "$PYTHON" "$(dirname "$PARTS")/$script" $arguments "$@" >>"$log" 2>&1 3<&- &
    child=$!
    wait "$child"
    code=$? child=
    case $code in
    0) result=ok ;;
    124 | 137) result="stopped at its $limit s" ;;
    *) result="failed, exit status $code" ;;
    esac
    [ "$code" = 0 ] || failed=1
    figures=$(tail -c +$((before + 1)) "$log" | grep '^figures: ' | tail -n 1)
    row "$name" "$result" $((SECONDS - began)) "${figures#figures: }"
done 3<"$PARTS"
echo "$SECONDS s in all; logs in $OUT" | tee -a "$table"
exit "$failed"
}
