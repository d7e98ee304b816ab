"""A file or a pipe gets plain lines, a terminal a bar; and no command prints the bars of libraries."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.sample.parts import tiny_pipeline_folder
from uvit.progress import Progress, duration, is_terminal, write


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_line_every_ten_seconds_and_one_at_the_end(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("extract", 41_000, "pair", done=12_000, clock=clock) as progress:
        for seconds, pairs in ((30, 500), (5, 1000), (4, 1000), (1, 300), (10, 26_200)):
            clock.now += seconds
            progress.update(pairs)
        clock.now += 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "extract: 12,500/41,000 pairs (30%), 16.7 pairs/s, 0:28:30 left",  # with the start-up, as yet
        "extract: 14,800/41,000 pairs (36%), 230 pairs/s, 0:01:54 left",
        "extract: 41,000/41,000 pairs (100%), 1,295 pairs/s, took 0:00:52",
    ]


def test_without_a_total(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("extract", None, "pair", clock=clock) as progress:
        for _ in range(3):
            clock.now += 10
            progress.update(2)
    assert capfd.readouterr().err.splitlines() == [
        "extract: 2 pairs, 0.2 pairs/s, 0:00:10 so far",
        "extract: 4 pairs, 0.2 pairs/s, 0:00:20 so far",
        "extract: 6 pairs, 0.2 pairs/s, 0:00:30 so far",
        "extract: 6 pairs, 0.2 pairs/s, took 0:00:30",
    ]


def test_bytes_have_their_units(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("verify", 3 << 30, "byte", clock=clock) as progress:
        clock.now += 12
        progress.update(3 << 29)
    assert capfd.readouterr().err.splitlines() == [
        "verify: 1.5 GiB of 3.0 GiB (50%), 128.0 MiB/s, 0:00:12 left",
        "verify: 1.5 GiB of 3.0 GiB (50%), 128.0 MiB/s, took 0:00:12",
    ]


def test_what_was_done_earlier_says_nothing_about_the_speed(clock: Clock) -> None:
    progress = Progress("merge", 100, "pair", clock=clock)
    progress.skip(50)
    assert progress.rate() is None and progress.line() == "merge: 50/100 pairs (50%), 0:00:00 so far"
    clock.now += 5
    progress.update(10)
    assert progress.rate() == 2 and progress.line().endswith("0:00:20 left")


def test_fractions_of_an_image(clock: Clock) -> None:
    progress = Progress("sample", 4, "image", clock=clock)
    for _ in range(10):
        clock.now += 1
        progress.update(0.3)
    assert progress.line() == "sample: 3/4 images (75%), 0.3 images/s, 0:00:03 left"
    progress.update(0.9)
    assert progress.line().startswith("sample: 3/4 images (75%)")


def test_nothing_done_is_nothing_said(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("sample", 0, "image", clock=clock) as progress:
        progress.skip(0)
    with Progress("sample", 5, "image", clock=clock) as progress:
        progress.skip(5)
    with Progress("sample", 5, "image", lines=False, clock=clock) as progress:
        clock.now += 20
        assert list(progress.over("abc")) == ["a", "b", "c"] and progress.done == 3
    assert capfd.readouterr() == ("", "")


def test_a_closed_one_says_no_more(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress("sample", 5, "image", clock=clock)
    progress.update(5)
    progress.close()
    progress.close()
    assert capfd.readouterr().err == "sample: 5/5 images (100%), took 0:00:00\n"


def test_printed_lines_keep_their_order(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    write("first")
    write("second", file=sys.stderr)
    assert capfd.readouterr() == ("first\n", "second\n")
    assert not is_terminal(None) and not is_terminal(sys.stdout)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.4, 3600, 360_061, -1)] == [
        "0:00:00", "0:00:59", "1:00:00", "100:01:01", "0:00:00"
    ]  # fmt: skip


# The commands


def start(words: Sequence[str], output: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "uvit", *words], stdout=output, stderr=output, env=environment)


def output_in_a_file(words: Sequence[str], path: Path) -> str:
    """Stdout and stderr of a command that writes both into one file."""
    with path.open("wb") as file, start(words, file.fileno()) as process:
        pass
    output = path.read_bytes().decode()
    assert process.returncode == 0, output
    return output


def output_on_a_terminal(words: Sequence[str]) -> str:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    output = b""
    with start(words, theirs) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # that is how Linux ends a terminal
            while piece := os.read(ours, 4096):
                output += piece
    os.close(ours)
    assert process.returncode == 0, output.decode()
    return output.decode()


def check_plain(output: str) -> None:
    assert "\r" not in output and "it/s" not in output and "%|" not in output
    assert not re.search("Loading|Writing model|Fetching", output)


TRAIN = (
    "train --per_device_train_batch_size 4 --max_steps 4 --warmup_steps 0 --save_steps 4 --logging_steps 2 --device cpu"
    " --image_logging_steps 4 --num_inference_steps 2 --report_to none --dataloader_num_workers 0"
)


@pytest.fixture(scope="module")
def features(vae_folder: Path, text_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a feature store, what `uvit extract` printed)."""
    folder = tmp_path_factory.mktemp("progress")
    words = ["extract", "--source", "shapes", "--resolution", "16", "--model_max_length", "16", "--num_workers", "0"]
    words += ["--vae_name_or_path", str(vae_folder), "--text_encoder_name_or_path", str(text_encoder_folder)]
    words += ["--device", "cpu", "--output_dir", str(folder / "store")]
    return folder / "store", output_in_a_file(words, folder / "log")


