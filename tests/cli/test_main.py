"""The commands: how they are found and explained, and how their failures are reported."""

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import uvit
from uvit.cli import main as cli
from uvit.cli.main import COMMANDS, IN_PROCESSES, main
from uvit.cli.parse import flags_of

LOADS_TORCH = """
import contextlib, sys
from uvit.cli.main import main
with contextlib.suppress(SystemExit):
    main({arguments})
sys.exit(bool({{"torch", "diffusers"}} & set(sys.modules)))
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["train", "--help"], ["bench", "--print_config"]])
def test_no_torch_before_there_is_work(arguments: list[str]) -> None:
    result = python(LOADS_TORCH.format(arguments=arguments))
    assert (result.returncode, result.stderr) == (0, "")


def test_importing_the_package_loads_no_torch_and_its_public_names_do() -> None:
    result = python(
        "import sys, uvit; assert 'torch' not in sys.modules;uvit.UViTT2IModel; sys.exit('torch' not in sys.modules)"
    )
    assert (result.returncode, result.stderr) == (0, "")
    with pytest.raises(AttributeError, match="has no attribute 'banana'"):
        uvit.banana  # noqa: B018


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and command.summary in text for name, command in COMMANDS.items())
    assert all(f"{group}:\n" in text for group in ("Begin", "Prepare data", "Train", "Use a model", "Other"))
    assert "Begin with `uvit demo`, or with `uvit extract`, then `uvit train`, then `uvit sample`." in text
    assert max(map(len, text.splitlines())) <= 90
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{uvit.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for field in dataclasses.fields(cli._load(COMMANDS[name].config)):
        assert f"--{field.name}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_something_to_run(name: str) -> None:
    command = COMMANDS[name]
    assert callable(cli._load(command.run))
    assert set(command.positional) <= {field.name for field in dataclasses.fields(cli._load(command.config))}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_typo_in_any_command_is_one_sentence_and_status_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--banana", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"uvit {name}: error: there is no flag --banana; --help lists all flags\n"


def test_a_wrong_command_is_one_sentence_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean `uvit train`?" in capsys.readouterr().err
    assert main(["--local-rank=0", "train"]) == 2  # of torch.distributed.launch
    assert "there is no flag --local-rank=0; start the processes with torchrun" in capsys.readouterr().err
    assert main(["banana"]) == 2
    assert f"the commands are {', '.join(COMMANDS)}" in capsys.readouterr().err


def test_what_one_process_does_is_not_done_by_several(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["tokenizer", "--source", "shapes", "--output_dir", "/nowhere"]) == 2
    assert capsys.readouterr().err == "uvit tokenizer: error: runs in one process; start it without torchrun\n"
    assert {*IN_PROCESSES} < {*COMMANDS}


@pytest.mark.parametrize("arguments", [["features"], ["features", "--help"]])
def test_a_group_of_commands_lists_them(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "  features merge " in text
    assert "autoencoder" not in text


def test_a_wrong_command_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", "verfy"]) == 2
    assert "did you mean `uvit features verify`?" in capsys.readouterr().err


def test_no_traceback_for_users_from_outside() -> None:
    command = [
        sys.executable,
        "-m",
        "uvit",
        "bench",
        "--uvit_config_file",
        "nowhere.json",
        "--batch_size",
        "1",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("uvit bench: error: --uvit_config_file nowhere.json: is neither a file nor ")
    assert result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, arguments: list[str]) -> int:
        raise ValueError("ours")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(ValueError, match="ours"):
        main(["bench"])


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (errno.EROFS, "/mnt/x", "/mnt/x: Read-only file system; fix that, or choose another path"),
        (errno.ENOSPC, None, "No space left on device; fix that, or choose another path"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, name: str | None, message: str
) -> None:
    def full(command: str, arguments: list[str]) -> int:
        raise OSError(code, os.strerror(code), name)

    monkeypatch.setattr(cli, "_run", full)
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == f"uvit bench: error: {message}\n"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no files")
def test_a_folder_that_takes_no_files_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["tokenizer", "--source", "shapes"],
        ["autoencoder", "--source", "shapes", "--resolution", "32", "--factor", "4"],
    ):
        assert main([*command, "--output_dir", "/proc/uvit"]) == 2
        assert "/proc/" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_a_file_that_is_not_there_and_no_mistake_of_a_person_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_run", lambda *_: Path("absent").read_text())
    with pytest.raises(FileNotFoundError):
        main(["bench"])


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(name: str, arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stopped)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "\nuvit bench: stopped\n"


def test_print_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--batch_size", "3", "--compile", "--print_config"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(first)
    assert main(["bench", "--config", str(tmp_path / "config.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == first


OUT_OF_RANGE = ["nan", "inf", "-inf", str(2**63), str(-(2**63) - 1), str(10**400)]


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_out_of_range_are_one_sentence_in_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_of(cli._load(COMMANDS[name].config))
    for flag in flags.values():
        if flag.kind not in (int, float):
            continue
        required = [f"--{other.name}=1" for other in flags.values() if other.required and other != flag]
        for value in OUT_OF_RANGE if flag.kind is int else OUT_OF_RANGE[:3]:
            words = [*name.split(), *required, f"--{flag.name}", *[value] * (flag.count or 1), "--print_config"]
            assert main(words) == 2, words
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith(f"uvit {name}: error: --{flag.name} {value}"), err
            assert err.count("\n") == 1


def test_too_little_memory_is_one_sentence(tmp_path: Path) -> None:
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)); "
    call = "from uvit.cli.main import main; sys.exit(main(['bench', '--matmul_size', '65536', '--device', 'cpu']))"
    words = [sys.executable, "-c", limit + call]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("uvit bench: error: there is too little memory (") and done.stderr.count("\n") == 1
    assert "; make the batches smaller, or" in done.stderr


def test_a_gpu_without_memory_left_names_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_full(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79")

    monkeypatch.setattr("uvit.bench.run.bench", is_full)
    assert main(["bench", "--batch_size", "64"]) == 2
    assert capsys.readouterr().err == (
        "uvit bench: error: there is too little memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a "
        "total capacity of 79); pass --batch_size 32 or less, or make the images or the model smaller\n"
    )
