#!/usr/bin/env bash
# Trains the models compared in benchmarks/README.md, on the folders made by layouts.py: train.sh SQUEEZENET.npz
# At most two detectors train side by side, one per core.
set -euo pipefail
source=$(realpath "$1")
cd "$(dirname "$0")/../.."
weights=$PWD/runs/real/squeezenet.safetensors yolo_weights=$PWD/runs/real/squeezenet_yolo.safetensors
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD KIT_BACKBONES=benchmarks.real.squeezenet,benchmarks.real.squeezenet_yolo
run() { .venv/bin/papermill --no-progress-bar --log-level WARNING "notebooks/$1.ipynb" "runs/real/$2.ipynb" -y "$3"; }
convert() { .venv/bin/python benchmarks/real/squeezenet_weights.py "$@"; }
mkdir -p runs/real

convert keras "$source" "$weights"
for dataset in rsna nih; do
  run 10_prepare "10_$dataset" "{dataset: $dataset, competition: inputs/real/$dataset, run_folder: real/$dataset,
    longest_side: 512, duplicate_distance: -1}"
done
run 20_pretrain_backbone 20_nih "{prepare_run: real/nih, run_folder: real/backbone, model_name: nih, folds: [0, 1, 2, 3, 4],
  overrides: {backbone: squeezenet1_1, channels: 1, starting_weights: $weights, hidden: 256, optimizer: adamw,
  learning_rate: 0.0003, weight_decay: 0.01, warmup_epochs: 1.0, epochs: 8, batch_size: 16, schedule_every: 0}}"
convert yolo runs/real/backbone/fold0 "$yolo_weights"

common="backbone: squeezenet1_1, image_size: 160, inference_size: 0, keep: last, epochs: 8, batch_size: 8, nominal_batch: 0,
  optimizer: adamw, weight_decay: 0.01, warmup_epochs: 1.0, horizontal_flip: 0.5, vertical_flip: 0.0,
  brightness_contrast: 0.2, max_detections: 50"
faster_rcnn="learning_rate: 0.0005, schedule_every: 0, fpn_channels: 64, box_hidden: 128, box_samples: 64, proposals: 100,
  rotate_degrees: 0.0, turn_p: 0.0, sharpen_p: 0.0, blur_p: 0.0, cutouts: 0, shift: 0.0"
yolo="learning_rate: 0.001, width: 0.5, zoom: 0.2, mosaic: 0.0, mixup: 0.0, norm_momentum: 0.1"
for family in faster_rcnn yolo; do
  for start in scratch nih; do
    case ${family}_$start in
      faster_rcnn_nih) from=real/backbone/fold0 ;;
      yolo_nih) from=$yolo_weights ;;
      *) from="" ;;
    esac
    run 40_train_detector "40_${family}_$start" "{prepare_run: real/rsna, run_folder: real/${family}_$start,
      model_name: ${family}_$start, recipe: heidelberg_$family, folds: [0, 1, 2, 3, 4],
      overrides: {$common, ${!family}, starting_weights: \"$from\"}}" &
  done
  wait
  .venv/bin/python benchmarks/real/compare.py --prepared runs/real/rsna "runs/real/${family}_scratch" "runs/real/${family}_nih"
done
