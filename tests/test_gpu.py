"""On a GPU: everything that computes runs on pretended GPUs (`tests/pretend_gpu.py`) to the bits of the CPU.

The run is on the second of two, because most mistakes with devices are right on the first. The last test plants faults,
and sees that these tests catch them: with each of the mutations, one of the checks must fail.
"""

import collections
import contextlib
import importlib
import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.pretend_gpu import pretend_gpus
from tests.real_images import EXAMPLES
from tests.sample.parts import tiny_pipeline_folder
from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder, tiny_vit_folder
from tests.train.conftest import TINY_MODEL
from uvit.config.evaluate import EvaluateConfig
from uvit.config.extract import ExtractConfig
from uvit.config.train import TrainConfig
from uvit.evaluate.evaluate import evaluate
from uvit.extract.extract import extract
from uvit.sample.denoise import denoise
from uvit.sample.fit import fit_plan, solve
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import build_scheduler, scheduler_names
from uvit.train.checkpointing import Checkpointer
from uvit.train.loader import prefetch
from uvit.train.preview import load_preview_decoder, preview_sheet
from uvit.train.setup import Run, build_run
from uvit.train.step import train_step
from uvit.train.trainer import train
from uvit.train.validate import validate

GPU = "cuda:1"
EDITORS = ("unipc", "heun", "official")  # the schedulers that inpaint here; the others begin from noise
SCHEDULERS = scheduler_names("vp")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vae/, text/, vit/, pipeline/, model.json; store/ with 6 pairs to train and 2 to validate on; tokens/, the same
    without text embeddings.
    """
    folder = tmp_path_factory.mktemp("gpu")
    tiny_vae_folder(folder / "vae")
    tiny_text_encoder_folder(folder / "text")
    tiny_vit_folder(folder / "vit")
    (folder / "model.json").write_text(json.dumps(TINY_MODEL))
    for split in ("train", "val"):
        extract(extraction(folder, folder / "store", "cpu", split))
    shutil.copytree(folder / "store", folder / "tokens")
    for path in folder.glob("tokens/*/manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"context_shape": None}))
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline"))


def extraction(parts: Path, out: Path, device: str, split: str = "train", **flags: Any) -> ExtractConfig:
    return ExtractConfig(
        source=(str(EXAMPLES),),
        split=split,
        val_every=4,
        output_dir=str(out),
        vae_name_or_path=str(parts / "vae"),
        text_encoder_name_or_path=str(parts / "text"),
        text="both",
        resolution=16,
        model_max_length=16,
        num_workers=0,
        disable_tqdm=True,
        device=device,
        **flags,
    )


def training(parts: Path, out: Path, device: str, **flags: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "feature_path": str(parts / "store"),
        "output_dir": str(out),
        "uvit_config_file": str(parts / "model.json"),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "image_logging_steps": -1,
        "num_inference_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "dataloader_num_workers": 0,
        "ema_decay": 0.9,
        "report_to": "none",
        "disable_tqdm": True,
        "device": device,
        "bf16": False,
    }
    return TrainConfig(**(values | flags))


def saved(run: Path) -> dict[str, Tensor]:
    """All tensors of all checkpoints."""
    files = sorted(run.glob("checkpoint-*/*.safetensors"))
    return {f"{file.parent.name}/{file.stem}/{name}": t for file in files for name, t in load_file(file).items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def held(tensor: Tensor) -> Tensor:
    """A tensor's content, without the pretended GPU around it, as if it were copied."""
    tensor = tensor.detach()
    return getattr(tensor, "held", tensor).clone()


def state_of(run: Run) -> dict[str, Tensor]:
    models = {"weights": run.master_model, "ema": run.ema_model}
    return {f"{kind}/{name}": held(t) for kind, model in models.items() for name, t in model.state_dict().items()}


# Training


