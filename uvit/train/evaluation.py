"""Evaluation while training: images of the EMA weights for fixed prompts, measured as `uvit evaluate` measures them.

Image i is made from prompt i with seed i, so `uvit evaluate` gets the same images from a checkpoint, but for rounding.
The data ranks share the work of sampling; the main process measures. Nothing uses up random numbers of the run.
"""

import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uvit.config.evaluate import EvaluateConfig, Metric
from uvit.distributed.ops import all_gather, on_main
from uvit.errors import UserError
from uvit.evaluate.evaluate import open_reference
from uvit.evaluate.features import FeatureSet, PerImage, features_in_memory
from uvit.evaluate.frechet import FeatureStatistics
from uvit.evaluate.measure import FRECHET, SMALL_SET, Score, build_extractors, by_name, comparing, compute_scores
from uvit.evaluate.prompts import Prompt, list_prompts
from uvit.evaluate.statistics_file import SavedStatistics
from uvit.images import to_uint8
from uvit.progress import Progress, write
from uvit.sources.shapes import scenes
from uvit.train.sampling import Decoder, load_decoder, sample_images, text_embeddings, with_empty_caption
from uvit.train.setup import Run
from uvit.train.text import load_features_tokenizer, load_frozen_text_encoder
from uvit.train.validate import local_batches
from uvit.weights.encoders import downsampling_of, encode_tokens, tokenize

GUIDANCE_SCALE = 2.0  # the default of `uvit evaluate`


class Evaluation:
    """What all evaluations of a run share. All processes make one, and call `measure` together.

    Attributes:
        scores: metric -> name of each of its scores, the most important first -> "lower" or "higher" is better.
    """

    def __init__(self, run: Run, decoder: Decoder | None):
        """Load and try everything. Raises UserError if a metric cannot be computed."""
        self.run = run
        self.extractors: dict[str, PerImage] = {}  # by metric; in the main process alone
        self.reference: dict[str, FeatureSet | FeatureStatistics] = {}  # by name of the extractor
        with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):  # networks draw initial weights
            self.decoder = decoder or load_decoder(run)
            self.prompts, self.texts = choose_prompts(run)
            self.config = evaluate_config(run)
            self.resolution = run.features.latents_shape[1] * downsampling_of(self.decoder.vae)
            self.scores = on_main(self._open, run.world)
        count = len(self.prompts)
        if count < run.config.eval_prompts:
            print(f"--eval_prompts {run.config.eval_prompts}: there are {count} captions, and each is used")
        if set(run.config.eval_metrics) & set(FRECHET) and count < SMALL_SET:
            print(
                f"each evaluation has {count} images: a Frechet distance of so few is too large, by a bias that "
                "depends on their number; compare it only with distances of as many images"
            )

    def measure(self) -> dict[str, Any]:
        """{eval_NAME: value} of each score, for metrics.jsonl. They are None if a score or a pixel is not finite."""
        started = time.perf_counter()
        pixels = self._generate()
        values = on_main(lambda: self._values(pixels), self.run.world)
        return {**values, "evaluation_seconds": round(time.perf_counter() - started, 3)}

    def _open(self) -> dict[str, dict[str, str]]:
        """Load the networks and the reference, and compute all scores from made-up features."""
        try:
            self.extractors = build_extractors(self.config)
            self._open_reference()
            scores: dict[str, dict[str, str]] = {}
            features = self._rehearsal()
            for metric in self.config.metrics:
                scores[metric] = {score.name: score.better for score in self._try(metric, features)}
            return scores
        except UserError as error:
            raise UserError(re.sub(r"--(metrics|reference)\b", r"--eval_\1", str(error))) from None

    def _open_reference(self) -> None:
        compared = by_name(self.extractors, comparing(self.config))
        if not compared:
            return
        reference = open_reference(self.config, self.extractors, self.resolution)
        assert reference is not None
        if isinstance(reference, SavedStatistics):
            self.reference = dict.fromkeys(compared, reference.statistics)
            return
        # The features' own images may be millions.
        most = len(reference) if self.run.config.eval_reference else len(self.prompts)
        total = min(len(reference), most)
        with Progress("reference", total, "image", bar=not self.run.config.disable_tqdm) as progress:
            self.reference = dict(features_in_memory(reference, total, list(compared.values()), progress))

    def _rehearsal(self) -> dict[str, FeatureSet]:
        """Features as the images will have them, from a grey image and noise."""
        count, rng = len(self.prompts), np.random.default_rng(0)
        grey = np.full((1, self.resolution, self.resolution, 3), 128, np.uint8)
        features = {}
        for each in by_name(self.extractors, self.config.metrics).values():
            arrays = {}
            for name, array in each.extract(grey, self.prompts[:1]).items():
                many = np.repeat(array, count, axis=0)
                noise = rng.standard_normal(many.shape, np.float32) if many.dtype == np.float32 else 0
                arrays[name] = (many + noise).astype(many.dtype)
            features[each.name] = _feature_set(arrays, count)
        return features

    def _try(self, metric: Metric, features: dict[str, FeatureSet]) -> list[Score]:
        try:
            return self._compute(features, metric)
        except UserError as error:
            if str(error).startswith("--"):
                raise
            raise UserError(f"--metrics {metric}, --eval_prompts {len(self.prompts)}: {error}") from None

    def _compute(self, features: dict[str, FeatureSet], metric: Metric) -> list[Score]:
        config = replace(self.config, metrics=(metric,))
        scores = compute_scores(config, self.extractors, features, self.reference, self.prompts, extrapolate=False)
        return sorted(scores, key=lambda score: score.name != metric)  # attributes: their mean comes first

    def _values(self, pixels: np.ndarray | None) -> dict[str, float | None]:
        names = [name for names in self.scores.values() for name in names]
        try:
            if pixels is None:
                raise UserError("the images have values that are NaN or infinite")
            features = {
                each.name: _feature_set(each.extract(pixels, self.prompts), len(pixels))
                for each in by_name(self.extractors, self.config.metrics).values()
            }
            found = [score for metric in self.config.metrics for score in self._compute(features, metric)]
            return {f"eval_{score.name}": score.value for score in found}
        except UserError as error:  # such as values that are not finite: training goes on, and may recover
            write(f"evaluation at step {self.run.step}: {error}")
            return dict.fromkeys((f"eval_{name}" for name in names), None)

    @torch.no_grad()
    def _generate(self) -> np.ndarray | None:
        """(N, H, W, 3) uint8; None if a pixel is not finite."""
        run, own = self.run, dict[int, np.ndarray | None]()
        model, rows = run.ema_model, np.arange(len(self.prompts))
        training = model.training
        model.eval()
        for counts, batch_rows in local_batches(rows, run.config.per_device_train_batch_size, run.world):
            pixels = self._generate_batch(batch_rows)
            if counts and run.world.tp_rank == 0:
                own[int(batch_rows[0])] = pixels
        model.train(training)
        batches = {first: pixels for each in all_gather(own, run.world) for first, pixels in each.items()}
        found = [pixels for _, pixels in sorted(batches.items()) if pixels is not None]
        return np.concatenate(found) if len(found) == len(batches) else None

    def _generate_batch(self, rows: np.ndarray) -> np.ndarray | None:
        run = self.run
        contexts = text_embeddings(run, self.texts[np.append(rows, len(self.prompts))])
        shape = (1, *run.features.latents_shape)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(row)) for row in rows.tolist()]
        images = sample_images(run, self.decoder, torch.cat(noise).to(run.device), contexts, GUIDANCE_SCALE)
        return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy() if bool(images.isfinite().all()) else None


