"""The command itself, in a process of its own."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import OLD
from tests.serve.parts import serving
from uvit.cli.main import main
from uvit.config.serve import ServeConfig
from uvit.errors import UserError
from uvit.serve.queue import Dispatcher
from uvit.serve.server import open_port, run


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_ends_it_with_status_zero(pipeline_folder: Path, run_folder: Path, signals: int) -> None:
    models = [f"tiny={pipeline_folder}", f"run={run_folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "uvit", "serve", *models, "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=OLD,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert url is not None, line
        assert httpx.get(f"{url[0]}/health").json()["status"] == "ok"
        body = {"prompt": "a", "num_inference_steps": 2}
        assert httpx.post(f"{url[0]}/v1/images/generations", json=body, timeout=60).status_code == 200
        half_a_request(url[0]).close()
        for _ in range(signals):
            os.killpg(process.pid, signal.SIGTERM)  # as systemd does: the workers too
            time.sleep(0.02)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out, errors) == (0, "", "")
    finally:
        process.kill()


def test_what_cannot_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["serve", str(tmp_path)]) == 2
    assert "neither a training run nor a pipeline" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^--port {port}: cannot be opened"):
            open_port(ServeConfig(("x",), port=port))


def test_two_servers_that_start_at_once_on_one_port() -> None:
    """Both have bound it, and the other one was the first to listen."""
    with open_port(ServeConfig(("x",), port=0)) as first:
        config = ServeConfig(("x",), port=first.getsockname()[1])
        with open_port(config) as second:
            first.listen()
            dispatcher = Dispatcher(config)
            with pytest.raises(UserError, match=f"^--port {config.port}: cannot be opened"):
                asyncio.run(run(config, {}, second, dispatcher, lambda: None))
    assert not dispatcher.workers


def connect(url: str, request: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30)
    connection.sendall(request.encode())
    return connection


def half_a_request(url: str) -> socket.socket:
    """A client that sends a part of a form, and no more."""
    head = "POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x"
    return connect(url, f"{head}\r\nContent-Length: 100\r\n\r\n--x\r\n")


def deaf(url: str) -> socket.socket:
    """A client that reads no answer, and asks for more than the buffers hold."""
    return connect(url, "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 500)


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_a_body_that_does_not_arrive_is_given_up(pipeline_folder: Path) -> None:
    with serving(f"tiny={pipeline_folder}", request_timeout=0.1) as served, half_a_request(served.url) as connection:
        answer = answer_of(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 0.1 s" in answer


def test_the_drain_ends_whatever_clients_do(pipeline_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as clients:
        with serving(f"tiny={pipeline_folder}", max_batch_size=1, drain_timeout=3.0) as served:
            clients.enter_context(deaf(served.url))
            half = clients.enter_context(half_a_request(served.url))
            waiting = pool.submit(served.generate, num_inference_steps=250, n=10, guidance_scale=2)
            while not served.dispatcher.tickets:
                pass
            served.dispatcher.is_draining = True
            assert answer_of(half).startswith(b"HTTP/1.1 503 ")  # it would be refused once it had arrived
            answer = waiting.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert int(answer.headers["retry-after"]) >= 1
    assert capfd.readouterr().err == ""


def test_a_damaged_pipeline_is_said_before_the_port_opens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["serve", str(tmp_path), "--port", "0", "--device", "cpu"]) == 2
    assert "--pipeline" in capfd.readouterr().err
