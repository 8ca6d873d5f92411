#!/usr/bin/env bash
# Repeats FLANNEL's experiment on nearly its own data, in one or two hours on two CPU cores: five small learners on whole images,
# one on patches of the lungs, two shortcut probes; each image is judged by models and ensembles that have not seen its fold.
# First: PYTHONPATH=. .venv/bin/python benchmarks/real/covid_layouts.py --data DATA --out inputs/real
#   and: benchmarks/real/lungs.sh, whose UNet finds the lungs
# Then:  bash benchmarks/real/flannel.sh SQUEEZENET, the file with SqueezeNet's ImageNet weights
# With a GPU and weights files for the five published networks, use the plan submissions/plans/flannel.yaml instead.
set -euo pipefail
source=$(realpath "$1")
cd "$(dirname "$0")/../.."
runs=$PWD/runs/small_flannel weights=$PWD/runs/small_flannel/squeezenet.safetensors
mkdir -p "$runs/executed"
export PYTHONPATH=$PWD KIT_BACKBONES=benchmarks.real.squeezenet
.venv/bin/python benchmarks/real/squeezenet_weights.py keras "$source" "$weights"

notebook() { # NOTEBOOK NAME PARAMETERS
  OMP_NUM_THREADS=1 .venv/bin/papermill "notebooks/$1.ipynb" "$runs/executed/$2.ipynb" --no-progress-bar -y "$3"
}

common="placement: stretch, batch_size: 16, keep: last"
epochs=6 folds="[0, 1, 2]" outer="[0, 1, 2]" lungs="''"
learner() { # NAME OVERRIDES [RECIPE]
  notebook 25_train_classifier "$1" "{prepare_run: $runs/prepare, lungs_run: $lungs, run_folder: $runs/$1, model_name: $1, \
recipe: ${3:-small_learner}, folds: $folds, outer_folds: $outer, in_sample: true, epochs: $epochs, overrides: {$common, $2}}"
}

notebook 10_prepare prepare "{dataset: kermany, competition: $PWD/inputs/real/chest-xray-pneumonia, \
pool: {covid_chestxray: $PWD/inputs/real/covid-chestxray}, classes: flannel, n_folds: 3, longest_side: 256, run_folder: $runs/prepare}"
notebook 14_apply_lungs lungs "{prepare_run: $runs/prepare, segmenter: $PWD/runs/lungs/unet_v7/fold0, run_folder: $runs/lungs}"

squeezenet="backbone: squeezenet1_1, channels: 3, starting_weights: $weights"
{ learner squeezenet "$squeezenet, learning_rate: 0.0005"
  learner lcnet "backbone: lcnet_035"
  epochs=12 outer="[0]" lungs=$runs/lungs
  learner patched "$squeezenet, learning_rate: 0.0005, image_size: 64, canvas: 256, patches: 9, validation_patches: 2" small_patches
} &
{ learner efficientnet ""
  learner vit "backbone: test_vit, learning_rate: 0.001"
  learner squeezenet_frozen "$squeezenet, frozen_backbone: true, hidden: 128, image_size: 128"
  outer="[]" folds="[0]"  # no ensemble is fitted to a probe
  learner border "probe: border"
  lungs=$runs/lungs
  learner outside_lungs "probe: outside_lungs, lungs: masks"
} &
wait -n
wait
notebook 65_ensemble ensemble "{prepare_run: $runs/prepare, run_folder: $runs/ensemble, \
runs: [$runs/squeezenet, $runs/lcnet, $runs/efficientnet, $runs/vit, $runs/squeezenet_frozen]}"
report="prepare_run: $runs/prepare, published: [flannel], lungs_run: $runs/lungs"
notebook 85_classification_report report "{$report, run_folder: $runs/report, runs: [$runs/ensemble], \
probes: [$runs/border, $runs/outside_lungs], heat_runs: [$runs/squeezenet]}"
# The patches were only predicted for the first outer fold; this report judges all models on these images.
notebook 85_classification_report report_patched "{$report, run_folder: $runs/report_patched, runs: [$runs/ensemble, $runs/patched]}"
