"""Every kind of file that DESIGN.md names: each is a correct row or a listed reject."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import naive
import naive_colours
import numpy as np
import pytest
import test_headers
import test_modes
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from fuzz_seeds import seeds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import encode
from test_decode import BACKGROUND, CASES, decoded, png

import packpipe
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import probe
from packpipe.images.opening import FORMATS
from packpipe.planning.image_options import FILTERS, MAX_PIXELS
from packpipe.samples import images_folder

HIGH, WIDE = 8, 12
REASONS = {"empty", "unreadable", "undecodable", "too many pixels", "unsupported mode"}


class File(NamedTuple):
    """An encoded image, the pixels that it stands for, and how far off they may be."""

    encoded: bytes
    pixels: np.ndarray
    within: float = 0


# How pictures are saved with the least loss, and how far off they are then.
SAVED: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4", "speed": 10},
}
LOSSES = {"JPEG": 3, "AVIF": 4}
# What each writer stores as it is given; the other modes are refused, or become another picture.
KEPT = {
    "JPEG": "1 L RGB RGBX CMYK YCbCr",
    "PNG": "1 L LA P RGB RGBA I;16 I;16B",
    "WEBP": "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB HSV",
    "GIF": "1 L P RGB",
    "TIFF": "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB I;16 I;16B",
    "BMP": "1 L P RGB",
    "DIB": "1 L P RGB",
    "AVIF": "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB HSV",
    "JPEG2000": "L LA RGB RGBA CMYK YCbCr I;16",
    "PPM": "1 L RGB I;16 I",
    "ICO": "1 L LA P RGB RGBA I;16 I;16B",
    "TGA": "1 L LA P RGB RGBA",
    "PCX": "1 L P RGB",
    "SGI": "L RGB RGBA",
    "QOI": "RGB RGBA",
    "DDS": "L LA RGB RGBA",
}
MODES = [*test_modes.BANDS, "I", "F"]


def saved(image: Image.Image, format: str, **options: object) -> bytes:  # noqa: A002
    if format == "ICO" and "sizes" not in options:  # before Pillow 13, no small one was written
        options["sizes"] = [image.size]
    return encode(image, format, **SAVED.get(format, {}), **options)


def as_pillow_reads(encoded: bytes) -> np.ndarray:
    """The pixels of a file that Pillow decodes in full, laid on the background."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(BytesIO(encoded))
        if image.mode.startswith("I;16"):
            return naive_colours.rgb_of("I;16", np.asarray(image)[..., None])
        return naive_colours.rgb_of("RGBA", np.asarray(image.convert("RGBA")), BACKGROUND)


def of_mode(mode: str) -> tuple[Image.Image, np.ndarray]:
    """A picture of a mode, and its pixels by the formula of the mode."""
    if mode in ("I", "F"):
        values = np.arange(HIGH * WIDE).reshape(HIGH, WIDE, 1) * 600
        image = Image.fromarray(values[..., 0].astype(np.int32 if mode == "I" else np.float32))
        return image, naive_colours.rgb_of("I;16", values)
    bands = test_modes.stored(mode, HIGH, WIDE)
    named = "I;16" if mode.startswith("I;16") else mode
    image = test_modes.image(mode, bands)
    return image, naive_colours.rgb_of(named, bands, BACKGROUND, test_modes.PALETTE)


def of_every_mode() -> Iterator[tuple[str, File]]:
    """A file of every mode in every format that takes it."""
    for format, mode in product(KEPT, MODES):  # noqa: A001
        image, pixels = of_mode(mode)
        is_kept = mode in KEPT[format].split()
        try:  # a mode that Pillow will not write, deprecated before, or writes and does not read
            encoded = saved(image, format)
            pixels = pixels if is_kept else as_pillow_reads(encoded)
        except (OSError, ValueError, KeyError, DeprecationWarning):
            assert not is_kept
            continue
        within = max(test_modes.WITHIN.get(mode, 0.51), LOSSES.get(format, 0))
        yield f"{mode} in {format}", File(encoded, pixels, within)


def photo(height: int = HIGH, width: int = WIDE, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


PHOTO = photo()
TURNED = ("JPEG", "PNG", "WEBP", "TIFF")


def turned(format: str, orientation: int, image: Image.Image = PHOTO, **options: object) -> bytes:  # noqa: A002
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, format, exif=exif, **options)


def turned_by_exif() -> Iterator[tuple[str, File]]:
    for format, orientation in product(TURNED, range(1, 9)):  # noqa: A001
        stored = as_pillow_reads(saved(PHOTO, format))
        upright = naive.upright(stored, orientation)
        yield f"{format}, EXIF {orientation}", File(turned(format, orientation), upright)


BROKEN_EXIF = b"Exif\0\0garbage!"
BROKEN_EXIF_IN = ("JPEG", "PNG", "WEBP")


