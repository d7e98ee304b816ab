"""Pass one of reading weights: where the components of a source lie, and the arrays of each network there."""

import argparse
import collections
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from tests.port import PORT_FOLDER, same, tiny_unet
from uvit.errors import UserError
from uvit.export.formats import save_pth
from uvit.weights.components import load_text_encoder, load_unet, load_vae
from uvit.weights.files import read_weights
from uvit.weights.networks import Location, locate, read_networks
from uvit.weights.pdparams import write_pdparams
from uvit.weights.report import Report
from uvit.weights.vae import to_ldm


def test_the_locations_of_a_pipeline() -> None:
    locations = locate(PORT_FOLDER, overridden=["vqvae"])
    assert locations == [
        Location(PORT_FOLDER / "unet", "unet"),
        Location(PORT_FOLDER / "text_encoder", "text_encoder"),
        Location(PORT_FOLDER / "tokenizer", "tokenizer", saved_by_library=True),
    ]


def test_the_locations_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    assert locate(tmp_path) == [Location(tmp_path / "vae", "vqvae", saved_by_library=True)]
    file = tmp_path / "model_state.pdparams"
    file.touch()
    assert locate(file) == [Location(file)] and locate(tmp_path) == [Location(tmp_path)]
    (tmp_path / "vocab.json").touch()
    assert locate(tmp_path)[1:] == [Location(tmp_path, "tokenizer", saved_by_library=True)]
    with pytest.raises(UserError, match="no such file or folder"):
        locate(tmp_path / "nowhere")


def test_ema_weights_come_before_raw_weights(tmp_path: Path) -> None:
    ema, raw = tiny_unet(1).state_dict(), tiny_unet(2).state_dict()
    save_pth(ema, tmp_path / "nnet_ema.pth")
    save_pth(raw, tmp_path / "nnet.pth")
    report = Report()
    found = list(read_networks(Location(tmp_path), True, None, (), report))
    assert [weights.is_raw for weights in found] == [False, True]
    assert same(found[0].tensors, ema) and same(found[1].tensors, raw) and len(report.read) == 2
    (alone,) = read_networks(Location(tmp_path), False, None, (), Report())
    assert not alone.is_raw and same(alone.tensors, raw)
    assert list(read_networks(Location(tmp_path), True, None, ["unet"], Report())) == []


VAE = {"encoder.mid_block.resnets.0.conv1.weight": torch.zeros(1)}
TEXT = {"embeddings.token_embedding.weight": torch.zeros(1)}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def test_a_checkpoint_of_several_networks_is_split(tmp_path: Path) -> None:
    path = tmp_path / "model_state.pdparams"
    networks = {"unet.": tiny_unet().state_dict(), "vae.": VAE, "text_encoder.": TEXT}
    arrays = {k: v for prefix, tensors in networks.items() for k, v in with_prefix(prefix, tensors).items()}
    write_pdparams(path, arrays | {"other": torch.ones(1)})
    report = Report()
    found = list(read_networks(Location(path), True, None, ["vqvae"], report))
    assert [(weights.component, weights.kind) for weights in found] == [("unet", "uvit"), ("text_encoder",) * 2]
    assert set(found[1].tensors) == set(TEXT) and report.dropped == [f"{path}: arrays of no network: other"]


IDS = {"num_attention_heads": 1, "max_position_embeddings": 7, "bos_token_id": 1, "eos_token_id": 2}
RAW, EMA = dict(tiny_unet(1).state_dict()), dict(tiny_unet(2).state_dict())
ARGS = argparse.Namespace(model="U-ViT", lr=np.float64(1e-4), results=Path("here"), dtype=torch.bfloat16)
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}


class HyperParameters(dict):  # type: ignore[type-arg]  # as Lightning's AttributeDict
    pass


