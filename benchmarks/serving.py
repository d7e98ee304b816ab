"""Serve a model to many clients at once: `uvit serve` against a plain FastAPI handler with a lock around the pipeline.

    python benchmarks/serving.py output/demo/run/pipeline
    python benchmarks/serving.py output/demo/run/pipeline --load

Both servers run on this machine, one after the other for each number of clients, in one run; each has all cores. A
client sends its next request when it has its image. Prints images per second, the median and the 95th percentile of the
latency, and the CPU seconds of the server for an image, which other programs on the machine change less than the
others; also the time from the start of each process until its first image has arrived.

--load sends 500 requests with random settings from 64 clients, among them cancelled and faulty ones, and compares every
image with the one that is asked for alone.
"""

import argparse
import base64
import io
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from uvit.sources.shapes import scenes

PROMPTS = [scene.captions()[i % 4] for i, scene in enumerate(scenes("heldout"))]
PLAIN = """
import base64, io, sys, threading
import torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from uvit import UViTPipeline

app, lock = FastAPI(), threading.Lock()
pipeline = UViTPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)

class Body(BaseModel):
    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float

@app.post("/v1/images/generations")
def generate(body: Body):
    with lock:
        (image,) = pipeline(
            body.prompt, generator=torch.Generator().manual_seed(body.seed),
            num_inference_steps=body.num_inference_steps, guidance_scale=body.guidance_scale,
        ).images
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}

print("at http://127.0.0.1:" + sys.argv[2], flush=True)
uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
"""


class Server:
    """A server process. Attributes: url; first_image, the seconds from its start until an image has arrived."""

    def __init__(self, words: list[str], environment: dict[str, str]):
        began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://[\d.]+:\d+", line):
                self.url = found[0]
                break
        while True:
            try:
                request(self.url, PROMPTS[0], 0, 25)
                break
            except httpx.ConnectError:
                time.sleep(0.02)
        self.first_image = time.monotonic() - began

    def processes(self) -> list[Path]:
        """The process and its children."""
        own = Path(f"/proc/{self.process.pid}")
        children = {child for task in own.glob("task/*/children") for child in task.read_text().split()}
        return [own, *(Path("/proc", child) for child in children)]

    def memory(self) -> float:
        """MiB that they hold."""
        pages = sum(int((path / "statm").read_text().split()[1]) for path in self.processes())
        return pages * os.sysconf("SC_PAGESIZE") / 2**20

    def cpu_seconds(self) -> float:
        """What they have computed."""
        fields = [(path / "stat").read_text().rpartition(")")[2].split() for path in self.processes()]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(120)


def request(url: str, prompt: str, seed: int, steps: int) -> bytes:
    body = {"prompt": prompt, "seed": seed, "num_inference_steps": steps, "guidance_scale": 2.0}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=600)
    answer.raise_for_status()
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def measure(server: Server, clients: int, seconds: float, steps: int) -> tuple[float, list[float], float]:
    """(images per second, the latency of each image, CPU seconds an image) of clients that ask again and again."""
    latencies: list[float] = []
    cpu = server.cpu_seconds()
    began = time.monotonic()

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < began + seconds:
            start = time.monotonic()
            request(server.url, draw.choice(PROMPTS), draw.randrange(2**32), steps)
            latencies.append(time.monotonic() - start)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    rate = len(latencies) / (time.monotonic() - began)
    return rate, latencies, (server.cpu_seconds() - cpu) / len(latencies)


