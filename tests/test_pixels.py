"""Pixels in place of latents: extracted, trained on, resumed, sampled, evaluated and converted without a VAE."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.port import same
from uvit import UViTPipeline, load_unet
from uvit.cli.main import main
from uvit.config.evaluate import EvaluateConfig
from uvit.config.extract import ExtractConfig
from uvit.config.train import TrainConfig
from uvit.conventions import PIXELS, Conventions, LatentSpace
from uvit.errors import UserError
from uvit.evaluate.evaluate import evaluate
from uvit.extract.extract import extract
from uvit.images import to_pixels
from uvit.sources.open import open_source, require_random_access
from uvit.store.reader import FeatureStore
from uvit.store.shard import EncodedPairs, ShardWriter
from uvit.train.loader import random_draws
from uvit.train.setup import build_run
from uvit.train.step import clean_latents

MODEL = {
    "sample_size": 16, "patch_size": 4, "in_channels": 3, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 8, "clip_dim": 32, "num_text_tokens": 16, "bottleneck_dim": 6,
}  # fmt: skip


def extract_config(folder: Path, **flags: Any) -> ExtractConfig:
    values: dict[str, Any] = {
        "source": ("shapes",), "output_dir": str(folder), "latents": "none", "text": "tokens", "resolution": 16,
        "model_max_length": 16, "vocab_size": 300, "num_workers": 0, "shard_size": 250, "disable_tqdm": True,
    }  # fmt: skip
    return ExtractConfig(**(values | flags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of pixels with a train and a heldout split, and the config of a model of its size."""
    folder = tmp_path_factory.mktemp("pixels")
    for split in ("train", "heldout"):
        extract(extract_config(folder / "store", split=split, random_flip=True))
    (folder / "model.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture(scope="module")
def train_config(folder: Path) -> Callable[..., TrainConfig]:
    def config(**flags: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "feature_path": str(folder / "store"), "output_dir": str(folder / "run"), "max_steps": 4, "save_steps": 2,
            "uvit_config_file": str(folder / "model.json"), "train_text_encoder": True, "text_encoder_layers": 1,
            "per_device_train_batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-3, "ema_decay": 0.5,
            "logging_steps": 2, "image_logging_steps": 2, "num_inference_steps": 2, "report_to": "none",
            "validation_split": "heldout", "num_validation_samples": 8, "eval_steps": 4, "eval_prompts": 8,
            "eval_metrics": ("attributes",), "dataloader_num_workers": 0, "device": "cpu", "disable_tqdm": True,
        }  # fmt: skip
        return TrainConfig(**(values | flags))

    return config


def run_training(config: TrainConfig) -> None:
    from uvit.train.trainer import train

    assert train(config) == 0


@pytest.fixture(scope="module")
def trained(folder: Path, train_config: Callable[..., TrainConfig]) -> Path:
    """A run of four steps, with previews, validation and evaluation."""
    run_training(train_config())
    return folder / "run"


# What is stored


def test_the_stored_images_are_those_that_a_vae_would_get(folder: Path) -> None:
    store, source = FeatureStore(folder / "store" / "train"), require_random_access(open_source("shapes"), "")
    assert (store.is_pixels, store.latents_shape, store.moments_shape) == (True, (3, 16, 16), None)
    assert (store.latent_space, store.vae_name) == (PIXELS, None)
    rows = np.array([0, 249, 250, store.num_samples - 1])  # on both sides of the border between two shards
    read = store.read(rows, np.zeros(4))
    assert read.moments is None and read.images is not None and read.images.dtype == np.uint8
    shapes = require_random_access(open_source("shapes", resolution=16), "")
    expected = [to_pixels(shapes[int(row)].image, 16) for row in rows]
    assert np.array_equal(read.images, expected)
    assert len(source) == store.num_samples


def test_flipped_images_are_mirror_images(folder: Path) -> None:
    store, rows = FeatureStore(folder / "store" / "train"), np.arange(6)
    draws = np.array([0.0, 0.4, 0.5, 0.9, 0.1, 0.6])
    plain, mirrored = (store.read(rows, np.zeros(6), flips).images for flips in (None, draws))
    for row in rows:
        assert np.array_equal(mirrored[row], np.flip(plain[row], -1) if draws[row] < 0.5 else plain[row])
    assert not (folder / "store" / "train" / "flipped-00000.npy").exists()


def test_a_killed_extraction_resumes_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [extract_config(tmp_path / "store", random_flip=True, shard=f"{part}/2") for part in (0, 1)]

    def stop(shard: ShardWriter, part: EncodedPairs, next_row: int) -> None:
        if next_row > 100:
            raise KeyboardInterrupt
        append(shard, part, next_row)

    append = ShardWriter.append
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "append", stop)
        extract(parts[0])
    progress = json.loads((tmp_path / "store/train/.partial-00000/progress.json").read_text())
    assert 0 < progress["rows"] <= 100
    for part in parts:
        assert not (tmp_path / "store/train/manifest.json").exists()
        extract(part)
    for path in sorted((folder / "store/train").glob("*.npy")):
        assert path.read_bytes() == (tmp_path / "store/train" / path.name).read_bytes(), path.name
    ours, theirs = (json.loads((each / "store/train/manifest.json").read_text()) for each in (folder, tmp_path))
    assert ours["shards"] == theirs["shards"] and ours["version"] == theirs["version"] == 3


