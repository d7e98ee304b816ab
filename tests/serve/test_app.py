"""The routes, asked as clients ask them."""

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serve.parts import Served

HALF = Image.new("RGBA", (32, 32), "black")
HALF.paste((0, 0, 0, 0), (16, 0, 32, 32))  # the right half is transparent, so it is repainted


def decoded(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


ORIGINAL = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)))


def events(served: Served, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "a red circle", "num_inference_steps": 4, "stream": True, **fields}
    with served.client.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    kinds = [line.removeprefix("event: ") for line in lines[::2]]
    data = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert kinds == [each["type"] for each in data]
    return data


def test_models_and_health(served: Served) -> None:
    model, run = served.client.get("/v1/models").json()["data"]
    assert (model["id"], model["uvit"]["resolution"], model["uvit"]["run"]) == ("tiny", [32, 32], False)
    assert (run["id"], run["uvit"]["run"], run["uvit"]["checkpoints"]) == ("run", True, [2, 4])
    assert served.client.get("/health").json()["status"] == "ok"
    assert "<html" in served.client.get("/").text
    assert served.client.get("/v1/limits").json()["n"] == 10
    assert "/v1/images/edits" in served.client.get("/openapi.json").json()["paths"]


def test_images_have_consecutive_seeds_and_their_settings(served: Served) -> None:
    answer = served.generate(n=2, seed=5, guidance_scale=2, guidance_interval=[100, 900]).json()
    assert [image["seed"] for image in answer["data"]] == [5, 6]
    for image in answer["data"]:
        found = decoded(image["b64_json"])
        assert found.size == (32, 32)
        assert (found.info["prompt"], found.info["seed"]) == ("a red circle", str(image["seed"]))
        assert (found.info["guidance_scale"], found.info["guidance_interval"]) == ("2.0", "100 900")
        assert found.info["pipeline"] == "tiny"
    again = {k: v for k, v in image["settings"].items() if k != "unset" and k != "unet_sha256"}
    assert served.generate(**again).json()["data"][0]["b64_json"] == image["b64_json"]


def test_an_image_by_url(served: Served) -> None:
    (image,) = served.generate(response_format="url", seed=1).json()["data"]
    (same,) = served.generate(seed=1).json()["data"]
    answer = httpx.get(image["url"])
    assert (answer.headers["content-type"], answer.content) == ("image/png", base64.b64decode(same["b64_json"]))
    assert served.client.get("/v1/images/no-such-image.png").status_code == 404


def test_a_prompt_that_is_cut_off_is_said(served: Served) -> None:
    (image,) = served.generate("a red circle " * 20).json()["data"]
    assert image["warnings"][0].startswith("the model reads 16 tokens; cut off:")


def test_events(served: Served) -> None:
    found = events(served, n=2, seed=3, partial_images=2)
    assert found[0]["type"] == "image_generation.queued"
    steps = [(e["index"], e["step"], e["steps"]) for e in found if e["type"] == "image_generation.progress"]
    assert sorted(steps) == [(i, step, 4) for i in range(2) for step in (1, 2, 3)]
    partial = [e for e in found if e["type"] == "image_generation.partial_image"]
    assert sorted((e["index"], e["partial_image_index"]) for e in partial) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert decoded(partial[0]["b64_json"]).size == (32, 32)
    completed = {e["index"]: e for e in found if e["type"] == "image_generation.completed"}
    plain = served.generate(num_inference_steps=4, n=2, seed=3).json()["data"]
    assert [completed[i]["b64_json"] for i in range(2)] == [image["b64_json"] for image in plain]
    assert completed[1]["settings"] == plain[1]["settings"]


def test_checkpoints_of_a_run_are_models(served: Served) -> None:
    by_name = served.generate(model="run", seed=1).json()["data"][0]
    fourth = served.generate(model="run@checkpoint-4", seed=1).json()["data"][0]
    second = served.generate(model="run@checkpoint-2", seed=1).json()["data"][0]
    assert by_name["settings"]["model"] == "run@checkpoint-4"
    assert by_name["b64_json"] == fourth["b64_json"]
    assert second["settings"]["unet_sha256"] != fourth["settings"]["unet_sha256"]
    refused = served.generate(model="run@checkpoint-3")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert "2, 4" in refused.json()["error"]["message"]


