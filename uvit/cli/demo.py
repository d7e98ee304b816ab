"""`uvit demo`: the whole way from captioned images to generated ones, in four commands on built-in data.

`runs/demo.sh` has the same commands as a script; tests/test_demo.py compares the two.
"""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from uvit.cli.main import main
from uvit.config.demo import DemoConfig

PROMPTS = (
    "a large orange circle at the bottom left on a black background",
    "on a white background, a small purple cross at the bottom right",
    "large green triangle, at the top right, grey background",
)
NEXT_PROMPT = "a small red square in the centre on a white background"
# With --fast, after the other flags of the command.
FAST_FLAGS: Mapping[str, Sequence[str]] = {
    "train": ["--max_steps", "20", "--warmup_steps", "5", "--logging_steps", "10", "--image_logging_steps", "20"],
    "sample": ["--num_inference_steps", "4"],
    "evaluate": ["--max_prompts", "24", "--num_inference_steps", "4"],
}


def demo(config: DemoConfig) -> int:
    """Run the commands in order, each as `uvit` itself runs it. The first that fails ends the demo with its status."""
    for number, (title, command) in enumerate(demo_commands(config), start=1):
        print(f"\n== {number}. {title}\n$ {in_lines(['uvit', *command])}", flush=True)
        if status := main(command):
            return status
    print(f"\n{next_steps(config.folder())}")
    return 0


def demo_commands(config: DemoConfig) -> list[tuple[str, list[str]]]:
    """What each command does, and its arguments."""
    out = config.folder()
    extract = (
        "--source shapes --split train --resolution 32 --vae_name_or_path shapes --text tokens --model_max_length 18"
    )
    commands = {
        "extract": [*extract.split(), "--output_dir", f"{out}/features"],
        "train": [
            "--config", "shapes", *(["--bf16"] if cpu_has_bf16() else []),
            "--feature_path", f"{out}/features", "--output_dir", f"{out}/run",
        ],
        "sample": [
            *PROMPTS, "--pipeline", f"{out}/run/pipeline",
            "--guidance_scale", "2", "--num_inference_steps", "25", "--output_dir", f"{out}/samples",
        ],
        "evaluate": [f"{out}/run/pipeline", "--output_dir", f"{out}/evaluation"],
    }  # fmt: skip
    titles = {
        "extract": "Extract: encode 648 captioned images of shapes with the VAE",
        "train": "Train: a U-ViT and its text encoder, both from scratch",
        "sample": "Sample: generate images from prompts that were never trained on",
        "evaluate": "Evaluate: measure how many attributes of the prompts the images show",
    }
    return [
        (titles[name], [name, *flags, *(FAST_FLAGS.get(name, ()) if config.fast else ())])
        for name, flags in commands.items()
    ]


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 in hardware, as far as Linux says: float32 then takes longer."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def next_steps(folder: str) -> str:
    """What to type next. Where a shell does not find this `uvit`, also how to call it."""
    call, how = find_uvit()
    prompt = [*call, "sample", NEXT_PROMPT, "--pipeline", f"{folder}/run/pipeline", "--guidance_scale", "2"]
    lines = [f"Done. The results are in {folder}: see samples/ and evaluation/contact_sheet.png.", *how]
    lines += ["Try a prompt of your own:", f"  {in_lines(prompt)}"]
    lines += ["To train on your own images, see README.md, or `uvit extract --help`."]
    return "\n".join(lines)


def find_uvit() -> tuple[list[str], list[str]]:
    """The words that call this `uvit` from a shell; and the lines that explain them, if `uvit` alone does not."""
    folder = Path(sys.executable).parent
    own, on_path = shutil.which("uvit", path=str(folder)), shutil.which("uvit")
    if own is None:
        return ["python", "-m", "uvit"], []
    if on_path is not None and Path(on_path).samefile(own):
        return ["uvit"], []
    short = Path(own)
    if short.is_relative_to(Path.cwd()):
        short = short.relative_to(Path.cwd())
    lines = [f"`uvit` is not on your PATH. Call it as {shlex.quote(str(short))}"]
    activate = short.with_name("activate")
    if activate.is_file():
        lines[0] += f", or run `source {shlex.quote(str(activate))}` once in each shell"
    return [str(short)], [f"{lines[0]}."]


def in_lines(words: Sequence[str], width: int = 100) -> str:
    """A shell command in lines of about `width` characters; a flag and its values stay together."""
    groups: list[str] = []
    for word in map(shlex.quote, words):
        if groups and groups[-1].startswith("--") and not word.startswith("--"):
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) < width:
            lines[-1] += f" {group}"
        else:
            lines.append(f"    {group}")
    return " \\\n".join(lines)
