"""`--shard I/N`: the part of a shared job that a process does."""

import os
import re

from uvit.errors import UserError


def parse_shard(shard: str | None) -> tuple[int, int] | None:
    """I/N -> (i, n). Raises UserError for anything else."""
    if shard is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {shard}: must be I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


def resolve_shard(shard: str | None) -> tuple[int, int]:
    """(i, n): this process does part i of n, as the flag or torchrun says. Raises UserError if both do."""
    given = parse_shard(shard)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1:
        return given or (0, 1)
    if given:
        raise UserError(
            f"--shard {shard}: torchrun started {num_processes} processes and assigns the parts itself; "
            "leave --shard out"
        )
    return int(os.environ["RANK"]), num_processes
