"""Every spelling of a flag means one thing; every mistake gets one sentence."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from uvit.cli.help import show_help
from uvit.cli.main import COMMANDS, _load, main
from uvit.cli.other_names import OTHER_FLAGS
from uvit.cli.parse import flags_of, parse
from uvit.config.train import TrainConfig
from uvit.errors import UserError
from uvit.io import to_yaml


@dataclass(frozen=True)
class Config:
    """Do a thing."""

    name: str
    """Its name."""
    size: int = 4
    """Its size."""
    rate: float = 0.5
    """Its rate."""
    kind: Literal["round", "square"] = "round"
    """Its kind."""
    loud: bool = False
    """Say so."""
    quick: bool = True
    """Be quick."""
    limit: int | None = None
    """At most so many."""
    words: tuple[str, ...] = ()
    """What it says."""
    span: tuple[float, float] = (0, 1)
    """From where to where."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UserError(f"--size {self.size}: must not be negative; the smallest size there is, in any case, is 0")


def read(*arguments: str, positional: tuple[str, ...] = ()) -> Config:
    config, print_config = parse(Config, ["--name", "n", *arguments], prog="uvit thing", positional=positional)
    assert not print_config
    return config


def complaint(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    "arguments", [["--size", "7"], ["--size=7"], ["--size", "3", "--size", "7"], ["--size=3", "--size=7"]]
)
def test_values(arguments: list[str]) -> None:
    assert read(*arguments) == Config("n", size=7)


@pytest.mark.parametrize(
    ("arguments", "loud"),
    [
        (["--loud"], True),
        (["--loud", "True"], True),
        (["--loud=true"], True),
        (["--loud", "1"], True),
        (["--loud", "yes"], True),
        (["--loud", "--no_loud"], False),
        (["--loud", "--no-loud"], False),
        (["--loud", "--loud", "False"], False),
        (["--loud=false"], False),
        (["--loud", "0"], False),
    ],
)
def test_booleans_in_their_spellings(arguments: list[str], loud: bool) -> None:
    assert read(*arguments).loud is loud
    assert read(*arguments, "--size", "7").size == 7


def test_a_default_of_true_can_be_denied() -> None:
    assert read().quick
    assert not read("--no_quick").quick
    assert not read("--quick", "False").quick


def test_dashes_serve_for_underscores() -> None:
    assert parse(Config, ["--name", "n", "--print-config"], prog="uvit thing")[1]


def test_optional_many_and_negative_values() -> None:
    assert read("--limit", "3").limit == 3
    assert read("--limit", "3", "--limit", "None").limit is None
    assert read("--words", "a b", "c", "--size", "7") == Config("n", size=7, words=("a b", "c"))
    assert read("--rate", "-1").rate == -1
    assert read("--rate=1e-4").rate == 1e-4
    assert read("--words=-dash").words == ("-dash",)
    assert read("--name=--odd").name == "--odd"
    assert read("--span", "-1", "-0.5").span == (-1, -0.5)
    assert read("--words").words == ()


def test_positional_words_belong_to_the_fields_that_take_them() -> None:
    config, _ = parse(Config, ["it", "--size", "7", "--loud", "a b", "c"], prog="x", positional=("name", "words"))
    assert config == Config("it", size=7, loud=True, words=("a b", "c"))
    assert parse(Config, ["it", "--", "-dash"], prog="x", positional=("name", "words"))[0].words == ("-dash",)
    with pytest.raises(UserError, match=r"^'b' and --words: are both given, and mean the same; give one of them$"):
        parse(Config, ["--words", "a", "--loud", "it", "b"], prog="x", positional=("name", "words"))


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files_count_where_they_stand(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"config.{suffix}"
    content = {
        "size": 7,
        "rate": 1e-4,
        "loud": True,
        "quick": "no",
        "limit": None,
        "words": ["a", "b"],
        "kind": "square",
    }
    path.write_text(json.dumps(content))  # JSON is YAML
    wanted = Config("n", 7, 1e-4, "square", True, False, None, ("a", "b"))
    assert read("--config", str(path)) == wanted
    assert read("--size", "1", f"--config={path}").size == 7
    assert read("--config", str(path), "--size", "1", "--no_loud").size == 1
    second = tmp_path / "second.yaml"
    second.write_text("rate: 2e-4\n")
    assert read("--config", str(path), "--config", str(second)).rate == 2e-4


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda x: x.strip("-") != ""
)


