"""Several views of each image in a plan: decided alone, each in exactly one pack."""

from __future__ import annotations

import re
from dataclasses import replace

import naive
import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe import Crop, Side, Square, Uniform, View
from packpipe.philox import Key
from packpipe.planning.decisions import boxes as boxes_of
from packpipe.planning.dropping import kept_tokens
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch

DRAWN = PackConfig(
    seq_len=40,
    patch_size=8,
    crop=Crop(),
    resolution=Side(Uniform(16, 48)),
    drop_rate=Uniform(0.1, 0.7),
    window=9,
    max_segments=5,
)
SIZES = np.random.default_rng(3).integers(8, 200, (40, 2)).tolist()
RULES = {
    "ffd": naive.first_fit_decreasing,
    "next_fit": naive.next_fit,
    "best_fit": naive.best_fit,
}


@st.composite
def cases(draw):
    """Sizes, a configuration with 1 to 4 views, perhaps together, a key and the images' rows."""
    sizes = draw(strategies.size_lists())
    config = draw(strategies.configs())
    views = draw(st.integers(1, 4))
    most = config.seq_len // views - config.prefix_tokens
    if views > 1 and most >= 1 and draw(st.booleans()):
        config = replace(
            config,
            max_tokens=draw(st.integers(1, most)),
            max_segments=max(views, config.max_segments),
            views=views,
            views_together=True,
        )
    elif views > 1 and draw(st.booleans()):
        config, views = with_laws(draw, config), None
    rows = st.lists(st.integers(0, 2**62), min_size=len(sizes), max_size=len(sizes), unique=True)
    config = config if views is None else replace(config, views=views)
    return sizes, config, draw(strategies.keys()), draw(rows)


def with_laws(draw, config):
    """The configuration, its views of two laws."""
    laws = tuple(
        View(
            count=draw(st.integers(1, 2)),
            crop=draw(st.none() | strategies.crops()),
            resolution=draw(strategies.resolutions()),
            max_tokens=draw(st.none() | st.integers(1, config.room)),
        )
        for _ in range(2)
    )
    upscale = (
        None if any(isinstance(law.resolution, Square) for law in laws) else config.max_upscale
    )
    fit_last = None if config.fit_last == "resolution" else config.fit_last
    plain = {"crop": None, "resolution": "native", "max_tokens": None}
    return replace(config, views=laws, max_upscale=upscale, fit_last=fit_last, **plain)


GLOBAL = View(count=2, crop=Crop(Uniform(0.4, 1)), resolution=Side(32), max_tokens=16)
LOCAL = View(count=3, crop=Crop(Uniform(0.05, 0.4)), resolution=Side(16), max_tokens=4)
DINO = PackConfig(seq_len=50, patch_size=8, views=(GLOBAL, LOCAL), max_segments=16, window=9)
TOGETHER = replace(DRAWN, views=3, views_together=True, max_tokens=13)


@given(cases())
@example((SIZES, replace(DRAWN, views=3), (1, 2), list(range(40))))
@example((SIZES, replace(DRAWN, views=2, strategy="ffd"), (1, 2), list(range(40))))
@example((SIZES, replace(TOGETHER, strategy="best_fit"), (1, 2), list(range(40))))
@example((SIZES, replace(TOGETHER, fit_last="resolution"), (1, 2), list(range(40))))
@example((SIZES, DINO, (1, 2), list(range(40))))
@example((SIZES, replace(DINO, views_together=True, strategy="ffd"), (1, 2), list(range(40))))
def test_every_view_is_decided_alone_and_in_exactly_one_pack(case):
    sizes, config, key, index = case
    views = config.num_views
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1], index=index)
    assert sorted(plan.order.tolist()) == list(range(len(sizes) * views))
    assert plan.packs.tokens_per_pack.max() <= config.seq_len
    assert plan.packs.segments_per_pack.max() <= config.max_segments
    if config.views_together:
        packs_of_image = plan._place_of.reshape(-1, views)
        where = np.searchsorted(plan.offsets, packs_of_image, "right")
        assert (where == where[:, :1]).all()
    if config.fit_last is not None:
        return
    decided = [
        naive.decide(*size, config.law_of(view), *key, i, view)
        for size, i in zip(sizes, index, strict=True)
        for view in range(views)
    ]
    grids, keeps, shrunk = zip(*decided, strict=True)
    assert plan.grid_hw.tolist() == [list(grid) for grid in grids]
    assert plan.num_keep.tolist() == list(keeps)
    assert plan.num_shrunk == sum(shrunk)
    if config.strategy not in RULES:
        return
    rule = RULES[config.strategy]
    options = {"max_segments": config.max_segments, "window": config.window}
    together = {"views": views, "together": config.views_together}
    lens = [keep + config.prefix_tokens for keep in keeps]
    packs = naive.plan(
        lens, index, config.seq_len, rule=rule, seed=key[0], epoch=key[1], **options, **together
    )
    assert [pack.tolist() for pack in plan.packs] == packs


