#!/usr/bin/env bash
# From nothing to pictures: the main job, end to end, on built-in data and two CPU cores.
#
#   bash runs/demo.sh          about 7 minutes; ends with prompt accuracy on combinations never trained on
#   bash runs/demo.sh --fast   the same steps in about a minute, too short to learn to draw
#
# Everything lands in output/demo (or $UVIT_DEMO_DIR). Stop it at any moment and run it again: it goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${UVIT_DEMO_DIR:-$here/output/demo}
train_options=()
evaluate_options=()
if [ "${1:-}" = --fast ]; then
    out=$out-fast
    train_options=(--max_steps 60 --warmup_steps 10 --logging_steps 20 --image_logging_steps 60 --num_inference_steps 4)
    evaluate_options=(--max_prompts 24 --num_inference_steps 4)
fi

echo "== 1. Encode: 648 captioned pictures of shapes -> latents and token ids"
# The first stage ships with the package; runs/first_stage.sh trained it.
uvit extract --source shapes --split train --resolution 32 --vae_name_or_path shapes \
    --text tokens --model_max_length 18 --output_dir "$out/features"

echo "== 2. Train: a U-ViT and its text encoder, both from scratch, to draw latents from words"
uvit train --config shapes \
    --feature_path "$out/features" --output_dir "$out/run" "${train_options[@]}"

echo "== 3. Draw: prompts of your own (these combinations were never seen in training)"
uvit sample "a large orange circle at the bottom left on a black background" \
    "on a white background, a small purple cross at the bottom right" \
    "large green triangle, at the top right, grey background" \
    --pipeline "$out/run/pipeline" --guidance_scale 2 --num_inference_steps 25 --output_dir "$out/samples"

echo "== 4. Check: every held-out combination in four wordings, read back from the pixels"
uvit evaluate "$out/run/pipeline" --output_dir "$out/evaluation" "${evaluate_options[@]}"
