"""Opens HEIC and JPEG XL files, with the packages of the extra ``formats``.

The packages are imported when the first such file is opened, in the process that opens it: those
that decode need not be told. Nothing is registered with Pillow but what `pillow_jxl` registers
itself when it is imported.

What `pillow-heif` makes of HEIC: upright by its own properties (irot, imir), after which its EXIF
does not count; the primary image alone; 10 and 12 bits of colour lose the lower ones, grey keeps
them; premultiplied colours are marked. JPEG XL: see `jpegxl`. AVIF is Pillow's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from struct import unpack
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
    here, and refuses a stream that is larger.
    """
    at, largest = 0, (0, 0)
    for _ in range(_MOST_BOXES):
        file.seek(at)
        head = file.read(8)
        size, name = unpack(">I4s", head) if len(head) == 8 else (0, b"")
        if name == b"meta":
            parts = file.read(min(size, _MOST_META_BYTES)).split(b"ispe\0\0\0\0")
            found = (unpack(">II", part[:8])[::-1] for part in parts[1:] if len(part) >= 8)
            largest = max(found, default=largest, key=math.prod)
        if size < 8:
            break
        at += size
    return largest


def extra_versions() -> dict[str, str]:
    """Return the versions of the packages of the extra ``formats`` that are installed."""
    found = {}
    for _, package in _NEEDS.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
