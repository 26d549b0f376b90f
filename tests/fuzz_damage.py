"""Damage files by seed and number: anywhere in them, or within what their format is made of."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np
from fuzz_seeds import png_of, seeds

T = TypeVar("T")
LARGEST = 2**18  # bytes of a case
corpus = cache(seeds)

SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 255, 256, 500, 1999, 2000, 2001, 4000, 65535)
NUMBERS = (*SIZES, 32, 127, 128, 129, 32767, 32768, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
TIFF_TAGS = (
    *(254, 256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 282, 284, 292, 293, 297),
    *(317, 320, 322, 323, 324, 325, 330, 332, 333, 338, 339, 347, 512, 513, 514, 529, 530, 531),
    *(532, 700, 34665, 34675, 34377, 33723, 37439),
)
TIFF_VALUES = {
    258: (1, 2, 4, 8, 10, 12, 14, 16, 24, 32, 64),
    259: (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32809, 32946, 34661, 34676, 34887, 34925, 50000, 50001),
    262: (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 32803, 32844, 32845),
    274: range(10),
    277: (0, 1, 2, 3, 4, 5, 6, 255),
    284: (0, 1, 2, 3),
    317: (0, 1, 2, 3, 34892),
    338: range(5),
    339: range(7),
}
# Where the numbers stand in the named parts of a file: (offset, bytes).
FIELDS = {
    b"IHDR": ((0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1)),
    b"fcTL": ((0, 4), (4, 4), (8, 4), (12, 4), (16, 4), (24, 1), (25, 1)),
    b"acTL": ((0, 4), (4, 4)),
    b"VP8X": ((0, 1), (4, 3), (7, 3)),
    b"VP8 ": ((0, 3), (6, 2), (8, 2)),
    b"VP8L": ((1, 4), (0, 1)),
    b"ANMF": ((0, 3), (3, 3), (6, 3), (9, 3), (15, 1), (20, 4)),
    **{
        bytes([0xFF, 0xC0 + kind]): ((0, 1), (1, 2), (3, 2), (5, 1), (7, 1), (10, 1), (13, 1))
        for kind in (0, 1, 2)
    },
    b"\xff\xda": ((0, 1), (1, 1), (2, 1), (3, 1), (7, 1), (8, 1), (9, 1)),
}


# The same in the boxes of HEIC and AVIF files.
BOXES = {
    b"ispe": ((4, 4), (8, 4)),
    b"clap": tuple((at, 4) for at in range(0, 32, 4)),
    b"irot": ((0, 1),),
    b"pitm": ((4, 2),),
    b"iloc": ((4, 1), (5, 1), (6, 2), *((at, 2) for at in range(8, 40, 2))),
    b"ipma": tuple((at, 1) for at in range(4, 24)),
    b"hvcC": tuple((at, 1) for at in range(23)),
}


class Dice:
    """Choices that follow from numbers alone."""

    def __init__(self, *key: int) -> None:
        self._rng = np.random.default_rng(key)

    def below(self, end: int) -> int:
        return int(self._rng.integers(end)) if end > 0 else 0

    def pick(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def place(self, size: int) -> int:
        """A place in a file; every second one in its header."""
        return self.below(min(size, self.pick((32, 128, 600, size, size, size))))

    def span(self, size: int) -> slice:
        start = self.place(size)
        return slice(start, start + 1 + self.below(self.pick((4, 64, size - start))))

    def bytes(self, size: int) -> bytes:
        return self._rng.bytes(size)

    def number(self, size: int, values: Sequence[int] = NUMBERS) -> bytes:
        return (self.pick(values) % 256**size).to_bytes(size, self.pick(("little", "big")))


def flipped(data: bytes, _: bytes, dice: Dice) -> bytes:
    found = bytearray(data)
    for _bit in range(1 + dice.below(dice.pick((1, 4, 16)))):
        found[dice.place(len(found))] ^= 1 << dice.below(8)
    return bytes(found)


def overwritten(data: bytes, _: bytes, dice: Dice) -> bytes:
    found, size = bytearray(data), dice.pick((1, 1, 2, 2, 3, 4, 4, 8))
    start = dice.place(len(found))
    found[start : start + size] = dice.pick(
        (b"\0" * size, b"\xff" * size, b"\x7f" * size, b"\x80" * size, dice.number(size))
    )
    return bytes(found)


def truncated(data: bytes, _: bytes, dice: Dice) -> bytes:
    return data[: dice.place(len(data))]


def extended(data: bytes, other: bytes, dice: Dice) -> bytes:
    return data + dice.pick((bytes(1000), dice.bytes(1 + dice.below(300)), other))


def spliced(data: bytes, other: bytes, dice: Dice) -> bytes:
    start = dice.place(len(data))
    return data[:start] + other[dice.pick((start, dice.place(len(other)))) :]


def deleted(data: bytes, _: bytes, dice: Dice) -> bytes:
    span = dice.span(len(data))
    return data[: span.start] + data[span.stop :]


def duplicated(data: bytes, _: bytes, dice: Dice) -> bytes:
    span = dice.span(len(data))
    return (
        data[: span.stop]
        + data[span.start : span.stop] * dice.pick((1, 1, 2, 50))
        + data[span.stop :]
    )


Parts = list[tuple[bytes, bytes]]


def parts_of(data: bytes) -> tuple[str, Parts] | None:
    """Return a file's parts, each a name and what it holds, if its format is known by parts."""
    parts: Parts = []
    if data.startswith(b"\x89PNG"):
        at = 8
        while at + 8 <= len(data):
            length = int.from_bytes(data[at : at + 4], "big")
            parts.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
            at += 12 + length
        return "PNG", parts
    if data.startswith(b"RIFF"):
        at = 12
        while at + 8 <= len(data):
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            parts.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
            at += 8 + length + length % 2
        return "WEBP", parts
    if data.startswith(b"\xff\xd8"):
        at = 2
        while (
            at + 4 <= len(data) and data[at] == 0xFF and (not parts or parts[-1][0] != b"\xff\xda")
        ):
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            parts.append((data[at : at + 2], data[at + 4 : at + 2 + length]))
            at += 2 + length
        return "JPEG", [*parts, (b"", data[at:])]
    return None


