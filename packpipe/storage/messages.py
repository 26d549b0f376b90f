"""Reads the messages of an Arrow stream from front to back, or their heads alone."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

# Bytes that are read beside what is asked for, which the head of the next message usually lies in.
_AHEAD = 16 * 2**10
# Where a message begins, and places in tables of fields: of a message its kind, its contents and
# the length of its body, of a record batch its rows.
_CONTINUES, _KIND, _CONTENTS, _BODY, _ROWS = -1, 6, 8, 10, 4
# Kinds of messages.
DICTIONARY_BATCH, RECORD_BATCH = 2, 3


class ReadAhead:
    """Reads a file from front to back, a little more than is asked for at a time."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self.size = read, size
        self._start, self._held = 0, b""

    def __call__(self, start: int, stop: int) -> bytes:
        """Return the bytes start..stop - 1."""
        if stop > self.size:
            raise ValueError(f"it ends at byte {self.size}, and byte {stop - 1} is missing")
        if not self._start <= start <= stop <= self._start + len(self._held):
            self._held = self._read(start, min(stop + _AHEAD, self.size))
            self._start = start
        return self._held[start - self._start : stop - self._start]


class Head(NamedTuple):
    """What stands before the body of a message.

    Attributes:
        content: its bytes.
        body: bytes of the body.
        kind: DICTIONARY_BATCH, RECORD_BATCH or another one.
        num_rows: of a record batch; else 0.
    """

    content: bytes
    body: int
    kind: int
    num_rows: int


def head_at(reader: ReadAhead, position: int) -> Head | None:
    """Return the head of the message at a place of a stream; None at the end.

    Raises:
        ValueError, struct.error: there is no message, or one of less than no bytes or rows.

    Source: Arrow columnar format, encapsulated messages; flatbuffers internals.
    """
    mark, length = struct.unpack("<iI", reader(position, position + 8))
    if mark != _CONTINUES:
        raise ValueError(f"no message at byte {position}")
    if not length:
        return None
    content = reader(position, position + 8 + length)
    table = 8 + struct.unpack_from("<I", content, 8)[0]
    kind, body = _number(content, table, _KIND, "<B"), _number(content, table, _BODY, "<q")
    num_rows = 0
    if kind == RECORD_BATCH:
        place = table + _field(content, table, _CONTENTS)
        batch = place + struct.unpack_from("<I", content, place)[0]
        num_rows = _number(content, batch, _ROWS, "<q")
    if body < 0 or num_rows < 0:  # what goes on behind the body would never end
        raise ValueError(f"a message of {body} bytes and {num_rows} rows at byte {position}")
    return Head(content, body, kind, num_rows)


def _field(content: bytes, table: int, field: int) -> int:
    """Return where a field of a table lies, from the table's beginning; 0 if it has its default."""
    fields = table - struct.unpack_from("<i", content, table)[0]
    known = struct.unpack_from("<H", content, fields)[0] > field
    return struct.unpack_from("<H", content, fields + field)[0] if known else 0


def _number(content: bytes, table: int, field: int, kind: str) -> int:
    place = _field(content, table, field)
    return int(struct.unpack_from(kind, content, table + place)[0]) if place else 0
