"""The README's commands run in the order in which they stand, and print what it shows. And pages name what is there."""

import re
import shutil
from pathlib import Path

import pytest

from tests.real_images import EXAMPLES
from tests.test_house import README, ROOT, code_blocks, commands
from uvit.cli.main import main

# Flags that make them quick; the last value of a flag counts.
QUICK = {
    "extract": ["--resolution", "32", "--num_workers", "0"],
    "train": ["--max_steps", "2", "--warmup_steps", "1", "--per_device_train_batch_size", "2"],
    "sample": ["--num_inference_steps", "2"],
}
# Parsed by tests/test_house.py and not run: they need data, weights of others or several GPUs.
NOT_RUN = {"uvit demo", "coco", "path/to/clip", "ldm-uvit_t2i-small-256-mscoco"}  # tests/test_demo.py runs the demo


def is_run(words: list[str]) -> bool:
    return not any(part in f"uvit {' '.join(words)}" for part in NOT_RUN)


def shape_of(line: str) -> str:
    """A line without its numbers and their units, which depend on the machine and on QUICK."""
    return re.sub(r"\d[\d,.]*(?<!\.)( bytes| .iB)?", "#", line)


@pytest.mark.slow
def test_the_commands_run_in_order_and_print_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples" / "images")
    monkeypatch.chdir(tmp_path)
    ran, printed = [], ""
    for language, block in blocks():
        if language == "sh":
            for words in filter(is_run, commands(block)):
                assert main([*words, *QUICK[words[0]]]) == 0
                printed = capsys.readouterr().out
                ran.append(words[0])
        elif language == "python":
            assert ran[-1] == "sample"
            names: dict[str, object] = {}
            exec(block.replace("num_inference_steps=50", "num_inference_steps=2"), names)
            assert names["image"].size == (64, 64)  # type: ignore[attr-defined]
            capsys.readouterr()
        else:
            lines = [shape_of(line) for line in block.splitlines() if line != "..."]
            assert [line for line in lines if line not in map(shape_of, printed.splitlines())] == [], printed
    assert ran == ["extract", "train", "sample"]


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    text = README.read_text(encoding="utf-8")
    languages = re.findall(r"^```(\w*)\n.*?^```", text, re.MULTILINE | re.DOTALL)
    return list(zip(languages, code_blocks(README), strict=True))


def test_the_architecture_page_names_what_is_there() -> None:
    """Each path exists, and the names beside a path in its row are in that file."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:uvit|tests|runs|benchmarks)/[\w./]*)`", page):
        assert (ROOT / path).exists(), path
    for path, names in re.findall(r"\| `(uvit/[\w/]+\.py)`, ((?:`[\w.]+`(?:, )?)+)", page):
        content = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"[\w.]+", names):
            for part in name.split("."):
                assert re.search(rf"(?:def|class) {part}\b|^{part}\b", content, re.MULTILINE), f"{path} has no {name}"
