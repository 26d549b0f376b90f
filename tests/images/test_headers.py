from __future__ import annotations

import errno
import struct
import warnings
import zlib
from io import FileIO
from pathlib import Path

import naive
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin
from strategies import encode, random_image

import packpipe
from packpipe.images import regular_files
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import Probe, decode, probe
from packpipe.images.headers import (
    HEAD_BYTES,
    JPEG,
    exif_orientation,
    jpeg_head,
    quick_probe,
    upright_hw,
)
from packpipe.images.opening import opened
from packpipe.images.orientation import orientation_of
from packpipe.images.rules import PixelRules
from packpipe.images.scans import scans_of

MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # Pillow refuses more
BUNDLED = sorted(
    path
    for path in (Path(packpipe.__file__).parent / "data" / "images").rglob("*")
    if path.suffix in (".jpg", ".png")
)


def by_pillow(encoded):
    """What Pillow alone says of an image: its Probe, or the reason and message of its reject."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with opened(encoded, MOST_PIXELS) as image:
                orientation, broken_exif = orientation_of(image)
                return Probe(upright_hw(*image.size, orientation), broken_exif)
        except BadImage as error:
            return error.reason, str(error)


def agrees(encoded):
    """Check the law: silence, or what Pillow says. True where there is an answer."""
    found = quick_probe(encoded, len(encoded))
    if found is not None:
        assert by_pillow(encoded) == Probe(found, False)
    if found is not None and encoded[:3] == JPEG:
        with opened(encoded, MOST_PIXELS) as image:
            profiles = (image.info["icc_profile"],) if "icc_profile" in image.info else ()
            said = image.size, len(image.getbands()), orientation_of(image)[0], profiles
        head = jpeg_head(encoded)
        assert head[:4] == said
        assert scans_of(encoded, head) == scans_of(encoded)
    return found is not None


def exif_block(*entries, order="<", prefix=b"Exif\0\0"):
    """An EXIF block of (tag, type, count, four bytes of value)."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return prefix + head + body + b"\0\0\0\0"


def oriented(value, order="<"):
    return exif_block((0x0112, 3, 1, struct.pack(order + "HH", value, 0)), order=order)


def segment(marker, data):
    return struct.pack(">HH", marker, len(data) + 2) + data


def frame(height=30, width=20, bits=8, layers=3):
    return segment(
        0xFFC0, struct.pack(">BHHB", bits, height, width, layers) + b"\1\x11\0" * min(layers, 9)
    )


