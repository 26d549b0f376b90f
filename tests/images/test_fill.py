from __future__ import annotations

import errno
import re
from typing import NamedTuple

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import encode

from packpipe.images.bad_images import BadImage
from packpipe.images.fill import Failure, ImageTask, fill_row
from packpipe.images.rules import PixelRules

RULES = PixelRules((255, 255, 255), 10_000, 1.0, "bicubic", "bicubic", "srgb")
PATCH = 2
WIDTH = PATCH * PATCH * 3
GRIDS = [(1, 1), (2, 3), (1, 4), (3, 2), (2, 2)]
# Whole patches, so that nothing is resized; no zeros, which are padding.
PIXELS = [
    np.random.default_rng(number).integers(
        1, 256, (rows * PATCH, columns * PATCH, 3), dtype=np.uint8
    )
    for number, (rows, columns) in enumerate(GRIDS)
]
FILES = [encode(Image.fromarray(pixels), "PNG") for pixels in PIXELS]
FAILURE = Failure("missing", "BadImage: the image is null")


class Case(NamedTuple):
    """An order, and the pixels that it should give; None if it should fail."""

    order: ImageTask
    pixels: np.ndarray | None


def order_of(image: int, data=None, kept=None, example=0) -> ImageTask:
    """An order of one of the images above, or of other data of its size."""
    data = FILES[image] if data is None else data
    kept = None if kept is None else np.array(kept, np.int32)
    return ImageTask(example, data, PIXELS[image].shape[:2], GRIDS[image], kept)


@st.composite
def cases(draw: st.DrawFn, paths: list[str] | None = None) -> Case:
    """Images as bytes, views, arrays and (where paths are given) files; whole, in part, broken."""
    image = draw(st.integers(0, len(GRIDS) - 1))
    rows, columns = GRIDS[image]
    some = st.sets(st.integers(0, rows * columns - 1), min_size=1).map(sorted)
    forms = {
        "bytes": FILES[image],
        "memoryview": memoryview(FILES[image]),
        "array": PIXELS[image],
        "turned array": np.asfortranarray(PIXELS[image]),
        "cut": FILES[image][:-30],
        "no image": b"<html>",
        "empty": b"",
        "failed": FAILURE,
    }
    if paths is not None:
        forms |= {"path": paths[image], "no file": paths[image] + "\udcff.png"}
    form = draw(st.sampled_from(sorted(forms)))
    order = order_of(image, forms[form], draw(st.none() | some), draw(st.integers(0, 2**40)))
    fails = form in ("cut", "no image", "empty", "failed", "no file")
    return Case(order, None if fails else PIXELS[image])


def boxed(image: int, example=0) -> ImageTask:
    """An order of one of the images above, as a box of a larger one."""
    pixels = PIXELS[image]
    height, width = pixels.shape[:2]
    around = np.full((height + 9, width + 6, 3), 99, np.uint8)
    around[7:-2, 1:-5] = pixels
    order = ImageTask(
        example, encode(Image.fromarray(around), "PNG"), around.shape[:2], (0, 0), None
    )
    return order._replace(grid_hw=GRIDS[image], box=(7, 1, height, width))


def tokens_of(some: list[Case], seq_len: int) -> list[list[int]]:
    """What a row should hold, token by token."""
    tokens = []
    for order, pixels in some:
        if pixels is not None:
            patches = naive.patchify(pixels, PATCH).tolist()
            places = range(len(patches)) if order.kept is None else order.kept.tolist()
            tokens += [patches[place] for place in places]
    return tokens + [[0] * WIDTH] * (seq_len - len(tokens))


def test_a_box_of_an_image_fills_what_an_image_of_its_size_does():
    found, wanted = np.empty((2, 20, WIDTH), np.uint8)
    assert fill_row([order_of(0), boxed(1), boxed(3)], found, RULES) == [None] * 3
    assert fill_row([order_of(0), order_of(1), order_of(3)], wanted, RULES) == [None] * 3
    assert wanted[1:12].any()
    assert found.tolist() == wanted.tolist()


