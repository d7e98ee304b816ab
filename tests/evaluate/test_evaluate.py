"""The whole command, on tiny real networks: the same report however the work is cut, stopped and shared."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.evaluate.networks import tiny_clip_folder
from tests.sample.parts import tiny_pipeline_folder
from tests.tiny import tiny_vit_folder
from uvit.cli.main import main
from uvit.config.evaluate import EvaluateCompareConfig, EvaluateConfig, EvaluateStatisticsConfig
from uvit.errors import UserError
from uvit.evaluate.compare import compare_reports
from uvit.evaluate.evaluate import evaluate
from uvit.evaluate.reference import store_statistics
from uvit.sources.shapes import ShapesSource

LAPACK = 1e-12  # relative: on some CPUs where a matrix begins in memory changes the last bit of its decompositions


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline"), num_tokens=77))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_vit_folder(tmp_path_factory.mktemp("networks") / "tiny-vit"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 PNG files of 40 x 32 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(100):
        small = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        small.resize((40, 32), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def run(out: Path, model: object, **flags: Any) -> dict[str, Any]:
    config = EvaluateConfig(model=str(model), output_dir=str(out), device="cpu", disable_tqdm=True, **flags)
    evaluate(config)
    return json.loads((out / "report.json").read_text()) if (out / "report.json").is_file() else {}


def values(report: dict[str, Any], result: int = 0) -> dict[str, float]:
    return {score["name"]: score["value"] for score in report["results"][result]["scores"]}


SAMPLING: dict[str, Any] = {"prompts": "shapes", "max_prompts": 20, "num_inference_steps": (2,), "batch_size": 4}


EVERY_IMAGE_FOUND = {
    "retrieval_top1-tiny-vit": 1.0, "retrieval_top5-tiny-vit": 1.0, "retrieval_median_rank-tiny-vit": 0.0
}  # fmt: skip


# A model


def test_a_model_alone_is_measured_on_the_shapes(
    tmp_path: Path, pipeline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tmp_path, pipeline, max_prompts=3, num_inference_steps=(2,))
    found = values(report)
    assert list(found) == ["prompts", "attributes", "colour", "shape", "size", "position", "background"]
    assert 0 <= found["attributes"] <= 1 and report["prompts"]["num_prompts"] == 3
    assert report["protocol"] == {"name": "shapes", "changed": {"max_prompts": 3, "num_inference_steps": [2]}}
    assert (tmp_path / "contact_sheet.png").stat().st_size > 1000
    assert "chance" in capsys.readouterr().out


def test_a_protocol_samples_a_path_that_its_solver_cannot(
    tmp_path: Path, pipeline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = tiny_pipeline_folder(tmp_path, "sample", num_tokens=77, diffusion_path="linear")
    flags: dict[str, Any] = {**SAMPLING, "max_prompts": 2, "metrics": ("attributes",), "protocol": "uvit-coco"}
    report = run(tmp_path / "linear", linear, **flags)
    assert "official cannot sample a model of path linear; dpmsolver++ does" in capsys.readouterr().out
    assert report["protocol"]["changed"]["scheduler"] == report["settings"]["scheduler"] == ["dpmsolver++"]
    assert "--scheduler dpmsolver++" in report["command"]
    kept = run(tmp_path / "vp", pipeline, **flags)
    assert kept["settings"]["scheduler"] == ["official"] and "scheduler" not in kept["protocol"]["changed"]
    with pytest.raises(UserError, match=r"--scheduler official: cannot sample a model of path linear; use dpm"):
        run(tmp_path / "asked", linear, **flags, scheduler=("official",))


def test_a_model_is_measured_on_two_shapes(tmp_path: Path, pipeline: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, pipeline, **{**SAMPLING, "prompts": "shapes:two", "metrics": ("attributes",)})
    found = values(report)
    assert list(found)[:4] == ["prompts", "attributes", "related_objects", "objects"]
    assert list(found)[4:] == ["colour", "shape", "relation", "other_colour", "other_shape", "background"]
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 1000
    printed = capsys.readouterr().out
    assert "both objects" in printed and "relation" in printed and "whole prompts" in printed


def test_rendered_pairs_are_all_right(tmp_path: Path) -> None:
    scenes = ShapesSource("heldout", 32, 2)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(30):
        scenes[i].image.save(images / f"{i:02d}.png")
    report = run(tmp_path / "out", images, prompts="shapes:two", max_prompts=30, metrics=("attributes",))
    assert set(values(report).values()) == {1.0}
    other = run(tmp_path / "one", images, prompts="shapes", max_prompts=30, metrics=("attributes",))
    assert values(other)["prompts"] == 0


def test_processes_that_share_the_work_make_the_same_images_features_and_scores(
    tmp_path: Path, pipeline: str, vit: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("uvit.evaluate.generate.CHUNK", 4)
    flags = {**SAMPLING, "reference": "shapes", "split": "heldout", "feature_extractor": vit, "metrics": ("fd", "kid")}
    alone = run(tmp_path / "alone", pipeline, **flags)
    capsys.readouterr()
    assert run(tmp_path / "shared", pipeline, shard="1/3", **flags) == {}
    assert "evaluate: 16/16 images (100%)" in capsys.readouterr().err  # two chunks of 4, and 72 - 64 real ones
    assert run(tmp_path / "shared", pipeline, shard="0/3", **flags) == {}
    shared = run(tmp_path / "shared", pipeline, shard="2/3", **flags)
    for report in (alone, shared):
        assert "--shard" not in report.pop("command")
        report["settings"].pop("output_dir")
    assert shared == alone
    assert (tmp_path / "shared" / "prompts.jsonl").read_text() == (tmp_path / "alone" / "prompts.jsonl").read_text()
    names = sorted(path.name for path in (tmp_path / "alone" / "images").glob("*.png"))
    assert len(names) == 20
    for name in names:
        one, other = (Image.open(tmp_path / folder / "images" / name).tobytes() for folder in ("alone", "shared"))
        assert one == other


def test_a_stopped_evaluation_resumes(tmp_path: Path, pipeline: str, vit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images without features, features of some chunks, and nothing: as a kill leaves them."""
    monkeypatch.setattr("uvit.evaluate.generate.CHUNK", 4)
    flags = {**SAMPLING, "reference": "shapes", "split": "heldout", "feature_extractor": vit, "metrics": ("fd", "prdc")}
    whole = run(tmp_path / "a", pipeline, **flags)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in [tmp_path / "b" / "report.json", *sorted((tmp_path / "b" / "features" / "tiny-vit").iterdir())[2:]]:
        path.unlink()
    for path in sorted((tmp_path / "b" / "images").iterdir())[13:]:
        path.unlink()
    assert run(tmp_path / "b", pipeline, **flags)["results"] == whole["results"]


