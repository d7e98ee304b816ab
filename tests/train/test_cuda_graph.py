"""A recorded and replayed step computes what the step computes: on a pretended GPU, with a pretended recording."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.pretend_gpu import pretend_gpus
from uvit.errors import UserError
from uvit.train.cuda_graph import GraphedPass
from uvit.train.loader import BatchDataset
from uvit.train.setup import build_run
from uvit.train.step import train_step


def held(tensor: Any) -> Tensor:
    return getattr(tensor, "held", tensor)


class Recording(TorchDispatchMode):
    """The operations, with the very tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Graph:
    calls: list[tuple[Any, Any, Any, Any]]

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and held(old).data_ptr() != held(new).data_ptr():
                    held(old).copy_(held(new))


@contextlib.contextmanager
def recorded(graph: Graph) -> Iterator[None]:
    with Recording() as recording:
        yield
    graph.calls = recording.calls


class Stream:
    def __init__(self, *_: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with pretend_gpus():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", recorded)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        yield


@pytest.mark.parametrize("flags", [{"fp16": True, "max_grad_norm": 0.1}, {"bf16": True, "fp16_opt_level": "O2"}])
def test_replayed_steps_are_steps(flags: dict[str, Any], tiny_config: Any, cuda: None) -> None:
    def weights(graphs: bool) -> list[Tensor]:
        run = build_run(tiny_config(device="cuda:1", cuda_graphs=graphs, **flags), Path("unused"))
        run.replay = GraphedPass(run) if graphs else None
        batches: BatchDataset = run.batches
        results = [train_step(run, iter([batches[i].to(run.device)])) for i in range(4)]
        assert len({result.loss for result in results}) == 4
        tensors = [*run.master_model.parameters(), *run.ema_model.parameters()]
        return [held(tensor.detach()).clone() for tensor in tensors] + [held(result.numbers) for result in results]

    for ours, theirs in zip(weights(True), weights(False), strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_recorded_is_one_sentence(tiny_config: Any, cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(tiny_config(device="cuda:1"), Path("unused"))
    run.replay = GraphedPass(run)
    monkeypatch.setattr("uvit.train.cuda_graph.forward_backward", lambda run, batch: batch.noise.sum().item())
    with pytest.raises(UserError, match=r"--cuda_graphs: a step of this run cannot be recorded .*capturing"):
        train_step(run, iter([run.batches[0].to(run.device)]))


def test_graphs_need_a_gpu(tiny_config: Any) -> None:
    with pytest.raises(UserError, match="--cuda_graphs: needs a GPU, and --device is cpu here"):
        GraphedPass(build_run(tiny_config(), Path("unused")))
