#!/usr/bin/env bash
# The demo's plan on a SLURM cluster of two nodes, one of which dies in the middle of a training: the plan is resumed, and its
# submission must be, byte for byte, that of the same plan on this machine without a cluster.
#
#   benchmarks/slurm/demo.sh FOLDER [--set NAME=VALUE ...]    as root; a smaller demo: --set train_studies=48 --set side=128
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:?a folder for the cluster and both runs}")
shift
mkdir -p "$folder"
# Without accounting Snakemake has to ask squeue; and it need not wait long for short runs.
engine=(--gpus 0 -- --executor slurm --jobs 4 --slurm-status-command squeue --slurm-init-seconds-before-status-checks 5)

carry_out() { # RUNS [ARGUMENTS...]
    local runs=$1
    shift
    sed "s#runs/demo#$runs#" submissions/demo.yaml >"$runs.submission.yaml"
    .venv/bin/python -m kitlib run submissions/plans/demo.yaml --runs "$runs" --set "inputs=$folder/inputs" \
        --set "truth=$folder/truth" --set "submission=$runs.submission.yaml" "$@"
}

wait_for_file() {
    until [[ -e $1 ]]; do
        kill -0 "$plan" 2>/dev/null || { echo "the plan ended before there was $1" >&2; exit 1; }
        sleep 0.5
    done
}

echo "== on this machine, uninterrupted"
SECONDS=0
carry_out "$folder/alone" "$@"
alone=$SECONDS

echo "== on the cluster"
benchmarks/slurm/cluster.sh start "$folder/cluster-state"
trap 'benchmarks/slurm/cluster.sh stop "$folder/cluster-state"' EXIT
SECONDS=0
carry_out "$folder/cluster" "$@" "${engine[@]}" &
plan=$!
wait_for_file "$folder/cluster/study/fold0/checkpoints/last.ckpt"
node=$(squeue -h -t R -o "%N %k" | awk '$2 == "rule_study" {print $1}')
benchmarks/slurm/cluster.sh kill "$folder/cluster-state" "$node"
killed=$SECONDS
if wait "$plan"; then
    how="the running plan went on by itself: SLURM gave the dead node's runs to the other"
else
    carry_out "$folder/cluster" "$@" "${engine[@]}"
    how="the same command went on"
fi
echo "== $node died after $killed s, in the middle of a training; $how; the cluster took $SECONDS s, this machine alone $alone s"
for job in $(squeue -h -t all -o %i | sort -n); do
    echo "   $(squeue -h -t all -j "$job" -o "%k on %N: %T"), $(scontrol show job "$job" | grep -o "Restarts=[0-9]*")"
done
cmp "$folder/alone/kernel/working/submission.csv" "$folder/cluster/kernel/working/submission.csv"
echo "== both submissions are the same, byte for byte"
