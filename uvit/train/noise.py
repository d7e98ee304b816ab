"""Normal numbers that are the same bits on every device: those of `--noise_device device`.

Each sample has its own blocks of a Philox4x64-10 stream (Salmon et al. 2011), by its sample counter. Every 16 bits look
up a number in a table of 2^16 normal quantiles. A number t of a sample's first half and its partner u of the second
give two normal numbers, t + u and t - u. All numbers of the table are multiples of 2^-20, so sums are exact, and no
device, compiler or order of operations can change a bit. NumPy draws them on the host, torch on any device.

The numbers are discrete, multiples of 2^-20 up to 6.1. Their variance is 1 to 1e-6.
"""

import enum
import functools
import math

import numpy as np
import torch
from torch import Tensor

WORD = 2**64
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)  # of Philox4x64
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
PHILOX_ROUNDS = 10
LOW = 0xFFFFFFFF  # the low half of a word
GRID = 2.0**-20
BLOCK = 16  # normal numbers of four words
CACHED_NUMBERS = 32768  # numbers at a time: few calls, and what they need stays in a core's cache


class Stream(enum.IntEnum):
    """Independent streams of a run's random numbers, beside its seed in a generator's key."""

    ORDER = 1  # of the samples in an epoch
    DRAWS = 2  # of a sample: caption, caption dropout, timestep, and noise with --noise_device host
    FLIPS = 3
    PREVIEW = 4
    VALIDATION = 5
    LEVELS = 6  # of noise
    NOISE = 7


@functools.cache
def quantiles(device: torch.device) -> Tensor:
    """(65536,) float32: the means of 65536 equally probable parts of a normal distribution with variance 1/2."""
    edges = torch.special.ndtri(torch.arange(2**15, 2**16 + 1, dtype=torch.float64) / 2**16)  # 0 .. infinity
    density = torch.exp(-edges.square() / 2)
    means = density[:-1] - density[1:]
    means *= (0.5 / means.square().mean()).sqrt()
    upper = (means / GRID).round() * GRID
    return torch.cat([-upper.flip(0), upper]).float().to(device)


def draw_noise(
    first: int | Tensor,
    count: int,
    seed: int,
    latent_shape: tuple[int, ...],
    noise_offset: float = 0.0,
    posterior: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """The posterior noise, if wanted, and the diffusion noise, each (count, C, h, w), of samples from `first` on.

    Drawn with NumPy, or by the device of `first`, if that is a tensor.
    """
    size, num_noises = math.prod(latent_shape), 1 + posterior
    num = num_noises * size + (latent_shape[0] if noise_offset else 0)
    if isinstance(first, Tensor):
        normal = normal_on_device(first, count, seed, Stream.NOISE, num)
    else:
        normal = torch.from_numpy(normal_on_host(first, count, seed, Stream.NOISE, num))
    *posterior_noise, noise = normal[:, : num_noises * size].view(count, num_noises, *latent_shape).unbind(1)
    if noise_offset:
        noise = noise + noise_offset * normal[:, num_noises * size :, None, None]
    return (posterior_noise[0] if posterior else None), noise


def normal_on_host(first: int, count: int, seed: int, stream: int, num: int) -> np.ndarray:
    """The normal numbers of `count` samples from sample counter `first` on, (count, num) float32, with NumPy.

    It does not hold the interpreter's lock.
    """
    num_blocks = -(-num // BLOCK)
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64))  # of a list, NumPy rounds large numbers
    table = quantiles(torch.device("cpu")).numpy()
    state = bits.state
    state["state"]["counter"][0] = first * num_blocks
    bits.state = state
    out = np.empty((count, 2, num_blocks * BLOCK // 2), np.float32)
    step = max(1, CACHED_NUMBERS // (num_blocks * BLOCK))
    for start in range(0, count, step):
        samples = out[start : start + step]
        places = bits.random_raw(samples.size // 4).view("<u2").astype(np.intp)
        t, u = table.take(places, mode="wrap").reshape(samples.shape).transpose(1, 0, 2)
        np.add(t, u, out=samples[:, 0])
        np.subtract(t, u, out=samples[:, 1])
    return np.ascontiguousarray(out.reshape(count, num_blocks * BLOCK)[:, :num])


def normal_on_device(first: Tensor, count: int, seed: int, stream: int, num: int) -> Tensor:
    """The same on the device of `first`, a 0-d int64 tensor, without waiting for it."""
    num_blocks = -(-num // BLOCK)
    blocks = 1 + first * num_blocks + torch.arange(count * num_blocks, device=first.device)
    shifts = torch.arange(0, 64, 16, device=first.device)
    places = (philox(blocks, seed, stream)[..., None] >> shifts) & 0xFFFF  # (blocks, 4, 4)
    t, u = quantiles(first.device)[places.view(count, 2, -1)].unbind(1)
    return torch.cat([t + u, t - u], dim=1)[:, :num].contiguous()


def philox(blocks: Tensor, seed: int, stream: int) -> Tensor:
    """Blocks of four words of a stream, (n,) int64 -> (n, 4) int64.

    Words are 64 bits without a sign, in int64, whose sums and products wrap around.
    """
    zero = torch.zeros_like(blocks)
    words, keys = [blocks, zero, zero, zero], [seed, stream]
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = multiply(words[0], MULTIPLIERS[0])
        high1, low1 = multiply(words[2], MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ signed(keys[0]), low1, high0 ^ words[3] ^ signed(keys[1]), low0]
        keys = [(key + step) % WORD for key, step in zip(keys, WEYL, strict=True)]
    return torch.stack(words, dim=-1)


def multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words, from products of their halves."""
    x0, x1, y0, y1 = x & LOW, (x >> 32) & LOW, by & LOW, by >> 32
    low, cross0, cross1 = x0 * y0, x0 * y1, x1 * y0
    carry = ((low >> 32) & LOW) + (cross0 & LOW) + (cross1 & LOW)
    high = x1 * y1 + ((cross0 >> 32) & LOW) + ((cross1 >> 32) & LOW) + (carry >> 32)
    return high, x * signed(by)


def signed(word: int) -> int:
    """The same 64 bits, as int64 has them."""
    return word - WORD if word >= WORD // 2 else word
