"""The edges of images that are decoded at a fraction: what lies beyond is not in them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image
from strategies import encode
from test_decode import decoded

from packpipe.images import edges

BLOCK = {0: (8, 8), 1: (8, 16), 2: (16, 16)}  # pixels of a unit, height and width
SIZES = [(431, 601), (418, 595), (430, 607), (420, 604), (417, 600)]
# Greys: the last one of half as many colours is partly of what lies beyond in a full decode, too.
INSIDE, BEYOND = (40, 40, 40), (230, 230, 230)


def cut(file, height, width):
    """A JPEG file whose frame says another size: what is left of it lies beyond its edges."""
    frame = file.index(b"\xff\xc0") + 5
    return file[:frame] + struct.pack(">HH", height, width) + file[frame + 4 :]


def framed(height, width, subsampling, mode="RGB", **save):
    """A file of one colour, with another beyond its edges."""
    down, across = BLOCK[subsampling]
    whole = Image.new("RGB", (-(-width // across) * across, -(-height // down) * down), BEYOND)
    whole.paste(INSIDE, (0, 0, width, height))
    file = encode(whole.convert(mode), "JPEG", quality=95, subsampling=subsampling, **save)
    return cut(file, height, width)


def soft(height, width):
    """Pixels that change slowly, as those of photographs do."""
    noise = np.random.default_rng(height).normal(128, 35, (height // 24, width // 24, 3))
    small = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("subsampling", BLOCK)
@pytest.mark.parametrize("size", SIZES)
def test_what_lies_beyond_the_edges_of_an_image_is_not_in_it(size, subsampling, parts):
    file = framed(*size, subsampling)
    for shrink in (1, 1.3):
        target_hw = tuple(int(side / parts / shrink) for side in size)
        found = decoded(file, size, target_hw, reducing_gap=1.0).astype(int)
        assert np.abs(found - INSIDE).max() <= 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_edges_of_other_modes_and_of_turned_images_are_as_clean(mode, orientation):
    size, exif = (431, 601), Image.Exif()
    exif[0x112] = orientation
    file = framed(*size, 0, mode, exif=exif)
    upright, target_hw = (size, (53, 75)) if orientation == 1 else (size[::-1], (75, 53))
    found = decoded(file, upright, target_hw, reducing_gap=1.0).astype(int)
    assert np.abs(found - INSIDE).max() <= 1


@pytest.mark.parametrize("subsampling", BLOCK)
def test_images_that_end_as_they_go_on_keep_the_pixels_they_had(subsampling):
    for size in SIZES:
        for parts in (2, 4, 8):
            file = encode(soft(*size), "JPEG", quality=90, subsampling=subsampling)
            target_hw = tuple(side // parts for side in size)
            found = decoded(file, size, target_hw, reducing_gap=1.0)
            kept = decoded(file, size, target_hw, reducing_gap=1.0, jpeg_edges="padded")
            assert (found == kept).all()
            # Their edges differ from those of the whole image by little more than their insides do.
            apart = np.abs(found.astype(int) - decoded(file, size, target_hw))
            assert max(apart[-1].mean(), apart[:, -1].mean()) <= 1.5 * apart[:-1, :-1].mean() + 1


def test_padding_stays_where_it_is_asked_for():
    file = framed(431, 601, 2)
    kept = decoded(file, (431, 601), (53, 75), reducing_gap=1.0, jpeg_edges="padded").astype(int)
    assert np.abs(kept[:, -1] - INSIDE).max() > 20


def test_the_fraction_is_the_largest_of_which_the_side_is_a_whole_number():
    plain = Image.new("L", (76, 54), 100)
    stepped = plain.copy()
    stepped.paste(200, (75, 0, 76, 54))
    for width, parts in ((608, 8), (604, 4), (602, 2), (601, 1)):
        assert edges.whole_parts(stepped, (width, 432), 8) == parts
        assert edges.whole_parts(plain, (width, 431), 8) == 8
    assert edges.whole_parts(Image.new("L", (2, 2)), (15, 14), 8) == 1
