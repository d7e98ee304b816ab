"""The prompts of an evaluation: from lists, COCO captions, the built-in shapes, or any source of captioned images.

The order of the prompts is fixed, so that prompt i has seed + i whoever generates it.
"""

import csv
import gzip
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from uvit.config.evaluate import PromptOrder
from uvit.config.sample import is_text
from uvit.errors import UserError
from uvit.evaluate.image_sets import image_id, is_store, open_stored_source
from uvit.sources.open import open_source, require_random_access
from uvit.sources.shapes import PairScene, Scene, ShapesSource, scenes
from uvit.sources.types import PairError

ORDER_SEED = 1234  # part of the protocols: another one would give another list
PROMPT_COLUMNS = ("prompt", "text", "caption")
CATEGORY_COLUMNS = ("category", "tag")


@dataclass(frozen=True)
class Prompt:
    """A text, where it comes from, and what an image of it must show."""

    text: str
    id: str  # of the caption's image, or the line
    category: str = ""  # for the contact sheets
    scene: Scene | PairScene | None = None  # for the attributes of the built-in shapes
    image: str = ""  # the id of the image that it is a caption of, as in the set of a source's images


def list_prompts(
    prompts: str, split: str | None, most: int | None = None, order: PromptOrder = "listed"
) -> list[Prompt]:
    """The first `most` prompts of what --prompts names.

    Args:
        split: of shapes and of sources.
        most: of COCO, whose order is without pattern, the first are a random choice.
        order: `hashed`: the texts that occur once, in an order without pattern that depends on the texts alone.

    Raises UserError if there is no prompt, or one is not text.
    """
    path = Path(prompts)
    if prompts in ("shapes", "shapes:two"):
        found: Iterator[Prompt] = iter(_of_shapes(split or "heldout", 2 if prompts == "shapes:two" else 1))
    elif path.is_file() and path.suffix.lower() == ".txt":
        lines = enumerate(_read_text(path).split("\n"), start=1)
        found = (Prompt(line.strip(), f"line {number}") for number, line in lines if line.strip())
    elif path.is_file() and path.suffix.lower() in (".tsv", ".csv", ".jsonl"):
        found = _of_rows(path)
    elif path.is_file() and path.name.lower().endswith((".json", ".json.gz")):
        found = iter(_of_coco(path))
    else:
        found = _of_source(prompts, split or "train")
    found = _only_text(found, prompts)
    chosen = list(islice(_hashed(list(found)) if order == "hashed" else found, most))
    if not chosen:
        raise UserError(f"--prompts {prompts}: has no prompt")
    return chosen


def _only_text(found: Iterator[Prompt], prompts: str) -> Iterator[Prompt]:
    for prompt in found:
        if not is_text(prompt.text):
            raise UserError(f"--prompts {prompts}: {prompt.id} is not UTF-8 text: {prompt.text!a}")
        yield prompt


