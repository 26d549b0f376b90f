from __future__ import annotations

import math
import re

import naive
import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe.philox import Key
from packpipe.planning.crops import CenterCrop, Crop, FixedCrop, crop_boxes
from packpipe.planning.distributions import Beta, Choice, Uniform
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch
from packpipe.planning.resolution import Side, Square

LARGEST = 2**31 - 1
CASES = st.tuples(strategies.size_lists(max_size=12), strategies.crops(), strategies.keys())
THIN = ([(1, LARGEST), (LARGEST, 1), (LARGEST, LARGEST), (1, 1)], Crop(), (1, 2))
TINY = ([(1, 1), (2, 1), (3, 5), (7, 400)], Crop(0.001, (0.01, 100), "square"), (2**64 - 1, 0))


def boxes(sizes, law, key, index=None, **options):
    index = np.arange(len(sizes)) if index is None else np.array(index)
    return crop_boxes(law, np.array(sizes), Key(*key), index=index, **options)


@given(CASES)
@example(THIN)
@example(TINY)
@example(([(7, 9)] * 5, FixedCrop(0.999, 0, 0.001, 0.001), (0, 0)))
def test_every_box_is_its_slow_twin_and_lies_within_its_image(case):
    sizes, law, key = case
    found = boxes(sizes, law, key)
    assert found.dtype == np.int32
    wanted = [naive.crop_box(*size, law, *key, i) for i, size in enumerate(sizes)]
    assert [tuple(box) for box in found.tolist()] == wanted
    start, size = found[:, :2].astype(int), found[:, 2:]
    assert (start >= 0).all()
    assert (size >= 1).all()
    assert (start + size <= np.array(sizes)).all()


@given(CASES, st.data())
@example(THIN, None)
def test_boxes_of_some_images_are_part_of_those_of_all(case, data):
    sizes, law, key = case
    index, places = list(range(len(sizes))), [0]
    if data is not None:
        rows = st.lists(st.integers(0, 2**62), min_size=len(sizes), max_size=len(sizes))
        index = data.draw(rows)
        places = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1))
    whole = boxes(sizes, law, key, index)
    part = boxes([sizes[i] for i in places], law, key, [index[i] for i in places])
    assert part.tolist() == whole[places].tolist()


def test_any_number_of_images_is_cropped_as_each_alone():
    sizes = np.random.default_rng(0).integers(1, 900, (3000, 2))
    whole = boxes(sizes, Crop(), (3, 4))
    alone = [boxes(sizes[i : i + 1], Crop(), (3, 4), [i])[0].tolist() for i in range(0, 3000, 7)]
    assert whole[::7].tolist() == alone
    assert len(np.unique(whole, axis=0)) == 3000


def test_every_epoch_and_view_crops_anew_and_none_depends_on_others():
    sizes = [(300, 400)] * 50
    found = [
        boxes(sizes, Crop(), key, view=view).tolist()
        for key, view in (((0, 0), 0), ((0, 1), 0), ((1, 0), 0), ((0, 0), 1))
    ]
    assert len({str(box) for some in found for box in some}) == 200
    assert boxes(sizes, Crop(), (0, 0)).tolist() == found[0]
    fixed = CenterCrop(0.3, "square")
    assert boxes(sizes, fixed, (0, 0)).tolist() == boxes(sizes, fixed, (5, 6), view=3).tolist()


def test_no_law_gives_no_boxes_and_no_images_none():
    assert boxes([(3, 4)], None, (0, 0)) is None
    for law in (Crop(), CenterCrop(), FixedCrop(0, 0, 1, 1)):
        found = crop_boxes(law, np.empty((0, 2), np.int32), Key(0, 0), index=[])
        assert found.shape == (0, 4)


MILLION = 10**6


