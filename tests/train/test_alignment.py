"""The projector of --align: what it is trained on, that it is saved and not exported, and what it does not change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.extract.test_teacher import tiny_dinov2
from tests.train.conftest import TINY_MODEL
from uvit.checkpoint.folder import read_checkpoint
from uvit.config.extract import ExtractConfig
from uvit.errors import UserError
from uvit.extract.extract import extract
from uvit.train.alignment import Projector, alignment_targets, recorded_tokens
from uvit.train.dry_run import build_meta_run, plan_of_run
from uvit.train.loader import prefetch
from uvit.train.setup import Run, build_run
from uvit.train.step import batch_losses, train_step
from uvit.train.trainer import train

CLASSES = ("UViTT2IModel", "ModernUViTT2IModel")


@pytest.fixture
def aligned_config(tiny_config: Any, tmp_path: Path) -> Callable[..., Any]:
    """A function: the class of the model, flags -> TrainConfig."""

    def config(model: str = CLASSES[0], **flags: Any) -> Any:
        path = tmp_path / f"{model}.json"
        path.write_text(json.dumps({"_class_name": model, **TINY_MODEL}))
        return tiny_config(**{"uvit_config_file": str(path), "align": "sra", "align_block": 1, **flags})

    return config


def start(config: Any) -> Run:
    run = build_run(config, Path(config.output_dir))
    run.step = 2  # past the warm-up, where the rate is 0
    return run


def steps(run: Run, count: int) -> list[Any]:
    batches = prefetch(run.batches, range(100), 0, run.device)
    return [train_step(run, batches) for _ in range(count)]


def weights(run: Run) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.master_model.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


# What is computed


@pytest.mark.parametrize("model", CLASSES)
def test_targets_and_tokens_are_of_the_same_patches(aligned_config: Any, model: str) -> None:
    """Another value in one patch changes one target, and before any attention one token."""
    run = build_run(aligned_config(model), Path())
    unet: Any = run.master_model["unet"]
    one = torch.randn(2, 4, 4, 4)
    other = one.clone()
    other[:, :, 2:, :2] += 1  # the first patch of the second row
    differs = (alignment_targets("sra", unet, other) != alignment_targets("sra", unet, one)).any(1).any(0)
    assert differs.tolist() == [[False, False], [True, False]]
    torch.nn.init.zeros_(unet.in_blocks[0].attn.proj.weight)
    with torch.no_grad(), recorded_tokens(unet, 1) as tokens:
        for latents in (one, other):
            unet(latents, 500, torch.zeros(2, 16, 32))
    differs = (tokens[0] != tokens[1]).any(-1).any(0)
    assert differs.tolist() == [False] * 17 + [False, False, True, False]
    unet(one, 500, torch.zeros(2, 16, 32))
    assert len(tokens) == 2  # the hook is gone


def test_the_loss_is_squared_near_the_targets_and_linear_far_from_them() -> None:
    projector, targets = Projector("sra", 3, 3), torch.zeros(1, 3, 2, 1)
    projector.layers = torch.nn.Sequential()
    for error, expected in ((0.01, 0.01**2 / 0.1), (2.0, 2.0 - 0.025)):
        tokens = torch.full((1, 5, 3), 9.0)
        tokens[:, 3:] = error
        assert projector(tokens, targets).item() == pytest.approx(expected)


@pytest.mark.parametrize("model", CLASSES)
@pytest.mark.parametrize(
    "flags", [{}, {"bf16": True}, {"bf16": True, "fp16_opt_level": "O2"}, {"fp16": True}, {"recompute": True}]
)
def test_the_loss_falls_and_only_earlier_blocks_follow_it(
    aligned_config: Any, model: str, flags: dict[str, Any]
) -> None:
    run = start(aligned_config(model, align_block=2, **flags))
    [batch] = prefetch(run.batches, range(1), 0, run.device)
    _, before = batch_losses(run, batch)
    assert before is not None and before.dtype == torch.float32
    before.backward()
    names = {name for name, p in run.master_model.named_parameters() if p.grad is not None}
    assert any(name.startswith("unet.in_blocks.0") for name in names) and "projector.layers.2.weight" in names
    assert not any(name.startswith(("unet.out_blocks", "unet.norm", "unet.decoder_pred")) for name in names)
    run.master_model.zero_grad()
    for _ in range(4):
        train_step(run, iter([batch]))
    _, after = batch_losses(run, batch)
    assert after is not None and after < before


@pytest.mark.parametrize("model", CLASSES)
def test_recomputed_activations_give_the_same_weights(aligned_config: Any, model: str) -> None:
    plain, recomputed = (start(aligned_config(model, recompute=flag)) for flag in (False, True))
    ours, theirs = (torch.stack([result.numbers for result in steps(run, 3)]) for run in (plain, recomputed))
    assert torch.equal(ours, theirs)
    assert equal(weights(plain), weights(recomputed))


def test_accumulated_passes_average(aligned_config: Any) -> None:
    whole = start(aligned_config(per_device_train_batch_size=8))
    parts = start(aligned_config(per_device_train_batch_size=4, gradient_accumulation_steps=2))
    for one, other in zip(steps(whole, 3), steps(parts, 3), strict=True):
        assert other.align_loss == pytest.approx(one.align_loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_the_weight_counts_and_the_logged_losses_are_without_it(aligned_config: Any) -> None:
    light, heavy = (start(aligned_config(align_weight=weight)) for weight in (1e-30, 100.0))
    plain = start(aligned_config(align="none", align_block=2))
    assert equal(weights(light)[: len(weights(plain))], weights(plain))  # the same U-ViT to begin with
    one, other, without = (steps(run, 1)[0] for run in (light, heavy, plain))
    assert (one.loss, one.align_loss) == (other.loss, other.align_loss)
    assert (without.loss, without.align_loss) == (one.loss, None)
    assert other.grad_norm > 2 * one.grad_norm and without.grad_norm == pytest.approx(one.grad_norm, rel=1e-6)


def test_predictions_that_are_not_finite_change_nothing(aligned_config: Any) -> None:
    """The gradient of a linear loss would be finite."""
    run = start(aligned_config())
    with torch.no_grad():
        run.master_model["projector"].layers[2].bias[0] = torch.inf  # type: ignore[union-attr, index]
    before = weights(run)
    [result] = steps(run, 1)
    assert result.skipped and not result.finite and equal(before, weights(run))


# Teachers


@pytest.fixture(scope="module")
def taught_store(tmp_path_factory: pytest.TempPathFactory, encoders: tuple[Path, Path]) -> str:
    """72 pairs with the features of a DINOv2, 4 x 4, for images of 2 x 2 tokens."""
    folder = tmp_path_factory.mktemp("taught")
    vae, text = map(str, encoders)
    extract(
        ExtractConfig(
            source=("shapes",), split="heldout", output_dir=str(folder), vae_name_or_path=vae,
            text_encoder_name_or_path=text, resolution=16, model_max_length=16, num_workers=0, disable_tqdm=True,
            teacher=str(tiny_dinov2(folder / "dinov2")),
        )
    )  # fmt: skip
    (folder / "heldout").rename(folder / "train")
    return str(folder)


def test_features_are_resampled_to_the_tokens_and_lose_what_is_everywhere_the_same(aligned_config: Any) -> None:
    unet: Any = build_run(aligned_config(), Path()).master_model["unet"]
    x_0, features = torch.zeros(2, 4, 4, 4), torch.randn(2, 3, 2, 2)
    assert torch.equal(alignment_targets("repa", unet, x_0, features.half()), features.half().float())
    coarse = alignment_targets("repa", unet, x_0, features.repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert ((coarse - features).abs() < (features.amax((2, 3)) - features.amin((2, 3)))[..., None, None] / 2).all()
    targets = alignment_targets("irepa", unet, x_0, features)
    same = alignment_targets("irepa", unet, x_0, 3 * features + 5)
    torch.testing.assert_close(targets, same, rtol=0, atol=1e-4)
    torch.testing.assert_close(targets.mean((2, 3)), torch.zeros(2, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["repa", "irepa"])
def test_the_loss_is_of_the_angle_between_features(kind: str) -> None:
    projector, targets = Projector(kind, 3, 3), torch.randn(2, 3, 2, 4)
    projector.layers = torch.nn.Sequential()
    tokens = torch.cat([torch.randn(2, 5, 3), 7 * targets.flatten(2).transpose(1, 2)], dim=1)
    assert projector(tokens, targets).item() == pytest.approx(0, abs=1e-6)
    assert projector(tokens, -targets).item() == pytest.approx(2)


@pytest.mark.parametrize("model", CLASSES)
@pytest.mark.parametrize("align", ["repa", "irepa"])
def test_features_of_a_teacher_are_learned(aligned_config: Any, taught_store: str, model: str, align: str) -> None:
    run = start(aligned_config(model, align=align, feature_path=taught_store, bf16=True, fp16_opt_level="O2"))
    [batch] = prefetch(run.batches, range(1), 0, run.device)
    assert batch.teacher is not None and batch.teacher.shape == (4, 32, 4, 4) and batch.teacher.dtype == torch.float16
    losses = [train_step(run, iter([batch])).align_loss for _ in range(6)]
    assert losses[-1] < losses[0]  # type: ignore[operator]
    assert plan_of_run(build_meta_run(run.config)).memory["weights"] == sum(
        parameter.nbytes for parameter in run.master_model.parameters()
    )


def test_a_run_goes_on_with_the_same_teacher_alone(aligned_config: Any, taught_store: str, tmp_path: Path) -> None:
    flags = {"align": "irepa", "feature_path": taught_store, "save_steps": 2}
    train(aligned_config(**flags, max_steps=4))
    whole = tensors(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    train(aligned_config(**flags, max_steps=4))
    assert all(torch.equal(value, whole[name]) for name, value in tensors(tmp_path / "run" / "checkpoint-4").items())
    other = tmp_path / "other"
    shutil.copytree(taught_store, other)
    path = other / "train" / "manifest.json"
    fields = json.loads(path.read_text())
    fields["teacher"]["sha256"] = "0" * 64
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="was trained on features by other encoders"):
        train(aligned_config(**{**flags, "feature_path": str(other)}))


# A run


def tensors(folder: Path) -> dict[str, Tensor]:
    found = read_checkpoint(folder)
    return {f"{group}/{name}": t for group in ("weights", "ema", "optimizer") for name, t in found.load(group).items()}


def test_a_run_resumes_bit_for_bit_stops_aligning_and_exports_the_model_alone(
    aligned_config: Any, tmp_path: Path
) -> None:
    train(aligned_config(align_until=0.67))  # the first four of six steps
    train(aligned_config(align_until=0.67, output_dir=str(tmp_path / "again"), max_steps=6, save_steps=2))
    resumed = aligned_config(
        align_until=0.67,
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"),
    )
    train(resumed)
    whole, other = (tensors(tmp_path / name / "checkpoint-6") for name in ("run", "resumed"))
    assert whole.keys() == other.keys()
    assert all(torch.equal(other[name], value) for name, value in whole.items())
    lines = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert ["align_loss" in line for line in lines] == [True] * 4 + [False] * 2
    stopped = tensors(tmp_path / "again" / "checkpoint-4")
    for name, value in whole.items():
        if "projector" in name:
            assert torch.equal(stopped[name], value) == (not name.startswith("ema")), name
    exported = load_file(tmp_path / "run" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(exported) == {name.removeprefix("weights/unet.") for name in whole if name.startswith("weights/unet.")}


# What is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"align_block": 4}, "--align_block 4: the model has 3 blocks; choose an earlier one"),
        ({"align": "repa"}, "has no features of a teacher; extract it with --teacher, or choose --align sra"),
        ({"compile": True}, "--compile: compiled blocks do not hand out the tokens that --align needs"),
    ],
)
def test_what_cannot_be_aligned_is_one_sentence(aligned_config: Any, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_run(aligned_config(**flags), Path())
    assert message in str(error.value)


def test_a_run_does_not_go_on_without_its_projector(aligned_config: Any) -> None:
    train(aligned_config(max_steps=3))
    with pytest.raises(UserError) as error:
        train(aligned_config(align="none", align_block=2))
    assert "pass the same again to resume" in str(error.value) and "align: was sra, now none" in str(error.value)
