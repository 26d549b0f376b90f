from __future__ import annotations

import itertools
import re
from dataclasses import FrozenInstanceError
from fractions import Fraction

import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, example, given
from hypothesis import strategies as st

from packpipe.planning.distributions import Choice, Constant, Uniform
from packpipe.planning.resolution import (
    LAWS,
    Area,
    Budget,
    PixelRange,
    Side,
    Square,
    budget_grids,
    checked,
    is_drawn,
    patch_grids,
    shrunk_grids,
)

PATCHES = st.sampled_from([1, 7, 14, 16, 32])
ROUNDINGS = st.sampled_from(["nearest", "floor", "ceil"])
UNITS = st.floats(0, 1 - 2**-53)
NO_LIMIT = 2**15 - 1


def grid(height, width, patch, max_tokens, law, *, u=0.0, max_upscale=None) -> tuple[int, int]:
    found, _ = patch_grids(
        law,
        np.array([[height, width]]),
        patch,
        max_tokens,
        u=np.array([u]),
        max_upscale=max_upscale,
    )
    assert found.dtype == np.int64
    assert found.shape == (1, 2)
    return tuple(found[0].tolist())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), (16, 16)),
        ((1080, 1920), (12, 21)),
        ((600, 900), (13, 19)),
        ((3, 39), (4, 52)),
    ],
)
def test_published_budget_grids(size, expected):
    assert grid(*size, 16, 256, "budget") == expected
    assert grid(*size[::-1], 16, 256, "budget") == expected[::-1]
    assert naive.naflex_grid(*size, 16, 256) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((16, 16), (1, 1)),
        ((1, 1), (1, 1)),
        ((8, 24), (1, 2)),  # 0.5 -> 0 -> 1, 1.5 -> 2: half to even
        ((40, 56), (2, 4)),  # 2.5 -> 2, 3.5 -> 4
        ((23, 25), (1, 2)),
        ((1, 4000), (1, 250)),
        ((256, 256), (16, 16)),
    ],
)
def test_native_grids_round_each_axis_to_the_nearest(size, expected):
    assert grid(*size, 16, 256, "native") == expected


@given(strategies.image_sizes(), PATCHES, st.integers(1, 300))
@example((1, 4000), 16, 1)
@example((1, 4000), 16, 300)
@example((3, 39), 16, 256)
@example((256, 257), 16, 256)
@example((2, 3), 16, 6)
def test_budget_grid_is_the_grid_at_the_largest_scale_that_fits(size, patch, max_tokens):
    assert grid(*size, patch, max_tokens, "budget") == naive.budget_grid(*size, patch, max_tokens)


@given(strategies.image_sizes(), st.sampled_from([14, 16, 32]), st.integers(1, 300))
def test_budget_grid_is_at_least_the_official_searchs(size, patch, max_tokens):
    found = grid(*size, patch, max_tokens, "budget")
    official = naive.naflex_grid(*size, patch, max_tokens)
    assert official[0] <= found[0]
    assert official[1] <= found[1]
    assert found[0] * found[1] <= max_tokens


@given(strategies.image_sizes(1500), st.sampled_from([14, 16, 32]), st.integers(1, 300))
def test_budget_grid_is_the_official_one_wherever_its_step_and_range_can_find_it(
    size, patch, max_tokens
):
    scales = naive.budget_scales(*size, patch, max_tokens)
    # Our grid holds for the scales above the last but one breakpoint, up to the last.
    before = scales[-2] if len(scales) > 1 else Fraction(0)
    assume(scales[-1] < 99)
    assume(scales[-1] - before > Fraction(1, 10_000))
    assert grid(*size, patch, max_tokens, "budget") == naive.naflex_grid(*size, patch, max_tokens)


@given(strategies.image_sizes(), PATCHES)
@example((24, 40), 16)
@example((8, 16 * 700 + 8), 16)
def test_native_grids_are_the_naive_ones_whatever_their_size(size, patch):
    assert grid(*size, patch, 1, "native") == naive.native_grid(*size, patch)


@given(strategies.image_sizes(), PATCHES, st.integers(4, 600), ROUNDINGS)
@example((500, 500), 16, 224, "floor")
@example((500, 500), 16, 224, "ceil")
@example((300, 300), 16, 232, "nearest")  # 14.5 patches: half to even
@example((300, 1200), 16, 224, "floor")  # 7 x 28 patches
@example((9, 49), 18, 126, "ceil")  # 3 x 16.3 patches
@example((1, 4000), 16, 64, "nearest")
def test_side_resizes_to_that_many_pixels_squared(size, patch, side, rounding):
    wanted = naive.area_grid(Fraction(side) ** 2, *size, patch, rounding)
    assert grid(*size, patch, NO_LIMIT, Side(side, rounding)) == wanted


