#!/usr/bin/env bash
# What a narrow U-ViT needs in a short run: the demo's settings cut to 1,500 steps, compared with each choice undone.
# About 12 minutes on one core. Give the demo's features: bash benchmarks/narrow.sh output/demo/features
set -euo pipefail
export OMP_NUM_THREADS=1
features=${1:?give the feature store of the demo}
out=$(mktemp -d)
run() {
    name=$1
    shift
    uvit train --config shapes --feature_path "$features" --output_dir "$out/$name" \
        --max_steps 1500 --image_logging_steps -1 --disable_tqdm --logging_steps 1500 "$@" >"$out/$name.log"
    uvit evaluate "$out/$name/pipeline" --output_dir "$out/$name/evaluation" --max_prompts 144 --disable_tqdm \
        | awk -v name="$name" '/all attributes|whole prompts/ { printf "%-20s %-15s %s\n", name, $1 " " $2, $3 }'
}
run as_in_the_demo
run v_prediction --prediction_type v_prediction
run narrow_weights --weight_init_std 0.02
run narrow_positions --position_init_std 0.02
