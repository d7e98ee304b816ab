"""Files behind a URL are read forwards, through failures of the network, from servers with ranges and without."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from uvit.errors import UserError
from uvit.sources import remote
from uvit.sources.remote import RemoteFile, check_protocol, is_remote

pytest.importorskip("aiohttp")

DATA = bytes(range(256)) * 50_000  # 12.8 MB: more than fsspec asks for at a time


class Server(ThreadingHTTPServer):
    has_ranges = True
    failures = 0  # answers to spoil
    requests = 0

    def url(self, name: str = "data") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.server.requests += 1
        self.answer(True)

    def answer(self, has_body: bool) -> None:
        if self.path != "/data":
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.has_ranges else None
        start, end = (int(asked[1]), min(int(asked[2]) + 1, len(DATA))) if asked else (0, len(DATA))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if has_body and self.server.failures:
            self.server.failures -= 1
            self.close_connection = True
            self.wfile.write(DATA[start : (start + end) // 2])
        elif has_body:
            try:
                self.wfile.write(DATA[start:end])
            except OSError:  # the other side has heard enough
                self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    fsspec.filesystem("http").clear_instance_cache()


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("failures", [0, 2])
def test_what_is_read_is_what_is_there(server: Server, has_ranges: bool, failures: int) -> None:
    server.has_ranges, server.failures = has_ranges, failures
    file = RemoteFile(server.url())
    for start, size in [(0, 512), (512, 3), (1024, 100_000), (6_000_000, 7), (12_000_000, 700_000), (len(DATA) - 5, 9)]:
        file.seek(start)
        assert file.read(size) == DATA[start : start + size]
    assert file.read(1) == b""
    file.seek(len(DATA) + 512)
    assert file.read(512) == b""
    file.close()
    assert server.failures == 0


def test_failures_that_go_on_are_told(server: Server) -> None:
    server.failures = 99
    with pytest.raises(UserError, match=re.escape(f"--source {server.url()}: cannot be read (")):
        RemoteFile(server.url()).read(512)


def test_what_is_not_there_is_not_asked_for_again(server: Server) -> None:
    with pytest.raises(UserError, match=r"other: cannot be read \(404"):
        RemoteFile(server.url("other")).read(1)
    assert server.requests == 1


def test_protocols() -> None:
    assert is_remote("s3://place/a.tar") and is_remote("https://place/a.tar")
    assert not is_remote("a.tar") and not is_remote("hf:user/name")
    check_protocol("memory://place")
    with pytest.raises(UserError, match=r"^--source nope://place: cannot be read here \(Protocol not known"):
        check_protocol("nope://place")
