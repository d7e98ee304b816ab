"""The same prompts in the same order, wherever they come from."""

import gzip
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from uvit.errors import UserError
from uvit.evaluate.prompts import list_prompts, prompts_lines, prompts_sha256
from uvit.sources.shapes import scenes


def coco(path: Path, order: Callable[[list[dict[str, object]]], object] = lambda annotations: None) -> Path:
    annotations: list[dict[str, object]] = [
        {"id": 10 * image + k, "image_id": image, "caption": f"caption {k}\nof image {image} "}
        for image in range(20)
        for k in range(5)
    ]
    order(annotations)
    content = json.dumps({"images": [], "annotations": annotations}).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_shapes_are_every_scene_in_every_wording() -> None:
    prompts = list_prompts("shapes", None)
    heldout = scenes("heldout")
    assert len(prompts) == 4 * len(heldout)
    assert [prompt.text for prompt in prompts[:3]] == [scene.captions()[0] for scene in heldout[:3]]
    assert prompts[len(heldout)].scene == heldout[0] and prompts[len(heldout)].text == heldout[0].captions()[1]


def test_lists_give_text_and_category(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "a.tsv").write_text("Prompt\tCategory\tNote\na cat\tAnimals\tx\na car, red\tVehicles\t\n")
    (tmp_path / "a.csv").write_text('text\n"a cat, asleep"\n')
    (tmp_path / "a.jsonl").write_text('{"tag": "counting", "prompt": "two cats"}\n{"prompt": "a dog"}\n')

    def read(name: str) -> list[tuple[str, str]]:
        return [(prompt.text, prompt.category) for prompt in list_prompts(str(tmp_path / name), None)]

    for suffix in ("txt", "tsv", "csv", "jsonl"):
        (tmp_path / f"b.{suffix.upper()}").write_bytes((tmp_path / f"a.{suffix}").read_bytes())
        assert read(f"b.{suffix.upper()}") == read(f"a.{suffix}")
    assert read("a.txt") == [("a cat", ""), ("a dog", "")]
    assert read("a.tsv") == [("a cat", "Animals"), ("a car, red", "Vehicles")]
    assert read("a.csv") == [("a cat, asleep", "")]
    assert read("a.jsonl") == [("two cats", "counting"), ("a dog", "")]


def test_quotes_and_line_breaks_of_lists(tmp_path: Path) -> None:
    """A .tsv whose prompts begin with a quote, as in PartiPrompts; and both as spreadsheets write them."""
    (tmp_path / "a.tsv").write_text('Prompt\tNote\n"GIGGLE" on a wall\t"\n"""STOP"" on a sign"\tx\n"open\n')
    (tmp_path / "a.csv").write_bytes('prompt\n"""STOP"" on\r\na sign"\na\u2028cat\n'.encode())
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028cat\\n"}\r\n')

    def read(name: str) -> list[str]:
        return [prompt.text for prompt in list_prompts(str(tmp_path / name), None)]

    assert read("a.tsv") == ['"GIGGLE" on a wall', '"STOP" on a sign', '"open']
    assert read("a.csv") == ['"STOP" on a sign', "a cat"]
    assert read("a.jsonl") == ["a cat"]


def test_written_prompts_are_the_same_when_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('Prompt\tCategory\n"a" café\tA/B\na dog\t\n', encoding="utf-8")
    for name in (str(tmp_path / "a.tsv"), str(coco(tmp_path / "a.json"))):
        prompts = list_prompts(name, None)
        (tmp_path / "prompts.jsonl").write_text(prompts_lines(prompts, [7, 27]), encoding="utf-8")
        again = list_prompts(str(tmp_path / "prompts.jsonl"), None)
        assert again == prompts and prompts_sha256(again) == prompts_sha256(prompts)
        rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["seeds"] for row in rows[:2]] == [[7, 27], [8, 28]]


