"""What is planned beside what one process of a world does: the others are not there, and what they would send is noise.

So torch's own fake process group lets a test of one process see layouts of any number of processes.
"""

import contextlib
import gc
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uvit.bench.random_store import write_random_store
from uvit.config.model import resolve_model_config
from uvit.config.train import TrainConfig
from uvit.distributed.mesh import AXES, Degrees, World
from uvit.distributed.ops import local_tensor
from uvit.distributed.parallelize import parallelize
from uvit.errors import UserError
from uvit.train.dry_run import (
    ALLOCATOR_OVERHEAD,
    DRIVER_BYTES,
    build_meta_run,
    count_projector_flops,
    count_text_flops,
    describe_plan,
    does_not_fit,
    dtypes,
    fitting_config,
    gather_units,
    make_plan,
    num_local_elements,
    plan_of_run,
    projector_of,
)
from uvit.train.memory import layer_norms_in_float32
from uvit.train.profiling import meta_unet
from uvit.train.setup import build_run
from uvit.train.step import train_step
from uvit.train.trainer import load_batches

MODEL = {
    "sample_size": 16,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "clip_dim": 32,
    "num_text_tokens": 16,
}
SIZE = (16, 16)
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "recompute": {"recompute": True, "use_ema": False},
    "autocast": {"bf16": True},
    "copy": {"bf16": True, "fp16_opt_level": "O2"},
    "muon": {"optim": "muon", "use_ema": False},
    "aligned": {"align": "sra"},
}
CASES = [  # each kind of flags with each axis that it has to do with
    ("1x1x1", "plain"),
    ("1x1x1", "autocast"),
    ("2x1x1", "copy"),
    ("2x1x1", "accumulation"),
    ("1x2x1", "recompute"),
    ("1x2x1", "accumulation"),
    ("1x1x2", "autocast"),
    ("1x1x2", "recompute"),
    ("1x1x1", "aligned"),
    ("1x2x1", "aligned"),
    ("4x8x2", "accumulation"),
    ("1x1x1", "muon"),
    ("2x1x1", "muon"),
    ("2x2x2", "muon"),
]


@contextlib.contextmanager
def first_of(degrees: Degrees) -> Iterator[World]:
    """The first process of a world whose others are not there."""
    sizes, device = (degrees.dp, degrees.shard, degrees.tp), torch.device("cpu")
    if degrees.product == 1:
        yield World(0, 1, degrees, device, None)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=degrees.product)
    try:
        yield World(0, degrees.product, degrees, device, init_device_mesh("cpu", sizes, mesh_dim_names=AXES))
    finally:
        dist.destroy_process_group()


def degrees_of(layout: str) -> Degrees:
    return Degrees(*map(int, layout.split("x")))


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """A function: layout, flags -> the config of a run on random features."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "model.json").write_text(json.dumps(MODEL))
    store = write_random_store(folder / "store", meta_unet(MODEL), num_pairs=640)

    def config(layout: str, **more: Any) -> TrainConfig:
        degrees = degrees_of(layout)
        return TrainConfig(
            feature_path=str(store),
            output_dir=str(folder / "run"),
            uvit_config_file=str(folder / "model.json"),
            per_device_train_batch_size=2,
            dataloader_num_workers=0,
            eval_steps=-1,
            latent_scale=1.0,
            device="cpu",
            dp_degree=degrees.dp,
            sharding_parallel_degree=degrees.shard,
            tensor_parallel_degree=degrees.tp,
            **more,
        )

    return config


class Sent(TorchDispatchMode):
    """Counts the bytes that rings would send for the collectives that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in TIMES_SENT:
            leaves = tree_leaves((args, kwargs, result))
            whole = max(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
            size = next(size for size in map(size_of_group, leaves) if size)
            self.bytes += TIMES_SENT[name] * (size - 1) / size * whole
        else:
            assert func.namespace not in ("c10d", "_c10d_functional") or "wait" in name or "wrap" in name, func
        return result


TIMES_SENT = {
    "allreduce_": 2,
    "all_reduce": 2,
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "all_gather_into_tensor": 1,
}


def size_of_group(argument: Any) -> int:
    """0 for what is no group."""
    if isinstance(argument, str) and argument.isdecimal():
        return _resolve_process_group(argument).size()
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):  # type: ignore[attr-defined]
        return dist.ProcessGroup.unbox(argument).size()
    return 0


