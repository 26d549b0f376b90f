"""Reads the boxes of which HEIC and JPEG XL files consist.

A box says how long it is and what it is, and holds other boxes, or bytes. Source: ISO/IEC 14496-12.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import unpack
from typing import BinaryIO


def boxes(kind: str, file: BinaryIO, at: int, most: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each box from a place on, and where what it holds starts and ends.

    Both lie within the file, also where a box says otherwise.

    Raises:
        ValueError: there are more than most; the message begins with the kind of file.
    """
    whole = file.seek(0, 2)
    for _ in range(most):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return
        size, name = unpack(">I4s", head[:8])
        start = at + 8
        if size == 1 and len(head) == 16:  # its length follows, in 64 bits
            (size,), start = unpack(">Q", head[8:]), at + 16
        end = min(at + size, whole) if size else whole
        if end < start:
            return
        yield name, start, end
        at = end
    file.seek(at)
    if len(file.read(8)) == 8:
        raise ValueError(f"{kind} of more than {most} boxes")
