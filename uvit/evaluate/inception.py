"""The Inception v3 of FID, and the three ways in which images of any size become its input.

The weights are those that pytorch-fid and torch-fidelity load: the TensorFlow network of 2015 with 1008 classes. It
differs from torchvision's: average pools leave the padding out of the mean, and the last block pools by the maximum.
The modules have the names of that file. Shapes: B batch, images (B, 3, 299, 299).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from uvit.config.evaluate import InceptionInput
from uvit.errors import UserError
from uvit.evaluate.network_files import load_network_file

INPUT_SIZE = 299
NUM_CLASSES = 1008
WEIGHTS_SHA256_PREFIX = "6726825d"
WEIGHTS_NAMES = (  # one file: where it is published by pytorch-fid and by torch-fidelity
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
WEIGHTS_PAGE = "github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"


# The network


class ConvBN(nn.Module):
    """Convolution without bias, batch normalisation with eps 0.001, ReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def wide(channels: int, out: int, size: int) -> ConvBN:
    """1 x size, at the same size of the image."""
    return ConvBN(channels, out, (1, size), padding=(0, size // 2))


def tall(channels: int, out: int, size: int) -> ConvBN:
    """size x 1, at the same size of the image."""
    return ConvBN(channels, out, (size, 1), padding=(size // 2, 0))


def average_pool(x: Tensor) -> Tensor:
    """3 x 3 at the same size; the padding does not count."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Mixed35(nn.Module):
    """Mixed_5b to 5d, at 35 x 35."""

    def __init__(self, channels: int, pool: int):
        super().__init__()
        self.branch1x1 = ConvBN(channels, 64, 1)
        self.branch5x5_1 = ConvBN(channels, 48, 1)
        self.branch5x5_2 = ConvBN(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBN(channels, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, padding=1)
        self.branch_pool = ConvBN(channels, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        b5 = self.branch5x5_2(self.branch5x5_1(x))
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b5, b3, self.branch_pool(average_pool(x))], 1)


class Reduce35(nn.Module):
    """Mixed_6a: 35 x 35 to 17 x 17."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = ConvBN(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBN(channels, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), b3, F.max_pool2d(x, 3, 2)], 1)


class Mixed17(nn.Module):
    """Mixed_6b to 6e, at 17 x 17: 7 x 7 convolutions as 1 x 7 and 7 x 1."""

    def __init__(self, inner: int):
        super().__init__()
        self.branch1x1 = ConvBN(768, 192, 1)
        self.branch7x7_1 = ConvBN(768, inner, 1)
        self.branch7x7_2 = wide(inner, inner, 7)
        self.branch7x7_3 = tall(inner, 192, 7)
        self.branch7x7dbl_1 = ConvBN(768, inner, 1)
        self.branch7x7dbl_2 = tall(inner, inner, 7)
        self.branch7x7dbl_3 = wide(inner, inner, 7)
        self.branch7x7dbl_4 = tall(inner, inner, 7)
        self.branch7x7dbl_5 = wide(inner, 192, 7)
        self.branch_pool = ConvBN(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        b7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), b7, double, self.branch_pool(average_pool(x))], 1)


class Reduce17(nn.Module):
    """Mixed_7a: 17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvBN(768, 192, 1)
        self.branch3x3_2 = ConvBN(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBN(768, 192, 1)
        self.branch7x7x3_2 = wide(192, 192, 7)
        self.branch7x7x3_3 = tall(192, 192, 7)
        self.branch7x7x3_4 = ConvBN(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        b3 = self.branch3x3_2(self.branch3x3_1(x))
        b7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([b3, b7, F.max_pool2d(x, 3, 2)], 1)


class Mixed8(nn.Module):
    """Mixed_7b and 7c, at 8 x 8. The pool of 7c is a maximum, a quirk of the original network."""

    def __init__(self, channels: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvBN(channels, 320, 1)
        self.branch3x3_1 = ConvBN(channels, 384, 1)
        self.branch3x3_2a = wide(384, 384, 3)
        self.branch3x3_2b = tall(384, 384, 3)
        self.branch3x3dbl_1 = ConvBN(channels, 448, 1)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = wide(384, 384, 3)
        self.branch3x3dbl_3b = tall(384, 384, 3)
        self.branch_pool = ConvBN(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        b3 = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.max_pool else average_pool(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(b3), self.branch3x3_2b(b3)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(branches, 1)


class FIDInception(nn.Module):
    """(B, 3, 299, 299) in [-1, 1] -> features (B, 2048) and logits without the bias (B, 1008)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3)
        self.Mixed_5b = Mixed35(192, pool=32)
        self.Mixed_5c = Mixed35(256, pool=64)
        self.Mixed_5d = Mixed35(288, pool=64)
        self.Mixed_6a = Reduce35(288)
        self.Mixed_6b = Mixed17(128)
        self.Mixed_6c = Mixed17(160)
        self.Mixed_6d = Mixed17(160)
        self.Mixed_6e = Mixed17(192)
        self.Mixed_7a = Reduce17()
        self.Mixed_7b = Mixed8(1280, max_pool=False)
        self.Mixed_7c = Mixed8(2048, max_pool=True)
        self.fc = nn.Linear(2048, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        features = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return features, F.linear(features, self.fc.weight)


# The weights


def find_inception_weights(path: str | None = None) -> Path:
    """The file named, or else the one that pytorch-fid or torch-fidelity put into torch's cache.

    Raises UserError where there is none.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [Path(path)] if path else [folder / name for name in WEIGHTS_NAMES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{candidates[0]}: the Inception weights of FID are not there (91 MiB, SHA-256 {WEIGHTS_SHA256_PREFIX}...); "
        f"get {WEIGHTS_NAMES[0]} from {WEIGHTS_PAGE} and put it there"
    )


def load_inception(path: Path) -> tuple[FIDInception, str]:
    """The network of a `.pth` or safetensors file, float32, eval mode, frozen; and the SHA-256 of the file.

    Raises UserError where the file is not of this network.
    """
    remedy = f"get {WEIGHTS_NAMES[0]} from {WEIGHTS_PAGE}"
    return load_network_file(path, FIDInception, "the Inception of FID", remedy)


# The input


def inception_input(image: np.ndarray, convention: InceptionInput = "pytorch-fid") -> Tensor:
    """An image (H, W, 3) uint8 of any size -> (3, 299, 299) float32, as one of three implementations of FID makes it.

    - `pytorch-fid`, that of the published COCO numbers: x / 255, bilinear without antialias, then 2x - 1.
    - `torch-fidelity`: TensorFlow 1's bilinear (no shift by half a pixel, no antialias), then (x - 128) / 128.
    - `clean-fid`: each channel bicubic with antialias, in float, clipped to 0..255; then (x - 128) / 128.

    Each has its own FID: do not compare across them.
    """
    if convention == "pytorch-fid":
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return 2 * F.interpolate(x, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)[0] - 1
    if convention == "torch-fidelity":
        return (tensorflow_bilinear(torch.from_numpy(np.array(image)).permute(2, 0, 1).float()) - 128) / 128
    return (torch.from_numpy(clean_bicubic(image)) - 128) / 128


def tensorflow_bilinear(x: Tensor) -> Tensor:
    """(3, H, W) -> (3, 299, 299), as tf.image.resize_bilinear of TensorFlow 1: output i is at i * H / 299."""
    for dim in (2, 1):  # columns first, as TensorFlow
        size = x.shape[dim]
        place = torch.arange(INPUT_SIZE, dtype=torch.float32) * torch.tensor(size / INPUT_SIZE, dtype=torch.float32)
        low = place.long()
        high = (low + 1).clamp(max=size - 1)
        share = (place - low).view(-1, 1) if dim == 1 else place - low
        first = x.index_select(dim, low)
        x = first + (x.index_select(dim, high) - first) * share
    return x


def clean_bicubic(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, 299, 299) float32 in 0..255, as clean-fid resizes."""
    channels = []
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32))
        plane = plane.resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)
        channels.append(np.asarray(plane).clip(0, 255))
    return np.stack(channels)
