"""A thousand things that people and disks get wrong: each ends in one sentence and status 2.

Every case is generated, by hypothesis, from something good with one thing made bad. What is looked at each time:
status 2, one line on stderr that names the command, no traceback, and nothing left that passes for whole.
"""

import contextlib
import dataclasses
import io
import json
import shutil
import tarfile
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder
from uvit.cli.main import COMMANDS, _load, main
from uvit.cli.parse import BOOLEANS
from uvit.sources.shapes import ShapesSource

SOME = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


def run(*words: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of `uvit ...`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    return status, out.getvalue(), err.getvalue()


def refused(*words: str) -> str:
    """The one sentence with which a command refuses."""
    status, _, err = run(*words)
    assert status == 2, (words, status, err)
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    assert err.startswith(f"uvit {name}: error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert len(err) > len(f"uvit {name}: error: ") + 15, err
    return err


# Flags and config files


@dataclasses.dataclass(frozen=True)
class Flag:
    command: str
    name: str
    hint: Any


def typed_flags() -> list[Flag]:
    """Flags that do not take any text whatever."""
    found = []
    for command, entry in COMMANDS.items():
        for name, hint in typing.get_type_hints(_load(entry.config)).items():
            hint = next((kind for kind in typing.get_args(hint) if kind in (int, float)), hint)
            if hint in (int, float, bool) or typing.get_origin(hint) is typing.Literal:
                found.append(Flag(command, name, hint))
    return found


def is_number(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return text.strip().lower() in ("none", "")
    return True


def wrong_value(flag: Flag) -> st.SearchStrategy[str]:
    if flag.hint is bool:
        return TEXT.filter(lambda text: text.lower() not in BOOLEANS and text.strip() != "")
    if flag.hint in (int, float):
        return TEXT.filter(lambda text: not is_number(text, flag.hint))
    choices = [str(choice) for choice in typing.get_args(flag.hint)]
    return TEXT.filter(lambda text: text not in choices and text.strip() not in ("", "None"))


def required(command: str, without: str) -> list[str]:
    fields = dataclasses.fields(_load(COMMANDS[command].config))
    return [f"--{f.name}=1" for f in fields if f.default is dataclasses.MISSING and f.name != without]


@SOME
@given(st.data())
def test_flags_of_the_wrong_type(data: st.DataObject) -> None:
    flag = data.draw(st.sampled_from(typed_flags()))
    value = data.draw(wrong_value(flag))
    message = refused(*flag.command.split(), *required(flag.command, flag.name), f"--{flag.name}={value}")
    assert f"--{flag.name}" in message


@SOME
@given(
    command=st.sampled_from(sorted(COMMANDS)), name=st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"), min_size=1)
)
def test_flags_that_do_not_exist(command: str, name: str) -> None:
    names = {field.name for field in dataclasses.fields(_load(COMMANDS[command].config))}
    if name in names | {"config", "print_config", "help", "h"} or name.removeprefix("no_") in names:
        return
    assert f"--{name}" in refused(*command.split(), f"--{name}", "1")


@SOME
@given(data=st.data())
def test_config_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("config")
    command = data.draw(st.sampled_from(sorted(COMMANDS)))
    flags = sorted(field.name for field in dataclasses.fields(_load(COMMANDS[command].config)))
    simple = st.none() | st.booleans() | st.integers() | TEXT
    content = data.draw(
        st.binary(max_size=40).filter(lambda raw: not is_mapping(raw))
        | st.lists(simple, min_size=1).map(lambda value: json.dumps(value).encode())
        | st.dictionaries(st.sampled_from(flags), st.dictionaries(TEXT, simple), min_size=1).map(dump)
        | st.dictionaries(TEXT.filter(lambda key: key not in flags), simple, min_size=1, max_size=3).map(dump)
    )
    path = folder / data.draw(st.sampled_from(["c.json", "c.yaml"]))
    path.write_bytes(content)
    assert f"--config {path}" in refused(*command.split(), "--config", str(path))
    shutil.rmtree(folder)


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def is_mapping(raw: bytes) -> bool:
    """Or nothing, as in an empty file."""
    import yaml

    try:
        return isinstance(yaml.safe_load(raw.decode()), dict | None)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        return False


# Sources


PICTURES = [ShapesSource("train", 16)[i] for i in (0, 99, 200, 301)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("encoders")
    vae, text = tiny_vae_folder(folder / "vae"), tiny_text_encoder_folder(folder / "text")
    return f"--vae_name_or_path {vae} --text tokens --tokenizer_name {text} --model_max_length 16".split()


def png(index: int) -> bytes:
    file = io.BytesIO()
    PICTURES[index].image.save(file, format="PNG")
    return file.getvalue()


def rows() -> list[dict[str, Any]]:
    return [{"file_name": f"{i}.png", "text": pair.captions[0]} for i, pair in enumerate(PICTURES)]


def bad_caption(data: st.DataObject) -> object:
    return data.draw(st.sampled_from(["", "  ", None, 3, [], [""], {"a": "b"}, ["fine", 5], "\ud800"]))


def bad_image(data: st.DataObject) -> bytes:
    whole = png(0)
    kind = data.draw(st.sampled_from(["cut", "noise", "tiny", "empty"]))
    if kind == "cut":
        return whole[: data.draw(st.integers(1, len(whole) - 30))]
    if kind == "noise":
        return data.draw(st.binary(min_size=1, max_size=80))
    file = io.BytesIO()
    Image.new("RGB", (data.draw(st.integers(1, 7)), 30)).save(file, format="PNG")
    return file.getvalue() if kind == "tiny" else b""


def bad_folder(folder: Path, data: st.DataObject) -> list[str]:
    """metadata.jsonl with images, one row of which is bad."""
    which = data.draw(st.integers(0, 3))
    lines = [json.dumps(row).encode() for row in rows()]
    images: dict[str, bytes] = {f"{i}.png": png(i) for i in range(4)}
    row = rows()[which]
    kind = data.draw(st.sampled_from(["line", "no name", "no text", "caption", "image", "missing"]))
    if kind == "line":
        lines[which] = data.draw(st.binary(min_size=1, max_size=30).filter(is_no_json_line))
    elif kind == "no name":
        lines[which] = dump({"text": "a"})
    elif kind == "no text":
        lines[which] = dump({"file_name": row["file_name"]})
    elif kind == "caption":
        lines[which] = dump(row | {"text": bad_caption(data)})
    elif kind == "image":
        images[f"{which}.png"] = bad_image(data)
    else:
        del images[f"{which}.png"]
    for name, content in images.items():
        (folder / name).write_bytes(content)
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return ["--source", str(folder)]


def is_no_json_line(raw: bytes) -> bool:
    try:
        return not isinstance(json.loads(raw), dict) and raw.strip() != b"" and raw.count(b"\n") + raw.count(b"\r") == 0
    except (ValueError, RecursionError):
        return raw.strip() != b"" and not set(b"\n\r\v\f\x1c\x1d\x1e") & set(raw)


def bad_coco(folder: Path, data: st.DataObject) -> list[str]:
    which = data.draw(st.integers(0, 3))
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(4)]
    annotations = [{"image_id": i, "caption": pair.captions[0]} for i, pair in enumerate(PICTURES)]
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
    kind = data.draw(st.sampled_from(["no caption", "caption", "image", "missing", "twice"]))
    if kind == "no caption":
        del annotations[which]
    elif kind == "caption":
        annotations[which]["caption"] = data.draw(st.sampled_from(["", "  ", None, 3, "\ud800"]))
    elif kind == "image":
        (folder / f"{which}.png").write_bytes(bad_image(data))
    elif kind == "missing":
        (folder / f"{which}.png").unlink()
    else:
        images[which] = images[which - 1]
        del annotations[which]  # else it would have no image, which is a second problem
    (folder / "captions.json").write_bytes(dump({"images": images, "annotations": annotations}))
    return ["--source", str(folder / "captions.json"), "--image_folder", str(folder)]


def bad_tar(folder: Path, data: st.DataObject) -> list[str]:
    which = data.draw(st.integers(0, 3))
    members = {f"{i}.{suffix}": png(i) if suffix == "png" else PICTURES[i].captions[0].encode()
               for i in range(4) for suffix in ("png", "txt")}  # fmt: skip
    kind = data.draw(st.sampled_from(["no image", "no caption", "caption", "not text", "image", "json", "cut"]))
    if kind == "no image":
        del members[f"{which}.png"]
    elif kind == "no caption":
        del members[f"{which}.txt"]
    elif kind == "caption":
        members[f"{which}.txt"] = data.draw(st.sampled_from([b"", b" \n"]))
    elif kind == "not text":
        members[f"{which}.txt"] = b"\xff" + data.draw(st.binary(max_size=9))
    elif kind == "image":
        members[f"{which}.png"] = bad_image(data)
    elif kind == "json":
        del members[f"{which}.txt"]
        members[f"{which}.json"] = data.draw(st.binary(max_size=20).filter(is_no_json_line) | st.just(b'{"a": 1}'))
    path = folder / "pairs.tar"
    with tarfile.open(path, "w") as tar:
        for name in sorted(members):
            info = tarfile.TarInfo(name)
            info.size = len(members[name])
            tar.addfile(info, io.BytesIO(members[name]))
    if kind == "cut":
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(2600, 7000))])
    return ["--source", str(path)]


