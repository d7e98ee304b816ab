#!/usr/bin/env bash
# From captioned images to generated ones in four commands, on built-in data: 2 to 4 minutes on two CPU cores.
#
#   bash runs/demo.sh
#   bash runs/demo.sh --fast   the same in under a minute, too short to learn anything
#
# `uvit demo` runs the same commands. All results are in output/demo. Stop it at any time. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
out=output/demo
if [ -n "${1:-}" ]; then exec uvit demo "$@"; fi

# 1. Extract: encode 648 captioned images of shapes to moments and token ids. A tenth of the combinations of colour, shape,
#    size, position and background is held out. The VAE comes with the package; runs/shapes_vae.sh trained it.
uvit extract --source shapes --split train --resolution 32 --vae_name_or_path shapes \
    --text tokens --model_max_length 18 --output_dir "$out/features"

# 2. Train: a U-ViT and its text encoder, both from scratch. The settings are in uvit/presets/train/shapes.yaml.
#    Training computes in bfloat16 where the CPU has instructions for it. Elsewhere float32 is many times as fast.
settings=(--config shapes)
if grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null; then settings+=(--bf16); fi
uvit train "${settings[@]}" --feature_path "$out/features" --output_dir "$out/run"

# 3. Sample: generate images from prompts. None of these combinations was trained on.
uvit sample "a large orange circle at the bottom left on a black background" \
    "on a white background, a small purple cross at the bottom right" \
    "large green triangle, at the top right, grey background" \
    --pipeline "$out/run/pipeline" --guidance_scale 2 --num_inference_steps 25 --output_dir "$out/samples"

# 4. Evaluate: generate every held-out combination in four wordings, and read the attributes back from the pixels.
uvit evaluate "$out/run/pipeline" --output_dir "$out/evaluation"
