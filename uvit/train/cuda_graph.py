"""`--cuda_graphs`: forward and backward of a batch, recorded once as a CUDA graph, and replayed in one launch.

With small batches a GPU computes its kernels faster than the host launches them: some 900 for a forward and backward
pass of the small U-ViT. A graph has one shape of batch and reads it from memory of its own.
"""

from dataclasses import fields

import torch
from torch import Tensor

from uvit.errors import UserError
from uvit.train.loader import Batch
from uvit.train.setup import Run
from uvit.train.step import forward_backward

PASSES_BEFORE = 3  # passes before the recording: kernels are compiled and chosen, tables made


class GraphedPass:
    """Does what `forward_backward` does. The first call records it; each replay writes the gradients anew."""

    def __init__(self, run: Run):
        if run.device.type != "cuda":
            raise UserError(f"--cuda_graphs: needs a GPU, and --device is {run.device} here; leave it out")
        self.run = run
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> Tensor:
        if self.graph is None:
            self._record(batch)
        assert self.graph is not None
        for field in fields(batch):
            if (own := getattr(self.batch, field.name)) is not None:
                own.copy_(getattr(batch, field.name), non_blocking=True)
        self.graph.replay()
        for parameter, grad in self.grads:  # the optimizer has let go of them
            parameter.grad = grad
        return self.losses

    def _record(self, batch: Batch) -> None:
        run = self.run
        self.batch = batch.map(Tensor.clone)
        parameters = list(run.master_model.parameters())
        current, side = torch.cuda.current_stream(run.device), torch.cuda.Stream(run.device)
        side.wait_stream(current)
        try:
            with run.clock.stopped():  # its events cannot be read from a graph
                with torch.cuda.stream(side):
                    for _ in range(PASSES_BEFORE):
                        forward_backward(run, self.batch)
                        run.optimizer.zero_grad()
                current.wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.losses = forward_backward(run, self.batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--cuda_graphs: a step of this run cannot be recorded ({reason}); leave it out") from None
        self.grads = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        self.graph = graph
