"""The routes: OpenAI's image API, what the page asks beside it, and the page."""

import asyncio
import base64
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from uvit import __version__
from uvit.config.serve import ServeConfig
from uvit.errors import UserError
from uvit.serve.access import Access
from uvit.serve.models import ServedModel, find_model
from uvit.serve.page import read_page
from uvit.serve.queue import Dispatcher, Ticket
from uvit.serve.requests import EditRequest, GenerationRequest, ImageTask, RequestError, error_body, tasks_of
from uvit.serve.runs import run_routes

MAX_STORED_BYTES = 256 * 2**20  # of images that are answered by url
KEEP_ALIVE_SECONDS = 15.0  # between two signs of life in a stream


MAX_FILES, MAX_FIELDS = 2, 50  # of a form
_FILE = {"type": "string", "format": "binary"}
_FORM = EditRequest.model_json_schema()
EDIT_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": _FORM
                | {
                    "properties": {"image": _FILE, "mask": _FILE, **_FORM["properties"]},
                    "required": ["image", "prompt"],
                }
            }
        },
    }
}


class ImageStore:
    """PNG files in memory, by an id that cannot be guessed; the oldest go first."""

    def __init__(self) -> None:
        self.images: OrderedDict[str, bytes] = OrderedDict()
        self.size = 0

    def add(self, png: bytes) -> str:
        id = secrets.token_urlsafe(16)
        self.images[id] = png
        self.size += len(png)
        while self.size > MAX_STORED_BYTES and len(self.images) > 1:
            self.size -= len(self.images.popitem(last=False)[1])
        return id