def test_a_whole_run_is_the_cpu_s_bit_for_bit(parts: Path, tmp_path: Path) -> None:
    """The text encoder is trained; validation, previews, two checkpoints and the exported pipeline."""
    flags = {"train_text_encoder": True, "image_logging_steps": 4, "eval_steps": 4}
    train(training(parts, tmp_path / "cpu", "cpu", **flags))
    with pretend_gpus() as gpus:
        train(training(parts, tmp_path / "gpu", GPU, **flags))
        assert torch.cuda.current_device() == 1
    in_steps = ("train_step", "forward_backward", "judge_step", "step", "update", "training_loop", "load_batches")
    assert not [place for place in gpus.waits if place.rpartition(".")[2] in in_steps]
    wanted = saved(tmp_path / "cpu")
    assert any(name.startswith("checkpoint-2/") for name in wanted)
    assert_equal(saved(tmp_path / "gpu"), wanted)
    for name in ("previews/step-00000004.png", "pipeline/unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "gpu" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()
    logs = [(tmp_path / side / "logs" / "metrics.jsonl").read_text().splitlines() for side in ("cpu", "gpu")]
    for ours, theirs in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert all(ours[key] == theirs[key] for key in ours if "loss" in key or key == "grad_norm")


def steps(parts: Path, out: Path, device: str, **flags: Any) -> dict[str, Tensor]:
    """Two steps and a validation: the weights and their EMA, and the validation losses."""
    run = build_run(training(parts, out, device, **flags), out)
    for module in run.precision.compute_model.modules():
        if hasattr(module, "fused"):  # a CPU has another attention in half precision
            module.fused = True
    batches = prefetch(run.batches, range(2 * run.config.gradient_accumulation_steps), 0, run.device)
    for _ in range(2):
        train_step(run, batches)
    return state_of(run) | {"losses": torch.tensor(validate(run)["val_losses"])}


VARIANTS: dict[str, dict[str, Any]] = {
    "recompute": {"recompute": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "snr_gamma": 5.0},
    "O1": {"bf16": True, "train_text_encoder": True},
    "O2": {"bf16": True, "fp16_opt_level": "O2", "gradient_accumulation_steps": 2},
    "O2 fp16": {"fp16": True, "fp16_opt_level": "O2"},
    "linear": {
        "path": "linear", "prediction_type": "flow_prediction", "timestep_sampling": "logit_normal",
        "uvit_config_file": "modern", "align": "sra", "align_block": 1, "optim": "muon",
    },
}  # fmt: skip


def modern(parts: Path) -> str:
    path = parts / "modern.json"
    path.write_text(json.dumps(TINY_MODEL | {"_class_name": "ModernUViTT2IModel"}))
    return str(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_the_cpu_s_bit_for_bit(variant: str, parts: Path, tmp_path: Path) -> None:
    flags = dict(VARIANTS[variant])
    if "uvit_config_file" in flags:
        flags["uvit_config_file"] = modern(parts)
    wanted = steps(parts, tmp_path, "cpu", **flags)
    with pretend_gpus():
        assert_equal(steps(parts, tmp_path, GPU, **flags), wanted)


def test_a_frozen_text_encoder_encodes_on_the_gpu(parts: Path, tmp_path: Path) -> None:
    flags = {"feature_path": str(parts / "tokens")}
    wanted = steps(parts, tmp_path, "cpu", **flags)
    with pretend_gpus():
        assert_equal(steps(parts, tmp_path, GPU, **flags), wanted)


def waits_of_a_step(parts: Path, out: Path, **flags: Any) -> collections.Counter[str]:
    """How often the host waits for the GPU in a step, after the first."""
    with pretend_gpus() as gpus:
        run = build_run(training(parts, out, GPU, **flags), out)
        batches = prefetch(run.batches, range(4), 0, run.device)
        train_step(run, batches)
        gpus.waits.clear()
        train_step(run, batches)
        return gpus.waits


@pytest.mark.parametrize("flags", [{}, {"fp16": True, "train_text_encoder": True, "max_grad_norm": 1.0}])
def test_the_host_does_not_wait_within_a_step(flags: dict[str, Any], parts: Path, tmp_path: Path) -> None:
    assert waits_of_a_step(parts, tmp_path, **flags) == {}


# Sampling, editing, fitting


def loaded(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> UViTPipeline:
    pipeline = UViTPipeline.from_pretrained(folder).to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(pipeline: UViTPipeline, scheduler: str = "dpmsolver++", **options: Any) -> np.ndarray:
    """Two images (2, 32, 32, 3)."""
    pipeline.scheduler = build_scheduler(scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    fixed = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "np"}
    return pipeline(["two cats", "a red circle"], generator=generators, **(fixed | options)).images


EDITS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without guidance": {"guidance_scale": 1.0},
    "guidance in an interval": {"guidance_interval": (200.0, 800.0)},
    "inpainting": {"image": None, "mask_image": None, "strength": 0.8},
}


def edit(options: dict[str, Any]) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:, :16] = 255
    images = {"image": Image.fromarray(pixels), "mask_image": Image.fromarray(mask)}
    return {name: images.get(name, value) for name, value in options.items()}


def test_images_are_the_cpu_s_bit_for_bit(pipeline_folder: Path) -> None:
    """Of every scheduler, with and without guidance, and edited."""
    cases = [(name, edit(EDITS["inpainting" if name in EDITORS else "as it is"])) for name in SCHEDULERS]
    cases += [("dpmsolver++", edit(options)) for options in EDITS.values()]
    on_cpu = loaded(pipeline_folder, "cpu")
    wanted = [sampled(on_cpu, name, **options) for name, options in cases]
    with pretend_gpus():
        on_gpu = loaded(pipeline_folder, GPU)
        for (name, options), images in zip(cases, wanted, strict=True):
            assert np.array_equal(sampled(on_gpu, name, **options), images), (name, options)


def test_the_host_does_not_wait_within_a_sampling_step(pipeline_folder: Path) -> None:
    """Of the schedulers that are not diffusers' own."""
    with pretend_gpus() as gpus:
        pipeline = loaded(pipeline_folder, GPU)
        for name in ("dpmsolver++", "official"):
            waits = []
            for num_steps in (2, 4):
                gpus.waits.clear()
                sampled(pipeline, name, num_inference_steps=num_steps)
                waits.append(gpus.waits.copy())
            assert waits[0] == waits[1]


def test_a_fitted_schedule_is_the_cpu_s(pipeline_folder: Path) -> None:
    def fitted(device: str) -> Any:
        unet = loaded(pipeline_folder, device).unet
        generator = torch.Generator().manual_seed(0)
        noise, context = (torch.randn(shape, generator=generator).to(device) for shape in ((1, 4, 8, 8), (1, 16, 32)))

        def sample(scheduler: Any, num_steps: int) -> Tensor:
            latents = denoise(unet, scheduler, noise, context, context, 1, num_steps, "epsilon")
            return latents.cpu()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("uvit.sample.fit.NUM_REFERENCE_STEPS", 12)
            return fit_plan(sample, solve(sample), 3, (1.0, 1.0, 1000.0))[0]

    wanted = fitted("cpu")
    with pretend_gpus():
        assert fitted(GPU) == wanted


# Extraction and evaluation


def arrays(store: Path) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in sorted(store.rglob("*.npy"))}


