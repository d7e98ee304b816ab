"""How the processes of a run agree on a checkpoint in the background."""

from typing import Any

import torch.distributed as dist

from uvit.checkpoint import Exchange, alone
from uvit.distributed.mesh import World


def exchange_channel(world: World) -> Exchange:
    """A channel of its own for a `Saver`, called by all processes alike; in a world of one nothing is opened.

    Its thread talks there while training's own collectives go on, so it must be another group, and on CPU.
    """
    if not world.parallel:
        return alone
    group = dist.new_group(backend="gloo")

    def exchange(value: Any) -> list[Any]:
        values: list[Any] = [None] * world.size
        dist.all_gather_object(values, value, group=group)
        return values

    return exchange
