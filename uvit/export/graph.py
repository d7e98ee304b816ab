"""Write the U-ViT as a graph that runs without this package: torch.export or ONNX. Each is compared with the model."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uvit.errors import UserError
from uvit.weights.report import Report

INPUT_NAMES = ("latents", "timestep", "context")
TOLERANCE = 1e-4  # of the largest output; float32 sums differ in their order
SEED = 0


def example_inputs(unet: Any, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, C, H, W), timesteps (B,) and context (B, T, D), to trace and to compare with."""
    config, generator = unet.config, torch.Generator().manual_seed(SEED)
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    latents = torch.randn(batch, config["in_channels"], height, width, generator=generator)
    context = torch.randn(batch, config["num_text_tokens"], config["clip_dim"], generator=generator)
    return latents, torch.linspace(1, 1000, batch), context


def trace_graph(unet: nn.Module) -> torch.export.ExportedProgram:
    """The graph for any batch size, at the resolution of training."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = tuple({0: batch} for _ in INPUT_NAMES)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(unet.eval(), example_inputs(unet, 2), dynamic_shapes=shapes)


def write_export(unet: Any, folder: Path, report: Report) -> None:
    """Write unet.pt2: `torch.export.load(path).module()(latents, timestep, context)`."""
    path = folder / "unet.pt2"
    graph = io.BytesIO()  # torch.export.save to a full disk would end the process
    torch.export.save(trace_graph(unet), graph)
    path.write_bytes(graph.getbuffer())
    loaded = torch.export.load(path).module()
    report.converted.append(f"{path.name}: {compare(unet, loaded)}")


def write_onnx(unet: Any, folder: Path, report: Report) -> None:
    """Write unet.onnx, and compare it if onnxruntime is installed. Raises UserError where onnx is not installed."""
    path = folder / "unet.onnx"
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                trace_graph(unet), input_names=INPUT_NAMES, output_names=("prediction",), verbose=False
            )
    except ImportError as error:
        raise UserError(f"--to onnx: {error.name or error} is not installed; pip install 'uvit[onnx]'") from None
    assert program is not None
    program.save(path)
    try:
        import onnxruntime
    except ImportError:
        report.dropped.append(f"{path.name}: the comparison with the model, as onnxruntime is not installed")
        return
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        feeds = {name: value.numpy() for name, value in zip(INPUT_NAMES, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    report.converted.append(f"{path.name}: {compare(unet, run)}")


def compare(unet: Any, graph: Callable[..., Tensor]) -> str:
    """The difference between graph and model, for batches of 1 and 3. Raises UserError where it is too large."""
    errors = []
    for batch in (1, 3):
        inputs = example_inputs(unet, batch)
        with torch.no_grad():
            wanted, found = unet(*inputs), graph(*inputs)
        errors.append(((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item())
    if not max(errors) <= TOLERANCE:
        raise UserError(
            f"the graph differs from the model by {max(errors):.1e} of its largest output, more than {TOLERANCE:.0e}"
        )
    return f"differs from the model by {max(errors):.1e} of its largest output"
