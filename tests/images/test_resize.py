"""The resize of 8 bits: equal to a naive one, and to Pillow's but for rounding."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from packpipe.images.orientation import TRANSPOSE
from packpipe.images.resize import FILTERS, _kept_weights, _weights, resize

SUPPORT = {"box": 0.5, "bilinear": 1, "hamming": 1, "bicubic": 2, "lanczos": 3}


def sinc(x):
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


def height_of(name, x):
    """A filter at a distance from its middle, as it is written in textbooks."""
    if name == "box":
        return float(-0.5 < x <= 0.5)
    x = abs(x)
    if x >= SUPPORT[name]:
        return 0.0
    if name == "bilinear":
        return 1 - x
    if name == "hamming":
        return sinc(x) * (0.54 + 0.46 * math.cos(math.pi * x))
    if name == "lanczos":
        return sinc(x) * sinc(x / 3)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2


def naive_rows(pixels, low, high, size, name):
    """uint8[size, ...]: rows of pixels [n, ...] blended, one by one, with exact weights."""
    scale = (high - low) / size
    stretch = max(scale, 1.0)
    out = []
    for place in range(size):
        centre = low + (place + 0.5) * scale
        if name == "nearest":
            out.append(pixels[min(math.floor(centre), len(pixels) - 1)])
            continue
        reach = SUPPORT[name] * stretch
        start = max(0, int(centre - reach + 0.5))
        stop = min(len(pixels), int(centre + reach + 0.5))
        shares = [height_of(name, (at + 0.5 - centre) / stretch) for at in range(start, stop)]
        blended = np.tensordot(np.array(shares) / sum(shares), pixels[start:stop], 1)
        out.append(np.clip(np.floor(blended + 0.5), 0, 255).astype(np.uint8))
    return np.array(out)


def naive(pixels, box, size, name, orientation):
    """The upright result: down, then across, or the other way round, then turned."""
    left, top, right, bottom = box
    height, width = size[::-1] if orientation > 4 else size
    x, y = math.floor(left), math.floor(top)
    part = pixels[y : math.ceil(bottom), x : math.ceil(right)]

    def down(pixels):
        return naive_rows(pixels, top - y, bottom - y, height, name)

    def across(pixels):
        return naive_rows(pixels.swapaxes(0, 1), left - x, right - x, width, name).swapaxes(0, 1)

    is_wide = height * part.shape[1] > 2 * width * part.shape[0]
    stored = down(across(part)) if is_wide else across(down(part))
    image = Image.fromarray(stored).convert("RGB")
    return np.asarray(image.transpose(TRANSPOSE[orientation]) if orientation > 1 else image)


def resized(pixels, box, size, name, orientation=1, upscale_filter=None):
    out = np.full((1, 1, *size, 3), 77, np.uint8)
    up = upscale_filter or name
    resize(pixels, box, out, downscale_filter=name, upscale_filter=up, orientation=orientation)
    return out[0, 0]


def noise(height, width, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng((seed, height, width)).integers(0, 256, shape, np.uint8)


@st.composite
def cases(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    pixels = noise(height, width, draw(st.sampled_from([1, 3])), draw(st.integers(0, 99)))
    box = (0, 0, width, height)
    if draw(st.booleans()):
        left, top = draw(st.floats(0, width - 0.5)), draw(st.floats(0, height - 0.5))
        box = (
            *(left, top),
            draw(st.floats(left + 0.25, width)),
            draw(st.floats(top + 0.25, height)),
        )
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return pixels, box, size, draw(st.sampled_from(FILTERS)), draw(st.integers(1, 8))


@given(cases())
def test_it_is_a_naive_resize_but_for_the_rounding_of_weights(case):
    wrong = np.abs(resized(*case).astype(int) - naive(*case))
    # A level of rounding in the first pass may be one more, weighted, in the second.
    assert wrong.max() <= 2
    assert (wrong > 0).mean() <= 0.1 or wrong.size < 500


@given(cases())
def test_turned_pixels_give_the_turned_result_to_the_last_bit(case):
    pixels, box, size, name, orientation = case
    stored = size[::-1] if orientation > 4 else size
    image = Image.fromarray(resized(pixels, box, stored, name))
    upright = image.transpose(TRANSPOSE[orientation]) if orientation > 1 else image
    assert np.array_equal(resized(*case), np.asarray(upright))


@given(cases(), st.integers(0, 255))
def test_one_colour_stays_that_colour_and_its_own_size_keeps_every_pixel(case, level):
    pixels, box, size, name, orientation = case
    assert (resized(np.full_like(pixels, level), box, size, name, orientation) == level).all()
    height, width = pixels.shape[:2]
    own = resized(pixels, (0, 0, width, height), (height, width), name)
    assert np.array_equal(own, np.asarray(Image.fromarray(pixels).convert("RGB")))


@pytest.mark.parametrize("height", [1104, 2000])
def test_columns_that_stay_as_they_are_become_those_of_turned_pixels(height):
    pixels = noise(1200, 64)
    tall = resized(pixels, (8, 3, 56, 1190), (height, 48), "bicubic")
    turned = resized(pixels.swapaxes(0, 1), (3, 8, 1190, 56), (height, 48), "bicubic", 5)
    assert np.array_equal(tall, turned)
    tiles = np.empty((height // 16, 3, 16, 16, 3), np.uint8)
    same = {"downscale_filter": "bicubic", "upscale_filter": "bicubic"}
    resize(pixels, (8, 3, 56, 1190), tiles, **same)
    assert np.array_equal(tiles.transpose(0, 2, 1, 3, 4).reshape(height, 48, 3), tall)


@given(cases(), st.sampled_from([1, 4, 8]), st.integers(1, 4), st.integers(1, 4))
def test_tiles_are_the_result_cut(case, side, rows, columns):
    pixels, box, _, name, orientation = case
    tiles = np.full((rows, columns, side, side, 3), 77, np.uint8)
    resize(pixels, box, tiles, downscale_filter=name, upscale_filter=name, orientation=orientation)
    whole = resized(pixels, box, (rows * side, columns * side), name, orientation)
    cut = whole.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
    assert np.array_equal(tiles, cut)


@given(cases(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_no_byte_beside_the_tiles_is_written(case, side, rows, columns, before):
    pixels, box, _, name, orientation = case
    size = rows * columns * side * side * 3
    memory = np.full(before + size + 8, 77, np.uint8)
    tiles = memory[before : before + size].reshape(rows, columns, side, side, 3)
    resize(pixels, box, tiles, downscale_filter=name, upscale_filter=name, orientation=orientation)
    assert (np.delete(memory, np.s_[before : before + size]) == 77).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_of_an_image_of_several_blocks_are_the_result_cut(channels, orientation):
    pixels, box = noise(500, 700, channels), (3.5, 2, 690, 480.25)
    whole = resized(pixels, box, (30 * 14, 40 * 14), "bicubic", orientation)
    tiles = np.full((30, 40, 14, 14, 3), 77, np.uint8)
    same = {"downscale_filter": "bicubic", "upscale_filter": "bicubic"}
    resize(pixels, box, tiles, **same, orientation=orientation)
    assert np.array_equal(tiles.transpose(0, 2, 1, 3, 4).reshape(whole.shape), whole)
    stored = (40 * 14, 30 * 14) if orientation > 4 else (30 * 14, 40 * 14)
    image = Image.fromarray(resized(pixels, box, stored, "bicubic"))
    upright = image.transpose(TRANSPOSE[orientation]) if orientation > 1 else image
    assert np.array_equal(whole, np.asarray(upright))


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "nearest"])
@pytest.mark.parametrize("size", [(30, 44), (64, 90), (101, 130), (200, 23)])
def test_it_is_pillows_resize_in_the_same_order_but_for_rounding(name, size):
    pixels = noise(64, 90)
    height, width = size
    one, box = Image.fromarray(pixels), (0.0, 0.0, 90.0, 64.0)
    sizes = [(90, height), (width, height)]
    if height * 90 > 2 * width * 64:
        sizes[0] = (width, 64)
    for step in sizes:
        one = one.resize(step, Image.Resampling[name.upper()])
    wrong = np.abs(np.asarray(one).astype(int) - resized(pixels, box, size, name))
    assert wrong.max() <= 2
    assert wrong.mean() < 0.06


@pytest.mark.parametrize(
    ("name", "size", "most", "share"),
    [
        ("bilinear", (101, 130), 1, 0.24),
        ("bicubic", (30, 44), 3, 0.22),
        ("bicubic", (101, 130), 18, 0.30),
        ("lanczos", (101, 130), 44, 0.39),
    ],
)
def test_of_noise_pillows_single_resize_is_so_far(name, size, most, share):
    one = Image.fromarray(noise(64, 90))
    single = np.asarray(one.resize(size[::-1], Image.Resampling[name.upper()])).astype(int)
    wrong = np.abs(single - resized(np.asarray(one), (0, 0, 90, 64), size, name))
    assert wrong.max() <= most
    assert share - 0.05 < (wrong > 0).mean() <= share


@pytest.mark.parametrize("n_in", [3, 7, 8, 9, 40])
@pytest.mark.parametrize("n_out", [3, 17, 60])
@pytest.mark.parametrize("kind", range(1, len(FILTERS)))
def test_weights_of_wide_sums_sum_to_one_and_of_narrow_ones_to_hardly_less(n_in, n_out, kind):
    _, weights, bits = _weights(n_in, 0.0, float(n_in), n_out, kind, False)
    taps, sums = weights.shape[1], weights.astype(int).sum(axis=1)
    if taps == 1:
        return
    if (taps, bits) == (8, 14):
        assert (((1 << bits) - 4 <= sums) & (sums <= 1 << bits)).all()
    else:
        assert (sums == 1 << bits).all()


def test_filters_are_chosen_for_each_axis():
    pixels = noise(20, 30)
    found = resized(pixels, (0, 0, 30, 20), (10, 50), "box", upscale_filter="nearest")
    means = pixels.reshape(10, 2, 30, 3).astype(int).sum(axis=1)
    columns = ((np.arange(50) + 0.5) * 30 / 50).astype(int)
    assert np.array_equal(found, ((means + 1) // 2)[:, columns])


def test_an_image_of_one_line_does_not_become_large_between_the_axes():
    line = noise(1, 2**20, 1)
    found = resized(line, (0, 0, 2**20, 1), (64, 64), "box")
    means = line.reshape(64, -1).mean(axis=1)
    assert (found == found[:1]).all()
    assert np.abs(found[0, :, 0] - means).max() <= 0.51


@pytest.mark.parametrize("name", ["box", "lanczos"])
def test_a_million_pixels_of_one_colour_become_one_of_it(name):
    line = np.full((1, 1_000_000), 200, np.uint8)
    assert (resized(line, (0, 0, 1_000_000, 1), (1, 1), name) == 200).all()


def test_its_bytes_are_these_on_every_machine():
    pixels, found = noise(61, 83), {}
    for name in FILTERS:
        sizes = [(32, 48), (96, 16), (56, 76)]
        levels = [resized(pixels, (0.5, 2, 80.25, 60), size, name) for size in sizes]
        found[name] = zlib.crc32(b"".join(level.tobytes() for level in levels))
    assert found == {
        "nearest": 3967174854,
        "box": 4212080216,
        "bilinear": 2272799498,
        "hamming": 4080248821,
        "bicubic": 3403049914,
        "lanczos": 3315369251,
    }


def test_weights_of_long_axes_are_not_kept():
    _kept_weights.cache_clear()
    for width in (4096, 4097):
        resized(noise(1, 64), (0, 0, 64, 1), (1, width), "bicubic")
        assert _kept_weights.cache_info().currsize == 2  # of the columns, and of 4,096 pixels
    kept = _kept_weights(4096, 0.5, 4095.5, 4096, FILTERS.index("lanczos"), False)
    assert sum(part.nbytes for part in kept[:2]) <= 98304  # a pixel has 8 weights, and a start
