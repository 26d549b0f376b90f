from __future__ import annotations

import re
from dataclasses import replace

import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, example, given
from hypothesis import strategies as st

from packpipe.config import PackConfig
from packpipe.packing import pack_lengths
from packpipe.plan import EpochPlan, plan_epoch

SMALL = PackConfig(seq_len=24)
MANY = np.random.default_rng(7).integers(1, 120, (300, 2))


def packs_of(plan: EpochPlan) -> list[list[int]]:
    return [pack.tolist() for pack in plan]


@given(strategies.size_lists(), strategies.configs(), strategies.keys())
@example([(16, 16)] * 30, PackConfig(seq_len=8, window=7, max_segments=3), (0, 0))
def test_every_image_lands_in_exactly_one_pack_within_the_limits(sizes, config, key):
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    packs = packs_of(plan)
    assert sorted(image for pack in packs for image in pack) == list(range(len(sizes)))
    assert all(1 <= len(pack) <= config.max_segments for pack in packs)
    assert all(plan.num_keep[pack].sum() <= config.seq_len for pack in packs)
    assert plan.num_keep.tolist() == [rows * columns for rows, columns in plan.grid_hw.tolist()]
    assert plan.num_keep.min() >= 1
    assert plan.num_keep.max() <= config.token_limit


def balanced(lengths, seq_len, max_segments):
    """The packer itself, which has its own twin in test_packing.py."""
    packs = pack_lengths(lengths, seq_len, strategy="balanced", max_segments=max_segments)
    return [pack.tolist() for pack in packs]


RULES = {
    "ffd": naive.first_fit_decreasing,
    "next_fit": naive.next_fit,
    "best_fit": naive.best_fit,
    "balanced": balanced,
}


@given(strategies.size_lists(), strategies.configs(), strategies.keys(), st.data())
@example([(16, 16)] * 30, PackConfig(seq_len=8, window=7, max_segments=3), (1, 2), None)
def test_a_plan_is_the_naive_one(sizes, config, key, data):
    rows = st.lists(st.integers(0, 2**62), min_size=len(sizes), max_size=len(sizes), unique=True)
    index = list(range(len(sizes))) if data is None else data.draw(rows)
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1], index=index)
    grids = []
    for height, width in sizes:
        own = naive.native_grid(height, width, config.patch_size)
        if config.resolution == "budget" or own[0] * own[1] > config.token_limit:
            own = naive.budget_grid(height, width, config.patch_size, config.token_limit)
        grids.append(own)
    assert plan.grid_hw.tolist() == [list(grid) for grid in grids]
    assert packs_of(plan) == naive.plan(
        [rows * columns for rows, columns in grids],
        index,
        config.seq_len,
        rule=RULES[config.strategy],
        max_segments=config.max_segments,
        window=config.window,
        seed=key[0],
        epoch=key[1],
    )


def test_packs_hold_several_images_where_they_fit():
    plan = plan_epoch(MANY, PackConfig(seq_len=64, max_segments=4))
    held = [len(pack) for pack in plan]
    assert max(held) == 4
    assert sum(held) == 300
    assert sorted(image for pack in packs_of(plan) for image in pack) == list(range(300))


@given(strategies.size_lists(min_size=2), strategies.configs(), strategies.keys(), st.data())
def test_any_images_grid_and_tokens_can_be_recomputed_alone(sizes, config, key, data):
    chosen = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))
    whole = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    part = plan_epoch([sizes[i] for i in chosen], config, seed=key[0], epoch=key[1], index=chosen)
    assert part.grid_hw.tolist() == whole.grid_hw[chosen].tolist()
    assert part.num_keep.tolist() == whole.num_keep[chosen].tolist()
    assert part.image_hw.tolist() == whole.image_hw[chosen].tolist()


# One pack, filled as images come: its segments stand in plan order.
IN_ORDER = PackConfig(seq_len=2000, strategy="next_fit", max_tokens=1, max_segments=2000)


@given(strategies.size_lists(min_size=2), strategies.keys(), st.data())
def test_the_plan_order_of_a_subset_is_the_whole_one_with_the_others_left_out(sizes, key, data):
    chosen = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))

    def ordered(index):
        some = [sizes[i] for i in index]
        (pack,) = plan_epoch(some, IN_ORDER, seed=key[0], epoch=key[1], index=index)
        return pack.tolist()

    whole = ordered(range(len(sizes)))
    assert whole == naive.seeded_order(*key, range(len(sizes)), 0)
    assert ordered(chosen) == [image for image in whole if image in set(chosen)]


