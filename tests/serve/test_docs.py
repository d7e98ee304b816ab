"""The examples of docs/serving.md, against a running server."""

import json
import shutil
import subprocess

import pytest

from tests.serve.parts import Served
from tests.test_house import ROOT, code_blocks

PAGE = ROOT / "docs" / "serving.md"
ADDRESS = "http://127.0.0.1:8000"


def test_the_python_examples(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    blocks = code_blocks(PAGE, "python")
    assert ADDRESS in "".join(blocks)
    for block in blocks:
        exec(block.replace(ADDRESS, served.url), names)
    names["client"].close()  # type: ignore[attr-defined]
    assert names["png"].startswith(b"\x89PNG")  # type: ignore[attr-defined]
    kinds = capsys.readouterr().out.split()
    assert kinds.count("image_generation.partial_image") == 3 and kinds[-1] == "image_generation.completed"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_examples_of_the_shell(served: Served) -> None:
    (block,) = code_blocks(PAGE, "bash")
    assert ADDRESS in block
    done = subprocess.run(["bash", "-c", block.replace(ADDRESS, served.url)], capture_output=True, check=True)
    assert [image["seed"] for image in json.loads(done.stdout)["data"]] == [3, 4]
