from __future__ import annotations

import itertools
from dataclasses import replace

import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, example, given
from hypothesis import strategies as st

from packpipe.philox import Key
from packpipe.planning.crops import Crop
from packpipe.planning.decisions import decide_all
from packpipe.planning.distributions import Beta, Uniform
from packpipe.planning.image_config import PackConfig
from packpipe.planning.image_options import FIT_LAST
from packpipe.planning.plan import plan_epoch
from packpipe.planning.resolution import Side, Square

MANY = np.random.default_rng(7).integers(1, 200, (400, 2))
PAPERS = PackConfig(
    seq_len=256, resolution=Side(Uniform(64, 256)), drop_rate=Beta(0.5, 0.7), fit_last="drop_rate"
)


@st.composite
def cases(draw, **options):
    """(sizes, configuration that fits, key)."""
    config = draw(strategies.configs(**options))
    config = replace(config, fit_last=draw(st.sampled_from(FIT_LAST)))
    return draw(strategies.size_lists(max_size=25)), config, draw(strategies.keys())


def planned(case):
    """(plan, the same plan without fitting, the decisions' grids, their token counts)."""
    sizes, config, (seed, epoch) = case
    plan = plan_epoch(sizes, config, seed=seed, epoch=epoch)
    plain = plan_epoch(sizes, replace(config, fit_last=None), seed=seed, epoch=epoch)
    index = np.arange(len(sizes))
    grid_hw, num_keep, _ = decide_all(np.array(sizes), config, Key(seed, epoch), index=index)
    return plan, plain, grid_hw, num_keep


def tokens_of(grid_hw):
    return grid_hw.astype(int).prod(axis=1)


GROWS = ([(40, 60), (16, 16), (90, 33), (64, 64)] * 5, replace(PAPERS, seq_len=24), (1, 2))
ENLARGES = (GROWS[0], PackConfig(seq_len=40, fit_last="resolution", fit_limit=2), (1, 2))
LIMITED = ([(64, 64), (8, 64)] * 5, replace(ENLARGES[1], seq_len=24, max_tokens=16), (0, 0))
CAPPED = (GROWS[0], replace(ENLARGES[1], max_upscale=1), (1, 2))
SQUARES = (GROWS[0], replace(ENLARGES[1], seq_len=43, resolution=Square([48, 64, 80])), (0, 1))
CROPPED = (GROWS[0], replace(ENLARGES[1], crop=Crop(), max_upscale=1), (1, 2))
BOTH = (GROWS[0], replace(PAPERS, seq_len=24, fit_last="resolution", fit_limit=1), (3, 4))


@given(cases())
@example(GROWS)
@example(ENLARGES)
@example(LIMITED)
@example(CAPPED)
@example(SQUARES)
@example(CROPPED)
@example(BOTH)
def test_fitting_is_the_slow_twins(case):
    sizes, config, key = case
    plan, plain, grid_hw, num_keep = planned(case)
    packs, grids, keeps, grown = naive.fit_last(
        [pack.tolist() for pack in plain],
        [naive.shown_hw(size, config, *key, i) for i, size in enumerate(sizes)],
        [tuple(grid) for grid in grid_hw.tolist()],
        num_keep.tolist(),
        config,
    )
    assert [tuple(grid) for grid in plan.grid_hw.tolist()] == grids
    assert plan.num_keep.tolist() == keeps
    assert [pack.tolist() for pack in plan] == packs
    assert plan.num_fitted == grown


@given(cases())
@example(GROWS)
@example(ENLARGES)
@example(BOTH)
def test_only_the_last_image_of_a_pack_grows_and_nobody_changes_packs(case):
    plan, plain, grid_hw, num_keep = planned(case)
    fitted = 0
    assert len(plan) == len(plain)
    for pack, without in zip(plan, plain, strict=True):
        assert sorted(pack.tolist()) == sorted(without.tolist())
        others, last = pack[:-1], pack[-1]
        assert (plan.grid_hw[others] == grid_hw[others]).all()
        assert (plan.num_keep[others] == num_keep[others]).all()
        assert plan.num_keep[last] >= num_keep[last]
        moved = (plan.grid_hw[last] != grid_hw[last]).any() or plan.num_keep[last] != num_keep[last]
        assert not moved or plan.num_keep[last] > num_keep[last]
        fitted += bool(moved)
    assert plan.num_fitted == fitted
    assert plain.num_fitted == 0
    assert plan.num_shrunk == plain.num_shrunk


