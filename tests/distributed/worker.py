"""One process of a spawned world.

It trains a tiny U-ViT in each of the layouts (degrees such as 2x1x1) and cases and checks each layout. The main process
leaves in a folder what training came to, and every process what it found. `train` is also what the tests run in a world
of one, to compare with.
"""

import copy
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.distributed.checks import check
from tests.distributed.whole import full
from uvit.config.train import TrainConfig
from uvit.distributed import mesh, ops
from uvit.distributed.mesh import Degrees, World
from uvit.distributed.parallelize import parallelize
from uvit.model import UViTT2IModel
from uvit.modern_model import ModernUViTT2IModel
from uvit.train.optimizer import build_optimizer

STEPS = 4
GLOBAL_BATCH = 8
LEARNING_RATE = 1e-3
TINY = {
    "sample_size": 8,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "clip_dim": 24,
    "num_text_tokens": 7,
}
# Arguments of `train`.
CASES: dict[str, dict[str, bool | int | float]] = {
    "plain": {},
    "bf16": {"bf16": True},
    "copy": {"low_precision_copy": True, "num_microbatches": 2},
    "muon": {"muon": True},
    "all": {"recompute": True, "num_microbatches": 2, "max_norm": 0.1},
    "modern": {"modern": True, "recompute": True, "num_microbatches": 2, "max_norm": 0.1},
}


def tiny(modern: bool = False) -> UViTT2IModel:
    torch.manual_seed(0)
    if not modern:
        return UViTT2IModel(**TINY).train()
    unet = ModernUViTT2IModel(**TINY).train()
    for parameter in unet.parameters():
        if not parameter.any():  # a new one predicts zero, and most of its gradients are zero
            nn.init.normal_(parameter, std=0.02)
    return unet


def microbatch(step: int, index: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Microbatch `index` of the `count` that step `step` is made of: latents, timesteps, context, target."""
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(GLOBAL_BATCH, 4, 8, 8, generator=generator)
    timesteps = torch.randint(1, 1001, (GLOBAL_BATCH,), generator=generator)
    context = torch.randn(GLOBAL_BATCH, 7, 24, generator=generator)
    target = latents.roll(1, -1) * 0.5 + context.mean() * 0.1
    latents, timesteps, context, target = (part.chunk(count)[index] for part in (latents, timesteps, context, target))
    return latents, timesteps, context, target


def locals_of(network: nn.Module) -> list[Tensor]:
    return [ops.local_tensor(parameter) for parameter in network.parameters()]


def train(
    world: World,
    *,
    recompute: bool = False,
    num_microbatches: int = 1,
    bf16: bool = False,
    low_precision_copy: bool = False,
    max_norm: float = 0.0,
    modern: bool = False,
    muon: bool = False,
) -> dict[str, Tensor]:
    """4 AdamW steps -> in the main process losses, grad norms and the whole weights, average and moments, by name.

    bf16: autocast. low_precision_copy: a bfloat16 copy computes, and its gradients go to the float32 weights. modern:
    the U-ViT with modern blocks.
    """
    unet = tiny(modern)
    average = copy.deepcopy(unet).requires_grad_(False)
    computes = copy.deepcopy(unet).bfloat16() if low_precision_copy else unet
    for network in [unet, average] + [computes] * low_precision_copy:
        parallelize(network, world, recompute=recompute)
    flags = {"optim": "muon" if muon else "adamw", "learning_rate": LEARNING_RATE}
    config = TrainConfig("features", "out", **flags)  # type: ignore[arg-type]
    optimizer = build_optimizer(nn.ModuleDict({"unet": unet}), config, world)
    gradients = ops.GradientAverage(computes, world, bucket_bytes=100_000, master=unet)
    losses, norms = [], []
    for step in range(STEPS):
        loss = torch.zeros(())
        for i in range(num_microbatches):
            gradients.microbatch(last=i == num_microbatches - 1)
            index, count = i * world.num_data_ranks + world.data_rank, num_microbatches * world.num_data_ranks
            latents, timesteps, context, target = microbatch(step, index, count)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                dtype = next(computes.parameters()).dtype
                prediction = computes(latents.to(dtype), timesteps, context.to(dtype))
            share = F.mse_loss(prediction.float(), target) / num_microbatches
            share.backward()
            loss += share.detach()
        gradients.finish()
        norm = ops.GradientNorm(unet.parameters(), world)()
        if max_norm:
            ops.clip_gradients(unet.parameters(), max_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(locals_of(average), locals_of(unet), 0.1)
            if low_precision_copy:
                torch._foreach_copy_(locals_of(computes), locals_of(unet))
        losses.append(ops.mean_over_data(loss, world))
        norms.append(norm)
    names = {parameter: name for name, parameter in unet.named_parameters()}
    moments = {
        f"{key}/{names[p]}": values[key]
        for p, values in optimizer.state.items()
        for key in ("exp_avg_sq", "momentum")
        if key in values
    }
    trained = {
        f"{kind}/{name}": p
        for kind, network in (("unet", unet), ("ema", average))
        for name, p in network.named_parameters()
    }
    differing = torch.tensor(float(len(ops.differing_replicas(trained, world))))  # 0: no replica has drifted
    results = {}
    if world.is_main:
        results = {"losses": torch.stack(losses), "norms": torch.stack(norms), "differing": differing}
    results |= full(dict(unet.named_parameters()), world)
    results |= full({f"ema/{name}": p for name, p in average.named_parameters()}, world)
    return results | full(moments, world)


def run(rank: int, size: int, port: int, folder: Path, layouts: dict[str, list[str]]) -> None:
    """As torchrun would start it."""
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    world = None
    for layout, cases in layouts.items():
        world = mesh.init_distributed(Degrees(*map(int, layout.split("x"))), "cpu")
        for case in cases:
            results = train(world, **CASES[case])  # type: ignore[arg-type]
            if world.is_main:
                save_file(results, folder / f"{layout}-{case}.safetensors")
        found = check(world, tiny(), microbatch(0, 0, 1)[:3])
        (folder / f"{layout}-{rank}.json").write_text(json.dumps(found))
    assert world is not None
    mesh.destroy_distributed(world)