def test_other_settings_do_not_mix_with_those_of_a_folder(tmp_path: Path, pipeline: str) -> None:
    run(tmp_path, pipeline, **SAMPLING, metrics=("attributes",))
    with pytest.raises(UserError, match=r"was made with other settings \(guidance_scale: 2.0 there, 3.0 here\)"):
        run(tmp_path, pipeline, **SAMPLING, metrics=("attributes",), guidance_scale=(3.0,))


def test_features_of_other_prompts_are_not_used(tmp_path: Path, photos: Path) -> None:
    """The same images. An earlier version did not say which prompts its features are of."""
    clip, texts = str(tiny_clip_folder(tmp_path / "my-clip")), tmp_path / "prompts.txt"
    flags: dict[str, Any] = {"prompts": str(texts), "clip_name_or_path": clip, "metrics": ("clip_score",)}
    texts.write_text("\n".join(f"a cat {i}" for i in range(100)))
    before = run(tmp_path / "out", photos, **flags)
    assert run(tmp_path / "out", photos, **flags)["results"] == before["results"]
    texts.write_text("\n".join(f"a dog {i}" for i in range(100)))
    with pytest.raises(UserError, match=r"other settings \(prompts_sha256: .*, or delete .*out/features$"):
        run(tmp_path / "out", photos, **flags)
    after = run(tmp_path / "new", photos, **flags)
    assert values(after) != values(before)
    for path in (tmp_path / "new" / "features" / "my-clip-with-texts").iterdir():
        as_earlier(path)
    with pytest.raises(
        UserError,
        match=r"was written by an earlier version, .* delete .*features and run",
    ):
        run(tmp_path / "new", photos, **flags)