def lit_ema(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lightning's LDM keeps EMA weights under names without dots, with two counters."""
    named = {("diffusion_model." + name).replace(".", ""): value for name, value in tensors.items()}
    return named | {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(7)}


CONTAINERS = {
    "DiT": {"model": RAW, "ema": EMA, "opt": OPTIMIZER, "args": ARGS},
    "U-ViT": {"nnet": RAW, "nnet_ema": EMA, "step": 5},
    "DDP in DiT": {"model": with_prefix("module.", RAW), "ema": with_prefix("_orig_mod.module.", EMA)},
    "Lightning": {
        "epoch": 3,
        "state_dict": with_prefix("net.", RAW) | with_prefix("ema_net.", EMA),
        "hyper_parameters": HyperParameters(lr=1e-4, path=Path("x")),
        "optimizer_states": [OPTIMIZER],
    },
    "LDM": {"state_dict": with_prefix("model.diffusion_model.", RAW) | with_prefix("model_ema.", lit_ema(EMA))},
    "EMAModel": {
        "model_state_dict": RAW,
        "ema_state_dict": {"decay": 0.99, "optimization_step": 4, "shadow_params": list(EMA.values())},
    },
    "a list": {"model": RAW, "ema_params": list(EMA.values())},
    "AveragedModel": {"model": RAW, "ema_model": with_prefix("module.", EMA) | {"n_averaged": torch.tensor(3)}},
    "ema-pytorch": {
        "model": RAW,
        "ema": with_prefix("ema_model.", EMA) | with_prefix("online_model.", RAW) | {"initted": torch.tensor(True)},
    },
    "numbers of numpy": {"model": RAW, "ema_model": {k: v.numpy() for k, v in EMA.items()}, "best": np.float32(3)},
    "defaultdict": {"unet": RAW, "unet_ema": EMA, "losses": collections.defaultdict(list, {"val": [1.0]})},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", CONTAINERS)
def test_files_as_trainers_leave_them(name: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(CONTAINERS[name], path, pickle_protocol=protocol)
    report = Report()
    ema, raw = read_networks(Location(path), True, None, (), report)
    assert (ema.kind, ema.is_raw, raw.is_raw) == ("uvit", False, True)
    assert same(ema.tensors, EMA) and same(raw.tensors, RAW)
    assert len(report.read) == 1 and "a U-ViT, the EMA weights, " in report.read[0]
    report = Report()
    (raw,) = read_networks(Location(path), False, None, (), report)
    assert same(raw.tensors, RAW) and "a U-ViT, the raw weights, " in report.read[0]


@pytest.mark.parametrize("name", ["DiT", "Lightning", "LDM", "U-ViT"])
def test_the_same_names_in_safetensors(name: str, tmp_path: Path) -> None:
    torch.save(CONTAINERS[name], tmp_path / "x.pt")
    tensors = {name: value.clone() for name, value in read_weights(tmp_path / "x.pt").tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    ema, raw = read_networks(Location(tmp_path / "x.safetensors"), True, None, (), Report())
    assert same(ema.tensors, EMA) and same(raw.tensors, RAW)


def test_a_whole_module_that_was_pickled(tmp_path: Path) -> None:
    torch.save({"model": tiny_unet(1), "ema": torch.nn.DataParallel(tiny_unet(2))}, tmp_path / "x.pt")
    ema, raw = read_networks(Location(tmp_path / "x.pt"), True, None, (), Report())
    assert same(ema.tensors, EMA) and same(raw.tensors, RAW)


def test_one_set_of_weights_is_taken_under_any_name(tmp_path: Path) -> None:
    torch.save({"ema": EMA, "args": ARGS}, tmp_path / "x.pt")
    (ema,) = read_networks(Location(tmp_path / "x.pt"), True, None, (), Report())
    assert same(ema.tensors, EMA)
    with pytest.raises(UserError, match=rf"^--use_ema False: {tmp_path}/x.pt has EMA weights only \(ema\.\*\)"):
        list(read_networks(Location(tmp_path / "x.pt"), False, None, (), Report()))


def test_ema_weights_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """As the training scripts of diffusers save a checkpoint."""
    for name, seed in (("unet", 1), ("unet_ema", 2)):
        tiny_unet(seed).save_pretrained(tmp_path / name)
    torch.save(OPTIMIZER, tmp_path / "optimizer.bin")
    (location,) = locate(tmp_path)
    ema, raw = read_networks(location, True, None, (), Report())
    assert raw.is_raw and same(dict(sorted(ema.tensors.items())), dict(sorted(EMA.items())))
    (raw,) = read_networks(location, False, None, (), Report())
    assert same(dict(sorted(raw.tensors.items())), dict(sorted(RAW.items())))


def test_of_several_averages_the_raw_weights_can_be_taken(tmp_path: Path) -> None:
    torch.save({"model": RAW, "ema_0.99": EMA, "ema_0.9999": RAW}, tmp_path / "x.pt")
    (raw,) = read_networks(Location(tmp_path / "x.pt"), False, None, (), Report())
    assert same(raw.tensors, RAW)


def test_what_cannot_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for content, said in (
        ({"model": RAW, "ema1": EMA, "ema2": RAW}, r"several networks of one kind \(ema1\.\*, ema2\.\*\)"),
        (
            {"model": RAW, "ema": {k: v for k, v in EMA.items() if "fc1" not in k}},
            r"ema\.\* lacks .*fc1.* --use_ema False takes",
        ),
        ({"ema": {"shadow_params": list(EMA.values())}}, "EMA weights without names"),
        ({"optimizer": OPTIMIZER}, "which are not a U-ViT, a VAE or a CLIP text encoder"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=f"^{path}: .*{said}"):
            list(read_networks(Location(path), True, None, (), Report()))


def test_the_encoders_of_a_whole_checkpoint(tmp_path: Path) -> None:
    """As Stable Diffusion and the VAE's trainer of LDM leave them: another U-Net, a loss, EMA weights, optimizers."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32, layers_per_block=1).state_dict()
    text = CLIPTextModel(CLIPTextConfig(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=1, **IDS))
    tokens = {f"text_model.{name}": value for name, value in text.state_dict().items()}
    both = with_prefix("first_stage_model.", to_ldm(vae, 1)) | with_prefix("cond_stage_model.transformer.", tokens)
    both |= {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), "betas": torch.zeros(9)}
    torch.save({"state_dict": both, "global_step": 3, "callbacks": {type: {"best": Path("x")}}}, tmp_path / "sd.ckpt")
    assert same(load_vae(str(tmp_path / "sd.ckpt")).state_dict(), vae)
    assert same(load_text_encoder(str(tmp_path / "sd.ckpt")).state_dict(), text.state_dict())
    with pytest.raises(UserError, match=r"sd.ckpt: has no unet; it holds: "):
        load_unet(tmp_path / "sd.ckpt")
    ema = {f"model_ema.{name.replace('.', '')}": value * 2 for name, value in to_ldm(vae, 1).items()}
    loss = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.tensor(0.9)}
    torch.save({"state_dict": to_ldm(vae, 1) | ema | loss, "optimizer_states": [OPTIMIZER]}, tmp_path / "vae.ckpt")
    assert same(load_vae(str(tmp_path / "vae.ckpt")).state_dict(), {name: value * 2 for name, value in vae.items()})
    whole = tokens | {"vision_model.x": torch.ones(2), "logit_scale": torch.tensor(1.0)}
    torch.save(with_prefix("module.", whole), tmp_path / "clip.bin")
    assert same(load_text_encoder(str(tmp_path / "clip.bin")).state_dict(), text.state_dict())


# Shards


def save_shards(folder: Path, stem: str, suffix: str, index: bool) -> list[Path]:
    names, paths = list(RAW), []
    weight_map = {}
    for i in range(2):
        part = {name: RAW[name].clone() for name in names[i::2]}
        paths.append(folder / f"{stem}-{i + 1:05d}-of-00002{suffix}")
        weight_map |= dict.fromkeys(part, paths[-1].name)
        save_file(part, paths[-1]) if suffix == ".safetensors" else torch.save(part, paths[-1])
    if index:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_together(suffix: str, index: bool, tmp_path: Path) -> None:
    shards = save_shards(tmp_path, "diffusion_pytorch_model", suffix, index)
    for place in (tmp_path, *shards, *tmp_path.glob("*.index.json")):
        (found,) = read_networks(Location(place), True, None, (), Report())
        assert found.tensors.keys() == RAW.keys() and all(torch.equal(found.tensors[n], RAW[n]) for n in RAW)
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"belongs to 2 files, and {shards[1].name} is missing"):
        list(read_networks(Location(shards[0]), True, None, (), Report()))


@pytest.mark.parametrize("weight_map", ["[]", "{}", '{"a": "../b"}', '{"a": 1}', '{"a": "b"', '{"a": "not-there.bin"}'])
def test_an_index_of_nothing(weight_map: str, tmp_path: Path) -> None:
    (tmp_path / "a.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(UserError, match=f"^{tmp_path}/a.index.json: "):
        list(read_networks(Location(tmp_path / "a.index.json"), True, None, (), Report()))
