#!/usr/bin/env bash
# Train on a cluster with SLURM for longer than one job may take: each job resumes where the previous one stopped.
#
#   sbatch runs/slurm.sh train --dp_degree 16 --bf16 --feature_path F --output_dir O
#   sbatch --nodes 4 runs/slurm.sh train --dp_degree 32 ...       # flags of sbatch come before those of uvit
#
# Submit from an environment in which `python -m uvit` works on the nodes, too. F and O must be on a file system that
# all nodes share. To stop the training, use scancel. A job that fails is not restarted: read its log. Leave
# --overwrite_output_dir out: each job that you submit would start from scratch.
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
# A task is one training process, for one GPU. Ten minutes before the time limit, SLURM sends SIGTERM to the tasks. They
# finish the step, save a checkpoint and exit with status 143. --requeue handles node failures and preemption.
set -uo pipefail
trap : TERM # this script may get SIGTERM as well; it waits for the tasks

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS

# No torchrun: SLURM starts, watches and signals the processes, and gives each its rank. If one fails, all are stopped.
# shellcheck disable=SC2016 # the tasks are to expand it
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' task python -m uvit "$@"
status=$?
if [ "$status" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID" # run this job again: the same command resumes from the checkpoint
fi
exit "$status"