def as_earlier(path: Path) -> None:
    """The header of a chunk without what earlier versions did not write."""
    with safe_open(path, "np") as file:
        header, arrays = json.loads(file.metadata()["uvit"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["inputs"]
    save_file(arrays, path, {"uvit": json.dumps(header)})


@pytest.mark.parametrize("captioned", [False, True])
def test_features_of_replaced_images_are_not_used(
    tmp_path: Path, vit: str, photos: Path, captioned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of the same names and sizes, in a folder and in a source."""
    real, file = tmp_path / "real", tmp_path / "a.npz"
    real.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 99, 0)).save(real / f"{i}.bmp")
        if captioned:
            (real / f"{i}.txt").write_text("words")
    flags: dict[str, Any] = {"reference": str(real), "metrics": ("fd",), "feature_extractor": vit, "resolution": 8}
    statistics = EvaluateStatisticsConfig(
        str(real), str(file), "fd", resolution=8, feature_extractor=vit, device="cpu", disable_tqdm=True
    )
    run(tmp_path / "old", photos, **flags)
    store_statistics(statistics)
    Image.new("RGB", (8, 8), (5, 5, 200)).save(real / "2.bmp")
    os.utime(real / "2.bmp", ns=(1, 1))
    with pytest.raises(UserError, match=r"other settings \(sizes_and_times_sha256: .*, or delete .*old/reference$"):
        run(tmp_path / "old", photos, **flags)
    with pytest.raises(UserError, match=r"other settings \(sizes_and_times_sha256: .*, or delete .*a.npz.features$"):
        store_statistics(statistics)
    first = run(tmp_path / "new", photos, **flags)
    os.utime(real / "2.bmp", ns=(2, 2))
    second = run(tmp_path / "again", photos, **flags)  # other times, the same images: the reports do not differ
    assert first["reference"] == second["reference"]
    capsys.readouterr()
    assert compare_reports(EvaluateCompareConfig((str(tmp_path / "new"), str(tmp_path / "again")))) == 0
    assert capsys.readouterr().out == f"fd-tiny-vit: {values(first)['fd-tiny-vit']:.6g} and " + (
        f"{values(second)['fd-tiny-vit']:.6g}, the same\n"
    )
    assert compare_reports(EvaluateCompareConfig((str(tmp_path / "old"), str(tmp_path / "again")))) == 1


def test_a_flag_without_an_effect_is_refused(tmp_path: Path, vit: str, photos: Path) -> None:
    with pytest.raises(UserError, match=r"^--guidance_scale 3.0: has no effect, because .* is no pipeline"):
        run(
            tmp_path / "out", photos, reference=str(photos), feature_extractor=vit, metrics=("kid",),
            guidance_scale=(3.0,),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_repeats_have_other_seeds_and_give_a_spread(tmp_path: Path, pipeline: str, vit: str) -> None:
    flags = {**SAMPLING, "reference": "shapes", "split": "heldout", "feature_extractor": vit, "metrics": ("fd",)}
    report = run(tmp_path, pipeline, repeats=3, **flags)
    [score] = report["results"][0]["scores"]
    assert len(set(score["values"])) == 3
    assert score["value"] == pytest.approx(np.mean(score["values"]))
    assert score["deviation"] == pytest.approx(np.std(score["values"], ddof=1))
    assert [images["seed"] for images in report["results"][0]["images"]] == [0, 20, 40]
    assert json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[3])["seeds"] == [3, 23, 43]
    single = run(tmp_path / "single", pipeline, seed=20, **flags)
    assert values(single)["fd-tiny-vit"] == score["values"][1]


def test_a_sweep_gives_a_row_for_each_combination_and_a_best_one(tmp_path: Path, pipeline: str, vit: str) -> None:
    flags = {**SAMPLING, "num_inference_steps": (2, 3), "guidance_scale": (1.0, 2.0), "feature_extractor": vit}
    report = run(
        tmp_path, pipeline, reference="shapes", split="heldout", metrics=("fd", "attributes"), **flags
    )  # fmt: skip
    assert [result["label"] for result in report["results"]] == [
        f"guidance_scale {scale}, num_inference_steps {steps}" for scale in (1.0, 2.0) for steps in (2, 3)
    ]
    single = run(
        tmp_path / "single", pipeline, reference="shapes", split="heldout", metrics=("fd", "attributes"),
        **{**flags, "num_inference_steps": (3,), "guidance_scale": (1.0,)},
    )  # fmt: skip
    assert values(report, 1) == values(single)
    assert report["best"]["score"] == "fd-tiny-vit" and 0 <= report["best"]["setting"] < 4
    assert (tmp_path / "pareto.png").is_file()


# Images


def test_equal_images_have_no_distance(tmp_path: Path, vit: str, photos: Path) -> None:
    report = run(
        tmp_path, photos, reference=str(photos), feature_extractor=vit, metrics=("fd", "kid", "prdc")
    )  # fmt: skip
    found = values(report)
    assert 0 <= found["fd-tiny-vit"] < 1e-9
    assert found["precision-tiny-vit"] == found["recall-tiny-vit"] == found["coverage-tiny-vit"] == 1
    assert report["images"]["pixels_sha256"] == report["reference"]["pixels_sha256"]


def test_stored_statistics_give_the_same_distance_as_the_images(tmp_path: Path, vit: str, photos: Path) -> None:
    file = tmp_path / "photos.npz"
    store_statistics(
        EvaluateStatisticsConfig(
            str(photos), str(file), metric="fd", resolution=24, feature_extractor=vit, device="cpu", disable_tqdm=True
        )
    )
    flags: dict[str, Any] = {"feature_extractor": vit, "metrics": ("fd",), "resolution": 24}
    with_images = run(tmp_path / "a", "shapes", reference=str(photos), **flags)
    with_file = run(tmp_path / "b", "shapes", reference=str(file), **flags)
    assert [(tmp_path / name / "neighbours.png").exists() for name in "ab"] == [True, False]
    assert values(with_file) == pytest.approx(values(with_images), rel=LAPACK)
    assert with_file["reference"]["pixels_sha256"] == with_images["reference"]["pixels_sha256"]
    assert with_file["reference"]["num_images"] == 100
    with pytest.raises(UserError, match=r"^--metrics kid: compares single images.*statistics only"):
        run(tmp_path / "c", "shapes", reference=str(file), **{**flags, "metrics": ("kid",)})


def test_two_files_of_statistics_are_compared_without_a_network(tmp_path: Path, vit: str, photos: Path) -> None:
    flags: dict[str, Any] = {"feature_extractor": vit, "resolution": 24}
    files = {}
    for name in (str(photos), "shapes"):
        files[name] = tmp_path / f"{Path(name).name}.npz"
        store_statistics(
            EvaluateStatisticsConfig(
                name, str(files[name]), metric="fd", device="cpu", disable_tqdm=True, **flags
            )
        )  # fmt: skip
    with_images = run(tmp_path / "a", "shapes", reference=str(photos), metrics=("fd",), **flags)
    with_files = run(tmp_path / "b", files["shapes"], reference=str(files[str(photos)]), metrics=("fid",))
    assert values(with_files) == pytest.approx(values(with_images), rel=LAPACK)
    assert with_files["reference"]["pixels_sha256"] == with_images["reference"]["pixels_sha256"]
    for name in ("extractors", "reference", "images"):
        assert {**with_files[name], **with_images[name]} == with_files[name]
    assert with_files["settings"].keys() == with_images["settings"].keys()
    assert compare_reports(EvaluateCompareConfig((str(tmp_path / "a"), str(tmp_path / "b")))) == 0
    words = shlex.split(with_files["command"])
    assert "--guidance_scale" not in words and words[2] == str(files["shapes"])
    capitals = str(shutil.copy(files["shapes"], tmp_path / "CAPITALS.NPZ"))
    for number, (one, other) in enumerate([(capitals, str(files["shapes"])), (str(files["shapes"]), capitals)]):
        same = run(tmp_path / f"c{number}", one, reference=other, metrics=("fid",))
        assert values(same) == {"fd-tiny-vit": 0.0}
    with np.load(files["shapes"]) as arrays:
        np.savez(tmp_path / "foreign.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    foreign = str(tmp_path / "foreign.npz")
    unknown = run(tmp_path / "unknown", foreign, reference=foreign, metrics=("fid",))
    assert unknown["extractors"] == {}
    del unknown["extractors"], unknown["settings"]  # as earlier versions wrote reports
    (tmp_path / "unknown" / "report.json").write_text(json.dumps(unknown))
    assert compare_reports(EvaluateCompareConfig((str(tmp_path / "unknown"),) * 2)) == 0
    with pytest.raises(UserError, match="give the images as the model"):
        run(tmp_path / "d", files["shapes"], reference=str(photos), metrics=("fid",))
    with pytest.raises(UserError, match="holds statistics; give one of --metrics"):
        run(tmp_path / "d", files["shapes"], reference=str(files["shapes"]), metrics=("kid",))


def test_images_of_a_source_are_prepared_as_in_extraction(tmp_path: Path, vit: str) -> None:
    """The shapes rendered to files and as a source."""
    source = ShapesSource("heldout", 32)
    (tmp_path / "images").mkdir()
    for i in range(len(source)):
        source[i].image.save(tmp_path / "images" / f"{i:05d}.png")
    flags: dict[str, Any] = {"reference": "shapes", "split": "heldout", "feature_extractor": vit, "metrics": ("fd",)}
    report = run(tmp_path / "out", tmp_path / "images", resolution=32, **flags)
    assert values(report)["fd-tiny-vit"] < 1e-9


def test_images_that_cannot_be_read_are_named_and_counted(tmp_path: Path, vit: str, photos: Path) -> None:
    bad = tmp_path / "images"
    shutil.copytree(photos, bad)
    (bad / "007.png").write_bytes(b"no image")
    (bad / "050.png").write_bytes((bad / "051.png").read_bytes()[:100])
    report = run(tmp_path / "out", bad, reference=str(photos), feature_extractor=vit, metrics=("fd",))
    assert [problem["id"] for problem in report["images"]["problems"]] == ["007.png", "050.png"]
    assert any("2 of the images could not be read" in note and "007.png" in note for note in report["notes"])


def test_retrieval_and_nearest_neighbours(tmp_path: Path, vit: str) -> None:
    """A source against itself: every image is nearest to the one that its caption names."""
    report = run(
        tmp_path, "shapes", prompts="shapes", split="heldout", max_prompts=72, reference="shapes", resolution=32,
        feature_extractor=vit, metrics=("retrieval",),
    )  # fmt: skip
    assert values(report) == EVERY_IMAGE_FOUND
    assert (tmp_path / "neighbours.png").is_file()


def test_the_protocol_emoji_takes_prompts_and_reference_from_the_features_of_the_run(
    tmp_path: Path, pipeline: str, vit: str
) -> None:
    source, model, shapes = tmp_path / "source", tmp_path / "model", ShapesSource("train", 32)
    source.mkdir()
    for i in range(24):  # of a caption that two images have, none is a prompt
        shapes[i].image.save(source / f"{i:02d}.png")
        (source / f"{i:02d}.txt").write_text(shapes.captions(0 if i == 5 else i)[0])
    command = f"extract --source {source} --resolution 32 --vae_name_or_path shapes --text tokens "
    command += f"--model_max_length 18 --output_dir {tmp_path / 's'} --device cpu --num_workers 0"
    assert main(command.split()) == 0
    shutil.copytree(pipeline, model)
    flags: dict[str, Any] = {"protocol": "emoji", "num_inference_steps": (1,), "feature_extractor": vit}
    with pytest.raises(
        UserError, match=r"^--protocol emoji: .*model does not record the features .*--prompts and --ref"
    ):
        run(tmp_path / "out", model, **flags)
    (model / "training.json").write_text(json.dumps({"config": {"feature_path": str(tmp_path / "s")}}))
    report = run(tmp_path / "out", model, **flags, max_prompts=12, guidance_scale=(1.0, 3.0))
    names = ["fd-tiny-vit", *(f"retrieval_{name}-tiny-vit-centered" for name in ("top1", "top5", "median_rank"))]
    assert [list(values(report, row)) for row in (0, 1)] == [names, names]
    assert report["reference"]["num_images"] == 24 and report["settings"]["retrieval_cosine"] == "centered"
    lines = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and not {"0", "5"} & {line["id"] for line in lines}
    assert [int(line["id"]) for line in lines] != sorted(int(line["id"]) for line in lines)
    given = run(
        tmp_path / "given", model, **flags, max_prompts=12, guidance_scale=(3.0,),
        prompts=str(tmp_path / "s"), reference=str(source), resolution=32,
    )  # fmt: skip
    assert values(given) == values(report, 1)


def test_prompts_and_sheets_of_categories_whatever_these_are_called(tmp_path: Path, pipeline: str, vit: str) -> None:
    categories = ["a/b", "a-b", "../../c", "???", "", "猫", "x" * 300]
    rows = [json.dumps({"prompt": f"a cat {i}", "category": category}) for i, category in enumerate(categories)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    flags: dict[str, Any] = {"num_inference_steps": (1,), "metrics": ("fd",), "reference": "shapes", "split": "heldout"}
    report = run(tmp_path / "out", pipeline, prompts=str(tmp_path / "a.jsonl"), feature_extractor=vit, **flags)
    sheets = sorted(path.name for path in (tmp_path / "out" / "sheets").iterdir())
    assert sheets == ["00-a-b.png", "01-a-b.png", "02-..-..-c.png", "03-.png", "04-猫.png", f"05-{'x' * 60}.png"]
    again = run(
        tmp_path / "again", pipeline, prompts=str(tmp_path / "out" / "prompts.jsonl"), feature_extractor=vit, **flags
    )  # fmt: skip
    assert values(again) == values(report) and again["prompts"]["sha256"] == report["prompts"]["sha256"]


def test_a_clip_score_beside_distances_that_need_real_images(tmp_path: Path, pipeline: str, photos: Path) -> None:
    """The real images have no prompts. And one CLIP gives the score, and features of its own for a distance."""
    clip = str(tiny_clip_folder(tmp_path / "my-clip"))
    flags = {**SAMPLING, "reference": str(photos), "feature_extractor": clip, "clip_name_or_path": clip}
    both = run(tmp_path / "both", pipeline, **flags, metrics=("clip_score", "fd"))
    del flags["reference"], flags["feature_extractor"]
    alone = run(tmp_path / "alone", pipeline, **flags, metrics=("clip_score",))
    assert list(values(both)) == ["clip_score-my-clip", "fd-my-clip"]
    assert values(both)["clip_score-my-clip"] == values(alone)["clip_score-my-clip"]
    [low, high] = both["results"][0]["scores"][0]["interval"]
    assert 0 <= low <= values(both)["clip_score-my-clip"] <= high
    with pytest.raises(UserError, match=r"^--metrics cmmd fd: two networks are called cmmd-x"):
        run(
            tmp_path / "equal", pipeline, **SAMPLING, reference=str(photos), metrics=("cmmd", "fd"),
            cmmd_name_or_path=str(shutil.copytree(clip, tmp_path / "x")),
            feature_extractor=str(shutil.copytree(clip, tmp_path / "cmmd-x")),
        )  # fmt: skip


@pytest.mark.filterwarnings("error:the model reads")
def test_prompts_that_are_too_long_are_counted_and_not_named_one_by_one(
    tmp_path: Path, pipeline: str, vit: str
) -> None:
    (tmp_path / "a.txt").write_text("a cat\n" + "\n".join("a very long cat " * 30 + str(i) for i in range(3)))
    flags: dict[str, Any] = {"num_inference_steps": (1,), "metrics": ("fd",), "reference": "shapes", "split": "heldout"}
    report = run(tmp_path / "out", pipeline, prompts=str(tmp_path / "a.txt"), feature_extractor=vit, **flags)
    assert any(note.startswith("3 prompts have more tokens than the model reads") for note in report["notes"])


def test_images_of_a_model_and_of_a_folder_are_matched_by_their_prompts(
    tmp_path: Path, pipeline: str, vit: str
) -> None:
    """File names and wordings name no image of the source; the positions of the prompts do."""
    flags: dict[str, Any] = {"feature_extractor": vit, "metrics": ("retrieval",), "reference": "shapes"}
    report = run(tmp_path / "model", pipeline, **SAMPLING, split="heldout", **flags)
    score = report["results"][0]["scores"][0]
    assert score["details"] == {"chance": 1 / 72, "num_images": 20}
    source = ShapesSource("heldout", 32)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(72 + 10):  # the first ten again, in the second wording
        source[i % 72].image.save(images / f"b{i:03d}.png")
    flags |= {"prompts": "shapes", "max_prompts": 82, "resolution": 32}
    report = run(tmp_path / "folder", images, split="heldout", **flags)
    assert values(report)["retrieval_top1-tiny-vit"] == 1.0
    with pytest.raises(UserError, match=r"no prompt names an image of --reference \('a .*background'"):
        run(tmp_path / "train", images, **flags)  # the prompts are heldout, the real images train


def test_parts_of_a_source_are_matched_by_their_place_in_the_whole(tmp_path: Path, vit: str) -> None:
    """Every fourth pair is val. Pair 1 has a broken image, and pair 6 an empty caption."""
    source, images = tmp_path / "source", tmp_path / "images"
    for folder in (source, images):
        folder.mkdir()
    shapes = ShapesSource("train", 32)
    for i in range(24):
        shapes[i].image.save(source / f"{i:02d}.png")
        (source / f"{i:02d}.txt").write_text(shapes.captions(i)[0])
        if i != 6:
            shutil.copy(source / f"{i:02d}.png", images / f"{i:02d}.png")
    (source / "01.png").write_bytes(b"no image")
    (source / "06.txt").write_text("")
    store = tmp_path / "store"
    for split in ("train", "val"):
        command = f"extract --source {source} --split {split} --val_every 4 --resolution 32 --vae_name_or_path shapes "
        command += f"--text tokens --model_max_length 18 --output_dir {store} --device cpu --num_workers 0"
        assert main(command.split()) == 0
    flags: dict[str, Any] = {"feature_extractor": vit, "metrics": ("retrieval",)}
    for number, (model, prompts, split, expected) in enumerate(
        [
            (images, source, "train", 23 - 6 - 1),  # the prompts of everything, the images of train
            (store, store, "val", 6),
        ]
    ):
        report = run(
            tmp_path / f"out-{number}", model, prompts=str(prompts), reference=str(store), split=split, **flags
        )  # fmt: skip
        first = report["results"][0]["scores"][0]
        assert first["value"] == 1.0 and first["details"]["num_images"] == expected


def test_nearest_images_are_shown_wherever_single_images_are_compared(tmp_path: Path, vit: str, photos: Path) -> None:
    run(tmp_path / "fd", "shapes", reference=str(photos), resolution=24, feature_extractor=vit, metrics=("fd",))
    with Image.open(tmp_path / "fd" / "neighbours.png") as sheet:
        assert sheet.height > 3 * sheet.width  # 24 rows of 6 images
    run(tmp_path / "shapes", "shapes", split="heldout", prompts="shapes", max_prompts=72, metrics=("attributes",))
    assert not (tmp_path / "shapes" / "neighbours.png").exists()


# Bad input


def test_bad_input_is_one_sentence_before_any_image(tmp_path: Path, pipeline: str, vit: str, photos: Path) -> None:
    empty, one, mixed = (tmp_path / name for name in ("empty", "one", "mixed"))
    for folder in (empty, one, mixed):
        folder.mkdir()
    shutil.copy(photos / "000.png", one)
    shutil.copy(photos / "000.png", mixed)
    Image.new("RGB", (9, 9)).save(mixed / "001.png")
    (tmp_path / "other.npz").write_bytes(b"no statistics")
    own: dict[str, Any] = {"feature_extractor": vit, "metrics": ("fd",)}
    for model, flags, message in (
        (photos, {}, "--metrics: names no metric"),
        (pipeline, {"prompts": "shapes"}, "--metrics: names no metric"),
        (photos, {"metrics": ("kid",), "feature_extractor": vit}, "--metrics kid: .* give --reference"),
        (photos, {"metrics": ("clip_score",)}, "--metrics clip_score: needs the --prompts"),
        (photos, {"metrics": ("attributes",), "prompts": str(tmp_path / "a.txt")}, "needs --prompts shapes"),
        (photos, {"metrics": ("is",)}, "pt_inception-2015-12-05-6726825d.pth"),
        ("shapes", {"metrics": ("is",), "reference": str(photos)}, "--reference .*compares with no real images"),
        (photos, {**own, "reference": pipeline}, "is a model; give images"),
        (photos, {**own, "reference": str(tmp_path / "other.npz")}, "other.npz: is damaged"),
        (photos, {**own, "reference": str(tmp_path / "nothing")}, "--reference .*nothing"),
        (photos, {**own, "reference": str(empty)}, "--reference .*empty"),
        (empty, {**own, "reference": str(photos)}, "--model .*empty"),
        (mixed, {**own, "reference": str(photos)}, "give --resolution"),
        (one, {**own, "reference": str(photos)}, "1 image has no covariance"),
        (photos, {**own, "reference": str(photos), "prompts": "shapes"}, "288 prompts, and .* 100 images"),
        (pipeline, {"protocol": "parti"}, "--protocol parti: needs --prompts, PartiPrompts.tsv"),
        (pipeline, {"protocol": "uvit-coco", "reference": str(photos)}, "needs --prompts, captions_val2014.json"),
        (tmp_path, {**own, "reference": str(photos)}, "--output_dir .*: lies in .*, whose images are read"),
        ("shapes", {**own, "reference": str(tmp_path)}, "--output_dir .*: lies in .*, whose images are read"),
        (pipeline, {**own, "reference": str(photos)}, "for each prompt; give --prompts"),
        (pipeline, {**SAMPLING, "metrics": ("attributes",), "ema": ("raw",)}, "has one set of weights"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", model, **flags)
    assert not (tmp_path / "out" / "report.json").exists()
