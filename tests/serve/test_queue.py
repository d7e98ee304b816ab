"""Many people at once: every image is the one that is asked for alone, to the bit."""

import base64
import io
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.serve.parts import Served, serving
from uvit.config.serve import ServeConfig
from uvit.sample.load import named_scheduler, open_pipeline
from uvit.serve.requests import GenerationRequest, ModelRef, RequestError, tasks_of

PROMPTS = ("a red circle", "two cats sit on a table", "a small green square", "一个红色的圆")


def random_request(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    fields: dict[str, Any] = {
        "prompt": draw.choice(PROMPTS),
        "seed": draw.randrange(2**32),
        "num_inference_steps": draw.randint(2, 9),
        "guidance_scale": draw.choice([1, 2, 7.5]),
        "scheduler": draw.choice(["dpmsolver++", "heun", "ddpm"]),
        "size": draw.choice(["auto", "32x32", "16x24"]),
    }
    if draw.random() < 0.3:
        fields["guidance_interval"] = [200, 800]
    if draw.random() < 0.3:
        fields["negative_prompt"] = draw.choice(PROMPTS)
    return fields


def pixels_of(answer: httpx.Response) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(i["b64_json"])))) for i in answer.json()["data"]]


def test_fifty_concurrent_requests_give_the_images_that_the_pipeline_gives(
    served: Served, pipeline_folder: Path
) -> None:
    requests = [random_request(number) for number in range(50)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda fields: served.generate(**fields, model="tiny"), requests))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    try:
        pipeline = open_pipeline(str(pipeline_folder), "cpu")
        for fields, answer in zip(requests, answers, strict=True):
            (found,) = pixels_of(answer)
            pipeline.scheduler = named_scheduler(pipeline, pipeline_folder, fields.pop("scheduler"))
            size, seed = fields.pop("size"), fields.pop("seed")
            width, height = (None, None) if size == "auto" else map(int, size.split("x"))
            alone = pipeline(**fields, width=width, height=height, generator=torch.Generator().manual_seed(seed))
            assert np.array_equal(found, np.asarray(alone.images[0])), fields
    finally:
        torch.set_num_threads(threads)


def test_more_images_than_ever_fit_are_refused() -> None:
    """To try again would be of no use."""
    limits = ServeConfig(("x",), max_queue_size=1, max_batch_size=2, workers=2)
    ref = ModelRef("x", "x", False, ())
    assert len(tasks_of(GenerationRequest(prompt="a", n=5), ref, limits)) == 5
    with pytest.raises(RequestError, match=r"^--n 6: must be in 1\.\.5$"):
        tasks_of(GenerationRequest(prompt="a", n=6), ref, limits)


def test_a_full_queue_a_killed_worker_and_a_drain(pipeline_folder: Path) -> None:
    limits = {"max_batch_size": 2, "max_queue_size": 2, "max_images": 4, "max_models": 1}
    with serving(f"a={pipeline_folder}", f"b={pipeline_folder}", **limits) as served, ThreadPoolExecutor(4) as pool:
        first = served.generate(seed=1, model="a").json()["data"][0]
        long = {"num_inference_steps": 250, "n": 4}
        running = pool.submit(served.generate, **long)
        while served.dispatcher.num_running < 2:
            pass
        full = served.generate(n=2)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        assert "2 images wait, and 2 are computed" in full.json()["error"]["message"]

        os.kill(served.dispatcher.workers[0].process.pid or 0, signal.SIGKILL)
        lost = running.result().json()
        assert "ended; ask again" in lost["error"]["message"]
        assert served.generate(seed=1, model="b").json()["data"][0]["b64_json"]
        assert served.generate(seed=1, model="a").json()["data"][0] == first

        running = pool.submit(served.generate, num_inference_steps=100, n=4)
        while served.dispatcher.num_running < 2:
            pass
        served.dispatcher.is_draining = True
        assert served.generate().status_code == 503
        assert served.client.get("/health").json()["status"] == "draining"
        assert len(running.result().json()["data"]) == 4
