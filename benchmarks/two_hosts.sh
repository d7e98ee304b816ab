#!/usr/bin/env bash
# Two hosts train together, and the network between them fails: is nothing lost?
#
#   sudo env PATH="$PATH" bash benchmarks/two_hosts.sh          # two to three minutes on two cores
#
# The hosts are two network namespaces of this machine, joined by a virtual cable (root and iproute2 are needed), started
# by runs/multinode.sh, talking by gloo. First they train undisturbed. Then again: the cable is cut in the middle, both
# are stopped, the cable is fixed, and both are started again by the same command. Later a process of one of them is
# killed, which torchrun has to recover from by itself. In the end every tensor of the last checkpoints and pipelines must be the
# same in every byte; exits with 1 where one is not. Leaves nothing behind.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
steps=60 save_every=5 cut_after=20 kill_after=40
patience=${PATIENCE:-20} # seconds in which the hosts may notice by themselves that the cable is cut
limit=240                # seconds that any training may take
out=$(mktemp -d)
name=uvit$$ # of what is made in the system
pids=()

stop_all() { # of each host: torchrun, and its processes, which are no children of this one
    for i in 0 1; do
        ip netns pids "$name-$i" 2>/dev/null | xargs --no-run-if-empty kill "$1" 2>/dev/null || true
    done
}
clean_up() {
    stop_all -KILL
    for i in 0 1; do ip netns del "$name-$i" 2>/dev/null || true; done # the cable goes with them
    rm -rf "$out"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

for i in 0 1; do
    ip netns add "$name-$i"
    ip -n "$name-$i" link set lo up
done
ip link add veth0 netns "$name-0" type veth peer name veth1 netns "$name-1"
for i in 0 1; do
    ip -n "$name-$i" address add "10.213.7.$((i + 1))/24" dev "veth$i"
    ip -n "$name-$i" link set "veth$i" up
done

uvit extract --source shapes --resolution 32 --vae_name_or_path shapes --text tokens --model_max_length 18 \
    --output_dir "$out/features" --disable_tqdm >"$out/extract.log"

start() { # RUN
    pids=()
    for i in 0 1; do
        ip netns exec "$name-$i" env HOSTS=2 MAIN_ADDRESS=10.213.7.1 PROCESSES=1 OMP_NUM_THREADS=1 \
            GLOO_SOCKET_IFNAME="veth$i" TORCH_ELASTIC_SHUTDOWN_TIMEOUT=5 timeout --kill-after 20 $limit \
            bash "$here/runs/multinode.sh" train --config shapes --dp_degree 2 \
            --feature_path "$out/features" --output_dir "$out/$1" --per_device_train_batch_size 8 --device cpu \
            --max_steps $steps --warmup_steps 10 --save_steps $save_every --save_total_limit 99 \
            --image_logging_steps -1 --disable_tqdm >>"$out/$1-host$i.log" 2>&1 &
        pids+=($!)
    done
}
finish() { # RUN
    for pid in "${pids[@]}"; do
        if ! wait "$pid"; then
            tail -n 200 "$out/$1"-host*.log
            echo "$1: a host failed"
            exit 1
        fi
    done
}
running() { # how many hosts
    jobs -rp | wc -l
}
last_checkpoint() { # RUN
    find "$out/$1" -maxdepth 1 -name 'checkpoint-*' 2>/dev/null | sed 's/.*-//' | sort -n | tail -n 1
}
wait_for() { # RUN STEP
    until [ "$(last_checkpoint "$1")" ] && [ "$(last_checkpoint "$1")" -ge "$2" ]; do
        if [ "$(running)" -lt 2 ]; then finish "$1"; fi
        sleep 0.1
    done
}
worker_of() { # HOST: the process that trains, which torchrun started
    for pid in $(ip netns pids "$name-$1"); do
        if tr '\0' ' ' <"/proc/$pid/cmdline" | grep -v torchrun | grep -v multinode | grep -q -- '-m uvit train'; then
            echo "$pid"
        fi
    done
}
seconds() { echo $((SECONDS - since)); }

since=$SECONDS
start whole
finish whole
echo "undisturbed: $steps steps on two hosts in $(seconds) s"

since=$SECONDS
start cut
wait_for cut $cut_after
ip -n "$name-0" link set veth0 down
echo "cable cut after $(seconds) s, at or after checkpoint-$(last_checkpoint cut)"

since=$SECONDS
while [ "$(running)" -gt 0 ] && [ "$(seconds)" -lt "$patience" ]; do sleep 0.5; done
echo "after $(seconds) s without a cable $(running) of 2 hosts still wait; the last checkpoint is $(last_checkpoint cut)"
if [ "$(last_checkpoint cut)" -ge $steps ]; then
    echo "the training ended before the cable was cut: nothing was tried"
    exit 1
fi
stop_all -TERM
since=$SECONDS
while [ "$(running)" -gt 0 ] && [ "$(seconds)" -lt 15 ]; do sleep 0.5; done
echo "sent SIGTERM: after $(seconds) s $(running) of 2 hosts still wait, and are killed"
{ stop_all -KILL && wait; } 2>/dev/null || true # bash would report it

ip -n "$name-0" link set veth0 up
since=$SECONDS
start cut
wait_for cut $kill_after
kill -KILL "$(worker_of 1)"
echo "cable fixed, both hosts started again; $(seconds) s later a process of host 1 killed"
finish cut
echo "done $(seconds) s after the cable was fixed; resumed from:"
grep -ho 'resumed .*' "$out"/cut-host*.log | sed "s|$out/cut/||; s|^|    |" | sort -u

for part in "checkpoint-$steps" pipeline; do
    (cd "$out/whole/$part" && find . -name '*.safetensors') | sort >"$out/names"
    while read -r file; do
        cmp "$out/whole/$part/$file" "$out/cut/$part/$file"
    done <"$out/names"
    echo "$part: $(wc -l <"$out/names") files of tensors, the same in every byte"
done
