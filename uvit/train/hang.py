"""Where a run hangs: every process prints its stack where no step ends for too long."""

import contextlib
import faulthandler
from collections.abc import Callable, Iterator
from typing import TypeVar

from uvit.distributed.mesh import World

T = TypeVar("T")

APART = 0.1  # seconds from one process's stack to the next one's, so that they do not mingle


def alive(seconds: float, world: World) -> None:
    """Print all stacks, and go on, unless this is called again within `seconds`. 0: never.

    The printing needs neither the interpreter nor its lock, so that it works whatever it is that hangs.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds + APART * world.rank, file=2)


@contextlib.contextmanager
def watched(seconds: float, world: World) -> Iterator[None]:
    alive(seconds, world)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def called(name: str, function: Callable[[], T]) -> T:
    """Call a function from a frame of this name: a stack that faulthandler prints can say no more than names."""

    def frame() -> T:
        return function()

    frame.__code__ = frame.__code__.replace(co_name=name)
    return frame()
