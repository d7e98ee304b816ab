"""A checkpoint becomes a pipeline folder with the averaged or the raw weights, or another format; so do others'."""

import json
import resource
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.port import PORT_FOLDER, same
from tests.sample.parts import tiny_pipeline_folder
from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder
from tests.train.conftest import *  # noqa: F403 - the tiny store and runs
from uvit import UViTPipeline
from uvit.checkpoint.folder import training_facts
from uvit.cli.main import main
from uvit.config.convert import ConvertConfig
from uvit.config.model import SAMPLING_KEYS
from uvit.errors import UserError
from uvit.export.convert import convert, write_folder
from uvit.model import UViTT2IModel
from uvit.sample.fit import FITTED_FILE, read_plans, store_plan
from uvit.sample.schedulers import karras_grid, second_order
from uvit.train.trainer import train
from uvit.weights.components import read_components
from uvit.weights.encoders import fingerprint, load_diffusers_vae


@pytest.mark.parametrize(("use_ema", "file"), [(True, "ema"), (False, "weights")])
def test_the_weights_asked_for(use_ema: bool, file: str, tiny_config: Any, tmp_path: Path) -> None:
    train(tiny_config(prediction_type="v_prediction"))
    source, goal = tmp_path / "run" / "checkpoint-3", tmp_path / "pipeline"
    convert(ConvertConfig(str(source), str(goal), use_ema=use_ema))
    pipeline = UViTPipeline.from_pretrained(goal)
    weights = load_file(source / f"{file}.safetensors")
    assert all(torch.equal(value, weights[f"unet.{key}"]) for key, value in pipeline.unet.state_dict().items())
    assert pipeline.config.prediction_type == "v_prediction" and pipeline.config.latent_scale == 0.5
    images = pipeline("a red circle", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_nothing_is_replaced_unasked(tiny_config: Any, tmp_path: Path, encoders: tuple[Path, Path]) -> None:
    train(tiny_config(max_steps=1))
    source, goal = str(tmp_path / "run" / "checkpoint-1"), tmp_path / "pipeline"
    convert(ConvertConfig(source, str(goal), vae_name_or_path=str(encoders[0])))
    with pytest.raises(UserError, match="--overwrite"):
        convert(ConvertConfig(source, str(goal)))
    convert(ConvertConfig(source, str(goal), overwrite=True))
    assert (tmp_path / "pipeline.old1" / "model_index.json").is_file()


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no weights"):
        convert(ConvertConfig(str(tmp_path), str(tmp_path / "pipeline")))
    (tmp_path / "uvit.json").write_text("{}")
    with pytest.raises(UserError, match="is not of the checkpoint format"):
        convert(ConvertConfig(str(tmp_path), str(tmp_path / "pipeline")))


def test_encoders_must_be_those_of_the_features(tiny_config: Any, tmp_path: Path) -> None:
    """But for a VAE that is named when converting: one with a better decoder may fit as well."""
    vae = tiny_vae_folder(tmp_path / "vae", seed=1)
    encoder = tiny_text_encoder_folder(tmp_path / "text", seed=1)
    with pytest.raises(UserError, match=f"--vae_name_or_path {vae}: is not the one that made the features"):
        train(tiny_config(max_steps=1, vae_name_or_path=str(vae)))
    assert not (tmp_path / "run").exists()
    assert train(tiny_config(max_steps=1)) == 0
    source, goal = str(tmp_path / "run" / "checkpoint-1"), tmp_path / "pipeline"
    convert(ConvertConfig(source, str(goal), vae_name_or_path=str(vae)))
    assert training_facts(goal)["vae_sha256"] == fingerprint(load_diffusers_vae(str(vae)))
    with pytest.raises(UserError, match=f"--text_encoder_name_or_path {encoder}: is not the one"):
        convert(ConvertConfig(source, str(goal), overwrite=True, text_encoder_name_or_path=str(encoder)))


FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0.1"


@pytest.mark.parametrize("given", [(), ("vae_name_or_path",)])
def test_after_training_on_features_without_encoders_the_printed_command_writes_the_pipeline(
    given: tuple[str, ...], tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(FIXTURES / "run" / "pipeline")
    tiny = {"vae_name_or_path": str(FIXTURES / "vae"), "text_encoder_name_or_path": text, "tokenizer_name": text}
    npy = {"feature_path": str(FIXTURES / "npy"), "uvit_config_file": str(FIXTURES / "model.json"), "max_steps": 1}
    assert train(tiny_config(**npy, **{flag: tiny[flag] for flag in given})) == 0
    *_, sentence, command = capsys.readouterr().out.splitlines()
    assert sentence.startswith("trained. The `.npy` features do not say which encoders made them")
    usual = "openai/clip-vit-large-patch14" if given else "Stable Diffusion's VAE and openai/clip-vit-large-patch14"
    assert f" are made with {usual}. " in sentence
    _, *words = shlex.split(command)
    assert words[:3] == ["convert", str(tmp_path / "run" / "checkpoint-1"), str(tmp_path / "run" / "pipeline")]
    assert [word for word in words if word.startswith("--")] == [f"--{flag}" for flag in tiny if flag not in given]
    flags = " .*".join(f"--{flag}" for flag in tiny if flag not in given)
    with pytest.raises(UserError, match=f"does not record which encoders made its features; .* {flags}"):
        convert(ConvertConfig(words[1], words[2]))
    for i, word in enumerate(words):
        if word.startswith("--"):
            words[i + 1] = tiny[word[2:]]
    assert main(words) == 0
    pipeline = UViTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline("a red circle", num_inference_steps=2, output_type="np").images.ndim == 4


def test_every_format_of_a_checkpoint(tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The U-ViT comes back from each, bit for bit; a pipeline has its card."""
    train(tiny_config(max_steps=1))
    run = tmp_path / "run"
    source = str(run / "checkpoint-1")
    with pytest.raises(UserError, match=f"is a run folder; give one of its checkpoints, such as {source}"):
        convert(ConvertConfig(str(run), str(tmp_path / "none")))
    wanted = {name: load_file(run / "checkpoint-1" / f"{name}.safetensors") for name in ("ema", "weights")}
    config = tmp_path / "unet.json"
    formats: list[Any] = ["official", "paddle", "pipeline", "diffusers"]
    for to in formats:
        convert(ConvertConfig(source, str(tmp_path / to), to))
        if to == "pipeline":
            card = (tmp_path / to / "README.md").read_text()
            assert "| steps | 1 |" in card and str(tmp_path) not in card
    pipeline = UViTPipeline.from_pretrained(tmp_path / "pipeline")
    config.write_text(json.dumps({key: value for key, value in pipeline.unet.config.items() if key[0] != "_"}))
    for to in formats:
        found = read_components(tmp_path / to, config_file=str(config)).unet if to != "pipeline" else pipeline.unet
        assert all(torch.equal(value, wanted["ema"][f"unet.{name}"]) for name, value in found.state_dict().items()), to
    raw = read_components(tmp_path / "official", config_file=str(config)).raw_unet
    assert raw is not None and all(torch.equal(value, wanted["weights"][f"unet.{name}"]) for name, value in raw.items())
    assert "for the official U-ViT code: UViT(img_size=" in capsys.readouterr().out
    assert read_components(tmp_path / "official").vqvae.config["norm_num_groups"] == 4
    convert(ConvertConfig(source, str(tmp_path / "raw"), "official", use_ema=False))
    assert sorted(path.name for path in (tmp_path / "raw").glob("*.pth")) == ["autoencoder_kl.pth", "nnet.pth"]
    with pytest.raises(UserError, match=r"--vae_name_or_path \./nowhere: no such file or folder"):
        convert(ConvertConfig(source, str(tmp_path / "none"), "official", vae_name_or_path="./nowhere"))
    record = json.loads((run / "checkpoint-1" / "uvit.json").read_text())
    (run / "checkpoint-1" / "uvit.json").write_text(json.dumps(record | {"vae": None, "record_sha256": ""}))
    convert(ConvertConfig(source, str(tmp_path / "without"), "official"))
    assert "dropped: the VAE: --vae_name_or_path: the checkpoint does not record" in capsys.readouterr().out
    assert not (tmp_path / "without" / "autoencoder_kl.pth").exists()
    assert "_name_or_path" not in (tmp_path / "pipeline" / "vqvae" / "config.json").read_text()


def test_others_pipelines_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A port folder becomes a pipeline that draws the same; with a VAE from elsewhere; and a U-ViT alone."""
    port, ours = str(PORT_FOLDER), tmp_path / "ours"
    convert(ConvertConfig(port, str(ours)))
    drawn = []
    for folder in (port, str(ours)):
        pipeline = UViTPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        seeded = torch.Generator().manual_seed(0)
        drawn.append(pipeline("the bus", num_inference_steps=2, output_type="pt", generator=seeded).images)
        assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert torch.equal(*drawn)
    report = json.loads((ours / "conversion.json").read_text())
    assert report["defaulted"] and "read: " in capsys.readouterr().out
    convert(ConvertConfig(port, str(tmp_path / "right"), conventions="trained", vae_name_or_path=f"{port}/vqvae"))
    said = UViTPipeline.from_pretrained(tmp_path / "right").config
    assert (said.latent_scale, said.timestep_labels) == (0.23010, "1..1000")
    convert(ConvertConfig(f"{port}/unet", str(tmp_path / "alone")))
    again = UViTT2IModel.from_pretrained(tmp_path / "alone", subfolder="unet", use_safetensors=True)
    assert (
        torch.equal(again.pos_embed, pipeline.unet.pos_embed)
        and "which is not yet a pipeline: that also needs vqvae" in capsys.readouterr().out
    )
    for flags, refused in (
        ({"use_ema": False}, "--use_ema False"),
        ({"uvit_config_file": "x"}, "--uvit_config_file x"),
    ):
        with pytest.raises(UserError, match=refused):
            convert(ConvertConfig(str(ours), str(tmp_path / "none"), **flags))
    convert(ConvertConfig(str(ours), str(tmp_path / "later"), conventions="trained"))
    assert UViTPipeline.from_pretrained(tmp_path / "later").config.timestep_labels == "1..1000"
    back = tmp_path / "back"
    convert(ConvertConfig(str(ours), str(back), "port", "pdparams"))
    assert read_components(back).conventions == read_components(PORT_FOLDER).conventions


def test_what_cannot_be_made_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    port, goal = str(PORT_FOLDER), str(tmp_path / "goal")
    with pytest.raises(UserError, match="has no U-ViT, and --to official needs one"):
        convert(ConvertConfig(f"{port}/vqvae", goal, "official"))
    with pytest.raises(UserError, match="--to diffusers: needs a complete pipeline; pass --vae_name_or_path, --text"):
        convert(ConvertConfig(f"{port}/unet", goal, "diffusers"))
    with pytest.raises(UserError, match=r"--use_ema False: .* has EMA weights only"):
        ema = tmp_path / "ema"
        ema.mkdir()
        shutil.copy(PORT_FOLDER / "unet" / "diffusion_paddle_model.safetensors", ema / "unet_ema.safetensors")
        convert(ConvertConfig(str(ema), goal, use_ema=False))
    shutil.rmtree(ema)
    with pytest.raises(UserError, match="--to trainer: the PaddleMIX trainer has no"):
        convert(ConvertConfig(port, goal, "trainer"))
    assert list(tmp_path.iterdir()) == []


# A pipeline of ours


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a VAE that only a config tells, a latent scale of its own, and a fitted solver."""
    folder = tiny_pipeline_folder(tmp_path_factory.mktemp("ours"), "v_prediction")
    store_plan(folder, replace(second_order(karras_grid(4)), guidance=(2.0, 1.0, 1000.0)))
    return folder


def test_a_file_whose_name_says_which_weights_it_has_keeps_that_name(ours: Path, tmp_path: Path) -> None:
    """nnet.pth and nnet_ema.pth of the official code, given alone."""
    convert(ConvertConfig(str(ours), str(tmp_path / "files"), "official"))
    ema = tmp_path / "files" / "nnet_ema.pth"
    raw = ema.rename(tmp_path / "nnet_ema.pth").with_name("nnet.pth")
    shutil.copy(raw.with_name("nnet_ema.pth"), raw)
    for file in (raw, raw.with_name("nnet_ema.pth")):
        config = str(tmp_path / "files" / "unet.json")
        convert(ConvertConfig(str(file), str(tmp_path / f"{file.stem}-out"), "official", uvit_config_file=config))
        assert [path.name for path in (tmp_path / f"{file.stem}-out").glob("nnet*")] == [file.name]
    with pytest.raises(UserError, match=r"--use_ema False: .*nnet_ema.pth has EMA weights only"):
        convert(ConvertConfig(str(raw.with_name("nnet_ema.pth")), str(tmp_path / "no"), "official", use_ema=False))


def test_through_the_official_codes_files_and_back(ours: Path, tmp_path: Path) -> None:
    files, back = tmp_path / "files", tmp_path / "back"
    convert(ConvertConfig(str(ours), str(files), "official"))
    encoders = {"text_encoder_name_or_path": str(ours), "tokenizer_name": str(ours)}
    convert(ConvertConfig(str(files), str(back), **encoders))
    one, two = UViTPipeline.from_pretrained(ours), UViTPipeline.from_pretrained(back)
    assert one.config.latent_scale == two.config.latent_scale and two.config.prediction_type == "v_prediction"
    for name in ("unet", "vqvae"):
        assert same(getattr(one, name).state_dict(), getattr(two, name).state_dict())
    for key in ("norm_num_groups", "scaling_factor", "block_out_channels", "mid_block_add_attention"):
        assert one.vqvae.config[key] == two.vqvae.config[key], key


def test_networks_alone_are_taken_where_the_docs_say(ours: Path, tmp_path: Path) -> None:
    vae, again = tmp_path / "vae", tmp_path / "again"
    convert(ConvertConfig(str(ours / "vqvae"), str(vae)))
    convert(ConvertConfig(str(vae), str(again)))
    assert fingerprint(load_diffusers_vae(str(again))) == fingerprint(load_diffusers_vae(str(ours)))
    convert(ConvertConfig(str(ours), str(tmp_path / "whole"), vae_name_or_path=str(vae)))
    with pytest.raises(UserError, match=f"--uvit_config_file uvit_t2i_small: {vae} has no U-ViT"):
        convert(ConvertConfig(str(vae), str(tmp_path / "none"), uvit_config_file="uvit_t2i_small"))


def test_fitted_solvers_go_along_or_are_reported(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to: Any
    for i, (source, to) in enumerate([(ours, "pipeline"), (ours, "diffusers"), (tmp_path / "1", "pipeline")]):
        convert(ConvertConfig(str(source), str(tmp_path / str(i)), to))
        assert read_plans(tmp_path / str(i)) == read_plans(ours)
        said = capsys.readouterr()
        assert str(FITTED_FILE) not in said.out and said.err == ""
    convert(ConvertConfig(str(ours), str(tmp_path / "paddle"), "paddle"))
    assert f"dropped: {FITTED_FILE}: the solvers fitted to this model" in capsys.readouterr().out
    index = json.loads((tmp_path / "0" / "model_index.json").read_text())
    port = index | {"timestep_labels": "0..999", "latent_scale": 0.18215}
    (tmp_path / "0" / "model_index.json").write_text(json.dumps(port))
    with pytest.raises(UserError, match=r"latent_scale is 0\.18215 here, but 0\.7 in the U-ViT's own config"):
        convert(ConvertConfig(str(tmp_path / "0"), str(tmp_path / "trained"), conventions="trained"))
    unet = tmp_path / "0" / "unet" / "config.json"
    own = json.loads(unet.read_text())
    unet.write_text(json.dumps(own | {key: port[key] for key in SAMPLING_KEYS if key in port}))
    convert(ConvertConfig(str(tmp_path / "0"), str(tmp_path / "trained"), conventions="trained"))
    assert f"dropped: {FITTED_FILE}" in capsys.readouterr().out and not (tmp_path / "trained" / FITTED_FILE).exists()


def test_a_graph_has_its_conventions_beside_it(ours: Path, tmp_path: Path) -> None:
    convert(ConvertConfig(str(ours), str(tmp_path / "graph"), "export"))
    index = json.loads((ours / "unet" / "config.json").read_text())
    said = json.loads((tmp_path / "graph" / "uvit_conventions.json").read_text())
    assert said == {key: index[key] for key in SAMPLING_KEYS}


DAMAGE = {"cut": "not complete", "no vqvae": "it has no vqvae", "no json": "not a valid JSON", "nan": "norm.bias holds"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pipeline_is_one_sentence(ours: Path, tmp_path: Path, damage: str) -> None:
    source = shutil.copytree(ours, tmp_path / "source")
    weights = source / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no vqvae":
        shutil.rmtree(source / "vqvae")
    elif damage == "no json":
        (source / "unet" / "config.json").write_text("{")
    else:
        arrays = load_file(weights)
        arrays["norm.bias"][0] = torch.nan
        save_file(arrays, weights, {"format": "pt"})
    with pytest.raises(UserError, match=rf"^{source}\b.*{DAMAGE[damage]}"):
        convert(ConvertConfig(str(source), str(tmp_path / "goal")))
    assert list(tmp_path.iterdir()) == [source]


def test_parts_that_do_not_fit(ours: Path, tmp_path: Path) -> None:
    text = str(tiny_text_encoder_folder(tmp_path / "text", width=16))
    for to in ("pipeline", "port"):
        with pytest.raises(
            UserError, match=f"^{ours}: the components do not fit together: the text embeddings are 16 wide"
        ):
            convert(ConvertConfig(str(ours), str(tmp_path / "goal"), to, text_encoder_name_or_path=text))  # type: ignore[arg-type]


# Places that cannot be written


def test_a_place_below_a_file(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    goal = tmp_path / "file" / "goal"
    with pytest.raises(UserError, match=f"^{goal}: cannot be written .*; fix that, or choose another folder"):
        convert(ConvertConfig(str(ours), str(goal)))


@pytest.mark.parametrize("to", ["pipeline", "official", "paddle", "export"])
def test_a_full_disk(to: Any, ours: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=f"^{tmp_path / 'goal'}: cannot be written"):
            convert(ConvertConfig(str(ours), str(tmp_path / "goal"), to))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_ours_keep_their_traceback(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        write_folder(tmp_path / "goal", False, write)
    assert list(tmp_path.iterdir()) == []


def test_what_a_folder_says_of_its_training(tmp_path: Path) -> None:
    assert training_facts(tmp_path) == {}
    (tmp_path / "training.json").write_text("[1]")
    assert training_facts(tmp_path) == {}