def train_three_steps(config: TrainConfig, world: World) -> tuple[int, float]:
    """-> (bytes that torch's allocator gives out at most, from before anything is there; bytes sent in a step)."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run = build_run(config, Path(config.output_dir), world)
        if dtypes(config)[1] != torch.float32:
            layer_norms_in_float32(run.precision.compute_model)
        batches = load_batches(run)
        for _ in range(2):
            train_step(run, batches)
        with Sent() as sent:
            train_step(run, batches)
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max()), sent.bytes


@pytest.mark.parametrize("layout", ["1x1x1", "2x2x1", "1x5x1", "1x1x2", "4x8x2", "1x128x4"])
def test_the_parameters_that_a_process_holds_are_those_that_it_is_given(layout: str) -> None:
    degrees, config = degrees_of(layout), resolve_model_config("uvit_t2i_small")
    with first_of(degrees) as world:
        unet = meta_unet(config)
        parallelize(unet, world)
        held = sum(local_tensor(parameter).numel() for parameter in unet.parameters())
    assert (
        sum(num_local_elements(unit, degrees.shard) for unit in gather_units(meta_unet(config, degrees.tp), None))
        == held
    )


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_a_process_takes_the_memory_and_sends_what_is_planned(
    flags: Callable[..., TrainConfig], layout: str, kind: str
) -> None:
    config = flags(layout, **FLAGS[kind])
    plan = make_plan(config, MODEL, SIZE, projector=projector_of(build_meta_run(config)))
    with first_of(degrees_of(layout)) as world:
        taken, sent = train_three_steps(config, world)
    # Besides: the batch and other small things; and not all of the gathered blocks are there at the fullest moment. All
    # gradients of this model fit into one bucket, which is sent at the end of the backward.
    tolerance = 0.1 if config.sharding_parallel_degree > 1 else 0.04 if config.dp_degree > 1 else 0.02
    assert sum(plan.memory.values()) == pytest.approx(taken, rel=tolerance)
    numbers = 100  # the loss and the gradient's norm go round as well
    assert sum(plan.sent.values()) == pytest.approx(sent, rel=1e-3, abs=numbers)


# What is printed


def test_the_description_names_what_people_ask(tiny_config: Any) -> None:
    text = describe_plan(tiny_config(train_text_encoder=True, fp16=True, fp16_opt_level="O2"))
    for word in ("parameters", "text encoder", "GFLOP", "MiB", "low-precision copy", "162.0 steps per epoch"):
        assert word in text
    assert "processes" not in text and "traffic" not in text


def test_a_thousand_processes_are_described_by_one(tiny_config: Any) -> None:
    text = describe_plan(tiny_config(dp_degree=64, sharding_parallel_degree=8, tensor_parallel_degree=2))
    assert "--tensor_parallel_degree 2 = 1024" in text
    assert "4 x 1 x 512 data ranks = 2,048 samples" in text and "0.3 steps per epoch" in text
    for word in ("per process", "gradients between replicas", "weights between shards", "activations within blocks"):
        assert word in text


@pytest.mark.parametrize(
    "flags",
    [
        {"feature_path": "nowhere"},
        {"pretrained_model_name_or_path": "nowhere.pth"},
        {"pretrained_model_name_or_path": "."},
        {"train_text_encoder": True, "text_encoder_name_or_path": "nowhere/at/all"},
        {"validation_split": "banana"},
        {"model_max_length": 15},
        {"device": "banana"},
    ],
)
def test_a_mistake_gets_the_message_of_a_run(flags: dict[str, Any], tiny_config: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as planned:
        describe_plan(tiny_config(**flags))
    with pytest.raises(UserError) as run:
        build_run(tiny_config(**flags), tmp_path)
    assert str(planned.value) == str(run.value)


def test_degrees_that_do_not_divide_the_model_are_refused(tiny_config: Any) -> None:
    with pytest.raises(UserError, match="--tensor_parallel_degree 3: does not divide the network's 2 heads"):
        describe_plan(tiny_config(tensor_parallel_degree=3))


def test_no_weights_are_made(tiny_config: Any, token_store: str) -> None:
    for flags in ({"train_text_encoder": True, "bf16": True, "fp16_opt_level": "O2"}, {"feature_path": token_store}):
        run = build_meta_run(tiny_config(**flags))
        networks = [run.master_model, run.precision.compute_model, run.ema_model, run.frozen_text_encoder]
        assert all(parameter.is_meta for network in networks if network for parameter in network.parameters())


def test_recompute_costs_a_third_more_work(tiny_config: Any) -> None:
    plain, recomputed = (describe_plan(tiny_config(recompute=flag)) for flag in (False, True))
    work = [float(text.split(" FLOP")[0].rsplit(maxsplit=1)[1]) for text in (plain, recomputed)]
    assert 1.3 < work[1] / work[0] < 1.36


def test_text_encoders_are_counted(tiny_config: Any, token_store: str, tmp_path: Any) -> None:
    config = tiny_config(feature_path=token_store)
    frozen = build_run(config, tmp_path).frozen_text_encoder
    assert "of the frozen text encoder" in describe_plan(config)
    assert "frozen" not in describe_plan(tiny_config())
    assert frozen is not None
    num_bytes = sum(parameter.nbytes for parameter in frozen.parameters())
    assert plan_of_run(build_meta_run(config)).memory["frozen text encoder"] == num_bytes
    layers, tokens, width, inner = 2, 16, 32, 64
    linear = tokens * (4 * width * width + 2 * width * inner)
    attention = 2 * tokens * tokens * width
    assert count_text_flops(frozen.to("meta"), tokens) == 2 * layers * (linear + attention)

    trained = build_run(tiny_config(train_text_encoder=True), tmp_path)
    weights = sum(parameter.nbytes for parameter in trained.master_model.parameters())
    assert plan_of_run(build_meta_run(trained.config)).memory["weights"] == weights


def test_a_projector_is_counted(tiny_config: Any, tmp_path: Path) -> None:
    """Its two layers of 16 x 16 weights and 16 biases, on each of four patches."""
    plain, aligned = (describe_plan(tiny_config(align=align)) for align in ("none", "sra"))
    assert "and 544 of the projector of --align sra" in aligned and "projector" not in plain
    run = build_run(tiny_config(align="sra"), tmp_path)
    weights = sum(parameter.nbytes for parameter in run.master_model.parameters())
    assert plan_of_run(build_meta_run(run.config)).memory["weights"] == weights
    assert count_projector_flops(run.master_model["projector"].to("meta"), run.master_model["unet"], (4, 4)) == 4096


def test_the_validation_is_described(tiny_config: Any) -> None:
    config = tiny_config(validation_split="heldout", eval_steps=100, num_validation_samples=50)
    assert "validation   50 of 72 samples, every 100 steps" in describe_plan(config)
    assert "validation" not in describe_plan(tiny_config())


def test_out_of_memory_names_flags_that_fit(tiny_config: Any) -> None:
    """The batch of a step stays what it was, and the plan of what is named is within the memory."""
    config = tiny_config(per_device_train_batch_size=12, gradient_accumulation_steps=2)

    def planned(config: TrainConfig) -> int:
        return sum(plan_of_run(build_meta_run(config)).memory.values())

    def gpu(usable: int) -> int:
        return DRIVER_BYTES + math.ceil(usable * ALLOCATOR_OVERHEAD)

    half, third = (
        replace(config, per_device_train_batch_size=12 // n, gradient_accumulation_steps=2 * n) for n in (2, 3)
    )
    assert planned(third) < planned(half) < planned(config)
    assert fitting_config(config, gpu(planned(half))) == half
    assert fitting_config(config, gpu(planned(half) - 1)) == third
    smallest = replace(config, per_device_train_batch_size=1, gradient_accumulation_steps=24)
    recomputed = fitting_config(config, gpu(planned(smallest) - 1))
    assert recomputed is not None and recomputed.recompute and planned(recomputed) < planned(smallest)
    assert str(does_not_fit(config, "24 GiB of cuda:0", gpu(planned(third)))) == (
        "--per_device_train_batch_size 12: needs more than the 24 GiB of cuda:0; run the same command with "
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 6, which the plan puts at "
        f"{planned(third) / 2**20:,.0f} MiB"
    )
    assert "and so does a batch of 1 with --recompute" in str(does_not_fit(config, "1 GiB of cuda:0", 2**30))
