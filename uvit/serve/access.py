"""Who is answered: the checks before any route sees a request."""

import asyncio
import hmac
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uvit.config.serve import ServeConfig
from uvit.serve.requests import RequestError, error_body

LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
OPEN_PATHS = ("/", "/health")  # without a key: the page asks for it
CHECK_SECONDS = 0.5  # how often it is looked whether a body still has time to arrive
STORED_IMAGES = "/v1/images/"  # GET: whoever has an image's url, which cannot be guessed, may see it


def split_url(url: str) -> SplitResult:
    """Its parts; empty ones of what is no URL."""
    try:
        return urlsplit(url)
    except ValueError:  # a bracket that is never closed
        return urlsplit("")


class Access:
    """ASGI middleware: the name of the server, the page that asks, the key, and the size and time of the body.

    Args:
        is_draining: whether the server is about to end.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, is_draining: Callable[[], bool]):
        self.app, self.config, self.is_draining = app, config, is_draining
        given = {name.lower() for name in (*config.allowed_hosts, config.host)}
        names = given | (LOOPBACK_NAMES if config.is_loopback() else set())
        checks_names = (config.is_loopback() or bool(config.allowed_hosts)) and "*" not in names
        self.names = names if checks_names else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.check(scope["method"], scope["path"], Headers(scope=scope))
        except RequestError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            await JSONResponse({"error": error_body(error)}, error.status, headers)(scope, receive, send)
            return
        await self.app(scope, self.limited(receive), send)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raises RequestError."""
        host = headers.get("host", "")
        name = (split_url(f"//{host}").hostname or "").lower()
        if self.names is not None and name not in self.names:
            raise RequestError(f"--allowed_hosts: the server is not called {name}; start it with that name", 421)
        origin, allowed = headers.get("origin"), self.config.allowed_origins
        is_foreign = origin is not None and split_url(origin).netloc != host and origin not in allowed
        if is_foreign and method not in ("GET", "HEAD", "OPTIONS"):  # any page may send a form to this address
            raise RequestError(f"--allowed_origins: pages of {origin} may not use this server", 403)
        if (key := self.config.key()) is not None and method != "OPTIONS":
            is_stored_image = method == "GET" and path.startswith(STORED_IMAGES)
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_open = path in OPEN_PATHS or is_stored_image
            is_right = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())
            if not is_open and not is_right:
                sentence = "the API key is missing or wrong; send `Authorization: Bearer KEY`"
                raise RequestError(sentence, 401, code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.config.max_upload_bytes:
            raise RequestError(self.too_large(), 413)

    def limited(self, receive: Receive) -> Receive:
        """A body without Content-Length may be too large as well, and any body may never arrive."""
        count, is_whole, end = 0, False, time.monotonic() + self.config.request_timeout

        async def receive_limited() -> Message:
            nonlocal count, is_whole
            message = await (receive() if is_whole else self.in_time(receive, end))
            is_whole = not message.get("more_body", False)
            count += len(message.get("body", b""))
            if count > self.config.max_upload_bytes:
                raise HTTPException(413, self.too_large())
            return message

        return receive_limited

    async def in_time(self, receive: Receive, end: float) -> Message:
        """The next part of a body. Raises HTTPException when its time is over, or the server is about to end."""
        arriving = asyncio.ensure_future(receive())
        try:
            while True:
                has_arrived = bool((await asyncio.wait({arriving}, timeout=CHECK_SECONDS))[0])
                if self.is_draining():
                    raise HTTPException(503, "the server is about to end; try again later", {"Connection": "close"})
                if time.monotonic() > end:
                    seconds = f"{self.config.request_timeout:g} s"
                    raise HTTPException(408, f"the request did not arrive within {seconds}", {"Connection": "close"})
                if has_arrived:
                    return arriving.result()
        finally:
            arriving.cancel()

    def too_large(self) -> str:
        return f"the request is too large; at most {self.config.max_upload_bytes:,} bytes are read"