JFIF = segment(0xFFE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
TABLE = segment(0xFFDB, b"\0" + bytes(64))
SCAN = segment(0xFFDA, b"\1\1\0\0\x3f\0")


def jpeg(*segments):
    """A JPEG file's header of the segments given, without pixels."""
    return b"".join([b"\xff\xd8", *segments, SCAN, b"\0\xff\xd9"])


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(*chunks, width=20, height=30, depth=8, colour=2, methods=b"\0\0\0"):
    """A PNG file's header with the chunks given between its first one and its pixels."""
    shape = struct.pack(">IIBB", width, height, depth, colour) + methods
    end = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", shape) + b"".join(chunks) + end


def piece(name, data):
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def webp(*pieces):
    body = b"WEBP" + b"".join(pieces)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def extended(flags=0, width=20, height=30):
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return piece(b"VP8X", bytes([flags, 0, 0, 0]) + size)


def lossy(bits=0x10, width=20, height=30, signature=b"\x9d\x01\x2a"):
    return bits.to_bytes(3, "little") + signature + struct.pack("<HH", width, height) + bytes(30)


VP8, VP8L = piece(b"VP8 ", lossy()), piece(b"VP8L", struct.pack("<BI", 0x2F, 19 | 29 << 14))


def photo(mode="RGB"):
    return random_image(mode, 30, 20)


def text(**texts):
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    info.add_text("Comment", "compressed " * 20, zip=True)
    info.add_itxt("Title", "Größe", "de", "Titel")
    return info


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIGNED = memoryview(encode(photo(), "PNG")).cast("b")  # as Arrow's buffers are

# Plain files, all of 30 by 20 pixels: they must be answered.
PLAIN = {
    "JPEG": encode(photo(), "JPEG"),
    "JPEG, grey": encode(photo("L"), "JPEG"),
    "JPEG, CMYK": encode(photo("CMYK"), "JPEG"),
    "JPEG, progressive": encode(photo(), "JPEG", progressive=True),
    "JPEG, own tables": encode(photo(), "JPEG", optimize=True, subsampling=0),
    "JPEG, restarts": encode(photo(), "JPEG", restart_marker_blocks=1),
    "JPEG, comment, profile, density": encode(
        photo(), "JPEG", comment=b"no words", icc_profile=PROFILE, dpi=(300, 300)
    ),
    "JPEG, profile in parts": jpeg(
        segment(0xFFE2, b"ICC_PROFILE\0\2\2" + PROFILE[99:]),
        segment(0xFFE2, b"ICC_PROFILE\0\1\2" + PROFILE[:99]),
        *(TABLE, frame()),
    ),
    "JPEG, a part of its profile lost": jpeg(
        segment(0xFFE2, b"ICC_PROFILE\0\2\2" + PROFILE), TABLE, frame()
    ),
    "JPEG, profile behind the frame": jpeg(
        TABLE, frame(), segment(0xFFE2, b"ICC_PROFILE\0\1\1" + PROFILE)
    ),
    "JPEG, XMP": encode(photo(), "JPEG", xmp=b"<x />"),
    "JPEG, XMP that EXIF overrules": jpeg(
        segment(0xFFE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'),
        segment(0xFFE1, exif_block((0x0112, 3, 1, b"\1\0\0\0"))),
        *(TABLE, frame()),
    ),
    "JPEG, Photoshop": jpeg(
        JFIF, segment(0xFFED, b"Photoshop 3.0\x008BIM\4\4\0\0" + bytes(4)), TABLE, frame()
    ),
    "JPEG, EXIF without orientation": jpeg(segment(0xFFE1, exif_block()), TABLE, frame()),
    "JPEG, sound resolution in EXIF": encode(
        photo(), "JPEG", exif=exif_block((0x011A, 5, 1, b"\x22\0\0\0"), (0x0128, 3, 1, b"\2\0\0\0"))
    ),
    "PNG": encode(photo(), "PNG"),
    "PNG, signed bytes": SIGNED,
    "PNG, grey": encode(photo("L"), "PNG"),
    "PNG, grey and alpha": encode(photo("LA"), "PNG"),
    "PNG, alpha": encode(photo("RGBA"), "PNG"),
    "PNG, palette": encode(photo("P"), "PNG"),
    "PNG, palette, transparent": encode(photo("P"), "PNG", transparency=b"\0\x80"),
    "PNG, 1 bit": encode(photo("1"), "PNG"),
    "PNG, 16 bit": encode(photo("I;16"), "PNG"),
    "PNG, 16 bit colours": png(depth=16),
    "PNG, interlaced": png(methods=b"\0\0\1"),
    "PNG, transparent colour": encode(photo(), "PNG", transparency=(1, 2, 3)),
    "PNG, texts": encode(photo(), "PNG", pnginfo=text(Software="some", Author="one"), dpi=(72, 72)),
    "PNG, profile": encode(photo(), "PNG", icc_profile=PROFILE),
    "PNG, colour chunks": png(
        chunk(b"gAMA", bytes(4)), chunk(b"cHRM", bytes(32)), chunk(b"sRGB", b"\0")
    ),
    "WebP": encode(photo(), "WEBP"),
    "WebP, lossless": encode(photo(), "WEBP", lossless=True),
    "WebP, lossless alpha": encode(photo("RGBA"), "WEBP", lossless=True),
    "WebP, alpha": encode(photo("RGBA"), "WEBP"),
    "WebP, profile": encode(photo(), "WEBP", icc_profile=PROFILE),
    "WebP, profile and alpha": encode(photo("RGBA"), "WEBP", icc_profile=PROFILE),
    "WebP, something after it": encode(photo(), "WEBP") + b"more",
    "WebP, built": webp(VP8),
    "WebP, built extended": webp(extended(0x10), piece(b"ALPH", b"\0"), VP8),
    "WebP, built lossless": webp(extended(), VP8L),
}
BOMB = zlib.compress(bytes(2**21))
HUGE = {"width": 20_000, "height": 20_000}

# Files that an answer might get wrong: they must be left to Pillow.
LEFT = {
    "nothing": b"",
    "GIF": encode(photo("P"), "GIF"),
    "TIFF": encode(photo(), "TIFF"),
    "JPEG, turned by XMP": encode(photo(), "JPEG", xmp=b'<x tiff:Orientation="6"/>'),
    "JPEG, turned by XMP beside EXIF": jpeg(
        segment(0xFFE1, exif_block()),
        segment(0xFFE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'),
        *(TABLE, frame()),
    ),
    "JPEG, several images": encode(photo(), "MPO", save_all=True, append_images=[photo()]),
    "JPEG, 12 bit": jpeg(JFIF, TABLE, frame(bits=12)),
    "JPEG, 2 layers": jpeg(JFIF, TABLE, frame(layers=2)),
    "JPEG, no height": jpeg(JFIF, TABLE, frame(height=0)),
    "JPEG, no width": jpeg(JFIF, TABLE, frame(width=0)),
    "JPEG, no frame": jpeg(JFIF, TABLE),
    "JPEG, two frames": jpeg(JFIF, TABLE, frame(), frame(9, 9)),
    "JPEG, cut frame": jpeg(JFIF, TABLE, segment(0xFFC0, frame()[4:-1])),
    "JPEG, cut table": jpeg(JFIF, segment(0xFFDB, bytes(64)), frame()),
    "JPEG, empty table": jpeg(JFIF, segment(0xFFDB, b""), frame()),
    "JPEG, cut 16-bit table": jpeg(JFIF, segment(0xFFDB, b"\x10" + bytes(64)), frame()),
    "JPEG, cut JFIF": jpeg(segment(0xFFE0, b"JFIF\0"), TABLE, frame()),
    "JPEG, cut Adobe": jpeg(segment(0xFFEE, b"Adobe"), TABLE, frame()),
    "JPEG, cut profile": jpeg(segment(0xFFE2, b"ICC_PROFILE\0"), TABLE, frame()),
    "JPEG, cut Photoshop": jpeg(segment(0xFFED, b"Photoshop 3.0\x008BIM\4\4"), TABLE, frame()),
    "JPEG, too short a segment": jpeg(JFIF, b"\xff\xfe\0\1", TABLE, frame()),
    "JPEG, unknown marker": jpeg(JFIF, segment(0xFF02, b"what"), TABLE, frame()),
    "JPEG, too many pixels": jpeg(JFIF, TABLE, frame(20_000, 20_000)),
    "JPEG, broken EXIF": encode(photo(), "JPEG", exif=b"Exif\0\0garbage!"),
    "JPEG, orientation 9": encode(photo(), "JPEG", exif=oriented(9)),
    "JPEG, two EXIF": jpeg(*[segment(0xFFE1, oriented(6))] * 2, TABLE, frame()),
    "JPEG, text as resolution": jpeg(
        segment(0xFFE1, exif_block((0x0128, 3, 1, b"\2\0\0\0"), (0x011A, 2, 1, b"1\0\0\0"))),
        TABLE,
        frame(),
    ),
    "PNG, EXIF": encode(photo(), "PNG", exif=oriented(6)),
    "PNG, XMP": png(chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')),
    "PNG, XMP as text": png(chunk(b"tEXt", b'XML:com.adobe.xmp\0<x tiff:Orientation="6"/>')),
    "PNG, EXIF as text": png(
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 34\n" + oriented(6).hex().encode())
    ),
    "PNG, EXIF as text, compressed": png(
        chunk(
            b"zTXt",
            b"Raw profile type exif\0\0"
            + zlib.compress(b"\nexif\n 34\n" + oriented(6).hex().encode()),
        )
    ),
    "PNG, EXIF as a text exif": png(chunk(b"tEXt", b"exif\0" + oriented(6))),
    "PNG, animated": encode(photo(), "PNG", save_all=True, append_images=[photo("L")]),
    "PNG, unknown critical chunk": png(chunk(b"CRIT", b"what")),
    "PNG, unknown chunk": png(chunk(b"abCd", b"what")),
    "PNG, text bomb": png(chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "PNG, international text bomb": png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)),
    "PNG, profile bomb": png(chunk(b"iCCP", b"profile\0\0" + BOMB)),
    "PNG, unknown compression": png(chunk(b"zTXt", b"Comment\0\1what")),
    "PNG, profile of a name": png(chunk(b"iCCP", b"profile")),
    "PNG, wrong checksum": png(chunk(b"tIME", bytes(7))[:-1] + b"?"),
    "PNG, cut gamma": png(chunk(b"gAMA", bytes(3))),
    "PNG, cut chromaticities": png(chunk(b"cHRM", bytes(31))),
    "PNG, long chromaticities": png(chunk(b"cHRM", bytes(33))),  # Pillow 11 rejects them
    "PNG, cut intent": png(chunk(b"sRGB", b"")),
    "PNG, cut density": png(chunk(b"pHYs", bytes(8))),
    "PNG, cut transparency": png(chunk(b"tRNS", bytes(5))),
    "PNG, two headers": png(chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))),
    "PNG, no header": b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b""),
    "PNG, no pixels": png()[:33] + chunk(b"IEND", b""),
    "PNG, unknown depth": png(depth=7),
    "PNG, unknown colour": png(colour=5),
    "PNG, unknown filter": png(methods=b"\0\1\0"),
    "PNG, no width": png(width=0),
    "PNG, too many pixels": png(**HUGE),
    "WebP, EXIF": encode(photo(), "WEBP", exif=oriented(6)),
    "WebP, XMP": encode(photo(), "WEBP", xmp=b"<x/>"),
    "WebP, animated": encode(photo(), "WEBP", save_all=True, append_images=[photo("L")]),
    "WebP, other than its canvas": webp(extended(width=21), VP8),
    "WebP, cut extension": webp(piece(b"VP8X", extended()[8:-1]), VP8),
    "WebP, unknown flag": webp(extended(0x80), VP8),
    "WebP, alpha twice": webp(extended(0x10), *[piece(b"ALPH", b"\0")] * 2, VP8),
    "WebP, alpha of a lossless one": webp(extended(0x10), piece(b"ALPH", b"\0"), VP8L),
    "WebP, more in it": webp(VP8, piece(b"what", b"")),
    "WebP, no key frame": webp(piece(b"VP8 ", lossy(bits=0x11))),
    "WebP, unknown profile": webp(piece(b"VP8 ", lossy(bits=0x18))),
    "WebP, invisible": webp(piece(b"VP8 ", lossy(bits=0))),
    "WebP, part longer than the whole": webp(piece(b"VP8 ", lossy(bits=0x10 | 40 << 5))),
    "WebP, no start code": webp(piece(b"VP8 ", lossy(signature=b"\x9d\x01\x2b"))),
    "WebP, no height": webp(piece(b"VP8 ", lossy(height=0))),
    "WebP, cut": encode(photo(), "WEBP")[:-2],
    "WebP, unknown lossless version": webp(piece(b"VP8L", struct.pack("<BI", 0x2F, 1 << 29))),
    "WebP, cut frame": webp(piece(b"VP8 ", lossy()[:9])),
    "WebP, cut lossless": webp(piece(b"VP8L", b"\x2f\0\0\0")) + bytes(9),
    "RIFF, no WebP": b"RIFF" + bytes(40),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_are_answered_as_pillow_does(name):
    assert agrees(PLAIN[name])
    assert quick_probe(PLAIN[name], len(PLAIN[name])) == (30, 20)
    assert by_pillow(PLAIN[name]) == Probe((30, 20), False)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_plain_is_left_to_pillow(name):
    encoded = LEFT[name]
    assert quick_probe(encoded, len(encoded)) is None
    try:
        found = probe(encoded, max_pixels=MOST_PIXELS)
    except BadImage as error:
        found = error.reason, str(error)
    assert found == by_pillow(encoded)


def test_some_of_what_is_left_has_another_size_and_some_is_rejected():
    found = {name: by_pillow(encoded) for name, encoded in LEFT.items()}
    assert sum(outcome == Probe((20, 30), False) for outcome in found.values()) >= 8
    assert sum(not isinstance(outcome, Probe) for outcome in found.values()) >= 35


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpegs_orientation_is_read_in_either_byte_order(orientation, order):
    exif = oriented(orientation, order)
    assert exif_orientation(exif) == orientation
    encoded = encode(photo(), "JPEG", exif=exif)
    expected = (20, 30) if orientation >= 5 else (30, 20)
    assert quick_probe(encoded, len(encoded)) == expected
    assert by_pillow(encoded) == Probe(expected, False)


@given(strategies.encoded_images())
def test_any_image_is_answered_right_or_not_at_all(image):
    answered = agrees(image.encoded)
    assert answered == (image.format == "JPEG")  # the others hold EXIF, or are GIF files


@pytest.mark.parametrize("path", BUNDLED[::8], ids=lambda path: path.name)
def test_a_header_cut_anywhere_is_answered_right_or_not_at_all(path):
    encoded = path.read_bytes()
    answered = [agrees(encoded[:end]) for end in range(1200)]
    # Once the header is whole, it is answered.
    assert answered == sorted(answered)
    assert not answered[32]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_cut_anywhere_are_answered_right_or_not_at_all(name):
    encoded = bytes(PLAIN[name])
    assert sum(agrees(encoded[:end]) for end in range(len(encoded))) < len(encoded) - 20


@pytest.mark.parametrize("name", PLAIN)
def test_flipped_bytes_are_answered_right_or_not_at_all(name):
    encoded = bytes(PLAIN[name])[:900]
    answered = 0
    for place in range(len(encoded)):
        for flip in (0x01, 0xF8):
            damaged = bytearray(PLAIN[name])
            damaged[place] ^= flip
            answered += agrees(bytes(damaged))
    assert 0 < answered < 2 * len(encoded)


@given(st.sampled_from(BUNDLED), st.data())
def test_damaged_real_files_are_answered_right_or_not_at_all(path, data):
    damaged = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, 700), min_size=1, max_size=4)):
        damaged[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    agrees(bytes(damaged))


MARKERS = st.sampled_from([0xFFC0, 0xFFC2, 0xFFC4, 0xFFDB, 0xFFDD, 0xFFE0, 0xFFE1, 0xFFE2]) | (
    st.sampled_from([0xFFE5, 0xFFED, 0xFFEE, 0xFFFE]) | st.integers(0xFF00, 0xFFFF)
)
SEGMENT_STARTS = [b"", b"JFIF\0", b"ICC_PROFILE\0", b"MPF\0", b"Adobe", b"Photoshop 3.0\x008BIM\4"]
SEGMENT_STARTS += [b'http://ns.adobe.com/xap/1.0/\0<tiff:Orientation="6"', b"ICC_PROFILE\0\1\1"]
SEGMENTS = st.builds(
    lambda marker, start, data: segment(marker, start + data),
    MARKERS,
    st.sampled_from(SEGMENT_STARTS),
    st.binary(max_size=20),
)
TAGS = st.sampled_from([0x0112, 0x011A, 0x0128, 0x010F, 0x8769]) | st.integers(0, 2**16 - 1)
VALUES = st.binary(min_size=4, max_size=4) | st.sampled_from([b"\6\0\0\0", b"\0\6\0\0"])
ENTRIES = st.tuples(TAGS, st.integers(0, 13), st.integers(0, 3), VALUES)
BLOCKS = st.builds(
    lambda entries, order: exif_block(*entries, order=order),
    st.lists(ENTRIES, max_size=4),
    st.sampled_from("<>"),
)


@given(st.lists(SEGMENTS, max_size=3), BLOCKS, st.booleans())
def test_jpegs_of_any_segments_are_answered_right_or_not_at_all(segments, exif, dense):
    first = [JFIF] if dense else []
    agrees(jpeg(*first, segment(0xFFE1, exif), TABLE, *segments, frame()))
    agrees(jpeg(*segments, TABLE, frame()))


NAMES = "PLTE tRNS bKGD sBIT tIME tEXt zTXt iTXt iCCP gAMA cHRM sRGB pHYs eXIf acTL IHDR fcTL"
KEYS = [b"", b"a", b"exif\0", b"xmp\0", b"Comment\0\0", b"Comment\0\0\0\0\0", b"Title\0\1\0\0\0"]
CHUNKS = st.builds(
    lambda name, key, data: chunk(name.encode(), key + data),
    st.sampled_from(NAMES.split()) | st.from_regex(r"[A-Za-z0-9_]{4}", fullmatch=True),
    st.sampled_from(KEYS),
    st.binary(max_size=34) | st.binary(max_size=34).map(zlib.compress) | st.just(BOMB),
)


@given(
    st.lists(CHUNKS, max_size=4),
    st.sampled_from([1, 2, 4, 8, 16, 3, 0]),
    st.integers(0, 7),
    st.tuples(*[st.integers(0, 2)] * 3),
)
def test_pngs_of_any_chunks_are_answered_right_or_not_at_all(chunks, depth, colour, methods):
    agrees(png(*chunks, depth=depth, colour=colour, methods=bytes(methods)))
    agrees(png(*chunks))


PIECES = st.sampled_from(
    [VP8, VP8L, piece(b"ICCP", b"odd"), piece(b"ALPH", b"\0"), piece(b"ANIM", bytes(6))]
) | st.builds(piece, st.sampled_from([b"EXIF", b"XMP ", b"what"]), st.binary(max_size=9))


@given(st.lists(PIECES, max_size=4), st.integers(0, 255), st.integers(19, 21))
def test_webps_of_any_pieces_are_answered_right_or_not_at_all(pieces, flags, width):
    agrees(webp(*pieces))
    agrees(webp(extended(flags), *pieces))
    agrees(webp(extended(flags & 0x30, width=width), *pieces))
    agrees(webp(piece(b"VP8 ", lossy(bits=flags, width=width))))


def test_nearly_all_bundled_images_are_answered():
    answered = sum(agrees(path.read_bytes()) for path in BUNDLED)
    assert len(BUNDLED) >= 150
    assert answered >= 0.95 * len(BUNDLED)


def test_a_header_beyond_the_first_bytes_is_left_to_pillow(tmp_path):
    long = jpeg(JFIF, *[segment(0xFFFE, bytes(60_000))] * 2, TABLE, frame())
    assert quick_probe(long, len(long)) is None
    path = tmp_path / "long.jpg"
    path.write_bytes(long)
    assert probe(str(path), max_pixels=10**6) == probe(long, max_pixels=10**6)
    assert probe(long, max_pixels=10**6) == Probe((30, 20), False)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize("given_as", ["bytes", "signed", "path"])
def test_plain_files_never_reach_pillow(name, given_as, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    encoded = PLAIN[name] + bytes(2 * HEAD_BYTES)
    path = tmp_path / "image"
    path.write_bytes(encoded)
    signed = memoryview(encoded).cast("b")
    some = {"bytes": encoded, "signed": signed, "path": str(path)}[given_as]
    assert probe(some, max_pixels=600) == Probe((30, 20), False)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WebP"])
def test_too_many_pixels_are_rejected_as_pillows_path_does(name, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(PLAIN[name])
    for some in (PLAIN[name], str(path)):
        with pytest.raises(BadImage, match=r"^30x20 pixels, expected at most 599$") as found:
            probe(some, max_pixels=599)
        assert found.value.reason == "too many pixels"


def opened_with(monkeypatch, file_class):
    """Let images open files of a class; return the list of what it opened."""
    opened = []

    def opened_by(path, mode, buffering, opener):  # noqa: ARG001
        assert (mode, buffering) == ("rb", 0)
        opened.append(file_class(path))
        return opened[-1]

    monkeypatch.setattr(regular_files, "open", opened_by, raising=False)
    return opened


@pytest.mark.parametrize("name", ["GIF", "PNG, EXIF", "PNG, no width", "nothing"])
def test_a_file_left_to_pillow_is_opened_once_and_closed(name, tmp_path, monkeypatch):
    path = tmp_path / "image"
    path.write_bytes(LEFT[name])
    expected = by_pillow(LEFT[name])
    opened = opened_with(monkeypatch, FileIO)
    try:
        found = probe(str(path), max_pixels=10**6)
    except BadImage as error:
        found = error.reason, str(error)
    assert found == expected
    assert [file.closed for file in opened] == [True]


def test_a_machines_fault_while_reading_is_raised_and_a_files_own_is_a_reject(
    tmp_path, monkeypatch
):
    path = tmp_path / "image"
    path.write_bytes(PLAIN["JPEG"])

    def failing(number):
        class Failing(FileIO):
            def read(self, *_):
                raise OSError(number, "some fault")

        return opened_with(monkeypatch, Failing)

    opened = failing(errno.ENFILE)
    with pytest.raises(OSError, match=r"some fault$") as found:
        probe(str(path), max_pixels=10**6)
    assert found.value.errno == errno.ENFILE
    assert not isinstance(found.value, BadImage)
    opened += failing(errno.EISDIR)
    with pytest.raises(BadImage, match=r"some fault: ") as rejected:
        probe(str(path), max_pixels=10**6)
    assert rejected.value.reason == "unreadable"
    assert all(file.closed for file in opened)


def test_missing_and_empty_files_and_folders_are_rejected(tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    reasons = {}
    for path in (empty, tmp_path, tmp_path / "none"):
        with pytest.raises(BadImage) as found:
            probe(str(path), max_pixels=10**6)
        reasons[path] = found.value.reason
    assert list(reasons.values()) == ["empty", "unreadable", "missing"]


def with_late_chunk(encoded, name, content):
    end = encoded.rindex(b"IEND") - 4
    return encoded[:end] + chunk(name, content) + encoded[end:]


@pytest.mark.parametrize("given_as", ["bytes", "memoryview", "path"])
@pytest.mark.parametrize("side", [(30, 20), (300, 200)], ids=["in the head", "beyond the head"])
def test_exif_behind_the_pixels_of_a_png_turns_it(given_as, side, tmp_path):
    image = random_image("RGB", *side)
    plain = encode(image, "PNG")
    assert (len(plain) > HEAD_BYTES) == (side == (300, 200))
    for orientation in range(1, 9):
        block = oriented(orientation).removeprefix(b"Exif\0\0")
        file = with_late_chunk(plain, b"eXIf", block)
        if given_as == "path":
            (tmp_path / "late.png").write_bytes(file)
            file = str(tmp_path / "late.png")
        elif given_as == "memoryview":
            file = memoryview(file)
        image_hw = upright_hw(*image.size, orientation)
        assert probe(file, max_pixels=10**6) == Probe(image_hw, False)
        rules = PixelRules((0, 0, 0), 10**6, None, "bicubic", "bicubic", "srgb")
        found = decode(file, image_hw=image_hw, target_hw=image_hw, rules=rules).pixels
        assert (found == naive.upright(np.asarray(image), orientation)).all()
    broken = with_late_chunk(plain, b"eXIf", b"none of it")
    assert probe(broken, max_pixels=10**6) == Probe(image.size[::-1], True)
    other = with_late_chunk(plain, b"tIME", bytes(7))
    assert probe(other, max_pixels=10**6) == Probe(image.size[::-1], False)
    assert probe(plain[:-20], max_pixels=10**6) == Probe(image.size[::-1], False)
