"""Merged stores read as the parts do one after the other, to the byte, or are refused with the reason."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.store.test_reader import NUM_PAIRS, info, write_store
from uvit.config.store import FeaturesMergeConfig, FeaturesVerifyConfig
from uvit.errors import UserError
from uvit.store.merge import merge
from uvit.store.reader import FeatureStore, open_features
from uvit.store.verify import verify


def run(*paths: Path) -> Path:
    """All but the last become the last."""
    merge(FeaturesMergeConfig(tuple(map(str, paths[:-1])), str(paths[-1]), disable_tqdm=True))
    return paths[-1]


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two stores of different pairs, shards of different sizes, problems in both."""
    one, other = tmp_path / "one", tmp_path / "other"
    write_store(one / "train", info(), left_out={0, 2, 4, 6, 8, 10})
    write_store(other / "train", info(shard_size=3), left_out={1, 3, 5, 7, 9})
    return [one, other]


def test_rows_follow_one_another(parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = open_features(run(*parts, tmp_path / "merged"))
    assert isinstance(merged, FeatureStore)
    rows = np.array([1, 3, 5, 7, 9, 0, 2, 4, 6, 8, 10])
    for draw in (0, 0.5, 0.99):
        batch = merged.read(np.arange(NUM_PAIRS), np.full(NUM_PAIRS, draw))
        assert (batch.moments == rows[:, None, None, None]).all()
        assert batch.context is not None
        assert batch.token_ids is not None
        expected = [10 * row + int(draw * (1 + row % 3)) for row in rows]
        assert batch.context[:, 0, 0].tolist() == batch.token_ids[:, 0].tolist() == expected
    assert [merged.ids(i) for i in range(NUM_PAIRS)] == [f"pair-{row}" for row in rows]
    assert merged.manifest["problems"] == {"broken image": 11}
    assert merged.manifest["num_left_out"] == len((merged.folder / "problems.jsonl").read_bytes().splitlines()) == 11
    assert merged.resolution == 16
    assert verify(FeaturesVerifyConfig(str(tmp_path / "merged"), disable_tqdm=True)) == 0
    assert "appear more than once" not in capsys.readouterr().out


def test_shards_of_which_nothing_is_left(tmp_path: Path) -> None:
    write_store(tmp_path / "one" / "train", info(), left_out=range(4))
    merged = open_features(run(tmp_path / "one", tmp_path / "one", tmp_path / "merged"))
    moments = merged.read(np.arange(14), np.zeros(14)).moments[:, 0, 0, 0]
    assert moments.tolist() == [*range(4, 11), *range(4, 11)]


def test_images_that_were_not_prepared_alike_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`crop_before_resize` and `icc` are not in the stores of earlier versions."""
    now = {"crop": "center", "resize": "lanczos", "icc": "srgb", "crop_before_resize": True, "resolution": 16}
    kinds = {"now": now, "again": now, "ignored": now | {"icc": "ignore"}, "padded": now | {"crop": "pad"}}
    kinds["earlier"] = {"crop": "center", "resize": "lanczos", "resolution": 16}
    for name, source in kinds.items():
        write_store(tmp_path / name / "train", info(source=source))
    warning = "Warning: the images of these stores were not prepared alike"
    for number, (names, says) in enumerate(
        [
            (("now", "again"), []),
            (("earlier", "earlier"), []),
            (("now", "ignored"), ["icc: srgb, ignore"]),
            (("padded", "now"), ["crop: pad, center"]),
            (("earlier", "now"), ["icc: ignore, srgb", "crop_before_resize: False, True"]),
            (("0", "again"), []),
            (("now", "3", "ignored"), ["crop: center, pad", "icc: srgb, ignore"]),
        ]
    ):
        run(*(tmp_path / name for name in names), tmp_path / str(number))
        out = [line for line in capsys.readouterr().out.splitlines() if line.startswith(warning)]
        assert out == [f"{warning} ({each})." for each in says], names


def test_bytes_are_copied(parts: list[Path], tmp_path: Path) -> None:
    merged = run(*parts, tmp_path / "merged") / "train"
    for kind in ("moments", "contexts", "tokens", "counts"):
        for old, new in ((0, 3), (2, 5)):
            part = parts[1] / "train" / f"{kind}-{old:05d}.npy"
            assert (merged / f"{kind}-{new:05d}.npy").read_bytes() == part.read_bytes()


def test_ids_that_come_twice_are_told_and_kept(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = open_features(run(parts[0], parts[1], parts[0], tmp_path / "merged"))
    assert merged.num_samples == NUM_PAIRS + 5
    assert "5 ids appear more than once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vae": {"name": "a/vae", "sha256": "4"}}, "vae sha256: of the first 1, of this one 4"),
        ({"text_encoder": {"name": "x", "sha256": "4"}}, "text_encoder sha256: of the first 2, of this one 4"),
        ({"dtype": "float32"}, "dtype: of the first float16, of this one float32"),
        ({"latent_scale": 0.25}, r"latent_scale: of the first 0\.5, of this one 0\.25"),
        ({"flipped": True}, "flipped: of the first False, of this one True"),
        ({"moments_shape": (8, 4, 4)}, r"moments_shape: of the first \[.*\], of this one \[8, 4, 4\]"),
        ({"token_dtype": None}, "token_dtype: of the first uint16, of this one not set"),
    ],
)
def test_parts_that_were_made_otherwise_are_refused(parts: list[Path], tmp_path: Path, change: dict, says: str) -> None:
    write_store(tmp_path / "else" / "train", info(**change))
    with pytest.raises(
        UserError, match=rf"^--paths .*else/train: was extracted with other settings than .*one/train;.*\n  {says}"
    ):
        run(parts[0], tmp_path / "else", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_same_encoders_may_have_other_names(parts: list[Path], tmp_path: Path) -> None:
    write_store(tmp_path / "else" / "train", info(vae={"name": "moved", "sha256": "1"}))
    assert open_features(run(parts[0], tmp_path / "else", tmp_path / "merged")).vae_name == "a/vae"


def test_a_stopped_merge_goes_on(parts: list[Path], tmp_path: Path) -> None:
    whole = contents(run(*parts, tmp_path / "whole"))
    path = parts[1] / "train" / "contexts-00001.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"!")
    with pytest.raises(UserError, match=r"contexts-00001\.npy is missing or damaged"):
        run(*parts, tmp_path / "stopped")
    first = (tmp_path / "stopped" / "train" / "moments-00000.npy").stat().st_ino
    with pytest.raises(UserError, match="is not finished"):
        open_features(tmp_path / "stopped")
    path.write_bytes(data)
    assert contents(run(*parts, tmp_path / "stopped")) == whole
    assert (tmp_path / "stopped" / "train" / "moments-00000.npy").stat().st_ino == first
    run(*parts, tmp_path / "stopped")
    with pytest.raises(UserError, match="was started with other settings"):
        run(parts[1], parts[0], tmp_path / "stopped")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tokenizer_goes_along(parts: list[Path], tmp_path: Path) -> None:
    for part in parts:
        (part / "train" / "tokenizer").mkdir()
        (part / "train" / "tokenizer" / "tokenizer.json").write_text("{}")
    merged = open_features(run(*parts, tmp_path / "merged"))
    assert merged.tokenizer_name == str(tmp_path / "merged" / "train" / "tokenizer")
    manifest = json.loads((tmp_path / "merged" / "train" / "manifest.json").read_text())
    assert "tokenizer/tokenizer.json" in manifest["files"]


def test_the_target_is_no_part(parts: list[Path]) -> None:
    with pytest.raises(UserError, match="is one of the inputs"):
        run(*parts, parts[0])
