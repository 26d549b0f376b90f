"""Reads the boxes of which HEIC, AVIF, JPEG XL and JPEG 2000 files consist.

A box says how long it is and what it is, and holds other boxes, or bytes. Source: ISO/IEC 14496-12.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import unpack
from typing import BinaryIO

# Where AVIF and JPEG 2000 files describe their images: boxes by the one that holds them.
_WITHIN = {
    b"": (b"meta", b"moov", b"jp2h"),
    b"moov": (b"trak",),
    b"trak": (b"meta",),
    b"meta": (b"iprp",),
    b"iprp": (b"ipco",),
}
# The fewest bytes in which a box names an item: its entry, place, reference and properties.
_ITEM_BYTES = {b"iinf": 16, b"iloc": 6, b"iref": 2, b"ipma": 3}
_MOST_BOXES = 2**14  # in a box
# Items for which boxes of one kind have room. libavif looks through all items for each that is
# named: where each of the four kinds names others, it took 1.2 s of a processor, and 4.8 s with
# room for twice as many. A photograph of 2,500 tiles has room for 5,837.
_MOST_ITEMS = 2**13


def boxes(
    kind: str, file: BinaryIO, at: int, most: int, end: int | None = None
) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each box from a place on, and where what it holds starts and ends.

    Both lie within the file, also where a box says otherwise.

    Args:
        kind: of file, for the message.
        file: an open file; its position is changed.
        at: where the first box starts.
        most: boxes that there may be.
        end: where the last one ends; None for the end of the file.

    Raises:
        ValueError: there are more than most; the message begins with the kind of file.
    """
    whole = file.seek(0, 2) if end is None else end
    for _ in range(most):
        file.seek(at)
        head = file.read(min(16, whole - at))
        if len(head) < 8:
            return
        size, name = unpack(">I4s", head[:8])
        start = at + 8
        if size == 1 and len(head) == 16:  # its length follows, in 64 bits
            (size,), start = unpack(">Q", head[8:]), at + 16
        stop = min(at + size, whole) if size else whole
        if stop < start:
            return
        yield name, start, stop
        at = stop
    if whole - at >= 8:
        raise ValueError(f"{kind} of more than {most} boxes")


def check_items(kind: str, file: BinaryIO) -> None:
    """Check that a file names no more items than a decoder goes through in a moment.

    Args:
        kind: of file, for the message: AVIF or JPEG 2000.
        file: an open file; its position is changed.

    Raises:
        ValueError: it has room for more, or has more boxes in a box.
    """
    # Boxes of different kinds usually name the same items.
    items = dict.fromkeys(_ITEM_BYTES, 0)
    for name, number in _rooms(kind, file, b"", 0, None):
        items[name] += number
    name = max(items, key=items.__getitem__)
    if items[name] > _MOST_ITEMS:
        what = f"{kind} with room for {items[name]} items in {name.decode()!r}"
        raise ValueError(f"{what}, expected at most {_MOST_ITEMS}")


def _rooms(
    kind: str, file: BinaryIO, name: bytes, at: int, end: int | None
) -> Iterator[tuple[bytes, int]]:
    """Yield each box within one that names items, and how many fit into its bytes."""
    for inner, start, stop in boxes(kind, file, at, _MOST_BOXES, end):
        if inner in _ITEM_BYTES:
            yield inner, (stop - start) // _ITEM_BYTES[inner]
        elif inner in _WITHIN.get(name, ()):
            # After version and flags.
            yield from _rooms(kind, file, inner, start + 4 * (inner == b"meta"), stop)