def test_edits(served: Served) -> None:
    def edit(**fields: Any) -> httpx.Response:
        files = {name: fields.pop(name) for name in ("image", "mask") if name in fields}
        data = {"prompt": "two cats", "num_inference_steps": "4", "seed": "2", **fields}
        return served.client.post("/v1/images/edits", data=data, files=files)

    changed = edit(image=ORIGINAL, strength="0.5").json()["data"][0]
    assert changed["settings"]["strength"] == 0.5
    masked = edit(image=ORIGINAL, mask=png(HALF), guidance_interval="100 900").json()["data"][0]
    assert masked["settings"]["guidance_interval"] == [100, 900]
    original, image = np.asarray(decoded(base64.b64encode(ORIGINAL).decode())), np.asarray(decoded(masked["b64_json"]))
    assert np.array_equal(image[:, :16], original[:, :16])
    assert not np.array_equal(image[:, 16:], original[:, 16:])
    as_file = {"image": ("i.png", ORIGINAL), "prompt": ("prompt.txt", b"two cats")}
    answer = served.client.post("/v1/images/edits", data={"seed": "2"}, files=as_file)
    assert answer.status_code == 400 and "--prompt: must be a field" in answer.json()["error"]["message"]
    for fields, words in [
        ({}, "--image: is missing"),
        ({"image": b"no image"}, "not an image format"),
        ({"image": ORIGINAL, "mask": png(HALF.resize((8, 8)))}, "--mask: has 8 x 8 pixels"),
        ({"image": ORIGINAL, "strength": "2"}, "--strength 2.0: must be above 0 and at most 1"),
        ({"image": ORIGINAL, "strength": "0.1"}, "is less than one step"),
        ({"image": ORIGINAL, "n": "many"}, "--n"),
        ({"image": ORIGINAL, "scheduler": "fitted"}, "--image: the fitted solver starts from pure noise"),
        ({"image": png(Image.new("1", (5000, 5000)))}, "5000 x 5000 pixels; at most 16,000,000 are read"),
    ]:
        answer = edit(**fields)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["param"] in {*fields, "image"}


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": None}, "prompt", "prompt"),
    ({"prompt": "\ud800"}, "Unicode", "prompt"),
    ({"prompt": "x" * 3000}, "3,000 characters; at most 2,000", "prompt"),
    ({"n": 0}, "must be in 1..10", "n"),
    ({"n": 11}, "must be in 1..10", "n"),
    ({"n": True}, "--n", "n"),
    ({"size": "big"}, "--size big: must be auto", "size"),
    ({"size": "0x0"}, "--size 0x0", "size"),
    ({"size": "30x30"}, "multiples of 4", "size"),
    ({"size": "64x64"}, "positions", "size"),
    ({"response_format": "jpg"}, "response_format", "response_format"),
    ({"model": "\ud800"}, r"\ud800", "model"),
    ({"size": "\ud800"}, r"--size \ud800", "size"),
    ({"model": "../tiny"}, "there is no such model; the models are tiny, run", "model"),
    ({"model": "tiny@checkpoint-1"}, "no such model", "model"),
    ({"partial_images": 11}, "partial_images", "partial_images"),
    ({"seed": -1}, "--seed -1", "seed"),
    ({"seed": 2**63 - 1, "n": 2}, "--seed", "seed"),
    ({"num_inference_steps": 0}, "must be in 1..1,000", "num_inference_steps"),
    ({"num_inference_steps": 251}, "must be at most 250", "num_inference_steps"),
    ({"num_inference_steps": 2.5}, "num_inference_steps", "num_inference_steps"),
    ({"guidance_scale": -1}, "must be in 0..1,000; 1 turns guidance off", "guidance_scale"),
    ({"guidance_scale": "high"}, "guidance_scale", "guidance_scale"),
    ({"guidance_interval": [5]}, "two timesteps", "guidance_interval"),
    ({"guidance_interval": [900, 100]}, "the lower one first", "guidance_interval"),
    ({"negative_prompt": "x" * 3000}, "--negative_prompt", "negative_prompt"),
    ({"scheduler": "best"}, "must be one of dpmsolver++", "scheduler"),
    ({"scheduler": "fitted"}, "no solver of 3 steps is fitted", None),
    ({"speed": "light"}, "must be one of fast, balanced, quality", "speed"),
    ({"speed": "fast", "num_inference_steps": 7}, "leave these out", "speed"),
    ({"quality": "hd"}, "quality", "quality"),
    ({"path": "/etc/passwd"}, "path", "path"),
]