def _hashed(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts whose text occurs once, sorted by the SHA-256 of "1234 text": whatever the order of the source."""
    times = Counter(prompt.text for prompt in prompts)
    once = [prompt for prompt in prompts if times[prompt.text] == 1]
    return sorted(once, key=lambda prompt: hashlib.sha256(f"{ORDER_SEED} {prompt.text}".encode()).hexdigest())


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Over the ids and texts, in order."""
    lines = "".join(json.dumps([prompt.id, prompt.text]) + "\n" for prompt in prompts)
    return hashlib.sha256(lines.encode()).hexdigest()


def _of_shapes(split: str, num_objects: int) -> list[Prompt]:
    """Every scene in each of its wordings, wording by wording."""
    if split not in ("train", "heldout"):
        raise UserError(f"--split {split}: shapes have the splits train and heldout")
    found, source = scenes(split, num_objects), ShapesSource(split, 32, num_objects)
    num_wordings = len(found[0].captions())
    return [
        Prompt(scene.captions()[wording], f"scene {i} wording {wording}", scene=scene, image=image_id(source, split, i))
        for wording in range(num_wordings)
        for i, scene in enumerate(found)
    ]


def prompts_lines(prompts: Sequence[Prompt], seeds: Sequence[int]) -> str:
    """The prompts as .jsonl, which `list_prompts` reads: the id, the text, and the seed of each repeat's image.

    Args:
        seeds: of the first image of each repeat.
    """
    rows = (
        {"id": prompt.id, "prompt": prompt.text}
        | ({"category": prompt.category} if prompt.category else {})
        | ({"seeds": [seed + i for seed in seeds]} if seeds else {})
        for i, prompt in enumerate(prompts)
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _of_rows(path: Path) -> Iterator[Prompt]:
    """A list with a column for the prompt, perhaps one for the category, and one for the id. Names in any case."""
    text = _read_text(path)
    rows: list[Any]
    if path.suffix.lower() == ".jsonl":
        try:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise UserError(f"--prompts {path}: is not JSON in each line ({error})") from None
    elif path.suffix.lower() == ".tsv":
        header, *lines = [line.split("\t") for line in text.split("\n") if line.strip()] or [[]]
        rows = [dict(zip(map(_unquoted, header), map(_unquoted, fields), strict=False)) for fields in lines]
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            line = f"line {reader.reader.line_num} cannot be read ({error})"
            raise UserError(
                f"--prompts {path}: {line}; put a text with commas or quotes in quotes, and double its own"
            ) from None
    for number, row in enumerate(rows, start=1):
        columns = {str(name).lower(): value for name, value in row.items()} if isinstance(row, dict) else {}
        name = next((name for name in PROMPT_COLUMNS if name in columns), None)
        if name is None:
            has = ", ".join(columns) or "no columns"
            raise UserError(f"--prompts {path}: row {number} needs {' or '.join(PROMPT_COLUMNS)}; it has {has}")
        prompt = columns[name]
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"--prompts {path}: {name} of row {number} is {prompt!r}, and must be a text")
        category = next((str(columns[name]) for name in CATEGORY_COLUMNS if columns.get(name)), "")
        yield Prompt(" ".join(prompt.split()), str(columns.get("id") or f"row {number}"), category)


def _unquoted(field: str) -> str:
    """A field of a .tsv: spreadsheets put some in quotes, and double its own; others' prompts merely begin with one."""
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', field.strip())
    return quoted[1].replace('""', '"') if quoted else field


def _of_coco(path: Path) -> list[Prompt]:
    """One caption of each image, in an order that depends on the ids alone.

    The images are sorted by SHA-256 of "1234 image ID", and the caption with the least SHA-256 of "1234 caption ID" is
    taken. So everyone who has the same annotations gets the same list of (image id, caption id), whatever the file's
    order.
    """
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix.lower() == ".gz" else data)
        captions: dict[int, list[tuple[str, str, int]]] = {}
        for each in content["annotations"]:
            if not isinstance(each["caption"], str) or not each["caption"].strip():
                raise ValueError(f"the caption of id {each['id']} is {each['caption']!r}, and must be a text")
            order = hashlib.sha256(f"{ORDER_SEED} caption {each['id']}".encode()).hexdigest()
            captions.setdefault(each["image_id"], []).append((order, each["caption"], each["id"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--prompts {path}: is not a file of COCO captions, with `annotations` that have `id`, `image_id` and "
            f"`caption` ({' '.join(str(error).split())[:100]})"
        ) from None
    images = sorted(captions, key=lambda image: hashlib.sha256(f"{ORDER_SEED} image {image}".encode()).hexdigest())
    drawn = [(image, min(captions[image])) for image in images]
    return [Prompt(" ".join(text.split()), f"image {image} caption {id}") for image, (_, text, id) in drawn]


def _of_source(source: str, split: str) -> Iterator[Prompt]:
    try:
        if is_store(source, split):
            pairs, record = open_stored_source(source, split, "prompts")
            split = record["split"]
        else:
            pairs = require_random_access(open_source(source, split), f"--prompts {source}")
    except UserError as error:
        raise UserError(str(error).replace("--source", "--prompts")) from None
    for row in range(len(pairs)):
        try:
            yield Prompt(pairs.captions(row)[0], str(row), image=image_id(pairs, split, row))
        except PairError:  # the report of the source's images names it
            continue


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--prompts {path}: cannot be read ({reason})") from None
