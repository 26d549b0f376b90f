"""JPEG XL: its header and its pixels, also of files whose headers are rewritten bit by bit."""

from __future__ import annotations

import re
import struct
from io import BytesIO

import naive_profiles
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_decode import BACKGROUND, decoded

from packpipe.images.bad_images import BadImage
from packpipe.images.decode import probe
from packpipe.images.jpegxl import CONTAINER, codestream_of, header_of

pillow_jxl = pytest.importorskip("pillow_jxl")

HIGH, WIDE = 5, 9
# Three frames of 16 x 24 pixels, of 10, 200 and 90; the plugin writes none.
ANIMATED = bytes.fromhex(
    "ff0a03054d0020260804010038004b188b158055fc7f0000455ad409080401003c004b188b15805df8ff0000"
    "5273a84302080405003c004b188b15801df8ff0000107ea8d300"
)
# Where the plugin's header of WIDE x HIGH pixels of RGB has its size, and where its frame starts.
SIZE_BITS, FRAME = 26, 7
# The bits after it: not all is usual, more follows, orientation 1, no size, preview, animation.
MORE = [0, 1, 0, 0, 0, 0, 0, 0]
# 8 bits, a buffer of 16, no extra channel, colours as they are, which are sRGB.
DEPTH, CHANNELS, SRGB = [0, 0, 0, 1], [0, 0], [0, 1]
# The light of 10,000 cd/m2 that is usual, no extension, the usual transforms.
END = [1, 0, 0, 1]
# Colours as they are, not sRGB, no profile: RGB, D65, primaries of BT.2100, no gamma; then PQ or
# HLG, and an intent.
BT_2100 = [0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0]
TRANSFERS = {"PQ": [0, 1, 0, 1, 1, 1], "HLG": [1, 1, 0, 0, 0, 0, 0, 0]}


def jxl(pixels, **options):
    file, image = BytesIO(), pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, "JXL", **{"lossless": True, **options})
    return file.getvalue()


def noise(*channels, most=255, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, most + 1, (HIGH, WIDE, *channels)).astype(dtype)


def rewritten(*parts):
    """A file of RGB noise with another header after its size."""
    encoded = jxl(noise(3))
    bits = [byte >> bit & 1 for byte in encoded[2:FRAME] for bit in range(8)][:SIZE_BITS]
    bits += [bit for part in parts for bit in part]
    bits += [0] * (-len(bits) % 8)
    head = [sum(bits[at + bit] << bit for bit in range(8)) for at in range(0, len(bits), 8)]
    return encoded[:2] + bytes(head) + encoded[FRAME:]


def turned(orientation):
    number = [orientation - 1 >> bit & 1 for bit in range(3)]
    return rewritten([0, 1, *number, 0, 0, 0], DEPTH, CHANNELS, SRGB, END)


def box(name, content):
    return struct.pack(">I4s", 8 + len(content), name) + content


def reason_of(encoded, **options):
    with pytest.raises(BadImage) as found:
        decoded(encoded, probe(encoded, max_pixels=10**6).image_hw, **options)
    return found.value.reason, str(found.value)


UPRIGHT = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_codestream_says_what_is_upright(orientation):
    encoded = turned(orientation)
    expected = UPRIGHT[orientation](noise(3))
    assert probe(encoded, max_pixels=10**6).image_hw == expected.shape[:2]
    assert (decoded(encoded, expected.shape[:2]) == expected).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_says_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = jxl(noise(3), exif=exif.tobytes(), use_container=True)
    assert b"Exif" in encoded
    assert (decoded(encoded, (HIGH, WIDE)) == noise(3)).all()


def test_a_jpeg_within_it_is_turned_once(tmp_path):
    exif, path = Image.Exif(), tmp_path / "turned.jpg"
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((WIDE * 8, HIGH * 8)).save(
        path, quality=95, exif=exif.tobytes()
    )
    with Image.open(path) as image:
        encoded = jxl(image, lossless_jpeg=True)
    hw = (WIDE * 8, HIGH * 8)
    assert b"jbrd" in encoded
    assert probe(encoded, max_pixels=10**6).image_hw == hw
    apart = decoded(encoded, hw).astype(int) - decoded(path.read_bytes(), hw)
    assert np.abs(apart).max() <= 3


