"""The routes, asked as clients ask them."""

import base64
import io

from PIL import Image

from tests.serve.parts import Served


def decoded(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_models_and_health(served: Served) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]
    assert (model["id"], model["uvit"]["resolution"], model["uvit"]["run"]) == ("tiny", [32, 32], False)
    assert served.client.get("/health").json()["status"] == "ok"
    assert "<html" in served.client.get("/").text


def test_images_have_consecutive_seeds_and_their_settings(served: Served) -> None:
    answer = served.generate(n=2, seed=5, guidance_scale=2).json()
    assert [image["seed"] for image in answer["data"]] == [5, 6]
    for image in answer["data"]:
        png = decoded(image["b64_json"])
        assert png.size == (32, 32)
        assert (png.info["prompt"], png.info["seed"]) == ("a red circle", str(image["seed"]))
        assert png.info["guidance_scale"] == "2.0"