@given(cases())
@example(GROWS)
@example(ENLARGES)
@example(BOTH)
def test_growth_stays_within_the_pack_the_limits_and_the_grid(case):
    _, config, _ = case
    plan, plain, grid_hw, num_keep = planned(case)
    assert all(plan.seq_lens[pack].sum() <= config.seq_len for pack in plan)
    growth = plan.num_keep - num_keep
    assert (growth <= num_keep * config.fit_limit).all()
    assert (plan.num_keep <= tokens_of(plan.grid_hw)).all()
    assert (tokens_of(plan.grid_hw) <= config.token_limit).all()
    if not config.drops:
        assert (plan.num_keep == tokens_of(plan.grid_hw)).all()
    if config.fit_last == "drop_rate":
        assert (plan.grid_hw == grid_hw).all()
    assert plan.quality.padding <= plain.quality.padding


@given(cases())
@example(ENLARGES)
@example(CAPPED)
def test_no_image_grows_beyond_max_upscale(case):
    sizes, config, key = case
    assume(not isinstance(config.resolution, Square))
    config = replace(config, max_upscale=config.max_upscale or 1.5, fit_last="resolution")
    plan, _, grid_hw, _ = planned((sizes, config, key))
    enlarged = (plan.grid_hw != grid_hw).any(axis=1)
    limit = np.ceil(np.maximum(np.array(sizes) * config.max_upscale / config.patch_size, 1))
    assert (plan.grid_hw <= limit)[enlarged].all()


@given(cases(drops=True))
@example(GROWS)
def test_no_padding_is_left_where_one_image_may_keep_enough(case):
    sizes, config, key = case
    config = replace(config, fit_last="drop_rate")
    plan, _, grid_hw, num_keep = planned((sizes, config, key))
    may_grow = np.minimum(np.floor(num_keep * config.fit_limit), tokens_of(grid_hw) - num_keep)
    room = [config.seq_len - (num_keep[pack] + config.prefix_tokens).sum() for pack in plan]
    largest = [may_grow[pack].max() for pack in plan]
    left = [config.seq_len - plan.seq_lens[pack].sum() for pack in plan]
    assert left == [max(0, a - b) for a, b in zip(room, largest, strict=True)]


def test_the_papers_mix_is_packed_without_padding():
    sizes = np.random.default_rng(2).integers(100, 700, (4000, 2))
    plan = plan_epoch(sizes, replace(PAPERS, seq_len=512))
    plain = plan_epoch(sizes, replace(PAPERS, seq_len=512, fit_last=None))
    assert plain.quality.padding > 0
    padded = sum(plan.num_keep[pack].sum() < 512 for pack in plan)
    assert padded <= 1  # the last of its window may be nearly empty
    assert 0 < plan.num_fitted < len(plan)


def test_enlarging_fills_packs_as_far_as_whole_patches_allow():
    config = PackConfig(seq_len=256, resolution=Side(Uniform(64, 200)), fit_last="resolution")
    sizes = np.random.default_rng(2).integers(100, 700, (4000, 2))
    plain = plan_epoch(sizes, replace(config, fit_last=None, window=100))
    plan = plan_epoch(sizes, replace(config, window=100))
    assert plan.num_fitted > 100
    assert plan.quality.padding < plain.quality.padding


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_squares_grow_to_squares(drop_rate):
    config = replace(SQUARES[1], drop_rate=drop_rate, max_segments=2, strategy="next_fit")
    plan, _, grid_hw, _ = planned((MANY, config, (0, 1)))
    assert (plan.grid_hw[:, 0] == plan.grid_hw[:, 1]).all()
    assert (np.diff(plan.offsets) > 1).any()
    assert (plan.grid_hw > grid_hw).all(axis=1).sum() > 10


def test_with_dropping_an_image_that_cannot_be_enlarged_keeps_more_of_its_tokens():
    # 8 of 16 tokens each; 10 would be kept of 20, but 4 x 4 grows to 5 x 5 at once.
    config = PackConfig(seq_len=18, drop_rate=0.5, fit_last="resolution")
    plan = plan_epoch([[64, 64], [64, 64]], config)
    assert plan.grid_hw.tolist() == [[4, 4], [4, 4]]
    assert sorted(plan.num_keep.tolist()) == [8, 10]
    assert plan.quality.fill == 1
    assert plan.num_fitted == 1


