"""What sampling may leave out to be faster, and what it may do to guidance for better pictures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """How `denoise` goes about it. The defaults leave nothing out."""

    cache_interval: int = 1
    """The deep blocks are computed at every so-manieth step and extrapolated in between; 1: at each."""
    cache_depth: int = 1
    """Outer blocks on either side, which are computed at each step."""
    guidance_every: int = 1
    """The unconditional prediction is computed at every so-manieth step, its distance extrapolated in between."""
    guidance_interval: tuple[float, float] = (1, 1000)
    """Labels, lowest and highest, between which there is guidance."""
    guidance_rescale: float = 0.0
    """How far the guided x_0 goes back to the conditional one's standard deviation: 0 not, 1 all the way."""
    grid: tuple[float, ...] | None = None
    """Log-SNR at even fractions of the way, from the noise on; None: the scheduler's own grid."""
