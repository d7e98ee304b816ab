"""The bounded queue, and the workers that it feeds.

Everything here runs in the event loop of the process that answers requests; two threads for each worker move messages.
Images wait in the order of their requests. A worker with a free place gets the first one. It is never sent more images
than it computes at once, so that what waits can still be cancelled or be taken by another worker.
"""

import asyncio
import math
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from uvit.config.serve import ServeConfig
from uvit.errors import UserError
from uvit.serve.requests import ImageTask, ModelRef, RequestError
from uvit.serve.worker import Key, WorkerSettings, default_threads, work

RATE_SECONDS = 60.0  # over which the images per second are counted
MAX_RETRY_AFTER = 120


@dataclass
class Ticket:
    """A request whose images wait or are computed. Its events are read by whoever answers it."""

    tasks: Sequence[ImageTask]
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    left: int = 0  # images that are not finished
    position: int | None = None  # the last one that was told
    submitted: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        return self.tasks[0].id


class WorkerProcess:
    """A worker as the queue sees it."""

    def __init__(self, number: int, settings: WorkerSettings, loop: asyncio.AbstractEventLoop, receive: Any):
        self.number, self.loop, self.receive = number, loop, receive
        self.tasks: dict[Key, ImageTask] = {}
        self.is_ready = False
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, settings), name=f"uvit worker {number}", daemon=True)
        self.process.start()
        other.close()
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for target in (self._send, self._receive):
            threading.Thread(target=target, daemon=True).start()

    def send(self, *message: Any) -> None:
        self.outbox.put(message)

    def _send(self) -> None:
        with suppress(OSError):  # it has ended: `_receive` says so
            while (message := self.outbox.get()) is not None:
                self.connection.send(message)

    def _receive(self) -> None:
        while True:
            message: Any = ("ended",)
            with suppress(EOFError, OSError):
                message = self.connection.recv()
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self.receive, self, *message)
            if message == ("ended",):
                return

    def close(self) -> None:
        self.outbox.put(None)
        self.process.kill()
        self.process.join()

    def models(self) -> set[ModelRef]:
        return {task.model for task in self.tasks.values()}


