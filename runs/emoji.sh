#!/usr/bin/env bash
# Real images, everything from scratch: VAE, tokenizer, text encoder and U-ViT, on two CPU cores in under an hour.
#
#   bash runs/emoji.sh emoji_noto_64.tar
#
# The tar (WebDataset layout) holds 1,911 Noto emoji of 64x64 pixels, each with its name. Any captioned set of small
# images does. docs/emoji.md shows the images that this generated. Stop it at any time; run it again to resume.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
source=${1:?give the images: a WebDataset .tar or a folder with metadata.jsonl}
out=${UVIT_EMOJI_DIR:-$here/output/emoji}
# bfloat16 where the CPU has instructions for it, or there is a GPU; elsewhere it is many times slower than float32.
precision=()
if grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null || command -v nvidia-smi >/dev/null; then
    precision=(--bf16)
fi

echo "== 1. Train the VAE: 64x64 pixels <-> 16x16x4 latents"
uvit autoencoder --source "$source" --resolution 64 --factor 4 --channels 32 --batch_size 8 --max_steps 2000 \
    --kl_weight 2e-3 "${precision[@]}" --output_dir "$out/vae"

echo "== 2. Extract features"
uvit extract --source "$source" --resolution 64 --vae_name_or_path "$out/vae" \
    --text tokens --model_max_length 24 --output_dir "$out/features"

echo "== 3. Train the U-ViT"
uvit train --config emoji --feature_path "$out/features" --output_dir "$out/run"

echo "== 4. Sample"
uvit sample "an emoji of heavy black heart" "an emoji of black sun with rays" "an emoji of france flag" \
    "an emoji of japan flag" "an emoji of germany flag" "an emoji of grinning face" "an emoji of crying face" \
    "an emoji of cat face" "an emoji of red apple" "an emoji of full moon symbol" "an emoji of christmas tree" \
    "an emoji of yellow heart" --num_images_per_prompt 4 --guidance_scale 6 --num_inference_steps 25 --columns 8 \
    --pipeline "$out/run/pipeline" --output_dir "$out/samples"
