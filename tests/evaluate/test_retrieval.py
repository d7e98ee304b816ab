"""The named image is found where it is nearest, whatever is left out, repeated or a copy."""

import numpy as np
import pytest
import torch

from uvit.errors import UserError
from uvit.evaluate import retrieval
from uvit.evaluate.features import FeatureSet
from uvit.evaluate.prompts import Prompt
from uvit.evaluate.retrieval import nearest_images, retrieval_ranks


def features(rows: np.ndarray, ids: list[str], positions: list[int] | None = None) -> FeatureSet:
    places = np.arange(len(rows)) if positions is None else np.array(positions)
    return FeatureSet({"features": rows.astype(np.float32)}, places, ids, [], "")


def prompts(images: list[str], texts: list[str] | None = None) -> list[Prompt]:
    return [Prompt(text, "", image=image) for image, text in zip(images, texts or images, strict=True)]


def unnamed(rows: np.ndarray, positions: list[int] | None = None) -> FeatureSet:
    return features(rows, [f"{i}.png" for i in range(len(rows))], positions)


def test_identical_images_are_found_and_shifted_names_are_not() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 8))
    ids = [str(i) for i in range(300)]
    reference = features(rows, ids)
    assert retrieval_ranks(unnamed(rows), reference, prompts(ids)).tolist() == [0] * 300
    assert (retrieval_ranks(unnamed(np.roll(rows, 1, axis=0)), reference, prompts(ids)) > 0).all()


def test_ranks_and_neighbours_are_those_of_all_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain sort, with several tiles of both sets."""
    monkeypatch.setattr("uvit.evaluate.feature_sets.TILE_ROWS", 70)
    monkeypatch.setattr(retrieval, "SIMILARITIES", 0)
    generator = np.random.default_rng(0)
    real, mine = generator.normal(size=(201, 6)).astype(np.float32), generator.normal(size=(150, 6)).astype(np.float32)
    named = generator.permutation(201)[:150]
    cosines = np.array([[a @ b / np.sqrt(a @ a * (b @ b)) for b in real.astype(float)] for a in mine.astype(float)])
    order = np.argsort(-cosines, axis=1)
    ranks = retrieval_ranks(unnamed(mine), features(real, list(map(str, range(201)))), prompts(list(map(str, named))))
    assert ranks.tolist() == [list(order[i]).index(named[i]) for i in range(150)]
    rows, its_cosines = nearest_images(torch.tensor(mine), torch.tensor(real))
    assert (rows.numpy() == order[:, :5]).all()
    np.testing.assert_allclose(its_cosines, np.take_along_axis(cosines, order[:, :5], 1), rtol=1e-12)


def test_the_rank_counts_nearer_images() -> None:
    reference = features(np.eye(4), list("abcd"))
    assert retrieval_ranks(unnamed(np.array([[0.0, 3, 2, 1]])), reference, prompts(["d"])).tolist() == [2]
    rows, _ = nearest_images(torch.tensor([[0.0, 3, 2, 1]]), torch.eye(4))
    assert rows.tolist() == [[1, 2, 3, 0]]


def test_copies_of_the_named_image_are_not_nearer() -> None:
    reference = features(np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]]), list("abcd"))
    assert retrieval_ranks(unnamed(np.array([[2.0, 0]])), reference, prompts(["b"])).tolist() == [0]
    assert retrieval_ranks(unnamed(np.array([[2.0, 0]])), reference, prompts(["d"])).tolist() == [3]


def test_a_prompt_names_the_images_of_all_equal_prompts() -> None:
    reference = features(np.eye(4), list("abcd"))
    asked = prompts(list("abc"), ["a cat", "a dog", "a cat"])
    assert retrieval_ranks(unnamed(np.eye(4)[[2, 2, 0]]), reference, asked).tolist() == [0, 1, 0]


def test_images_that_were_left_out_shift_nothing() -> None:
    """Of the generated images, image 1 is missing; of the real ones, image 0, which a prompt names, is."""
    eye = np.eye(4)
    reference = features(eye[1:], list("bcd"), [1, 2, 3])
    ranks = retrieval_ranks(unnamed(eye[[0, 2, 3]], [0, 2, 3]), reference, prompts(list("abcd")))
    assert ranks.tolist() == [0, 0]


def test_one_image_may_have_several_prompts() -> None:
    reference = features(np.eye(2), list("ab"))
    asked = prompts(["a", "b", "a"], ["one", "two", "three"])
    assert retrieval_ranks(unnamed(np.eye(2)[[0, 1, 0]]), reference, asked).tolist() == [0, 0, 0]


def test_there_are_as_many_neighbours_as_images() -> None:
    rows, cosines = nearest_images(torch.eye(3)[:2], torch.eye(3))
    assert rows.shape == cosines.shape == (2, 3) and rows[:, 0].tolist() == [0, 1]


def test_prompts_that_name_no_image_are_refused() -> None:
    with pytest.raises(UserError, match="no prompt names an image"):
        retrieval_ranks(unnamed(np.eye(2)), features(np.eye(2), ["0", "1"]), prompts(["", "x"], ["a", "b"]))


def test_centered_ranks_are_those_of_centered_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features without negative values, as after a ReLU: an offset that all share decides nothing."""
    monkeypatch.setattr("uvit.evaluate.feature_sets.TILE_ROWS", 30)
    generator = np.random.default_rng(0)
    real, mine = generator.random((101, 6)).astype(np.float32), generator.random((40, 6)).astype(np.float32)
    ids, named = [str(i) for i in range(101)], generator.permutation(101)[:40].tolist()
    asked, centre = prompts([str(i) for i in named]), real.astype(float).mean(0)
    centered = retrieval_ranks(unnamed(mine), features(real, ids), asked, centered=True)
    rows, _ = nearest_images(torch.tensor(mine), torch.tensor(real), centered=True)
    a, b = mine - centre, real - centre
    order = np.argsort(-(a @ b.T) / np.linalg.norm(b, axis=1), axis=1)
    assert centered.tolist() == [list(order[i]).index(named[i]) for i in range(40)]
    assert (rows.numpy() == order[:, :5]).all()
    assert centered.tolist() != retrieval_ranks(unnamed(mine), features(real, ids), asked).tolist()


def test_twins_up_to_rounding_are_not_nearer() -> None:
    """Equal pixels in batches of two sizes: their features differ in the last bits."""
    real = np.random.default_rng(0).random((20, 50)).astype(np.float32)
    real[1] = np.nextafter(real[0], 2)
    reference = features(real, [str(i) for i in range(20)])
    for centered in (False, True):
        assert retrieval_ranks(unnamed(real[[1, 0]]), reference, prompts(["0", "1"]), centered).tolist() == [0, 0]