def compare(pipeline: str, args: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    serve = ["-m", "uvit", "serve", f"model={pipeline}", "--port", "0", "--workers", str(args.workers or cores)]
    serve += ["--threads", "1", "--max_batch_size", str(args.max_batch_size)]
    threads = {"OMP_NUM_THREADS": str(args.plain_threads or cores)}
    plain = Server(["-c", PLAIN, pipeline, str(args.port)], threads)
    print(f"first image after {plain.first_image:.1f} s (plain)", flush=True)
    ours = Server(serve, {})
    print(f"first image after {ours.first_image:.1f} s (uvit serve, both servers on one machine)", flush=True)
    print(
        "| clients | server | images/s | median (s) | 95th percentile (s) | CPU s an image |\n|---|---|---|---|---|---|"
    )
    try:
        measure(ours, 2 * args.max_batch_size, args.seconds / 4, args.steps)  # it measures what may share a call
        for clients in args.clients:
            rates = {}
            for name, server in (("plain", plain), ("uvit serve", ours)):
                rates[name], latencies, cpu = measure(server, clients, args.seconds, args.steps)
                worst = statistics.quantiles(latencies, n=20)[-1] if len(latencies) > 1 else latencies[0]
                print(
                    f"| {clients} | {name} | {rates[name]:.2f} | {statistics.median(latencies):.2f} | {worst:.2f} "
                    f"| {cpu:.2f} |",
                    flush=True,
                )
            print(f"{clients} clients: {rates['uvit serve'] / rates['plain']:.2f} times as many images", flush=True)
    finally:
        plain.stop()
        ours.stop()


# The load test


def random_body(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    body: dict[str, Any] = {
        "prompt": draw.choice(PROMPTS),
        "seed": draw.randrange(2**32),
        "n": draw.choice([1, 1, 1, 2, 4]),
        "num_inference_steps": draw.randint(2, 12),
        "guidance_scale": draw.choice([1, 2, 7.5]),
        "scheduler": draw.choice(["dpmsolver++", "unipc", "euler", "heun", "ddim", "ddpm"]),
    }
    if draw.random() < 0.3:
        body["guidance_interval"] = [200, 800]
    if draw.random() < 0.3:
        body["negative_prompt"] = draw.choice(PROMPTS)
    return body


FAULTS: list[dict[str, Any]] = [{"guidance_scale": -1}, {"size": "3x3"}, {"model": "none"}, {"scheduler": "fitted"}]


def load(pipeline: str, args: argparse.Namespace) -> None:
    words = ["-m", "uvit", "serve", f"model={pipeline}", "--port", "0", "--threads", "1", "--max_queue_size", "2000"]
    server = Server([*words, "--workers", str(args.workers or len(os.sched_getaffinity(0)))], {})
    counts = dict.fromkeys(("images", "cancelled", "refused", "wrong status"), 0)
    answers: dict[int, list[bytes]] = {}
    lock = threading.Lock()
    memory: list[float] = []

    def ask(number: int) -> None:
        body, kind = random_body(number), number % 10
        if kind == 3:  # the client goes
            body |= {"num_inference_steps": 200, "stream": True}
            with httpx.stream("POST", f"{server.url}/v1/images/generations", json=body, timeout=600) as stream:
                next(stream.iter_lines())
            outcome = "cancelled"
        else:
            body |= random.Random(number).choice(FAULTS) if kind == 7 else {}
            answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=600)
            outcome = "images" if answer.status_code == 200 else "refused"
            if (answer.status_code >= 400) != (kind == 7) or answer.status_code >= 500:
                outcome = "wrong status"
            if outcome == "images":
                answers[number] = [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]
        with lock:
            counts[outcome] += 1
            if number % 50 == 0:
                memory.append(server.memory())

    began = time.monotonic()
    try:
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(ask, range(args.requests)))
        seconds = time.monotonic() - began
        different = 0
        for number, images in answers.items():
            body = random_body(number)
            for i, image in enumerate(images):
                alone = httpx.post(
                    f"{server.url}/v1/images/generations",
                    json=body | {"n": 1, "seed": body["seed"] + i},
                    timeout=600,
                ).json()["data"][0]["b64_json"]
                different += not np.array_equal(pixels(image), pixels(base64.b64decode(alone)))
        total = sum(map(len, answers.values()))
        print(f"{args.requests} requests from 64 clients in {seconds:.1f} s: {counts}")
        print(f"{total} images, {different} of them other than alone")
        print(f"memory after every 50th request (MiB): {' '.join(f'{each:.0f}' for each in memory)}")
    finally:
        server.stop()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--workers", type=int, help="default: the cores")
    parser.add_argument("--plain_threads", type=int, help="of the plain server; default: the cores")
    parser.add_argument("--max_batch_size", type=int, default=16)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--port", type=int, default=8123, help="of the plain server")
    arguments = parser.parse_args()
    (load if arguments.load else compare)(arguments.pipeline, arguments)
