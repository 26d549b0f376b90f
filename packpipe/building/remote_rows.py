"""`RemoteRows`: rows whose tokens stay in a store, and are read from there when they are asked for.

In a file of rows, each record batch has its columns one after the other. Lists of one length, the
tokens, lie at a constant stride: row r of a column is one run of bytes. The other columns, the
segments, say what the rows hold; they are about a thousandth of the file. They are read once, batch
by batch: a request gets the segments of a batch, which lie at its end, with the head of the next
one, so a file takes one request a batch and one more, and no tokens are read. They are kept in a
file beside the manifest, with the places of the tokens. Row by row, a loader then asks for a run of
each column of tokens, and each byte comes once an epoch.

No checksum is of a single row. So the length of each run is checked, and that the segment numbers
that came are those of the row, which are others in most files that were put in place of this one.
Pixels that changed in a file that stayed are not noticed: `verify` compares all checksums.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.rows.computed import row_values
from packpipe.rows.files import CHECKSUM, write_table
from packpipe.rows.from_arrow import table_rows
from packpipe.rows.rows import Rows, gather
from packpipe.storage.reading import bytes_of
from packpipe.storage.storage import Storage

# Names of the files of segments, and of the column that says which row of the folder each is.
PREFIX = "segments-"
ROW = "packpipe_row"
# What the schema of such a file says of the tokens: their places, and the schema of their columns.
_KEY, _TOKENS = b"packpipe", b"packpipe_tokens"
# Bytes that are read beside what is asked for, which the head of the next batch usually lies in.
_AHEAD = 16 * 2**10
# Requests at once.
_AT_ONCE = 16
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
    reader = _Ahead(lambda start, stop: bytes_of(storage, name, start, stop), record["bytes"])
    try:
        found, tokens, batches, end = _read(reader)
        whole = end == record["bytes"] and found.num_rows == record["rows"]
    except (pa.ArrowException, struct.error, ValueError) as error:
        raise ConnectionError(_damaged(storage, name, str(error))) from error
    if not whole:
        what = f"{found.num_rows} rows in {end} bytes"
        raise ConnectionError(_damaged(storage, name, what))
    return found, tokens, batches


def _read(reader: _Ahead) -> tuple[pa.Table, pa.Schema, list[Stored], int]:
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


class _Ahead:
    """Reads a file from front to back, a little more than is asked for at a time."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self.size = read, size
        self._start, self._held = 0, b""

    def __call__(self, start: int, stop: int) -> bytes:
        if stop > self.size:
            raise ValueError(f"byte {stop - 1} of {self.size}")
        if not self._start <= start <= stop <= self._start + len(self._held):
            self._held = self._read(start, min(stop + _AHEAD, self.size))
            self._start = start
        return self._held[start - self._start : stop - self._start]


def _message(reader: _Ahead, position: int) -> tuple[bytes | None, int]:
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


def _damaged(storage: Storage, name: str, what: str) -> str:
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


