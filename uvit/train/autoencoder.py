"""`uvit autoencoder`: train a VAE on your own images, if you have none and do not want to download one."""

import contextlib
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader

import uvit
from uvit.checkpoint.folder import (
    Checkpoint,
    check_command,
    checkpoint_folders,
    clean_up,
    is_complete,
    keep_latest,
    latest_checkpoint,
)
from uvit.checkpoint.saver import Saver
from uvit.config.extract import AutoencoderConfig
from uvit.config.paths import expand_recorded
from uvit.config.train import TrainConfig
from uvit.device import slow_precision
from uvit.distributed.mesh import World, single_process_world
from uvit.errors import UserError, differences
from uvit.images import to_unit
from uvit.io import move_contents, read_json, read_yaml, write_json, write_yaml
from uvit.lock import WriterLock
from uvit.progress import Progress, duration, is_terminal, write
from uvit.sources.open import open_given, require_random_access
from uvit.sources.types import RandomAccessSource
from uvit.train.ema import EMA
from uvit.train.guards import Guards
from uvit.train.optimizer import set_learning_rate, training_state
from uvit.train.process import (
    StopSignal,
    hang_watchdog,
    report_stop,
    reset_hang_timer,
    stop_signals,
)
from uvit.train.run_folder import is_requeued, lock_output_dir
from uvit.train.schedule import rate_warnings, slow_ema, small_data, too_late
from uvit.train.vae_model import (
    VaeBatches,
    build_vae,
    ignore_signals,
    load_images,
    load_some_images,
    measure_vae,
    psnr_of,
    save_reconstructions,
    split_rows,
    vae_loss,
)

COMMAND = "uvit autoencoder"
NUM_WARMUP_STEPS = 100
REPORT_STEPS = 50
NUM_CHECKPOINTS = 2  # kept during training; afterwards one is kept
VAE_ASIDE = ".vae.writing"  # the folder that the finished VAE is written to first
MAX_MEASURED = 2048  # images for the latent scale
# Flags that a resumed run cannot change: another model, other images, or another choice of the held-out ones.
FIXED_FLAGS = {
    "source", "split", "val_every", "image_folder", "image_column", "caption_column", "seed", "resolution",
    "factor", "channels", "layers_per_block", "latent_channels",
}  # fmt: skip


# Training


@dataclass
class VaeRun:
    """The training of a VAE, at `step` optimizer steps."""

    config: AutoencoderConfig
    output_dir: Path
    source: RandomAccessSource
    num_images: int
    rows: np.ndarray  # images to train on
    held_out: Tensor  # held-out images for the PSNR, (B, 3, R, R) uint8
    vae: AutoencoderKL
    optimizer: torch.optim.AdamW
    ema: EMA
    guards: Guards
    step: int = 0
    checkpoint: Path | None = None  # the last one that it saved or resumed from
    lock: WriterLock | None = None  # of the run's folder

    def state(self) -> dict[str, dict[str, Tensor]]:
        return training_state(self.vae, self.optimizer, self.ema)

    def record(self) -> dict[str, Any]:
        """The contents of a checkpoint's uvit.json."""
        return {
            "command": COMMAND,
            "num_images": self.num_images,
            "guards": self.guards.state_dict(),
            "config": asdict(self.config),
            "versions": {"uvit": uvit.__version__, "torch": torch.__version__},
            "num_threads": torch.get_num_threads(),
        }


@dataclass(frozen=True)
class VaeStepResult:
    psnr: float  # of the batch, in dB
    grad_norm: float
    lr: float


def train_autoencoder(config: AutoencoderConfig) -> int:
    """Train to the last step, or until Ctrl-C or SIGTERM; then measure, and write the VAE. Returns the exit status."""
    output_dir = Path(config.output_dir)
    overwrite = config.overwrite_output_dir and not is_requeued(output_dir)
    has_checkpoint = any(map(is_complete, checkpoint_folders(output_dir)))
    if (output_dir / "config.json").exists() and not has_checkpoint and not overwrite:
        check_finished(config, output_dir)
        return 0
    world = single_process_world(config.device)
    with contextlib.ExitStack() as held, hang_watchdog(TrainConfig.hang_timeout, world):
        run = build_vae_run(config, output_dir, world.device)
        run.lock = lock_output_dir(output_dir, overwrite, held)
        if found := latest_checkpoint(output_dir):
            resume_vae(run, found)
        write_yaml(replace(config, overwrite_output_dir=False), output_dir / "config.yaml")
        if run.step >= config.max_steps:
            print(f"{output_dir}: all {config.max_steps} steps are done")
        else:
            for sentence in vae_warnings(run):
                print(f"warning: {sentence}")
            with stop_signals() as stop, Saver(output_dir, NUM_CHECKPOINTS) as saver:
                train_vae(run, world, stop, saver)
            if run.step < config.max_steps:
                return report_stop(stop, run.step, config.max_steps, config.overwrite_output_dir)
        write_result(run)
    return 0


