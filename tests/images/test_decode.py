from __future__ import annotations

import math
import re
import struct
import warnings
import zlib
from io import BytesIO
from unittest.mock import patch

import naive
import naive_profiles
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from strategies import encode

from packpipe.images import decode as decode_module
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import Probe, decode, probe
from packpipe.images.rules import PixelRules
from packpipe.planning.image_options import MAX_PIXELS

BACKGROUND = (10, 20, 30)


RULES = PixelRules(
    background=BACKGROUND,
    max_pixels=10**6,
    reducing_gap=None,
    downscale_filter="bicubic",
    upscale_filter="bicubic",
    profiles="srgb",
)


def decoded(encoded, image_hw, target_hw=None, box=None, **rules):
    target_hw = target_hw or image_hw
    rules = RULES._replace(**rules)
    return decode(encoded, image_hw=image_hw, target_hw=target_hw, rules=rules, box=box).pixels


def png(width, height, depth, colour, pixels=b"", chunks=()):
    """A PNG file from its own parts; without pixels it is a header only."""

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *(chunk(*some) for some in chunks),
            chunk(b"IDAT", zlib.compress(pixels)),
            chunk(b"IEND", b""),
        ]
    )


def of_pixels(mode, pixels):
    """An image one pixel high."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def on_background(colour, alpha):
    """Exact source-over, in fractions of 255."""
    return [(c * alpha + b * (255 - alpha)) / 255 for c, b in zip(colour, BACKGROUND, strict=True)]


GREYS_16 = [0, 1, 128, 129, 257, 32768, 65535]  # ÷ 257: 0, .004, .498, .502, 1, 127.5, 255
GREYS_8 = [[v] * 3 for v in (0, 0, 0, 1, 1, 128, 255)]
ALPHAS = [(200, 100, 0, 0), (200, 100, 0, 128), (200, 100, 0, 255)]
LAID = [on_background(pixel[:3], pixel[3]) for pixel in ALPHAS]
GREY_ALPHAS = [(90, 0), (90, 51), (90, 255)]
GREY_LAID = [on_background([grey] * 3, alpha) for grey, alpha in GREY_ALPHAS]
COLOURS = [(255, 0, 0), (1, 2, 3), (250, 128, 7)]


def palette_image():
    image = Image.new("P", (3, 1))
    image.putpalette([*COLOURS[0], *COLOURS[1], *COLOURS[2]])
    image.putdata([2, 0, 1])
    return image


def numpy_16_bit(byte_order):
    values = np.array([GREYS_16], byte_order + "u2")
    mode = "I;16" if byte_order == "<" else "I;16B"
    return Image.frombytes(mode, (len(GREYS_16), 1), values.tobytes())


def flat(mode, colour, side=16):
    return Image.new(mode, (side, side), colour)


def ycck_jpeg():
    """Pillow's CMYK JPEG with its Adobe marker changed to say YCCK.

    Adobe stores inks inverted. (Y, Cb, Cr) = (76, 85, 255) is red, so the inks stored are
    255, 0, 0 and 255: inverted twice, all cyan and no black.
    """
    encoded = encode(flat("CMYK", (255 - 76, 255 - 85, 0, 0)), "JPEG", quality=100)
    marker = encoded.index(b"Adobe") + 11
    assert encoded[marker] == 0
    return encoded[:marker] + b"\x02" + encoded[marker + 1 :]


def grey_16_bit_png_with_transparency():
    pixels = b"\x00" + struct.pack(">3H", 0, 1000, 65535)
    return png(3, 1, 16, 0, pixels, [(b"tRNS", struct.pack(">H", 1000))])


# name: (file, expected pixels of a one pixel high image or of all pixels, tolerance)
CASES = {
    "RGB": (encode(of_pixels("RGB", COLOURS), "PNG"), COLOURS, 0),
    "RGB 16-bit": (
        png(2, 1, 16, 2, b"\x00" + struct.pack(">6H", 0, 257, 65535, 65535, 257, 0)),
        [(0, 1, 255), (255, 1, 0)],
        0,
    ),
    "RGB JPEG": (encode(flat("RGB", (200, 100, 50)), "JPEG", quality=100), (200, 100, 50), 2),
    "L": (encode(of_pixels("L", [0, 7, 255]), "PNG"), [[0] * 3, [7] * 3, [255] * 3], 0),
    "L JPEG": (encode(flat("L", 77), "JPEG", quality=100), (77, 77, 77), 1),
    "1": (encode(of_pixels("1", [0, 255, 0]), "PNG"), [[0] * 3, [255] * 3, [0] * 3], 0),
    "1 TIFF": (encode(of_pixels("1", [0, 255]), "TIFF"), [[0] * 3, [255] * 3], 0),
    "P": (encode(palette_image(), "PNG"), [COLOURS[2], COLOURS[0], COLOURS[1]], 0),
    "P GIF": (encode(palette_image(), "GIF"), [COLOURS[2], COLOURS[0], COLOURS[1]], 0),
    "P, one colour transparent": (
        encode(palette_image(), "PNG", transparency=0),
        [COLOURS[2], BACKGROUND, COLOURS[1]],
        0,
    ),
    "P, an alpha a colour": (
        encode(palette_image(), "PNG", transparency=bytes([128, 0, 255])),
        [COLOURS[2], on_background(COLOURS[0], 128), BACKGROUND],
        1,
    ),
    "P GIF, transparent": (
        encode(palette_image(), "GIF", transparency=2),
        [BACKGROUND, COLOURS[0], COLOURS[1]],
        0,
    ),
    "RGB, one colour transparent": (
        encode(of_pixels("RGB", COLOURS), "PNG", transparency=COLOURS[1]),
        [COLOURS[0], BACKGROUND, COLOURS[2]],
        0,
    ),
    "L, one grey transparent": (
        encode(of_pixels("L", [0, 7, 255]), "PNG", transparency=7),
        [[0] * 3, BACKGROUND, [255] * 3],
        0,
    ),
    "RGBA": (encode(of_pixels("RGBA", ALPHAS), "PNG"), LAID, 1),
    "RGBA WebP": (encode(of_pixels("RGBA", ALPHAS), "WEBP", lossless=True, exact=True), LAID, 1),
    "RGBA TIFF": (encode(of_pixels("RGBA", ALPHAS), "TIFF"), LAID, 1),
    "LA": (encode(of_pixels("LA", GREY_ALPHAS), "PNG"), GREY_LAID, 1),
    "LA 16-bit": (
        png(2, 1, 16, 4, b"\x00" + struct.pack(">4H", 90 * 257, 0, 90 * 257, 65535)),
        [BACKGROUND, [90] * 3],
        0,
    ),
    "CMYK JPEG, red": (encode(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0), 3),
    "CMYK JPEG, white": (encode(flat("CMYK", (0, 0, 0, 0)), "JPEG"), (255, 255, 255), 3),
    "CMYK JPEG, black": (encode(flat("CMYK", (0, 0, 0, 255)), "JPEG"), (0, 0, 0), 3),
    "CMYK TIFF": (encode(flat("CMYK", (255, 0, 255, 0)), "TIFF"), (0, 255, 0), 0),
    "YCCK JPEG": (ycck_jpeg(), (0, 255, 255), 3),
    "YCbCr TIFF": (encode(flat("YCbCr", (76, 85, 255)), "TIFF"), (255, 0, 0), 3),
    "LAB TIFF, white": (encode(flat("LAB", (255, 128, 128)), "TIFF"), (255, 255, 255), 1),
    "LAB TIFF, black": (encode(flat("LAB", (0, 128, 128)), "TIFF"), (0, 0, 0), 1),
    # L* = 50 reflects 18.4 % of the light, which sRGB writes as 119.
    "LAB TIFF, grey": (encode(flat("LAB", (128, 128, 128)), "TIFF"), (119, 119, 119), 2),
    # sRGB's red under D50 is (54.3, 80.8, 69.9).
    "LAB TIFF, red": (encode(flat("LAB", (138, 209, 198)), "TIFF"), (255, 0, 0), 6),
    "16-bit PNG": (encode(numpy_16_bit("<"), "PNG"), GREYS_8, 0),
    "16-bit TIFF, little endian": (encode(numpy_16_bit("<"), "TIFF"), GREYS_8, 0),
    "16-bit TIFF, big endian": (encode(numpy_16_bit(">"), "TIFF"), GREYS_8, 0),
    "16-bit PGM": (
        b"P5 7 1 65535\n" + np.array(GREYS_16, ">u2").tobytes(),
        GREYS_8,
        0,
    ),
    "10-bit PGM": (
        b"P5 2 1 1023\n" + np.array([0, 1023], ">u2").tobytes(),
        [[0] * 3, [255] * 3],
        0,
    ),
    "16-bit PNG, one grey transparent": (
        grey_16_bit_png_with_transparency(),
        [[0] * 3, BACKGROUND, [255] * 3],
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_becomes_rgb_by_its_rule(name):
    encoded, expected, tolerance = CASES[name]
    width, height = Image.open(BytesIO(encoded)).size
    found = decoded(encoded, (height, width))
    assert found.dtype == np.uint8
    assert found.shape == (height, width, 3)
    wanted = np.broadcast_to(np.array(expected, float), found.shape)
    assert np.abs(found - wanted).max() <= tolerance, found.tolist()


def test_the_default_background_is_the_callers():
    encoded = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "PNG")
    assert (decoded(encoded, (2, 2), background=(255, 255, 255)) == 255).all()
    assert (decoded(encoded, (2, 2), background=(0, 128, 1)) == [0, 128, 1]).all()


@pytest.mark.parametrize(
    ("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})]
)
def test_an_animation_is_its_first_frame(format, options):  # noqa: A002
    first, second = flat("RGB", (200, 0, 0)), flat("RGB", (0, 0, 200))
    encoded = encode(first, format, save_all=True, append_images=[second], **options)
    assert Image.open(BytesIO(encoded)).n_frames == 2
    assert (decoded(encoded, (16, 16)) == [200, 0, 0]).all()


REFERENCE = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
ORIENTED = {
    "PNG": ({}, 0),
    "JPEG": ({"quality": 100, "subsampling": 0}, 4),
    "WEBP": ({"lossless": True}, 0),
    "TIFF": ({}, 0),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ORIENTED)
def test_exif_orientation_is_applied(format, orientation):  # noqa: A002
    options, tolerance = ORIENTED[format]
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(Image.fromarray(REFERENCE), format, exif=exif, **options)
    upright = naive.upright(REFERENCE, orientation)
    assert upright.shape[:2] == ((9, 5) if orientation >= 5 else (5, 9))
    assert probe(encoded, max_pixels=10**6) == Probe(upright.shape[:2], False)
    found = decoded(encoded, upright.shape[:2])
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= tolerance


@given(strategies.encoded_images(), st.integers(1, 50), st.integers(1, 50))
def test_decoding_gives_the_probed_size_and_the_asked_one(image, height, width):
    found = probe(image.encoded, max_pixels=10**6)
    assert found == Probe(image.image_hw, False)
    assert decoded(image.encoded, found.image_hw).shape == (*image.image_hw, 3)
    resized = decoded(image.encoded, found.image_hw, (height, width))
    assert resized.shape == (height, width, 3)
    assert resized.dtype == np.uint8


@st.composite
def boxes(draw, image_hw):
    """(top, left, height, width) of a box within an image."""
    (top, bottom), (left, right) = (
        sorted(draw(st.sets(st.integers(0, side), min_size=2, max_size=2))) for side in image_hw
    )
    return top, left, bottom - top, right - left


def cut(pixels, box):
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


@given(strategies.encoded_images(), st.sampled_from([None, 1.0, 2.5]), st.data())
def test_a_box_is_cut_out_before_anything_is_resized(image, gap, data):
    box = data.draw(boxes(image.image_hw))
    target = data.draw(st.tuples(st.integers(1, 50), st.integers(1, 50)))
    whole = decoded(image.encoded, image.image_hw)
    if image.format == "JPEG":
        gap = None  # which a smaller decode would merge with its surroundings
    found = decoded(image.encoded, image.image_hw, target, reducing_gap=gap, box=box)
    inner = Image.fromarray(np.ascontiguousarray(cut(whole, box)))
    wanted = inner.resize(target[::-1], Image.Resampling.BICUBIC, reducing_gap=gap)
    assert found.tolist() == np.asarray(wanted).tolist()
    same_size = decoded(image.encoded, image.image_hw, box[2:], box=box)
    assert same_size.tolist() == cut(whole, box).tolist()
    everything = (0, 0, *image.image_hw)
    rules = {"target_hw": target, "reducing_gap": 1.0}
    assert (
        decoded(image.encoded, image.image_hw, box=everything, **rules).tolist()
        == decoded(image.encoded, image.image_hw, **rules).tolist()
    )


def test_a_box_of_pixels_and_of_colours_to_be_converted_is_that_of_the_whole():
    wide = naive_profiles.rgb_profile(naive_profiles.ADOBE, 2.2)
    box, kinds = (3, 5, 20, 11), {}
    for mode in ("RGB", "RGBA", "L"):
        image = strategies.random_image(mode, 40, 30)
        kinds[f"{mode} with a profile"] = encode(image, "PNG", icc_profile=wide)
        kinds[f"{mode} pixels"] = np.asarray(image)
        kinds[f"{mode} image"] = image
    for name, kind in kinds.items():
        whole = decoded(kind, (40, 30))
        for gap in (None, 1.0):
            found = decoded(kind, (40, 30), box[2:], box=box, reducing_gap=gap)
            assert found.tolist() == cut(whole, box).tolist(), name
    plain = decoded(kinds["RGB pixels"], (40, 30))
    assert np.abs(decoded(kinds["RGB with a profile"], (40, 30)).astype(int) - plain).max() > 5


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.integers(1, 8),
    st.sampled_from([1.0, 1.7]),
    st.data(),
)
def test_a_jpeg_is_decoded_as_small_as_its_box_allows(size, orientation, gap, data):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(strategies.random_image("RGB", *size), "JPEG", exif=exif)
    image_hw = size[::-1] if orientation >= 5 else size
    box = data.draw(boxes(image_hw))
    target = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    areas, real = [], decode_module._resized

    def resized(image, area, *given):
        areas.append(area)
        return real(image, area, *given)

    # Without a second look at the edges, which may ask for a finer decode.
    options = {"reducing_gap": gap, "box": box, "jpeg_edges": "padded"}
    with patch.object(decode_module, "_resized", resized):
        found = decoded(encoded, image_hw, target, **options)
    assert found.shape == (*target, 3)
    ((left, top, right, bottom),) = areas
    scales = box[2] / (bottom - top), box[3] / (right - left)
    assert scales[0] == pytest.approx(scales[1])
    (scale,) = {round(scale) for scale in scales}
    room = [inner / int(side * gap) for inner, side in zip(box[2:], target, strict=True)]
    # As many times as the box is larger than needed; then the next of 8, 4, 2 is too much.
    assert scale == 1 or scale <= min(room)
    needed = [math.ceil(whole / least) for whole, least in zip(image_hw, room, strict=True)]
    fits = min(whole // least for whole, least in zip(image_hw, needed, strict=True))
    assert scale == max(s for s in (1, 2, 4, 8) if s == 1 or s <= fits)


def photograph(height, width):
    """Smooth colours with some noise, as a camera makes them."""
    y, x = np.indices((height, width))
    waves = [np.sin(y / 37 + k) * np.cos(x / 23 - k) * 90 + 128 for k in range(3)]
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_box_of_a_jpeg_decoded_small_is_close_to_one_cut_in_full(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(photograph(480, 640), "JPEG", quality=90, exif=exif)
    image_hw = (640, 480) if orientation == 6 else (480, 640)
    rng, apart = np.random.default_rng(1), []
    for _ in range(8):
        height, width = rng.integers(140, 400, 2).tolist()
        top, left = rng.integers(0, (image_hw[0] - height, image_hw[1] - width)).tolist()
        box = (top, left, height, width)
        full, small = (
            decoded(encoded, image_hw, (64, 64), reducing_gap=gap, box=box) for gap in (None, 1.0)
        )
        apart.append(np.abs(full.astype(int) - small).mean())
    assert 0 < np.mean(apart) < 0.7  # of 255 levels


@pytest.mark.parametrize("given_as", ["bytes", "memoryview", "path"])
def test_bytes_memoryviews_and_paths_decode_alike(given_as, tmp_path):
    encoded = encode(Image.fromarray(REFERENCE), "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(encoded)
    some = {"bytes": encoded, "memoryview": memoryview(encoded), "path": str(path)}[given_as]
    assert probe(some, max_pixels=45) == Probe((5, 9), False)
    assert (decoded(some, (5, 9)) == REFERENCE).all()


def test_reducing_averages_what_it_reduces():
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    encoded = encode(Image.fromarray(checks), "PNG")
    found = decoded(encoded, (64, 64), (8, 8))
    assert found.min() >= 120
    assert found.max() <= 135


def test_transparent_pixels_are_laid_on_the_background_before_resizing():
    # White hides under transparency; black shows on black.
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[::2] = (255, 255, 255, 0)
    pixels[1::2] = (0, 0, 0, 255)
    encoded = encode(Image.fromarray(pixels), "PNG")
    assert decoded(encoded, (32, 32), (7, 5), background=(0, 0, 0)).max() == 0


PNG_FILE = encode(strategies.random_image("RGB", 40, 30), "PNG")
JPEG_FILE = encode(strategies.random_image("RGB", 40, 30), "JPEG")
GIF_FILE = encode(strategies.random_image("P", 40, 30), "GIF")


@pytest.mark.parametrize(
    ("encoded", "reason", "message"),
    [
        (b"", "empty", "the file holds no bytes"),
        (memoryview(b""), "empty", "the file holds no bytes"),
        (b"<!DOCTYPE html><html>404</html>", "unreadable", "no known image format"),
        (b"\x89PNG\r\n\x1a\n", "unreadable", "no known image format"),
        (PNG_FILE[:20], "unreadable", "Truncated File Read"),
        ("/no/such/image.png", "missing", "no file '/no/such/image.png'"),
        (png(1001, 1000, 8, 2), "too many pixels", "1000x1001 pixels, expected at most 1000000"),
    ],
)
def test_what_is_no_image_is_rejected_by_its_header(encoded, reason, message):
    with pytest.raises(BadImage, match=f"^{re.escape(message)}$") as found:
        probe(encoded, max_pixels=10**6)
    assert found.value.reason == reason
    with pytest.raises(BadImage, match=f"^{re.escape(message)}$"):
        decoded(encoded, (4, 3))


def test_the_limit_itself_is_within_the_limit():
    assert probe(png(1000, 1000, 8, 2), max_pixels=10**6).image_hw == (1000, 1000)


@pytest.mark.parametrize("side", [12_000, 14_000, 30_000])
@pytest.mark.parametrize("warnings_are", ["error", "ignore"])
def test_pixels_are_counted_against_the_limit_given_and_no_other(side, warnings_are):
    """Pillow warns from 89 million pixels on and refuses from 179 million on."""
    header = png(side, side, 8, 2)
    with warnings.catch_warnings():
        warnings.simplefilter(warnings_are)
        with pytest.raises(BadImage) as found:
            probe(header, max_pixels=10**6)
        assert found.value.reason == "too many pixels"


def test_an_image_close_to_the_largest_limit_is_no_surprise():
    header = png(13_000, 13_000, 8, 2)
    assert probe(header, max_pixels=MAX_PIXELS) == Probe((13_000, 13_000), False)


@pytest.mark.parametrize("encoded", [PNG_FILE, JPEG_FILE, GIF_FILE], ids=["PNG", "JPEG", "GIF"])
def test_a_truncated_image_has_a_size_but_no_pixels(encoded):
    cut = encoded[: len(encoded) * 2 // 3]
    assert probe(cut, max_pixels=10**6).image_hw == (40, 30)
    with pytest.raises(BadImage) as found:
        decoded(cut, (40, 30))
    assert found.value.reason == "undecodable"
    assert found.value.exception.startswith("OSError: ")
    assert isinstance(found.value.__cause__, OSError)


WITHOUT_A_RANGE = r"has no rule to become RGB; value_range=\(low, high\) gives it one"


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_mode_without_a_rule_is_rejected(mode):
    encoded = encode(Image.new(mode, (3, 4)), "TIFF")
    with pytest.raises(BadImage, match=f"^mode {mode} {WITHOUT_A_RANGE}$") as found:
        decoded(encoded, (4, 3))
    assert found.value.reason == "unsupported mode"


@given(strategies.encoded_images(max_side=12), st.data())
def test_a_damaged_file_is_decoded_or_rejected_and_nothing_else(image, data):
    damaged = bytearray(image.encoded)
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(1, len(damaged))) :]
    reason = None
    try:
        found = probe(bytes(damaged), max_pixels=10**5)
        pixels = decode(
            bytes(damaged),
            image_hw=found.image_hw,
            target_hw=(3, 5),
            rules=RULES._replace(max_pixels=10**5, reducing_gap=1.0),
        ).pixels
    except BadImage as error:
        reason = error.reason
    if reason is None:
        assert pixels.shape == (3, 5, 3)
    else:
        assert reason in {
            "unreadable",
            "undecodable",
            "damaged scan",
            "too many pixels",
            "unsupported mode",
            "empty",
        }


GOOD_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def with_orientation(value):
    return GOOD_EXIF.replace(b"\0\x06\0\0\0\0\0\0", bytes([0, value]) + b"\0\0\0\0\0\0")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("warnings_are", ["error", "ignore"])
@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage!", GOOD_EXIF[:12], GOOD_EXIF[:-8], with_orientation(9), with_orientation(0)],
    ids=["garbage", "cut in its header", "cut in its entries", "orientation 9", "orientation 0"],
)
def test_a_broken_exif_is_flagged_and_the_image_kept_as_it_is(exif, warnings_are, format):  # noqa: A002
    encoded = encode(Image.new("RGB", (6, 4)), format, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter(warnings_are)
        assert probe(encoded, max_pixels=100) == Probe((4, 6), True)
        assert decoded(encoded, (4, 6)).shape == (4, 6, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_sound_exif_and_no_exif_are_not_flagged(format):  # noqa: A002
    image = Image.new("RGB", (6, 4))
    assert probe(encode(image, format), max_pixels=100) == Probe((4, 6), False)
    assert probe(encode(image, format, exif=GOOD_EXIF), max_pixels=100) == Probe((6, 4), False)


def test_a_size_that_is_not_the_planned_one_is_an_error_and_no_bad_image():
    message = (
        "image_hw is (5, 9), expected (9, 5) as planned; "
        "plan again (stored rows: into another folder), the source has changed"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as found:
        decoded(encode(Image.fromarray(REFERENCE), "PNG"), (9, 5))
    assert not isinstance(found.value, BadImage)


def test_pillows_globals_are_never_touched():
    def settings():
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK

    before, filters = settings(), list(warnings.filters)
    decoded(PNG_FILE, (40, 30))
    for encoded in (b"", PNG_FILE[:500], png(30_000, 30_000, 8, 2)):
        with pytest.raises(BadImage):
            decoded(encoded, (40, 30))
    assert settings() == before
    assert warnings.filters == filters


def test_an_icon_is_not_decoded_before_its_size_is_known():
    large = encode(Image.new("L", (3000, 2000)), "PNG")
    directory = struct.pack("<HHH", 0, 1, 1)
    directory += struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 8, len(large), 22)
    message = "2000x3000 pixels, expected at most 1000000"
    with (
        patch.object(ImageFile.ImageFile, "load", side_effect=AssertionError("decoded")),
        pytest.raises(BadImage, match=message) as caught,
    ):
        probe(directory + large, max_pixels=10**6)
    assert caught.value.reason == "too many pixels"
    assert probe(directory + large, max_pixels=6 * 10**6).image_hw == (2000, 3000)


@pytest.mark.parametrize("height_and_width", [(5000, 1), (1, 5000)])
def test_two_filters_make_no_image_larger_than_need_be(height_and_width):
    height, width = height_and_width
    image = Image.fromarray(np.arange(height * width, dtype=np.uint8).reshape(height, width))
    sizes, real = [], Image.Image.resize

    def resize(self, size, *given):
        sizes.append(math.prod(size))
        return real(self, size, *given)

    with patch.object(Image.Image, "resize", resize):
        pixels = decoded(encode(image, "PNG"), (height, width), (16, 16), upscale_filter="bilinear")
    assert pixels.shape == (16, 16, 3)
    assert max(sizes) == 256