def test_the_tools_for_features(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = folder / "store"
    assert main(["features", "info", str(store), "--split", "train"]) == 0
    assert "images              (3, 16, 16) uint8, mirrored at random in training" in capsys.readouterr().out
    merged = tmp_path / "merged"
    assert main(["features", "merge", str(store), str(store), "--output_dir", str(merged), "--disable_tqdm"]) == 0
    assert main(["features", "verify", str(merged), "--disable_tqdm"]) == 0
    rows = np.array([0, 648 + 5])
    read = FeatureStore(merged / "train").read(rows, np.zeros(2))
    assert np.array_equal(read.images, FeatureStore(store / "train").read(rows % 648, np.zeros(2)).images)
    (merged / "train/images-00001.npy").write_bytes(b"")
    assert main(["features", "verify", str(merged), "--disable_tqdm"]) == 1
    assert "images-00001.npy has 0 bytes" in capsys.readouterr().out
    sheet = tmp_path / "sheet.png"
    assert main(["features", "sample", str(store), "--rows", "3", "--output", str(sheet)]) == 0
    with Image.open(sheet) as image:
        assert image.width > 2 * 128  # the image and its mirror image
    assert main(["features", "export", str(store), "--output_dir", str(tmp_path / "npy"), "--disable_tqdm"]) == 2
    assert "holds images for a model on pixels" in capsys.readouterr().err


# Training


def test_x_0_is_the_images_in_minus_one_to_one(folder: Path, train_config: Callable[..., TrainConfig]) -> None:
    run = build_run(train_config(), folder / "unused")
    batch = run.batches[2]
    counters = np.arange(8, 12)
    images = FeatureStore(folder / "store/train").read(run.batches.rows(counters), np.zeros(4)).images
    flips = [
        np.random.Generator(np.random.Philox(key=[1234, 3], counter=[0, 0, 0, c])).random() < 0.5 for c in counters
    ]
    assert 0 < sum(flips) < 4
    by_hand = [np.flip(each, -1) if flip else each for each, flip in zip(images, flips, strict=True)]
    assert np.array_equal(clean_latents(run, batch), np.stack(by_hand).astype(np.float32) / np.float32(127.5) - 1)
    assert batch.moments is None and batch.posterior_noise is None and batch.noise.shape == (4, 3, 16, 16)
    assert run.batches.features.is_pixels and run.conventions == Conventions(1.0, latents="pixels")


def test_the_other_draws_are_those_of_a_run_on_latents() -> None:
    counters = np.arange(5)
    pixels, latents = (random_draws(counters, 7, (3, 4, 4), posterior=posterior) for posterior in (False, True))
    assert pixels.posterior_noise is None and latents.posterior_noise is not None
    for name in ("captions", "dropped", "timesteps"):
        assert np.array_equal(getattr(pixels, name), getattr(latents, name)), name
    assert np.array_equal(pixels.noise, latents.posterior_noise)  # the first normal numbers of the stream


def test_a_run_resumes_to_the_bit(trained: Path, train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint-2", tmp_path / "run/checkpoint-2")
    run_training(train_config(output_dir=str(tmp_path / "run")))
    whole, resumed = (load_unet(each / "pipeline") for each in (trained, tmp_path / "run"))
    assert same(whole.state_dict(), resumed.state_dict())
    lines = [json.loads(line) for line in (trained / "logs/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val_loss"] > 0 and "eval_attributes" in lines[-1]
    assert {path.name for path in (trained / "previews").iterdir()} == {"step-00000002.png", "step-00000004.png"}


def test_a_run_starts_from_a_pipeline_on_pixels(
    trained: Path, train_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(train_config(pretrained_model_name_or_path=str(trained / "pipeline")), tmp_path)
    assert same(run.master_model["unet"].state_dict(), load_unet(trained / "pipeline").state_dict())
    assert run.encoders["vae"] is None and "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vae_name_or_path": "shapes"}, "--vae_name_or_path shapes: .* holds pixels, which need no VAE; leave it out"),
        ({"latent_scale": 0.5}, "--latent_scale 0.5: .* holds pixels, which are not scaled; leave it out"),
        ({"uvit_config_file": "latents.json"}, "its images have 3 channels, and the model's have 4"),
    ],
)
def test_flags_about_a_vae_are_mistakes(
    flags: dict[str, Any],
    message: str,
    train_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "latents.json").write_text(json.dumps(MODEL | {"in_channels": 4}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        build_run(train_config(**flags), tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"latents": "vae"}, "--vae_name_or_path: is required, unless --latents none stores pixels"),
        ({"vae_name_or_path": "shapes"}, "--vae_name_or_path shapes: --latents none stores pixels, without a VAE"),
        ({"latent_scale": 0.3}, "--latent_scale 0.3: --latents none stores pixels, without a VAE"),
    ],
)
def test_extraction_takes_a_vae_or_pixels(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        extract_config(tmp_path, **flags)


def test_the_dry_run_and_the_bench(
    folder: Path, train_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    from uvit.train.dry_run import describe_plan

    assert "648 samples" in describe_plan(train_config())
    flags = f"--uvit_config_file {folder}/model.json --latents none --steps 1 --batch_size 2 --matmul_size 64"
    assert main(["bench", *flags.split(), "--device", "cpu"]) == 0
    assert "training step" in capsys.readouterr().out


# The pipeline


def test_the_pipeline_has_no_vae_and_its_latents_are_the_images(trained: Path) -> None:
    pipeline = UViTPipeline.from_pretrained(trained / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    index = json.loads((trained / "pipeline/model_index.json").read_text())
    assert index["vqvae"] == [None, None] and pipeline.vqvae is None and pipeline.resolution == (16, 16)
    assert pipeline.conventions.is_pixels and pipeline.config["latents"] == "pixels"

    def sample(**options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a red circle", num_inference_steps=3, generator=generator, **options).images

    latents, images = sample(output_type="latent"), sample(output_type="pt")
    assert torch.equal((latents.clamp(-1, 1) + 1) / 2, images)
    original = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    edited = sample(image=original, strength=0.7, output_type="pt")
    painted = sample(image=original, mask_image=mask, output_type="pt")
    assert not torch.equal(edited, images) and not torch.equal(painted[..., :8], original[..., :8])
    torch.testing.assert_close(painted[..., 8:], original[..., 8:], atol=1e-6, rtol=0)  # 2 x - 1, and back
    with pytest.raises(ValueError, match="enable_vae_slicing: this pipeline has no VAE"):
        pipeline.enable_vae_slicing()
    again = UViTPipeline(**pipeline.components)
    assert again.conventions == pipeline.conventions


def test_three_channels_alone_are_not_pixels(trained: Path, vae_folder: Path) -> None:
    from uvit.weights.components import load_vae

    pipeline = UViTPipeline.from_pretrained(trained / "pipeline")
    with pytest.raises(ValueError, match="works on pixels, without a VAE, but there is one"):
        UViTPipeline(**{**pipeline.components, "vqvae": load_vae(str(vae_folder))})
    pipeline.unet.register_to_config(**dict.fromkeys(Conventions().__dict__))
    with pytest.raises(ValueError, match=r"the pipeline has no VAE \(vqvae\); pass it"):
        pipeline("a red circle", num_inference_steps=2)
    with pytest.raises(ValueError, match="latents are 'pixels', which have no latent_scale but 1"):
        LatentSpace(0.5, latents="pixels")
    with pytest.raises(ValueError, match="latents 'pixel' is none of 'vae', 'pixels'"):
        LatentSpace.recorded({"latents": "pixel"})


def test_sample_and_evaluate(trained: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    flags = "--num_inference_steps 2 --save_latents npy --disable_tqdm --device cpu"
    assert main(["sample", "a red circle", "--pipeline", str(trained), "--output_dir", str(out), *flags.split()]) == 0
    latents = np.load(out / "00000-a-red-circle.npy")
    with Image.open(out / "00000-a-red-circle.png") as image:
        levels = np.rint((latents.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        assert np.array_equal(np.asarray(image), levels.transpose(1, 2, 0))
    evaluate(
        EvaluateConfig(
            model=str(trained),
            output_dir=str(tmp_path / "report"),
            prompts="shapes",
            metrics=("attributes",),
            max_prompts=4,
            num_inference_steps=(2,),
            device="cpu",
            disable_tqdm=True,
        )
    )
    assert (tmp_path / "report/report.json").is_file()


def test_the_modern_model_on_a_linear_path(train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    sizes = {key: value for key, value in MODEL.items() if key != "attention_head_dim"}
    modern = {"_class_name": "ModernUViTT2IModel", **sizes, "attention_head_dim": 16}
    (tmp_path / "model.json").write_text(json.dumps(modern))
    flags = {"path": "linear", "prediction_type": "sample", "loss_type": "v", "eval_metrics": (), "max_steps": 2}
    model, output = str(tmp_path / "model.json"), str(tmp_path / "run")
    run_training(train_config(uvit_config_file=model, output_dir=output, **flags))
    pipeline = UViTPipeline.from_pretrained(tmp_path / "run/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.conventions == Conventions(1.0, latents="pixels", path="linear", prediction_type="sample")
    assert pipeline("a red circle", num_inference_steps=3, output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("to", ["pipeline", "diffusers"])
def test_conversion_there_and_back(to: str, trained: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["convert", str(trained / "checkpoint-4"), str(one), "--to", to]) == 0
    assert main(["convert", str(one), str(two)]) == 0
    pipelines = [UViTPipeline.from_pretrained(each) for each in (trained / "pipeline", one, two)]
    for pipeline in pipelines:
        assert pipeline.vqvae is None and pipeline.conventions == pipelines[0].conventions
        assert same(pipeline.unet.state_dict(), pipelines[0].unet.state_dict())
    card = (one / "README.md").read_text()
    assert "images of 16x16 pixels" in card and "| VAE (sha256) | none |" in card and "pixel-diffusion" in card


def test_formats_of_others(
    train_config: Callable[..., TrainConfig], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained / "checkpoint-4")
    assert main(["convert", checkpoint, str(tmp_path / "a"), "--to", "official"]) == 2
    assert "--to official: its U-ViT has no bottleneck in the patch embedding" in capsys.readouterr().err
    (tmp_path / "model.json").write_text(json.dumps(MODEL | {"bottleneck_dim": None}))
    plain = {"uvit_config_file": str(tmp_path / "model.json"), "output_dir": str(tmp_path / "run"), "max_steps": 1}
    run_training(train_config(**plain, eval_metrics=(), image_logging_steps=-1, eval_steps=-1))
    checkpoint = str(tmp_path / "run/checkpoint-1")
    for to in ("official", "paddle", "trainer"):
        assert main(["convert", checkpoint, str(tmp_path / to), "--to", to]) == 0
        assert "x_0 are pixels" in capsys.readouterr().out
        unet = load_unet(tmp_path / to)
        assert unet.config["latents"] == "pixels" and unet.config["in_channels"] == 3
        assert same(unet.state_dict(), load_unet(tmp_path / "run/pipeline").state_dict())
    assert main(["convert", checkpoint, str(tmp_path / "port"), "--to", "port"]) == 2
    assert "--to port: PaddleMIX's pipeline decodes with a VAE" in capsys.readouterr().err
    assert main(["convert", checkpoint, str(tmp_path / "vae"), "--vae_name_or_path", "shapes"]) == 2
    assert "works on pixels, without a VAE" in capsys.readouterr().err