def check_finished(config: AutoencoderConfig, output_dir: Path) -> None:
    """Check that this same command wrote the VAE of a folder without checkpoints. Raises UserError if not."""
    recorded, ours = read_yaml(output_dir / "config.yaml"), json.loads(json.dumps(asdict(config)))
    changed = differences(expand_recorded(AutoencoderConfig, recorded), ours) if isinstance(recorded, dict) else None
    if changed != {} or (written_steps(output_dir) or 0) < config.max_steps:
        raise UserError(
            f"--output_dir {output_dir}: already contains a VAE; choose another folder or pass --overwrite_output_dir",
            [f"--{line}" for line in (changed or {}).values()],
        )
    print(f"{output_dir}: all {config.max_steps} steps are done")


def build_vae_run(config: AutoencoderConfig, output_dir: Path, device: torch.device) -> VaeRun:
    """A run at step 0."""
    source = require_random_access(open_given(config, config.resolution), f"--source {' '.join(config.source)}")
    held_out, rows = split_rows(len(source), config.seed)
    while len(rows) > 1 and not len(load_images(source, held_out, config.resolution)):  # none of them is usable
        held_out, rows = rows[:1], rows[1:]
    torch.manual_seed(config.seed)
    vae = build_vae(config).to(device)
    group = {"params": list(vae.parameters()), "lr": config.learning_rate, "peak_lr": config.learning_rate}
    run = VaeRun(
        config=config,
        output_dir=output_dir,
        source=source,
        num_images=len(source),
        rows=rows,
        held_out=load_some_images(source, held_out, config.resolution),
        vae=vae,
        optimizer=torch.optim.AdamW([group], weight_decay=0.0, fused=True),
        ema=EMA(vae, config.ema_decay),
        guards=Guards(TrainConfig.spike_factor, vae.device),
    )
    side = config.resolution // config.factor
    latents = f"{config.latent_channels}x{side}x{side} latents"
    print(f"VAE: {vae.num_parameters():,} parameters, {len(rows):,} images, {latents}")
    return run


def resume_vae(run: VaeRun, found: Checkpoint) -> None:
    """Restore the checkpoint. Raises UserError if it is of another model or of other images."""
    check_command(found, COMMAND)
    changed = found.changed_flags(run.config)
    refused = [changed.pop(flag) for flag in list(changed) if flag in FIXED_FLAGS]
    images = {"images of the source": found.record["num_images"]}, {"images of the source": run.num_images}
    refused += differences(*images).values()
    if refused:
        raise UserError(
            f"{found.folder}: was trained with another model or on other images; pass the same again to resume, choose "
            "another --output_dir, or pass --overwrite_output_dir to start from scratch",
            refused,
        )
    for sentence in changed.values():
        print(sentence)
    for group, tensors in run.state().items():
        found.load_into(group, tensors)
    run.guards.load_state_dict(found.record["guards"])
    run.step, run.checkpoint = found.step, found.folder
    print(f"resumed {found.folder}: step {run.step} of {run.config.max_steps}")


def train_vae(run: VaeRun, world: World, stop: StopSignal, saver: Saver) -> None:
    """Train to the last step or until a signal, and save."""
    config = run.config
    batches = DataLoader(
        VaeBatches(run.source, run.rows, config),
        batch_size=None,
        sampler=range(run.step, config.max_steps),
        num_workers=config.num_workers,
        worker_init_fn=ignore_signals,
    )
    started, first_step = time.perf_counter(), run.step
    bar = Progress(
        "autoencoder", config.max_steps, "step", done=run.step, bar=not config.disable_tqdm, lines=False
    )  # without a bar, the lines below are printed
    with bar:
        for pixels, noise in batches:
            reset_hang_timer(TrainConfig.hang_timeout, world)
            if run.lock:
                run.lock.check()
            result = vae_step(run, pixels, noise)
            bar.update()
            if run.guards.skipped_in_a_row >= TrainConfig.max_nonfinite_steps:
                raise UserError(too_many_nonfinite(run))
            if result and (run.step % REPORT_STEPS == 0 or run.step == config.max_steps):
                line = f"PSNR {result.psnr:.1f} dB, |grad| {result.grad_norm:.3g}, lr {result.lr:.2e}"
                bar.note(line)
                if bar.bar is None or not is_terminal(sys.stdout):
                    seconds = (time.perf_counter() - started) / (run.step - first_step)
                    left = duration(seconds * (config.max_steps - run.step))
                    rate = config.batch_size / seconds
                    write(f"step {run.step}/{config.max_steps}: {line}, {rate:.1f} images/s, {left} left")
            if config.preview_steps > 0 and run.step % config.preview_steps == 0:
                path = run.output_dir / "previews" / f"step-{run.step:06d}.png"
                save_reconstructions(run.ema.model, run.held_out, path)
            # Not after a skipped step: the weights before it may be bad already.
            due = run.step % config.save_steps == 0 and not run.guards.skipped_in_a_row
            if due or run.step == config.max_steps or stop.signal:
                saver.save(run.step, run.state(), run.record())
                run.checkpoint = run.output_dir / f"checkpoint-{run.step}"
            if folder := saver.saved():
                write(f"saved {folder}")
            if stop.signal:
                break
        saver.wait()
        if folder := saver.saved():
            write(f"saved {folder}")


