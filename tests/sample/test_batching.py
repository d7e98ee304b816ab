"""Images that share calls of the network are, to the bit, those that do not."""

import pytest
import torch
from torch import nn

from tests.sample.parts import tiny_pipeline_folder
from uvit.sample.batching import BatchPlan, SharedNetwork
from uvit.sample.denoise import NetworkInput
from uvit.sample.pipeline import UViTPipeline


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return UViTPipeline.from_pretrained(tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline"))).unet


def asked(seed: int, rows: int, size: int = 8) -> NetworkInput:
    generator = torch.Generator().manual_seed(seed)
    latents, context = torch.randn(rows, 4, size, size, generator=generator), torch.randn(1, 16, 32)
    return NetworkInput(latents, torch.full((rows,), 10.0 + 97 * seed), context.expand(rows, 16, 32))


def test_each_image_has_the_bits_of_a_call_of_its_own(unet: nn.Module) -> None:
    inputs = [asked(seed, rows=1 + seed % 2, size=8 if seed % 3 else 4) for seed in range(10)]
    with torch.no_grad():
        alone = [unet(*each) for each in inputs]
    network = SharedNetwork(unet, 4)
    together = network(inputs)
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    with torch.no_grad():  # the network itself is as it was
        assert all(torch.equal(unet(*each), before) for each, before in zip(inputs, alone, strict=True))


def test_calls_are_shared(unet: nn.Module) -> None:
    network, calls = SharedNetwork(unet, 4), []
    network([asked(0, 2), asked(1, 2)])  # measures
    hook = unet.register_forward_hook(lambda module, arguments, output: calls.append(len(output)))
    network([asked(seed, 2) for seed in range(7)])
    hook.remove()
    (plan,) = network.plans.values()
    assert calls == [2 * size for size in plan.parts(7)]
    assert len(calls) < 7, "no size of a batch keeps the images exact on this machine"


def test_plans() -> None:
    assert BatchPlan((8, 4, 2, 1)).parts(15) == [8, 4, 2, 1]
    assert BatchPlan((4, 1)).parts(7) == [4, 1, 1, 1]
    assert BatchPlan((8,), is_padded=True).parts(9) == [8, 8]


class BatchDependent(nn.Module):
    """Every layer of it gives other bits in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.layer(latents) + len(latents) / 1000


def test_without_an_exact_size_images_are_computed_one_at_a_time() -> None:
    network = SharedNetwork(BatchDependent(), 4)
    inputs = [NetworkInput(torch.full((1, 4), float(i)), torch.ones(1), torch.ones(1, 1)) for i in range(3)]
    alone = [network.unet(*each) for each in inputs]
    assert all(torch.equal(*pair) for pair in zip(alone, network(inputs), strict=True))
    assert [plan.sizes for plan in network.plans.values()] == [(1,)]
