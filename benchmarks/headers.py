"""What the costliest header of each format takes: a part of results/fuzz.md (Linux).

    python benchmarks/headers.py [--mebibytes 40]

Files of so many MiB are made so that opening them takes as long, or as much memory, as we know how
to; `probe` reads each by its path, in a process of its own, where no decoder has worked before.
Those of tests/images/test_bounds.py, most of them smaller, come after. Prints the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [f"{ROOT / 'tests'}", f"{ROOT / 'tests' / 'images'}"]
import test_bounds  # noqa: E402 found in tests
from fuzz_seeds import box  # noqa: E402
from strategies import encode  # noqa: E402
from test_extras import heic  # noqa: E402

from packpipe.images.bad_images import BadImage  # noqa: E402
from packpipe.images.decode import prepare, probe  # noqa: E402
from packpipe.planning.image_config import PackConfig  # noqa: E402
from packpipe.planning.image_options import MAX_PIXELS  # noqa: E402

MEBIBYTE = 2**20
PIXELS = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
PICTURE = Image.fromarray(PIXELS)
BLOCK = b"8BIM\0\1\0\0\0\0\0\0"  # of Photoshop, empty
XMP = b"<x tiff:Orientation "
JXL = b"\0\0\0\x0cJXL \r\n\x87\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=40)
    options = parser.parse_args()
    prepare(PackConfig())
    print("| header | MiB | seconds | MiB taken | outcome |")
    print("| --- | ---: | ---: | ---: | --- |")
    small = ((name, file) for name, (file, _) in test_bounds.COSTLY.items())
    # Forked, so that modules are loaded; one file a process, so that its peak is that file's.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for some in (large(options.mebibytes * MEBIBYTE), small):
            for name, file in some:
                with tempfile.NamedTemporaryFile() as held:
                    held.write(file)
                    held.flush()
                    seconds, taken, said = pool.apply(measured, (held.name,))
                size = f"{len(file) / MEBIBYTE:.1f}"
                print(f"| {name} | {size} | {seconds:.2f} | {taken:.0f} | {said} |", flush=True)


def measured(path: str) -> tuple[float, float, str]:
    """Return processor time in seconds, memory taken in MiB, and what became of a file."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _kibibytes("VmRSS"), time.process_time()
    try:
        height, width = probe(path, max_pixels=MAX_PIXELS).image_hw
        said = f"{height} x {width}"
    except BadImage as error:
        said = f"{error.reason}: {error}"
    return time.process_time() - started, (_kibibytes("VmHWM") - before) / 1024, said


def _kibibytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split(maxsplit=1)[0])


