"""Flags of `uvit serve`."""

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from uvit.config.bounds import Bounds, PositiveFloat, PositiveInt, check_bounds
from uvit.config.paths import PathFlag, expand_paths
from uvit.config.sample import Guidance, InferenceSteps
from uvit.errors import UserError

API_KEY_VARIABLE = "UVIT_API_KEY"
MODEL_NAME = re.compile(r"[\w][\w.+-]*")


@dataclass(frozen=True)
class ServeConfig:
    """Generate images for many people at once: a page for a browser, and OpenAI's image API.

    uvit serve output/run --guidance_scale 3 --port 8000
    """

    # Most used
    models: tuple[PathFlag, ...]
    """Training runs, also unfinished ones, and pipeline folders; each may be given a name: NAME=PATH."""
    host: str = "127.0.0.1"
    """The address to listen at. 127.0.0.1 is this machine alone; 0.0.0.0 lets everybody in who can reach it: then set
    an --api_key."""
    port: Annotated[int, Bounds(least=0, most=65_535, hint="0 takes a free one")] = 8000
    """The port to listen at."""
    api_key: str | None = None
    """Answer only requests with this key (`Authorization: Bearer KEY`). The environment variable UVIT_API_KEY sets it
    too, and does not show in the list of processes."""
    num_inference_steps: InferenceSteps = 50
    """Sampling steps of a request that names none."""
    guidance_scale: Guidance = 7.5
    """Guidance of a request that names none."""

    # Computing
    workers: Annotated[int, Bounds(least=1, most=1024)] = 1
    """Processes that compute. Each has its own copy of the models, and with several GPUs its own GPU."""
    threads: Annotated[int, Bounds(least=1, most=1024)] | None = None
    """Threads of each worker on a CPU. Default: the cores, divided among the workers."""
    max_batch_size: Annotated[int, Bounds(least=1, most=1024)] = 8
    """Images that a worker computes at once. It affects speed and memory, not the images."""
    max_models: PositiveInt = 4
    """Models in the memory of a worker. One that is asked for and is not there replaces the one that was used longest
    ago."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPUs if there are any."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the networks. auto: bfloat16 on a GPU that has it, float32 otherwise."""

    # Limits
    max_queue_size: PositiveInt = 256
    """Images that wait. A request that does not fit is answered 429, with the time after which to try again. One with
    more images than can ever wait and be computed at once is refused."""
    max_images: PositiveInt = 10
    """Images of a request (`n`)."""
    max_steps: InferenceSteps = 250
    """Sampling steps of a request."""
    max_prompt_characters: PositiveInt = 2000
    """Characters of a prompt."""
    max_upload_bytes: PositiveInt = 10_000_000
    """Bytes of a request, with its images."""
    max_upload_pixels: PositiveInt = 16_000_000
    """Pixels of an uploaded image."""
    request_timeout: PositiveFloat = 600.0
    """Seconds after which a request is given up. It has as many before that to arrive."""
    drain_timeout: Annotated[float, Bounds(least=0)] = 60.0
    """Seconds that running and waiting requests are given to end after SIGTERM. What is left is answered 503."""

    # Access from other hosts and pages
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the server may be called, besides its own address, for example behind a proxy. Listening at
    127.0.0.1, it refuses others, which protects it from pages that claim to be it. * allows every name."""
    allowed_origins: tuple[str, ...] = ()
    """Other web pages that may use the server from a browser, such as https://example.org. Default: its own page
    alone."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
        if not self.models:
            raise UserError("--models: there are none; give the folder of a run or a pipeline")
        for name, _ in self.named_models():
            if not MODEL_NAME.fullmatch(name):
                raise UserError(f"--models {name}=...: a name has letters, digits and . + - _ only; choose another")
        names = [name for name, _ in self.named_models()]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"--models: two are called {repeated[0]}; name them: NAME=PATH")
        if self.num_inference_steps > self.max_steps:
            steps, most = self.num_inference_steps, self.max_steps
            raise UserError(f"--num_inference_steps {steps}: is more than --max_steps {most}; raise that")
        key = self.key()
        if key == "":
            raise UserError(f"--api_key: is empty, or {API_KEY_VARIABLE} is; give a key, or leave out both")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise UserError("--api_key: must be one line of ASCII text, because it is sent in a header; choose another")
        for origin in self.allowed_origins:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                raise UserError(f"--allowed_origins {origin}: must be such as https://example.org, without a path")

    def named_models(self) -> list[tuple[str, str]]:
        """(name, path) of each model. Without a name, the folder's, or that of a run around `pipeline`."""
        named = []
        for model in self.models:
            name, equals, path = model.partition("=")
            if not equals or "/" in name or os.path.exists(model):  # noqa: PTH110  # Path's raises for a long name
                path = model
                folder = Path(path).absolute()
                name = re.sub(r"[^\w.+-]+", "-", (folder.parent if folder.name == "pipeline" else folder).name)
                name = name.lstrip(".+-") or "model"
            named.append((name, path))
        return named

    def key(self) -> str | None:
        """The API key, of the flag or of the environment; None: everybody is answered."""
        given = os.environ.get(API_KEY_VARIABLE) if self.api_key is None else self.api_key
        return None if given is None else given.strip()  # files and shells add the end of a line

    def most_images(self) -> int:
        """The images of a request: more than can wait and be computed at once would never fit."""
        return min(self.max_images, self.max_queue_size + self.workers * self.max_batch_size)

    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