@pytest.mark.parametrize("shape", ["image", "square"])
def test_a_million_boxes_follow_the_laws_of_area_shape_and_place(shape):
    sizes = np.tile([[60_000, 40_000], [50_000, 50_000]], (MILLION // 2, 1))
    law = Crop(Uniform(0.2, 0.4), (0.8, 1.5), shape)
    top, left, height, width = boxes(sizes, law, (5, 6)).T.astype(float)
    # Sides are so long that rounding them to pixels does not matter.
    share = height * width / sizes.prod(axis=1)
    own = 1 if shape == "square" else sizes[:, 1] / sizes[:, 0]
    factor = np.log(width / height / own)
    # Shares and logarithms of factors are uniform, and so are the places in what is left.
    for values, low, high in (
        (share, 0.2, 0.4),
        (factor, math.log(0.8), math.log(1.5)),
        (top / (sizes[:, 0] - height + 1), 0, 1),
        (left / (sizes[:, 1] - width + 1), 0, 1),
    ):
        spread = high - low
        assert abs(values.mean() - (low + high) / 2) < 4 * spread / 12**0.5 / MILLION**0.5
        # Of the variance spread² / 12 the standard error is spread² / 180**0.5 / n**0.5.
        assert abs(values.var() - spread**2 / 12) < 4 * spread**2 / 180**0.5 / MILLION**0.5
        assert low - 1e-4 < values.min() < low + 1e-3
        assert high - 1e-3 < values.max() < high + 1e-4
    found = np.corrcoef([share, factor, top / (sizes[:, 0] - height), left / (sizes[:, 1] - width)])
    assert abs(found - np.eye(4)).max() < 5 / MILLION**0.5


def test_the_usual_crop_has_the_area_it_is_told_and_its_shapes_are_cut_to_what_fits():
    sizes = np.full((MILLION, 2), 30_000)
    _, _, height, width = boxes(sizes, Crop(), (0, 0)).T.astype(float)
    share, factor = height * width / 30_000**2, width / height
    # A share of up to 1 cannot have every shape, but it keeps its area.
    assert abs(share.mean() - 0.54) < 4 * 0.92 / 12**0.5 / MILLION**0.5
    assert (factor >= share * (1 - 1e-3)).all()
    assert (factor <= 1 / share * (1 + 1e-3)).all()
    cut = (height == 30_000) | (width == 30_000)
    # Drawn beyond a..1/a: (1 - |t| / log(4/3)) averaged over shares above 3/4.
    shares = np.linspace(0.75, 1, 10_001)
    wanted = (1 - np.log(1 / shares) / math.log(4 / 3)).mean() * 0.25 / 0.92
    assert abs(cut.mean() - wanted) < 0.01


@pytest.mark.parametrize(
    ("law", "size", "box"),
    [
        # 224 of 256, as validation images are cropped.
        (CenterCrop(), (256, 256), [16, 16, 224, 224]),
        (CenterCrop(), (256, 512), [16, 32, 224, 448]),
        (CenterCrop(shape="square"), (256, 341), [16, 58, 224, 224]),
        (CenterCrop(1.0, "square"), (7, 4), [1, 0, 4, 4]),
        (CenterCrop(1e-9), (7, 4), [3, 1, 1, 1]),
        (CenterCrop(1), (7, 4), [0, 0, 7, 4]),
        (FixedCrop(0, 0, 1, 1), (7, 4), [0, 0, 7, 4]),
        (FixedCrop(0.25, 0.5, 0.5, 0.5), (40, 100), [10, 50, 20, 50]),
        (FixedCrop(0.9, 0.7, 0.1, 0.3), (1, 1), [0, 0, 1, 1]),
        (Crop(1.0, (0.1, 0.2)), (30, 40), [0, 0, 30, 40]),
        (Crop(1.0, (1, 1), "square"), (30, 40), [0, 0, 30, 40]),
        (Crop(0.25, (0.25, 0.25)), (30, 40), None),
    ],
)
def test_worked_boxes(law, size, box):
    (found,) = boxes([size], law, (0, 0)).tolist()
    if box is None:  # as high as the image, and a quarter as wide
        assert found[0] == 0
        box = [0, found[1], 30, 10]
    assert found == box


AREA = "it is the box's share of the image's area"
ASPECT = "(1, 1) keeps the shape"
SHARES = "pass shares of the image"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Crop(0), ValueError, f"area is 0, expected shares in (0, 1]; {AREA}"),
        (
            lambda: Crop(Uniform(0.5, 1.5)),
            ValueError,
            f"area is Uniform(low=0.5, high=1.5), expected shares in (0, 1]; {AREA}",
        ),
        (
            lambda: Crop(Beta(0.2, 0.5)),
            ValueError,
            f"area is Beta(mean=0.2, maximum=0.5), expected shares in (0, 1]; {AREA}",
        ),
        (
            lambda: Crop(aspect=1.5),
            TypeError,
            f"aspect is 1.5, expected (least, largest) factor on width ÷ height; {ASPECT}",
        ),
        (
            lambda: Crop(aspect=(0, 1)),
            ValueError,
            f"aspect[0] is 0, expected a number above 0; {ASPECT}",
        ),
        (
            lambda: Crop(aspect=(2, 1)),
            ValueError,
            "aspect[1] is 1, expected 2 (aspect[0]) or more; swap them",
        ),
        (
            lambda: Crop(shape="round"),
            ValueError,
            (
                "shape is 'round', expected one of 'image', 'square'; "
                "choose what aspect is a factor on"
            ),
        ),
        (
            lambda: CenterCrop(1.25),
            ValueError,
            "area is 1.25, expected a share in (0, 1]; it is a share of an area",
        ),
        (
            lambda: CenterCrop("0.5"),
            TypeError,
            "area is '0.5', expected a number; pass a number",
        ),
        (
            lambda: CenterCrop(shape="wide"),
            ValueError,
            "shape is 'wide', expected one of 'image', 'square'; choose the shape of the box",
        ),
        (
            lambda: FixedCrop(-0.5, 0, 1, 1),
            ValueError,
            f"top is -0.5, expected a share in [0, 1); {SHARES}",
        ),
        (
            lambda: FixedCrop(0, 0.5, 1, 0.75),
            ValueError,
            f"width is 0.75, expected above 0 and at most 1 - 0.5 (left); {SHARES}",
        ),
        (
            lambda: FixedCrop(0, 0, 0, 1),
            ValueError,
            f"height is 0, expected above 0 and at most 1 - 0 (top); {SHARES}",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()


def test_numbers_and_lists_are_laws_of_area():
    assert Crop([0.25, 1]).area == Choice((0.25, 1))
    assert Crop(0.5, [1, 2]) == Crop(0.5, (1, 2))


SIZES = np.random.default_rng(7).integers(1, 400, (300, 2))


def test_the_box_is_the_image_to_all_that_follows():
    config = PackConfig(
        seq_len=40, crop=Crop(), resolution=Side(Uniform(48, 160)), max_upscale=1.5, drop_rate=0.3
    )
    found = boxes(SIZES, config.crop, (1, 2))
    cropped = plan_epoch(SIZES, config, seed=1, epoch=2)
    cut = plan_epoch(found[:, 2:], PackConfig(**{**vars(config), "crop": None}), seed=1, epoch=2)
    assert cropped.grid_hw.tolist() == cut.grid_hw.tolist()
    assert cropped.num_keep.tolist() == cut.num_keep.tolist()
    assert [pack.tolist() for pack in cropped] == [pack.tolist() for pack in cut]
    assert cropped.image_hw.tolist() == SIZES.tolist()
    assert cropped.num_shrunk == cut.num_shrunk > 0
    whole = plan_epoch(SIZES, PackConfig(**{**vars(config), "crop": None}), seed=1, epoch=2)
    assert whole.grid_hw.tolist() != cropped.grid_hw.tolist()


def test_the_crop_is_explained_as_it_was_drawn():
    plan = plan_epoch(SIZES, PackConfig(crop=Crop()), seed=1, epoch=2)
    found = plan.explain(17)
    box = boxes(SIZES, Crop(), (1, 2))[17].tolist()
    assert list(found.box) == box
    top, left, height, width = box
    line = f"  crop    {height} x {width} pixels at ({top}, {left}) ({Crop()})"
    assert str(found).splitlines()[2] == line
    whole = plan_epoch(SIZES, PackConfig()).explain(17)
    assert whole.box is None
    assert "crop" not in str(whole)


def test_a_plan_without_a_crop_is_the_plan_of_before(tmp_path):
    plan = plan_epoch(SIZES, PackConfig(resolution=Square(64), jpeg_edges="padded"), seed=1)
    assert plan.fingerprint == "4c8ef122f152947323899eb24d9d74b5"
    cropped = plan_epoch(SIZES, PackConfig(resolution=Square(64), crop=Crop()), seed=1)
    assert cropped.grid_hw.tolist() == plan.grid_hw.tolist()
    assert cropped.fingerprint != plan.fingerprint
    cropped.save(tmp_path / "plan")
    again = type(plan).load(tmp_path / "plan")
    assert again.explain(3) == cropped.explain(3)
