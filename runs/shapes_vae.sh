#!/usr/bin/env bash
# The VAE preset `shapes`, for images of the built-in shapes: 32x32 pixels <-> 8x8x4 latents.
# About 12 minutes on two CPU cores. It is trained on the training combinations only.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$here/output/shapes_vae}
uvit autoencoder --source shapes --split train --resolution 32 --factor 4 --channels 32 \
    --batch_size 8 --max_steps 4500 --kl_weight 2e-4 --output_dir "$out"
python - "$out" "$here/uvit/presets/vae/shapes" <<'PYTHON'
# The preset is stored in float16. It is loaded in float32.
import json, shutil, sys
from pathlib import Path
import torch
from diffusers import AutoencoderKL
source, goal = map(Path, sys.argv[1:])
AutoencoderKL.from_pretrained(source, dtype=torch.float16).save_pretrained(goal)
config = json.loads((goal / "config.json").read_text())
del config["_name_or_path"]
(goal / "config.json").write_text(json.dumps(config, indent=2) + "\n")
shutil.copy(source / "training.json", goal)
PYTHON
