"""Reads the columns of segments of a file of rows in a store, and keeps them in a file here.

In a file of rows, each record batch has its columns one after the other. Lists of one length, the
tokens, lie at a constant stride: row r of a column is one run of bytes. The other columns, the
segments, say what the rows hold; they are about a thousandth of the file. They are read once, batch
by batch: a request gets the segments of a batch, which lie at its end, with the head of the next
one, so a file takes one request a batch and one more, and no tokens are read. They are kept in a
file beside the manifest, with the places of the tokens.

A manifest has checksums of whole files, and these bytes are a part of one. So only what does not
fit together is found: lists of other lengths than the others, more tokens than a row has. Labels,
sizes and other values are what the store has answered.

Of rows of encoded images the images are what is not read. They are one buffer of a batch, between
the segments; the place of each in the file is kept in a column of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from packpipe import checks
from packpipe.rows.encoded import COLUMNS, IMAGES
from packpipe.rows.files import write_table
from packpipe.rows.own_columns import PLACES, ROW, has_labels, is_of_segments, own_segments
from packpipe.rows.text import joined
from packpipe.storage.messages import ReadAhead, head_at
from packpipe.storage.reading import bytes_of, version_of
from packpipe.storage.storage import Storage

# Seconds that a file is taken for the same, once its store has said so.
_CHECKED_FOR = 60.0
# How the names of the files of segments begin.
_PREFIX = "segments-"
# The type of `PLACES`.
_PLACES = pa.list_(pa.list_(pa.int64(), 2))
# What the schema of such a file says of the tokens: their places, and the schema of their columns.
_KEY, _TOKENS = b"packpipe", b"packpipe_tokens"


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
        _check(found, tokens)
    except (pa.ArrowException, struct.error, ValueError) as error:
        raise ConnectionError(damaged(storage, name, str(error))) from error
    if not whole:
        what = f"{found.num_rows} rows in {end} bytes"
        raise ConnectionError(damaged(storage, name, what))
    return found, tokens, batches


def _read(reader: ReadAhead) -> tuple[pa.Table, pa.Schema, list[Stored], int]:
    opening = head_at(reader, 0)
    if opening is None:
        raise ValueError("no schema")
    schema = pa.ipc.read_schema(pa.py_buffer(opening.content))
    fixed = [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
    others = [name for name in schema.names if name not in (*fixed, IMAGES)]
    tables, batches, position = [], [], len(opening.content)
    while (message_head := head_at(reader, position)) is not None:
        head, body = message_head.content, message_head.body
        start = position + len(head)
        # The body as far as it is read: what is not read are zeros that no memory is used for.
        memory = np.zeros(len(head) + body, np.uint8)
        memory[: len(head)] = np.frombuffer(head, np.uint8)
        buffer = pa.py_buffer(memory)
        message = pa.ipc.read_message(pa.BufferReader(buffer))
        batch = pa.ipc.read_record_batch(message, schema)
        rows, first = batch.num_rows, buffer.address + len(head)
        columns, left_out = {}, range(0)
        for column in fixed:
            kind, values = schema.field(column).type, batch.column(column).buffers()[-1]
            size = kind.list_size * kind.value_type.bit_width
            place = values.address - first if values is not None and values.size else 0
            columns[column] = Column(start + place, size)
            left_out = range(max(left_out.stop, place + -(-rows * size // 8)))
        if IMAGES in schema.names:
            values = batch.column(IMAGES).buffers()[-1]
            if values is not None and values.size:
                left_out = range(values.address - first, values.address - first + values.size)
        # Arrow has not copied: what comes into this memory now are the columns of segments.
        for part in (range(left_out.start), range(left_out.stop, body)):
            if part:
                found = reader(start + part.start, start + part.stop)
                memory[len(head) :][part.start : part.stop] = np.frombuffer(found, np.uint8)
        table = pa.Table.from_batches([batch]).select(others)
        if IMAGES in schema.names:
            places = _places(batch.column(IMAGES), start + left_out.start, len(left_out))
            table = table.append_column(PLACES, places)
        tables.append(table)
        batches.append(Stored(rows, columns))
        position = start + body
    empty = schema.empty_table().select(others)
    if IMAGES in schema.names:
        empty = empty.append_column(PLACES, pa.array([], _PLACES))
    tokens = pa.schema([schema.field(name) for name in fixed])
    return pa.concat_tables([empty, *tables]), tokens, batches, position + 8


def _places(images: pa.ListArray, start: int, size: int) -> pa.ListArray:
    """Return where the images of a batch lie, given the place and the bytes of them all.

    Raises:
        ValueError: one lies elsewhere.
    """
    images.validate()  # of lists alone: the images are not there
    flat = images.flatten()
    ends = np.frombuffer(flat.buffers()[1], np.int64, len(flat) + 1, 8 * flat.offset)
    lens = np.diff(ends)
    if len(flat) and (lens.min() < 0 or ends[0] < 0 or ends[-1] > size):
        raise ValueError("images outside of their column")
    places = pa.array(np.stack([start + ends[:-1], lens], axis=1).ravel())
    pairs = pa.FixedSizeListArray.from_arrays(places, 2)
    offsets = np.cumsum([0, *images.value_lengths().to_numpy()])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pairs).cast(_PLACES)


def _check(found: pa.Table, tokens: pa.Schema) -> None:
    """Raise ValueError if columns of segments do not belong together."""
    found.validate(full=True)
    has_labels(found)  # raises if they are not one a segment
    for name in (*own_segments(found.schema), *({PLACES, *COLUMNS} & {*found.column_names})):
        if not is_of_segments(found, name):
            raise ValueError(f"lists in {name!r} of other lengths than seq_lens")
    lists = joined(found.column("seq_lens"))
    lens = lists.flatten().to_numpy()
    rows = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    most = tokens.field("segment_ids").type.list_size if "segment_ids" in tokens.names else 2**62
    if lens.min(initial=1) < 1 or np.bincount(rows, lens).max(initial=0) > most:
        raise ValueError(f"seq_lens of more than the {most} tokens of a row, or of none")


def damaged(storage: Storage, name: str, what: str) -> str:
    """Return the message of a file that is not what its manifest says."""
    expected, remedy = "the rows of its manifest", "copy or pack the folder again"
    return checks.sentence(f"{storage.url}/{name}", what, expected, remedy)


def segments_path(storage: Storage, name: str, version: str, folder: Path) -> Path:
    """Return where the segments of a version of a file are kept, in the folder of a copy."""
    digest = hashlib.sha256(f"{storage.url}/{name} {version}".encode()).hexdigest()[:16]
    return folder / f"{_PREFIX}{digest}-{name}"


def write_segments(
    storage: Storage, name: str, record: dict[str, Any], first: int, version: str, path: Path
) -> None:
    """Write what `segments_of` returns to a file, unless it is there.

    Args:
        storage: the folder.
        name: of a file in it.
        record: what the manifest says of it.
        first: number of its first row in the folder.
        version: of the file.
        path: of the file to write.

    Raises:
        ConnectionError, FileNotFoundError: as of `segments_of`; or the file was replaced meanwhile.
    """
    if path.exists():
        return
    found, tokens, batches = segments_of(storage, name, record)
    check_version(storage, name, version)
    numbers = pa.array(np.arange(first, first + found.num_rows))
    # In the schema, since a file is mapped: what is not looked at takes no memory.
    known = {_KEY: json.dumps(batches).encode(), _TOKENS: tokens.serialize().to_pybytes()}
    known |= found.schema.metadata or {}
    found = found.append_column(ROW, numbers).replace_schema_metadata(known)
    write_table(path, found.schema, [found])


def check_version(storage: Storage, name: str, version: str) -> None:
    """Raise ConnectionError if a file was replaced since it had a version."""
    found = version_of(storage, name)
    if found != version:
        what = f"version of {storage.url}/{name}"
        remedy = "it was replaced since: open the folder again"
        raise ConnectionError(checks.sentence(what, found, repr(version), remedy))


@dataclass(frozen=True, eq=False)
class Versions:
    """The versions of files whose segments are here, compared with the store's now and then.

    Attributes:
        storage: the folder.
        known: the version of each file.
    """

    storage: Storage
    known: dict[str, str]
    _checked: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def check(self, name: str) -> None:
        """Raise ConnectionError if a file was replaced, unless that was asked a short time ago."""
        now = time.monotonic()
        if now - self._checked.get(name, -math.inf) >= _CHECKED_FOR:
            check_version(self.storage, name, self.known[name])
            self._checked[name] = now

    def __getstate__(self) -> dict[str, Any]:
        # The clock of another machine has another beginning.
        return {**vars(self), "_checked": {}}


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