def bad_list(folder: Path, data: st.DataObject) -> list[str]:
    which = data.draw(st.integers(0, 3))
    table = [[row["file_name"], row["text"]] for row in rows()]
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
    kind = data.draw(st.sampled_from(["no path", "caption", "image", "missing"]))
    if kind == "no path":
        table[which][0] = ""
    elif kind == "caption":
        table[which][1] = data.draw(st.sampled_from(["", "   "]))
    elif kind == "image":
        (folder / f"{which}.png").write_bytes(bad_image(data))
    else:
        (folder / f"{which}.png").unlink()
    text = "".join("\t".join(row) + "\n" for row in [["image", "caption"], *table])
    (folder / "pairs.tsv").write_text(text, encoding="utf-8")
    return ["--source", str(folder / "pairs.tsv")]


@settings(SOME, max_examples=60)
@given(data=st.data())
def test_sources(tmp_path_factory: pytest.TempPathFactory, encoders: list[str], data: st.DataObject) -> None:
    """One pair of four is bad: --on_error stop says which, --on_error skip takes the other three."""
    folder = tmp_path_factory.mktemp("source")
    source = data.draw(st.sampled_from([bad_folder, bad_coco, bad_tar, bad_list]))(folder, data)
    common = [*source, *encoders, "--resolution", "16", "--min_image_size", "8", "--num_workers", "0", "--disable_tqdm"]
    refused("extract", *common, "--on_error", "stop", "--output_dir", str(folder / "stop"))
    assert not (folder / "stop" / "train" / "manifest.json").exists()
    status, _, err = run("extract", *common, "--on_error", "skip", "--output_dir", str(folder / "skip"))
    assert status == 0, err
    manifest = json.loads((folder / "skip" / "train" / "manifest.json").read_bytes())
    assert (manifest["num_pairs"], manifest["num_left_out"]) == (3, 1) or "cut off" in manifest["problems"]
    lines = (folder / "skip" / "train" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == sum(manifest["problems"].values()) >= 1
    shutil.rmtree(folder)


@settings(SOME, max_examples=60)
@given(data=st.data())
def test_files_that_are_no_source(
    tmp_path_factory: pytest.TempPathFactory, encoders: list[str], data: st.DataObject
) -> None:
    """Whatever bytes a file of a known name holds."""
    folder = tmp_path_factory.mktemp("noise")
    suffix = data.draw(st.sampled_from([".tar", ".json", ".csv", ".tsv", ".parquet", ".json.gz", ".txt", ""]))
    path = folder / f"pairs{suffix}"
    path.write_bytes(data.draw(st.binary(max_size=700)))
    for command in ("extract", "tokenizer"):
        words = encoders if command == "extract" else []
        refused(
            command, "--source", str(path), "--image_folder", str(folder), *words, "--output_dir", str(folder / "o")
        )
    assert not list(folder.rglob("manifest.json"))
    shutil.rmtree(folder)


# Feature stores


MODEL = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2,
         "attention_head_dim": 8, "clip_dim": 32, "num_text_tokens": 16}  # fmt: skip


