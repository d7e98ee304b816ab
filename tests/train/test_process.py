"""A process in which nothing ends says where it is, by its name, and goes on."""

import io
import signal
import time

import pytest
import torch

from uvit.distributed.mesh import Degrees, World
from uvit.train.process import StopSignal, hang_watchdog, reset_hang_timer, run_in_named_frame


def stuck_in_a_collective() -> int:
    time.sleep(0.6)
    return 7


def world(rank: int) -> World:
    return World(rank, 4, Degrees(dp=4), torch.device("cpu"), None)


def test_a_hang_is_told_with_its_stack_and_process(capfd: pytest.CaptureFixture[str]) -> None:
    with hang_watchdog(0.1, world(2)):
        assert run_in_named_frame("process_2_of_4", stuck_in_a_collective) == 7
    said = capfd.readouterr().err
    assert "stuck_in_a_collective" in said and "process_2_of_4" in said


@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_without_a_hang_nothing_is_said(seconds: float, capfd: pytest.CaptureFixture[str]) -> None:
    with hang_watchdog(seconds, world(0)):
        stuck_in_a_collective()
    assert not capfd.readouterr().err


def test_who_ends_a_step_in_time_is_not_disturbed(capfd: pytest.CaptureFixture[str]) -> None:
    with hang_watchdog(1.0, world(0)):
        for _ in range(5):
            reset_hang_timer(1.0, world(0))
            time.sleep(0.3)
    time.sleep(1.1)
    assert not capfd.readouterr().err


def test_a_signal_amid_a_print_is_told_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = StopSignal()

    class Slow(io.RawIOBase):
        """A file during whose first write a signal comes."""

        written = b""

        def writable(self) -> bool:
            return True

        def write(self, content: object) -> int:
            if not stop.signal:
                stop(signal.SIGTERM, None)
            self.written += bytes(content)  # type: ignore[call-overload]
            return len(bytes(content))  # type: ignore[call-overload]

    file = Slow()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(file)))
    print("step 1", flush=True)
    assert (stop.signal, file.written) == (signal.SIGTERM, b"step 1\n")
    assert "stopping after this step" in capsys.readouterr().err
