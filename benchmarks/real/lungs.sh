#!/usr/bin/env bash
# Trains the three published networks on manual masks of real X-rays, at sizes that take two CPU cores an hour or two.
# First: PYTHONPATH=. .venv/bin/python benchmarks/real/lungs.py --data DATA --out runs/lungs
# With a GPU: FULL=1 bash benchmarks/real/lungs.sh, which trains the published sizes on all folds.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=$PWD/runs/lungs
mkdir -p "$runs/executed"

segment() { # RUN SET RECIPE FOLDS ALSO_ON OVERRIDES
  .venv/bin/papermill notebooks/12_segment_lungs.ipynb "$runs/executed/$1.ipynb" --no-progress-bar \
    -y "{prepare_run: $runs/$2, run_folder: $runs/$1, recipe: $3, model_name: $1, folds: [$4], also_on: [$5], overrides: {$6}}"
}

v7_also="$runs/kermany, $runs/shenzhen"
if [ -n "${FULL:-}" ]; then
  segment unet_v7 v7 unet_lungs "0, 1, 2, 3, 4" "$v7_also" ""
  segment resunet_v7 v7 resunet_lungs "0, 1, 2, 3, 4" "$v7_also" ""
  segment fc_densenet_v7 v7 fc_densenet103_lungs "0, 1, 2, 3, 4" "$v7_also" "structures: [lungs]"
  segment unet_kermany kermany unet_lungs "0, 1, 2, 3, 4" "$runs/v7, $runs/shenzhen" ""
else
  # For all three: small canvases, few epochs, smaller rotations. `width` is the share of the published channels.
  small="image_size: 96, epochs: 20, batch_size: 8, rotate_degrees: 15.0, turn_p: 1.0, shift: 0.0, horizontal_flip: 0.0"
  segment unet_v7 v7 unet_lungs "0, 1, 2, 3, 4" "$v7_also" "$small, width: 0.5, learning_rate: 0.002" &
  { segment fc_densenet_v7 v7 fc_densenet103_lungs "0, 1" "$v7_also" \
      "$small, width: 0.25, learning_rate: 0.001, structures: [lungs]"
    segment resunet_v7 v7 resunet_lungs "0, 1" "$v7_also" "$small, width: 0.25, scale_y: [1.0, 1.0]"
    segment unet_kermany kermany unet_lungs "0" "$runs/v7, $runs/shenzhen" "$small, width: 0.5, learning_rate: 0.002"
  } &
  wait
fi
