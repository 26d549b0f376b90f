"""Windows of blocks: every block in one, every image in one pack, none depends on another."""

from __future__ import annotations

import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe.philox import Key
from packpipe.planning.block_windows import EpochWindows, block_windows, joined, plan_window
from packpipe.planning.distributions import Uniform
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch
from packpipe.planning.resolution import Side

block_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=30)


@given(block_sizes, st.integers(1, 40), strategies.keys())
@example([0, 0, 50, 0, 1, 1], 3, (0, 0))
@example([0, 0], 3, (0, 0))
@example([], 3, (0, 0))
def test_every_block_is_in_one_window_of_about_so_many_rows(rows, window_rows, key):
    windows = block_windows(rows, window_rows, Key(*key))
    found = np.concatenate(windows)
    assert sorted(found.tolist()) == list(range(len(rows)))
    assert all((np.diff(blocks) > 0).all() for blocks in windows)
    sizes = [sum(rows[block] for block in blocks) for blocks in windows]
    assert all(sizes) or len(windows) == 1
    count = max(1, round(sum(rows) / window_rows))
    assert len(windows) <= count
    assert max(sizes) < sum(rows) / count + max(rows, default=0) + 1
    assert all(map(np.array_equal, windows, block_windows(rows, window_rows, Key(*key))))


def test_the_order_of_blocks_is_drawn_from_seed_and_epoch():
    orders = {
        tuple(np.concatenate(block_windows([1] * 64, 1, Key(*key))).tolist())
        for key in ((0, 0), (1, 0), (0, 1), (1, 1))
    }
    assert len(orders) == 4
    assert tuple(range(64)) not in orders


def windows_of(sizes, key, block=7, window_rows=30):
    """The rows of each window of a source of equal blocks."""
    rows = [len(sizes[first : first + block]) for first in range(0, len(sizes), block)]
    starts = np.cumsum([0, *rows])
    return [
        np.concatenate([np.arange(starts[b], starts[b + 1]) for b in blocks])
        for blocks in block_windows(rows, window_rows, Key(*key))
    ]


@given(strategies.size_lists(min_size=5), strategies.configs(), strategies.keys())
@example([(16, 16)] * 40, PackConfig(seq_len=8, window=7, max_segments=3), (0, 0))
@example([(16, 48)] * 40, PackConfig(seq_len=64, views=2), (3, 1))
def test_every_image_is_in_one_pack_and_shares_it_with_its_own_window(sizes, config, key):
    named = {"seed": key[0], "epoch": key[1]}
    sizes = np.array(sizes)
    windows = windows_of(sizes, key, block=3, window_rows=12)
    plans = [
        plan_window(sizes[rows], config, **named, index=rows, window=window)
        for window, rows in enumerate(windows)
    ]
    plan = joined(plans)
    plan._check()
    assert [pack.tolist() for one in plans for pack in one] == [pack.tolist() for pack in plan]
    views = config.num_views
    counts = np.bincount(np.concatenate(list(plan)), minlength=len(sizes))
    assert counts.tolist() == [views] * len(sizes)
    window_of = np.empty(len(sizes), int)
    for window, rows in enumerate(windows):
        window_of[rows] = window
    assert all(len(set(window_of[pack])) == 1 for pack in plan)
    # What is decided about an image alone is what a plan of all images decides.
    if config.fit_last is None:
        whole = plan_epoch(sizes, config, **named)
        of_image = np.argsort(plan.index)
        for name in ("grid_hw", "num_keep"):
            ours = getattr(plan, name).reshape(len(sizes), views, -1)[of_image]
            theirs = getattr(whole, name).reshape(len(sizes), views, -1)
            assert np.array_equal(ours, theirs)


def test_a_window_stays_as_it_is_when_all_others_change():
    config = PackConfig(seq_len=64, resolution=Side(Uniform(16, 96)), drop_rate=0.2)
    sizes = np.random.default_rng(0).integers(8, 200, (210, 2))
    windows = windows_of(sizes, (0, 0))
    assert len(windows) == 7
    for window, rows in enumerate(windows):
        others = np.setdiff1d(np.arange(210), rows)
        changed = sizes.copy()
        changed[others] = changed[others][::-1]
        one, other = (
            plan_window(some[rows], config, index=rows, window=window) for some in (sizes, changed)
        )
        assert one.fingerprint == other.fingerprint
        assert len(one) > 3


def test_two_windows_of_the_same_sizes_put_their_packs_in_different_orders():
    config, sizes, index = PackConfig(seq_len=8), [(16, 64)] * 60, np.arange(60)
    orders = [
        [pack.tolist() for pack in plan_window(sizes, config, index=index, window=window)]
        for window in (0, 1, 2**20)
    ]
    assert len(orders[0]) == 30
    assert orders[0] == [pack.tolist() for pack in plan_epoch(sizes, config)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({str(order) for order in orders}) == 3


@pytest.mark.parametrize("wrong", [0, -3, 2.5])
def test_a_window_has_a_whole_number_of_rows(wrong):
    with pytest.raises((TypeError, ValueError), match=rf"window_rows is {wrong}, expected "):
        block_windows([3, 4], wrong, Key(0, 0))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
@example([0, 0, 3, 0])
def test_a_pack_is_in_the_window_that_has_it(widths):
    windows = EpochWindows([np.empty(0, np.int64)] * len(widths), np.cumsum(widths))
    wanted = [window for window, width in enumerate(widths) for _ in range(width)]
    assert windows.num_packs == len(wanted)
    assert windows.window_of(np.arange(len(wanted))).tolist() == wanted
    firsts = [windows.first_pack(window) for window in range(len(widths))]
    assert firsts == [sum(widths[:window]) for window in range(len(widths))]
