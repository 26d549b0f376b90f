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
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from struct import unpack, unpack_from
from typing import BinaryIO

from PIL import ImageFile

from packpipe.images.jpegxl import CODESTREAM, CONTAINER, JpegXLFile

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
    module, _ = _NEEDS[kind]
    if find_spec(module) is None:
        how = "pip install 'packpipe[formats]'"
        raise ModuleNotFoundError(f"{kind} needs the extra formats; {how}")
    if kind == "JPEG XL":
        file.seek(0)
        return JpegXLFile(file, "")
    from pillow_heif.as_plugin import HeifImageFile

    size = file.seek(0, os.SEEK_END)
    if size > _MOST_HEIC_BYTES:
        raise ValueError(f"{size} bytes, expected at most {_MOST_HEIC_BYTES} of a HEIC file")
    file.seek(0)
    opener: Callable[[BinaryIO, str], ImageFile.ImageFile] = HeifImageFile
    return opener(file, "")


def coded_hw(file: BinaryIO) -> tuple[int, int]:
    """Return the largest (height, width) that a HEIC file gives any image or tile in it.

    An image may be a small part of what is decoded. The decoder allocates no more than is said
    here, and refuses a stream that is larger. But it decodes a file that is cut with a hole where
    tiles are missing, and reads what stands in a file once as often as the file says.

    Raises:
        ValueError: the file is cut, or says more than a photograph does.
    """
    meta, end = _meta_of(file), file.seek(0, os.SEEK_END)
    extents = [extent for start in _ilocs(meta) for extent in _extents(meta, start)]
    last = max((at + size for at, size in extents if at is not None), default=0)
    if last > end:
        raise ValueError(f"a HEIC file cut to {end} bytes of {last}")
    total = sum(size or end for _, size in extents)
    if total > max(4 * end, _LEAST_EXTENTS):
        raise ValueError(f"a HEIC file of {end} bytes whose parts have {total}")
    parts = meta.split(b"ispe\0\0\0\0")[1:]
    found = (unpack(">II", part[:8])[::-1] for part in parts if len(part) >= 8)
    return max((hw for hw in found if all(hw)), default=(0, 0), key=math.prod)


def load_heic(image: ImageFile.ImageFile) -> None:
    """Decode the pixels; threads decode tiles, so which of their errors comes first is chance."""
    try:
        image.load()
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise ValueError("libheif cannot decode it") from error


def _meta_of(file: BinaryIO) -> bytes:
    """Return what the boxes hold that describe the items of a HEIC file."""
    at, end, found = 0, file.seek(0, os.SEEK_END), b""
    for _ in range(_MOST_BOXES):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return found
        size, name = unpack(">I4s", head[:8])
        start = at + 8
        if size == 1 and len(head) == 16:  # its length follows, in 64 bits
            (size,), start = unpack(">Q", head[8:]), at + 16
        size = size or end - at
        if name == b"meta":
            if size > _MOST_META_BYTES:
                raise ValueError(f"a HEIC file with {size} bytes of properties")
            file.seek(start)
            found += file.read(max(0, at + size - start))
        if size < 8:
            return found
        at += size
    raise ValueError(f"a HEIC file of more than {_MOST_BOXES} boxes")


def _ilocs(meta: bytes) -> Iterator[int]:
    """Yield where the boxes start that say where the items lie."""
    at = 4
    while at + 8 <= len(meta):
        size, name = unpack_from(">I4s", meta, at)
        if name == b"iloc":
            yield at + 8
        if size < 8:
            break
        at += size


def _extents(meta: bytes, at: int) -> Iterator[tuple[int | None, int]]:
    """Yield (start in the file, or None for one elsewhere, bytes) of every part of every item."""

    def take(size: int) -> int:
        nonlocal at
        at += size
        if at > len(meta):
            raise ValueError("a HEIC file whose places of items are cut short")
        return int.from_bytes(meta[at - size : at], "big")

    version = take(4) >> 24
    sizes = take(2)
    offset_bytes, size_bytes, base_bytes = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_bytes = sizes & 15 if version else 0
    if not size_bytes:
        raise ValueError("a HEIC file whose items have no length")
    number_bytes = 4 if version == 2 else 2
    for _ in range(take(number_bytes)):
        take(number_bytes)
        is_elsewhere = bool(version and take(2) & 15)
        take(2)
        base = take(base_bytes)
        for _ in range(take(2)):
            take(index_bytes)
            start, size = base + take(offset_bytes), take(size_bytes)
            yield None if is_elsewhere else start, size


def extra_versions() -> dict[str, str]:
    """Return the versions of the packages of the extra ``formats`` that are installed."""
    found = {}
    for _, package in _NEEDS.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