def large(size: int) -> Iterator[tuple[str, bytes]]:
    """Yield the names of headers, and files of some bytes that have them."""
    whole, parts = bytes(size), size // 65_000
    entries = [(tag, 1, size, 8) for tag in range(20_000, 21_000)]
    yield "TIFF, 1,000 entries of the whole file", tiff(entries) + whole
    strips = [(257, 4, 1, 2**18), (273, 4, 2**18, 200), (279, 4, 2**18, 200)]
    yield "TIFF, 262,144 strips", tiff(strips) + whole
    yield "TIFF, XMP", tiff([(700, 1, size, 200)]).ljust(200, b"\0") + XMP * (size // len(XMP))
    png = encode(PICTURE, "PNG")
    exif = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    exif += b"".join(struct.pack("<HHII", *one) for one in entries) + whole
    texts = (chunk(b"zTXt", b"a%d\0\0" % n + zlib.compress(bytes(2**20 - 1))) for n in range(80))
    for name, chunks in (
        ("EXIF, 1,000 entries of all of it", chunk(b"eXIf", exif)),
        ("XMP", chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP * (size // len(XMP)))),
        ("EXIF as text", chunk(b"tEXt", b"Raw profile type exif\0\n\n\n" + b"0" * size)),
        ("texts that inflate to 80 MiB", b"".join(texts)),
        ("a palette of all of it", chunk(b"PLTE", whole)),
    ):
        yield f"PNG, {name}", png[:33] + chunks + png[33:]
    jpeg = encode(PICTURE, "JPEG")
    for name, segment in (
        ("tables", segment_of(0xDB, (b"\0" + bytes(64)) * 1000)),
        (
            "Photoshop's blocks",
            segment_of(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5400),
        ),
        ("XMP", segment_of(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP * 3200)),
        ("parts of a profile", segment_of(0xE2, b"ICC_PROFILE\0\1\1" + bytes(64_900))),
    ):
        yield f"JPEG, {name}", jpeg[:2] + segment * parts + jpeg[2:]
    stream = encode(PICTURE, "WEBP", lossless=True)[12:]
    for name, flag, more in (
        ("chunks", 0, part(b"ABCD") * (size // 8)),
        ("XMP", 4, part(b"XMP ", XMP * (size // len(XMP)))),
        ("EXIF, 1,000 entries of all of it", 8, part(b"EXIF", exif)),
    ):
        body = b"WEBP" + part(b"VP8X", struct.pack("<IHBHB", flag, 15, 0, 15, 0)) + stream + more
        yield f"WebP, {name}", part(b"RIFF", body)
    avif = encode(PICTURE, "AVIF", speed=10)
    yield "AVIF, a box behind it", avif + box(b"free", whole)
    yield "AVIF, 30,000 items in four kinds of boxes", avif_of_items(8_000, 6_000)
    j2k = encode(PICTURE, "JPEG2000")
    yield "JPEG 2000, a box before it", j2k[:12] + box(b"uuid", whole) + j2k[12:]
    extras = test_bounds.find_spec("pillow_heif")
    yield from [("HEIC, a box behind it", heic(PIXELS) + box(b"free", whole))] if extras else []
    yield "JPEG XL, boxes", JXL + box(b"free") * (size // 8)
    for name in ("GIF", "BMP", "PPM", "TGA", "PCX", "SGI", "QOI", "DDS"):
        yield f"{name}, more behind it", encode(PICTURE, name) + whole
    bmp = encode(PICTURE, "BMP")
    yield "BMP, a header of all of it", bmp[:14] + struct.pack("<I", size) + bmp[18:] + whole
    yield "PPM, spaces", b"P6" + b" " * size + b"16 16 255\n"
    icon = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, 100, 2**20) * 65_535
    for name, kind in (("ICO", 1), ("CUR", 2)):
        yield f"{name}, 65,535 pictures", struct.pack("<HHH", 0, kind, 65_535) + icon
    yield "DCX, places", struct.pack("<I", 0x3ADE68B1) + struct.pack("<I", 8) * (size // 4)
    icns = struct.pack(">4sI", b"icns", 8 + size)
    yield "ICNS, blocks", icns + struct.pack(">4sI", b"abcd", 8) * (size // 8)
    psd = struct.pack(">4sH6xHIIHHI", b"8BPS", 1, 3, 16, 16, 8, 3, 0)
    profile = b"8BIM" + struct.pack(">HHI", 1039, 0, size) + whole
    yield "PSD, a profile", psd + struct.pack(">I", len(profile)) + profile + bytes(1000)
    yield "no format", whole


def tiff(entries: list[tuple[int, int, int, int]]) -> bytes:
    """Return the head of a TIFF of some entries (tag, type, count, value), and of its shape."""
    shape = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    shape += [(273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 1, 256)]
    tags = {entry[0]: entry for entry in (*shape, *entries)}
    return test_bounds.tiff_of([tags[tag] for tag in sorted(tags)], 0)


def chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def segment_of(marker: int, content: bytes) -> bytes:
    """Return a segment of a JPEG file."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def part(name: bytes, content: bytes = b"") -> bytes:
    """Return a chunk of a WebP file."""
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def avif_of_items(number: int, entries: int) -> bytes:
    """Return an AVIF file whose boxes name so many items each, none of them the same."""
    ids: Any = iter(range(1, 2**16))
    places = b"".join(struct.pack(">HHH", next(ids), 0, 0) for _ in range(number))
    infe = [
        box(b"infe", struct.pack(">IHH4sB", 2 << 24, next(ids), 0, b"av01", 0))
        for _ in range(entries)
    ]
    referred = struct.pack(f">{number}H", *(next(ids) for _ in range(number)))
    shares = b"".join(struct.pack(">HB", next(ids), 0) for _ in range(number))
    meta = box(
        b"meta",
        bytes(4),
        box(b"hdlr", struct.pack(">II4s", 0, 0, b"pict"), bytes(13)),
        box(b"pitm", struct.pack(">IH", 0, 1)),
        box(b"iloc", struct.pack(">IHH", 0, 0, number), places),
        box(b"iinf", struct.pack(">IH", 0, entries), *infe),
        box(b"iref", bytes(4), box(b"dimg", struct.pack(">HH", 1, number), referred)),
        box(b"iprp", box(b"ipco"), box(b"ipma", struct.pack(">II", 0, number), shares)),
    )
    return box(b"ftyp", b"avif", bytes(4), b"mif1", b"avif") + meta


if __name__ == "__main__":
    main()
