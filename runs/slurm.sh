#!/usr/bin/env bash
# A training as long as it takes on a cluster with SLURM: jobs of a day, each going on where the one before stopped.
#
#   sbatch runs/slurm.sh train --dp_degree 16 --bf16 --feature_path F --output_dir O
#   sbatch --nodes 4 runs/slurm.sh train --dp_degree 32 ...       # flags of sbatch before those of uvit
#
# Submit from an environment in which `python -m uvit` works on the nodes, too. F and O are on a file system that all
# nodes see. A job that is stopped early stays stopped: scancel. A job that fails is not begun again: read its log.
#
#SBATCH --job-name=uvit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=uvit-%j.log
# A task is a process of the training, one for each GPU. Ten minutes before its time is over SLURM sends them SIGTERM:
# they finish the step, save, and leave with status 143. --requeue is for nodes that fail, and for preemption.
set -uo pipefail
trap : TERM # where this script is told, too, it waits for them

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS

# No torchrun: SLURM starts, watches and signals the processes, and tells each its place. One that fails ends the others.
# shellcheck disable=SC2016 # the tasks are to expand it
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' task python -m uvit "$@"
status=$?
if [ "$status" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID" # the same job again: the same command goes on from what was saved
fi
exit "$status"
