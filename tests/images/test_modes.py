"""Modes: every image and every array of pixels to grey or RGB, by the stated rules."""

from __future__ import annotations

import re

import naive_colours
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from packpipe.images.modes import NoRule, image_of, plain

BACKGROUND = (10, 20, 230)
PALETTE = np.random.default_rng(5).integers(0, 256, (256, 3)).tolist()
BANDS = {
    **dict.fromkeys(("1", "L", "P", "I;16", "I;16L", "I;16B", "I;16N"), 1),
    **dict.fromkeys(("LA", "PA"), 2),
    **dict.fromkeys(("RGB", "YCbCr", "HSV", "LAB"), 3),
    **dict.fromkeys(("RGBA", "RGBX", "CMYK"), 4),
}
# How far Pillow's integers may be from the formula.
WITHIN = {"LA": 0.51, "RGBA": 0.51, "PA": 0.51, "CMYK": 0.51, "YCbCr": 1, "HSV": 1, "LAB": 2}


def stored(mode, height, width, seed=0):
    """Random bands of a mode: integers of [height, width, bands]."""
    rng = np.random.default_rng(seed)
    top = {"1": 2}.get(mode, 2**16 if mode.startswith("I;16") else 256)
    bands = rng.integers(0, top, (height, width, BANDS[mode]))
    if mode == "LAB":  # colours that a screen can show
        bands[..., 0] = bands[..., 0] // 2 + 80
        bands[..., 1:] = bands[..., 1:] // 16 + 120
    return bands


def image(mode, bands):
    """The Pillow image of such bands."""
    height, width = bands.shape[:2]
    if mode == "1":
        return Image.fromarray(bands[..., 0] > 0)
    if mode == "PA":
        found = Image.merge("LA", [image("L", bands[..., band, None]) for band in (0, 1)])
        found.putpalette([value for entry in PALETTE for value in entry])
        assert found.mode == "PA"
        return found
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2" if mode.startswith("I;16") else "u1")
    data = bands.astype(order).tobytes()
    if mode == "LAB":  # Pillow's bytes of a* and b* are signed
        data = (bands ^ np.array([0, 128, 128])).astype(np.uint8).tobytes()
    found = Image.frombytes(mode, (width, height), data)
    if mode == "P":
        found.putpalette([value for entry in PALETTE for value in entry])
    return found


def rgb_of(found):
    assert found.mode in ("L", "RGB")
    return np.asarray(found.convert("RGB"))


@pytest.mark.parametrize("mode", BANDS)
def test_every_mode_is_what_its_formula_says(mode):
    bands = stored(mode, 12, 17)
    named = "I;16" if mode.startswith("I;16") else mode
    expected = naive_colours.rgb_of(named, bands, BACKGROUND, PALETTE)
    found = rgb_of(plain(image(mode, bands), BACKGROUND))
    assert np.ptp(found) > 40
    assert np.abs(found - expected).max() <= WITHIN.get(mode, 0)


@pytest.mark.parametrize("mode", BANDS)
def test_the_callers_image_stays_as_it_was(mode):
    source = image(mode, stored(mode, 3, 4))
    before = source.mode, source.size, source.tobytes(), dict(source.info)
    found = plain(source, BACKGROUND)
    found.convert("RGB").putpixel((0, 0), (1, 2, 3))
    assert (source.mode, source.size, source.tobytes(), dict(source.info)) == before


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "I;16B"])
def test_grey_stays_one_channel(mode):
    assert plain(image(mode, stored(mode, 3, 4)), BACKGROUND).mode == "L"


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_every_16_bit_value_becomes_the_nearest_of_8_bits(mode):
    values = np.arange(2**16).reshape(256, 256, 1)
    found = np.asarray(plain(image(mode, values), BACKGROUND)).ravel().tolist()
    assert found == [naive_colours.to_8_bits(value) for value in range(2**16)]
    assert [found[value] for value in (0, 128, 129, 65535)] == [0, 0, 1, 255]


def test_every_grey_at_every_alpha_is_within_rounding_of_source_over():
    grey, alpha = np.indices((256, 256))
    layer = Image.fromarray(np.stack([grey, alpha], axis=-1).astype(np.uint8))
    assert layer.mode == "LA"
    for background in ((0, 0, 0), (255, 255, 255), (1, 128, 254)):
        exact = grey * alpha + (255 - alpha) * np.array(background)[:, None, None]
        found = rgb_of(plain(layer, background)).transpose(2, 0, 1)
        assert np.abs(found - exact / 255).max() <= 0.501


@given(arrays.arrays(np.uint8, (4, 5, 4)), st.tuples(*[st.integers(0, 255)] * 3))
def test_laying_on_the_background_gives_the_bytes_of_alpha_composite(pixels, background):
    layer = Image.fromarray(pixels)
    below = Image.new("RGBA", layer.size, (*background, 255))
    expected = np.asarray(Image.alpha_composite(below, layer))[..., :3]
    assert (rgb_of(plain(layer, background)) == expected).all()


