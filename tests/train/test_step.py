"""The step: accumulation averages, what is not finite changes nothing, precision is where it should be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from uvit.train.loader import prefetch
from uvit.train.setup import Run, build_run
from uvit.train.step import batch_loss, train_step


def start(config: Any) -> Run:
    run = build_run(config, Path(config.output_dir))
    run.step = 2  # past the warm-up, where the rate is 0
    return run


def steps(run: Run, count: int) -> list[Any]:
    batches = prefetch(run.batches, range(100), 0, run.device)
    return [train_step(run, batches) for _ in range(count)]


def test_accumulation_averages(tiny_config: Any) -> None:
    """Two passes of four samples are one of eight: loss, gradient norm and weights agree to rounding."""
    whole = start(tiny_config(per_device_train_batch_size=8))
    parts = start(tiny_config(per_device_train_batch_size=4, gradient_accumulation_steps=2))
    for one, other in zip(steps(whole, 3), steps(parts, 3), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    for a, b in zip(whole.ema_model.parameters(), parts.ema_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_clipping_measures_before_it_cuts(tiny_config: Any) -> None:
    run = start(tiny_config(max_grad_norm=1e-3))
    [result] = steps(run, 1)
    assert result.grad_norm > 1e-2


@pytest.mark.parametrize("flags", [{}, {"fp16": True}, {"bf16": True, "fp16_opt_level": "O2"}])
def test_what_is_not_finite_changes_nothing(flags: dict[str, Any], tiny_config: Any) -> None:
    run = start(tiny_config(**flags))
    steps(run, 1)
    before = [p.clone() for p in [*run.master_model.parameters(), *run.ema_model.parameters()]]
    state = [value.clone() for entry in run.optimizer.state.values() for value in entry.values()]
    scale = run.precision.scale.value.item()
    bad = next(prefetch(run.batches, range(5, 6), 0, run.device))
    bad.noise[:] = float("nan")
    result = train_step(run, iter([bad]))
    assert not result.finite
    after = [*run.master_model.parameters(), *run.ema_model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    now = [value for entry in run.optimizer.state.values() for value in entry.values()]
    assert all(torch.equal(a, b) for a, b in zip(state, now, strict=True))
    assert run.precision.scale.value == (scale / 2 if flags.get("fp16") else scale)
    assert steps(run, 1)[0].finite  # and the run goes on


@pytest.mark.parametrize("flags", [{"bf16": True}, {"fp16": True}])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_low_precision_stays_near_float32(flags: dict[str, Any], level: str, tiny_config: Any) -> None:
    """bfloat16 keeps 8 bits: the loss of a few steps agrees to about 1%; masters, EMA and optimizer stay float32."""
    exact, low = start(tiny_config()), start(tiny_config(fp16_opt_level=level, **flags))
    for one, other in zip(steps(exact, 4), steps(low, 4), strict=True):
        assert other.loss == pytest.approx(one.loss, rel=0.02)
        assert other.grad_norm != one.grad_norm  # it really computed in another precision
    for tensor in [*low.master_model.parameters(), *low.ema_model.parameters()]:
        assert tensor.dtype == torch.float32
    assert all(v.dtype == torch.float32 for entry in low.optimizer.state.values() for v in entry.values())
    if level == "O2":
        pairs = zip(low.precision.compute_model.parameters(), low.master_model.parameters(), strict=True)
        assert all(torch.equal(copy, master.to(copy.dtype)) for copy, master in pairs)


@pytest.mark.parametrize("flags", [{}, {"fp16": True}])
def test_a_spike_changes_nothing_either(flags: dict[str, Any], tiny_config: Any) -> None:
    run = start(tiny_config(**flags))
    run.precision.scale.value.clamp_(max=256.0)  # float16 holds the large one too
    usual = steps(run, 1)[0].grad_norm
    large = next(prefetch(run.batches, range(5, 6), 0, run.device))
    large.noise[:] *= 100
    before = [p.clone() for p in [*run.master_model.parameters(), *run.ema_model.parameters()]]
    scale = run.precision.scale.value.item()

    run.guards.set_norms([usual] * 99)  # too few to tell
    kept = run.guards.state_dict()
    run.guards.set_norms([usual] * 100)
    result = train_step(run, iter([large]))
    assert result.skipped and result.finite and result.grad_norm > 20 * usual
    after = [*run.master_model.parameters(), *run.ema_model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert run.precision.scale.value == scale  # it has nothing to do with float16
    assert run.guards.norms[-1] == result.grad_norm
    assert not steps(run, 1)[0].skipped

    run.guards.load_state_dict(kept)
    assert not train_step(run, iter([large])).skipped


def test_no_spikes_where_none_are_wanted(tiny_config: Any) -> None:
    run = start(tiny_config(spike_factor=0.0))
    run.guards.set_norms([1e-9] * 100)
    assert not steps(run, 1)[0].skipped


def test_passing_over_jumps_the_sample_counter(tiny_config: Any) -> None:
    run = start(tiny_config())
    run.guards.skipped_samples = [(4, 12)]
    steps(run, 1)
    assert run.samples == 4
    steps(run, 1)
    assert run.samples == 16


def test_every_parametrisation_trains(tiny_config: Any) -> None:
    """The loss on the same batches falls."""
    skewed = {"timestep_sampling": "logit_normal", "logit_mean": 0.8, "uniform_share": 0.25, "timestep_shift": 1.5}
    objectives: list[dict[str, Any]] = [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"path": "linear", "prediction_type": "flow_prediction"},
        {"path": "linear", "prediction_type": "sample", "loss_type": "v", "loss_weight_max": 6.25, **skewed},
        {"path": "vp_zero_snr", "prediction_type": "v_prediction", "snr_gamma": 5.0},
    ]
    before = []
    for objective in objectives:
        run = start(tiny_config(**objective))
        fixed = list(prefetch(run.batches, range(50, 60), 0, run.device))
        before.append(sum(batch_loss(run, batch).item() for batch in fixed))
        steps(run, 30)
        assert sum(batch_loss(run, batch).item() for batch in fixed) < before[-1]
    assert len(set(before)) == len(objectives)


def test_the_joint_text_encoder_gets_gradients(tiny_config: Any) -> None:
    run = start(tiny_config(train_text_encoder=True))
    batch = next(prefetch(run.batches, range(1), 0, run.device))
    batch_loss(run, batch).backward()
    embedding = run.master_model["text_encoder"].get_input_embeddings().weight
    assert embedding.grad is not None and embedding.grad.abs().max() > 0