def test_the_first_of_those_that_can_take_the_most_becomes_the_last():
    # One pack: 12, 12, 4 and 12 tokens are kept, and there is room for 3, of which 4 may take 2.
    sizes = [[96, 64], [96, 64], [32, 64], [96, 64]]
    config = PackConfig(
        seq_len=43, drop_rate=0.5, fit_last="drop_rate", strategy="next_fit", fit_limit=0.5
    )
    plain = plan_epoch(sizes, replace(config, fit_last=None), seed=14)
    plan = plan_epoch(sizes, config, seed=14)
    (before,) = (pack.tolist() for pack in plain)
    (after,) = (pack.tolist() for pack in plan)
    assert before[0] == 2
    assert after == [2, before[3], before[2], before[1]]
    assert plain.num_keep[before].tolist() == [4, 12, 12, 12]
    assert plan.num_keep[after].tolist() == [4, 12, 12, 15]


def test_an_image_at_its_limit_leaves_the_room_to_one_that_can_grow():
    # 16 tokens are the limit, so that it is the image of 1 x 4 patches that grows, to 1 x 6.
    config = PackConfig(seq_len=24, max_tokens=16, fit_last="resolution", fit_limit=0.5)
    plan = plan_epoch([[64, 64], [8, 64]], config)
    assert plan.grid_hw.tolist() == [[4, 4], [1, 6]]
    assert plan.num_fitted == 1


@pytest.mark.parametrize(("mode", "expected"), [("drop_rate", [16, 30]), ("resolution", [30, 30])])
@pytest.mark.parametrize("fit_limit", [1000, 1e18, 1e300])
def test_a_limit_beyond_all_numbers_is_no_limit(mode, expected, fit_limit):
    config = PackConfig(seq_len=30, drop_rate=0.5, fit_last=mode, fit_limit=fit_limit)
    plan = plan_epoch([[64, 64], [160, 160]], config)
    assert len(plan) == 2
    assert plan.num_keep.tolist() == expected
    assert plan.num_fitted == 2


@pytest.mark.parametrize("mode", FIT_LAST)
def test_full_packs_are_left_alone(mode):
    config = PackConfig(seq_len=16, fit_last=mode, fit_limit=1)
    plan = plan_epoch([[64, 64]] * 9, config)
    plain = plan_epoch([[64, 64]] * 9, replace(config, fit_last=None))
    assert plan.num_fitted == 0
    assert [pack.tolist() for pack in plan] == [pack.tolist() for pack in plain]


@pytest.mark.parametrize("mode", FIT_LAST)
def test_no_images_fit_anywhere(mode):
    plan = plan_epoch([], PackConfig(fit_last=mode))
    assert len(plan) == plan.num_fitted == 0


@pytest.mark.parametrize("mode", FIT_LAST)
def test_many_packs_are_fitted_as_few_are(mode):
    # More packs than are looked at in one go.
    config = PackConfig(
        seq_len=8, drop_rate=0.5, fit_last=mode, strategy="next_fit", window=500, fit_limit=0.5
    )
    sizes = np.random.default_rng(5).integers(16, 80, (14_000, 2))
    plan, plain, grid_hw, num_keep = planned((sizes, config, (1, 1)))
    assert len(plain) > 2**13
    packs, grids, keeps, grown = naive.fit_last(
        [pack.tolist() for pack in plain],
        sizes.tolist(),
        [tuple(grid) for grid in grid_hw.tolist()],
        num_keep.tolist(),
        config,
    )
    assert plan.order.tolist() == list(itertools.chain(*packs))
    assert plan.num_keep.tolist() == keeps
    assert [tuple(grid) for grid in plan.grid_hw.tolist()] == grids
    assert plan.num_fitted == grown > 1000


@given(cases())
def test_fitting_depends_on_the_packs_alone(case):
    sizes, config, key = case
    assume(len(sizes) > 1)
    plan, *_ = planned(case)
    order = np.random.default_rng(0).permutation(len(sizes))
    moved = plan_epoch([sizes[i] for i in order], config, seed=key[0], epoch=key[1], index=order)
    assert [pack.tolist() for pack in moved] == [pack.tolist() for pack in plan]
    assert moved.num_keep.tolist() == plan.num_keep[order].tolist()
    assert moved.grid_hw.tolist() == plan.grid_hw[order].tolist()