@given(cases(), st.data())
def test_the_first_view_is_that_of_one_view_alone_and_a_part_is_that_of_all(case, data):
    sizes, config, key, index = case
    config = replace(config, fit_last=None)
    options = {"seed": key[0], "epoch": key[1]}
    plan = plan_epoch(sizes, config, index=index, **options)
    alone = replace(config.law_of(0), views=1, views_together=False)
    one = plan_epoch(sizes, alone, index=index, **options)
    assert plan.num_keep[:: config.num_views].tolist() == one.num_keep.tolist()
    assert plan.grid_hw[:: config.num_views].tolist() == one.grid_hw.tolist()
    some = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))
    part = plan_epoch([sizes[i] for i in some], config, index=[index[i] for i in some], **options)
    segments = [i * config.num_views + view for i in some for view in range(config.num_views)]
    assert part.num_keep.tolist() == plan.num_keep[segments].tolist()
    assert part.grid_hw.tolist() == plan.grid_hw[segments].tolist()


def test_views_differ_in_crop_size_and_kept_tokens():
    config = replace(DRAWN, views=4)
    plan = plan_epoch(SIZES, config, seed=1)
    explained = [[plan.explain(example, view) for view in range(4)] for example in range(40)]
    for name in ("box", "drawn", "drop_rate", "decided_grid_hw"):
        found = [{str(getattr(one, name)) for one in views} for views in explained]
        assert sum(len(values) > 1 for values in found) > 35, name
    same = {"index": np.full(4, 7), "num_tokens": np.full(4, 60), "num_keep": np.full(4, 20)}
    kept = kept_tokens(Key(1, 0), view=np.arange(4), **same).reshape(4, 20).tolist()
    assert kept == [naive.subset(1, 0, 7, 8, 60, 20, view) for view in range(4)]
    assert len(set(map(str, kept))) == 4


def test_a_plan_tells_where_each_view_is_and_why():
    plan = plan_epoch(SIZES, replace(DRAWN, views=3, fit_last="drop_rate"), seed=1)
    for segment in range(120):
        example, view = divmod(segment, 3)
        pack = plan.pack_of(example, view)
        assert segment in plan.packs[pack]
        assert example in plan[pack]
        found = plan.explain(example, view)
        assert plan.packs[pack][found.segment] == segment
        grid = tuple(plan.grid_hw[segment].tolist())
        assert (found.view, found.grid_hw, found.num_keep) == (view, grid, plan.num_keep[segment])
        decided = naive.decide(*SIZES[example], plan.config, 1, 0, example, view)
        assert (found.decided_grid_hw, found.decided_num_keep) == decided[:2]
    assert len({plan.pack_of(example, view) for example in range(40) for view in range(3)}) > 30
    assert str(plan.explain(7, 2)).startswith("example 7, view 2: pack ")
    assert repr(plan).startswith("EpochPlan(40 images of 3 views, ")
    message = "view is 3, expected 0..2; count views from zero"
    with pytest.raises(KeyError, match=re.escape(message)):
        plan.explain(0, 3)
    with pytest.raises(KeyError, match="view is -1"):
        plan.pack_of(0, -1)


