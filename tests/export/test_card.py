"""The card says what the run recorded, and nothing of the machine it ran on."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from PIL import Image

from tests.port import PORT_FOLDER
from uvit.errors import UserError
from uvit.export.card import card, data_of, losses_of, push, run_folder, without_folders, write_card
from uvit.weights.components import Components, read_components


def head_of(text: str) -> Any:
    return yaml.safe_load(text.split("---")[1])


@pytest.fixture
def components() -> Components:
    return read_components(PORT_FOLDER)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it, and the features' manifest."""
    run, features = tmp_path / "run", tmp_path / "features" / "train"
    for folder in (run / "logs", run / "previews", run / "checkpoint-3", features):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    lines: list[dict[str, Any]] = [{"step": i, "loss": i / 10, "val_loss": None} for i in range(1, 4)]
    lines[1]["val_loss"] = 0.75
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (run / "logs" / "metrics.jsonl").write_text(text + '{"step": 4, "lo')  # a line that is being written
    for step in (2, 3):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(run / "previews" / f"step-{step:08d}.png")
    manifest = {"num_pairs": 1234, "num_captions": 5000, "source": {"source": ["/mine/pictures/"]}}
    (features / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_what_a_run_recorded(components: Components, run: Path, tmp_path: Path) -> None:
    config = {"feature_path": str(tmp_path / "features"), "learning_rate": 2e-4}
    components.facts = {"step": 3000, "samples": 96000, "ema": True, "config": config, "versions": {"torch": "2.13"}}
    components.facts |= {"vae_sha256": "a" * 64, "text_encoder_sha256": "b" * 64}
    goal = tmp_path / "goal"
    goal.mkdir()
    write_card(components, goal, "painter", "cc-by-4.0", run_folder(run / "checkpoint-3"), has_code=False)
    text = (goal / "README.md").read_text()
    assert head_of(text) == {
        "license": "cc-by-4.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["uvit", "latent-diffusion"],
    }
    for said in (
        "# painter", "images of 64x64 pixels from text", "| steps | 3,000 |", "| training samples | 96,000 |",
        "| data | 1,234 images, 5,000 captions (pictures) |", "| learning rate | 0.0002 |", "| weights | EMA |",
        "| VAE (sha256) | aaaaaaaaaaaa |",
        "training loss, mean of the last 3 steps | 0.2000", "| validation loss | 0.7500 at step 2 |", "torch 2.13",
        "(previews/step-00000003.png)", "`cc-by-4.0`", "from uvit import UViTPipeline",
    ):  # fmt: skip
        assert said in text, said
    assert [path.name for path in (goal / "previews").iterdir()] == ["step-00000003.png"]
    assert str(tmp_path) not in text and "/mine" not in text


def test_an_earlier_checkpoint_has_no_later_losses_and_previews(
    components: Components, run: Path, tmp_path: Path
) -> None:
    components.facts = {"step": 2, "samples": 64}
    goal = tmp_path / "goal"
    goal.mkdir()
    write_card(components, goal, "painter", None, run, has_code=False)
    text = (goal / "README.md").read_text()
    assert "training loss, mean of the last 2 steps | 0.1500" in text
    assert [path.name for path in (goal / "previews").iterdir()] == ["step-00000002.png"]


def test_what_is_not_known_is_said_to_be(components: Components) -> None:
    text = card(components, "x", None, None, None, has_code=True)
    assert head_of(text)["license"] == "unknown" and "No licence was given" in text
    assert "trust_remote_code=True" in text and "| steps | not recorded |" in text
    assert "- read: diffusion_paddle_model.safetensors: a U-ViT" in text and str(PORT_FOLDER.parent) not in text
    assert "timesteps 0..999, as in the PaddleMIX pipeline" in text


def test_files_that_are_gone_or_broken(tmp_path: Path) -> None:
    assert data_of(None) == "not recorded" and data_of("/mine/features") == "features"
    assert losses_of({}, None, 9) == {} and losses_of({}, tmp_path, 9) == {}
    (tmp_path / "metrics.jsonl").write_text("{\n")
    assert losses_of({"logging_dir": str(tmp_path)}, tmp_path, 9) == {}
    assert run_folder(tmp_path / "checkpoint-1") is None


def test_paths_are_shortened() -> None:
    lines = ["read: /a/b/nnet.pth: a U-ViT, 70 arrays", "dropped: ../x/y.pth", "converted: 3 arrays, 1/2"]
    assert without_folders(lines)[:2] == ["read: nnet.pth: a U-ViT, 70 arrays", "dropped: y.pth"]


def test_an_upload_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    with pytest.raises(UserError, match=f"^--push_to_hub me/model: the upload failed .*; {tmp_path} is written"):
        push(tmp_path, "me/model", private=True)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files speaks to."""

    repositories: ClassVar[list[dict[str, Any]]] = []
    files: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        self.path = self.path.replace("/api/spaces/", "/api/models/")  # the same for both
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            answer: dict[str, Any] = {"url": f"{here}/me/model", "name": "me/model"}
        elif self.path == "/api/models/me/model/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            assert self.path == "/api/models/me/model/commit/main"
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{here}/me/model/commit/0"}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("is_space", [False, True])
def test_an_upload_brings_the_files_and_nothing_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_space: bool
) -> None:
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "repositories", [])
    (tmp_path / "unet").mkdir()
    files = {"README.md": b"# a card\n", "unet/config.json": b"{}", "unet/weights.safetensors": bytes(range(256))}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in ("training.json", "conversion.json"):
        (tmp_path / name).write_text("names of folders here")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            monkeypatch.setattr(
                "huggingface_hub.constants.ENDPOINT", address := f"http://127.0.0.1:{server.server_port}"
            )
            monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
            assert push(tmp_path, "me/model", True, is_space) == f"{address}/me/model"
        finally:
            server.shutdown()
            thread.join()
    assert Hub.files == files
    (made,) = Hub.repositories
    assert (made["organization"], made["name"], made["visibility"]) == ("me", "model", "private")
    assert (made.get("type", "model"), made.get("sdk")) == (("space", "gradio") if is_space else ("model", None))
