"""A tiny training run, and `uvit serve` on it, as its own process."""

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import numpy as np
from PIL import Image

from uvit.cli.main import main

COLOURS = ("red", "green", "blue", "white")
MODEL = {
    "sample_size": 32, "in_channels": 3, "patch_size": 8, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 16, "clip_dim": 32, "num_text_tokens": 16,
}  # fmt: skip
QUEUE = 6  # images that may wait
SECONDS = 60


class PageServer:
    """A run of `step` steps, called `run`, of a model on pixels. `train` goes on with it."""

    run, side = "tiny", MODEL["sample_size"]

    def __init__(self, folder: Path):
        self.folder, self.run_folder = folder, folder / self.run
        self.step = 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        (folder / "images").mkdir()
        for colour in COLOURS:
            Image.new("RGB", (32, 32), colour).save(folder / "images" / f"{colour}.png")
            (folder / "images" / f"{colour}.txt").write_text(f"a {colour} square")
        (folder / "model.json").write_text(json.dumps(MODEL))
        words = f"extract --source {folder}/images --resolution 32 --latents none --text tokens --vocab_size 300"
        words += f" --model_max_length 16 --num_workers 0 --disable_tqdm --output_dir {folder}/features"
        assert main(words.split()) == 0

    def train(self) -> None:
        """Four steps more."""
        self.step += 4
        words = f"train --feature_path {self.folder}/features --output_dir {self.run_folder} --train_text_encoder"
        words += f" --text_encoder_layers 1 --uvit_config_file {self.folder}/model.json --max_steps {self.step}"
        words += " --per_device_train_batch_size 4 --learning_rate 1e-3 --warmup_steps 1 --ema_decay 0.5 --device cpu"
        words += " --save_steps 2 --logging_steps 1 --image_logging_steps 4 --num_inference_steps 2 --eval_steps -1"
        words += " --dataloader_num_workers 0 --report_to none --disable_tqdm"
        assert main(words.split()) == 0

    def __enter__(self) -> "PageServer":
        self.train()
        self.start()
        return self

    def start(self, *flags: str) -> None:
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "uvit", "serve", f"{self.run}={self.run_folder}", "--port", port]
        command += ["--device", "cpu", "--max_batch_size", "2", "--max_queue_size", str(QUEUE), *flags]
        self.process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").json()["status"] == "ok":
                    return
            time.sleep(0.1)
        raise AssertionError("the server does not start")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def post(self, **body: Any) -> httpx.Response:
        body = {"model": self.run, "guidance_scale": 2} | body
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=SECONDS)

    def generate(self, **body: Any) -> np.ndarray:
        """An image (H, W, 3), asked for without the page."""
        png = base64.b64decode(self.post(**body).raise_for_status().json()["data"][0]["b64_json"])
        with Image.open(io.BytesIO(png)) as image:
            return np.asarray(image.convert("RGB"))

    def refusal(self, **body: Any) -> str:
        response = self.post(**body)
        assert response.status_code == 400
        return str(response.json()["error"]["message"])

    @contextlib.contextmanager
    def full_queue(self) -> Iterator[None]:
        """Others' images fill the queue, and are cancelled in the end."""
        body = {"model": self.run, "prompt": "a cat", "n": QUEUE + 2, "num_inference_steps": 250, "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/images/generations", json=body, timeout=SECONDS) as response:
            assert response.status_code == 200
            yield
