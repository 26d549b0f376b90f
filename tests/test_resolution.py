from __future__ import annotations

from fractions import Fraction

import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, example, given
from hypothesis import strategies as st

from packpipe.resolution import LAWS, native_grids, patch_grids

PATCHES = st.sampled_from([1, 7, 14, 16, 32])


def grid(height: int, width: int, patch: int, max_tokens: int, law: str) -> tuple[int, int]:
    found = patch_grids(np.array([[height, width]]), patch, max_tokens, law)
    assert found.dtype == np.int16
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
    scales = [
        scale
        for scale in naive.breakpoints(*size, patch, max_tokens)
        if np.prod(naive.grid_at(scale, *size, patch)) <= max_tokens
    ]
    # Our grid holds for the scales above the last but one breakpoint, up to the last.
    before = scales[-2] if len(scales) > 1 else Fraction(0)
    assume(scales[-1] < 99)
    assume(scales[-1] - before > Fraction(1, 10_000))
    assert grid(*size, patch, max_tokens, "budget") == naive.naflex_grid(*size, patch, max_tokens)


@given(strategies.image_sizes(), PATCHES, st.integers(1, 300))
@example((24, 40), 16, 300)
def test_native_images_that_fit_are_untouched_and_others_shrunk_by_the_budget(
    size, patch, max_tokens
):
    own = naive.native_grid(*size, patch)
    fits = own[0] * own[1] <= max_tokens
    expected = own if fits else naive.budget_grid(*size, patch, max_tokens)
    assert grid(*size, patch, max_tokens, "native") == expected
    assert tuple(native_grids(np.array([size]), patch)[0].tolist()) == own


SIDES = st.integers(1, 2**31 - 1) | st.integers(1, 5000)


@pytest.mark.parametrize("law", LAWS)
@given(
    size=st.tuples(SIDES, SIDES), patch=st.integers(1, 128), max_tokens=st.integers(1, 2**15 - 1)
)
@example(size=(2**31 - 1, 1), patch=1, max_tokens=2**15 - 1)
@example(size=(1, 2**31 - 1), patch=128, max_tokens=1)
@example(size=(2**31 - 1, 2**31 - 1), patch=1, max_tokens=2**15 - 1)
def test_every_image_gets_one_token_at_least_and_the_limit_at_most(law, size, patch, max_tokens):
    rows, columns = grid(*size, patch, max_tokens, law)
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= max_tokens
    assert grid(*size[::-1], patch, max_tokens, law) == (columns, rows)


@pytest.mark.parametrize("law", LAWS)
@given(sizes=strategies.size_lists(min_size=2), max_tokens=st.integers(1, 200))
def test_an_images_grid_depends_on_its_own_size_only(law, sizes, max_tokens):
    together = patch_grids(np.array(sizes), 16, max_tokens, law)
    assert together.tolist() == [list(grid(*size, 16, max_tokens, law)) for size in sizes]


@pytest.mark.parametrize("law", LAWS)
def test_no_images_have_no_grids(law):
    assert patch_grids(np.empty((0, 2), np.int32), 16, 256, law).shape == (0, 2)
