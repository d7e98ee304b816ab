#!/usr/bin/env bash
# The first hour on a GPU: is everything right here, and how fast is it? Run it once on each new kind of machine.
#
#   bash runs/first_gpu_hour.sh                       all checks on cuda, in about an hour
#   bash runs/first_gpu_hour.sh --only card attention
#   bash runs/first_gpu_hour.sh --device cpu --tiny   the same, very small, where there is no GPU
#
# It stops at the first thing that is wrong, with a sentence. output/first_gpu_hour/DATE/report.md has tables for
# docs/benchmarks.md. Before it, `uvit train --dry_run` says whether a model fits: uvit train --help.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # as runs/coco.sh
uvit --version
exec python "$here/benchmarks/first_gpu_hour.py" --output_dir "output/first_gpu_hour/$(date +%Y-%m-%d-%H%M%S)" "$@"
