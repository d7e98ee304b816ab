#!/usr/bin/env bash
# What a narrow U-ViT needs in a short run on the published path: 1,500 steps, compared with each choice undone.
# About 12 minutes on one core. Give the demo's features: bash benchmarks/narrow.sh output/demo/features
set -euo pipefail
export OMP_NUM_THREADS=1
features=${1:?give the feature store of the demo}
out=$(mktemp -d)
settings=(--uvit_config_file uvit_shapes --weight_init_std 0.06 --position_init_std 0.5 --train_text_encoder
    --text_encoder_layers 1 --prediction_type sample --per_device_train_batch_size 16 --learning_rate 0.001
    --lr_scheduler_type linear --warmup_steps 100 --weight_decay 0.01 --adam_beta2 0.99 --max_grad_norm 1
    --ema_decay 0.995 --dataloader_num_workers 0)
run() {
    name=$1
    shift
    uvit train "${settings[@]}" --feature_path "$features" --output_dir "$out/$name" \
        --max_steps 1500 --image_logging_steps -1 --disable_tqdm --logging_steps 1500 "$@" >"$out/$name.log"
    uvit evaluate "$out/$name/pipeline" --output_dir "$out/$name/evaluation" --max_prompts 144 --disable_tqdm \
        | awk -v name="$name" '/all attributes|whole prompts/ { printf "%-20s %-15s %s\n", name, $1 " " $2, $3 }'
}
run all_three
run v_prediction --prediction_type v_prediction
run narrow_weights --weight_init_std 0.02
run narrow_positions --position_init_std 0.02