def with_broken_exif() -> Iterator[tuple[str, File]]:
    for format in BROKEN_EXIF_IN:  # noqa: A001
        pixels = as_pillow_reads(saved(PHOTO, format))
        yield f"{format}, broken EXIF", File(saved(PHOTO, format, exif=BROKEN_EXIF), pixels)


def of_thin_shapes() -> Iterator[tuple[str, File]]:
    shapes = [(1, 1), (1, 200), (200, 1), (2, 301)]
    for format, (height, width) in product(KEPT, shapes):  # noqa: A001
        if format == "ICO" and max(height, width) > 256:
            continue
        mode = "P" if format == "GIF" else "RGB"
        image = photo(height, width).convert(mode)
        pixels = np.asarray(image.convert("RGB"), float)
        encoded = saved(image, format)
        yield f"{height}x{width} {format}", File(encoded, pixels, LOSSES.get(format, 0))


def cmyk_jpeg() -> tuple[bytes, np.ndarray]:
    """A CMYK JPEG of flat blocks, and the inks of its pixels."""
    blocks = np.random.default_rng(3).integers(0, 256, (2, 3, 4), np.uint8)
    inks = blocks.repeat(8, axis=0).repeat(8, axis=1)
    return saved(Image.frombytes("CMYK", (24, 16), inks.tobytes()), "JPEG"), inks


def of_inks() -> Iterator[tuple[str, File]]:
    """CMYK as Adobe says, CMYK without a word of Adobe, and YCCK."""
    encoded, inks = cmyk_jpeg()
    pixels = naive_colours.rgb_of("CMYK", inks)
    start = encoded.index(b"\xff\xee\0\x0eAdobe")
    end = start + 16
    assert encoded[end - 1] == 0  # no colour transform
    yield "CMYK JPEG, Adobe", File(encoded, pixels, 3)
    yield "CMYK JPEG, no Adobe", File(encoded[:start] + encoded[end:], pixels, 3)
    # The same bytes said to be YCCK: inks are stored inverted, and so is what they turn into.
    ycck = encoded[: end - 1] + b"\2" + encoded[end:]
    colours = naive_colours.rgb_of("YCbCr", 255 - inks[..., :3])
    light = (255 - inks[..., 3:].astype(float)) / 255
    yield "YCCK JPEG", File(ycck, (255 - colours) * light, 4)


def of_several_frames() -> Iterator[tuple[str, File]]:
    """Animations and pages: each stands for its first."""
    first, others = PHOTO.quantize(64), [photo(seed=seed).quantize(64) for seed in (1, 2)]
    frames = {"save_all": True, "append_images": [frame.convert("RGB") for frame in others]}
    for format in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):  # noqa: A001
        image = first if format == "GIF" else first.convert("RGB")
        options = {"quality": 100, "subsampling": 0} if format == "MPO" else {}
        encoded = saved(image, format, **frames, **options)
        assert Image.open(BytesIO(encoded)).n_frames == 3
        pixels = np.asarray(first.convert("RGB"), float)
        within = 3 if format == "MPO" else LOSSES.get(format, 0)
        yield f"{format} of 3 frames", File(encoded, pixels, within)
    shown_alone = saved(first.convert("RGB"), "PNG", default_image=True, **frames)
    yield "APNG, image apart", File(shown_alone, np.asarray(first.convert("RGB"), float))


def of_one_pixel_high() -> Iterator[tuple[str, File]]:
    """The cases of test_images: transparency of all kinds, LAB, 16 bits."""
    for name, (encoded, expected, within) in CASES.items():
        width, height = Image.open(BytesIO(encoded)).size
        pixels = np.broadcast_to(np.array(expected, float), (height, width, 3))
        yield f"as {name}", File(encoded, pixels, within)


FILES: dict[str, File] = {
    name: file
    for files in (
        *(of_every_mode(), turned_by_exif(), with_broken_exif(), of_thin_shapes()),
        *(of_inks(), of_several_frames(), of_one_pixel_high()),
    )
    for name, file in files
}
# Modes without a range that is known, as their files store them.
WITHOUT_RULE = {name: FILES.pop(name) for name in ("I in TIFF", "F in TIFF", "F in PPM")}


def is_the_picture(found: np.ndarray, file: File) -> bool:
    return found.shape == file.pixels.shape and np.abs(found - file.pixels).max() <= file.within


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_its_picture_by_the_stated_rule(name):
    file = FILES[name]
    image_hw = file.pixels.shape[:2]
    found = probe(file.encoded, max_pixels=10**6)
    assert found == (image_hw, "broken EXIF" in name)
    assert is_the_picture(decoded(file.encoded, image_hw), file)


def test_every_format_that_pillow_writes_is_among_them():
    assert set(KEPT) == {*FORMATS} - {"CUR", "DCX", "PSD", "ICNS"}


