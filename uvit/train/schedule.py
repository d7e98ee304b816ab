"""What a run will do, said before it does it: what is left after a resume."""

from uvit.checkpoint.folder import Checkpoint
from uvit.train.epochs import epochs_done
from uvit.train.setup import Run, samples_per_step

# A resumed run


def describe_samples_done(run: Run) -> str:
    """Such as `6,400 samples, 1.5 epochs`."""
    return f"{run.samples:,} samples, {epochs_done(run.batches.epochs, run.samples):.4g} epochs"


def describe_resume(run: Run, checkpoint: Checkpoint) -> list[str]:
    """What is left to do and why, and what another batch or other data change. One sentence each."""
    config, left = run.config, max(0, run.max_steps - run.step)
    batch, before = run.samples_per_step, samples_per_step(checkpoint.record["config"])
    end = run.samples + left * batch
    until = f"--num_train_epochs {config.num_train_epochs:g}" if config.num_train_epochs else "--max_steps"
    sentences = [
        f"resumed {checkpoint.folder}: step {run.step} of {run.max_steps} ({describe_samples_done(run)}); left until "
        f"{until}: {left:,} steps of {batch:,} samples, "
        f"{epochs_done(run.batches.epochs, end) - epochs_done(run.batches.epochs, run.samples):.4g} epochs"
    ]
    if batch != before and not config.num_train_epochs and left:
        same = run.step + -(-max(0, before * run.max_steps - run.samples) // batch)
        sentences.append(
            f"a step had {before:,} samples and now has {batch:,}: --max_steps counts steps of both, so the run ends "
            f"after {end:,} samples; with --max_steps {same} it would end after {before * run.max_steps:,}, as before"
        )
    ranges = run.batches.epochs
    if len(ranges) > 1 and ranges[-1].first_sample >= run.samples:
        sentences.append(
            f"the data had {ranges[-2].size:,} samples and now has {ranges[-1].size:,}: epochs of the new size begin "
            f"at sample {ranges[-1].first_sample:,}"
        )
    return sentences
