"""Pixels against other readers, and what became of each kind of difficult file.

    python benchmarks/references.py [--data ../shared/data] [--before CHECKOUT] [--out ELSEWHERE]

Needs tifffile, psd-tools and opencv-python-headless, none of which packpipe uses. Writes
references.md into benchmarks/results. FOLDER of --data holds jpegs.parquet, pictures.parquet and
small/; CHECKOUT is one of an earlier version, in which the same files are decoded: without it the
column is left out.

All images are decoded in full, at their own size and as stored (``profiles="ignore"``): what
another reader does with a profile is not the question here.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import pickle
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [f"{ROOT / 'tests'}", f"{ROOT / 'tests' / 'images'}"]
import test_bounds  # noqa: E402 found in tests
import test_colour  # noqa: E402
import test_decode  # noqa: E402
import test_edges  # noqa: E402
import test_extras  # noqa: E402
import test_jpegxl  # noqa: E402
import test_layouts  # noqa: E402
import test_scans  # noqa: E402
import test_value_range  # noqa: E402
from naive_profiles import ADOBE, P3, srgb_of  # noqa: E402
from strategies import encode  # noqa: E402

from packpipe import PackConfig, plan_epoch  # noqa: E402
from packpipe.images.bad_images import BadImage  # noqa: E402
from packpipe.images.decode import decode, probe  # noqa: E402
from packpipe.planning.image_options import MAX_PIXELS  # noqa: E402

BACKGROUND = np.array(test_decode.BACKGROUND)
RULES = test_decode.RULES._replace(max_pixels=10**9, profiles="ignore")
PICTURES = 1000  # of each format, at most
RIGHT = 2  # levels
SIDE = 40  # of the layouts that the references themselves write


READERS = """*Mean*, *worst*: difference in levels of 255, over all values of files that packpipe
reads. *Refused*: its rejects, by what they say."""
KINDS = """The smallest file of each kind that the tests make, at its own size unless said. *Right*:
within 2 levels of 255 in every value of what the file holds; else the mean and the largest
difference. A reject is told by its reason and text."""
EDGES = """Photographs of at most so many pixels, decoded at 1/2, 1/4 or 1/8 where that is possible.
*Kept*: `jpeg_edges="padded"`, with padding at their edges as libjpeg leaves it. *Worst edge*: the
mean difference of its last row or column from a decode in full, in levels."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    photographs = encoded_in(options.data / "jpegs.parquet")
    text = [
        "# Pixels against other readers",
        "",
        made_by(),
        "",
        *compared(options.data, photographs),
        "",
        "## Kinds of difficult files",
        "",
        KINDS,
        "",
        *kinds(options.before),
        "",
        "## Edges of drafted photographs",
        "",
        EDGES,
        "",
        *edges(photographs),
        "",
    ]
    (options.out / "references.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


def made_by() -> str:
    """Return when and with what the figures were made."""
    names = ("pillow", "tifffile", "psd-tools", "opencv-python-headless")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    command = "`python benchmarks/references.py --data FOLDER --before CHECKOUT`"
    python = f"CPython {platform.python_version()}"
    return f"{datetime.date.today()}, {command}, {python}, {versions}."


def encoded_in(path: Path, most: int | None = None) -> list[bytes]:
    """Return the files of a table's image column."""
    column = pq.read_table(path, columns=["image"]).column("image")
    return [value.as_py()["bytes"] for value in column[:most]]


# --- Other readers -----------------------------------------------------------------------------


def compared(data: Path, photographs: list[bytes]) -> list[str]:
    """Return a table of how far pixels are from those of other readers."""
    lines = [
        READERS,
        "",
        "| kind | reader | files | mean | worst value | worst file's mean | refused |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    small = sorted((data / "small").rglob("*.png"))
    groups: dict[tuple[str, str], list[tuple[bytes, Any]]] = {}
    for kind, file in [*tiffs(), *written_tiffs(photographs)]:
        groups.setdefault((kind, "tifffile"), []).append((file, by_tifffile))
    for kind, file in psds(photographs):
        groups.setdefault((kind, "psd-tools"), []).append((file, by_psd_tools))
    webps = encoded_in(data / "pictures.parquet", PICTURES)
    for kind, files in {
        "JPEG": photographs,
        "PNG": [path.read_bytes() for path in small],
        "WebP": webps,
    }.items():
        groups[kind, "OpenCV"] = [(file, by_opencv) for file in files]
    for (kind, reader), cases in groups.items():
        means, worst, refused = [], 0.0, {}
        for file, reference in cases:
            try:
                pixels = pixels_of(file)
            except BadImage as error:
                refused[str(error)] = refused.get(str(error), 0) + 1
                continue
            apart = np.abs(pixels - reference(file))
            means.append(apart.mean())
            worst = max(worst, float(apart.max()))
        said = "; ".join(f"{number}: {text}" for text, number in refused.items()) or "none"
        figures = f"{np.mean(means):.3f} | {worst:.2f} | {max(means):.3f}" if means else "- | - | -"
        lines.append(f"| {kind} | {reader} | {len(cases)} | {figures} | {said} |")
    return lines


def pixels_of(file: bytes) -> np.ndarray:
    """Return packpipe's pixels of a file."""
    image_hw = probe(file, max_pixels=10**9).image_hw
    return decode(file, image_hw=image_hw, target_hw=image_hw, rules=RULES).pixels.astype(float)


def laid(values: np.ndarray, most: int) -> np.ndarray:
    """Return float[height, width, 3] of 0..255 of samples of 0..most, alpha laid on the ground."""
    if most > 255 and values.shape[2] > 2:  # by the rule for colours of 16 bits
        values, most = values >> 8, 255
    levels = values * (255 / most)
    colours = levels[..., : 3 if values.shape[2] > 2 else 1]
    if values.shape[2] in (2, 4):
        alpha = levels[..., -1:] / 255
        colours = colours * alpha + BACKGROUND * (1 - alpha)
    return np.broadcast_to(colours, (*values.shape[:2], 3))


def by_tifffile(file: bytes) -> np.ndarray:
    """Return the pixels that tifffile finds."""
    import tifffile

    with tifffile.TiffFile(BytesIO(file)) as opened:
        page = opened.pages[0]
        values = page.asarray()
        if values.ndim == 2:
            values = values[..., None]
        elif page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            values = np.moveaxis(values, 0, -1)
        return laid(values, 2**page.bitspersample - 1)


def by_psd_tools(file: bytes) -> np.ndarray:
    """Return the pixels that psd-tools finds, without a fourth channel: no layers speak of one."""
    from psd_tools import PSDImage

    opened = PSDImage.open(BytesIO(file))
    channels = 3 if opened.channels > 2 else 1
    bands = [opened.topil(channel=number) for number in range(channels)]
    return laid(np.stack([np.asarray(band.convert("L")) for band in bands], axis=-1), 255)


def by_opencv(file: bytes) -> np.ndarray:
    """Return the pixels that OpenCV finds."""
    import cv2

    content = np.frombuffer(file, np.uint8)
    with_alpha = file[:4] == b"\x89PNG"
    values = cv2.imdecode(content, cv2.IMREAD_UNCHANGED if with_alpha else cv2.IMREAD_COLOR)
    if values.ndim == 2:
        values = values[..., None]
    order = [2, 1, 0, 3] if values.shape[2] == 4 else [2, 1, 0]
    return laid(values[..., order[: values.shape[2]]] if values.shape[2] > 2 else values, 255)


def tiffs() -> Iterator[tuple[str, bytes]]:
    """Yield kinds and hand-made TIFF files, both byte orders, plain and deflated, and in tiles."""
    for order in "<>":
        for deflated in (False, True):
            for tiled in (False, True):
                options = {"deflated": deflated, "tiled": tiled}
                for bits in (8, 16):
                    for name, photometric, samples, extra in (
                        ("grey", 1, 1, None),
                        ("RGB", 2, 3, None),
                        ("RGB and alpha", 2, 4, 2),
                        ("grey and alpha", 1, 2, 2),
                    ):
                        made = test_layouts.planes(
                            photometric, samples, bits, order, extra=extra, **options
                        )
                        yield f"TIFF, hand-made planes, {name} of {bits} bits", made[0]


def written_tiffs(photographs: list[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield kinds and TIFF files that tifffile writes."""
    import tifffile

    for number, pixels in enumerate(crops(photographs)):
        deep = pixels.astype(np.uint16) * 257 ^ np.uint16(number)
        for name, values, photometric in (
            ("RGB of 8 bits", pixels, "rgb"),
            ("RGB of 16 bits", deep, "rgb"),
            ("grey of 16 bits", deep[..., 1], "minisblack"),
        ):
            layouts = ("contig",) if values.ndim == 2 else ("contig", "separate")
            for planar in layouts:
                where = {} if values.ndim == 2 else {"planarconfig": planar}
                written = np.moveaxis(values, -1, 0) if planar == "separate" else values
                kind = f"TIFF of tifffile, {name}" + ", planes" * (planar == "separate")
                for byteorder in "<>":
                    out = BytesIO()
                    options = {"photometric": photometric, "byteorder": byteorder, **where}
                    with tifffile.TiffWriter(out, byteorder=options.pop("byteorder")) as writer:
                        writer.write(written, **options)
                    yield kind, out.getvalue()


def psds(photographs: list[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield kinds and PSD files: those that the tests make, and those that psd-tools writes."""
    from psd_tools import PSDImage

    rng = np.random.default_rng(0)
    high, wide = test_layouts.HIGH, test_layouts.WIDE
    for packed in (False, True):
        bits = np.packbits(test_layouts.INDICES.astype(np.uint8), axis=1)
        yield "PSD, hand-made, bitmap", test_layouts.psd(0, 1, 1, [bits], packed=packed)
        for name, mode, channels in (("grey", 1, 1), ("RGB", 3, 3)):
            values = rng.integers(0, 256, (channels, high, wide), np.uint8)
            file = test_layouts.psd(mode, 8, channels, values, packed=packed)
            yield f"PSD, hand-made, {name}", file
        values = rng.integers(0, 256, (4, high, wide), np.uint8)
        file = test_layouts.psd(3, 8, 4, values, packed=packed)
        yield "PSD, hand-made, RGB and a fourth channel", file
    for pixels in crops(photographs):
        for mode in ("L", "RGB"):
            out = BytesIO()
            PSDImage.frompil(Image.fromarray(pixels).convert(mode)).save(out)
            yield f"PSD of psd-tools, {mode}", out.getvalue()


def crops(photographs: list[bytes]) -> Iterator[np.ndarray]:
    """Yield parts of some photographs: uint8[SIDE, SIDE + 7, 3]."""
    for file in photographs[::60]:
        yield np.asarray(Image.open(BytesIO(file)).convert("RGB"))[:SIDE, : SIDE + 7]


# --- Kinds -------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A file, the sizes to decode it at, and what is right (None if only a reject is)."""

    part: str
    name: str
    file: bytes
    image_hw: tuple[int, int]
    wanted: Any = None
    target_hw: tuple[int, int] | None = None
    max_pixels: int = MAX_PIXELS
    value_range: tuple[float, float] | None = None


def all_kinds() -> Iterator[Kind]:
    """Yield the kinds, one file each."""
    size = test_colour.PIXELS.shape[:2]
    adobe = srgb_of(test_colour.PIXELS, ADOBE, 2.19921875)
    for name, file, wanted in (
        (
            "PNG with an Adobe RGB profile",
            test_colour.saved(test_colour.PICTURE, "PNG", test_colour.ADOBE),
            adobe,
        ),
        (
            "PNG, gAMA of 1.0",
            test_colour.png_of([test_colour.gama(100000)]),
            srgb_of(test_colour.PIXELS, *test_colour.CHUNKS["gAMA"][1]),
        ),
        (
            "PNG, cICP of P3",
            test_colour.png_of([test_colour.CICP_P3]),
            srgb_of(test_colour.PIXELS, P3, None),
        ),
        (
            "PNG with a profile that is cut",
            test_colour.saved(test_colour.PICTURE, "PNG", test_colour.ADOBE[:200]),
            test_colour.PIXELS,
        ),
        ("PNG of high dynamic range, PQ", test_colour.HIGH["PNG, PQ"][0], None),
    ):
        yield Kind("colour", name, file, size, wanted)
    high, wide = size = test_layouts.HIGH, test_layouts.WIDE
    for name, alpha in (("RGB", {}), ("RGB and alpha", {"extra": 2})):
        file, values = test_layouts.planes(2, 3 + bool(alpha), 16, **alpha)
        yield Kind("layouts", f"TIFF planes of 16 bits, {name}", file, size, laid(values, 65535))
    file, values = test_layouts.planes(1, 1, 16)
    yield Kind("layouts", "TIFF, one plane of 16 bits", file, size, laid(values, 65535))
    for name in ("grey and alpha", "LAB", "CMYK of 16 bits", "alpha without a mark, deflated"):
        photometric, samples, bits, options, _ = test_layouts.LOST[name]
        file, _ = test_layouts.planes(photometric, samples, bits, **options)
        yield Kind("layouts", f"TIFF planes, {name}", file, size)
    signed = test_layouts.tiff("<", {258: 8, 259: 1, 262: 1, 277: 1, 339: 2}, [bytes(high * wide)])
    yield Kind("layouts", "TIFF of signed bytes", signed, size)
    colours = np.array(test_layouts.BLACK_WHITE)
    for bits in (4, 8):
        file = test_layouts.bmp(bits, test_layouts.BLACK_WHITE)
        yield Kind(
            "layouts", f"BMP of {bits} bits, two colours", file, size, colours[test_layouts.INDICES]
        )
    greys = np.arange(high * wide).reshape(size) * 2
    file = test_layouts.bmp(4, [(grey,) * 3 for grey in range(16)], greys)
    yield Kind("layouts", "BMP of 4 bits, greys", file, size, laid(greys[..., None], 255))
    bits = np.packbits(test_layouts.INDICES.astype(np.uint8), axis=1)
    wanted = laid(255 * (1 - test_layouts.INDICES)[..., None], 255)
    yield Kind("layouts", "PSD in bitmap mode", test_layouts.psd(0, 1, 1, [bits]), size, wanted)
    values = np.random.default_rng(1).integers(0, 256, (4, high, wide), np.uint8)
    file = test_layouts.psd(3, 8, 4, values)
    yield Kind("layouts", "PSD, a fourth channel", file, size, values[:3].transpose(1, 2, 0))
    file = test_layouts.psd(7, 8, 2, np.zeros((2, high, wide), np.uint8))
    yield Kind("layouts", "PSD in multichannel mode", file, size)
    file, frame = test_layouts.gif((high + 3, wide + 4), (2, 1))
    canvas = np.broadcast_to(BACKGROUND, (high + 3, wide + 4, 3)).copy()
    canvas[1 : 1 + high, 2 : 2 + wide] = frame[..., :3]
    yield Kind("layouts", "GIF, a frame on a larger canvas", file, canvas.shape[:2], canvas)
    yield from scans_and_lossless()
    yield from poison()
    file = test_edges.framed(431, 601, 2)
    wanted = np.broadcast_to(np.array(test_edges.INSIDE), (53, 75, 3))
    yield Kind(
        "edges", "JPEG of 601 x 431, 4:2:0, other padding", file, (431, 601), wanted, (53, 75)
    )
    yield from formats()


def formats() -> Iterator[Kind]:
    """Yield files of formats that need an extra or an option."""
    pixels = test_extras.PIXELS
    size = pixels.shape[:2]
    for name, file in (("HEIC", test_extras.heic(pixels)), ("JPEG XL", test_jpegxl.jxl(pixels))):
        yield Kind("formats", f"{name}, without loss", file, size, pixels)
        yield Kind("formats", f"{name}, cut in the middle", file[: len(file) // 2], size)
    file, turned = test_extras.turned(6), test_extras.UPRIGHT[6](pixels)
    yield Kind("formats", "HEIC, turned by its properties", file, turned.shape[:2], turned)
    size = test_value_range.HIGH, test_value_range.WIDE
    for dtype, value_range in test_value_range.RANGES.items():
        values = test_value_range.values_of(dtype)
        low, high = value_range
        grey = np.rint((values.astype(float) - low) / (high - low) * 255).clip(0, 255)
        name = f"TIFF of {dtype}, value_range given"
        file = test_value_range.tiff(values)
        yield Kind("formats", name, file, size, laid(grey[..., None], 255), value_range=value_range)
    file = b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.1, 0.9)
    grey = np.array([[[26] * 3, [230] * 3]])
    yield Kind("formats", "PFM of floats", file, (1, 2))
    yield Kind(
        "formats", "PFM of floats, value_range given", file, (1, 2), grey, None, MAX_PIXELS, (0, 1)
    )


def scans_and_lossless() -> Iterator[Kind]:
    """Yield JPEGs that are damaged, and one that cannot be drafted."""
    size = test_scans.HIGH, test_scans.WIDE
    file = test_scans.written("4:2:0")
    whole = np.asarray(Image.open(BytesIO(file)))
    start, end = test_scans.scan_of(file)
    yield Kind(
        "scans", "JPEG, cut and closed", file[: (start + end) // 2] + b"\xff\xd9", size, whole
    )
    longer = file[:end] + bytes(range(1, 41)) + file[end:]
    yield Kind("scans", "JPEG, 40 bytes too many", longer, size, whole)
    file, places = test_scans.restarted()
    whole = np.asarray(Image.open(BytesIO(file)))
    missing = file[: places[1]] + file[places[2] :]
    yield Kind("scans", "JPEG, a restart missing", missing, size, whole)
    values = np.asarray(test_scans.NOISE.convert("L"))
    file, target_hw = test_scans.lossless_jpeg(values), (6, 10)
    exact = test_decode.decoded(
        encode(Image.fromarray(values), "PNG"), size, target_hw, reducing_gap=1.0
    )
    yield Kind("lossless", "JPEG without frequencies, at 1/8", file, size, exact, target_hw)


def poison() -> Iterator[Kind]:
    """Yield files that ask for more than they hold, and one that holds much."""
    width = test_bounds.POISON
    file = test_decode.png(width, 1, 8, 2)
    yield Kind("poison", f"PNG of {width:,} x 1", file, (1, width), None, (8, 8))
    for name, image_hw in (("TIFF, strips", (2**14, 64)), ("PSD, resources", (4, 4))):
        yield Kind("poison", f"{name}, 2^20 of them", test_bounds.COSTLY[name][0], image_hw)
    file = test_decode.png(2, 2, 8, 3, b"\0\0\0" * 2)
    yield Kind("poison", "PNG of indices without a palette", file, (2, 2))
    high, wide = test_bounds.HIGH, test_bounds.WIDE
    grey = np.full((16, 20, 3), 200)
    name = f"JPEG of {high * wide / 1e6:.0f} million pixels, max_pixels=10^9"
    yield Kind("larger", name, test_bounds.large_jpeg(), (high, wide), grey, (16, 20), 10**9)


# Runs in any version: what becomes of each file, as (pixels, text, seconds).
_DECODES = """
import pickle, sys, time
from packpipe.images.decode import decode, probe
from packpipe.images.rules import PixelRules
from packpipe.images.opening import BadImage
cases, options = pickle.load(sys.stdin.buffer)
found = []
for file, image_hw, target_hw, max_pixels, value_range in cases:
    options |= {"max_pixels": max_pixels, "value_range": value_range}
    rules = PixelRules(**{name: options[name] for name in PixelRules._fields})
    pixels, text, started = None, "", time.perf_counter()
    try:
        probe(file, max_pixels=rules.max_pixels)
        pixels = decode(file, image_hw=image_hw, target_hw=target_hw, rules=rules)
        pixels = getattr(pixels, "pixels", pixels)
    except BadImage as error:
        text = f"{error.reason}: {error}"
    except BaseException as error:
        text = f"**{type(error).__name__}**, which stops a build"
    found.append((pixels, text, time.perf_counter() - started))
pickle.dump(found, sys.stdout.buffer)
"""


def kinds(before: Path | None) -> list[str]:
    """Return a table of what becomes of each kind."""
    found = list(all_kinds())
    columns = [outcomes(found, ROOT)]
    names = ["after"]
    if before is not None:
        columns.insert(0, outcomes(found, before))
        names.insert(0, "before")
    lines = [
        "| | kind | bytes | " + " | ".join(names) + " |",
        "| --- | --- | ---: |" + " --- |" * len(names),
    ]
    for kind, *told in zip(found, *columns, strict=True):
        what = " | ".join(told)
        lines.append(f"| {kind.part} | {kind.name} | {len(kind.file):,} | {what} |")
    return lines


def outcomes(found: list[Kind], checkout: Path) -> list[str]:
    """Return what becomes of each kind in a version."""
    cases = [
        (
            kind.file,
            kind.image_hw,
            kind.target_hw or kind.image_hw,
            kind.max_pixels,
            kind.value_range,
        )
        for kind in found
    ]
    options = RULES._replace(profiles="srgb", reducing_gap=1.0)._asdict()
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", _DECODES],
        input=pickle.dumps((cases, options)),
        env={**os.environ, "PYTHONPATH": f"{checkout.absolute()}"},
        cwd=tempfile.gettempdir(),
        stdout=subprocess.PIPE,
        check=True,
    )
    answers, told = pickle.loads(done.stdout), []  # noqa: S301
    for kind, (pixels, text, seconds) in zip(found, answers, strict=True):
        said = text.replace("|", "/") if pixels is None else verdict(kind, pixels)
        told.append(f"{said} ({seconds:.1f} s)" if seconds > 0.5 else said)
    return told


def verdict(kind: Kind, pixels: np.ndarray) -> str:
    """Return how far pixels are from the right ones."""
    if kind.wanted is None:
        return "**noise**: a row, and not of what the file says"
    apart = np.abs(pixels - np.asarray(kind.wanted, float))
    wrong = f"**wrong** by {apart.mean():.1f} levels, {apart.max():.0f} at most"
    return wrong if apart.max() > RIGHT else "right"


# --- Edges -------------------------------------------------------------------------------------


def edges(photographs: list[bytes]) -> list[str]:
    """Return a table of what is decoded anew, how far edges are off, and what that costs."""
    lines = [
        "| at most | photographs | decoded anew | worst edge, kept | worst edge | time ÷ kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    sizes = [probe(file, max_pixels=10**9).image_hw for file in photographs]
    ways = [RULES._replace(reducing_gap=1.0, jpeg_edges=way) for way in ("padded", "clean")]
    for side in (64, 128, 224):
        plan = plan_epoch(sizes, PackConfig(seq_len=1024, max_tokens=(side // 16) ** 2))
        targets = (plan.grid_hw * 16).tolist()
        changed, taken, worst = 0, np.zeros((5, len(sizes), 2)), np.zeros(2)
        for at, (file, image_hw, target_hw) in enumerate(
            zip(photographs, sizes, targets, strict=True)
        ):
            asked: dict[str, Any] = {"image_hw": image_hw, "target_hw": tuple(target_hw)}
            full = decode(file, rules=RULES, **asked).pixels.astype(int)
            found = [decode(file, rules=way, **asked).pixels.astype(int) for way in ways]
            changed += bool((found[0] != found[1]).any())
            for way, pixels in enumerate(found):
                apart = np.abs(pixels - full)
                worst[way] = max(worst[way], apart[-1].mean(), apart[:, -1].mean())
            for turn in range(5):
                for way in (0, 1) if turn % 2 else (1, 0):
                    start = time.process_time()
                    decode(file, rules=ways[way], **asked)
                    taken[turn, at, way] = time.process_time() - start
        kept, mended = np.median(taken, axis=0).sum(axis=0)
        figures = f"{worst[0]:.1f} | {worst[1]:.1f} | {mended / kept:.3f}"
        lines.append(f"| {side}² | {len(sizes)} | {changed} | {figures} |")
    return lines


if __name__ == "__main__":
    main()
