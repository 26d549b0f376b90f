from __future__ import annotations

import naive
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe.images.patches import patchify, side_of, unpatchify

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7))


def picture(rows, columns, patch, seed=0):
    shape = (rows * patch, columns * patch, 3)
    return np.random.default_rng(seed).integers(1, 256, shape, np.uint8)


def patches_of(pixels, rows, columns, patch):
    out = np.zeros((rows * columns, patch * patch * 3), np.uint8)
    patchify(pixels, out)
    return out


@given(GRIDS)
@example((1, 1, 1))
@example((1, 5, 3))
@example((5, 1, 3))
def test_patches_are_the_naive_ones_byte_by_byte(case):
    rows, columns, patch = case
    pixels = picture(*case)
    found = patches_of(pixels, rows, columns, patch)
    assert found.tolist() == naive.patchify(pixels, patch).tolist()


@given(GRIDS, st.data())
@example((2, 3, 2), None)
@example((1, 1, 1), None)
def test_the_kept_patches_are_those_of_the_whole_image(case, data):
    rows, columns, patch = case
    every = range(rows * columns)
    kept = list(every)[1::2] if data is None else sorted(data.draw(st.sets(st.sampled_from(every))))
    pixels = picture(*case)
    out = np.zeros((len(kept), patch * patch * 3), np.uint8)
    patchify(pixels, out, np.array(kept, np.int32))
    assert out.tolist() == naive.patchify(pixels, patch)[kept].tolist()


def test_all_patches_kept_are_the_whole_image():
    pixels = picture(3, 4, 2)
    out = np.zeros((12, 12), np.uint8)
    patchify(pixels, out, np.arange(12))
    assert (out == patches_of(pixels, 3, 4, 2)).all()


def test_channel_is_fastest_then_column_then_row():
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    assert patches_of(pixels, 1, 2, 2).tolist() == [
        [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17],
        [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23],
    ]


@given(GRIDS, st.randoms(use_true_random=False))
def test_unpatchify_undoes_patchify_in_any_order(case, random):
    rows, columns, patch = case
    pixels = picture(*case)
    patches = patches_of(pixels, rows, columns, patch)
    coords = np.array([(y, x) for y in range(rows) for x in range(columns)], np.int16)
    order = list(range(rows * columns))
    random.shuffle(order)
    assert (unpatchify(patches[order], coords[order], (rows, columns)) == pixels).all()


def test_unpatchify_leaves_black_where_no_patch_is():
    pixels = picture(2, 2, 3)
    patches = patches_of(pixels, 2, 2, 3)
    found = unpatchify(patches[[3]], np.array([[1, 1]]), (2, 2))
    assert (found[3:, 3:] == pixels[3:, 3:]).all()
    assert found[:3].max() == 0
    assert found[3:, :3].max() == 0


def test_patchify_writes_into_a_slice_and_nothing_else():
    out = np.zeros((6, 12), np.uint8)
    patchify(picture(1, 2, 2), out[2:4])
    assert (out[2:4] > 0).all()
    assert out[:2].max() == out[4:].max() == 0


def test_kept_patches_are_written_into_a_slice_and_nothing_else():
    out = np.zeros((6, 12), np.uint8)
    patchify(picture(2, 2, 2), out[2:4], np.array([1, 2]))
    assert (out[2:4] > 0).all()
    assert out[:2].max() == out[4:].max() == 0


@pytest.mark.parametrize("patch", [1, 2, 7, 14, 16, 32, 128])
def test_side_of_a_patch_follows_from_its_bytes(patch):
    assert side_of(patch * patch * 3) == patch