def joined(kind: str, parts: Parts) -> bytes:
    """Return the file of some parts, all lengths and checksums right."""
    if kind == "PNG":
        return png_of(parts)
    if kind == "JPEG":
        body = (name and name + struct.pack(">H", len(held) % 65534 + 2) for name, held in parts)
        return b"\xff\xd8" + b"".join(
            head + held for head, (_, held) in zip(body, parts, strict=True)
        )
    body = (
        name + struct.pack("<I", len(held)) + held + bytes(len(held) % 2) for name, held in parts
    )
    pieces = b"".join(body)
    return b"RIFF" + struct.pack("<I", len(pieces) + 4) + b"WEBP" + pieces


def rebuilt(data: bytes, other: bytes, dice: Dice) -> bytes:
    """Change what a file's own structure holds, and keep the structure right."""
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _with_other_entry(data, dice)
    if data[4:8] == b"ftyp":
        return _with_other_box(data, other, dice)
    found = parts_of(data)
    if found is None or not found[1]:
        return overwritten(data, other, dice)
    kind, parts = found
    chosen = dice.below(len(parts))
    name, held = parts[chosen]
    change = dice.pick(("field", "field", "field", "damage", "drop", "repeat", "move", "borrow"))
    if change == "field":
        start, size = dice.pick(FIELDS.get(name, ((dice.place(len(held)), dice.pick((1, 2, 4))),)))
        packed = dice.number(size, dice.pick((SIZES, NUMBERS)))
        parts[chosen] = name, held[:start] + packed + held[start + size :]
    elif change == "damage" and held:
        parts[chosen] = name, dice.pick(CHANGES[:9])(held, other or held, dice)
    elif change == "drop":
        del parts[chosen]
    elif change == "repeat":
        parts.insert(chosen, parts[chosen])
    elif change == "move":
        parts.insert(dice.below(len(parts)), parts.pop(chosen))
    else:
        borrowed = parts_of(other)
        parts.insert(chosen, dice.pick(borrowed[1] if borrowed and borrowed[1] else parts))
    return joined(kind, parts)


def _with_other_entry(data: bytes, dice: Dice) -> bytes:
    """Change a number of one of a TIFF's directory entries."""
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(order + "I", data.ljust(8, b"\0"), 4)
    head = data[directory : directory + 2]
    if len(head) < 2:
        return data[:4] + struct.pack(order + "I", 8) + data[8:]
    at = directory + 2 + 12 * dice.below(struct.unpack(order + "H", head)[0])
    entry = data[at : at + 12]
    if len(entry) < 12:
        return overwritten(data, b"", dice)
    tag, kind, count, value = struct.unpack(order + "HHII", entry)
    packed = entry[8:]
    change = dice.pick(("tag", "kind", "count", "value", "value", "value", "value"))
    if change == "tag":
        tag = dice.pick(TIFF_TAGS)
    elif change == "kind":
        kind = dice.below(20)
    elif change == "count":
        count = dice.pick(NUMBERS) % 2**32
    else:
        value = dice.pick(TIFF_VALUES.get(tag, dice.pick((SIZES, NUMBERS)))) % 2**32
        short = kind in (3, 8) and count == 1
        packed = struct.pack(
            order + ("HH" if short else "I"), *([value % 2**16, 0] if short else [value])
        )
    return data[:at] + struct.pack(order + "HHI", tag, kind, count) + packed + data[at + 12 :]


def _with_other_box(data: bytes, other: bytes, dice: Dice) -> bytes:
    """Change a number of one of the boxes of a HEIC or AVIF file."""
    names = [name for name in BOXES if name in data]
    if not names:
        return overwritten(data, other, dice)
    name = dice.pick(names)
    place, size = dice.pick(BOXES[name])
    start = data.index(name) + len(name) + place
    return data[:start] + dice.number(size) + data[start + size :]


CHANGES = (
    *(
        flipped,
        flipped,
        overwritten,
        overwritten,
        truncated,
        extended,
        spliced,
        deleted,
        duplicated,
    ),
    *(rebuilt, rebuilt, rebuilt, rebuilt, rebuilt, rebuilt),
)


@cache
def _names() -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of all files, and those of each format."""
    by_format: dict[str, list[str]] = {}
    for name in corpus():
        by_format.setdefault(name.split()[0], []).append(name)
    return list(corpus()), by_format


def damaged(seed: int, case: int) -> tuple[str, bytes, list[str]]:
    """Return (the undamaged file's name, a case, what was done); the first cases are undamaged."""
    files = corpus()
    names, by_format = _names()
    if case < len(names):
        return names[case], files[names[case]], []
    dice = Dice(seed, case)
    name = dice.pick(names)
    data, done = files[name], []
    like = by_format[name.split()[0]]
    for _ in range(dice.pick((1, 1, 1, 2, 3, 5))):
        other = files[dice.pick(dice.pick((like, names)))]
        change = dice.pick(CHANGES)
        data = change(data, other, dice)[:LARGEST] if data else b""
        done.append(change.__name__)
    return name, data, done
