"""Parquet files: a block is a row group, and the end of a file tells of them all."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from packpipe import checks
from packpipe.sources.blocks import Block, Known, check_rows, damaged, features_of, is_of_system

BLOCK = "row group"
# Arrow holds a column of a row group with offsets of 32 bits.
_MOST_BYTES = 2**31


def known(filesystem: Any, file: str) -> Known:
    """Return what the end of a file says.

    Raises:
        ValueError: it is no Parquet file, or has a row group above 2 GiB.
    """
    with filesystem.open(file, "rb") as source:
        parquet = _parquet(source, file)
        found = parquet.metadata
        rows = []
        for group in range(found.num_row_groups):
            _check_bytes(found.row_group(group), group, file)
            rows.append(found.row_group(group).num_rows)
        # The last eight bytes are the length of the footer, and a word.
        size = source.seek(-8, os.SEEK_END) + 8
        source.seek(-8 - int.from_bytes(source.read(4), "little"), os.SEEK_END)
        footer = hashlib.sha256(source.read()).hexdigest()
    return Known(size, rows, footer, features_of(parquet.schema_arrow, file), [])


def tables(filesystem: Any, blocks: list[Block], schema: pa.Schema) -> list[pa.Table]:
    """Return the rows of blocks of one file, which is opened once.

    Raises:
        ValueError: a block is damaged, or has other rows or columns by now.
    """
    with filesystem.open(blocks[0].file, "rb") as source:
        parquet = _parquet(source, blocks[0].file)
        return [_row_group(parquet, block, schema) for block in blocks]


def _parquet(source: Any, file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source, pre_buffer=True)
    except (pa.ArrowInvalid, OSError) as error:
        if is_of_system(error):
            raise
        raise ValueError(checks.sentence("paths", file, "Parquet files", str(error))) from error


def _row_group(parquet: pq.ParquetFile, block: Block, schema: pa.Schema) -> pa.Table:
    what = f"row group {block.group} of {block.file}"
    try:
        found = parquet.read_row_group(block.group, columns=schema.names)
        found = found.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, KeyError) as error:
        if is_of_system(error):
            raise
        raise damaged(what, error) from error
    check_rows(what, found.num_rows, block)
    return found


def _check_bytes(group: Any, number: int, file: str) -> None:
    """Raise for a column of a row group that Arrow cannot hold as one."""
    columns = range(group.num_columns)
    largest = max((group.column(one).total_uncompressed_size for one in columns), default=0)
    if largest >= _MOST_BYTES:
        what, expected = f"largest column of row group {number} of {file}", "less than 2 GiB"
        remedy = "write smaller row groups, of about a thousand images"
        raise ValueError(checks.sentence(what, f"{largest:,} bytes", expected, remedy))
