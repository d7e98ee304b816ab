"""A worker: the process, and in it the one thread, that owns pipelines and computes images.

It takes tasks from a pipe and answers with messages. Every image is at a step of its own. In each round, all of them
ask the network together (`uvit.sample.batching`). So a new image joins between two steps, and a cancelled one leaves
there, and the others do not change.
"""

import importlib
import os
import signal
import traceback
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from uvit.cli.quick_imports import import_less
from uvit.errors import UserError
from uvit.serve.requests import ImageTask, ModelRef, settings_of

Key = tuple[str, int]  # of a task: its request, and which image


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is told at its start."""

    device: str
    dtype: str
    threads: int | None
    max_batch_size: int
    max_models: int
    max_upload_pixels: int


def work(connection: Connection, settings: WorkerSettings) -> None:
    """The process: answer messages until the other end of the pipe is closed."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # the server says when to end: it finishes its requests first
        signal.signal(stop, signal.SIG_IGN)
    import_less(is_distributed=False)
    computing = importlib.import_module("uvit.serve.loaded")  # with torch, which the process that asks does without
    computing.set_threads(settings.threads)
    try:
        Worker(connection, settings, computing).run()
    except (EOFError, BrokenPipeError):  # the server has ended
        return


@dataclass
class Running:
    """An image that is being computed."""

    task: ImageTask
    steps: Generator[Any, Any, Any]
    loaded: Any
    inputs: Any  # what it asks the network now
    num_steps: int
    step: int = 0
    previews: dict[int, int] = field(default_factory=dict)  # {step: number}


class Worker:
    def __init__(self, connection: Connection, settings: WorkerSettings, computing: Any):
        self.connection, self.settings, self.computing = connection, settings, computing
        self.loaded: OrderedDict[ModelRef, Any] = OrderedDict()  # the one used last is last
        self.running: dict[Key, Running] = {}

    def run(self) -> None:
        self.connection.send(("ready",))
        while True:
            while not self.running or self.connection.poll():
                self.receive(*self.connection.recv())
            self.advance()

    def receive(self, kind: str, *content: Any) -> None:
        if kind == "describe":
            (ref,) = content
            try:
                self.connection.send(("model", ref, self.load(ref).description, None))
            except Exception as error:
                self.connection.send(("model", ref, None, explain(error)))
        elif kind == "cancel":
            if found := self.running.pop(content[0], None):
                found.steps.close()
            self.connection.send(("cancelled", content[0]))
        else:
            task: ImageTask = content[0]
            key = (task.id, task.index)
            try:
                self.running[key] = self.begin(task)
            except Exception as error:
                self.fail(key, error)

    def begin(self, task: ImageTask) -> Running:
        loaded = self.load(task.model)
        steps, num_steps = loaded.steps(task, self.settings.max_upload_pixels)
        running = Running(task, steps, loaded, next(steps), num_steps)
        wanted = min(task.partial_images, num_steps - 1)
        # Evenly spaced, the last of them before the end.
        running.previews = {round((i + 1) * num_steps / (wanted + 1)): i for i in range(wanted)}
        return running

    def advance(self) -> None:
        """One step of every image."""
        by_model: dict[int, list[Key]] = {}
        for key, running in self.running.items():
            by_model.setdefault(id(running.loaded), []).append(key)
        for keys in by_model.values():
            network = self.running[keys[0]].loaded.network
            try:
                predictions = network([self.running[key].inputs for key in keys])
            except Exception:  # perhaps there is too little memory for all of them, or one of them is at fault
                predictions = [None] * len(keys)
            for key, prediction in zip(keys, predictions, strict=True):
                running = self.running[key]
                try:
                    self.step(key, running, network([running.inputs])[0] if prediction is None else prediction)
                except Exception as error:
                    self.fail(key, error)

    def step(self, key: Key, running: Running, prediction: Any) -> None:
        asked = running.inputs
        running.step += 1
        try:
            running.inputs = running.steps.send(prediction)
        except StopIteration as end:
            text = running.loaded.metadata(running.task)
            settings = settings_of(running.task) | {"unet_sha256": text["unet_sha256"]}
            settings |= {"size": "{}x{}".format(*end.value.size)}
            del self.running[key]
            png = self.computing.png_bytes(end.value, text)
            self.connection.send(("done", key, png, settings, running.loaded.warnings(running.task)))
            return
        self.connection.send(("step", key, running.step, running.num_steps))
        if (number := running.previews.get(running.step)) is not None:
            image = running.loaded.preview(running.task, asked, prediction)
            self.connection.send(("preview", key, number, self.computing.png_bytes(image, {})))

    def fail(self, key: Key, error: Exception) -> None:
        self.running.pop(key, None)
        self.connection.send(("failed", key, explain(error), isinstance(error, UserError)))

    def load(self, ref: ModelRef) -> Any:
        if ref not in self.loaded:
            busy = {id(running.loaded) for running in self.running.values()}
            for other in list(self.loaded):
                if len(self.loaded) < self.settings.max_models:
                    break
                if id(self.loaded[other]) not in busy:
                    del self.loaded[other]
            self.computing.free_memory()
            self.loaded[ref] = self.computing.LoadedModel(ref, self.settings)
        self.loaded.move_to_end(ref)
        return self.loaded[ref]


def explain(error: Exception) -> str:
    """The sentence of a mistake; of a bug, its traceback is printed, and the sentence says no more than that."""
    if isinstance(error, UserError):
        return str(error.args[0])
    traceback.print_exception(error)
    return "the server failed to compute this; its log says why"


def default_threads(workers: int) -> int | None:
    """The cores of this process, divided among the workers; None where the environment says how many."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // workers)
