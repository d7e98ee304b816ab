#!/usr/bin/env bash
# Two objects and how they stand to each other: "a red circle left of a blue square on a black background".
#
#   bash runs/shapes_two.sh
#
# The built-in images of `shapes:two` as latents, the modern block, Muon, batches of 32: about ten minutes on a CPU core
# that is fast in bfloat16, then a minute to judge 300 of the held-out prompts. docs/ablations.md has figures. Stop it at
# any time; run it again to resume.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${UVIT_SHAPES_TWO_DIR:-$here/output/shapes_two}
# bfloat16 where the CPU has instructions for it; elsewhere float32 is many times as fast. A GPU needs no flag.
settings=(--config shapes --uvit_config_file "$out/model.json")
if grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null; then settings+=(--bf16); fi
mkdir -p "$out"
cat > "$out/model.json" <<'JSON'
{"_class_name": "ModernUViTT2IModel", "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 6,
 "num_attention_heads": 4, "attention_head_dim": 32, "clip_dim": 128, "num_text_tokens": 18}
JSON

for split in train heldout; do
    uvit extract --source shapes:two --split "$split" --resolution 32 --vae_name_or_path shapes \
        --text tokens --model_max_length 18 --output_dir "$out/features"
done
uvit train "${settings[@]}" --max_steps 3300 --per_device_train_batch_size 32 \
    --optim muon --muon_learning_rate 0.002 --learning_rate 0.001 --text_encoder_learning_rate 0.0003 --logit_mean 1.2 \
    --lr_scheduler_type cosine --warmup_steps 0 --warmup_ratio 0.04 --ema_decay 0.998 \
    --feature_path "$out/features" --output_dir "$out/run"
uvit evaluate "$out/run" --prompts shapes:two --metrics attributes --guidance_scale 2 --num_inference_steps 25 \
    --max_prompts 300 --output_dir "$out/evaluation"
