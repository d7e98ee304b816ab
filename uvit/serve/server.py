"""`uvit serve`: start the workers, open the port, answer, and drain when the process is asked to end."""

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from uvit.config.serve import ServeConfig
from uvit.errors import UserError
from uvit.serve.app import build_app
from uvit.serve.models import ServedModel, list_models
from uvit.serve.queue import Dispatcher

GRACE_SECONDS = 1.0  # after the end of the drain: for the last answers


def run_server(config: ServeConfig) -> None:
    """Run the command, until SIGTERM or Ctrl-C."""
    models = list_models(config)
    with open_port(config) as listening:
        asyncio.run(run(config, models, listening, Dispatcher(config), lambda: print_address(config, listening)))


class Server(uvicorn.Server):
    """uvicorn's, which ends after the dispatcher's requests have, and at once at the second signal.

    At the end of the drain, what is left is answered 503. Soon after, no client is waited for.
    """

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher, drain_timeout: float):
        super().__init__(config)
        self.dispatcher, self.drain_timeout = dispatcher, drain_timeout
        self.drain_end: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.dispatcher.is_draining:
            self.should_exit = self.force_exit = True
        self.dispatcher.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.dispatcher.is_draining:
            if self.drain_end is None:
                self.drain_end = time.monotonic() + self.drain_timeout
            if time.monotonic() >= self.drain_end:
                self.dispatcher.end_all()
            if not self.dispatcher.tickets:
                self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for answers that are being sent, until the drain ends."""
        now = time.monotonic()
        left = 0.0 if self.force_exit else max(0.0, (self.drain_end or now) - now) + GRACE_SECONDS
        ending = asyncio.ensure_future(super().shutdown(sockets))
        await asyncio.wait({ending}, timeout=left)
        self.dispatcher.end_all()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self.force_exit = True
        await ending
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=GRACE_SECONDS)


async def run(
    config: ServeConfig,
    models: dict[str, ServedModel],
    listening: socket.socket,
    dispatcher: Dispatcher,
    on_open: Callable[[], None],
) -> None:
    """Answer until the dispatcher drains. `on_open` is called when the models are loaded.

    Raises UserError if one cannot be loaded, or if another server has opened the port meanwhile.
    """
    try:
        await dispatcher.start([model.ref() for model in models.values() if model.has_weights])
        app = build_app(config, models, dispatcher)
        server = Server(
            uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off"),
            dispatcher,
            config.drain_timeout,
        )
        try:
            listening.listen()
        except OSError as error:
            raise port_error(config, error) from None
        on_open()
        await server.serve(sockets=[listening])
    finally:
        dispatcher.close()


def open_port(config: ServeConfig) -> socket.socket:
    """Raises UserError if the port cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        raise port_error(config, error) from None
    listening.set_inheritable(True)
    return listening


def port_error(config: ServeConfig, error: OSError) -> UserError:
    return UserError(f"--port {config.port}: cannot be opened at {config.host} ({error.strerror}); choose another")


def print_address(config: ServeConfig, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    names = ", ".join(name for name, _ in config.named_models())
    print(f"{names} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if not config.is_loopback() and config.key() is None:
        print(
            f"--host {config.host}: everybody who can reach this port can use the models and this machine's time; "
            "set an --api_key, and put a proxy with TLS before it",
            flush=True,
        )
