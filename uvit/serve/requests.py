"""What a request may say, and the tasks that it stands for: one for each image.

The checks are those of `uvit sample`, with its sentences.
"""

import re
import secrets
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from uvit.config.sample import SPEEDS, SampleConfig, Scheduler, is_text
from uvit.config.serve import ServeConfig
from uvit.errors import UserError

MAX_PARTIAL_IMAGES = 10
UPLOAD = "upload"  # stands for the path of an image that came with the request


class GenerationRequest(BaseModel):
    """The body of POST /v1/images/generations: OpenAI's fields, and those of `uvit sample`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What the images show.")
    n: int = Field(1, description="The number of images.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto: the size of the model.")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="Default: b64_json.")
    model: str | None = Field(None, description="NAME, or NAME@checkpoint-N of a run. Default: the first model.")
    user: str | None = Field(None, description="Is ignored.")
    stream: bool | None = Field(None, description="Whether to answer by server-sent events.")
    partial_images: int | None = Field(None, ge=0, le=MAX_PARTIAL_IMAGES, description="Previews of each image.")
    seed: int | None = Field(None, description="Of the first image; each further image adds 1. Default: random.")
    num_inference_steps: int | None = Field(None, description="Sampling steps.")
    guidance_scale: float | None = Field(None, description="Classifier-free guidance; 1 turns it off.")
    guidance_interval: list[float] | None = Field(None, description="[lowest, highest] timestep with guidance.")
    negative_prompt: str | None = Field(None, description="Steer away from this text.")
    scheduler: str | None = Field(None, description="The solver.")
    speed: str | None = Field(None, description="A fitted solver, instead of scheduler and num_inference_steps.")
    # Of OpenAI's API, without a meaning here: accepted with the value that changes nothing.
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None


class EditRequest(GenerationRequest):
    """The fields of POST /v1/images/edits, besides its files."""

    model_config = ConfigDict(extra="forbid", strict=False)  # a form has texts alone

    strength: float | None = Field(None, description="How much of the image may change, above 0 to 1.")


@dataclass(frozen=True)
class ModelRef:
    """A model as a worker finds it."""

    id: str  # NAME, or NAME@checkpoint-N
    path: str  # a pipeline folder or a checkpoint
    is_checkpoint: bool
    version: tuple[tuple[int, int], ...]  # (when it was written, in ns, and the bytes) of each of its files


@dataclass(frozen=True)
class ImageTask:
    """One image to generate, as it is sent to a worker."""

    id: str  # of the request
    index: int  # which of its images
    model: ModelRef
    config: SampleConfig  # with one prompt, its seed and one guidance scale
    size: tuple[int, int] | None  # (height, width); None: that of the model
    partial_images: int = 0
    image: bytes | None = None  # an image file
    mask: bytes | None = None


class RequestError(UserError):
    """A request that is refused: its status, and the field that is wrong."""

    def __init__(self, sentence: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(sentence)
        self.status, self.code = status, code
        found = re.match(r"--(\w+)", sentence)
        self.param = param or (found[1] if found else None)


def tasks_of(
    request: GenerationRequest,
    model: ModelRef,
    limits: ServeConfig,
    image: bytes | None = None,
    mask: bytes | None = None,
) -> list[ImageTask]:
    """The images of a request, one task each. Raises RequestError or UserError."""
    check_limits(request, limits)
    given = {
        name: value
        for name in ("num_inference_steps", "guidance_scale", "negative_prompt", "scheduler", "speed", "strength")
        if (value := getattr(request, name, None)) is not None
    }
    if request.speed is None:
        given.setdefault("num_inference_steps", limits.num_inference_steps)
    given["guidance_scale"] = (given.get("guidance_scale", limits.guidance_scale),)
    check_choices(request)
    if request.guidance_interval is not None:
        if len(request.guidance_interval) != 2:
            raise RequestError(f"--guidance_interval {_words(request.guidance_interval)}: must be two timesteps")
        given["guidance_interval"] = tuple(request.guidance_interval)
    seed = request.seed if request.seed is not None else secrets.randbelow(2**32)
    if not is_text(request.prompt):
        raise RequestError("--prompt: is not Unicode text; send UTF-8", param="prompt")
    try:
        config = SampleConfig(
            pipeline=model.id,
            prompts=(request.prompt,),
            seed=seed,
            init_image=UPLOAD if image is not None else None,
            mask=UPLOAD if mask is not None else None,
            **given,
        ).resolved()
    except UserError as error:  # the field of the API is called `image`
        raise RequestError(str(error.args[0]).replace(f"--init_image {UPLOAD}:", "--image:")) from None
    if config.num_inference_steps > limits.max_steps:
        raise RequestError(f"--num_inference_steps {config.num_inference_steps}: must be at most {limits.max_steps}")
    size, id = parse_size(request.size), secrets.token_hex(12)
    return [
        ImageTask(id, i, model, replace(config, seed=seed + i), size, request.partial_images or 0, image, mask)
        for i in range(request.n)
    ]


def check_limits(request: GenerationRequest, limits: ServeConfig) -> None:
    if not 1 <= request.n <= limits.most_images():
        raise RequestError(f"--n {request.n}: must be in 1..{limits.most_images()}")
    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name) or ""
        if len(text) > limits.max_prompt_characters:
            raise RequestError(
                f"--{name}: has {len(text):,} characters; at most {limits.max_prompt_characters:,} are read"
            )


def check_choices(request: GenerationRequest) -> None:
    """The command line's parser checks these; here it is not asked."""
    for name, choices in (("scheduler", get_args(Scheduler)), ("speed", SPEEDS)):
        value = getattr(request, name)
        if value is not None and value not in choices:
            raise RequestError(f"--{name} {value}: must be one of {', '.join(choices)}")


def parse_size(size: str | None) -> tuple[int, int] | None:
    """`64x32`, width first as in OpenAI's API -> (height, width)."""
    if size is None or size == "auto":
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not found or not int(found[1]) or not int(found[2]):
        raise RequestError(f"--size {size}: must be auto, or WIDTHxHEIGHT such as 64x64")
    return int(found[2]), int(found[1])


def settings_of(task: ImageTask) -> dict[str, Any]:
    """The settings of an image, as the fields of a request that makes it again."""
    config = task.config
    settings: dict[str, Any] = {
        "prompt": config.prompts[0],
        "model": task.model.id,
        "seed": config.seed,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale[0],
        "guidance_interval": list(config.guidance_interval),
        "negative_prompt": config.negative_prompt,
        "scheduler": config.scheduler,
        "strength": config.strength,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _words(values: list[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def error_body(error: RequestError) -> dict[str, Any]:
    """The `error` of OpenAI's API."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    message = str(error.args[0]).encode(errors="backslashreplace").decode()  # halves of surrogate pairs are no UTF-8
    return {"message": message, "type": kind, "param": error.param, "code": error.code}
