from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

import naive
import naive_streams
import numpy as np
import pytest
import strategies
from hypothesis import assume, example, given
from hypothesis import strategies as st

from packpipe.packing.equal_steps import Steps, balance_steps


class BalanceCase(NamedTuple):
    work: list[int]
    ranks: int
    window: int
    key: tuple[int, int]

    def steps(self) -> Steps:
        seed, epoch = self.key
        return balance_steps(self.work, self.ranks, window=self.window, seed=seed, epoch=epoch)

    @property
    def shuffled(self) -> list[int]:
        return naive.seeded_order(*self.key, range(len(self.work)), 4)


@st.composite
def balance_cases(draw: st.DrawFn, *, short_step: bool = True) -> BalanceCase:
    """Work of few or many distinct values, windows that divide by the ranks and some that don't."""
    ranks = draw(st.integers(1, 8))
    one = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 10**12)]))
    size = draw(st.integers(1, 60))
    size = size if short_step else -(-size // ranks) * ranks
    work = draw(st.lists(one, min_size=size, max_size=size))
    return BalanceCase(work, ranks, draw(st.integers(1, 80)), draw(strategies.keys()))


@given(balance_cases())
@example(BalanceCase([9, 1, 8, 2, 9, 1, 8, 2], 2, 8, (0, 0)))
@example(BalanceCase([5] * 30, 4, 8, (1, 2)))
@example(BalanceCase([1, 2], 3, 1, (0, 0)))
def test_steps_are_the_naive_rules_step_by_step(case):
    order = case.steps().order.tolist()
    found = [order[first : first + case.ranks] for first in range(0, len(order), case.ranks)]
    assert found == naive_streams.balanced_steps(case.work, case.ranks, case.window, *case.key)


@given(balance_cases())
def test_the_order_is_a_permutation(case):
    steps = case.steps()
    assert steps.order.dtype == np.int64
    assert sorted(steps.order.tolist()) == list(range(len(case.work)))
    assert len(steps) == -(-len(case.work) // case.ranks) > 0


@given(balance_cases())
def test_each_window_holds_the_packs_of_the_shuffled_window(case):
    order, shuffled = case.steps().order.tolist(), case.shuffled
    window = -(-case.window // case.ranks) * case.ranks
    for start in range(0, len(order), window):
        assert sorted(order[start : start + window]) == sorted(shuffled[start : start + window])


@given(balance_cases())
def test_neighbours_in_work_share_a_step(case):
    # The steps of a window, put in order of work, follow each other without overlap.
    loads = [case.work[pack] for pack in case.steps().order]
    window = -(-case.window // case.ranks) * case.ranks
    for start in range(0, len(loads), window):
        some = loads[start : start + window]
        parts = [sorted(some[k : k + case.ranks]) for k in range(0, len(some), case.ranks)]
        assert all(one[-1] <= other[0] for one, other in pairwise(sorted(parts)))


@given(balance_cases())
def test_a_short_step_is_the_last_and_takes_the_most_work_of_the_last_window(case):
    short = len(case.work) % case.ranks
    assume(short)
    order = case.steps().order.tolist()
    window = -(-case.window // case.ranks) * case.ranks
    start = (len(order) - 1) // window * window
    last = [case.work[pack] for pack in order[start:]]
    assert sorted(last[-short:]) == sorted(last)[-short:]


def test_ten_packs_in_fours_end_in_a_step_of_two():
    steps = balance_steps([3, 1, 2, 9, 8, 1, 3, 2, 1, 1], 4)
    assert len(steps) == 3
    assert sorted(steps.order[8:].tolist()) == [3, 4]


@given(balance_cases())
def test_waiting_is_the_naive_share_in_both_orders(case):
    steps = case.steps()
    before = naive_streams.waiting(case.work, case.shuffled, case.ranks)
    after = naive_streams.waiting(case.work, steps.order.tolist(), case.ranks)
    assert steps.before == pytest.approx(float(before), abs=1e-9)
    assert steps.after == pytest.approx(float(after), abs=1e-9)


@given(balance_cases(short_step=False))
def test_full_steps_never_wait_longer_than_in_the_shuffled_order(case):
    steps = case.steps()
    assert -1e-9 <= steps.after <= steps.before + 1e-9


def test_a_short_step_may_leave_full_ones_that_wait_longer():
    # 0 and 1 share the only full step, since a heaviest pack is left over.
    found = [balance_steps([0, 1, 1], 2, seed=seed) for seed in range(8)]
    assert {steps.after for steps in found} == {1.0}
    assert {steps.before for steps in found} == {0.0, 1.0}


def test_real_work_waits_far_less():
    work = np.random.default_rng(0).integers(1, 1000, 512) ** 2
    steps = balance_steps(work, 8, window=512)
    assert steps.before > 0.5
    assert steps.after < 0.05


def test_a_larger_window_waits_less():
    work = np.random.default_rng(0).integers(1, 1000, 512)
    after = [balance_steps(work, 4, window=window).after for window in (4, 16, 64, 512)]
    assert after[0] == balance_steps(work, 4).before
    assert after == sorted(after, reverse=True)
    assert len(set(after)) == 4


@pytest.mark.parametrize(
    ("ranks", "window", "same_as"), [(4, 1, 4), (4, 5, 8), (3, 1000, 1002), (2, 2**62, 2**20)]
)
def test_a_window_is_rounded_up_to_whole_steps(ranks, window, same_as):
    work = np.random.default_rng(1).integers(1, 1000, 3000)
    order = balance_steps(work, ranks, window=window).order
    assert order.tolist() == balance_steps(work, ranks, window=same_as).order.tolist()


def test_the_window_is_1024_unless_told_otherwise():
    work = np.random.default_rng(1).integers(1, 1000, 3000)
    order = balance_steps(work, 2).order.tolist()
    assert order == balance_steps(work, 2, window=1024).order.tolist()
    assert order != balance_steps(work, 2, window=1026).order.tolist()


@given(strategies.keys(), strategies.keys())
@example((0, 1), (1, 0))
@example((0, 0), (0, 1))
def test_a_key_repeats_its_order_and_another_key_changes_it(key, other):
    work = [(i * i) % 17 for i in range(64)]
    one = BalanceCase(work, 4, 32, key).steps()
    assert BalanceCase(work, 4, 32, key).steps().order.tolist() == one.order.tolist()
    changed = BalanceCase(work, 4, 32, other).steps().order.tolist() != one.order.tolist()
    assert changed == (key != other)


def test_work_is_not_written_to():
    work = np.array([9, 1, 8, 2], np.uint32)
    work.flags.writeable = False
    assert sorted(balance_steps(work, 2).order.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint64", ">i4"])
def test_every_integer_dtype_is_accepted(dtype):
    work = [9, 1, 8, 2, 9, 1, 8, 2, 120]
    steps = balance_steps(np.array(work, dtype), 2, window=4)
    assert steps.order.tolist() == balance_steps(work, 2, window=4).order.tolist()


def test_the_example_of_the_docstring():
    work = [9, 1, 8, 2, 9, 1, 8, 2]
    steps = balance_steps(work, ranks=2, window=8)
    assert repr(steps) == "Steps(8 packs in 4 steps of 2 ranks: waiting 40.00% before, 0.00% after)"
    taken = sorted(sorted(work[pack] for pack in step) for step in steps.order.reshape(4, 2))
    assert taken == [[1, 1], [2, 2], [8, 8], [9, 9]]


@pytest.mark.parametrize(
    ("work", "num_steps"), [([], 0), ([7], 1), ([7, 3], 1), ([0, 0, 0, 0, 0, 0], 2)]
)
def test_nothing_waits_without_a_full_step_or_without_work(work, num_steps):
    steps = balance_steps(work, 3)
    assert len(steps) == num_steps
    assert sorted(steps.order.tolist()) == list(range(len(work)))
    assert steps.before == steps.after == 0.0


RANKS = f"expected an integer in 1..{2**31}; pass the number of processes"
WINDOW = f"expected an integer in 1..{2**62}; 1024 or more evens out well"
WORD = f"expected an integer in 0..{2**64 - 1}; pass a non-negative integer below 2**64"
WORK = "pass one number a pack"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ranks": 0}, ValueError, f"ranks is 0, {RANKS}"),
        ({"ranks": 2.0}, TypeError, f"ranks is 2.0, {RANKS}"),
        ({"ranks": True}, TypeError, f"ranks is True, {RANKS}"),
        ({"window": 0}, ValueError, f"window is 0, {WINDOW}"),
        ({"window": None}, TypeError, f"window is None, {WINDOW}"),
        ({"seed": -1}, ValueError, f"seed is -1, {WORD}"),
        ({"epoch": 2**64}, ValueError, f"epoch is {2**64}, {WORD}"),
        (
            {"work": [3, 0, -2]},
            ValueError,
            "work[2] is -2, expected 0 or more; pass Σ l² of the pack",
        ),
        (
            {"work": [1.0]},
            TypeError,
            f"work.dtype is 'float64', expected an integer dtype; {WORK}",
        ),
        ({"work": [[1]]}, ValueError, f"work.ndim is 2, expected 1; {WORK}"),
    ],
)
def test_a_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        balance_steps(**{"work": [1, 2], "ranks": 2, **arguments})


@given(balance_cases())
@example(BalanceCase([5] * 30, 4, 8, (1, 2)))
def test_without_shuffling_every_window_keeps_the_packs_it_has(case):
    work, ranks, window, (seed, epoch) = case
    steps = balance_steps(work, ranks, window=window, shuffle=False, seed=seed, epoch=epoch)
    order = steps.order.tolist()
    found = [order[first : first + ranks] for first in range(0, len(order), ranks)]
    assert found == naive_streams.balanced_steps(work, ranks, window, *case.key, shuffle=False)
    window = -(-window // ranks) * ranks
    for start in range(0, len(order), window):
        some = range(start, min(start + window, len(order)))
        assert sorted(order[start : start + window]) == list(some)