@given(strategies.size_lists(min_size=2), strategies.configs(), strategies.keys())
@example([(16, 48), (32, 16), (16, 16)] * 5, PackConfig(seq_len=8), (0, 0))
def test_packs_depend_on_token_counts_only(sizes, config, key):
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    turned = plan_epoch(
        [(width, height) for height, width in sizes], config, seed=key[0], epoch=key[1]
    )
    assert turned.grid_hw.tolist() == plan.grid_hw[:, ::-1].tolist()
    assert packs_of(turned) == packs_of(plan)


def test_turned_images_share_packs_as_the_upright_ones_did():
    config = PackConfig(seq_len=64)
    packs = packs_of(plan_epoch(MANY, config))
    assert max(map(len, packs)) > 1
    assert packs_of(plan_epoch(MANY[:, ::-1], config)) == packs


@given(
    strategies.size_lists(min_size=2),
    strategies.configs(),
    strategies.keys(),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_input_does_not_matter_when_the_index_travels_along(
    sizes, config, key, random
):
    order = list(range(len(sizes)))
    random.shuffle(order)
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    moved = plan_epoch([sizes[i] for i in order], config, seed=key[0], epoch=key[1], index=order)
    assert packs_of(moved) == packs_of(plan)


@given(strategies.size_lists(min_size=2), strategies.configs(max_window=8), strategies.keys())
def test_no_pack_mixes_windows(sizes, config, key):
    assume(config.window < len(sizes))
    order = naive.seeded_order(*key, range(len(sizes)), 0)
    window_of = {image: place // config.window for place, image in enumerate(order)}
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    windows = [{window_of[image] for image in pack} for pack in packs_of(plan)]
    assert all(len(found) == 1 for found in windows)
    assert len(set().union(*windows)) == -(-len(sizes) // config.window) > 1


def test_packs_of_several_images_do_not_mix_windows():
    config = PackConfig(seq_len=64, window=50)
    order = naive.seeded_order(3, 4, range(300), 0)
    window_of = {image: place // 50 for place, image in enumerate(order)}
    packs = packs_of(plan_epoch(MANY, config, seed=3, epoch=4))
    assert max(map(len, packs)) > 1
    assert all(len({window_of[image] for image in pack}) == 1 for pack in packs)
    # Packs of all windows are mixed, not one window after the other.
    windows = [window_of[pack[0]] for pack in packs]
    assert windows != sorted(windows)


def test_every_epoch_and_every_seed_have_an_order_of_their_own():
    orders = [
        packs_of(plan_epoch(MANY, PackConfig(seq_len=64), seed=seed, epoch=epoch))
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)]
    ]
    assert len({str(order) for order in orders}) == 5


def test_the_same_arguments_give_the_same_plan():
    first, again = (plan_epoch(MANY, PackConfig(seq_len=64), seed=5, epoch=6) for _ in range(2))
    assert packs_of(first) == packs_of(again)
    assert len(first) > 1


@pytest.fixture
def plan() -> EpochPlan:
    return plan_epoch([[64, 64], [32, 96], [48, 16], [400, 400]], SMALL, index=[7, 3, 9, 11])


def test_a_plan_is_a_sequence_of_source_rows(plan):
    assert len(plan) == 3
    assert sorted(image for pack in packs_of(plan) for image in pack) == [3, 7, 9, 11]
    assert plan[-1].tolist() == plan[2].tolist()
    members = [plan.members(pack).tolist() for pack in range(3)]
    assert [[[7, 3, 9, 11][i] for i in pack] for pack in members] == packs_of(plan)
    with pytest.raises(IndexError):
        plan[3]
    with pytest.raises(IndexError):
        plan[-4]


def test_a_plan_knows_its_figures(plan):
    assert plan.grid_hw.tolist() == [[4, 4], [2, 6], [3, 1], [4, 4]]
    assert plan.num_keep.tolist() == [16, 12, 3, 16]
    assert plan.num_tokens == 47
    assert plan.fill == 47 / 72
    assert plan.padding == 1 - 47 / 72
    assert plan.bound == 3  # 16, 16 and 12: no two go together
    assert plan.gap == 0
    assert plan.num_shrunk == 1
    assert repr(plan) == (
        "EpochPlan(4 images, 47 tokens in 3 packs of 24: padding 34.72%, gap 0; seed 0, epoch 0)"
    )


def test_the_arrays_have_the_widths_they_are_stored_in(plan):
    arrays = (plan.index, plan.image_hw, plan.grid_hw, plan.num_keep, plan.order, plan.offsets)
    found = [str(array.dtype) for array in arrays]
    assert found == ["int64", "int32", "int16", "int32", "int64", "int64"]


@given(strategies.size_lists(), strategies.configs())
def test_no_plan_is_below_its_bound(sizes, config):
    plan = plan_epoch(sizes, config)
    assert plan.gap == len(plan) - plan.bound
    assert plan.gap >= 0
    assert plan.bound * config.seq_len >= plan.num_tokens
    assert plan.bound * config.max_segments >= len(sizes)


@pytest.mark.parametrize("empty", [[], np.empty((0, 2), np.int64), np.empty(0)])
def test_no_images_give_no_packs(empty):
    plan = plan_epoch(empty, SMALL)
    assert len(plan) == 0
    assert packs_of(plan) == []
    assert plan.fill == 1.0
    assert plan.num_tokens == plan.bound == plan.gap == plan.num_shrunk == 0
    assert repr(plan) == (
        "EpochPlan(0 images, 0 tokens in 0 packs of 24: padding 0.00%, gap 0; seed 0, epoch 0)"
    )


def test_an_extreme_image_is_kept():
    plan = plan_epoch([[1, 2**31 - 1], [2**31 - 1, 1]], replace(SMALL, max_segments=1))
    assert plan.grid_hw.tolist() == [[1, 24], [24, 1]]
    assert plan.num_shrunk == 2


SIZES = "leave the image out"
SIDES = f"expected two sides in 1..{2**31 - 1} pixels; {SIZES}"
SHAPE = "pass (height, width) in pixels per image"
KEY = f"expected an integer in 0..{2**64 - 1}; pass a non-negative integer below 2**64"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_hw": [[4, 4], [0, 5]]}, ValueError, f"image_hw[1] is (0, 5), {SIDES}"),
        ({"image_hw": [[4, -4], [0, 5]]}, ValueError, f"image_hw[0] is (4, -4), {SIDES}"),
        ({"image_hw": [[2**31, 5], [1, 1]]}, ValueError, f"image_hw[0] is ({2**31}, 5), {SIDES}"),
        (
            {"image_hw": np.array([[2**63, 5], [1, 1]], np.uint64)},
            ValueError,
            f"image_hw[0] is ({2**63}, 5), {SIDES}",
        ),
        (
            {"image_hw": [[4.0, 5.0], [1.0, 1.0]]},
            TypeError,
            f"image_hw.dtype is 'float64', expected an integer dtype; {SHAPE}",
        ),
        ({"image_hw": [4, 5]}, ValueError, f"image_hw.ndim is 1, expected 2; {SHAPE}"),
        (
            {"image_hw": [[4, 5, 3], [4, 5, 3]]},
            ValueError,
            f"image_hw.shape is (2, 3), expected (images, 2); {SHAPE}",
        ),
        (
            {"index": [5, 5]},
            ValueError,
            "index[1] is 5, expected no repeats; pass each image once",
        ),
        ({"index": [5]}, ValueError, "len(index) is 1, expected 2 (images); one row an image"),
        ({"index": [5, -6]}, ValueError, "index[1] is -6, expected 0 or more; count from zero"),
        (
            {"index": [0.0, 1.0]},
            TypeError,
            (
                "index.dtype is 'float64', expected an integer dtype; "
                "pass each image's row in its source"
            ),
        ),
        ({"seed": -1}, ValueError, f"seed is -1, {KEY}"),
        ({"epoch": 2**64}, ValueError, f"epoch is {2**64}, {KEY}"),
        ({"epoch": 0.0}, TypeError, f"epoch is 0.0, {KEY}"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    arguments = {"image_hw": [[4, 5], [6, 7]], "config": SMALL, **arguments}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        plan_epoch(**arguments)
