"""Lanes: which packs a rank takes at each step, and which windows are open meanwhile."""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe.loading.cursors import Share
from packpipe.loading.lanes import Step, packs_of_step, read_ahead


@st.composite
def epochs_of_lanes(draw):
    """(packs of an epoch, lanes, packs of a step)."""
    lanes = draw(st.integers(1, 6))
    return draw(st.integers(0, 150)), lanes, lanes * draw(st.integers(1, 6))


def by_hand(num_packs, lanes, size):
    """The packs of every step: each lane's next few, lane after lane; and those left over."""
    each, full = size // lanes, num_packs // size
    runs = [iter(range(lane * full * each, (lane + 1) * full * each)) for lane in range(lanes)]
    steps = [[next(run) for run in runs for _ in range(each)] for _ in range(full)]
    return steps, list(range(full * size, num_packs))


@given(epochs_of_lanes(), st.data())
@example((13, 2, 4), None)
def test_any_number_of_ranks_takes_the_same_steps_and_every_pack_once(epoch, data):
    num_packs, lanes, size = epoch
    divisors = [world for world in range(1, size + 1) if size % world == 0]
    world_size = divisors[-1] if data is None else data.draw(st.sampled_from(divisors))
    steps, left = by_hand(*epoch)
    shares = [Share(size // world_size, rank, world_size) for rank in range(world_size)]
    taken = Counter()
    for number, wanted in enumerate([*steps, left]):
        parts = [packs_of_step(number, num_packs, lanes, share) for share in shares]
        found = np.concatenate([packs for packs, _ in parts]).tolist()
        assert found == wanted
        taken.update(found)
        for packs, places in parts:
            assert len(packs) == len(places)
            assert sorted(set(places.tolist())) == places.tolist()
            assert all(0 <= place < size // world_size for place in places)
            assert number == len(steps) or len(places) == size // world_size
        held = [len(packs) for packs, _ in parts]
        assert max(held) - min(held) <= 1
    assert taken == Counter(range(num_packs))


@given(epochs_of_lanes(), st.data())
def test_each_rank_goes_through_lanes_of_its_own_where_ranks_divide_lanes(epoch, data):
    num_packs, lanes, size = epoch
    world_size = data.draw(st.sampled_from([w for w in range(1, lanes + 1) if lanes % w == 0]))
    full = num_packs // size
    ends = []
    for rank in range(world_size):
        share = Share(size // world_size, rank, world_size)
        own = [packs_of_step(step, num_packs, lanes, share)[0] for step in range(full)]
        every = np.sort(np.concatenate([np.empty(0, np.int64), *own]))
        # One run of packs, without a gap: whole windows, but for its two ends.
        assert (np.diff(every) == 1).all()
        ends += [every[0], every[-1] + 1] if len(every) else []
    assert all(one == next_ for one, next_ in list(pairwise(ends))[1::2])


class Window:
    """Something that can be seen to be there."""

    def __init__(self, number):
        self.number = number


@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    size=st.integers(1, 5),
    ahead=st.integers(0, 4),
    lanes=st.integers(1, 3),
)
def test_windows_are_opened_when_needed_soon_and_dropped_after(widths, size, ahead, lanes):
    ends, size = np.cumsum(widths), size * lanes
    num_packs = int(ends[-1])
    steps = []
    for number in range(-(-num_packs // size)):
        packs, places = packs_of_step(number, num_packs, lanes, Share(size, 0, 1))
        steps.append(Step(packs, places, np.searchsorted(ends, packs, "right")))
    alive, opened = weakref.WeakSet(), Counter()

    def open_window(number):
        opened[number] += 1
        found = Window(number)
        alive.add(found)
        return found

    for number, (step, windows) in enumerate(read_ahead(iter(steps), open_window, ahead)):
        assert step is steps[number]
        assert list(windows) == sorted(set(step.windows.tolist()))
        assert all(window.number == name for name, window in windows.items())
        near = {w for one in steps[number : number + ahead + 1] for w in one.windows.tolist()}
        gone = {w for one in steps[number - 1 : number] for w in one.windows.tolist()}
        assert {one.number for one in alive} <= near | gone
        del windows
    assert not [one for one in alive if one.number not in steps[-1].windows]
    # Two lanes that meet in a window read it both, at other times.
    assert set(opened) == {w for one in steps for w in one.windows.tolist()}
    assert sum(opened.values()) <= len(opened) + lanes
    assert max(opened.values()) <= lanes + 1


def test_an_error_of_a_window_is_that_of_the_step_that_needs_it():
    def fail(number):
        if number == 1:
            raise OSError("the disk is gone")
        return number

    one = np.zeros(1, np.int64)
    steps = [Step(one, one, one), Step(one, one, one + 1)]
    found = read_ahead(iter(steps), fail, 3)
    assert next(found)[1] == {0: 0}
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
