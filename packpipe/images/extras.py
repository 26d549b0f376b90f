"""Opens HEIC and JPEG XL files, with the packages of the extra ``formats``.

The packages are imported when the first such file is opened, in the process that opens it: those
that decode need not be told. Nothing is registered with Pillow but what `pillow_jxl` registers
itself when it is imported.

What `pillow-heif` makes of HEIC: upright by its own properties (irot, imir), after which its EXIF
does not count; the primary image alone; 10 and 12 bits of colour lose the lower ones, grey keeps
them; premultiplied colours are marked. JPEG XL: see `jpegxl`. AVIF is Pillow's own.

What nobody sees: damage within a HEIC stream, which its decoder conceals, and a tile that says it
is smaller than its place, beside which is whatever stood in memory. A file that is cut is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import BytesIO
from struct import unpack
from typing import BinaryIO

from PIL import ImageFile

from packpipe.images.boxes import boxes
from packpipe.images.jpegxl import CODESTREAM, CONTAINER, JpegXLFile, allocate

# The module and the package that each needs.
_NEEDS = {"HEIC": ("pillow_heif", "pillow-heif"), "JPEG XL": ("pillow_jxl", "pillow-jxl-plugin")}
# Brands of HEIF files; those of their general structure belong to AVIF files, too.
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_GENERAL = {b"mif1", b"msf1"}
_AVIF = {b"avif", b"avis"}
# pillow-heif reads a file into memory when it opens it.
_MOST_HEIC_BYTES = 2**30
# The properties of some thousand tiles take less; and boxes before them.
_MOST_META_BYTES, _MOST_BOXES = 2**22, 2**6
# More items, and parts of items, than libheif takes: 1,000 of them. 8,192 took 50 ms.
_MOST_PARTS = 2**13
# Items may share bytes, up to this or four times the file; each is read on its own.
_LEAST_EXTENTS = 2**26


def extra_kind(head: bytes) -> str | None:
    """Return "HEIC" or "JPEG XL" for the first 64 bytes of such a file, None for any other."""
    if head.startswith((CODESTREAM, CONTAINER)):
        return "JPEG XL"
    if head[4:8] != b"ftyp":
        return None
    brands = head[8 : min(len(head), int.from_bytes(head[:4], "big"))]
    main = {brands[:4]}
    every = main | {brands[at : at + 4] for at in range(8, len(brands), 4)}
    is_heic = main <= _HEIC or (main <= _GENERAL and not every & _AVIF)
    return "HEIC" if is_heic else None


def open_extra(kind: str, file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image of an `extra_kind`; only its header is decoded.

    Raises:
        ModuleNotFoundError: its package is not installed. Other exceptions are those of parsers.
    """
    _check_installed(kind)
    if kind == "JPEG XL":
        file.seek(0)
        return JpegXLFile(file, "")
    from pillow_heif.as_plugin import HeifImageFile

    size = file.seek(0, os.SEEK_END)
    if size > _MOST_HEIC_BYTES:
        raise ValueError(f"{size} bytes, expected at most {_MOST_HEIC_BYTES} of a HEIC file")
    file.seek(0)
    opener: Callable[[BinaryIO, str], ImageFile.ImageFile] = HeifImageFile
    with _short_of_memory():
        return opener(file, "")


def _check_installed(kind: str) -> None:
    module, _ = _NEEDS[kind]
    if find_spec(module) is None:
        how = "pip install 'packpipe[formats]' and pack into a new folder"
        raise ModuleNotFoundError(f"{kind} needs the extra formats; {how}")