@pytest.fixture(scope="module")
def seed_files() -> dict[str, bytes]:
    """Files of the fuzzer: interlaced, tiled, planar, in run lengths, of PSD, DCX, ICNS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's writers
        found = seeds()
    return {name: file for name, file in found.items() if not name.endswith((".png", ".jpg"))}


def test_what_pillow_does_not_write_is_read_as_pillow_reads_it(seed_files):
    formats = Counter()
    for name, encoded in seed_files.items():
        format, *described = name.split()  # noqa: A001
        if format in ("EPS", "IM", "PDF", "MSP", "XBM"):
            with pytest.raises(BadImage, match=r"^no known image format$"):
                probe(encoded, max_pixels=10**6)
        elif described[-3:] == ["3", "16", "1"]:
            assert format == "TIFF"  # which Pillow misreads; its pixels are in test_layouts
        elif described[:1] == ["built"] or format in ("CUR", "DCX", "ICNS", "PSD"):
            image_hw = probe(encoded, max_pixels=10**6).image_hw
            wanted = as_pillow_reads(encoded)
            assert np.abs(decoded(encoded, image_hw) - wanted).max() < 1, name
            formats[format] += 1
    assert formats.keys() >= {"PNG", "TIFF", "SGI", "BMP", "CUR", "DCX", "ICNS", "PSD"}
    assert formats["PNG"] > 20
    assert formats["TIFF"] > 20


VALUES = np.arange(2**16).reshape(256, 256)
NEAREST = np.array([naive_colours.to_8_bits(value) for value in range(2**16)]).reshape(256, 256)


def all_16_bit(byte_order: str) -> Image.Image:
    mode = {"<": "I;16", ">": "I;16B"}[byte_order]
    return Image.frombytes(mode, (256, 256), VALUES.astype(byte_order + "u2").tobytes())


DEEP = {
    "PNG": encode(all_16_bit("<"), "PNG"),
    "TIFF II": encode(all_16_bit("<"), "TIFF"),
    "TIFF MM": encode(all_16_bit(">"), "TIFF"),
    "TIFF II, deflated": encode(all_16_bit("<"), "TIFF", compression="tiff_adobe_deflate"),
    "PGM": b"P5 256 256 65535\n" + VALUES.astype(">u2").tobytes(),
    "JPEG 2000": encode(all_16_bit("<"), "JPEG2000"),
}


@pytest.mark.parametrize("name", DEEP)
def test_every_16_bit_value_is_scaled_to_the_nearest(name):
    if name.startswith("TIFF"):
        assert DEEP[name].startswith({"II": b"II*\0", "MM": b"MM\0*"}[name[5:7]])
    assert (decoded(DEEP[name], (256, 256)) == NEAREST[..., None]).all()


@pytest.mark.parametrize("depth", [2, 100, 254, 256, 1023, 4095, 65534])
@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_a_ppm_of_any_depth_is_scaled_by_its_depth(kind, depth):
    values = np.arange(depth + 1)
    samples = np.repeat(values, 3 if kind == "P6" else 1)
    header = f"{kind} {depth + 1} 1 {depth}\n".encode()
    encoded = header + samples.astype(">u2" if depth > 255 else "u1").tobytes()
    exact = (values * 255 / depth)[None, :, None]
    assert np.abs(decoded(encoded, (1, depth + 1)) - exact).max() <= 0.5


def test_colours_of_16_bits_are_off_by_less_than_one_of_8():
    rows = [b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in VALUES]
    found = decoded(png(256, 256, 16, 2, b"".join(rows)), (256, 256))
    assert np.abs(found - VALUES[..., None] * 255 / 65535).max() < 1


def tiff_of(bits: int, photometric: int, samples: bytes) -> bytes:
    """A little-endian TIFF of grey samples, 4x1."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 1}
    tags |= {273: 8 + 2 + 12 * 9 + 4, 279: len(samples)}
    entries = (struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(entries) + bytes(4) + samples


def test_a_tiff_in_which_zero_is_white_is_no_negative():
    assert decoded(tiff_of(8, 0, bytes([0, 10, 128, 255])), (1, 4))[0, :, 0].tolist() == [
        *(255, 245, 127, 0),
    ]


def test_a_tiff_of_12_bits_is_scaled_by_its_depth():
    samples = int("000fff800001", 16).to_bytes(6, "big")
    assert decoded(tiff_of(12, 1, samples), (1, 4))[0, :, 0].tolist() == [0, 255, 128, 0]


def test_a_16_bit_tiff_in_which_zero_is_white_is_no_negative():
    samples = np.array([0, 2570, 32768, 65535], "<u2").tobytes()
    assert decoded(tiff_of(16, 0, samples), (1, 4))[0, :, 0].tolist() == [255, 245, 127, 0]


@pytest.mark.parametrize(
    ("encoded", "pixels"),
    [
        pytest.param(
            png(4, 1, 2, 0, b"\0\x1b", [(b"tRNS", b"\0\1")]),
            [(0, 0, 0), BACKGROUND, (170, 170, 170), (255, 255, 255)],
            id="2 bits",
        ),
        pytest.param(
            png(
                *(2, 1, 16, 2),
                b"\0" + struct.pack(">6H", 1000, 1000, 1000, 0, 0, 0),
                [(b"tRNS", struct.pack(">3H", 1000, 1000, 1000))],
            ),
            [BACKGROUND, (0, 0, 0)],
            id="colours of 16 bits",
        ),
        (png(8, 1, 1, 0, b"\0\xaa", [(b"tRNS", b"\0\1")]), [BACKGROUND, (0, 0, 0)] * 4),
        (png(8, 1, 1, 0, b"\0\xaa", [(b"tRNS", b"\0\0")]), [(255, 255, 255), BACKGROUND] * 4),
    ],
)
def test_one_transparent_value_of_a_png_of_any_depth_shows_the_background(encoded, pixels):
    assert (decoded(encoded, (1, len(pixels))) == [pixels]).all()


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Give a function that says afterwards how many bytes Python held at once at most."""
    peaks = []
    tracemalloc.start()
    try:
        yield lambda: peaks[0]
        peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


# What has no image in it, or none that may be opened.
REFUSED = {
    "nothing": (b"", "empty"),
    "zero bytes": (bytes(500), "unreadable"),
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "unreadable"),
    "text": (b"not an image\n" * 20, "unreadable"),
    "JSON": (b'{"error": "rate limited"}', "unreadable"),
    "SVG": (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>',
        "unreadable",
    ),
    "PostScript": (b"%!PS-Adobe-3.0\n(%pipe%id) (w) file\nshowpage\n", "unreadable"),
    "ZIP": (b"PK\3\4" + bytes(26), "unreadable"),
    "MP4": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(40), "unreadable"),
    **{name: (encode(PHOTO, name), "unreadable") for name in ("EPS", "PDF")},
    **{name: (encode(PHOTO.convert("1"), name), "unreadable") for name in ("MSP", "XBM")},
}


def patched(encoded: bytes, after: bytes, offset: int, packed: bytes) -> bytes:
    """A file with some bytes in place of those so far behind the first of others."""
    start = encoded.index(after) + offset
    return encoded[:start] + packed + encoded[start + len(packed) :]


def bombs() -> dict[str, bytes]:
    """Headers that ask for more pixels than are allowed, and little behind them."""
    files = {name: saved(PHOTO, name) for name in KEPT}
    most = struct.pack("<HH", 65535, 65535)
    wide = struct.pack(">II", 60_000, 60_000)
    lossy, several = encode(PHOTO, "WEBP"), {"save_all": True, "append_images": [photo(seed=1)]}
    tiff = files["TIFF"]
    for tag in (256, 257):
        kind = next(kind for kind in (3, 4) if struct.pack("<HHI", tag, kind, 1) in tiff)
        field = struct.pack("<HHI", tag, kind, 1)
        tiff = patched(tiff, field, 0, struct.pack("<HHII", tag, 4, 1, 60_000))
    return {
        "PNG": png(60_000, 60_000, 8, 2),
        "GIF, screen": patched(files["GIF"], b"GIF8", 6, most),
        "GIF, frame": patched(files["GIF"], b"\x2c\0\0\0\0", 5, most),
        "WebP": patched(lossy, b"\x9d\x01\x2a", 3, struct.pack("<HH", 16383, 16383)),
        "WebP, lossless": patched(
            files["WEBP"], b"VP8L", 9, struct.pack("<I", 16382 | 16382 << 14)
        ),
        "WebP, animated": patched(
            encode(PHOTO, "WEBP", **several), b"VP8X", 12, (2**14 - 1).to_bytes(3, "little") * 2
        ),
        "JPEG": patched(files["JPEG"], b"\xff\xc0", 5, most),
        "JPEG, progressive": patched(encode(PHOTO, "JPEG", progressive=True), b"\xff\xc2", 5, most),
        "TIFF": tiff,
        "BMP": patched(files["BMP"], b"BM", 18, struct.pack("<ii", 60_000, 60_000)),
        "JPEG 2000": patched(files["JPEG2000"], b"ihdr", 4, wide),
        "PPM": b"P6 60000 60000 255\n",
        "TGA": patched(files["TGA"], b"\0\0\2", 12, most),
        "PCX": patched(files["PCX"], b"\n\5\1", 8, struct.pack("<HH", 65534, 65534)),
        "SGI": patched(files["SGI"], b"\1\xda", 6, most),
        "QOI": patched(files["QOI"], b"qoif", 4, wide),
        "DDS": patched(files["DDS"], b"DDS ", 12, struct.pack("<II", 60_000, 60_000)),
        "PSD": struct.pack(">4sH6xHIIHHIII", b"8BPS", 1, 3, 30_000, 30_000, 8, 3, 0, 0, 0)
        + bytes(2),
    }


BOMBS = bombs()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_raster_image_is_refused_by_its_first_bytes(name):
    encoded, reason = REFUSED[name]
    with pytest.raises(BadImage) as found:
        probe(encoded, max_pixels=MAX_PIXELS)
    assert found.value.reason == reason


STEPS = {
    "probe": lambda encoded: probe(encoded, max_pixels=MAX_PIXELS),
    "decode": lambda encoded: decoded(encoded, (8, 12), max_pixels=MAX_PIXELS),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("step", STEPS)
def test_too_many_pixels_are_refused_before_any_is_allocated(name, step):
    images = Image.core.get_stats()["new_count"]
    with traced() as peak, pytest.raises(BadImage) as found:
        STEPS[step](BOMBS[name])
    assert found.value.reason == "too many pixels"
    assert Image.core.get_stats()["new_count"] == images
    assert peak() < 2**20


def text_bombs() -> dict[str, bytes]:
    """PNG files whose texts or profile inflate to megabytes."""
    small, large = (zlib.compress(bytes(size), 9) for size in (2**20 - 1, 2**26))
    plain = encode(PHOTO, "PNG")
    before = plain.index(b"IDAT") - 4
    after = len(plain) - 12

    def with_chunks(place: int, *chunks: bytes) -> bytes:
        return plain[:place] + b"".join(chunks) + plain[place:]

    def text(name: bytes, packed: bytes) -> bytes:
        head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[name]
        return test_headers.chunk(name, head + packed)

    return {
        "one text": with_chunks(before, text(b"zTXt", large)),
        "one international text": with_chunks(before, text(b"iTXt", large)),
        "a profile": with_chunks(before, text(b"iCCP", large)),
        "many texts": with_chunks(before, *[text(b"zTXt", small)] * 80),
        "a text behind the pixels": with_chunks(after, text(b"zTXt", large)),
        "many texts behind the pixels": with_chunks(after, *[text(b"zTXt", small)] * 80),
        "a few texts": with_chunks(before, *[text(b"zTXt", small)] * 3),
    }


TEXT_BOMBS = text_bombs()


def row_or_reject(encoded: bytes) -> np.ndarray | str:
    """The pixels of a file at its own size, or the reason why there are none."""
    try:
        return decoded(encoded, probe(encoded, max_pixels=10**6).image_hw)
    except BadImage as error:
        return error.reason


@pytest.mark.parametrize("name", TEXT_BOMBS)
def test_texts_that_inflate_are_a_row_or_a_reject_and_little_memory(name):
    with traced() as peak:
        found = row_or_reject(TEXT_BOMBS[name])
    if isinstance(found, str):
        assert found in {"unreadable", "undecodable"}
    else:
        assert (found == np.asarray(PHOTO)).all()
    assert peak() < 160 * 2**20
    assert isinstance(found, np.ndarray) or name != "a few texts"


def whole_files() -> dict[str, bytes]:
    """A file in every format, large enough to be cut in many places."""
    large = photo(40, 60)
    files = {name: saved(large, name) for name in KEPT}
    files |= {f"{name}, frames": FILES[f"{name} of 3 frames"].encoded for name in ("GIF", "WEBP")}
    return files | {
        "JPEG, progressive": encode(large, "JPEG", progressive=True),
        "PNG, palette": encode(large.quantize(64), "PNG"),
        "TIFF, LZW": encode(large, "TIFF", compression="tiff_lzw"),
        "TIFF, JPEG": encode(large, "TIFF", compression="jpeg"),
        "TIFF, MM": DEEP["TIFF MM"],
        "PPM, text": b"P2 2 2 255\n1 2\n3 4\n",
        "TGA, run lengths": encode(large, "TGA", compression="tga_rle"),
        "BMP, palette": encode(large.quantize(64), "BMP"),
        "SGI, 16 bits": encode(large, "SGI", bpc=2),
        "JPEG 2000, tiles": encode(large, "JPEG2000", tile_size=(16, 16)),
        "PCX, palette": encode(large.quantize(64), "PCX"),
    }


WHOLE = whole_files()
# The places where a file may be cut, and still give pixels that are not all its own.
BLIND = {
    "JPEG2000": "OpenJPEG takes tiles that are missing for black ones",
    "JPEG 2000, tiles": "OpenJPEG takes tiles that are missing for black ones",
    "PCX, palette": "Pillow takes the indices for greys where the palette is cut",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.xfail(reason=BLIND[name])] if name in BLIND else [])
        for name in WHOLE
    ],
)
def test_a_file_cut_anywhere_is_its_whole_picture_or_a_reject(name):
    encoded = WHOLE[name]
    whole = row_or_reject(encoded)
    assert isinstance(whole, np.ndarray)
    steps = range(0, len(encoded), max(1, len(encoded) // 300))
    tiles = [at + 2 for at in range(len(encoded)) if encoded.startswith(b"\xff\x90", at)]
    rejects = 0
    for end in sorted({*steps, *range(max(0, len(encoded) - 60), len(encoded)), *tiles}):
        found = row_or_reject(encoded[:end])
        if isinstance(found, str):
            assert found in {*REASONS, "damaged scan"}
            rejects += 1
        else:
            assert (found == whole).all(), f"cut at {end} of {len(encoded)}"
    assert rejects >= 10


class Case(NamedTuple):
    """An image of a dataset: its file, and what becomes of it.

    Attributes:
        encoded: the file.
        picture: what its row holds; None where it has none.
        stage, reason: of its reject; either may be None where a row will do as well.
    """

    encoded: bytes
    picture: File | None
    stage: str | None = None
    reason: str | None = None


def every_case() -> dict[str, Case]:
    cases = {name: Case(file.encoded, file) for name, file in FILES.items()}
    for name, file in WITHOUT_RULE.items():
        cases[name] = Case(file.encoded, None, "decode", "unsupported mode")
    for name, (encoded, reason) in REFUSED.items():
        cases[name] = Case(encoded, None, "probe", reason)
    for name, encoded in BOMBS.items():
        cases[f"bomb {name}"] = Case(encoded, None, "probe", "too many pixels")
    picture = File(b"", np.asarray(PHOTO, float))
    for name, encoded in TEXT_BOMBS.items():
        cases[f"text bomb {name}"] = Case(encoded, picture)
    small = {name: saved(PHOTO, name) for name in KEPT if name not in BLIND}
    for compression in ("tiff_lzw", "jpeg"):  # which libtiff complains about aloud
        small[f"TIFF, {compression}"] = encode(PHOTO, "TIFF", compression=compression)
    for name, encoded in small.items():
        picture = File(b"", as_pillow_reads(encoded))
        for tenth in range(1, 10):
            cut = encoded[: len(encoded) * tenth // 10]
            cases[f"{name}, {tenth} tenths"] = Case(cut, picture)
    return cases


EVERY = every_case()


def dataset_of(cases: dict[str, Case], folder: Path) -> Dataset:
    """The cases, every second one by the path of a file that is called a JPEG."""
    images = []
    for number, case in enumerate(cases.values()):
        path = folder / f"{number}.jpg"
        if number % 2:
            path.write_bytes(case.encoded)
        by_path = {"bytes": None, "path": str(path)}
        images.append(by_path if number % 2 else {"bytes": case.encoded, "path": "x.jpg"})
    features = Features({"image": ImageFeature(), "n": Value("int32")})
    columns = {"image": images, "n": list(range(len(images)))}
    return Dataset.from_dict(columns, features=features)


def pictures_of(packed: Dataset, patch_size: int) -> dict[int, np.ndarray]:
    """The pixels of every image in some packed rows, put together patch by patch."""
    found = {}
    for row in packed:
        tokens = np.array(row["patches"], np.uint8).reshape(-1, patch_size, patch_size, 3)
        coords = np.array(row["coords"]).reshape(-1, 2)
        for segment, example in enumerate(row["example_index"], 1):
            height, width = row["grid_hw"][segment - 1]
            picture = np.zeros((height, patch_size, width, patch_size, 3), np.uint8)
            for token in np.flatnonzero(np.array(row["segment_ids"]) == segment):
                y, x = coords[token]
                picture[y, :, x] = tokens[token]
            found[example] = picture.reshape(height * patch_size, width * patch_size, 3)
    return found


ONE_PIXEL = {"seq_len": 1024, "patch_size": 1, "background": BACKGROUND, "progress": False}
LENIENT = {"max_bad_fraction": 1.0, "max_consecutive_bad": 10**6}


@pytest.fixture(scope="module", params=[1, 2])
def packed(request, tmp_path_factory) -> Dataset:
    """Rows of every case, by as many processes."""
    folder = tmp_path_factory.mktemp("kinds")
    source = dataset_of(EVERY, folder)
    return packpipe.pack(
        source, output=folder / "out", num_workers=request.param, **ONE_PIXEL, **LENIENT
    )


def test_in_a_dataset_of_every_kind_each_is_its_row_or_a_listed_reject(packed):
    found = pictures_of(packed, 1)
    rejects = {reject["example_index"]: reject for reject in packpipe.rejects(packed)}
    assert sorted([*found, *rejects]) == list(range(len(EVERY)))
    for number, (name, case) in enumerate(EVERY.items()):
        if number in found:
            assert case.reason is None, name
            assert is_the_picture(found[number], case.picture), name
        else:
            stage, reason = rejects[number]["stage"], rejects[number]["reason"]
            assert stage == (case.stage or stage), name
            assert reason == (case.reason or reason), name
            assert reason in REASONS
            assert name not in FILES
    assert len(found) >= len(FILES)
    assert len(rejects) > 150


def test_what_was_done_is_counted(packed):
    counts = packpipe.manifest(packed)["counts"]
    reasons = Counter(reject["reason"] for reject in packpipe.rejects(packed))
    assert counts["rejected_by_reason"] == dict(sorted(reasons.items()))
    assert reasons["too many pixels"] == len(BOMBS)
    assert reasons["unsupported mode"] == len(WITHOUT_RULE)
    assert reasons.keys() == REASONS
    assert counts["broken_exif"] == len(BROKEN_EXIF_IN)
    assert counts["shrunk"] == 0
    assert counts["read"] == len(EVERY) == counts["packed"] + counts["rejected"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_packing_every_kind_prints_nothing_and_warns_of_nothing(tmp_path, capfd, num_workers):
    source = dataset_of(EVERY, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packpipe.pack(
            source, output=tmp_path / "out", num_workers=num_workers, **ONE_PIXEL, **LENIENT
        )
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_strips_of_60_000_pixels_are_rows_of_one_patch_a_side(tmp_path, format):  # noqa: A002
    waves = 128 + 100 * np.sin(np.arange(60_000) / 3000)
    wide = np.tile(np.stack([waves, waves + 10, waves - 10], axis=-1), (8, 1, 1)).astype(np.uint8)
    strips = [wide, wide.swapaxes(0, 1)]
    cases = {
        str(number): Case(saved(Image.fromarray(strip), format), None)
        for number, strip in enumerate(strips)
    }
    packed = packpipe.pack(
        dataset_of(cases, tmp_path), output=tmp_path / "out", num_workers=2, progress=False
    )
    found = pictures_of(packed, 16)
    assert [found[number].shape[number] for number in range(2)] == [16, 16]
    for number, strip in enumerate(strips):
        height, width, _ = found[number].shape
        assert height * width // 256 > 900
        wanted = np.asarray(Image.fromarray(strip).resize((width, height), Image.BICUBIC))
        assert np.abs(found[number] - wanted.astype(int)).max() <= 3
    assert packpipe.manifest(packed)["counts"]["shrunk"] == 2


sizes_hw = st.tuples(st.integers(1, 60), st.integers(1, 60))


def soft(height: int, width: int) -> Image.Image:
    """Noise far enough from black and white that no filter overshoots them."""
    return photo(height, width).point(lambda value: 100 + value * 55 // 255)


@given(
    orientation=st.integers(1, 8),
    image_hw=sizes_hw,
    target_hw=sizes_hw,
    gap=st.sampled_from([None, 1.0, 2.0]),
    filters=st.tuples(st.sampled_from(FILTERS), st.sampled_from(FILTERS)),
)
def test_it_is_turned_before_it_is_resized(orientation, image_hw, target_hw, gap, filters):
    image = photo(*image_hw)
    upright = naive.upright(np.asarray(image), orientation)
    rules = {
        "reducing_gap": gap,
        "downscale_filter": filters[0],
        "upscale_filter": filters[1],
    }
    wanted = decoded(encode(Image.fromarray(upright), "PNG"), upright.shape[:2], target_hw, **rules)
    found = decoded(turned("PNG", orientation, image), upright.shape[:2], target_hw, **rules)
    assert (found == wanted).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", TURNED)
def test_a_turned_file_is_its_full_decode_turned_and_resized(format, orientation):  # noqa: A002
    image = soft(37, 52)
    encoded = turned(format, orientation, image)
    upright = naive.upright(as_pillow_reads(saved(image, format)), orientation).astype(np.uint8)
    for target_hw in ((16, 32), (64, 48), (5, 90)):
        wanted = Image.fromarray(upright).resize(target_hw[::-1], Image.BICUBIC)
        assert (decoded(encoded, upright.shape[:2], target_hw) == np.asarray(wanted)).all()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_scaled_decode_that_is_turned_is_the_stored_one_turned(orientation):
    """Where 1/8 of a side is no whole number, what is left of a pixel stays at its edge."""
    image = soft(203, 317)
    upright_hw = (203, 317) if orientation < 5 else (317, 203)
    for target_hw in ((16, 24), (48, 64)):
        upright_target_hw = target_hw if orientation < 5 else target_hw[::-1]
        stored = decoded(saved(image, "JPEG"), (203, 317), target_hw, reducing_gap=1.0)
        found = decoded(
            turned("JPEG", orientation, image), upright_hw, upright_target_hw, reducing_gap=1.0
        )
        assert np.abs(found - naive.upright(stored, orientation).astype(int)).max() <= 2


def resampled(pixels: np.ndarray, target_hw: tuple[int, int], down: str, across: str) -> np.ndarray:
    """float[height, width, 3]: each axis by its filter, without rounding in between."""
    height, width = target_hw

    def filter_of(name: str) -> Image.Resampling:
        return Image.Resampling[name.upper()]

    bands = [Image.fromarray(pixels[..., band].astype(np.float32)) for band in range(3)]
    bands = [band.resize((width, band.height), filter_of(across)) for band in bands]
    return np.stack([np.asarray(b.resize((width, height), filter_of(down))) for b in bands], -1)


SOFT = np.asarray(soft(24, 40))
SOFT_FILE = encode(Image.fromarray(SOFT), "PNG")


@pytest.mark.parametrize("downscale", FILTERS)
@pytest.mark.parametrize("upscale", FILTERS)
def test_the_axis_that_shrinks_and_the_one_that_grows_have_filters_of_their_own(downscale, upscale):
    filters = {"downscale_filter": downscale, "upscale_filter": upscale}
    for target_hw, down, across in [
        ((11, 93), downscale, upscale),
        ((57, 15), upscale, downscale),
        ((11, 15), downscale, downscale),
        ((57, 93), upscale, upscale),
    ]:
        found = decoded(SOFT_FILE, (24, 40), target_hw, **filters)
        assert np.abs(found - resampled(SOFT, target_hw, down, across)).max() <= 1.3


def test_filters_differ_so_that_a_wrong_one_would_be_noticed():
    for one, other in product(FILTERS, FILTERS):
        if one != other:
            for target_hw in ((11, 93), (57, 15)):
                differ = resampled(SOFT, target_hw, one, other) - resampled(
                    SOFT, target_hw, other, one
                )
                assert np.abs(differ).max() > 2.6, (one, other)


BUNDLED = {path.name: path.read_bytes() for path in sorted(images_folder().rglob("*.*g"))}
REAL = {
    "photos": {name: file for name, file in BUNDLED.items() if name.endswith(".jpg")},
    "drawings": {
        name: file for name, file in BUNDLED.items() if name.endswith(".png") and len(file) < 12_000
    },
}
SCALES = (0.9, 0.5, 0.3, 0.26, 0.13, 0.1)
# Levels of 255 by which a scaled decode may be off: in the mean of an image, and anywhere in it.
BOUNDS = {
    "photos": {1.0: (2, 72), 1.5: (1, 30), 2.0: (0.6, 12), 3.0: (0.4, 9)},
    "drawings": {1.0: (26, 80), 1.5: (8, 40), 2.0: (5, 32), 3.0: (3, 24)},
}


def at_scales(kind: str) -> Iterator[tuple[bytes, tuple[int, int], tuple[int, int]]]:
    for encoded, scale in product(REAL[kind].values(), SCALES):
        height, width = image_hw = probe(encoded, max_pixels=MAX_PIXELS).image_hw
        if height * width < 10**6:
            yield encoded, image_hw, (max(1, round(height * scale)), max(1, round(width * scale)))


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_scaled_decode_is_close_to_a_full_one_and_closer_with_a_wider_gap(kind):
    means: dict[float, list[float]] = {gap: [] for gap in BOUNDS[kind]}
    for encoded, image_hw, target_hw in at_scales(kind):
        full = decoded(encoded, image_hw, target_hw).astype(int)
        for gap, (mean, most) in BOUNDS[kind].items():
            off = np.abs(decoded(encoded, image_hw, target_hw, reducing_gap=gap) - full)
            assert off.mean() <= mean
            assert off.max() <= most
            means[gap].append(float(off.mean()))
    assert len(means[1.0]) > 90
    totals = [sum(means[gap]) for gap in sorted(means)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] > 0


@pytest.mark.parametrize("kind", BOUNDS)
def test_without_a_gap_it_is_a_full_decode_and_one_resize(kind):
    for encoded, image_hw, target_hw in at_scales(kind):
        full = as_laid_out(encoded)
        assert full.size == image_hw[::-1]
        wanted = full.resize(target_hw[::-1], Image.BICUBIC)
        assert (decoded(encoded, image_hw, target_hw) == np.asarray(wanted)).all()


def as_laid_out(encoded: bytes) -> Image.Image:
    image = Image.open(BytesIO(encoded)).convert("RGBA")
    below = Image.new("RGBA", image.size, (*BACKGROUND, 255))
    return Image.alpha_composite(below, image).convert("RGB")


@given(image_hw=sizes_hw, target_hw=sizes_hw, gap=st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_an_image_less_than_twice_the_gap_as_large_is_not_reduced(image_hw, target_hw, gap):
    encoded = encode(photo(*image_hw), "PNG")
    near = all(side < 2 * gap * asked for side, asked in zip(image_hw, target_hw, strict=True))
    found = decoded(encoded, image_hw, target_hw, reducing_gap=gap)
    assert not near or (found == decoded(encoded, image_hw, target_hw)).all()
