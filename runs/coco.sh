#!/usr/bin/env bash
# MS-COCO 2014 from the official zip files to a FID: U-ViT at 256 pixels, on one GPU or all GPUs of this machine.
#
#   bash runs/coco.sh                      U-ViT-S/2 by the published recipe: the preset coco_s2
#   bash runs/coco.sh coco_s2_modern       another preset: coco_s2_deep, coco_large, coco_s2_modern
#   bash runs/coco.sh --tiny FOLDER        the same with a small network and few images, in two minutes on two CPU cores
#
# It needs 120 GB of disk, and days on one GPU: docs/coco.md has the time and the cost of each step. Stop it at any time;
# run it again to resume: each step first looks at what is there. UVIT_COCO_DIR (output/coco) is where everything goes,
# GPUS how many to use (all). TRAIN_FLAGS are further flags of `uvit train`. FOLDER holds annotations/captions_*.json and
# images. On several machines, run steps 1 to 3 here, and step 4 with runs/multinode.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${UVIT_COCO_DIR:-$here/output/coco}
preset=${1:-coco_s2} resolution=256 total=256 num_heldout=1024
recipe=(--config "$preset")
official=(--official)
text=(--text contexts)
train=(--validation_split heldout)
judge=()
statistics=()
evaluate=()
if [ "${1:-}" = --tiny ]; then
    folder=${2:?give a folder with annotations/captions_*.json and images}
    out=${UVIT_COCO_DIR:-$here/output/coco-tiny}
    preset=coco_s2 resolution=64 total=8 num_heldout=4
    recipe=(--config coco_s2)
    official=()
    text=(--text contexts --model_max_length 16 --num_workers 0)
    train+=(--uvit_config_file "$out/data/models/unet.json" --max_steps 20 --warmup_steps 2 --ema_decay 0.9 \
        --logging_steps 5 --image_logging_steps 20 --eval_steps 10 --num_validation_samples 4 --save_steps 10 \
        --num_inference_steps 4 --dataloader_num_workers 0)
    statistics=(--metric fd --feature_extractor efficientnet_lite0)
    judge=(--metrics fd --feature_extractor efficientnet_lite0)
    evaluate=(--max_prompts 6 --num_inference_steps 6)
    # FOLDER becomes zip files like the official ones, and encoders with random weights stand in for the real ones.
    [ -e "$out/data/models/unet.json" ] || python "$here/runs/coco.py" tiny "$folder" "$out/data"
fi
read -ra more <<<"${TRAIN_FLAGS:-}"
train+=("${more[@]}")
data=$out/data models=$out/data/models run=$out/$preset
mkdir -p "$out"

# One process for each GPU, bound to the processors beside it where numactl is installed. Segments that grow leave less memory unused.
gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
workers=$(($(nproc) / (gpus > 1 ? gpus : 1))) # that decode photographs
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
launch=(python -m)
if [ "$gpus" -gt 1 ]; then
    numa=()
    # torchrun calls both
    if command -v numactl >/dev/null && command -v nvidia-smi >/dev/null; then numa=(--numa-binding node); fi
    launch=(torchrun --standalone --nproc_per_node "$gpus" "${numa[@]}" -m)
    train+=(--dp_degree "$gpus")
fi

echo "== 1. Download and unpack 82,783 + 40,504 images with five captions each, and the encoders"
if [ "${1:-}" != --tiny ]; then
    python "$here/runs/coco.py" download "$data"
    hf download stabilityai/sd-vae-ft-ema config.json diffusion_pytorch_model.safetensors --local-dir "$models/vae"
    hf download openai/clip-vit-large-patch14 config.json model.safetensors tokenizer.json tokenizer_config.json \
        vocab.json merges.txt special_tokens_map.json --local-dir "$models/clip"
    inception=$models/pt_inception-2015-12-05-6726825d.pth
    if [ ! -e "$inception" ]; then
        curl --fail --location --retry 5 -C - -o "$inception.part" \
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/${inception##*/}"
        mv "$inception.part" "$inception"
    fi
    statistics=(--metric fid --inception_weights "$inception")
    judge=(--metrics fid --inception_weights "$inception")
fi
python "$here/runs/coco.py" unpack "$data" "${official[@]}"

echo "== 2. Extract: latents and text embeddings of train2014, and of $num_heldout images of val2014 to validate on"
python "$here/runs/coco.py" heldout "$data" "$num_heldout"
encode=(--vae_name_or_path "$models/vae" --latent_scale 0.2301 --text_encoder_name_or_path "$models/clip" \
    --resolution "$resolution" --icc ignore --num_workers "$workers")
"${launch[@]}" uvit extract --source "$data" --split train "${encode[@]}" "${text[@]}" --output_dir "$out/features"
"${launch[@]}" uvit extract --source "$data" --split heldout "${encode[@]}" "${text[@]}" --output_dir "$out/features"

echo "== 3. The batch: $total samples a step, as many at a time as fit into memory by the plan"
chosen=$out/$preset.$gpus-gpus # kept: a run that resumes is not to change its batch
if [ ! -e "$chosen" ]; then
    python "$here/runs/coco.py" batch "$total" "${recipe[@]}" --feature_path "$out/features" --output_dir "$run" \
        "${train[@]}" >"$chosen.part"
    mv "$chosen.part" "$chosen"
fi
read -ra batch <"$chosen"

echo "== 4. Train"
"${launch[@]}" uvit train "${recipe[@]}" --feature_path "$out/features" --output_dir "$run" "${train[@]}" "${batch[@]}"
python "$here/runs/coco.py" curve "$run"

echo "== 5. Sample"
uvit sample "a green train is coming down the tracks" "a group of people playing frisbee in a park" \
    "two giraffes standing next to each other in a field" "a plate with a sandwich and french fries" \
    "a bathroom with a white sink and a mirror" "a person on a surfboard riding a wave" --skip_existing \
    --pipeline "$run/pipeline" --guidance_scale 2 --output_dir "$run/samples"

echo "== 6. Evaluate: the distance of 30,000 images to val2014, by the published protocol"
[ -e "$out/val2014.npz" ] || uvit evaluate statistics "$data/val2014" --resolution "$resolution" --icc ignore \
    "${statistics[@]}" --output "$out/val2014.npz"
"${launch[@]}" uvit evaluate "$run" --protocol uvit-coco --prompts "$data/annotations/captions_val2014.json" \
    --reference "$out/val2014.npz" --resolution "$resolution" "${judge[@]}" "${evaluate[@]}" --batch_size 50 \
    --output_dir "$run/evaluation"
cat "$run/evaluation/report.md"