GREY_16, RGB_16 = noise(most=65535, dtype=np.uint16), noise(3)
KINDS = {
    "L": (noise(), noise(), 0),
    "LA": (noise(2), None, 1),
    "RGBA": (noise(4), None, 1),
    "I;16": (GREY_16, np.rint(GREY_16 / 257), 0),
    "F": ((GREY_16 / 65535).astype(np.float32), np.rint(GREY_16 / 257), 1),
}


@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize("use_container", [False, True])
def test_every_kind_that_the_plugin_writes(mode, use_container):
    values, expected, within = KINDS[mode]
    if expected is None:  # transparent
        colours, alpha = values[..., :-1].astype(float), values[..., -1:] / 255
        expected = colours * alpha + np.array(BACKGROUND) * (1 - alpha)
    expected = np.broadcast_to(np.dstack([expected]).reshape(HIGH, WIDE, -1), (HIGH, WIDE, 3))
    encoded = jxl(Image.fromarray(values), use_container=use_container)
    found = decoded(encoded, (HIGH, WIDE), profiles="ignore")
    assert np.abs(found - expected).max() <= within


def test_floating_point_beyond_black_and_white_is_clipped():
    values = np.array([[-1, -0.001, 0, 0.5, 1, 1.001, 2]], np.float32)
    found = decoded(jxl(values), values.shape, profiles="ignore")[0, :, 0]
    assert found.tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_a_profile_becomes_srgb():
    profile = naive_profiles.rgb_profile(naive_profiles.P3, 2.2)
    image = Image.fromarray(noise(3))
    image.info["icc_profile"] = profile
    encoded = jxl(image)
    opened = Image.open(BytesIO(encoded))
    told = naive_profiles.srgb_by(np.asarray(opened), opened.info["icc_profile"])
    assert np.abs(decoded(encoded, (HIGH, WIDE)) - told).max() <= 2


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_high_dynamic_range_is_refused_unless_profiles_are_ignored(transfer):
    colours = [*BT_2100, *TRANSFERS[transfer], 1, 0]
    encoded = rewritten(MORE, DEPTH, CHANNELS, colours, END)
    reason, said = reason_of(encoded)
    assert reason == "high dynamic range"
    assert said.startswith(f"the transfer is {transfer}, expected a standard dynamic range")
    assert (decoded(encoded, (HIGH, WIDE), profiles="ignore") == noise(3)).all()


def test_an_animation_is_refused_since_its_last_frame_would_be_decoded():
    _, _, pixels, *_ = pillow_jxl.Decoder(num_threads=0)(ANIMATED)
    assert set(pixels) == {90}  # when this fails, the decoder gives the first one
    message = "an animated JPEG XL has no rule to become RGB"
    assert reason_of(ANIMATED) == ("unsupported mode", message)


CMYK = [0, 0, 1, 0, 1, 0, 0]  # a channel that is not usual, of type 4


@pytest.mark.parametrize(
    ("channels", "what"),
    [
        ([1, 0, *CMYK], "a JPEG XL of CMYK"),
        ([0, 1, 0, 0, 0, 0, 1, *CMYK], "a JPEG XL of CMYK"),  # two, of which the first is usual
        ([0, 1, 1, 1, 0, 0], "a JPEG XL of 5 extra channels"),
        ([1, 1, *[1] * 12], "a JPEG XL of 4096 extra channels"),
    ],
)
def test_channels_that_the_decoder_would_drop_or_drown_in_are_refused(channels, what):
    encoded = rewritten(MORE, DEPTH, channels, SRGB, END)
    message = f"{what} has no rule to become RGB"
    with pytest.raises(BadImage, match=f"^{message}$") as found:
        probe(encoded, max_pixels=10**6)
    assert found.value.reason == "unsupported mode"


