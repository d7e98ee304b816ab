"""A server in a thread, with its workers."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from uvit.config.serve import ServeConfig
from uvit.serve.models import list_models
from uvit.serve.queue import Dispatcher
from uvit.serve.server import open_port, run


@dataclass
class Served:
    url: str
    dispatcher: Dispatcher
    client: httpx.Client

    def generate(self, prompt: str = "a red circle", **fields: Any) -> httpx.Response:
        return self.client.post("/v1/images/generations", json={"prompt": prompt, "num_inference_steps": 3, **fields})


@contextlib.contextmanager
def serving(*models: str, **flags: Any) -> Iterator[Served]:
    """A server that runs while the block does. Its end is a drain, as after SIGTERM."""
    config = ServeConfig(models, **{"port": 0, "threads": 1, "device": "cpu", "drain_timeout": 20.0, **flags})
    listening, dispatcher, is_open = open_port(config), Dispatcher(config), threading.Event()
    problems: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(run(config, list_models(config), listening, dispatcher, is_open.set))
        except BaseException as error:
            problems.append(error)
        finally:
            is_open.set()

    thread = threading.Thread(target=target)
    thread.start()
    is_open.wait(120)
    try:
        if problems:
            raise problems[0]
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Served(url, dispatcher, client)
    finally:
        dispatcher.is_draining = True
        thread.join(60)
        listening.close()
    assert not thread.is_alive()
