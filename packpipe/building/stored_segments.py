"""Reads the columns of segments of a file of rows in a store, and keeps them in a file here.

In a file of rows, each record batch has its columns one after the other. Lists of one length, the
tokens, lie at a constant stride: row r of a column is one run of bytes. The other columns, the
segments, say what the rows hold; they are about a thousandth of the file. They are read once, batch
by batch: a request gets the segments of a batch, which lie at its end, with the head of the next
one, so a file takes one request a batch and one more, and no tokens are read. They are kept in a
file beside the manifest, with the places of the tokens.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from packpipe import checks
from packpipe.rows.files import write_table
from packpipe.storage.reading import bytes_of
from packpipe.storage.storage import Storage

# Names of the files of segments, and of the column that says which row of the folder each is.
PREFIX = "segments-"
ROW = "packpipe_row"
# What the schema of such a file says of the tokens: their places, and the schema of their columns.
_KEY, _TOKENS = b"packpipe", b"packpipe_tokens"
# Bytes that are read beside what is asked for, which the head of the next batch usually lies in.
_AHEAD = 16 * 2**10
# Where a message of Arrow's begins, and the body's length in its table of fields.
_CONTINUES, _BODY = -1, 10


class Column(NamedTuple):
    """A column of tokens of a record batch: where its first row begins, and bits a row."""

    start: int
    row_bits: int


class Stored(NamedTuple):
    """A record batch of a file: how many rows it has, and its columns of tokens."""

    num_rows: int
    columns: dict[str, Column]


def segments_of(
    storage: Storage, name: str, record: dict[str, Any]
) -> tuple[pa.Table, pa.Schema, list[Stored]]:
    """Return the columns of segments of a file in a store, and which the others are, and where.

    Raises:
        ConnectionError, FileNotFoundError: as of `bytes_of`; or the file is not what its record
            says.
    """
    reader = ReadAhead(lambda start, stop: bytes_of(storage, name, start, stop), record["bytes"])
    try:
        found, tokens, batches, end = _read(reader)
        whole = end == record["bytes"] and found.num_rows == record["rows"]
    except (pa.ArrowException, struct.error, ValueError) as error:
        raise ConnectionError(damaged(storage, name, str(error))) from error
    if not whole:
        what = f"{found.num_rows} rows in {end} bytes"
        raise ConnectionError(damaged(storage, name, what))
    return found, tokens, batches


def _read(reader: ReadAhead) -> tuple[pa.Table, pa.Schema, list[Stored], int]:
    head, _ = _message(reader, 0)
    if head is None:
        raise ValueError("no schema")
    schema = pa.ipc.read_schema(pa.py_buffer(head))
    fixed = [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
    others = [name for name in schema.names if name not in fixed]
    tables, batches, position = [], [], len(head)
    while True:
        head, body = _message(reader, position)
        if head is None:  # the end of the stream
            break
        start = position + len(head)
        # The body as far as it is read: the columns of tokens are zeros that no memory is used for.
        memory = np.zeros(len(head) + body, np.uint8)
        memory[: len(head)] = np.frombuffer(head, np.uint8)
        buffer = pa.py_buffer(memory)
        message = pa.ipc.read_message(pa.BufferReader(buffer))
        batch = pa.ipc.read_record_batch(message, schema)
        rows, first = batch.num_rows, buffer.address + len(head)
        columns, tail = {}, 0
        for column in fixed:
            kind, values = schema.field(column).type, batch.column(column).buffers()[-1]
            size = kind.list_size * kind.value_type.bit_width
            place = values.address - first if values is not None and values.size else 0
            columns[column] = Column(start + place, size)
            tail = max(tail, place + -(-rows * size // 8))
        # Arrow has not copied: what comes into this memory now are the columns of segments.
        memory[len(head) + tail :] = np.frombuffer(reader(start + tail, start + body), np.uint8)
        tables.append(pa.Table.from_batches([batch]).select(others))
        batches.append(Stored(rows, columns))
        position = start + body
    empty = schema.empty_table().select(others)
    tokens = pa.schema([schema.field(name) for name in fixed])
    return pa.concat_tables([empty, *tables]), tokens, batches, position + 8


class ReadAhead:
    """Reads a file from front to back, a little more than is asked for at a time."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self.size = read, size
        self._start, self._held = 0, b""

    def __call__(self, start: int, stop: int) -> bytes:
        """Return the bytes start..stop - 1."""
        if stop > self.size:
            raise ValueError(f"byte {stop - 1} of {self.size}")
        if not self._start <= start <= stop <= self._start + len(self._held):
            self._held = self._read(start, min(stop + _AHEAD, self.size))
            self._start = start
        return self._held[start - self._start : stop - self._start]


def _message(reader: ReadAhead, position: int) -> tuple[bytes | None, int]:
    """Return the head of a message of Arrow's and the bytes of its body; None at the end.

    Source: Arrow columnar format, encapsulated messages; flatbuffers internals.
    """
    mark, length = struct.unpack("<iI", reader(position, position + 8))
    if mark != _CONTINUES:
        raise ValueError(f"no message at byte {position}")
    if not length:
        return None, 0
    head = reader(position, position + 8 + length)
    table = 8 + struct.unpack_from("<I", head, 8)[0]
    fields = table - struct.unpack_from("<i", head, table)[0]
    known = struct.unpack_from("<H", head, fields)[0] > _BODY
    place = struct.unpack_from("<H", head, fields + _BODY)[0] if known else 0
    return head, struct.unpack_from("<q", head, table + place)[0] if place else 0


def damaged(storage: Storage, name: str, what: str) -> str:
    """Return the message of a file that is not what its manifest says."""
    expected, remedy = "the rows of its manifest", "copy or pack the folder again"
    return checks.sentence(f"{storage.url}/{name}", what, expected, remedy)


def write_segments(
    storage: Storage, name: str, record: dict[str, Any], first: int, path: Path
) -> None:
    """Write what `segments_of` returns to a file, unless it is there.

    Args:
        storage: the folder.
        name: of a file in it.
        record: what the manifest says of it.
        first: number of its first row in the folder.
        path: of the file to write.
    """
    if path.exists():
        return
    found, tokens, batches = segments_of(storage, name, record)
    numbers = pa.array(np.arange(first, first + found.num_rows))
    # In the schema, since a file is mapped: what is not looked at takes no memory.
    known = {_KEY: json.dumps(batches).encode(), _TOKENS: tokens.serialize().to_pybytes()}
    known |= found.schema.metadata or {}
    found = found.append_column(ROW, numbers).replace_schema_metadata(known)
    write_table(path, found.schema, [found])


class KeptSegments(NamedTuple):
    """What `write_segments` has written beside the segments.

    Attributes:
        tokens: the schema of the columns that are not in the file.
        batches: the record batches of the file in the store.
    """

    tokens: pa.Schema
    batches: list[Stored]


def kept_segments(path: Path) -> KeptSegments:
    """Return where the tokens are of the segments in a file that `write_segments` has written."""
    metadata = pa.ipc.open_stream(pa.memory_map(str(path))).schema.metadata
    tokens = pa.ipc.read_schema(pa.py_buffer(metadata[_TOKENS]))
    return KeptSegments(tokens, list(map(_stored, json.loads(metadata[_KEY]))))


def _stored(found: list[Any]) -> Stored:
    num_rows, columns = found
    return Stored(num_rows, {name: Column(*place) for name, place in columns.items()})