def vae_warnings(run: VaeRun) -> list[str]:
    """What the run cannot do. One sentence each."""
    config, num_steps = run.config, run.config.max_steps
    consequences = {
        "save_steps": "no checkpoint before the end, to resume from",
        "preview_steps": "reconstructions only at the end",
    }
    return [
        *too_late(num_steps, {flag: (getattr(config, flag), what) for flag, what in consequences.items()}),
        *rate_warnings(
            lambda step: lr_factor(step, num_steps),
            run.step,
            num_steps,
            NUM_WARMUP_STEPS,
            config.learning_rate,
            lower="--max_steps",
        ),
        *small_data(len(run.rows), config.batch_size),
        *slow_ema(config.ema_decay, num_steps),
        *slow_precision("--bf16", run.vae.device, torch.bfloat16 if config.bf16 else torch.float32),
    ]


def lr_factor(step: int, max_steps: int) -> float:
    return min((step + 1) / NUM_WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / max_steps)))


def vae_step(run: VaeRun, pixels: Tensor, noise: Tensor) -> VaeStepResult | None:
    """One optimizer step; it is skipped if the loss or gradient is not finite, or the gradient is a spike.

    None: all images of the batch are broken.
    """
    config, vae, guards, device = run.config, run.vae, run.guards, run.vae.device
    lr = set_learning_rate(run.optimizer, lr_factor(run.step, config.max_steps))
    first_image = run.step * config.batch_size
    run.step += 1
    if not len(pixels):
        return None
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        total, error = vae_loss(vae, to_unit(pixels.to(device)), noise.to(device), config.kl_weight)
    run.optimizer.zero_grad()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    all_finite = total.isfinite() & norm.isfinite()
    finite, skipped = torch.stack([all_finite, ~all_finite | guards.is_spike(norm)]).tolist()
    guards.add_norm(norm, all_finite)
    if not skipped:
        run.optimizer.step()
        run.ema.update(vae, run.step)
    guards.record_step(run.step, first_image, skipped)
    return VaeStepResult(psnr_of(error.item()) if finite else math.nan, norm.item(), lr)


def too_many_nonfinite(run: VaeRun) -> str:
    last = f"the last checkpoint is {run.checkpoint}" if run.checkpoint else "there is no checkpoint yet"
    return (
        f"the loss or gradient was too large or not finite for {run.guards.skipped_in_a_row} steps in a row, up to "
        f"step {run.step}; these steps were skipped; {last}. Try a lower --learning_rate than "
        f"{run.config.learning_rate}"
    )


# The result


def write_result(run: VaeRun) -> None:
    """Measure and write the VAE of the last step, unless that was done before the run was killed or run again."""
    config, output_dir = run.config, run.output_dir
    before = written_steps(output_dir)
    if before == run.step:
        print(f"{output_dir}: the VAE was written before")
    else:
        vae: Any = run.ema.model
        others = load_some_images(run.source, run.rows[:MAX_MEASURED], config.resolution)
        measured = measure_vae(vae, run.held_out, others)
        if not math.isfinite(measured["psnr"]) or not math.isfinite(measured["latent_scale"]):
            raise UserError(
                f"--learning_rate {config.learning_rate}: the VAE of step {run.step} gives NaN or Inf, so it is not "
                "written; train again with a lower rate, into another --output_dir"
            )
        save_reconstructions(vae, run.held_out, output_dir / "previews" / "last.png")
        vae.register_to_config(scaling_factor=measured["latent_scale"])
        facts = {
            **measured,
            "steps": run.step,
            "parameters": vae.num_parameters(),
            "source": config.source,
            "seed": config.seed,
        }
        write_vae(vae, facts, output_dir)
        if before is not None:
            print(f"{output_dir}: the VAE of step {run.step} replaces that of step {before}")
        print(
            f"PSNR {measured['psnr']:.2f} dB on {len(run.held_out)} held-out image{'s'[: len(run.held_out) != 1]}, "
            f"latent scale {measured['latent_scale']:.4f}: {output_dir}"
        )
    keep_latest(output_dir, 1, {f"checkpoint-{run.step}"})
    clean_up(output_dir, ("deleting",))  # left by a kill in the line above
    shutil.rmtree(output_dir / VAE_ASIDE, ignore_errors=True)  # left by a kill at the end of `write_vae`
    print(f"{run.checkpoint} is kept, to continue with a higher --max_steps. You can delete it")


def write_vae(vae: AutoencoderKL, facts: dict[str, object], output_dir: Path) -> None:
    """The weights, then the config, then training.json: if it exists, the other files are complete."""
    aside = output_dir / VAE_ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    try:
        vae.save_pretrained(aside)
        write_json(aside / "training.json", facts)
        move_contents(aside, output_dir, last=("config.json", "training.json"))
    except SafetensorError as error:
        raise UserError(
            f"--output_dir {output_dir}: the VAE cannot be written ({error}); fix that, and run the same command again "
            "to resume"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def written_steps(output_dir: Path) -> int | None:
    """How many steps the VAE in the folder was trained for; None: there is none."""
    path = output_dir / "training.json"
    return read_json(path).get("steps") if path.is_file() else None
