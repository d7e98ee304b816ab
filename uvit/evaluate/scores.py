"""Scores that are means over images: the Inception Score and the CLIP score, with a bootstrap interval of a mean."""

import numpy as np
import torch
from torch import Tensor

from uvit.errors import UserError
from uvit.evaluate.feature_sets import check_finite_features


def inception_score(logits: Tensor, *, num_splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)): mean and standard deviation over splits, as torch-fidelity computes them.

    Logits (N, classes): with FID's Inception, those without the bias.
    """
    total = len(logits)
    if not 1 <= num_splits <= total:
        raise UserError(f"an Inception Score with {num_splits} splits needs as many images, and there are {total}")
    check_finite_features(logits, "Inception Score: of the images")
    order = np.random.RandomState(seed).permutation(total)
    scores = []
    for i in range(num_splits):
        rows = torch.from_numpy(order[i * total // num_splits : (i + 1) * total // num_splits]).to(logits.device)
        log_p = logits[rows].double().log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).nansum(1).mean().exp().item())  # 0 log 0 is 0
    return float(np.mean(scores)), float(np.std(scores))


def clip_similarities(images: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of each image's and its own caption's embedding: (N, D), (N, D) -> (N,), float64."""
    if images.shape != texts.shape:
        raise ValueError(f"image embeddings {tuple(images.shape)} and text embeddings {tuple(texts.shape)}")
    check_finite_features(images, "CLIP score: of the images")
    check_finite_features(texts, "CLIP score: of the captions")
    return 100 * torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=1)


def clip_score(similarities: Tensor) -> float:
    """The CLIP score of an image set from its `clip_similarities`, as torchmetrics: the mean, but not below 0."""
    if not len(similarities):
        raise UserError("CLIP score: there are no images; give at least 1")
    return max(0.0, similarities.mean().item())


def mean_interval(
    values: Tensor, *, num_resamples: int = 1000, level: float = 0.95, seed: int = 2020
) -> tuple[float, float]:
    """The ends of the bootstrap interval (percentiles) of the mean of values (N,), such as a CLIP score's."""
    if not len(values):
        raise UserError("there are no images to compute an interval from; give at least 1")
    numbers, rng = values.double().cpu().numpy(), np.random.RandomState(seed)
    means = [numbers[rng.randint(len(numbers), size=len(numbers))].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
