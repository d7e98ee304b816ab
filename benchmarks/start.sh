#!/usr/bin/env bash
# How long `uvit --help` takes, compared with a Python that does nothing: ten runs of each.
set -euo pipefail
python - <<'PYTHON'
import statistics, subprocess, sys, time

def seconds(command):
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started

commands = {"uvit --help": [sys.executable, "-m", "uvit", "--help"], "python -c pass": [sys.executable, "-c", "pass"]}
times = {name: [] for name in commands}
for _ in range(10):
    for name, command in commands.items():
        times[name].append(seconds(command))
for name, values in times.items():
    print(f"{name:<15} median {statistics.median(values):.3f} s, {min(values):.3f} to {max(values):.3f}")
PYTHON