TRANSPARENT = {
    "1": (255, lambda bands: bands[..., 0] == 1),
    "L": (77, lambda bands: bands[..., 0] == 77),
    "P": (77, lambda bands: bands[..., 0] == 77),
    "I;16": (77, lambda bands: bands[..., 0] == 77),
    "RGB": ((1, 2, 3), lambda bands: (bands == [1, 2, 3]).all(axis=-1)),
}


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_one_transparent_value_shows_the_background_and_no_other_does(mode):
    transparency, gone = TRANSPARENT[mode]
    bands = stored(mode, 6, 6)
    bands[2, 3] = bands[4, 1] = {"1": 1, "RGB": (1, 2, 3)}.get(mode, 77)
    source = image(mode, bands)
    source.info["transparency"] = transparency
    expected = naive_colours.rgb_of(mode, bands, BACKGROUND, PALETTE)
    expected[gone(bands)] = BACKGROUND
    assert 2 <= gone(bands).sum() < 36
    assert (rgb_of(plain(source, BACKGROUND)) == expected).all()


def test_a_palette_may_give_every_entry_its_alpha():
    bands = stored("P", 6, 6)
    source = image("P", bands)
    alphas = [(3 * entry) % 256 for entry in range(256)]
    source.info["transparency"] = bytes(alphas)
    with_alpha = np.dstack([bands, np.array(alphas)[bands]])
    expected = naive_colours.rgb_of("PA", with_alpha, BACKGROUND, PALETTE)
    assert np.abs(rgb_of(plain(source, BACKGROUND)) - expected).max() <= 1


def test_a_palette_may_hold_colours_with_alpha():
    bands = stored("P", 6, 6)
    source = Image.frombytes("P", (6, 6), bands.astype(np.uint8).tobytes())
    source.putpalette([n for entry, rgb in enumerate(PALETTE) for n in (*rgb, entry)], "RGBA")
    expected = naive_colours.rgb_of("PA", np.dstack([bands, bands]), BACKGROUND, PALETTE)
    assert np.abs(rgb_of(plain(source, BACKGROUND)) - expected).max() <= 1


def test_colours_multiplied_by_their_alpha_are_divided_again():
    premultiplied = Image.fromarray(stored("RGBA", 5, 5).astype(np.uint8)).convert("RGBa")
    assert premultiplied.mode == "RGBa"
    again = plain(premultiplied.convert("RGBA"), BACKGROUND)
    assert (rgb_of(plain(premultiplied, BACKGROUND)) == rgb_of(again)).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_of_unknown_range_has_no_rule(mode):
    with pytest.raises(NoRule, match=rf"^mode {mode} has no rule to become RGB; value_range="):
        plain(Image.new(mode, (3, 4)), BACKGROUND)


@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40))),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.sampled_from(list(Image.Resampling)),
    st.sampled_from([None, 1.0, 1.5, 2.0]),
)
def test_grey_resized_in_one_channel_is_grey_resized_in_three(pixels, size, how, gap):
    grey = Image.fromarray(pixels)
    one = grey.resize(size, how, reducing_gap=gap).convert("RGB")
    assert one.tobytes() == grey.convert("RGB").resize(size, how, reducing_gap=gap).tobytes()


# Channels: how they are seen; None stands for no axis of channels.
SHAPES = {None: "L", 1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16"])
@pytest.mark.parametrize("channels", SHAPES)
@given(height=st.integers(1, 6), width=st.integers(1, 6), data=st.data())
def test_an_array_is_the_image_its_last_axis_says(dtype, channels, height, width, data):
    shape = (height, width) if channels is None else (height, width, channels)
    pixels = data.draw(arrays.arrays(dtype, shape))
    scale = {"bool": lambda v: 255 * v, "uint8": int, "uint16": naive_colours.to_8_bits}[dtype]
    in_8_bits = np.array([scale(v) for v in pixels.ravel().tolist()]).reshape(height, width, -1)
    expected = naive_colours.rgb_of(SHAPES[channels], in_8_bits, BACKGROUND)
    found = image_of(pixels)
    assert found.mode == SHAPES[channels]
    assert found.size == (width, height)
    assert np.abs(rgb_of(plain(found, BACKGROUND)) - expected).max() <= 0.51


@pytest.mark.parametrize(
    "laid_out",
    [
        np.asfortranarray,
        lambda pixels: np.flip(np.flip(pixels).copy()),
        lambda pixels: np.repeat(pixels, 2, axis=1)[:, ::2],
        lambda pixels: np.frombuffer(pixels.tobytes(), pixels.dtype).reshape(pixels.shape),
    ],
    ids=["columns first", "backwards", "every second", "read only"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_how_an_array_lies_in_memory_is_all_the_same(laid_out, dtype):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7, 3), dtype)
    other = laid_out(pixels)
    assert (other == pixels).all()
    assert image_of(other).tobytes() == image_of(pixels).tobytes()


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 0), (4, 4, 5), (2, 2, 2, 3)])
def test_an_array_of_another_shape_has_no_rule(shape):
    message = f"pixels of shape {list(shape)} have no rule, expected [height, width, 1 to 4]"
    with pytest.raises(NoRule, match=f"^{re.escape(message)}$"):
        image_of(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint32", "float32", "O"])
def test_an_array_of_another_type_has_no_rule(dtype):
    name = np.dtype(dtype)
    message = f"pixels of type {name} have no rule, expected bool, uint8 or uint16"
    with pytest.raises(NoRule, match=f"^{re.escape(message)}$"):
        image_of(np.zeros((4, 4), dtype))
