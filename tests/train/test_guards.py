"""What is a spike, and which samples come next, follow from few numbers that a checkpoint keeps."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from uvit.train.guards import Guards, next_kept_sample, step_ranges

SKIPPED = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda p: (p[0], p[0] + p[1])), max_size=4)


def test_a_spike_is_far_above_the_median_of_a_hundred() -> None:
    guards = Guards(spike_factor=20)
    for step in range(99):
        guards.record_step(step + 1, 4 * step, 1.0 + step % 2, skipped=False)
    assert not guards.is_spike(1e9)  # too few are known
    guards.record_step(100, 396, 1.0, skipped=False)
    assert guards.is_spike(20.1) and not guards.is_spike(20.0)  # of 51 ones and 49 twos
    assert not Guards(spike_factor=0, norms=guards.norms).is_spike(1e9)
    for step in range(100, 151):
        guards.record_step(step + 1, 4 * step, 2.0, skipped=False)
    assert guards.is_spike(40.1) and not guards.is_spike(40.0)  # the first ones are forgotten


def test_what_is_not_finite_says_nothing_of_the_usual() -> None:
    guards = Guards(20)
    guards.record_step(1, 0, None, skipped=True)
    assert not guards.norms and guards.skipped_in_a_row == 1
    assert not guards.is_spike(math.nan)


def test_where_a_row_of_skipped_steps_began() -> None:
    guards = Guards(20)
    for step, skipped in enumerate([False, True, False, True, True, True]):
        guards.record_step(step + 1, 4 * step, 1.0, skipped)
    assert (guards.skipped_in_a_row, guards.skipped_from) == (3, 12)


def test_rollbacks_are_forgiven_once_the_run_has_got_further() -> None:
    guards = Guards(20, failed_at=8, num_rollbacks=2)
    guards.record_step(8, 28, 1.0, skipped=False)
    assert guards.num_rollbacks == 2
    guards.record_step(9, 32, None, skipped=True)
    assert guards.num_rollbacks == 2
    guards.record_step(10, 36, 1.0, skipped=False)
    assert guards.num_rollbacks == 0


def test_the_state_survives_json_to_the_bit() -> None:
    guards = Guards(20, skipped_samples=[(4, 8)], failed_at=7, num_rollbacks=1, last_good_checkpoint="checkpoint-3")
    for step in range(130):
        guards.record_step(step + 1, 4 * step, math.sqrt(step), skipped=step > 127)
    again = Guards(20)
    again.load_state_dict(json.loads(json.dumps(guards.state_dict())))
    assert again == guards and again.norms.maxlen == guards.norms.maxlen


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
