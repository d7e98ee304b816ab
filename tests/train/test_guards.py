"""What is a spike, and which samples come next, follow from few numbers that a checkpoint keeps."""

import json
import math
import statistics
from collections.abc import Iterable

import torch
from hypothesis import given
from hypothesis import strategies as st

from uvit.train.guards import Guards, next_kept_sample, step_ranges

SKIPPED = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda p: (p[0], p[0] + p[1])), max_size=4)


def add_norms(guards: Guards, norms: Iterable[float]) -> None:
    for norm in norms:
        guards.add_norm(torch.tensor(norm), torch.tensor(math.isfinite(norm)))


def test_a_spike_is_far_above_the_median_of_a_hundred() -> None:
    guards = Guards(spike_factor=20)

    def spikes(*norms: float) -> list[bool]:
        return [guards.is_spike(torch.tensor(norm)).item() for norm in norms]

    add_norms(guards, [1.0 + step % 2 for step in range(99)])
    assert spikes(1e9) == [False]  # too few are known
    add_norms(guards, [1.0])
    assert spikes(20.1, 20.0) == [True, False]  # of 51 ones and 49 twos
    ordered = sorted(math.sqrt(step) for step in range(100))
    guards.set_norms(reversed(ordered))
    limit = 20 * statistics.median(ordered)
    assert spikes(math.nextafter(limit, 0) - 1e-4, math.nextafter(limit, 99) + 1e-4) == [False, True]
    add_norms(guards, [2.0] * 51)
    assert spikes(40.1, 40.0) == [True, False]  # the first ones are forgotten
    guards.spike_factor = 0
    assert spikes(1e9) == [False]


def test_what_is_not_finite_says_nothing_of_the_usual() -> None:
    guards = Guards(20)
    add_norms(guards, [math.nan, math.inf, 3.0])
    assert guards.state_dict()["norms"] == [3.0]
    guards.set_norms([1.0] * 100)
    add_norms(guards, [math.inf])
    assert not guards.is_spike(torch.tensor(math.nan)) and guards.state_dict()["norms"] == [1.0] * 100


def test_where_a_row_of_skipped_steps_began() -> None:
    guards = Guards(20)
    for step, skipped in enumerate([False, True, False, True, True, True]):
        guards.record_step(step + 1, 4 * step, skipped)
    assert (guards.skipped_in_a_row, guards.skipped_from) == (3, 12)


def test_rollbacks_are_forgiven_once_the_run_has_got_further() -> None:
    guards = Guards(20, failed_at=8, num_rollbacks=2)
    guards.record_step(8, 28, skipped=False)
    assert guards.num_rollbacks == 2
    guards.record_step(9, 32, skipped=True)
    assert guards.num_rollbacks == 2
    guards.record_step(10, 36, skipped=False)
    assert guards.num_rollbacks == 0


def test_the_state_survives_json_to_the_bit() -> None:
    guards = Guards(20, skipped_samples=[(4, 8)], failed_at=7, num_rollbacks=1, last_good_checkpoint="checkpoint-3")
    for step in range(130):
        guards.record_step(step + 1, 4 * step, skipped=step > 127)
    add_norms(guards, map(math.sqrt, range(130)))
    again = Guards(20)
    again.load_state_dict(json.loads(json.dumps(guards.state_dict())))
    assert again == guards and torch.equal(again.norms, guards.norms)


@given(st.integers(0, 40), st.integers(1, 7), SKIPPED)
def test_a_step_begins_behind_what_it_would_touch(samples: int, size: int, skipped: list[tuple[int, int]]) -> None:
    first = next_kept_sample(samples, size, skipped)
    bad = {counter for sample_range in skipped for counter in range(*sample_range)}
    assert first >= samples and not bad & set(range(first, first + size))
    for earlier in range(samples, first):  # nothing good is lost but what does not fill a step
        assert bad & set(range(earlier, earlier + size))


@given(st.integers(0, 40), st.integers(1, 7), st.integers(0, 30), SKIPPED)
def test_ranges_are_the_steps_one_by_one(
    samples: int, size: int, num_steps: int, skipped: list[tuple[int, int]]
) -> None:
    expected = []
    counter = samples
    for _ in range(num_steps):
        expected.append(next_kept_sample(counter, size, skipped))
        counter = expected[-1] + size
    parts = list(step_ranges(samples, size, num_steps, skipped))
    assert [first + i * size for first, count in parts for i in range(count)] == expected
