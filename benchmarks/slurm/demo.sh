#!/usr/bin/env bash
# Runs the demo's plan on a SLURM cluster of two nodes and kills one node in the middle of a training. Checks that the plan
# continues, and that its models and fusion equal, byte for byte, those of the same plan on this machine without a cluster.
#
#   benchmarks/slurm/demo.sh FOLDER [--no-requeue] [--set NAME=VALUE ...]    as root; FOLDER must be new
#
# SLURM moves a dead node's runs to the other node, and the plan waits for them. With --no-requeue these runs fail, the plan
# ends with an error, and the script runs the same command again. A smaller demo: --set train_studies=48 --set side=128
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:?a folder for the cluster and both runs}")
shift
[[ ! -e $folder ]] || { echo "demo.sh: $folder already exists; name a new folder" >&2 && exit 1; }
# Without accounting, Snakemake must use squeue; short runs do not need its long initial wait.
engine=(--gpus 0 -- --executor slurm --jobs 4 --slurm-status-command squeue --slurm-init-seconds-before-status-checks 5)
if [[ ${1:-} == --no-requeue ]]; then
    engine+=(--slurm-no-requeue)
    shift
fi
state=$folder/cluster-state plan='' requeued=0
mkdir -p "$folder"

carry_out() { # RUNS [ARGUMENTS...]
    local runs=$1
    shift
    sed "s#runs/demo#$runs#" submissions/demo.yaml >"$runs.submission.yaml"
    .venv/bin/python -m kitlib run submissions/plans/demo.yaml --runs "$runs" --set "inputs=$folder/inputs" \
        --set "truth=$folder/truth" --set "submission=$runs.submission.yaml" "$@"
}

clean_up() {
    # The plan runs as a child of a background shell.
    if [[ -n $plan ]]; then pkill -TERM -P "$plan" && wait "$plan"; fi || true
    benchmarks/slurm/cluster.sh stop "$state"
}

wait_for_file() {
    until [[ -e $1 ]]; do
        kill -0 "$plan" 2>/dev/null || { echo "the plan ended before it wrote $1" >&2 && exit 1; }
        sleep 0.5
    done
}

echo "== on this machine, uninterrupted"
SECONDS=0
carry_out "$folder/alone" "$@" --gpus 0
alone=$SECONDS

echo "== on the cluster"
benchmarks/slurm/cluster.sh start "$state"
trap clean_up EXIT
SECONDS=0
carry_out "$folder/cluster" "$@" "${engine[@]}" &
plan=$!
wait_for_file "$folder/cluster/study/fold0/checkpoints/last.ckpt"
node=$(squeue -h -t R -o "%N %k" | awk '$2 == "rule_study" {print $1}')
[[ -n $node ]] || { echo "the training ended before its node was killed: use more studies (--set train_studies=N)" >&2 && exit 1; }
squeue -h -t R -o "   %k on %N"
benchmarks/slurm/cluster.sh kill "$state" "$node"
killed=$SECONDS
if wait "$plan"; then
    plan='' how="the plan continued by itself"
else
    plan='' how="the same command, run again, continued"
    echo "== running the same command again"
    carry_out "$folder/cluster" "$@" "${engine[@]}"
fi
echo "== $node died after $killed s, in the middle of a training; $how; the cluster took $SECONDS s, this machine alone $alone s"
for job in $(squeue -h -t all -o %i | sort -n); do
    restarts=$(scontrol show job "$job" | grep -o "Restarts=[0-9]*")
    [[ $restarts == Restarts=0 ]] || requeued=$((requeued + 1))
    squeue -h -t all -j "$job" -o "   job %i, %k on %N: %T, $restarts"
done
echo "== $requeued jobs were moved to another node; the training continued at:"
begun=$(tr '\r' '\n' <"$folder/cluster/study/notebook.log" | grep -m1 -o "study fold 0: .*/[0-9]*")
echo "   $begun"
[[ $begun != *" 0/"* ]] || { echo "the training started from the beginning" >&2 && exit 1; }
(cd "$folder/alone" && find . -name weights.safetensors -path '*/bundle/*' && echo ./fuse/fusion.json) | while read -r file; do
    cmp "$folder/alone/$file" "$folder/cluster/$file"
done
echo "== models and fusion are identical, byte for byte"
.venv/bin/python - "$folder"/{alone,cluster}/kernel/working/submission.csv <<'EOF'
import sys

import numpy as np

# Batches depend on how fast images are decoded, and the last digit of a probability depends on its batch.
words, others = (open(path).read().replace(",", " ").split() for path in sys.argv[1:])
differing = [(word, other) for word, other in zip(words, others, strict=True) if word != other]
numbers = np.array(differing, dtype=float).reshape(-1, 2)
np.testing.assert_allclose(*numbers.T, rtol=0, atol=1e-6)
print(f"== the submissions differ in {len(numbers)} of {len(words)} words, by at most {np.ptp(numbers, axis=1).max(initial=0):.0e}")
EOF