def test_views_of_several_laws_follow_each_its_own(tmp_path):
    config = replace(DINO, views_together=True)
    plan = plan_epoch(SIZES, config, seed=1)
    assert (config.num_views, config.draws, config.crops) == (5, True, True)
    tokens = plan.num_keep.reshape(40, 5)
    assert tokens[:, :2].min() > 4 >= tokens[:, 2:].max()
    boxes = np.array([[plan.explain(e, v).box for v in range(5)] for e in range(40)])
    share = boxes[..., 2:].prod(2) / np.prod(SIZES, 1)[:, None]
    assert share[:, :2].min() > 0.37
    assert share[:, 2:].max() < 0.43
    assert "of 8 (Side(pixels=Constant(value=16)" in str(plan.explain(3, 2))
    plan.save(tmp_path / "plan.npz")
    again = EpochPlan.load(tmp_path / "plan.npz")
    assert (again.fingerprint, again.config) == (plan.fingerprint, config)
    key, hw = Key(1, 0), np.array(SIZES)
    one_is_whole = replace(DINO, views=(View(), LOCAL))
    found = boxes_of(one_is_whole, hw, key, index=np.arange(40), view=0)
    assert found.tolist() == [[0, 0, *size] for size in SIZES]
    assert boxes_of(replace(DINO, views=(View(), View())), hw, key, index=np.arange(40)) is None


BAD = [
    ({"views": ()}, TypeError, "views is (), expected a number, or some View"),
    ({"views": (2, 8)}, TypeError, "views is (2, 8), expected a number, or some View"),
    ({"views": (View(count=65536), View())}, ValueError, "views is 65537, expected at most 65536"),
    ({"crop": Crop()}, ValueError, f"crop is {Crop()!r}, expected None beside the laws of views"),
    ({"resolution": Side(8)}, ValueError, "resolution is Side(pixels=Constant(value=8), "),
    ({"max_tokens": 4}, ValueError, "max_tokens is 4, expected None beside the laws of views"),
    (
        {"fit_last": "resolution"},
        ValueError,
        "fit_last is 'resolution', expected None or 'drop_rate', with laws of views",
    ),
    (
        {"seq_len": 15},
        ValueError,
        "max_tokens is 16, expected an integer in 1..15",
    ),
    (
        {"seq_len": 43, "views_together": True},
        ValueError,
        "max_tokens of all views is 44, expected at most 43 (seq_len), for views_together",
    ),
    (
        {"views": (GLOBAL, View()), "views_together": True},
        ValueError,
        "max_tokens is None, expected a number in every View, for views_together",
    ),
    (
        {"max_segments": 4, "views_together": True},
        ValueError,
        "max_segments is 4, expected at least 5 (views), for views_together",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_laws_that_do_not_go_together_are_named(options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        replace(DINO, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "count is 0, expected an integer in 1..65536"),
        ({"crop": 3}, TypeError, "crop is 3, expected None or a crop"),
        ({"resolution": "small"}, ValueError, "resolution is 'small', expected "),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0, expected an integer in 1..32767"),
    ],
)
def test_a_bad_law_of_views_is_named(options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        View(**options)


def test_a_saved_plan_is_read_again_and_a_wrong_length_refused(tmp_path):
    plan = plan_epoch(SIZES, replace(DRAWN, views=3), seed=1)
    plan.save(tmp_path / "plan.npz")
    again = EpochPlan.load(tmp_path / "plan.npz")
    assert again.fingerprint == plan.fingerprint
    assert again.num_keep.tolist() == plan.num_keep.tolist()
    assert len(again.index) == 40
    assert plan.fingerprint != plan_epoch(SIZES, replace(DRAWN, views=2), seed=1).fingerprint
    wrong = replace(plan, config=replace(DRAWN, views=2))
    wrong.save(tmp_path / "wrong.npz")
    with pytest.raises(ValueError, match=r"grid_hw is int16\[120, 2\]"):
        EpochPlan.load(tmp_path / "wrong.npz")


def test_a_second_limit_is_refused_with_views():
    message = "views is 2, expected 1 with a second limit; leave views out"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_epoch(SIZES, replace(DRAWN, views=2), also=([1] * 40, 9))


def test_views_fill_rows_as_well_as_as_many_images_and_together_a_little_less():
    sizes = np.random.default_rng(5).integers(100, 600, (2000, 2))
    config = PackConfig(seq_len=256, max_tokens=64, crop=Crop(), views=2)
    apart = plan_epoch(sizes, config).quality
    together = plan_epoch(sizes, replace(config, views_together=True)).quality
    twice = plan_epoch(np.repeat(sizes, 2, 0), replace(config, views=1)).quality
    assert apart.num_tokens == together.num_tokens
    assert abs(apart.padding - twice.padding) < 0.005
    assert apart.padding <= together.padding < 0.1