@pytest.fixture(scope="module")
def train_words(features: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = tmp_path_factory.mktemp("model") / "tiny.json"
    model.write_text(
        '{"sample_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "clip_dim": 32,'
        ' "num_text_tokens": 16}'
    )
    return [*TRAIN.split(), "--feature_path", str(features[0]), "--uvit_config_file", str(model)]


def test_extract_into_a_file(features: tuple[Path, str]) -> None:
    output = features[1]
    check_plain(output)
    assert re.search(r"^extract: 648/648 pairs \(100%\), [\d.,]+ pairs/s, took 0:\d\d:\d\d$", output, re.MULTILINE)
    assert output.index("Latent scale") < output.index("extract: 648")


def test_train_into_a_file_and_on_a_terminal(train_words: list[str], tmp_path: Path) -> None:
    output = output_in_a_file([*train_words, "--output_dir", str(tmp_path / "run")], tmp_path / "log")
    check_plain(output)
    lines = re.findall(r"^step (\d)/4: loss [\d.]+, .* samples/s.*, 0:00:\d\d left$", output, re.MULTILINE)
    assert lines == ["2", "4"]
    assert "wrote" in output, "no pipeline"
    screen = output_on_a_terminal([*train_words, "--output_dir", str(tmp_path / "again")])
    assert "\r" in screen and re.search(r"train: 100%\|.*\| 4/4 \[.*loss", screen)
    assert "step 2/4" not in screen
    assert not re.search("Loading|Writing model|Fetching", screen)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline") / "tiny", num_tokens=77)


def test_sample_into_a_file_and_on_a_terminal(pipeline: Path, tmp_path: Path) -> None:
    words = ["sample", "a red circle", "two cats", "a dog", "--pipeline", str(pipeline), "--device", "cpu"]
    words += ["--num_inference_steps", "3", "--batch_size", "2"]
    output = output_in_a_file([*words, "--output_dir", str(tmp_path / "out")], tmp_path / "log")
    check_plain(output)
    assert re.search(r"^sample: 3/3 images \(100%\), [\d.]+ images/s, took 0:\d\d:\d\d$", output, re.MULTILINE)
    assert f"3 images in {tmp_path / 'out'}" in output
    screen = output_on_a_terminal([*words, "--output_dir", str(tmp_path / "again")])
    assert "\r" in screen and re.search(r"sample: 100%\|.*\| 3/3 \[", screen)
    assert "denoising" not in screen and "took" not in screen
    plain = output_on_a_terminal([*words, "--output_dir", str(tmp_path / "plain"), "--disable_tqdm"])
    assert "%|" not in plain and "sample: 3/3 images (100%)" in plain


def test_evaluate_into_a_file(pipeline: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(pipeline), "--output_dir", str(tmp_path / "out"), "--max_prompts", "3", "--device", "cpu"]
    output = output_in_a_file([*words, "--num_inference_steps", "2"], tmp_path / "log")
    check_plain(output)
    assert re.search(r"^evaluate: 3/3 images \(100%\), [\d.]+ images/s, took 0:\d\d:\d\d$", output, re.MULTILINE)


def test_convert_prints_no_bar_even_on_a_terminal(pipeline: Path, tmp_path: Path) -> None:
    screen = output_on_a_terminal(["convert", str(pipeline), str(tmp_path / "out")])
    assert "%|" not in screen and not re.search("Loading|Writing model|Fetching", screen)
    assert "wrote" in screen