def test_features_are_the_cpu_s_bit_for_bit(parts: Path, tmp_path: Path) -> None:
    with pretend_gpus():
        extract(extraction(parts, tmp_path, GPU))
    wanted = arrays(parts / "store" / "train")
    found = arrays(tmp_path / "train")
    assert found.keys() == wanted.keys() and len(wanted) > 3
    for name, array in wanted.items():
        assert np.array_equal(found[name], array), name


def test_scores_are_the_cpu_s(parts: Path, tmp_path: Path) -> None:
    def score(device: str) -> float:
        out = tmp_path / device.replace(":", "")
        evaluate(
            EvaluateConfig(
                model=str(EXAMPLES),
                reference=str(EXAMPLES),
                metrics=("fd",),
                resolution=32,
                feature_extractor=str(parts / "vit"),
                output_dir=str(out),
                device=device,
                disable_tqdm=True,
            )
        )
        (found,) = json.loads((out / "report.json").read_text())["results"][0]["scores"]
        return found["details"]["for_infinitely_many_images"]

    wanted = score("cpu")
    with pretend_gpus():
        assert score(GPU) == pytest.approx(wanted, rel=1e-6)  # in another order, sums of features have other last bits


# Planted faults: (function, what it says, what a mistake would say, the check that must fail)


def check_step(parts: Path, out: Path, folder: Path) -> None:
    assert waits_of_a_step(parts, out) == {}


def check_validation(parts: Path, out: Path, folder: Path) -> None:
    with pretend_gpus():
        validate(build_run(training(parts, out, GPU), out))


def check_checkpoint(parts: Path, out: Path, folder: Path) -> None:
    with pretend_gpus():
        run = build_run(training(parts, out / "run", GPU), out / "run")
        with Checkpointer(run) as checkpointer:
            checkpointer.save()
        wanted = {name: held(t) for name, t in run.master_model.state_dict().items()}
    assert_equal(load_file(out / "run" / "checkpoint-0" / "weights.safetensors"), wanted)


def check_frozen(parts: Path, out: Path, folder: Path) -> None:
    with pretend_gpus():
        validate(build_run(training(parts, out, GPU, feature_path=str(parts / "tokens")), out))