def test_hashed_prompts_depend_on_the_texts_alone_and_occur_once(tmp_path: Path) -> None:
    texts = ["a cat", "a dog", "a tree", "a dog", "a house"]
    hashed = sorted(["a cat", "a tree", "a house"], key=lambda text: sha256(f"1234 {text}".encode()).digest())
    for number, lines in enumerate((texts, texts[::-1])):
        path = tmp_path / f"{number}.txt"
        path.write_text("\n".join(lines))
        assert [prompt.text for prompt in list_prompts(str(path), None, order="hashed")] == hashed
        assert [prompt.text for prompt in list_prompts(str(path), None, 2, "hashed")] == hashed[:2]
        assert [prompt.text for prompt in list_prompts(str(path), None)] == lines
    (tmp_path / "twice.txt").write_text("a cat\na cat")
    with pytest.raises(UserError, match="has no prompt"):
        list_prompts(str(tmp_path / "twice.txt"), None, order="hashed")


def test_coco_gives_one_caption_of_each_image_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    prompts = list_prompts(str(coco(tmp_path / "a.json")), None)
    # The rule is part of the protocols: a published list must not change.
    assert prompts_sha256(prompts) == "a02dc07c064a99f4ed494b771b1f94c73ff454fd6fa6ca26c4299e4f8f5ec555"
    reversed_file = coco(tmp_path / "b.json.gz", lambda annotations: annotations.reverse())
    assert list_prompts(str(reversed_file), None) == prompts
    assert len({prompt.id.split()[1] for prompt in prompts}) == len(prompts) == 20
    assert [prompt.id for prompt in prompts] != sorted(prompt.id for prompt in prompts)
    assert prompts_sha256(prompts[1:]) != prompts_sha256(prompts)
    assert all("\n" not in prompt.text and prompt.text == prompt.text.strip() for prompt in prompts)


def test_fewer_prompts_of_coco_are_the_first_of_more(tmp_path: Path) -> None:
    path = str(coco(tmp_path / "a.json"))
    assert list_prompts(path, None, 5) == list_prompts(path, None)[:5]


def test_a_source_gives_the_first_caption_of_each_pair_and_its_row(tmp_path: Path) -> None:
    for name, caption in (("a", "a red square\na square"), ("b", " "), ("c", "a blue square")):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    prompts = list_prompts(str(tmp_path), None)
    assert [prompt.text for prompt in prompts][-1] == "a blue square" and len(prompts) == 2


def test_a_line_ends_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\u2028prompt\r\ntwo\fprompts\n".encode())
    assert [prompt.text for prompt in list_prompts(str(tmp_path / "a.txt"), None)] == [
        "one\u2028prompt",
        "two\fprompts",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n\n", "has no prompt"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.tsv", b"Words\nx\n", "row 1 needs prompt or text or caption; it has words"),
        ("a.jsonl", b"{", "is not JSON in each line"),
        ("a.jsonl", b"[1]", "row 1 needs"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 5}', "prompt of row 2 is 5, and must be a text"),
        ("a.jsonl", b'{"prompt": null}', "prompt of row 1 is None"),
        ("a.jsonl", b'{"prompt": ["a"]}', "prompt of row 1 is"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "is not UTF-8 text"),
        ("a.json", b'{"annotations": [{"image_id": 1, "id": 1, "caption": "\\ud800"}]}', "is not"),
        (
            "a.json",
            b'{"annotations": [{"image_id": 1, "id": 7, "caption": null}]}',
            "caption of id 7 is None, and",
        ),
        ("a.json", b'{"annotations": [{"image_id": 1, "id": 7, "caption": " "}]}', "caption of id 7 is ' ', and"),
        ("a.csv", b"prompt,note\n,x\n", "prompt of row 1 is ''"),
        ("a.csv", b'prompt\n"a\nb\n', "line 3 cannot be read"),
        ("a.csv", b'prompt\n"a" b\n', "line 2 cannot be read"),
        ("a.csv", b"prompt\n", "has no prompt"),
        ("a.tsv", b"", "has no prompt"),
        ("a.doc", b"a", "is a .doc file"),
        ("a.json", b"{}", "is not a file of COCO captions"),
        ("a.json", b"[", "is not a file of COCO captions"),
        ("a.json.gz", b"no gzip", "is not a file of COCO captions"),
    ],
)
def test_what_is_no_list_of_prompts_is_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^--prompts .*{message}"):
        list_prompts(str(tmp_path / name), None)
