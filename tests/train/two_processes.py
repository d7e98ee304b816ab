"""One of two processes: `torchrun --nproc_per_node 2 -m tests.train.two_processes CONFIG FOLDER`.

Makes replicas differ by a bit and tries to save them in FOLDER; then trains by CONFIG.
"""

import sys
from pathlib import Path

import torch

from uvit.cli.parse import parse
from uvit.config.train import TrainConfig
from uvit.distributed.mesh import Degrees, World, init_distributed
from uvit.errors import UserError
from uvit.train.checkpointing import Checkpointer
from uvit.train.loader import prefetch
from uvit.train.setup import build_run
from uvit.train.step import train_step
from uvit.train.trainer import train


def differ(config: TrainConfig, world: World, folder: Path) -> None:
    run = build_run(config, folder, world)
    batches = prefetch(run.batches, range(world.data_rank, 10, 2), 0, run.device)
    with Checkpointer(run) as saving:
        train_step(run, batches)
        saving.save_and_wait()
        train_step(run, batches)
        if world.rank == 1:
            with torch.no_grad():
                run.master_model["unet"].pos_embed.view(torch.int32).view(-1)[0] ^= 1
        try:
            saving.save()
        except UserError as error:
            (folder / f"said-{world.rank}").write_text(str(error))


def main() -> int:
    torch.set_num_threads(1)
    config, _ = parse(TrainConfig, ["--config", sys.argv[1]], prog="uvit train")
    differ(config, init_distributed(Degrees(dp=2), "cpu"), Path(sys.argv[2]))
    return train(config)


if __name__ == "__main__":
    sys.exit(main())