def check_preview(parts: Path, out: Path, folder: Path) -> None:
    with pretend_gpus():
        run = build_run(training(parts, out, GPU, image_logging_steps=50), out)
        preview_sheet(run, load_preview_decoder(run))  # type: ignore[arg-type]


def check_sampling(parts: Path, out: Path, folder: Path) -> None:
    with pretend_gpus():
        sampled(loaded(folder, GPU), **edit(EDITS["inpainting"]))


def check_extraction(parts: Path, out: Path, folder: Path) -> None:
    with pretend_gpus():
        extract(extraction(parts, out, GPU))


def check_device(parts: Path, out: Path, folder: Path) -> None:
    with pretend_gpus():
        importlib.import_module("uvit.device").pick_device(GPU)
        assert torch.cuda.current_device() == 1


FAULTS: list[tuple[str, str, str, Callable[[Path, Path, Path], None]]] = [
    ("uvit.model:timestep_embedding", "device=timestep.device, ", "", check_step),
    ("uvit.diffusion:alphas_cumprod", ".to(device)", "", check_step),
    (
        "uvit.train.step:forward_backward",
        "parts = [loss.detach()",
        "parts = [loss.detach() * bool(loss > 0)",
        check_step,
    ),
    ("uvit.train.adamw:FusedAdamW.step", "[1.0 - skipped.float()] * len(steps)", "1.0 - skipped.float()", check_step),
    ("uvit.train.loader:PreparedBatch.to", "non_blocking=True", "non_blocking=False", check_step),
    ("uvit.train.loader:prefetch", "batches.prepare(item).pin_memory()", "batches.prepare(item)", check_step),
    ("uvit.train.loader:copy_ahead", "current.wait_event(copied)", "pass", check_step),
    ("uvit.train.loader:copy_ahead", "batch.record_stream(current)", "pass", check_step),
    ("uvit.train.validate:losses", ", device=run.device)", ")", check_validation),
    ("uvit.train.validate:losses", "noise.to(run.device)", "noise", check_validation),
    ("uvit.checkpoint.saver:Saver._copy", "torch.cuda.synchronize(device)", "pass", check_checkpoint),
    ("uvit.train.setup:build_run", "frozen.to(device, ", "frozen.to(", check_frozen),
    ("uvit.train.preview:preview_sheet", "dtype=np.float32)).to(run.device)", "dtype=np.float32))", check_preview),
    ("uvit.sample.edit:read_original", 'batch, "masks").to(device)', 'batch, "masks")', check_sampling),
    ("uvit.extract.encode:Encoders._contexts", "self._to_device(token_ids)", "token_ids", check_extraction),
    ("uvit.extract.encode:Encoders._moments", "(pixels))).cpu()", "(pixels)))", check_extraction),
    ("uvit.device:pick_device", "torch.cuda.set_device(device)", "pass", check_device),
]


@contextlib.contextmanager
def fault(function: str, right: str, wrong: str) -> Iterator[None]:
    """The function with a mistake in it."""
    module_name, _, path = function.partition(":")
    module: Any = importlib.import_module(module_name)
    *owners, name = path.split(".")
    owner = module if not owners else getattr(module, owners[0])
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert right in source, f"{function} has changed: it no longer says {right}"
    namespace: dict[str, Any] = {}
    exec(compile(source.replace(right, wrong, 1), f"<{function}>", "exec"), module.__dict__, namespace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, namespace[name])
        for other in list(sys.modules.values()):  # who has imported it by name
            ours = getattr(other, "__name__", "").startswith(("uvit", "tests.test_gpu")) and other is not module
            if ours and not owners and name in vars(other):
                patch.setattr(other, name, namespace[name])
        yield


def test_the_checks_pass_without_a_fault(parts: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    for check in dict.fromkeys(check for *_, check in FAULTS):
        check(parts, tmp_path / check.__name__, pipeline_folder)


@pytest.mark.parametrize(
    ("function", "right", "wrong", "check"), FAULTS, ids=[f"{function} {right}" for function, right, *_ in FAULTS]
)
def test_a_planted_fault_is_caught(
    function: str,
    right: str,
    wrong: str,
    check: Callable[[Path, Path, Path], None],
    parts: Path,
    pipeline_folder: Path,
    tmp_path: Path,
) -> None:
    with fault(function, right, wrong), pytest.raises((RuntimeError, AssertionError, TypeError)):
        check(parts, tmp_path, pipeline_folder)