@given(st.lists(cases(), max_size=6), st.integers(0, 3))
def test_a_row_is_the_kept_tokens_of_its_images_side_by_side_and_zeros_behind(some, room):
    seq_len = sum(order.num_tokens for order, _ in some) + room
    out = np.full((seq_len, WIDTH), 77, np.uint8)
    outcomes = fill_row([order for order, _ in some], out, RULES)
    assert out.tolist() == tokens_of(some, seq_len)
    assert [outcome is None for outcome in outcomes] == [pixels is not None for _, pixels in some]


def test_an_image_that_fails_takes_no_place_and_says_why():
    out = np.full((12, WIDTH), 77, np.uint8)
    orders = [
        order_of(0),
        order_of(1, FILES[1][:-30]),
        order_of(2, FAILURE, example=5),
        order_of(4),
        order_of(3, b""),
    ]
    outcomes = fill_row(orders, out, RULES)
    assert [outcome and outcome.reason for outcome in outcomes] == [
        *(None, "undecodable", "missing", None, "empty"),
    ]
    assert outcomes[1].exception.startswith("OSError: ")
    assert outcomes[2] is FAILURE
    assert (out[0] == naive.patchify(PIXELS[0], PATCH)[0]).all()
    assert (out[1:5] == naive.patchify(PIXELS[4], PATCH)).all()
    assert (out[5:] == 0).all()


def test_kept_tokens_are_patches_of_the_full_grid_in_raster_order():
    out = np.empty((4, WIDTH), np.uint8)
    assert fill_row([order_of(1, kept=[0, 2, 5])], out, RULES) == [None]
    pixels = PIXELS[1]
    corners = [pixels[0:2, 0:2], pixels[0:2, 4:6], pixels[2:4, 4:6]]
    assert out[:3].tolist() == [corner.reshape(-1).tolist() for corner in corners]


@pytest.mark.parametrize(("kept", "num_tokens"), [(None, 6), ([1], 1), ([0, 3, 4], 3)])
def test_an_order_knows_its_tokens(kept, num_tokens):
    assert order_of(1, kept=kept).num_tokens == num_tokens


def test_an_image_is_resized_to_its_whole_grid_before_tokens_are_dropped():
    left, right = (10, 20, 30), (200, 100, 50)
    image = Image.new("RGB", (16, 6), left)
    image.paste(right, (8, 0, 16, 6))
    order = ImageTask(0, encode(image, "PNG"), (6, 16), (1, 4), np.array([0, 3], np.int32))
    out = np.empty((2, WIDTH), np.uint8)
    assert fill_row([order], out, RULES) == [None]
    assert (out[0].reshape(-1, 3) == left).all()
    assert (out[1].reshape(-1, 3) == right).all()


def test_a_size_that_is_not_the_planned_one_names_the_example_and_both_sizes():
    orders = [order_of(0), order_of(1, FILES[2], example=41)]
    message = (
        "example 41: image_hw is (2, 8), expected (4, 6) as planned; "
        "plan again (stored rows: into another folder), the source has changed"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fill_row(orders, np.empty((12, WIDTH), np.uint8), RULES)


@pytest.mark.parametrize(
    "fault", [OSError(errno.EMFILE, "Too many open files"), MemoryError("full")]
)
def test_a_fault_of_the_machine_is_raised_as_it_is(monkeypatch, fault):
    def decode(*_, **__):
        raise fault

    monkeypatch.setattr("packpipe.images.fill.decode", decode)
    with pytest.raises(type(fault)) as caught:
        fill_row([order_of(0)], np.empty((1, WIDTH), np.uint8), RULES)
    assert caught.value is fault


def test_an_image_is_asked_for_when_the_one_before_it_is_done():
    out = np.zeros((3, WIDTH), np.uint8)
    before = []

    def orders():
        for _ in range(3):
            before.append([bool(token.any()) for token in out])
            yield order_of(0)

    assert fill_row(orders(), out, RULES) == [None] * 3
    assert before == [[False] * 3, [True, False, False], [True, True, False]]


def test_a_row_of_no_images_is_padding():
    out = np.full((3, WIDTH), 77, np.uint8)
    assert fill_row([], out, RULES) == []
    assert not out.any()


def test_a_bad_image_is_a_value_error_yet_a_failure_here():
    assert issubclass(BadImage, ValueError)
    (outcome,) = fill_row([order_of(0, "/no/such/file")], np.empty((1, WIDTH), np.uint8), RULES)
    assert outcome == Failure("missing", "FileNotFoundError: no file '/no/such/file'")