@dataclass(frozen=True, eq=False)
class RemoteRows:
    """Reads the tokens of rows from a store: a transform of a `datasets.Dataset` of their segments.

    Attributes:
        storage: the folder.
        names: its files of rows.
        checksums: of the files, as their manifest has them.
        segments: the schema of the dataset.
        tokens: the schema of the columns that are not in it.
        batches: the record batches of each file.
    """

    storage: Storage
    names: tuple[str, ...]
    checksums: tuple[str, ...]
    segments: pa.Schema
    tokens: pa.Schema
    batches: tuple[list[Stored], ...]

    def rows(self, segments: pa.Table) -> Rows:
        """Return the rows of some segments, in memory of their own.

        Raises:
            ConnectionError: the store does not answer, or with other rows.
            FileNotFoundError: a file is not there any more.
        """
        rows = table_rows(self.table(segments))
        if not len(rows):
            return rows
        self._check(rows, segments)
        return gather([rows] * len(rows), range(len(rows)))

    def table(self, segments: pa.Table) -> pa.Table:
        """Return segments with their tokens, as a file of rows has them."""
        numbers = segments.column(ROW).to_numpy()
        runs = list(self._runs(numbers))
        asked = [(run, field.name) for field in self.tokens for run in runs]
        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(asked)))) as executor:
            found = executor.map(lambda one: self._read(*one), asked)
            parts = list(found)
        columns = {}
        for number, field in enumerate(self.tokens):
            values = parts[number * len(runs) : (number + 1) * len(runs)]
            columns[field.name] = _column(values, field.type)
        own = {name: segments.column(name) for name in segments.column_names if name != ROW}
        return pa.table(columns | own)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of packed rows: a NumPy array a row, its dtype kept."""
        if not batch.keys() >= set(self.segments.names):  # some were selected: nothing to read
            return batch
        # The transform gets plain Python values; the schema gives them back their types.
        columns = {name: batch[name] for name in self.segments.names}
        table = self.table(pa.table(columns, schema=self.segments))
        found = {name: list(map(row_values, table.column(name))) for name in table.column_names}
        return found | {name: batch[name] for name in batch.keys() - columns.keys()}

    @cached_property
    def _flat(self) -> list[tuple[str, Stored]]:
        """The record batches of all files, each with the name of its file."""
        each = zip(self.names, self.batches, strict=True)
        return list(chain.from_iterable(zip(repeat(name), some) for name, some in each))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(stored.num_rows for _, stored in self._flat)])

    def _runs(self, numbers: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Yield (record batch, first row in it, rows) of rows that lie one after the other."""
        batches = np.searchsorted(self._starts, numbers, side="right") - 1
        apart = (np.diff(numbers) != 1) | (np.diff(batches) != 0)
        bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(numbers)]
        for start, stop in pairwise(bounds):
            if start < stop:
                batch = int(batches[start])
                yield batch, int(numbers[start] - self._starts[batch]), stop - start

    def _read(self, run: tuple[int, int, int], column: str) -> NDArray[np.uint8]:
        """Return the values of a column in a run of rows, as bytes; of bools, a byte each."""
        batch, first, number = run
        name, stored = self._flat[batch]
        start, row_bits = stored.columns[column]
        bits = range(first * row_bits, (first + number) * row_bits)
        found = bytes_of(self.storage, name, start + bits.start // 8, start - (-bits.stop // 8))
        values = np.frombuffer(found, np.uint8)
        if not pa.types.is_boolean(self.tokens.field(column).type.value_type):
            return values
        skipped = bits.start % 8
        return np.unpackbits(values, bitorder="little")[skipped : skipped + len(bits)]

    def _check(self, rows: Rows, segments: pa.Table) -> None:
        """Raise ConnectionError unless segment_ids are those of the rows."""
        held = np.diff(
            np.concatenate([[0], np.cumsum(rows.seq_lens, dtype=np.int64)])[rows.offsets]
        )
        ids = rows.segment_ids
        real = np.arange(ids.shape[1]) < held[:, None]
        expected = np.zeros_like(ids)
        expected[real] = np.repeat(rows.numbers + 1, rows.seq_lens)
        wrong = np.flatnonzero((ids != expected).any(axis=1))
        if len(wrong):
            number = segments.column(ROW)[int(wrong[0])].as_py()
            batch = int(np.searchsorted(self._starts, number, side="right")) - 1
            what = f"another than row {number} of the folder"
            raise ConnectionError(_damaged(self.storage, self._flat[batch][0], what))


def remote_rows(
    storage: Storage, records: dict[str, Any], paths: list[Path], schema: pa.Schema
) -> RemoteRows:
    """Return what reads the tokens of a folder.

    Args:
        storage: the folder.
        records: its files of rows, in order, with what the manifest says of each.
        paths: of the files that `write_segments` has written, in the same order.
        schema: of the dataset of segments.
    """
    known = [pa.ipc.open_stream(pa.memory_map(str(path))).schema for path in paths]
    tokens = pa.ipc.read_schema(pa.py_buffer(known[0].metadata[_TOKENS]))
    return RemoteRows(
        storage,
        tuple(records),
        tuple(record[CHECKSUM] for record in records.values()),
        schema,
        tokens,
        tuple(list(map(_stored, json.loads(one.metadata[_KEY]))) for one in known),
    )


def _stored(found: list[Any]) -> Stored:
    num_rows, columns = found
    return Stored(num_rows, {name: Column(*place) for name, place in columns.items()})


def _column(parts: list[NDArray[np.uint8]], kind: pa.DataType) -> pa.Array:
    """Return rows of a column of tokens of their bytes; of bools, of a byte each."""
    joined = np.concatenate([np.empty(0, np.uint8), *parts])
    inner = kind.value_type
    values = pa.array(
        joined.view(np.bool_ if pa.types.is_boolean(inner) else inner.to_pandas_dtype())
    )
    return pa.FixedSizeListArray.from_arrays(values, type=kind)
