#!/usr/bin/env bash
# One training over several machines: run the same command on each of them.
#
#   HOSTS=2 MAIN_ADDRESS=10.0.0.1 bash runs/multinode.sh train --dp_degree 16 --feature_path F --output_dir O
#
# MAIN_ADDRESS is the IPv4 address of one of them, in the network that is to be used, where all can reach PORT (29500). F
# and O are on a file system that all see. PROCESSES of each machine: a number, or `gpu` (the default), one for each. Where
# there are several networks, name the interface to use: NCCL_SOCKET_IFNAME for GPUs, GLOO_SOCKET_IFNAME for the CPU.
#
# A process that fails stops those of all machines, and all start again from the last checkpoint, RESTARTS (3) times. When
# a machine or the network is lost, stop what is left (SIGTERM to torchrun; SIGKILL if that waits for the others), and run
# the same command on all again.
set -euo pipefail
: "${HOSTS:?how many machines?}" "${MAIN_ADDRESS:?the IPv4 address of one of the machines}"

# Seconds that a step and a checkpoint may take after SIGTERM, before torchrun kills.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# A new store at each start. The one that torchrun shares keeps the addresses of processes that are gone, and those that
# start after them fail to connect: "Gloo connectFullMesh failed".
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# The address by which this machine talks to the main one. Names are not asked for: they often lead to another network.
address=$(python -c 'import socket, sys
udp = socket.socket(type=socket.SOCK_DGRAM)  # sends nothing
udp.connect((sys.argv[1], 9))
print(udp.getsockname()[0])' "$MAIN_ADDRESS")
is_host=false
if [ "$address" = "$MAIN_ADDRESS" ]; then is_host=true; fi

exec torchrun --nnodes "$HOSTS" --nproc_per_node "${PROCESSES:-gpu}" --max_restarts "${RESTARTS:-3}" \
    --local_addr "$address" --rdzv_backend c10d --rdzv_endpoint "$MAIN_ADDRESS:${PORT:-29500}" --rdzv_id training \
    --rdzv_conf "is_host=$is_host" -m uvit "$@"