@pytest.mark.parametrize(("fields", "words", "param"), WRONG, ids=str)
def test_a_wrong_field_is_named(served: Served, fields: dict[str, Any], words: str, param: str | None) -> None:
    content = json.dumps({"prompt": "a", "num_inference_steps": 3} | fields)
    answer = served.client.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404)
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"prompt": NaN}', "[" * 100_000], ids=lambda c: c[:20])
def test_a_body_that_is_no_request(served: Served, content: str) -> None:
    answer = served.client.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert served.client.get("/v1/no/such/route").json()["error"]["message"] == "Not Found"


def test_the_client_of_openai_works_unchanged(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny", "run"]
        more = {"num_inference_steps": 3, "seed": 5}
        answer = client.images.generate(prompt="a red circle", model="tiny", n=2, size="auto", extra_body=more)
        assert [decoded(image.b64_json or "").size for image in answer.data or []] == [(32, 32)] * 2
        url = client.images.generate(prompt="a", response_format="url", extra_body=more).data[0].url  # type: ignore[index]
        assert httpx.get(url).status_code == 200  # type: ignore[arg-type]
        stream = client.images.generate(prompt="a", stream=True, partial_images=1, extra_body=more)
        kinds = [event.type for event in stream]
        assert kinds[-1] == "image_generation.completed" and "image_generation.partial_image" in kinds
        edited = client.images.edit(
            image=("image.png", ORIGINAL), mask=("mask.png", png(HALF)), prompt="two cats", extra_body=more
        )
        assert decoded(edited.data[0].b64_json).info["mask_sha256"]  # type: ignore[index,arg-type]
        with pytest.raises(openai.BadRequestError, match="must be in 0"):
            client.images.generate(prompt="a", extra_body={"guidance_scale": -1})
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt="a", model="dall-e-3")


def until_idle(served: Served) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if not served.dispatcher.tickets and not served.dispatcher.num_running:
            return True
        time.sleep(0.02)
    return False


def test_a_client_that_goes_and_one_that_cancels_free_their_places(served: Served) -> None:
    before = dict(served.dispatcher.counts)
    with pytest.raises(httpx.ReadTimeout):
        served.client.post(
            "/v1/images/generations", json={"prompt": "a", "num_inference_steps": 250, "n": 10}, timeout=0.3
        )
    assert until_idle(served)
    body = {"prompt": "a", "num_inference_steps": 250, "n": 10, "stream": True}
    with served.client.stream("POST", "/v1/images/generations", json=body) as answer:
        next(answer.iter_lines())
    assert until_idle(served)
    with served.client.stream("POST", "/v1/images/generations", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data"))
        id = json.loads(next(lines)[6:])["id"]
        assert served.client.post(f"/v1/images/cancel/{id}").json() == {"id": id, "cancelled": True}
        *_, last = lines
    assert json.loads(last[6:])["error"]["code"] == "cancelled"
    assert until_idle(served)
    assert served.dispatcher.counts["cancelled"] - before["cancelled"] > 20
    assert served.client.post("/v1/images/cancel/none").json()["cancelled"] is False


def test_metrics(served: Served) -> None:
    text = served.client.get("/metrics").text
    values = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    assert float(values["uvit_workers"]) == 1 and float(values["uvit_images_total"]) > 0
    assert {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")} >= {"uvit_waiting"}


def test_no_page_of_another_site_is_loaded() -> None:
    page = (Path(__file__).parents[2] / "uvit" / "serve" / "page.html").read_text(encoding="utf-8")
    assert "https://" not in page.replace("https://www.w3.org", "")