class Dispatcher:
    """Takes requests, and gives their images to workers."""

    def __init__(self, config: ServeConfig):
        self.config = config
        threads = config.threads or default_threads(config.workers)
        self.settings = [
            WorkerSettings(
                device, config.dtype, threads, config.max_batch_size, config.max_models, config.max_upload_pixels
            )
            for device in devices(config)
        ]
        self.workers: list[WorkerProcess] = []
        self.waiting: deque[ImageTask] = deque()
        self.tickets: dict[str, Ticket] = {}
        self.described: dict[ModelRef, asyncio.Future[dict[str, Any]]] = {}
        self.is_draining = False
        self.finished: deque[float] = deque()  # when the last images were
        self.queue_seconds, self.image_seconds = [0.0, 0.0], [0.0, 0.0]  # sum and count, since the submission
        self.counts = dict.fromkeys(("images", "failed", "cancelled", "rejected", "worker_restarts"), 0)

    # Workers

    async def start(self, models: Sequence[ModelRef]) -> None:
        """Start the workers; returns when they have loaded the models. Raises UserError if one cannot be loaded."""
        self.loop = asyncio.get_running_loop()
        self.started = self.loop.create_future()
        self.workers = [self._new_worker(i) for i in range(len(self.settings))]
        for model in models:
            self.described[model] = self.loop.create_future()
        self.missing = {(worker.number, model) for worker in self.workers for model in models}
        for worker in self.workers:
            for model in models:
                worker.send("describe", model)
        if not models:  # runs that have just begun
            self.started.set_result(None)
        await self.started

    def _new_worker(self, number: int) -> WorkerProcess:
        return WorkerProcess(number, self.settings[number], self.loop, self._receive)

    async def describe(self, model: ModelRef) -> dict[str, Any]:
        """What a worker says of a model. Raises UserError if it cannot be loaded."""
        if model not in self.described:
            self.described[model] = self.loop.create_future()
            min(self.workers, key=lambda worker: len(worker.tasks)).send("describe", model)
        return await asyncio.shield(self.described[model])

    def _receive(self, worker: WorkerProcess, kind: str, *content: Any) -> None:
        if kind == "ended":
            self._restart(worker)
        elif kind == "ready":
            worker.is_ready = True
        elif kind == "model":
            self._describe(worker, *content)
        elif kind == "cancelled":
            worker.tasks.pop(content[0], None)
        elif kind in ("step", "preview"):
            key, *values = content
            names = ("step", "steps") if kind == "step" else ("partial_image_index", "png")
            self._tell(key, kind, **dict(zip(names, values, strict=True)))
        else:  # done, failed
            key, *values = content
            if worker.tasks.pop(key, None) is None:
                return
            fields = ("png", "settings", "warnings") if kind == "done" else ("message", "is_user_error")
            self.counts["images" if kind == "done" else "failed"] += 1
            self._note_time(self.image_seconds, key[0])
            self.finished.append(time.monotonic())
            self._tell(key, kind, **dict(zip(fields, values, strict=True)))
        self._dispatch()

    def _describe(self, worker: WorkerProcess, model: ModelRef, found: dict[str, Any] | None, problem: str) -> None:
        future = self.described.get(model)
        if future is not None and not future.done():
            if found is not None:
                future.set_result(found)
            else:
                future.set_exception(UserError(problem))
                future.exception()  # may be asked for by nobody
                if self.started.done():
                    del self.described[model]
        if not self.started.done():
            self.missing.discard((worker.number, model))
            if found is None:
                self.started.set_exception(UserError(problem))
            elif not self.missing:
                self.started.set_result(None)

    def _restart(self, worker: WorkerProcess) -> None:
        """A worker has ended by itself, perhaps for want of memory: its images fail, and another takes its place."""
        if worker not in self.workers:
            return
        worker.close()
        if not self.started.done():
            code = worker.process.exitcode
            self.started.set_exception(RuntimeError(f"a worker ended with status {code} before it could compute"))
            return
        self.counts["worker_restarts"] += 1
        for key in worker.tasks:
            self.counts["failed"] += 1
            message = "the process that computed this image ended; ask again"
            self._tell(key, "failed", message=message, is_user_error=False)
        for model, future in list(self.described.items()):
            if not future.done():
                del self.described[model]
                future.set_exception(UserError("the process that loaded this model ended; ask again"))
        self.workers[worker.number] = self._new_worker(worker.number)

    def close(self) -> None:
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.close()

    # Requests

    def submit(self, tasks: Sequence[ImageTask]) -> Ticket:
        """Raises RequestError if the queue is full, or the server is about to end."""
        if self.is_draining:
            raise about_to_end()
        if len(self.waiting) + len(tasks) > self.config.max_queue_size + self._free_places():
            self.counts["rejected"] += 1
            raise RequestError(
                f"the queue is full: {len(self.waiting)} images wait, and {self.num_running} are computed; try again "
                f"in {self.retry_after()} s",
                429,
                code="queue_full",
            )
        ticket = Ticket(tasks, left=len(tasks))
        self.tickets[ticket.id] = ticket
        self.waiting.extend(tasks)
        self._dispatch()
        return ticket

    def cancel(self, id: str, error: RequestError | None = None) -> bool:
        """Drop what is left of a request, which is answered with an error. Returns whether there was anything."""
        ticket = self.tickets.pop(id, None)
        if ticket is None:
            return False
        self.counts["cancelled"] += ticket.left
        self.waiting = deque(task for task in self.waiting if task.id != id)
        for worker in self.workers:
            for key in worker.tasks:
                if key[0] == id:
                    worker.send("cancel", key)
        error = error or RequestError("the request was cancelled", 499, code="cancelled")
        ticket.events.put_nowait({"type": "cancelled", "error": error})
        self._dispatch()
        return True

    def end_all(self) -> None:
        """Answer 503 to everybody who waits."""
        for id in list(self.tickets):
            self.cancel(id, about_to_end())
        for future in self.described.values():
            if not future.done():
                future.set_exception(about_to_end())
                future.exception()  # may be asked for by nobody

    def retry_after(self) -> int:
        """Seconds after which the images that wait now will probably have been computed."""
        now = time.monotonic()
        while self.finished and self.finished[0] < now - RATE_SECONDS:
            self.finished.popleft()
        if not self.finished:
            return 10
        rate = len(self.finished) / max(1.0, now - self.finished[0])
        return min(MAX_RETRY_AFTER, max(1, math.ceil(len(self.waiting) / rate)))

    @property
    def num_running(self) -> int:
        return sum(len(worker.tasks) for worker in self.workers)

    def metrics(self) -> str:
        """In Prometheus' text format."""
        gauges = {"waiting": len(self.waiting), "running": self.num_running, "workers": len(self.workers)}
        lines = []
        for name, value in gauges.items():
            lines += [f"# TYPE uvit_{name} gauge", f"uvit_{name} {value}"]
        for name, value in self.counts.items():
            lines += [f"# TYPE uvit_{name}_total counter", f"uvit_{name}_total {value}"]
        for name, seconds in (("queue", self.queue_seconds), ("image", self.image_seconds)):
            lines += [f"# TYPE uvit_{name}_seconds summary"]
            lines += [f"uvit_{name}_seconds_sum {seconds[0]:.6f}", f"uvit_{name}_seconds_count {seconds[1]:.0f}"]
        return "\n".join(lines) + "\n"

    def _free_places(self) -> int:
        return sum(self.config.max_batch_size - len(worker.tasks) for worker in self.workers)

    def _dispatch(self) -> None:
        while self.waiting and (worker := self._worker_for(self.waiting[0])):
            task = self.waiting.popleft()
            worker.tasks[task.id, task.index] = task
            worker.send("task", task)
            self._note_time(self.queue_seconds, task.id)
        self._tell_positions()

    def _worker_for(self, task: ImageTask) -> WorkerProcess | None:
        """The one with the fewest images, among those that have a place for the image and for its model."""
        able = [
            worker
            for worker in self.workers
            if len(worker.tasks) < self.config.max_batch_size
            and len(worker.models() | {task.model}) <= self.config.max_models
        ]
        return min(able, key=lambda worker: len(worker.tasks), default=None)

    def _tell_positions(self) -> None:
        """Each request that waits: how many images go before its first one."""
        seen = set()
        for i, task in enumerate(self.waiting):
            ticket = self.tickets[task.id]
            if task.id not in seen and ticket.left == len(ticket.tasks) and task.index == 0 and ticket.position != i:
                ticket.position = i
                ticket.events.put_nowait({"type": "queued", "position": i})
            seen.add(task.id)

    def _note_time(self, seconds: list[float], id: str) -> None:
        if ticket := self.tickets.get(id):
            seconds[0] += time.monotonic() - ticket.submitted
            seconds[1] += 1

    def _tell(self, key: Key, kind: str, **event: Any) -> None:
        ticket = self.tickets.get(key[0])
        if ticket is None:  # cancelled
            return
        if kind in ("done", "failed"):
            ticket.left -= 1
            if not ticket.left:
                del self.tickets[ticket.id]
        ticket.events.put_nowait({"type": kind, "index": key[1], **event})


def about_to_end() -> RequestError:
    return RequestError("the server is about to end; try again at another one, or later", 503, code="draining")


def devices(config: ServeConfig) -> list[str]:
    """The device of each worker: with `auto` and several GPUs, one after another."""
    if config.device != "auto" or config.workers == 1:
        return [config.device] * config.workers
    import torch

    count = torch.cuda.device_count()
    return [f"cuda:{i % count}" if count else "cpu" for i in range(config.workers)]