@given(strategies.image_sizes(), PATCHES, st.integers(4, 300_000), ROUNDINGS)
@example((500, 500), 16, 224**2, "floor")
@example((3, 5), 1, 60, "floor")  # 6 x 10 pixels
@example((3, 5), 1, 60, "ceil")
def test_area_resizes_to_that_many_pixels(size, patch, area, rounding):
    wanted = naive.area_grid(Fraction(area), *size, patch, rounding)
    assert grid(*size, patch, NO_LIMIT, Area(area, rounding)) == wanted


@given(strategies.image_sizes(), PATCHES, UNITS, ROUNDINGS)
def test_a_drawn_side_is_the_quantile_of_the_images_number(size, patch, u, rounding):
    found, drawn = patch_grids(
        Side(Uniform(64, 256), rounding), np.array([size]), patch, 1, u=np.array([u])
    )
    assert drawn.tolist() == [64 + u * 192]
    wanted = naive.area_grid(Fraction(64 + u * 192) ** 2, *size, patch, rounding)
    assert tuple(found[0].tolist()) == wanted


@pytest.mark.parametrize("rounding", ["nearest", "floor", "ceil"])
@pytest.mark.parametrize("side", [16, 160, 224, 384])
def test_a_square_image_of_any_size_becomes_the_square_asked_for(side, rounding):
    sides = np.arange(1, 2000)
    squares = np.stack([sides, sides], axis=1)
    found, _ = patch_grids(Side(side, rounding), squares, 16, 1, u=np.zeros(len(sides)))
    assert np.unique(found).tolist() == [side // 16]


@pytest.mark.parametrize("rounding", ["nearest", "floor", "ceil"])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_an_image_asked_for_a_whole_multiple_of_itself_becomes_just_that(scale, rounding):
    for rows, columns in itertools.product(range(1, 26), repeat=2):
        area = Area((16 * scale) ** 2 * rows * columns, rounding)
        found = grid(16 * rows, 16 * columns, 16, NO_LIMIT, area)
        assert found == (scale * rows, scale * columns)


@pytest.mark.parametrize(
    ("law", "size", "expected"),
    [
        (Side(224), (300, 400), (12, 16)),  # 12.12 x 16.17 patches
        (Side(224, "floor"), (300, 400), (12, 16)),
        (Side(224, "ceil"), (300, 400), (13, 17)),
        (Side(229), (300, 400), (12, 17)),  # 12.39 x 16.53
        (Side(256), (256, 256), (16, 16)),
        (Side(256), (128, 512), (8, 32)),
        (Side(8), (300, 400), (1, 1)),
        (Side(8, "floor"), (300, 400), (1, 1)),
        (Area(224**2), (300, 400), (12, 16)),
        (Area(224**2, "ceil"), (300, 400), (13, 17)),
        (Budget(256), (1080, 1920), (12, 21)),
        (Budget(256.9), (1080, 1920), (12, 21)),
        (Budget(15.9), (500, 500), (3, 3)),  # rounded down
        (Budget(0.5), (1080, 1920), (1, 1)),
        (Square(224), (300, 400), (14, 14)),
        (Square(224), (1, 4000), (14, 14)),
        (Square(229), (300, 400), (14, 14)),  # 14.31 patches
        (Square(229, "ceil"), (300, 400), (15, 15)),
        (Square(8, "floor"), (300, 400), (1, 1)),
        (PixelRange(), (300, 400), (18, 24)),  # 9.4 x 12.5 blocks of 32: half to even
        (PixelRange(), (16, 400), (2, 18)),  # half a block is none, too little: 0.7 x as large
        (PixelRange(), (1080, 1920), (46, 82)),  # 2.1 million pixels: 23.5 x 41.7 blocks
        (PixelRange(), (30, 40), (4, 6)),  # 1.9 x 2.4 blocks, rounded up
        (PixelRange(64**2, 128**2), (500, 500), (8, 8)),
        (PixelRange(64**2, 128**2), (40, 7000), (2, 104)),  # a block at least: over the limit
        (PixelRange(64**2, 128**2, 1), (70, 90), (4, 6)),
        (PixelRange(64**2, 128**2, 4), (70, 90), (4, 4)),
    ],
)
def test_worked_sizes(law, size, expected):
    assert grid(*size, 16, NO_LIMIT, law) == expected
    assert grid(*size[::-1], 16, NO_LIMIT, law) == expected[::-1]


@given(strategies.image_sizes(1500), PATCHES, st.integers(1, 300), st.integers(1, 300), UNITS)
def test_a_drawn_budget_is_a_budget(size, patch, one, other, u):
    law = Budget([one, other])
    found, drawn = patch_grids(law, np.array([size]), patch, 200, u=np.array([u]))
    budget = one if u < 0.5 else other
    assert drawn.tolist() == [budget]
    assert tuple(found[0].tolist()) == naive.budget_grid(*size, patch, min(budget, 200))


def test_budgets_of_a_choice_are_all_used():
    sizes = np.full((4, 2), 1000)
    law = Budget([16, 64, 100, 400])
    found, drawn = patch_grids(law, sizes, 16, 256, u=np.array([0.1, 0.3, 0.6, 0.9]))
    assert found.tolist() == [[4, 4], [8, 8], [10, 10], [16, 16]]
    assert drawn.tolist() == [16, 64, 100, 400]


@given(strategies.image_sizes(), PATCHES, st.integers(1, 600), ROUNDINGS)
@example((300, 1200), 16, 232, "nearest")  # 14.5 patches: half to even
@example((300, 1200), 16, 232, "floor")
@example((300, 1200), 16, 232, "ceil")
@example((1, 4000), 16, 1, "floor")
def test_a_square_has_its_side_rounded_on_both_axes(size, patch, side, rounding):
    wanted = naive.square_grid(Fraction(side), patch, rounding)
    assert grid(*size, patch, NO_LIMIT, Square(side, rounding)) == wanted
    assert wanted[0] == wanted[1]


@given(strategies.image_sizes(), PATCHES, UNITS, ROUNDINGS)
def test_a_drawn_square_is_the_quantile_of_the_images_number(size, patch, u, rounding):
    found, drawn = patch_grids(
        Square(Uniform(64, 256), rounding), np.array([size]), patch, 1, u=np.array([u])
    )
    assert drawn.tolist() == [64 + u * 192]
    assert tuple(found[0].tolist()) == naive.square_grid(Fraction(drawn[0]), patch, rounding)


@given(strategies.image_sizes())
def test_a_square_image_is_the_same_as_a_square_and_as_a_side(size):
    side, _ = size
    for pixels in (100, 224, 232):
        assert grid(*size, 16, 1, Square(pixels)) == grid(side, side, 16, 1, Side(pixels))


UPSCALES = st.sampled_from([0.25, 0.3, 0.5, 1, 1.0, 1.1, 1.5, 2, 7])


@given(strategies.image_sizes(), PATCHES, st.integers(4, 600), ROUNDINGS, UPSCALES)
@example((32, 32), 16, 224, "nearest", 1)
@example((320, 320), 16, 224, "nearest", 1)
def test_max_upscale_limits_the_scale_of_a_side(size, patch, side, rounding, max_upscale):
    found = grid(*size, patch, NO_LIMIT, Side(side, rounding), max_upscale=max_upscale)
    assert found == naive.area_grid(
        Fraction(side) ** 2, *size, patch, rounding, max_upscale=max_upscale
    )
    # Rounding moves an axis by one patch at most, and never below one.
    limit = [max(1.0, axis * max_upscale / patch + 1) for axis in size]
    assert (np.array(found) <= limit).all()


@given(strategies.image_sizes(1500), PATCHES, st.integers(1, 300), UPSCALES)
@example((3, 39), 16, 256, 1)
@example((40, 50), 16, 256, 1.5)
@example((4000, 3000), 16, 256, 2)
def test_max_upscale_limits_the_scale_of_a_budget(size, patch, max_tokens, max_upscale):
    wanted = naive.limited_budget_grid(*size, patch, max_tokens, max_upscale)
    free = naive.budget_grid(*size, patch, max_tokens)
    for law in ("budget", Budget(max_tokens)):
        found = grid(*size, patch, max_tokens, law, max_upscale=max_upscale)
        assert found == wanted
        assert found[0] <= free[0]
        assert found[1] <= free[1]


@given(strategies.image_sizes(1500), PATCHES, UPSCALES)
def test_a_native_image_is_never_enlarged_but_may_be_capped(size, patch, max_upscale):
    own = naive.native_grid(*size, patch)
    if max_upscale < 1:
        own = naive.scaled_grid(max_upscale, *size, patch, "nearest")
    assert grid(*size, patch, NO_LIMIT, "native", max_upscale=max_upscale) == own


def test_worked_upscales():
    small, large = (40, 60), (400, 600)
    assert grid(*small, 16, 256, "budget") == (13, 19)
    assert grid(*small, 16, 256, "budget", max_upscale=1) == (3, 4)
    assert grid(*small, 16, 256, "budget", max_upscale=2) == (5, 8)
    assert grid(*large, 16, 256, "budget", max_upscale=2) == (13, 19)
    assert grid(*small, 16, 256, Side(160), max_upscale=1) == (2, 4)  # 2.5 x 3.75 patches
    assert grid(*large, 16, 256, "native", max_upscale=0.5) == (12, 19)  # 12.5 x 18.75


SIDES = st.integers(1, 2**31 - 1) | st.integers(1, 5000)
SCALED = [*LAWS, Side(224), Side(Uniform(64, 256), "ceil"), Area(50_000), Budget([16, 256])]
SQUARES = [Square(224), Square(Uniform(64, 256), "ceil")]
RANGE = PixelRange(4096, 65536)
EVERY_LAW = [*SCALED, *SQUARES, RANGE]


@given(
    size=st.tuples(SIDES, SIDES), patch=st.integers(1, 128), max_tokens=st.integers(1, 2**15 - 1)
)
@example(size=(2**31 - 1, 1), patch=1, max_tokens=2**15 - 1)
@example(size=(1, 2**31 - 1), patch=128, max_tokens=1)
@example(size=(2**31 - 1, 2**31 - 1), patch=1, max_tokens=2**15 - 1)
def test_a_budget_gives_one_token_at_least_and_the_limit_at_most(size, patch, max_tokens):
    rows, columns = grid(*size, patch, max_tokens, "budget")
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= max_tokens
    again = budget_grids(np.array([size]), np.array([max_tokens]))
    assert again.tolist() == [[rows, columns]], "the scale of the image does not matter"


@pytest.mark.parametrize(
    ("law", "max_upscale"),
    [*itertools.product(SCALED, [None, 0.5, 1, 1000]), *((law, None) for law in [*SQUARES, RANGE])],
    ids=str,
)
@given(size=st.tuples(SIDES, SIDES), patch=st.integers(1, 128), u=UNITS)
@example(size=(2**31 - 1, 1), patch=1, u=0.0)
@example(size=(2**31 - 1, 2**31 - 1), patch=1, u=0.0)
def test_a_turned_image_has_the_turned_grid(law, max_upscale, size, patch, u):
    rows, columns = grid(*size, patch, 256, law, u=u, max_upscale=max_upscale)
    assert 1 <= rows <= 2**31
    assert 1 <= columns <= 2**31
    turned = grid(*size[::-1], patch, 256, law, u=u, max_upscale=max_upscale)
    assert turned == (columns, rows)


@pytest.mark.parametrize(
    ("law", "max_upscale"),
    [*((law, 1.5) for law in SCALED), *((law, None) for law in [*SQUARES, RANGE])],
    ids=str,
)
@given(sizes=strategies.size_lists(min_size=2), max_tokens=st.integers(1, 200), data=st.data())
def test_an_images_grid_depends_on_its_own_size_and_number_only(
    law, max_upscale, sizes, max_tokens, data
):
    u = data.draw(st.lists(UNITS, min_size=len(sizes), max_size=len(sizes)))
    together, drawn = patch_grids(
        law, np.array(sizes), 16, max_tokens, u=np.array(u), max_upscale=max_upscale
    )
    for i, size in enumerate(sizes):
        alone, also_drawn = patch_grids(
            law, np.array([size]), 16, max_tokens, u=np.array(u[i : i + 1]), max_upscale=max_upscale
        )
        assert alone.tolist() == together[i : i + 1].tolist()
        assert (drawn is None) == (also_drawn is None)
        assert drawn is None or also_drawn.tolist() == drawn[i : i + 1].tolist()


@pytest.mark.parametrize("law", EVERY_LAW, ids=str)
def test_no_images_have_no_grids(law):
    found, drawn = patch_grids(law, np.empty((0, 2), np.int32), 16, 256, u=np.empty(0))
    assert found.shape == (0, 2)
    assert drawn.shape == (0,) if is_drawn(law) else drawn is None


def test_a_number_is_a_constant_and_a_list_a_choice():
    assert Side(224) == Side(Constant(224))
    assert Area([100, 200], "floor") == Area(Choice((100, 200)), "floor")
    assert Budget([128, 256, 576]) == Budget(Choice((128, 256, 576)))
    assert Side(224) != Area(224)
    assert Square(224) == Square(Constant(224))
    laws = {Side(224), Side(224, "floor"), Area(224), Budget(224), Side([224]), Square(224)}
    assert len(laws) == 6
    with pytest.raises(FrozenInstanceError):
        Side(224).pixels = 3


@pytest.mark.parametrize("law", EVERY_LAW, ids=str)
def test_a_law_is_returned_as_it_is(law):
    assert checked(law) is law


@given(
    strategies.image_sizes(), st.integers(1, 4), st.integers(0, 300), st.sampled_from([None, 64])
)
@example((9, 999), 2, 0, None)
@example((999, 9), 4, 9, None)
def test_a_grid_that_is_shrunk_keeps_whole_blocks(size, multiple, more, side):
    limit = multiple**2 + more
    law = PixelRange(1, 10**6, multiple) if side is None else Square(side)
    blocks, shape = (multiple, size) if side is None else (1, (1, 1))
    wanted = naive.budget_grid(*shape, 1, limit // blocks**2)
    found = shrunk_grids(law, np.array([size]), np.array([limit]))[0].tolist()
    assert found == [blocks * axis for axis in wanted]
    assert found[0] * found[1] <= limit


CHOOSE = "expected one of 'nearest', 'floor', 'ceil'; choose how axes become patches"
POSITIVE = "expected numbers above 0; an image has at least one"
A_NUMBER = "expected a number; or pass a distribution, such as Uniform(64, 256)"


@pytest.mark.parametrize("value", [1e19, 1e30, 1e300, 1.7e308])
@pytest.mark.parametrize("law", [Side, Area, Budget, Square])
def test_numbers_beyond_all_grids_give_the_largest_one(law, value):
    hw, u = np.array([[480, 640], [1, 1]]), np.zeros(2)
    found, _ = patch_grids(law(value), hw, 16, 200, u=u)
    wanted, _ = patch_grids(law(1e9), hw, 16, 200, u=u)
    if law is Budget:
        assert found.tolist() == wanted.tolist() == budget_grids(hw, np.array([200] * 2)).tolist()
    assert (found >= np.minimum(wanted, 2**20)).all()


A_LAW = (
    "expected one of 'native', 'budget'; or pass Side(...), Area(...), Budget(...), Square(...) or "
    "PixelRange(...)"
)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Side(224, "up"), ValueError, f"rounding is 'up', {CHOOSE}"),
        (lambda: Area(224, None), ValueError, f"rounding is None, {CHOOSE}"),
        (lambda: Square(224, "round"), ValueError, f"rounding is 'round', {CHOOSE}"),
        (lambda: Square(None), TypeError, f"pixels is None, {A_NUMBER}"),
        (lambda: Square(0), ValueError, f"pixels is 0, {POSITIVE}"),
        (lambda: Side("224"), TypeError, f"pixels is '224', {A_NUMBER}"),
        (lambda: Area(None), TypeError, f"pixels is None, {A_NUMBER}"),
        (lambda: Budget(True), TypeError, f"tokens is True, {A_NUMBER}"),
        (lambda: Side(0), ValueError, f"pixels is 0, {POSITIVE}"),
        (
            lambda: Area(Uniform(-5, 5)),
            ValueError,
            f"pixels is Uniform(low=-5, high=5), {POSITIVE}",
        ),
        (lambda: Budget([128, 0]), ValueError, f"tokens is [128, 0], {POSITIVE}"),
        (
            lambda: Budget([128, "256"]),
            TypeError,
            "values[1] is '256', expected a number; pass a number",
        ),
        (
            lambda: PixelRange(0),
            ValueError,
            "min_pixels is 0, expected an integer in 1..2147483647; 56 · 56 is usual",
        ),
        (
            lambda: PixelRange(500, 499),
            ValueError,
            "max_pixels is 499, expected an integer in 500..2147483647; no less than min_pixels",
        ),
        (
            lambda: PixelRange(grid_multiple=1.5),
            TypeError,
            "grid_multiple is 1.5, expected an integer in 1..128; 2 is usual",
        ),
        (lambda: checked("naflex"), ValueError, f"resolution is 'naflex', {A_LAW}"),
        (lambda: checked(Side), ValueError, f"resolution is {Side!r}, {A_LAW}"),
        (
            lambda: checked(Uniform(64, 256)),
            ValueError,
            f"resolution is Uniform(low=64, high=256), {A_LAW}",
        ),
    ],
)
def test_bad_laws_are_named(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()
