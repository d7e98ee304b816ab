"""The command itself, in a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from uvit.cli.main import main
from uvit.config.serve import ServeConfig
from uvit.errors import UserError
from uvit.serve.server import open_port


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_ends_it_with_status_zero(pipeline_folder: Path, signals: int) -> None:
    words = ["-m", "uvit", "serve", f"tiny={pipeline_folder}", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert url is not None, line
        assert httpx.get(f"{url[0]}/health").json()["status"] == "ok"
        body = {"prompt": "a", "num_inference_steps": 2}
        assert httpx.post(f"{url[0]}/v1/images/generations", json=body, timeout=60).status_code == 200
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


def test_a_damaged_pipeline_is_said_before_the_port_opens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["serve", str(tmp_path), "--port", "0", "--device", "cpu"]) == 2
    assert "--pipeline" in capfd.readouterr().err