def coded_hw(file: BinaryIO) -> tuple[int, int]:
    """Return the largest (height, width) that a HEIC file gives any image or tile in it.

    An image may be a small part of what is decoded. The decoder allocates no more than is said
    here, and refuses a stream that is larger. But it decodes a file that is cut with a hole where
    tiles are missing, and reads what stands in a file once as often as the file says.

    Raises:
        ModuleNotFoundError: no package is installed that would decode it.
        ValueError: the file is cut, or says more than a photograph does.
    """
    _check_installed("HEIC")
    meta, end = _only(b"meta", file, 0), file.seek(0, os.SEEK_END)
    last = total = 0
    places = _only(b"iloc", BytesIO(meta), 4)  # after version and flags
    for number, (until, size) in enumerate(_extents(places) if places else ()):
        if number == _MOST_PARTS:
            raise ValueError(f"a HEIC file whose items have more than {_MOST_PARTS} parts")
        last, total = max(last, until), total + (size or end)
    if last > end:
        raise ValueError(f"a HEIC file cut to {end} bytes of {last}")
    if total > max(4 * end, _LEAST_EXTENTS):
        raise ValueError(f"a HEIC file of {end} bytes whose parts have {total}")
    parts = meta.split(b"ispe\0\0\0\0")[1:]
    found = (unpack(">II", part[:8])[::-1] for part in parts if len(part) >= 8)
    return max((hw for hw in found if all(hw)), default=(0, 0), key=math.prod)


def load_heic(image: ImageFile.ImageFile) -> None:
    """Decode the pixels; threads decode tiles, so which of their errors comes first is chance."""
    try:
        # It took up to 7.8 bytes a pixel of three channels.
        allocate(image.width * image.height * len(image.getbands()), 4)
        with _short_of_memory():
            image.load()
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not the image
            raise
        raise ValueError("libheif cannot decode it") from error


@contextmanager
def _short_of_memory() -> Iterator[None]:
    """Turn the error by which libheif says that it got no memory into a MemoryError."""
    try:
        yield
    except (RuntimeError, SyntaxError) as error:
        said = str(error)
        # What is the image's own fault begins alike: limits that it breaks, a size of 0.
        of_image = any(words in said for words in ("Security limit", "Invalid image size"))
        if said.startswith("Memory allocation error") and not of_image:
            raise MemoryError(said) from error
        raise


def _only(wanted: bytes, file: BinaryIO, at: int) -> bytes:
    """Return what the one box of this name holds; nothing where there is none."""
    found = None
    for name, start, end in boxes("a HEIC file", file, at, _MOST_BOXES):
        if name == wanted:
            if found is not None:
                raise ValueError(f"a HEIC file of more than one box {wanted.decode()!r}")
            if end - start > _MOST_META_BYTES:
                raise ValueError(f"a HEIC file with {end - start} bytes of properties")
            file.seek(start)
            found = file.read(end - start)
    return found or b""


def _extents(iloc: bytes) -> Iterator[tuple[int, int]]:
    """Yield (end in the file, or 0 for one elsewhere, bytes) of every part of every item."""
    at = 0

    def take(size: int) -> int:
        nonlocal at
        at += size
        if at > len(iloc):
            raise ValueError("a HEIC file whose places of items are cut short")
        return int.from_bytes(iloc[at - size : at], "big")

    version = take(4) >> 24
    sizes = take(2)
    offset_bytes, size_bytes, base_bytes = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_bytes = sizes & 15 if version else 0
    if not size_bytes:
        raise ValueError("a HEIC file whose items have no length")
    number_bytes = 4 if version == 2 else 2
    items = take(number_bytes)
    if items > _MOST_PARTS:
        raise ValueError(f"a HEIC file of {items} items, expected at most {_MOST_PARTS}")
    for _ in range(items):
        take(number_bytes)
        is_elsewhere = bool(version and take(2) & 15)
        take(2)
        base = take(base_bytes)
        for _ in range(take(2)):
            take(index_bytes)
            start, size = base + take(offset_bytes), take(size_bytes)
            yield 0 if is_elsewhere else start + size, size


def extra_versions() -> dict[str, str]:
    """Return the versions of the packages of the extra ``formats`` that are installed."""
    found = {}
    for _, package in _NEEDS.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