@pytest.fixture(scope="module")
def good_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, contexts and token ids; and the config of a model that it fits."""
    folder = tmp_path_factory.mktemp("good")
    vae, text = tiny_vae_folder(folder / "vae"), tiny_text_encoder_folder(folder / "text")
    words = ["--vae_name_or_path", str(vae), "--text_encoder_name_or_path", str(text), "--text", "both"]
    for i, pair in enumerate(PICTURES):
        (folder / "pictures").mkdir(exist_ok=True)
        pair.image.save(folder / "pictures" / f"{i}.png")
    (folder / "pictures" / "metadata.jsonl").write_bytes(b"".join(dump(row) + b"\n" for row in rows()))
    words += ["--source", str(folder / "pictures"), "--output_dir", str(folder / "store"), "--shard_size", "2"]
    status, _, err = run("extract", *words, "--resolution", "16", "--model_max_length", "16", "--disable_tqdm")
    assert status == 0, err
    (folder / "model.json").write_bytes(dump(MODEL))
    status, _, err = run(*dry_run(folder / "store", folder / "model.json"))
    assert status == 0, err
    return folder


def dry_run(store: Path, model: Path) -> list[str]:
    return ["train", "--feature_path", str(store), "--uvit_config_file", str(model),
            "--output_dir", str(store / "run"), "--device", "cpu", "--dry_run"]  # fmt: skip


def shard_files(split: Path) -> list[Path]:
    """What training reads; not the records by which an extraction goes on."""
    return sorted(path for path in split.glob("*-0000*") if path.suffix in (".npy", ".jsonl"))


def damage(split: Path, data: st.DataObject) -> None:
    """One thing made wrong in a store, of what opening it must find."""
    kind = data.draw(st.sampled_from(["gone", "cut", "longer", "manifest", "key", "header"]))
    arrays = shard_files(split)
    path = data.draw(st.sampled_from([*arrays, split / "empty_context.npy", split / "empty_tokens.npy"]))
    raw = path.read_bytes()
    manifest = json.loads((split / "manifest.json").read_bytes())
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    elif kind == "longer":
        path.write_bytes(raw + data.draw(st.binary(min_size=1, max_size=20)))
    elif kind == "header":
        array = np.load(data.draw(st.sampled_from([p for p in arrays if p.suffix == ".npy"])))
        name = data.draw(st.sampled_from([p for p in arrays if p.suffix == ".npy"]))
        dtype = data.draw(st.sampled_from(["<f8", "<i8", "|u1", "<c8"]))
        np.save(name, np.zeros((*array.shape, data.draw(st.integers(1, 3))), dtype))
    elif kind == "manifest":
        whole = (split / "manifest.json").read_bytes()
        cut = whole[: data.draw(st.integers(0, len(whole) - 3))]
        (split / "manifest.json").write_bytes(data.draw(st.sampled_from([cut, b"[]", b"3", b"null", b"{}"])))
    else:
        key = data.draw(st.sampled_from(KEYS))
        wrong = data.draw(st.sampled_from([None, -1, 10**9, "x", [], {}, [1, 2, 3, 4], 0.5]))
        if wrong == manifest[key] or (wrong is None and key in ("context_shape", "token_dtype")):
            wrong = "x"
        (split / "manifest.json").write_bytes(dump(manifest | {key: wrong}))


KEYS = [
    "format",
    "version",
    "num_pairs",
    "moments_shape",
    "context_shape",
    "num_tokens",
    "token_dtype",
    "dtype",
    "shards",
]


@settings(SOME, max_examples=80)
@given(data=st.data())
def test_damaged_stores(tmp_path_factory: pytest.TempPathFactory, good_store: Path, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(good_store / "store", folder / "store")
    damage(folder / "store" / "train", data)
    assert str(folder / "store") in refused(*dry_run(folder / "store", good_store / "model.json"))
    assert not (folder / "store" / "run").exists()
    shutil.rmtree(folder)


@settings(SOME, max_examples=40)
@given(data=st.data())
def test_a_flipped_byte_is_found_by_verify(
    tmp_path_factory: pytest.TempPathFactory, good_store: Path, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    shutil.copytree(good_store / "store", folder / "store")
    path = data.draw(st.sampled_from(shard_files(folder / "store" / "train")))
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    status, out, err = run("features", "verify", str(folder / "store"))
    assert status == 1
    assert path.name in out + err
    shutil.rmtree(folder)


@settings(SOME, max_examples=40)
@given(data=st.data())
def test_models_that_a_store_does_not_fit(
    tmp_path_factory: pytest.TempPathFactory, good_store: Path, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("model")
    wrong = data.draw(
        st.fixed_dictionaries({"clip_dim": st.integers(1, 99).filter(lambda width: width != 32)})
        | st.fixed_dictionaries({"num_text_tokens": st.integers(1, 99).filter(lambda number: number != 16)})
        | st.fixed_dictionaries({"in_channels": st.integers(1, 9).filter(lambda number: number != 4)})
        | st.fixed_dictionaries({"sample_size": st.just(2)})
    )
    (folder / "model.json").write_bytes(dump(MODEL | wrong))
    message = refused(*dry_run(good_store / "store", folder / "model.json"))
    assert "--feature_path" in message
    shutil.rmtree(folder)
