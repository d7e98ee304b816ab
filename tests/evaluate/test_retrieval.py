"""The named image is found where it is nearest, and copies share a rank."""

import numpy as np
import pytest

from uvit.errors import UserError
from uvit.evaluate.features import FeatureSet
from uvit.evaluate.retrieval import retrieve


def features(rows: np.ndarray, ids: list[str]) -> FeatureSet:
    return FeatureSet({"features": rows.astype(np.float32)}, np.arange(len(rows)), ids, [], "")


def test_identical_images_are_found_and_shifted_names_are_not() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 8))
    ids = [str(i) for i in range(300)]
    right = retrieve(features(rows, ids), features(rows, ids))
    assert right.top(1) == 1.0 and (right.nearest[:, 0] == np.arange(300)).all()
    wrong = retrieve(features(np.roll(rows, 1, axis=0), ids), features(rows, ids))
    assert wrong.top(1) == 0.0 and wrong.top(300) == 1.0


def test_the_rank_counts_nearer_images() -> None:
    reference = features(np.eye(4), list("abcd"))
    asked = features(np.array([[0.0, 3.0, 2.0, 1.0]]), ["d"])
    found = retrieve(asked, reference)
    assert found.ranks.tolist() == [2.0] and found.nearest[0, :3].tolist() == [1, 2, 3]
    assert found.top(2) == 0.0 and found.top(3) == 1.0


def test_copies_of_the_named_image_share_its_rank() -> None:
    reference = features(np.array([[1.0, 0], [1, 0], [0, 1]]), list("abc"))
    assert retrieve(features(np.array([[2.0, 0]]), ["b"]), reference).ranks.tolist() == [0.5]


def test_prompts_that_name_no_image_are_refused() -> None:
    with pytest.raises(UserError, match="no prompt names an image"):
        retrieve(features(np.eye(2), ["x", "y"]), features(np.eye(2), ["0", "1"]))
