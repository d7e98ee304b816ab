"""Kill an extraction at random moments, resume it each time, and compare every byte with an uninterrupted one.

    python benchmarks/kill_extract.py                                    # the built-in shapes, 20 kills
    python benchmarks/kill_extract.py --vae FOLDER --source photos.tar --kills 50 --resolution 256

Says at which share of the pairs each kill came and how much work it cost: the time since the last commit. Exits with 1
where any byte differs.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXTRACT = """
import sys
from uvit.cli.main import main
from uvit.extract import extract
extract.COMMIT_SECONDS = float(sys.argv[1])
sys.exit(main(["extract", *sys.argv[2:]]))
"""


def start(options: argparse.Namespace, store: Path) -> subprocess.Popen[bytes]:
    flags = ["--source", *options.source, "--output_dir", str(store), "--vae_name_or_path", options.vae]
    flags += ["--resolution", str(options.resolution), "--shard_size", str(options.shard_size)]
    flags += ["--batch_size", str(options.batch_size), "--num_workers", str(options.num_workers)]
    flags += ["--text", "tokens", "--vocab_size", "300", "--random_flip", "--disable_tqdm"]
    command = [sys.executable, "-c", EXTRACT, str(options.commit_seconds), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def commits(store: Path) -> list[Path]:
    """Files that the running extraction renames meanwhile may be missing."""
    return [*store.glob("train/.partial-*/progress.json"), *store.glob("train/shard-*.json")]


def committed(store: Path, shard_size: int) -> int:
    """Source rows that are committed. A shard of which only a part is kept is found by its progress.json."""
    rows = 0
    for path in commits(store):
        try:
            next_row = json.loads(path.read_text(encoding="utf-8")).get("next_row")
        except FileNotFoundError:
            next_row = None
        rows += shard_size if next_row is None else next_row - int(path.parent.name[-5:]) * shard_size
    return rows


def kill_once(options: argparse.Namespace, store: Path, rows: float, delay: float) -> float | None:
    """Seconds of work lost by a kill `delay` after so many rows were committed; None: it came to its end before."""
    process = start(options, store)
    while process.poll() is None and committed(store, options.shard_size) < rows:
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is not None:
        if process.returncode:
            sys.exit("an extraction that was killed could not be resumed")
        return None
    process.kill()
    process.wait()
    return max(0.0, time.time() - max((path.stat().st_mtime for path in commits(store)), default=time.time()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs="+", default=["shapes"])
    parser.add_argument("--vae", default="shapes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--shard_size", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--commit_seconds", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        started = time.monotonic()
        if start(options, whole).wait():
            sys.exit("the extraction itself fails")
        seconds = time.monotonic() - started
        manifest = json.loads((whole / "train" / "manifest.json").read_text(encoding="utf-8"))
        pairs = manifest["num_source_pairs"] or manifest["num_pairs"]
        print(f"Not killed: {pairs:,} pairs in {seconds:.1f} s from the start of the program.")
        lost, kept = list[float](), 0.0
        while len(lost) < options.kills:
            cost = kill_once(options, killed, 0.9 * pairs * len(lost) / options.kills, delay=rng.random() / 2)
            if cost is None:
                break
            share = min(1.0, committed(killed, options.shard_size) / pairs)
            if share < kept:
                sys.exit(f"of {kept:.0%} of the pairs that were kept only {share:.0%} are")
            kept = share
            lost.append(cost if share < 1 else 0.0)  # with all pairs kept, there was nothing to lose
            print(f"Kill {len(lost)}: {share:.0%} of the pairs kept, {cost:.2f} s of work lost.", flush=True)
        if start(options, killed).wait():
            sys.exit("an extraction that was killed could not be resumed")
        a, b = contents(whole), contents(killed)
        different = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        print(f"{len(lost)} kills, {sum(lost):.1f} s of work lost in all, {max(lost, default=0):.2f} s at the worst.")
        print(
            f"{len(a)} files, {sum(map(len, a.values())):,} bytes: {f'{different} differ' if different else 'equal'}."
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
