"""Class maps: which pixel a cell takes, and what is no class map."""

import re
import struct
from io import BytesIO
from zlib import compress, crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from packpipe.images.bad_images import BadImage
from packpipe.images.masks import (
    TargetRules,
    cells_of,
    checked_rules,
    decode_mask,
    sampled,
    write_targets,
)

RULES = TargetRules(1)


def encoded(values, image_format="PNG", mode=None, **save):
    image = Image.fromarray(values)
    if mode == "P":
        image = Image.frombytes("P", image.size, values.tobytes())
        image.putpalette([255 - n // 3 for n in range(768)])
    elif mode:
        image = image.convert(mode)
    buffer = BytesIO()
    image.save(buffer, image_format, **save)
    return buffer.getvalue()


def decoded(data, image_hw, target_hw=None, rules=RULES, **options):
    target_hw = target_hw or image_hw
    options = {"max_pixels": 10**6, **options}
    return decode_mask(data, image_hw=image_hw, target_hw=target_hw, rules=rules, **options)


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 50), st.integers(1, 50)),
)
def test_a_cell_takes_the_pixel_at_its_centre(target_hw, box):
    rows, columns = sampled(target_hw, box)
    assert rows.shape == (target_hw[0], 1)
    assert columns.shape == (1, target_hw[1])
    for count, start, size, found in zip(target_hw, box, box[2:], (rows, columns), strict=False):
        for place, index in enumerate(found.ravel().tolist()):
            # The pixel that holds the centre, or begins at it.
            centre = (2 * place + 1) * size  # in halves of a cell
            assert start <= index < start + size
            assert (index - start) * 2 * count <= centre < (index - start + 1) * 2 * count
        if count == size:
            assert found.ravel().tolist() == list(range(start, start + size))


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_cells_come_back_from_tokens_at_their_places(rows, columns, side, seed):
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 2**16 - 1, (rows * side, columns * side)).astype(np.uint16)
    kept = np.sort(rng.permutation(rows * columns)[: rng.integers(1, rows * columns + 1)])
    out = np.empty((len(kept), side**2), np.uint16)
    write_targets(cells, out, (rows, columns), kept.astype(np.int32))
    coords = np.stack([kept // columns, kept % columns], 1)
    found = cells_of(out, coords, (rows, columns), ignore=65535)
    for y in range(rows * side):
        for x in range(columns * side):
            is_kept = (y // side) * columns + x // side in kept
            assert found[y, x] == (cells[y, x] if is_kept else 65535)
    whole = np.empty((rows * columns, side**2), np.uint16)
    write_targets(cells, whole, (rows, columns))
    assert np.array_equal(whole[kept], out)


def bits_of(values, bits):
    """Rows of levels of a few bits each, padded to whole bytes."""
    per_byte = 8 // bits
    wide = np.pad(values, [(0, 0), (0, -values.shape[1] % per_byte)]).astype(np.uint8)
    places = 8 - bits * (1 + np.arange(per_byte))
    return (wide.reshape(len(values), -1, per_byte) << places).sum(-1).astype(np.uint8)


def png_of(values, bits):
    """A gray PNG of 1, 2 or 4 bits, which Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in bits_of(values, bits))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def tiff_of(values, bits, zero_is_black=1):
    height, width = values.shape
    data = bits_of(values, bits).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: zero_is_black, 273: 8, 277: 1}
    tags |= {278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


CLASSES = np.arange(30, dtype=np.uint8).reshape(5, 6) % 21
FORMS = {
    "gray": encoded(CLASSES),
    "palette": encoded(CLASSES, mode="P"),
    "16 bits": encoded(CLASSES.astype(np.uint16)),
    "array": CLASSES,
    "array of uint16": CLASSES.astype(np.uint16),
    "gif": encoded(CLASSES, "GIF"),
    "pgm": encoded(CLASSES, "PPM"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_level_is_a_class_in_every_form(form, dtype):
    found = decoded(FORMS[form], (5, 6), rules=TargetRules(1, dtype))
    assert found.dtype == dtype
    assert np.array_equal(found, CLASSES)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("form", [png_of, tiff_of])
def test_a_level_of_few_bits_is_a_class(form, bits):
    values = CLASSES % 2**bits
    assert values.max() == 2**bits - 1
    assert np.array_equal(decoded(form(values, bits), (5, 6)), values)


def test_black_and_white_are_two_classes():
    values = CLASSES > 7
    for form in (encoded(values), values):
        assert np.array_equal(decoded(form, (5, 6)), values.astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_upright_by_its_own_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]}
    turned |= {5: lambda a: a.T, 6: lambda a: np.rot90(a, 3), 7: lambda a: a[::-1, ::-1].T}
    turned |= {8: np.rot90}
    wanted = turned.get(orientation, lambda a: a)(CLASSES)
    found = decoded(encoded(CLASSES, exif=exif.tobytes()), wanted.shape)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (encoded(CLASSES[:, :5]), "mask size", "the mask is 5x5, expected 5x6 as its image"),
        (
            encoded(np.zeros((5, 6, 3), np.uint8)),
            "mask colours",
            "mask: PNG of mode RGB, expected PNG of one channel, or a palette",
        ),
        (
            encoded(CLASSES, "JPEG"),
            "mask colours",
            "mask: JPEG of mode L, expected PNG of one channel, or a palette",
        ),
        (
            np.zeros((5, 6, 1), np.uint8),
            "mask colours",
            "mask: an array [5, 6, 1], expected [height, width]",
        ),
        (
            encoded(CLASSES.astype(np.uint16) + 250),
            "mask class",
            "the mask has class 256, expected 0..255; cast_column the masks to Image(mode='I;16')",
        ),
        (
            tiff_of(CLASSES % 4, 2, zero_is_black=0),
            "mask levels",
            "mask: TIFF in which 0 is white, expected 0 as black",
        ),
        (
            tiff_of(CLASSES, 8, zero_is_black=0),
            "mask levels",
            "mask: TIFF in which 0 is white, expected 0 as black",
        ),
        (
            b"P5 6 5 20\n" + CLASSES.tobytes(),
            "mask levels",
            "mask: PPM of levels up to 20, expected a largest level of 255 or 65535",
        ),
        (
            encoded(CLASSES, "JPEG2000"),
            "mask colours",
            "mask: JPEG2000 of mode L, expected PNG of one channel, or a palette",
        ),
        (encoded(CLASSES)[:60], "mask undecodable", "mask: "),
        (b"no image", "mask unreadable", "mask: "),
        (b"", "mask empty", "mask: "),
    ],
)
def test_what_is_no_class_map_says_why(data, reason, message):
    with pytest.raises(BadImage, match=re.escape(message)) as caught:
        decoded(data, (5, 6))
    assert caught.value.reason == reason


def test_a_stride_divides_the_patch():
    assert checked_rules(None, 16, "uint8") == TargetRules(16)
    assert checked_rules(4, 16, "uint16").cells(16) == 16
    assert [TargetRules(4, dtype).ignore for dtype in ("uint8", "uint16")] == [255, 65535]
    message = r"^target_stride is 3, expected a divisor of 16 \(patch_size\); 1 gives a target"
    with pytest.raises(ValueError, match=message):
        checked_rules(3, 16, "uint8")
    with pytest.raises(
        ValueError, match=r"^target_stride is 17, expected an integer in 1..16; 1 gi"
    ):
        checked_rules(17, 16, "uint8")