def test_a_recommended_size_and_a_preview_are_read_over():
    size = [1, 0, 0, 0, 0, 0, 1, 0, 0]  # 8 x 8
    preview = [1, 0, 0, 1, 0, 0]  # 16 x 16
    encoded = rewritten([0, 1, 1, 0, 1, 1, *size, 1, *preview, 0], DEPTH, CHANNELS, SRGB, END)
    assert probe(encoded, max_pixels=10**6).image_hw == (WIDE, HIGH)  # of orientation 6
    moving = [0, 1, 1, 0, 1, 1, *size, 1, *preview, 1]
    with pytest.raises(BadImage, match=r"^an animated JPEG XL has no rule"):
        probe(rewritten(moving), max_pixels=10**6)


@given(st.integers(1, 2**30), st.integers(1, 2**30))
def test_every_size_is_read(height, width):
    def bits(number, count):
        return [number >> bit & 1 for bit in range(count)]

    def side(number):
        way, count = next(o for o in enumerate((9, 13, 18, 30)) if number <= 1 << o[1])
        return [*bits(way, 2), *bits(number - 1, count)]

    written = [0, *side(height), 0, 0, 0, *side(width), 1]
    written += [0] * (-len(written) % 8)
    content = bytes(
        sum(written[at + bit] << bit for bit in range(8)) for at in range(0, len(written), 8)
    )
    assert header_of(b"\xff\x0a" + content)[:2] == (width, height)


