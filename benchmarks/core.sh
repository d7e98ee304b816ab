#!/usr/bin/env bash
# S/2 in float32 on one core: work done per second, compared with the peak of the core; and the loader at COCO's shapes.
set -euo pipefail
export OMP_NUM_THREADS=1
pin=()
if command -v taskset >/dev/null; then pin=(taskset -c 0); fi
"${pin[@]}" uvit bench --uvit_config_file uvit_t2i_small --batch_size 4 --num_threads 1 --steps 5 --loader --device cpu
