"""Arrow files, as `datasets` writes them: a block is a record batch.

A file is a stream, or a file with a footer, which holds a stream. The heads of its record batches
are read one after the other, a request each, and no rows.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pyarrow as pa

from packpipe import checks
from packpipe.sources.blocks import (
    Block,
    Known,
    bytes_of,
    check_rows,
    damaged,
    digest_of,
    features_of,
    is_of_system,
    size_of,
)
from packpipe.storage.messages import DICTIONARY_BATCH, RECORD_BATCH, Head, ReadAhead, head_at

BLOCK = "record batch"
# What files with a footer begin with, and the bytes before their stream.
_MAGIC, _BEFORE = b"ARROW1", 8
_DAMAGES = (pa.ArrowException, struct.error, ValueError, OSError)


def known(filesystem: Any, file: str) -> Known:
    """Return what the heads of a file's record batches say.

    Raises:
        ValueError: it is no whole Arrow file, has dictionaries, or two columns of one name; or its
            server gives no parts of files.
    """
    size = size_of(filesystem, file)
    reader = _reader(filesystem, file, size)
    try:
        position, opening = _opening(reader)
        schema = pa.ipc.read_schema(pa.py_buffer(opening.content))
        digest, rows, spans, has_dictionary = hashlib.sha256(opening.content), [], [], False
        while (head := head_at(reader, position)) is not None:
            if head.kind == DICTIONARY_BATCH:
                has_dictionary = True
                break
            if head.kind != RECORD_BATCH:
                raise ValueError(f"a message of kind {head.kind} at byte {position}")
            stop = position + len(head.content) + head.body
            if stop > size:
                raise ValueError(f"it ends at byte {size}, and byte {stop - 1} is missing")
            digest.update(head.content)
            rows.append(head.num_rows)
            spans.append((position, stop, digest_of(head.content)))
            position = stop
    except _DAMAGES as error:
        if is_of_system(error):
            raise
        expected = "whole Arrow files, streams or not"
        remedy = f"{error}: copy it again, or write it anew"
        raise ValueError(checks.sentence("paths", file, expected, remedy)) from error
    if has_dictionary:
        expected, remedy = "plain values", "write the column without dictionary_encode"
        raise ValueError(checks.sentence(f"a column of {file}", "a dictionary", expected, remedy))
    return Known(size, rows, digest.hexdigest(), features_of(schema, file), spans)


def tables(filesystem: Any, blocks: list[Block], schema: pa.Schema) -> list[pa.Table]:
    """Return the rows of blocks of one file, of which its schema is read too: 16 KiB as a rule.

    Raises:
        ValueError: a block is damaged, or has other rows or columns by now.
    """
    file = blocks[0].file
    try:
        _, opening = _opening(_reader(filesystem, file, blocks[0].start))
        own = pa.ipc.read_schema(pa.py_buffer(opening.content))
    except _DAMAGES as error:
        if is_of_system(error):
            raise
        raise damaged(f"schema of {file}", error) from error
    return [_batch(filesystem, block, own, schema) for block in blocks]


def _batch(filesystem: Any, block: Block, own: pa.Schema, schema: pa.Schema) -> pa.Table:
    what = f"record batch {block.group} of {block.file}"
    try:
        content = bytes_of(filesystem, block.file, block.start, block.stop)
        head = head_at(ReadAhead(lambda start, stop: content[start:stop], len(content)), 0)
        batch = pa.ipc.read_record_batch(pa.py_buffer(content), own)
        found = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
        found.validate(full=True)
    except (*_DAMAGES, KeyError) as error:
        if is_of_system(error):
            raise
        raise damaged(what, error) from error
    check_rows(what, found.num_rows, block, digest_of(head.content if head else b""))
    if len(schema) < len(own):  # a copy, without which the others would stay in memory
        found = found.take(pa.array(range(found.num_rows), pa.int64()))
    return found


def _opening(reader: ReadAhead) -> tuple[int, Head]:
    """Return where the first record batch begins, and the head of the schema."""
    start = _BEFORE if reader(0, _BEFORE).startswith(_MAGIC) else 0
    found = head_at(reader, start)
    if found is None:
        raise ValueError("no schema")
    return start + len(found.content) + found.body, found


def _reader(filesystem: Any, file: str, size: int) -> ReadAhead:
    return ReadAhead(lambda start, stop: bytes_of(filesystem, file, start, stop), size)
