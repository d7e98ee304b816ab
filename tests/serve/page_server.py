"""A tiny training run, and a server of it, for the tests of the page."""

import base64
import contextlib
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.serve.parts import Served, serving
from uvit.cli.main import main

COLOURS = ("red", "green", "blue", "white")
MODEL = {
    "sample_size": 32, "in_channels": 3, "patch_size": 8, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 16, "clip_dim": 32, "num_text_tokens": 16,
}  # fmt: skip
NUM_WAITING = 6  # images that may wait


class PageServer:
    """A run called `run`, of a model on pixels, served at an address that stays the same. `train` goes on with it."""

    run, side = "tiny", MODEL["sample_size"]
    served: Served

    def __init__(self, folder: Path):
        self.folder, self.run_folder = folder, folder / self.run
        self.step = 0
        self.running = contextlib.ExitStack()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "images").mkdir()
        for colour in COLOURS:
            Image.new("RGB", (32, 32), colour).save(folder / "images" / f"{colour}.png")
            (folder / "images" / f"{colour}.txt").write_text(f"a {colour} square")
        (folder / "model.json").write_text(json.dumps(MODEL))
        words = f"extract --source {folder}/images --resolution 32 --latents none --text tokens --vocab_size 300"
        words += f" --model_max_length 16 --num_workers 0 --disable_tqdm --output_dir {folder}/features"
        assert main(words.split()) == 0
        self.train()
        self.start()

    def train(self) -> None:
        """Four steps more."""
        self.step += 4
        words = f"train --feature_path {self.folder}/features --output_dir {self.run_folder} --train_text_encoder"
        words += f" --text_encoder_layers 1 --uvit_config_file {self.folder}/model.json --max_steps {self.step}"
        words += " --per_device_train_batch_size 4 --learning_rate 1e-3 --warmup_steps 1 --ema_decay 0.5 --device cpu"
        words += " --save_steps 2 --logging_steps 1 --image_logging_steps 4 --num_inference_steps 2 --eval_steps -1"
        words += " --dataloader_num_workers 0 --report_to none --disable_tqdm"
        assert main(words.split()) == 0

    def start(self, **flags: Any) -> None:
        flags = {"port": self.port, "max_batch_size": 2, "max_queue_size": NUM_WAITING} | flags
        self.served = self.running.enter_context(serving(f"{self.run}={self.run_folder}", **flags))

    def stop(self) -> None:
        self.running.close()

    def generate(self, **body: Any) -> np.ndarray:
        """An image (H, W, 3), asked for without the page."""
        response = self.served.generate(**{"model": self.run, "guidance_scale": 2, **body}).raise_for_status()
        with Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))) as image:
            return np.asarray(image.convert("RGB"))

    def refusal(self, **body: Any) -> str:
        response = self.served.generate(**body)
        assert response.status_code == 400
        return str(response.json()["error"]["message"])

    @contextlib.contextmanager
    def full_queue(self) -> Iterator[None]:
        """Others' images fill the queue, and are cancelled in the end."""
        body = {"prompt": "a cat", "n": NUM_WAITING + 2, "num_inference_steps": 250, "stream": True}
        with self.served.client.stream("POST", "/v1/images/generations", json=body) as response:
            assert response.status_code == 200
            yield
