"""What one file may cost: sides, pixels, and the work of its header."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from importlib.util import find_spec
from io import BytesIO

import loading
import numpy as np
import pytest
import starving
from fuzz_seeds import box, heic_floods
from PIL import Image
from strategies import encode
from test_decode import decoded, png
from test_kinds import traced

from packpipe.images.bad_images import BadImage, message_of
from packpipe.images.decode import probe
from packpipe.images.headers import HEAD_BYTES
from packpipe.images.opening import LONGEST_SIDE
from packpipe.images.regular_files import MOST_EXIF, MOST_READS, Counted
from packpipe.planning.image_config import PackConfig
from packpipe.planning.image_options import MAX_PIXELS, MOST_PIXELS

POISON = 89_478_479  # times 24 bits: the first that is no row for Pillow, whatever memory there is


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
@pytest.mark.parametrize(("width", "height"), [(POISON, 1), (1, POISON), (LONGEST_SIDE + 1, 1)])
def test_a_side_that_no_decoder_allocates_is_a_reject(colour, depth, width, height):
    file = png(width, height, depth, colour)
    assert len(file) < 100
    message = f"{height}x{width} pixels, expected at most {LONGEST_SIDE} a side"
    for step in (
        lambda: probe(file, max_pixels=MAX_PIXELS),
        lambda: decoded(file, (height, width), (8, 8), max_pixels=MAX_PIXELS),
    ):
        with pytest.raises(BadImage, match=f"^{re.escape(message)}$") as found:
            step()
        assert found.value.reason == "too many pixels"


@pytest.mark.parametrize("colour", [0, 6])
def test_the_longest_side_is_no_error_of_the_machine(colour):
    file = png(LONGEST_SIDE, 1, 16, colour)
    assert probe(file, max_pixels=MAX_PIXELS).image_hw == (1, LONGEST_SIDE)
    with pytest.raises(BadImage) as found:  # there are no pixels in it
        decoded(file, (1, LONGEST_SIDE), (8, 8), max_pixels=MAX_PIXELS)
    assert found.value.reason == "undecodable"


MANY = 2**20


def tiff_of(entries, size):
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return (head + b"".join(struct.pack("<HHII", *one) for one in entries)).ljust(size, b"\0")


def costly():
    """Headers that make Pillow work for as long as they are, with the reason of their reject."""
    shape = [(256, 4, 1, 64), (257, 4, 1, MANY // 64)]
    strips = [*shape, (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, MANY, 200)]
    depths = [*shape, (258, 3, MANY, 200), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200)]
    plain, empty = encode(Image.new("RGB", (4, 4)), "PNG"), struct.pack(">I4s", 0, b"teST")
    empty += struct.pack(">I", zlib.crc32(b"teST"))
    gif = b"GIF89a\4\0\4\0\0\0\0!\xfe" + (b"\xff" + b"c" * 255) * 40_000 + b"\0;"
    psd = struct.pack(">4sH6xHIIHHII", b"8BPS", 1, 3, 4, 4, 8, 3, 0, 12 * MANY)
    values = f"{MANY}, expected at most {2**18} strips, tiles or other values in an entry"
    reads = f"its header takes more than {MOST_READS} reads"
    return {
        "TIFF, strips": (tiff_of(strips, 4 * MANY + 200), values),
        "TIFF, bits of a sample": (tiff_of(depths, 2 * MANY + 200), values),
        "BigTIFF, entries": (
            struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 2**40)
            + struct.pack("<HHQQ", 256, 4, 1, 64) * MANY,
            reads,
        ),
        "PPM, comment": (b"P6 #" + b"a" * MANY + b"\n4 4 255\n" + bytes(48), reads),
        "JPEG, EXIF": (
            b"\xff\xd8" + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 65,
            f"its EXIF has more than {MOST_EXIF} bytes",
        ),
        "JPEG, filling": (b"\xff\xd8\xff" + b"\xff" * MANY, reads),
        "PNG, chunks": (plain[:33] + empty * MANY + plain[33:], reads),
        "GIF, comment": (gif, reads),
        "PSD, resources": (psd + (b"8BIM" + struct.pack(">HHI", 1, 0, 0)) * MANY, reads),
    }


def flooded():
    said = {
        "places beyond their box": "whose places of items are cut short",
        "many places": "of more than one box 'iloc'",
        "many parts": "whose items have more than 8192 parts",
        "many items": "of 65535 items, expected at most 8192",
        "many descriptions": "of more than one box 'meta'",
        "many boxes": "of more than 64 boxes",
    }
    return {
        name: (file, f"a HEIC file {said[name.removeprefix('HEIC ')]}")
        for name, file in heic_floods().items()
    }


def boxed():
    """Descriptions that name an image 65,536 times, or are of as many boxes."""
    most, none = 2**14, box(b"free")
    start = struct.pack(">I4s4sI4s", 20, b"ftyp", b"avif", 0, b"mif1")
    many = struct.pack(">IIHH", 0, 6 + 2**17, 1, 2**16 - 1) + bytes(2**17)
    entries, places, shares = (bytes(2**16 * size) for size in (16, 6, 3))
    signature = struct.pack(">I4sI", 12, b"jP  ", 0x0D0A870A)
    items = "an AVIF file with room for {} items in {!r}, expected at most 8192"
    boxes = f"of more than {most} boxes"
    meta = {
        "references": (box(b"iref", many), items.format(len(many) // 2, "iref")),
        "entries": (box(b"iinf", entries), items.format(2**16, "iinf")),
        "places": (box(b"iloc", places), items.format(2**16, "iloc")),
        "shares of properties": (
            box(b"iprp", box(b"ipma", shares)),
            items.format(2**16, "ipma"),
        ),
        "properties": (box(b"iprp", box(b"ipco", none * 2**15)), f"an AVIF file {boxes}"),
    }
    found = {
        f"AVIF, {name}": (start + box(b"meta", bytes(4), content), message)
        for name, (content, message) in meta.items()
    }
    found["AVIF, references in a film"] = (
        start + box(b"moov", box(b"trak", box(b"meta", bytes(4), meta["references"][0]))),
        meta["references"][1],
    )
    jp2 = signature + box(b"ftyp", b"jp2 ", bytes(4), b"jp2 ") + box(b"jp2h", none * 2**15)
    return found | {"JPEG 2000, boxes": (jp2, f"a JPEG 2000 file {boxes}")}


COSTLY = costly() | boxed() | (flooded() if find_spec("pillow_heif") else {})


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize("name", COSTLY)
def test_a_header_costs_so_much_and_no_more(name, by_path, tmp_path, monkeypatch):
    file, message = COSTLY[name]
    if by_path:
        (tmp_path / "file").write_bytes(file)
        file = str(tmp_path / "file")
    reads, read = [0], Counted.read

    def counted(self, size=-1, /):
        reads[0] += 1
        return read(self, size)

    monkeypatch.setattr(Counted, "read", counted)
    with traced() as peak, pytest.raises(BadImage, match=f"^{re.escape(message)}$") as found:
        probe(file, max_pixels=MAX_PIXELS)
    assert found.value.reason == "unreadable"
    assert reads[0] <= MOST_READS + 2
    assert peak() < 40 * 2**20


def grid(side):
    """An AVIF photograph of side x side tiles of 64 x 64 pixels, which all have the same bytes."""
    tile, tiles = encode(Image.new("RGB", (64, 64), "red"), "AVIF"), range(2, 2 + side * side)
    properties, coded = (tile[tile.index(name) + 4 :] for name in (b"ipco", b"mdat"))
    properties = properties[: struct.unpack(">I", tile[tile.index(b"ipco") - 4 :][:4])[0] - 8]
    kinds, rest = [], properties
    while rest:
        kinds.append(rest[4:8])
        rest = rest[struct.unpack(">I", rest[:4])[0] :]
    shares = [number | (name == b"av1C") << 7 for number, name in enumerate(kinds, 1)]
    size = struct.pack(">III", 0, 64 * side, 64 * side)
    how = struct.pack(">BBBBHH", 0, 0, side - 1, side - 1, 64 * side, 64 * side)
    ids = struct.pack(f">{len(tiles)}H", *tiles)

    def described(at):
        places = [(1, at, len(how)), *((tile, at + len(how), len(coded)) for tile in tiles)]
        iloc = b"".join(struct.pack(">HHHII", item, 0, 1, *place) for item, *place in places)
        entries = [(1, b"grid"), *((tile, b"av01") for tile in tiles)]
        infe = [
            box(b"infe", struct.pack(">IHH4sB", 2 << 24, item, 0, name, 0))
            for item, name in entries
        ]
        ipma = [struct.pack(">HBB", 1, 1, len(kinds) + 1)]
        ipma += [struct.pack(">HB", tile, len(shares)) + bytes(shares) for tile in tiles]
        return box(
            b"meta",
            bytes(4),
            box(b"hdlr", struct.pack(">II4s", 0, 0, b"pict"), bytes(13)),
            box(b"pitm", struct.pack(">IH", 0, 1)),
            box(b"iloc", struct.pack(">IHH", 0, 0x4400, len(places)), iloc),
            box(b"iinf", struct.pack(">IH", 0, len(entries)), *infe),
            box(b"iref", bytes(4), box(b"dimg", struct.pack(">HH", 1, len(tiles)), ids)),
            box(
                b"iprp",
                box(b"ipco", properties, box(b"ispe", size)),
                box(b"ipma", struct.pack(">II", 0, len(ipma)), *ipma),
            ),
        )

    start = box(b"ftyp", b"avif", bytes(4), b"mif1", b"avif")
    at = len(start) + len(described(0)) + 8
    return start + described(at) + box(b"mdat", how, coded)


def test_a_photograph_of_2500_tiles_is_no_costly_header():
    assert (decoded(grid(2), (128, 128))[::9, ::9] == decoded(grid(1), (64, 64))[0, 0]).all()
    assert probe(grid(50), max_pixels=MAX_PIXELS).image_hw == (50 * 64, 50 * 64)


def test_a_film_of_many_boxes_is_no_image():
    film = box(b"ftyp", b"isom", bytes(4), b"isom") + (box(b"moof") + box(b"mdat")) * 9000
    with pytest.raises(BadImage, match=r"^no known image format$") as found:
        probe(film, max_pixels=MAX_PIXELS)
    assert found.value.reason == "unreadable"


def test_pixels_may_take_any_number_of_reads():
    image = Image.fromarray(
        np.arange(300 * 300, dtype=np.uint32).astype(np.uint8).reshape(300, 300)
    )
    palette = b"".join(bytes([grey, grey, 255 - grey, 0]) for grey in range(256))
    rows = np.flipud(np.asarray(image))
    pairs = b"".join(
        b"".join(bytes([1, pixel]) for pixel in row) + b"\0\0" for row in rows.tolist()
    )
    head = struct.pack("<IiiHHIIiiII", 40, 300, 300, 1, 8, 1, len(pairs), 0, 0, 256, 0)
    start = struct.pack("<IIII", 0, 0, 14 + 40 + 1024, 40)[:12]
    file = b"BM" + start + head + palette + pairs
    assert 2 * image.width * image.height > MOST_READS
    found = decoded(file, (300, 300))
    assert (found[..., 2] == np.asarray(image)).all()
    assert (found[..., 0] == 255 - np.asarray(image)).all()


def test_a_small_file_may_take_any_number_of_reads_of_its_bytes_and_by_its_path(tmp_path):
    jpeg = encode(Image.new("RGB", (16, 8), (9, 8, 7)), "JPEG")
    file = jpeg[:2] + b"\xff" * 40_000 + jpeg[2:]
    assert MOST_READS < len(file) <= HEAD_BYTES
    (tmp_path / "file").write_bytes(file)
    for data in (file, str(tmp_path / "file")):
        assert probe(data, max_pixels=MAX_PIXELS).image_hw == (8, 16)
        assert (decoded(data, (8, 16)) == decoded(jpeg, (8, 16))).all()


HIGH, WIDE = 12_800, 16_000  # 205 million pixels


def large_jpeg():
    """A grey JPEG of one level: its first unit gives it, the others say that nothing changes."""
    small = encode(Image.new("L", (8, 8), 200), "JPEG")
    frame, start = small.index(b"\xff\xc0") + 5, small.index(b"\xff\xda") + 2 + 8
    first = "".join(f"{byte:08b}" for byte in small[start:-2])
    first = first[: first.index("1010", 8) + 4]
    bits = first + "001010" * (HIGH * WIDE // 64 - 1)
    bits += "1" * (-len(bits) % 8)
    head = small[:frame] + struct.pack(">HH", HIGH, WIDE) + small[frame + 4 : start]
    return head + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9"


def test_a_jpeg_of_more_pixels_than_pillow_opens_is_a_row_where_that_is_asked_for():
    file = large_jpeg()
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match=f"^{HIGH}x{WIDE} pixels, expected at most {MAX_PIXELS}$"):
        probe(file, max_pixels=MAX_PIXELS)
    most = PackConfig(max_pixels=10**9).max_pixels
    assert probe(file, max_pixels=most).image_hw == (HIGH, WIDE)
    found = decoded(file, (HIGH, WIDE), (16, 20), max_pixels=most, reducing_gap=1.0)
    assert np.abs(found.astype(int) - 200).max() <= 1
    assert before == Image.MAX_IMAGE_PIXELS
    assert PackConfig(max_pixels=MOST_PIXELS).max_pixels == 65535**2


def test_a_tiff_of_more_pixels_than_pillow_loads_is_a_reject_that_says_so():
    entries = [(256, 4, 1, 20_000), (257, 4, 1, 10_000), (258, 3, 1, 8), (259, 3, 1, 1)]
    file = tiff_of([*entries, (262, 3, 1, 1), (273, 4, 1, 200), (278, 4, 1, 10_000)], 300)
    assert probe(file, max_pixels=10**9).image_hw == (10_000, 20_000)
    with pytest.raises(BadImage, match=r"^Image size \(200000000 pixels\) exceeds limit") as found:
        decoded(file, (10_000, 20_000), (8, 16), max_pixels=10**9)
    assert found.value.reason == "too many pixels"


def test_a_png_of_indices_without_a_palette_says_so():
    file = png(2, 2, 8, 3, b"\0\0\0" * 2)
    message = "a PNG of palette indices without a palette has no rule to become RGB"
    with pytest.raises(BadImage, match=f"^{message}$"):
        decoded(file, (2, 2))


def test_no_reject_is_without_a_text():
    assert message_of(AssertionError(), b"") == "its decoder does not say why"
    assert message_of(ValueError("why"), b"") == "why"
    assert Image.open(BytesIO(png(1, 1, 8, 0, b"\0\0"))).size == (1, 1)


GIANT = ["too much memory", "MemoryError: more than this process can allocate"]


def starved_of(*arguments):
    found = subprocess.run(
        [sys.executable, starving.__file__, *arguments],
        env=loading.environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(found.stdout)


@pytest.mark.skipif(not os.access("/proc/self/statm", os.R_OK), reason="no limit can be set")
def test_an_image_that_alone_takes_more_memory_than_there_is_is_a_reject():
    starved, here, there = starved_of()
    empty = [
        "undecodable",
        "OSError: image file is truncated (0 bytes not processed)",
    ]  # it was allocated
    assert here == [GIANT, None, GIANT, None, empty]
    assert there == [[GIANT, None, None]]
    # An ordinary image does not fit either: the next file would meet the same.
    assert starved == "MemoryError"


@pytest.mark.skipif(not os.access("/proc/self/statm", os.R_OK), reason="no limit can be set")
def test_a_jpeg_xl_that_takes_more_memory_than_there_is_does_not_end_the_process():
    pytest.importorskip("pillow_jxl")
    assert starved_of("jpeg-xl") == [None, GIANT, None]
