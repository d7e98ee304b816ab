"""What concerns a training process as a whole: hangs, signals that stop it, deterministic kernels."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import torch

from uvit.distributed.mesh import World

T = TypeVar("T")

STACK_INTERVAL = 0.1  # seconds between the stacks of two processes, so that their lines do not mix


# Hangs: each process prints its stack if no step ends for too long


def reset_hang_timer(seconds: float, world: World) -> None:
    """Print all stacks, and keep waiting, unless this is called again within `seconds`. 0: never.

    faulthandler prints them without the interpreter and its lock, so this works whatever hangs.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds + STACK_INTERVAL * world.rank, file=2)


@contextlib.contextmanager
def hang_watchdog(seconds: float, world: World) -> Iterator[None]:
    reset_hang_timer(seconds, world)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_in_named_frame(name: str, function: Callable[[], T]) -> T:
    """Call a function in a frame with the name of the process: of a frame, printed stacks show only the name."""

    def frame() -> T:
        return function()

    frame.__code__ = frame.__code__.replace(co_name=name)
    return frame()


# Signals: Ctrl-C and SIGTERM


class StopSignal:
    """The number of the signal that has asked to stop, or 0. A second signal stops at once."""

    signal = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        sentence = "\nstopping after this step (a second Ctrl-C stops at once, without saving)"
        try:
            print(sentence, flush=True)
        except RuntimeError:  # the signal came amid another print, and a stream cannot be written to from within
            with contextlib.suppress(RuntimeError):
                print(sentence, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Inside the context, a signal is recorded instead of ending the process."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report_stop(stop: StopSignal, step: int, max_steps: int, overwrite: bool) -> int:
    """Say how to resume; returns the exit status. `overwrite`: the flag --overwrite_output_dir."""
    how = "without --overwrite_output_dir" if overwrite else "again"
    print(f"stopped at step {step} of {max_steps}, saved; run the same command {how} to resume")
    return 128 + (stop.signal or signal.SIGTERM)  # the signal may have reached another process alone


# Deterministic kernels: `--deterministic` computes the same bits each time on a GPU too


@contextlib.contextmanager
def deterministic_mode(wanted: bool) -> Iterator[None]:
    """Use deterministic kernels only; an operation that has none is an error. Enter it before CUDA starts."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    _set_deterministic(True, True, False, False)  # cuDNN's attention ignores the first of these
    try:
        yield
    finally:
        _set_deterministic(*before)


def _set_deterministic(algorithms: bool, cudnn: bool, benchmark: bool, cudnn_attention: bool) -> None:
    torch.use_deterministic_algorithms(algorithms)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn, benchmark
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
