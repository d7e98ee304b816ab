"""`uvit ema`: a pipeline with EMA weights of a length that is chosen after training."""

import shlex
from pathlib import Path

from safetensors import SafetensorError

from uvit.checkpoint.averages import reconstruct
from uvit.checkpoint.folder import checkpoint_folders
from uvit.config.ema import EmaConfig
from uvit.errors import UserError
from uvit.export.convert import check_fit, load_network, open_checkpoint, write_folder, write_pipeline
from uvit.weights.components import Components
from uvit.weights.encoders import fingerprint


def make_average(config: EmaConfig) -> None:
    """Run the command."""
    run = Path(config.run)
    dest = Path(config.output_dir or run / f"pipeline-ema-{config.length:g}")
    if dest.exists():
        raise UserError(f"{dest}: already exists; choose another folder with --output_dir, or delete it")
    components = open_average(run, config.length, config.step)
    check_fit(components, run)
    step = components.facts["step"]
    components.report.read.clear()
    try:
        write_folder(dest, False, lambda folder: write_pipeline(components, folder))
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{dest}: cannot be written ({reason}); fix that, or choose another folder") from None
    print(
        f"wrote {dest}: EMA weights of length {config.length:g} after {step:,} steps; try: uvit sample --pipeline "
        f'{shlex.quote(str(dest))} "..."'
    )


def open_average(run: Path, length: float, step: int | None = None) -> Components:
    """The components of a run's last checkpoint, with EMA weights of a length. Raises UserError without snapshots."""
    tensors, step = reconstruct(run, length, step)
    components = open_checkpoint(checkpoint_folders(run)[-1])
    load_network(components.unet, tensors, "unet.")
    if any(name.startswith("text_encoder.") for name in tensors):
        load_network(components.text_encoder, tensors, "text_encoder.")
        components.facts["text_encoder_sha256"] = fingerprint(components.text_encoder)
    if step != components.facts["step"]:
        del components.facts["samples"]  # nothing records those of another step
    components.facts |= {"ema_length": length, "step": step}
    components.raw_unet = None
    return components