def open_evaluation(run: Run, decoder: Decoder | None) -> Evaluation | None:
    """None if no flag asks for one. `decoder`: that of the previews, if there are previews."""
    return Evaluation(run, decoder) if run.config.eval_metrics else None


def evaluate_config(run: Run) -> EvaluateConfig:
    """The flags of `uvit evaluate` that measure what this run asks for."""
    config = run.config
    path, split = config.feature_path, "train"
    if run.validation is not None:
        path, split = config.validation_feature_path or path, config.validation_split
    return EvaluateConfig(
        model=path,
        output_dir=config.output_dir,
        reference=config.eval_reference or path,
        split=None if config.eval_reference else split,
        prompts=shapes_source(run) if "attributes" in config.eval_metrics else None,
        metrics=config.eval_metrics,
        feature_extractor=config.feature_extractor,
        inception_weights=config.inception_weights,
        clip_name_or_path=config.clip_name_or_path,
        device=config.device,
    ).resolved()


def shapes_source(run: Run) -> str:
    """The name of the built-in shapes that the features were made from. Raises UserError if they are of others."""
    captions = set((run.validation or run.features).captions(0))
    for name, num_objects in {"shapes": 1, "shapes:two": 2}.items():
        if any(
            captions & set(scene.captions()) for split in ("train", "heldout") for scene in scenes(split, num_objects)
        ):
            return name
    raise UserError(
        f"--eval_metrics attributes: reads the built-in shapes, and --feature_path {run.config.feature_path} was "
        "not made from them; choose other metrics"
    )


@torch.no_grad()
def choose_prompts(run: Run) -> tuple[list[Prompt], Tensor]:
    """(N prompts, their texts as of `with_empty_caption`)

    Held-out shapes if their attributes are read, or else the captions of the first rows of the features.
    """
    config, features, use_tokens = run.config, run.validation or run.features, run.batches.use_tokens
    if "attributes" in config.eval_metrics:
        prompts = list_prompts(shapes_source(run), "heldout", config.eval_prompts)
        texts = [*(prompt.text for prompt in prompts), ""]
        assert features.num_tokens is not None
        token_ids = tokenize(load_features_tokenizer(config, run.features), texts, features.num_tokens)
        if use_tokens:
            return prompts, token_ids
        encoder, pad_token_id, _ = load_frozen_text_encoder(config, run.features, run.master_model["unet"])  # type: ignore[arg-type]
        encoder.to(run.device)
        parts = [encode_tokens(encoder, part.to(run.device), pad_token_id).cpu() for part in token_ids.split(64)]
        return prompts, torch.cat(parts)
    rows = np.arange(min(config.eval_prompts, features.num_samples))
    captions = [features.captions(int(row)) for row in rows]
    if "clip_score" in config.eval_metrics and not all(captions):
        raise UserError(
            f"--eval_metrics clip_score: needs captions, and --feature_path {config.feature_path} does not hold them "
            "as text; choose other metrics"
        )
    prompts = [Prompt(texts[0] if texts else "", str(row)) for row, texts in zip(rows, captions, strict=True)]
    return prompts, with_empty_caption(features, features.read(rows, np.zeros(len(rows))), use_tokens)


def _feature_set(arrays: dict[str, np.ndarray], count: int) -> FeatureSet:
    return FeatureSet(arrays, np.arange(count), [str(row) for row in range(count)], [], "")
