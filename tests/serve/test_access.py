"""Who is answered, and who is not."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from uvit.config.serve import ServeConfig
from uvit.errors import UserError
from uvit.serve.access import Access


def client(is_draining: bool = False, **flags: Any) -> TestClient:
    app = FastAPI()
    app.add_middleware(Access, config=ServeConfig(("x",), **flags), is_draining=lambda: is_draining)

    @app.get("/v1/models")
    @app.get("/health")
    @app.get("/v1/images/1.png")
    async def get() -> str:
        return "ok"

    @app.post("/v1/images/generations")
    async def post(request: Request) -> int:
        return len(await request.body())

    return TestClient(app, base_url="http://127.0.0.1:8000")


def test_the_key() -> None:
    with_key = client(api_key="secret")
    refused = with_key.get("/v1/models")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert refused.headers["www-authenticate"] == "Bearer"
    for value in ("Bearer wrong", "secre", "Bearer secrét"):
        assert with_key.get("/v1/models", headers={"Authorization": value.encode("latin-1")}).status_code == 401
    for scheme in ("Bearer", "bearer", "BEARER"):  # RFC 7235: in any case
        assert with_key.get("/v1/models", headers={"Authorization": f"{scheme} secret"}).status_code == 200
    assert with_key.post("/v1/images/generations").status_code == 401
    assert with_key.get("/health").status_code == 200
    assert with_key.get("/v1/images/1.png").status_code == 200  # its name is the secret


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UVIT_API_KEY", "secret")
    assert client().get("/v1/models").status_code == 401
    assert client().get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("key", ["", " \n"])
def test_an_empty_key_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Whoever sets one wants nobody else to be answered."""
    with pytest.raises(UserError, match=r"^--api_key: is empty, or UVIT_API_KEY is"):
        ServeConfig(("x",), api_key=key)
    monkeypatch.setenv("UVIT_API_KEY", key)
    with pytest.raises(UserError, match=r"^--api_key: is empty, or UVIT_API_KEY is"):
        ServeConfig(("x",))


def test_the_key_of_a_file_ends_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UVIT_API_KEY", "secret\n")
    assert client().get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    with pytest.raises(UserError, match="one line of ASCII"):
        ServeConfig(("x",), api_key="two\nlines")


def test_a_folder_with_an_equals_sign_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    assert ServeConfig(("lr=1", "lr=2")).named_models() == [("lr-1", "lr=1"), ("lr", "2")]


def test_names_of_the_server() -> None:
    local = client()
    for host in ("127.0.0.1:8000", "localhost", "[::1]:8000"):
        assert local.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000", ""):
        assert local.get("/v1/models", headers={"Host": host}).status_code == 421
    assert client(allowed_hosts=("ours.example",)).get("/health", headers={"Host": "ours.example"}).status_code == 200
    assert client(allowed_hosts=("Ours.example",)).get("/health", headers={"Host": "OURS.example"}).status_code == 200
    assert local.get("/v1/models", headers={"Host": "[::1"}).status_code == 421
    assert client(host="0.0.0.0").get("/health", headers={"Host": "any.example"}).status_code == 200


def test_other_pages() -> None:
    def post(client: TestClient, origin: str) -> int:
        return client.post("/v1/images/generations", headers={"Origin": origin}).status_code

    assert post(client(), "http://127.0.0.1:8000") == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9000", "null", "http://[x"):
        assert post(client(), origin) == 403
    assert post(client(allowed_origins=("http://ours.example",)), "http://ours.example") == 200


def test_a_body_that_is_too_large() -> None:
    small = client(max_upload_bytes=1000)
    assert small.post("/v1/images/generations", content=b"x" * 1000).json() == 1000
    assert small.post("/v1/images/generations", content=b"x" * 1001).status_code == 413
    chunked = small.post("/v1/images/generations", content=(b"x" * 400 for _ in range(3)))
    assert chunked.status_code == 413


@pytest.mark.parametrize("is_draining", [False, True])
def test_a_body_that_keeps_arriving_is_given_up_too(is_draining: bool) -> None:
    """One byte after the other holds no request for longer than one that stalls."""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"a", "more_body": True}

    async def read() -> None:
        access = Access(None, ServeConfig(models=("m",), request_timeout=0.2), lambda: is_draining)  # type: ignore[arg-type]
        limited = access.limited(receive)  # type: ignore[arg-type]
        while True:
            await limited()

    with pytest.raises(HTTPException) as raised:
        asyncio.run(asyncio.wait_for(read(), 20))
    assert raised.value.status_code == (503 if is_draining else 408)
