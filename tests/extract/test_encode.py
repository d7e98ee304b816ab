"""The same bits whatever computes them, and what cannot be stored is found pair by pair."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from uvit.errors import UserError
from uvit.extract.encode import PIXELS_AT_ONCE, BatchInProgress, Encoders, encode_in_order, encoding_threads
from uvit.extract.workers import Decoded
from uvit.store.shard import EncodedPairs
from uvit.weights import encoders as models


@pytest.fixture
def parts(vae_folder: Path, text_encoder_folder: Path) -> dict[str, Any]:
    return {
        "vae": models.load_diffusers_vae(str(vae_folder)),
        "text_encoder": models.load_transformers_encoder(str(text_encoder_folder)),
        "tokenizer": models.load_tokenizer(str(text_encoder_folder)),
        "device": torch.device("cpu"),
        "precision": torch.float32,
        "num_tokens": 16,
        "batch_size": 4,
        "flip": True,
        "dtype": np.dtype("float32"),
        "token_dtype": np.dtype("uint16"),
        "skip": True,
    }


def batches(number: int, size: int = 4, resolution: int = 64) -> list[Decoded]:
    random = np.random.default_rng(0)
    return [
        Decoded(
            rows=range(i * size, (i + 1) * size),
            ids=[f"{i}-{k}" for k in range(size)],
            captions=[tuple(f"two cats sit on table {c}" for c in range(1 + (i + k) % 3)) for k in range(size)],
            pixels=random.integers(0, 256, (size, 3, resolution, resolution), dtype=np.uint8),
        )
        for i in range(number)
    ]


def encode(parts: dict[str, Any], given: list[Decoded]) -> list[tuple[Decoded, EncodedPairs]]:
    encoders = Encoders(**parts)
    with encoding_threads(encoders.device) as (pool, num_threads):
        return list(encode_in_order(encoders, iter(given), pool, num_threads))


@pytest.fixture
def num_threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("num_threads")
def test_the_number_of_threads_changes_no_bit_and_no_order(parts: dict[str, Any]) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(encode(parts, batches(7)))
        assert torch.get_num_threads() == threads, "the caller's own number comes back"
    for other in results[1:]:
        for (batch, expected), (same, found) in zip(results[0], other, strict=True):
            assert batch.rows == same.rows
            assert expected.ids == found.ids
            for name in ("moments", "flipped", "contexts", "token_ids"):
                assert getattr(expected, name).tobytes() == getattr(found, name).tobytes(), name


def test_a_large_batch_is_encoded_in_pieces_that_its_images_alone_decide(parts: dict[str, Any]) -> None:
    """So the memory of several batches at once stays within bounds."""
    seen = []
    hook = parts["vae"].encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    resolution, size = 128, 6
    encode(parts | {"flip": False, "batch_size": 6}, batches(1, size, resolution))
    hook.remove()
    assert [shape[0] * shape[2] * shape[3] for shape in seen] == [PIXELS_AT_ONCE, PIXELS_AT_ONCE // 2]


def test_nothing_of_a_batch_is_left(parts: dict[str, Any]) -> None:
    batch = batches(1, size=0)
    ((_, encoded),) = encode(parts, batch)
    assert (encoded.ids, encoded.captions) == ([], [])
    assert encoded.flipped is not None
    assert encoded.contexts is not None
    assert encoded.token_ids is not None
    assert encoded.moments.shape == encoded.flipped.shape == (0, 8, 16, 16)
    assert (encoded.contexts.shape, encoded.token_ids.shape) == ((0, 16, 32), (0, 16))


def loud(parts: dict[str, Any], given: Decoded) -> str:
    """Scale the VAE's means so that of one pair alone they are beyond float16; its id."""
    ((_, encoded),) = encode(parts | {"flip": False}, [given])
    largest = np.abs(encoded.moments[:, :4]).max(axis=(1, 2, 3))
    second, first = np.sort(largest)[-2:]
    factor = float(65504 / np.sqrt(first * second))
    for parameter in parts["vae"].quant_conv.parameters():
        parameter[:4] *= factor
    return given.ids[int(largest.argmax())]


def test_a_pair_that_float16_cannot_hold_is_left_out(parts: dict[str, Any]) -> None:
    (batch,) = batches(1)
    id = loud(parts, batch)
    parts |= {"dtype": np.dtype("float16"), "flip": False}
    ((_, encoded),) = encode(parts, [batch])
    assert encoded.ids == [other for other in batch.ids if other != id]
    assert np.isfinite(encoded.moments).all()
    assert encoded.contexts is not None
    assert len(encoded.moments) == 3
    assert len(encoded.contexts) == sum(map(len, encoded.captions))
    (problem,) = encoded.problems
    assert (problem.id, problem.kind, problem.left_out) == (id, "not finite", True)
    assert problem.message.endswith(f"the moments of {id} are NaN or infinite; give --dtype float32")
    with pytest.raises(UserError, match=r"some moments are NaN or infinite.*give --dtype float32"):
        encode(parts | {"skip": False}, [batch])


def test_a_whole_batch_beyond_float16_is_a_mistake_in_the_flags(parts: dict[str, Any]) -> None:
    parts["vae"].quant_conv.bias[0] = 1e5
    with pytest.raises(UserError, match=r"--dtype float16: some moments .*give --dtype float32"):
        encode(parts | {"dtype": np.dtype("float16")}, batches(1))
    parts["text_encoder"].final_layer_norm.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"--dtype float32: some text embeddings .*the encoder itself returns"):
        encode(parts, batches(1))


@pytest.mark.usefixtures("num_threads")
def test_one_batch_is_shared_by_all_threads(parts: dict[str, Any]) -> None:
    """Its parts wait for each other here, so that one thread alone would never end."""
    together = threading.Barrier(3, timeout=60)

    def wait(*_: Any) -> None:
        together.wait()

    hook = parts["vae"].encoder.register_forward_pre_hook(wait)
    torch.set_num_threads(3)
    ((_, encoded),) = encode(parts | {"flip": False}, batches(1, size=12, resolution=128))
    hook.remove()
    assert encoded.moments is not None
    assert len(encoded.moments) == 12


@pytest.mark.usefixtures("num_threads")
def test_after_a_stop_no_part_is_begun(parts: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    encoders = Encoders(**parts | {"text_encoder": None})
    started: list[BatchInProgress] = []
    begun = threading.Event()
    seen = []

    def wait(module: Any, inputs: tuple[torch.Tensor]) -> None:
        seen.append(inputs[0].shape)
        begun.set()
        end = time.monotonic() + 60
        while not (started and started[0].flipped and started[0].flipped[-1].cancelled()):
            assert time.monotonic() < end
            time.sleep(0.001)

    hook = parts["vae"].encoder.register_forward_pre_hook(wait)
    with pytest.raises(KeyboardInterrupt), encoding_threads(encoders.device) as (pool, _):
        started.append(encoders.start(batches(1, size=12, resolution=128)[0], pool))
        assert begun.wait(60)
        raise KeyboardInterrupt
    hook.remove()
    assert len(seen) == 1, "of three parts of the images and three of their mirrored ones"
