#!/usr/bin/env bash
# Train on several machines: run the same command on each of them.
#
#   HOSTS=2 MAIN_ADDRESS=10.0.0.1 bash runs/multinode.sh train --dp_degree 16 --feature_path F --output_dir O
#
# MAIN_ADDRESS is the IPv4 address of one of the machines. All machines must reach its PORT (29500). F and O must be on
# a file system that all machines share. PROCESSES on each machine: a number, or `gpu` (the default), one for each GPU.
# With several networks, choose the interface: NCCL_SOCKET_IFNAME for GPUs, GLOO_SOCKET_IFNAME for CPUs.
#
# If a process fails, the processes of all machines stop, and all restart from the last checkpoint, up to RESTARTS (3)
# times. If a machine or the network is lost, stop the others (SIGTERM to torchrun; SIGKILL if it keeps waiting), and run
# the same command on all machines again.
set -euo pipefail
: "${HOSTS:?how many machines?}" "${MAIN_ADDRESS:?the IPv4 address of one of the machines}"

# Seconds that a step and a checkpoint may take after SIGTERM before torchrun kills the processes.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# Use a new store at each start. The shared one keeps the addresses of processes that have ended; new processes then
# fail to connect ("Gloo connectFullMesh failed").
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# The address of this machine as the main one sees it. Host names are not used: they often resolve to another network.
address=$(python -c 'import socket, sys
udp = socket.socket(type=socket.SOCK_DGRAM)  # sends nothing
udp.connect((sys.argv[1], 9))
print(udp.getsockname()[0])' "$MAIN_ADDRESS")
is_host=false
if [ "$address" = "$MAIN_ADDRESS" ]; then is_host=true; fi

exec torchrun --nnodes "$HOSTS" --nproc_per_node "${PROCESSES:-gpu}" --max_restarts "${RESTARTS:-3}" \
    --local_addr "$address" --rdzv_backend c10d --rdzv_endpoint "$MAIN_ADDRESS:${PORT:-29500}" --rdzv_id training \
    --rdzv_conf "is_host=$is_host" -m uvit "$@"