def build_app(config: ServeConfig, models: dict[str, ServedModel], dispatcher: Dispatcher) -> FastAPI:
    app = FastAPI(title="uvit", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Access, config=config, is_draining=lambda: dispatcher.is_draining)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    store = ImageStore()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        content, headers = read_page()
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "draining" if dispatcher.is_draining else "ok",
            "version": __version__,
            "waiting": len(dispatcher.waiting),
            "running": dispatcher.num_running,
        }

    @app.get("/v1/limits")
    async def limits() -> dict[str, int]:
        return {
            "n": config.most_images(),
            "steps": config.max_steps,
            "prompt_characters": config.max_prompt_characters,
            "upload_bytes": config.max_upload_bytes,
            "upload_pixels": config.max_upload_pixels,
            "queue": config.max_queue_size,
        }

    @app.get("/v1/models")
    async def list_all_models() -> dict[str, Any]:
        return {"object": "list", "data": [await describe(model) for model in models.values()]}

    async def describe(model: ServedModel) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": model.name, "object": "model", "created": 0, "owned_by": "uvit"}
        known: dict[str, Any] = {"run": model.is_run, "checkpoints": model.checkpoints() if model.is_run else []}
        with suppress(UserError):  # a run without a checkpoint
            ref = model.ref()
            entry["created"] = max((modified for modified, _ in ref.version), default=0) // 10**9
            known |= await dispatcher.describe(ref)
        defaults = {
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
            "guidance_interval": [1, 1000],
            "scheduler": "dpmsolver++",
            "strength": 0.8,
        }
        return entry | {"uvit": known | {"defaults": defaults}}

    @app.post("/v1/images/generations", response_model=None)
    async def generate(body: GenerationRequest, request: Request) -> Response:
        return await answer(body, tasks_of(body, find_model(models, body.model), config), request)

    @app.post("/v1/images/edits", response_model=None, openapi_extra=EDIT_FORM)
    async def edit(request: Request) -> Response:
        body, image, mask = await read_form(request)
        return await answer(body, tasks_of(body, find_model(models, body.model), config, image, mask), request)

    async def answer(body: GenerationRequest, tasks: Sequence[ImageTask], request: Request) -> Response:
        ticket = dispatcher.submit(tasks)
        created = int(time.time())
        if body.stream:
            stream = events_of(ticket, created)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        images = await collect(ticket, request)
        data = []
        for image in images:
            entry = {"seed": image["settings"]["seed"], "settings": image["settings"], "warnings": image["warnings"]}
            if body.response_format == "url":
                entry["url"] = str(request.url_for("stored_image", id=store.add(image["png"])))
            else:
                entry["b64_json"] = base64.b64encode(image["png"]).decode()
            data.append(entry)
        return JSONResponse({"created": created, "data": data})

    async def collect(ticket: Ticket, request: Request) -> list[dict[str, Any]]:
        """The finished images of a request, in order. It is cancelled when the client goes or the time is over."""

        async def all_images() -> list[dict[str, Any]]:
            done: dict[int, dict[str, Any]] = {}
            while len(done) < len(ticket.tasks):
                event = await ticket.events.get()
                if event["type"] in ("failed", "cancelled"):
                    raise failure(event)
                if event["type"] == "done":
                    done[event["index"]] = event
            return [done[i] for i in sorted(done)]

        async def client_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        finished, gone = asyncio.ensure_future(all_images()), asyncio.ensure_future(client_gone())
        try:
            await asyncio.wait({finished, gone}, timeout=config.request_timeout, return_when=asyncio.FIRST_COMPLETED)
            if finished.done():
                return finished.result()
            if gone.done():
                raise RequestError("the client is gone", 499, code="cancelled")
            raise timed_out()
        finally:
            dispatcher.cancel(ticket.id)
            for future in (finished, gone):
                future.cancel()

    def timed_out() -> RequestError:
        return RequestError(
            f"the request took more than {config.request_timeout:g} s, and was given up", 504, code="timeout"
        )

    async def events_of(ticket: Ticket, created: int) -> AsyncIterator[str]:
        """Server-sent events. The request is cancelled when the client closes the connection."""
        end = time.monotonic() + config.request_timeout
        try:
            yield sse("image_generation.queued", id=ticket.id, position=ticket.position or 0)
            left = len(ticket.tasks)
            while left:
                timeout = min(KEEP_ALIVE_SECONDS, end - time.monotonic())
                if timeout <= 0:
                    yield sse("error", error=error_body(timed_out()))
                    return
                try:
                    event = await asyncio.wait_for(ticket.events.get(), timeout)
                except TimeoutError:
                    yield ": waiting\n\n"
                    continue
                kind = event.pop("type")
                if kind == "queued":
                    yield sse("image_generation.queued", id=ticket.id, position=event["position"])
                elif kind == "step":
                    yield sse("image_generation.progress", id=ticket.id, **event)
                elif kind == "preview":
                    yield image_event("partial_image", created, **event)
                elif kind == "done":
                    yield image_event("completed", created, **event)
                    left -= 1
                else:  # failed or cancelled
                    yield sse("error", error=error_body(failure(event)))
                    return
        finally:
            dispatcher.cancel(ticket.id)

    @app.post("/v1/images/cancel/{id}")
    async def cancel(id: str) -> dict[str, Any]:
        return {"id": id, "cancelled": dispatcher.cancel(id)}

    @app.get("/v1/images/{id}.png", name="stored_image")
    async def stored_image(id: str) -> Response:
        if id not in store.images:
            raise RequestError(f"image {id}: is not kept any more", 404, code="not_found")
        return Response(store.images[id], media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(dispatcher.metrics(), media_type="text/plain; version=0.0.4")

    app.include_router(run_routes(models))

    def retry_header(status: int) -> dict[str, str]:
        return {"Retry-After": str(dispatcher.retry_after())} if status in (429, 503) else {}

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        refused = error if isinstance(error, RequestError) else RequestError(str(error.args[0]))
        return JSONResponse({"error": error_body(refused)}, refused.status, retry_header(refused.status))

    @app.exception_handler(RequestValidationError)
    async def wrong_field(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(part for part in first["loc"] if isinstance(part, str) and part != "body")
        refused = RequestError(f"--{where}: {first['msg']}" if where else first["msg"], 400, where or None)
        return JSONResponse({"error": error_body(refused)}, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = {**(error.headers or {}), **retry_header(error.status_code)}
        refused = RequestError(str(error.detail), error.status_code)
        return JSONResponse({"error": error_body(refused)}, error.status_code, headers)

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # in the middle of a body; nobody reads this

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": error_body(RequestError("the server failed; its log says why", 500))}, 500)

    return app


async def read_form(request: Request) -> tuple[EditRequest, bytes, bytes | None]:
    """The fields, the image and the mask of an edit. Raises RequestError or RequestValidationError."""
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
        for name, value in form.multi_items():
            plain = name.removesuffix("[]")  # the names of lists, as the client of OpenAI sends them
            if isinstance(value, str):
                items = re.split(r"[\s,]+", value.strip()) if plain == "guidance_interval" else [value]
                fields[plain] = [*fields.get(plain, []), *items] if plain == "guidance_interval" else value
            elif plain in files:
                raise RequestError(f"--{plain}: there are several; send one", param=plain)
            else:
                files[plain] = await value.read()
    image, mask = files.pop("image", None), files.pop("mask", None)
    if image is None:
        raise RequestError("--image: is missing; send an image file in a form (multipart/form-data)", param="image")
    for name in files:
        raise RequestError(f"--{name}: must be a field of the form, and is a file", param=name)
    try:
        return EditRequest.model_validate(fields), image, mask
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def failure(event: dict[str, Any]) -> RequestError:
    if "error" in event:  # cancelled
        return event["error"]
    if event["is_user_error"]:
        return RequestError(event["message"])
    return RequestError(event["message"], 500, code="server_error")


def sse(event: str, **data: Any) -> str:
    return f"event: {event}\ndata: {json.dumps({'type': event, **data})}\n\n"


def image_event(kind: str, created: int, png: bytes, **data: Any) -> str:
    event = f"image_generation.{kind}"
    return sse(event, b64_json=base64.b64encode(png).decode(), created_at=created, output_format="png", **data)
