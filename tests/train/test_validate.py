"""Validation looks at the same thing in every run, and leaves no trace in the run."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from uvit.compiling import compile_blocks
from uvit.diffusion import add_noise, draw_latents, target
from uvit.train.setup import Run, build_run
from uvit.train.validate import TIMESTEPS, equal_batch_size, losses, read_batch, validate, validation_rows


def start(config: Any, path: Path) -> Run:
    run = build_run(config, path)
    with torch.no_grad():  # fresh averages are the weights themselves
        for parameter in run.ema_model.parameters():
            parameter.mul_(1.5)
    return run


@pytest.fixture
def config(tiny_config: Any) -> Any:
    return lambda **flags: tiny_config(**({"validation_split": "heldout", "num_validation_samples": 10} | flags))


def test_timesteps_are_the_middles_of_equal_parts() -> None:
    assert TIMESTEPS == (63, 188, 313, 438, 563, 688, 813, 938)
    parts = np.arange(1, 1001).reshape(8, 125)
    assert tuple(parts.mean(axis=1)) == TIMESTEPS


def test_rows_are_the_first_of_a_fixed_permutation() -> None:
    everything = validation_rows(72, 1000)
    assert sorted(everything) == list(range(72)) and list(everything) != list(range(72))
    assert np.array_equal(validation_rows(72, 10), everything[:10])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_what_it_is_said_to_be(prediction_type: Any, config: Any, tmp_path: Path) -> None:
    """Unweighted mean squared error of what the run predicts, on first captions."""
    run = start(config(prediction_type=prediction_type, snr_gamma=5.0), tmp_path)
    assert run.validation is not None
    rows = validation_rows(72, 10)
    read = run.validation.read(rows, np.zeros(10))
    assert read.context is not None
    batch, noise = read_batch(run.validation, rows, use_tokens=False)
    assert torch.equal(batch.moments, torch.from_numpy(read.moments)) and noise.shape == (10, 8, 4, 4, 4)
    x_0 = run.conventions.normalize(draw_latents(batch.moments.float(), batch.posterior_noise))
    expected = []
    for i, label in enumerate(TIMESTEPS):
        timesteps = torch.full((10,), label)
        with torch.no_grad():
            context = torch.from_numpy(read.context).float()
            prediction = run.ema_model["unet"](add_noise(x_0, noise[:, i], timesteps), timesteps, context)
        expected.append((prediction - target(x_0, noise[:, i], timesteps, prediction_type)).square().mean().item())
    found = validate(run)
    assert found["val_losses"] == pytest.approx(expected, rel=1e-5)
    assert found["val_loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert found["val_loss_raw"] == pytest.approx(np.mean(losses(run, run.master_model))) != found["val_loss"]


def test_the_noise_is_noise(config: Any, tmp_path: Path) -> None:
    run = start(config(), tmp_path)
    assert run.validation is not None
    batch, noise = read_batch(run.validation, np.arange(72), use_tokens=False)
    drawn = torch.cat([batch.posterior_noise[:, None], noise], dim=1)  # (72, 9, 4, 4, 4)
    assert drawn.mean().item() == pytest.approx(0, abs=0.02) and drawn.std().item() == pytest.approx(1, abs=0.02)
    assert len(drawn.flatten().unique()) > 0.99 * drawn.numel()  # no two rows or timesteps share theirs


@pytest.mark.parametrize("flags", [{}, {"train_text_encoder": True}])
def test_runs_compare(flags: dict[str, Any], config: Any, tmp_path: Path) -> None:
    """With the same weights: whatever the seed, and up to rounding whatever the batch size."""
    one, other = start(config(**flags), tmp_path), start(config(seed=7, **flags), tmp_path)
    large = start(config(per_device_train_batch_size=10, **flags), tmp_path)
    assert validate(one) != validate(other)
    for run in (other, large):
        run.master_model.load_state_dict(one.master_model.state_dict())
        run.ema_model.load_state_dict(one.ema_model.state_dict())
    assert validate(one) == validate(other)
    assert validate(one)["val_losses"] == pytest.approx(validate(large)["val_losses"], rel=1e-5)


@pytest.mark.parametrize("flags", [{}, {"train_text_encoder": True}, {"bf16": True, "fp16_opt_level": "O2"}])
def test_it_changes_nothing(flags: dict[str, Any], config: Any, tmp_path: Path) -> None:
    run = start(config(**flags), tmp_path)

    def everything() -> list[Any]:
        networks = (run.master_model, run.precision.compute_model, run.ema_model)
        tensors = [tensor.clone() for network in networks for tensor in network.state_dict().values()]
        modes = [module.training for network in networks for module in network.modules()]
        legacy: Any = np.random.get_state()  # noqa: NPY002 - the global generator is what must not be touched
        return [*tensors, torch.get_rng_state(), modes, random.getstate(), legacy[1].tolist(), legacy[2]]

    before = everything()
    validate(run)
    for a, b in zip(before, everything(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert all(parameter.grad is None for parameter in run.master_model.parameters())


def test_token_ids_are_encoded_by_whose_turn_it_is(config: Any, token_store: str, tmp_path: Path) -> None:
    stored, frozen = start(config(), tmp_path), start(config(feature_path=token_store), tmp_path)
    assert validate(frozen)["val_losses"] == pytest.approx(validate(stored)["val_losses"], rel=1e-3)

    joint = start(config(train_text_encoder=True), tmp_path)
    before = validate(joint)
    with torch.no_grad():
        for parameter in joint.ema_model["text_encoder"].parameters():
            parameter.zero_()
    after = validate(joint)
    assert after["val_loss"] != before["val_loss"] and after["val_loss_raw"] == before["val_loss_raw"]


def test_without_an_average_the_weights_themselves_are_validated(config: Any, tmp_path: Path) -> None:
    found = validate(start(config(use_ema=False), tmp_path))
    assert found["val_loss"] == found["val_loss_raw"] == np.mean(found["val_losses"])


@pytest.mark.parametrize("flags", [{"bf16": True}, {"bf16": True, "fp16_opt_level": "O2"}])
def test_low_precision_validates_near_float32(flags: dict[str, Any], config: Any, tmp_path: Path) -> None:
    exact, low = (validate(start(config(**more), tmp_path)) for more in ({}, flags))
    assert low["val_loss_raw"] == pytest.approx(exact["val_loss_raw"], rel=0.02)
    assert low["val_loss_raw"] != exact["val_loss_raw"]  # it really computed in another precision
    assert low["val_loss"] == pytest.approx(exact["val_loss"], rel=0.02)


def test_what_is_not_finite_is_null(config: Any, tmp_path: Path) -> None:
    run = start(config(), tmp_path)
    with torch.no_grad():
        run.ema_model["unet"].pos_embed.fill_(float("nan"))
    found = validate(run)
    assert found["val_loss"] is None and found["val_losses"] == [None] * 8 and found["val_loss_raw"] > 0


def test_batches_are_equally_large_and_as_many_as_the_batch_size_makes() -> None:
    assert [equal_batch_size(rows, 4) for rows in (1, 4, 5, 8, 9, 10)] == [1, 4, 3, 4, 3, 4]


def test_the_network_of_a_compiled_run_is_validated_as_it_is(config: Any, tmp_path: Path) -> None:
    """And previewed: what is compiled is for full batches with gradients."""
    run = start(config(use_ema=False), tmp_path)
    plain = validate(run)
    seen: list[Any] = []

    def spy(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    unet: Any = run.precision.compute_model["unet"]
    compile_blocks([unet.mid_block], backend=spy)  # type: ignore[arg-type]
    run.config = replace(run.config, compile=True)
    assert validate(run) == plain and not seen
    run.config = replace(run.config, compile=False)  # as if it were not known
    assert validate(run) == plain and seen