@given(st.integers(1, 300), st.integers(0, 6))
def test_sizes_in_a_ratio_are_those_of_the_decoder(scale, ratio):
    over, under = [(1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1)][ratio]
    height = scale
    encoded = jxl(np.zeros((height, max(1, height * over // under), 3), np.uint8), effort=1)
    _, info, *_ = pillow_jxl.Decoder(num_threads=0)(encoded)
    assert probe(encoded, max_pixels=10**9).image_hw == (info.height, info.width)


@pytest.mark.parametrize("hw", [(2**30, 1), (1, 2**30), (2**30, 2**30), (2000, 2001)])
def test_a_size_beyond_the_limit_is_refused_by_the_header(hw):
    def side(number):
        return [1, 1, *[number - 1 >> bit & 1 for bit in range(30)]]

    bits = [0, *side(hw[0]), 0, 0, 0, *side(hw[1]), 1]
    bits += [0] * (-len(bits) % 8)
    content = bytes(sum(bits[at + bit] << bit for bit in range(8)) for at in range(0, len(bits), 8))
    with pytest.raises(BadImage, match=rf"^{hw[0]}x{hw[1]} pixels, expected at most ") as found:
        probe(b"\xff\x0a" + content, max_pixels=4 * 10**6)
    assert found.value.reason == "too many pixels"


def test_a_codestream_in_parts_is_put_together():
    codestream = jxl(noise(3))
    half = len(codestream) // 2
    start = CONTAINER + box(b"ftyp", b"jxl \0\0\0\0jxl ")
    first = box(b"jxlp", struct.pack(">I", 0) + codestream[:3])
    second = box(b"jxlp", struct.pack(">I", 1) + codestream[3:half])
    last = box(b"jxlp", struct.pack(">I", 2**31 + 2) + codestream[half:])
    parted = start + first + box(b"Exif", bytes(70)) + second + last + box(b"xml ", bytes(9))
    long = start + struct.pack(">I4sQ", 1, b"jxlc", 16 + len(codestream)) + codestream
    open_ended = start + struct.pack(">I4s", 0, b"jxlc") + codestream
    for encoded in (parted, long, open_ended):
        assert codestream_of(BytesIO(encoded)) == codestream
        assert codestream_of(BytesIO(encoded), 5) == codestream[:5]
        assert (decoded(encoded, (HIGH, WIDE)) == noise(3)).all()


def test_a_codestream_in_thousands_of_parts_is_whole():
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    codestream = jxl(values)
    parts = [codestream[at : at + 3] for at in range(0, len(codestream), 3)]
    assert len(parts) > 2000
    numbers = [*range(len(parts) - 1), 2**31 + len(parts) - 1]
    boxes = [box(b"jxlp", struct.pack(">I", n) + p) for n, p in zip(numbers, parts, strict=True)]
    encoded = CONTAINER + box(b"ftyp", b"jxl \0\0\0\0jxl ") + b"".join(boxes)
    assert (decoded(encoded, (40, 60)) == values).all()


def test_what_the_decoder_says_stands_behind_one_sentence():
    encoded = jxl(noise(3))
    reason = "undecodable"
    with pytest.raises(BadImage, match=r"^libjxl cannot decode it$") as found:
        decoded(encoded[: len(encoded) // 2], (HIGH, WIDE))
    assert found.value.reason == reason
    assert found.value.exception == "ValueError: libjxl cannot decode it"
    assert str(found.value.__cause__.__cause__)


def test_an_image_opened_by_its_plugin_gives_the_pixels_of_its_bytes():
    values = KINDS["F"][0]
    for encoded in (jxl(values), jxl(noise(3)), jxl(noise(2)), turned(6)):
        hw = probe(encoded, max_pixels=10**6).image_hw
        with Image.open(BytesIO(encoded)) as image:
            found = decoded(image, hw, value_range=(5.0, 6.0))
        assert (found == decoded(encoded, hw, value_range=(5.0, 6.0))).all()
    with Image.open(BytesIO(ANIMATED)) as image, pytest.raises(BadImage) as found:
        decoded(image, image.size[::-1])
    message = "an animated JPEG XL has no rule to become RGB"
    assert (found.value.reason, str(found.value)) == ("unsupported mode", message)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (b"", "a JPEG XL without a codestream"),
        (box(b"Exif", bytes(8)), "a JPEG XL without a codestream"),
        (
            box(b"free", b"") * (2**14 - 1) + box(b"jxlc", b"\xff\x0a\x01"),
            "the header of a JPEG XL is cut short",
        ),
        (
            box(b"free", b"") * 2**14 + box(b"jxlc", b"\xff\x0a"),
            "a JPEG XL of more than 16384 boxes",
        ),
        (struct.pack(">I4s", 4, b"free") + bytes(99), "a JPEG XL without a codestream"),
        (box(b"jxlc", b"\xff\x0a\x01"), "the header of a JPEG XL is cut short"),
        (box(b"jxlc", b"\x00\x01\x02\x03"), "a JPEG XL without a codestream"),
    ],
)
def test_a_damaged_container_is_a_reject(rest, message):
    with pytest.raises(BadImage, match=f"^{re.escape(message)}$") as found:
        probe(CONTAINER + rest, max_pixels=10**6)
    assert found.value.reason == "unreadable"


@pytest.mark.parametrize("use_container", [False, True])
def test_a_file_cut_anywhere_is_a_reject(use_container):
    encoded = jxl(noise(3), use_container=use_container)
    reasons = {reason_of(encoded[:cut])[0] for cut in range(2, len(encoded) - 1, 7)}
    assert reasons == {"unreadable", "undecodable"}


def test_colours_multiplied_by_their_alpha_are_divided_again():
    alpha = np.full((HIGH, WIDE), 51, np.uint8)
    encoded = jxl(np.dstack([np.full((HIGH, WIDE, 3), 40, np.uint8), alpha]))
    bits = [byte >> bit & 1 for byte in encoded[2:] for bit in range(8)]
    at = SIZE_BITS + len([0, 0, *DEPTH])
    assert bits[at : at + 3] == [1, 0, 1]  # one channel, which is usual: of 8 bits of transparency
    # The same, said at length: not usual, of type 0, 8 bits, whole size, no name, multiplied.
    channel = [1, 0, *[0] * 3, *[0] * 3, *[0] * 2, *[0] * 2, 1]
    frame = 2 + -(-(at + 3 + len([*SRGB, *END[1:]])) // 8)
    bits = [*bits[:at], *channel, *SRGB, *END[1:]]
    bits += [0] * (-len(bits) % 8)
    head = bytes(sum(bits[at + bit] << bit for bit in range(8)) for at in range(0, len(bits), 8))
    found = decoded(encoded[:2] + head + encoded[frame:], (HIGH, WIDE), background=(0, 0, 0))
    assert np.abs(found.astype(int) - 40).max() <= 1