@settings(max_examples=25, deadline=None)
@given(
    config=st.builds(
        Config,
        name=texts,
        size=st.integers(0, 10**9),
        rate=st.floats(allow_nan=False, allow_infinity=False),
        kind=st.sampled_from(["round", "square"]),
        loud=st.booleans(),
        quick=st.booleans(),
        limit=st.none() | st.integers(),
        words=st.lists(texts.filter(lambda x: not x.startswith("-")), max_size=3).map(tuple),
    )
)
def test_a_printed_config_reads_back_to_itself(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert parse(Config, ["--config", str(path)], prog="uvit thing") == (config, False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--szie", "3"], "there is no flag --szie; did you mean --size?"),
        (["--banana"], "there is no flag --banana; --help lists all flags"),
        (["--no_size"], "there is no flag --no_size; did you mean --size?"),
        (["--size"], "--size needs a value"),
        (["--size", "--loud"], "--size needs a value"),
        (["--size", "big"], "--size big: must be a whole number"),
        (["--limit", "1.5"], "--limit 1.5: must be a whole number"),
        (["--rate", "fast"], "--rate fast: must be a number"),
        (["--span", "1"], "--span 1: must be 2 values, each a number"),
        (["--kind", "oval"], "--kind oval: must be one of round, square"),
        (["--loud=maybe"], "--loud maybe: must be True or False"),
        (["--size", "-3"], "--size -3: must not be negative; the smallest size there is, in any case, is 0"),
        (["stray"], "'stray' belongs to no flag; flags begin with --, and a value follows its flag"),
        (["--config"], "--config needs a value"),
        (["--span", "1", "2", "3"], "--span 1 2 3: must be 2 values, each a number"),
        (["--print_config=maybe"], "--print_config maybe: must be True or False"),
        (["-o", "x"], "'-o' is no flag; flags begin with --, and -- alone goes before words with a dash"),
        (["--words", "a", "-b"], "--words -b: where several values are given, none may begin with a dash"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], sentence: str) -> None:
    assert complaint(*arguments) == sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gradient-checkpointing", "True"], "there is no flag --gradient_checkpointing; use --recompute"),
        (["--data_parallel_degree", "2"], "there is no flag --data_parallel_degree; use --dp_degree"),
        (["--load_best_model_at_end"], "there is no flag --load_best_model_at_end; use --keep_best METRIC"),
        (["--workdir=w"], "there is no flag --workdir; use --output_dir"),
        (["--config.train.n_steps=100"], "there is no flag --config.train.n_steps; use --max_steps"),
        (
            ["--config.lr_scheduler.warmup_steps=1"],
            "there is no flag --config.lr_scheduler.warmup_steps; use --warmup_steps",
        ),
        (["--report_to", "visualdl"], "--report_to visualdl: use tensorboard, or leave --report_to out"),
        (["--device", "gpu"], "--device gpu: use cuda, or leave --device out"),
        (["--max_steps", "-1"], "--max_steps -1: leave --max_steps out"),
        (
            ["--config.nnet.depth=16"],
            "there is no flag --config.nnet.depth; the model is in the JSON file or the preset that --uvit_config_file"
            " names",
        ),
        (
            ["--config.banana=16"],
            "there is no flag --config.banana; docs/migrating.md lists the flag for each key of the official configs",
        ),
        (
            ["--config=configs/mscoco_uvit_small.py"],
            "--config configs/mscoco_uvit_small.py: is a Python config of the official code; docs/migrating.md lists"
            " the flag for each key",
        ),
    ],
)
def test_what_other_programs_call_otherwise_gets_the_name_here(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse(TrainConfig, ["--feature_path", "F", "--output_dir", "O", *arguments], prog="uvit train")
    assert str(error.value) == sentence


def test_hints_name_flags_that_exist() -> None:
    flags = {field.name for command in COMMANDS.values() for field in dataclasses.fields(_load(command.config))}
    named = {flag for hint in OTHER_FLAGS.values() for flag in re.findall(r"--(\w+)", hint)}
    assert named <= flags
    assert not {name for name in OTHER_FLAGS if name in flags_of(TrainConfig)}


def test_what_is_required_is_named() -> None:
    with pytest.raises(UserError, match=r"^--name must be given; `uvit thing --help` lists all flags$"):
        parse(Config, ["--size", "3"], prog="uvit thing")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.yaml", "szie: 3", "there is no flag --szie; did you mean --size?"),
        ("a.yaml", "size: {a: 1}", "size holds a dict; it takes one value"),
        ("a.yaml", "size: [1, 2]", "size holds a list; it takes one value"),
        ("a.yaml", "size: null", "size is empty; give it a value, or leave it out"),
        ("a.yaml", "[1, 2]", "must map flags to values, and holds list"),
        ("a.yaml", "size: 1\nsize: 2", "is not valid YAML (size is there twice)"),
        ("a.json", '{"size": 1, "size": 2}', "is not valid JSON (size is there twice)"),
        ("a.yaml", "[" * 5000, "is not valid YAML ("),
        ("a.yaml", "size: {{ size }}", "is not valid YAML ("),
        ("a.yaml", "{{size}}: 1", "is not valid YAML ("),
        ("a.json", "[" * 100_000, "is not valid JSON ("),
        ("a.yaml", "a: b: c", "is not valid YAML ("),
        ("a.json", "{", "is not valid JSON ("),
        ("a.json", None, "cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_in_files_name_the_file(tmp_path: Path, name: str, content: str | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert complaint("--config", str(path)).startswith(f"--config {path}: {reason}")


def test_a_file_says_what_a_command_line_says(tmp_path: Path) -> None:
    """YAML would make other values of these."""
    path = tmp_path / "a.yaml"
    for text in ("007", "1_000", "no", "on", "1:30", "0x10", "2026-11-28", "1e3", ".5", "1.50"):
        path.write_text(f"# a path\noutput_dir: {text}\nfeature_path: F\n", encoding="utf-8")
        found, _ = parse(TrainConfig, ["--config", str(path)], prog="uvit train")
        assert found.output_dir == text
    path.write_text("max_steps: 010\nuse_ema: no\nlearning_rate: 1e-3\nvae_name_or_path: null\n", encoding="utf-8")
    words = ["--feature_path", "F", "--output_dir", "O", "--config", str(path)]
    found, _ = parse(TrainConfig, words, prog="uvit train")
    assert (found.max_steps, found.use_ema, found.learning_rate, found.vae_name_or_path) == (10, False, 1e-3, None)
    path.write_text("<<: {seed: 3}\nmax_steps: 5\n", encoding="utf-8")
    found, _ = parse(TrainConfig, words, prog="uvit train")
    assert (found.max_steps, found.seed) == (5, 3)
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert parse(TrainConfig, words, prog="uvit train")[0] == parse(TrainConfig, words[:4], prog="uvit train")[0]
    path.write_text("max_steps: 1\nmax-steps: 2\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^--config {path}: max_steps is there twice; remove one$"):
        parse(TrainConfig, words, prog="uvit train")


def test_a_preset_is_read_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--learning_rate", "1", "--config", "emoji", "--feature_path", "F", "--output_dir", "O", "--seed", "3"]
    config, _ = parse(TrainConfig, words, prog="uvit train")
    assert (config.uvit_config_file, config.learning_rate, config.seed) == ("uvit_modern_emoji", 1e-3, 3)
    assert main(["train", *words, "--print_config"]) == 0
    assert set(yaml.safe_load(capsys.readouterr().out)) == {field.name for field in dataclasses.fields(TrainConfig)}
    with pytest.raises(UserError, match=r"^--config emojis: .*did you mean emoji\?"):
        parse(TrainConfig, ["--config", "emojis"], prog="uvit train")


def test_a_files_values_are_checked_as_flags_are(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("size: big")
    assert complaint("--config", str(tmp_path / "a.yaml")) == "--size big: must be a whole number"


def test_help_shows_every_flag_with_its_text_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    show_help(Config, "uvit thing", positional=("name",))
    text = capsys.readouterr().out
    for part in ("usage: uvit thing NAME ", "Do a thing.", "--size INT", "Its size. (default: 4)", "{round,square}"):
        assert part in text


def test_parsing_loads_no_torch() -> None:
    code = (
        "import sys; from uvit.cli.parse import parse; from uvit.config.bench import BenchConfig;"
        "parse(BenchConfig, [], prog='x'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OLD_COMMAND_LINE = """
--do_train --feature_path F --output_dir O --per_device_train_batch_size 32 --gradient_accumulation_steps 1
--learning_rate 0.0002 --weight_decay 0.03 --adam_beta1 0.9 --adam_beta2 0.9 --max_steps 1000000
--lr_scheduler_type "constant_with_warmup" --warmup_steps 5000 --image_logging_steps -1 --logging_steps 50
--save_steps 5000 --seed 1234 --dataloader_num_workers 8 --max_grad_norm -1
--uvit_config_file config/uvit_t2i_small.json --num_inference_steps 50 --model_max_length 77 --use_ema True
--overwrite_output_dir True --disable_tqdm True --recompute True --fp16 True --fp16_opt_level=O1
--enable_xformers_memory_efficient_attention True --dp_degree 1 --tensor_parallel_degree 1
--sharding_parallel_degree 1 --pipeline_parallel_degree 1
"""


def test_the_command_line_that_people_come_with() -> None:
    config, _ = parse(TrainConfig, shlex.split(OLD_COMMAND_LINE), prog="uvit train")
    assert config == TrainConfig(
        "F",
        "O",
        image_logging_steps=-1,
        uvit_config_file="config/uvit_t2i_small.json",
        model_max_length=77,
        overwrite_output_dir=True,
        disable_tqdm=True,
        recompute=True,
        fp16=True,
        enable_xformers_memory_efficient_attention=True,
    )
