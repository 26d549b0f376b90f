"""`RemoteRows`: rows whose tokens stay in a store, and are read from there when they are asked for.

The segments of the rows are here (`stored_segments`), with the places of the tokens. Row by row, a
loader asks for a run of each column of tokens, and each byte comes once an epoch.

No checksum is of a single row. What is checked: the length of each run; that the segment numbers
that came are those of the row, and coordinates lie in their images' grids; and that each file is
the one whose segments are here, by what its store calls its version, when it is first read and
every minute. So rows of a file that is replaced while it is read may come for a minute, until the
error. Pixels that changed in a file that stayed are not noticed, nor labels and sizes:
`verify` compares all checksums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.building.stored_segments import Stored, Versions, damaged, kept_segments
from packpipe.rows.computed import row_values
from packpipe.rows.files import CHECKSUM
from packpipe.rows.from_arrow import table_rows
from packpipe.rows.own_columns import ROW
from packpipe.rows.rows import Rows, gather
from packpipe.rows.text import joined
from packpipe.storage.reading import bytes_of
from packpipe.storage.storage import Storage

# Requests at once.
_AT_ONCE = 16


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
        versions: of the files, as their store calls those whose segments are here.
    """

    storage: Storage
    names: tuple[str, ...]
    checksums: tuple[str, ...]
    segments: pa.Schema
    tokens: pa.Schema
    batches: tuple[list[Stored], ...]
    versions: Versions

    def rows(self, segments: pa.Table) -> Rows:
        """Return the rows of some segments, in memory of their own.

        Raises:
            ConnectionError: the store does not answer, or with other rows.
            FileNotFoundError: a file is not there any more.
            ValueError: the column of their numbers was taken away.
        """
        if ROW not in segments.column_names:
            expected, remedy = f"{ROW!r} among them", "keep it: it says where the tokens are"
            raise ValueError(checks.sentence("columns", segments.column_names, expected, remedy))
        rows = table_rows(self.table(segments))
        return gather([rows] * len(rows), range(len(rows))) if len(rows) else rows

    def table(self, segments: pa.Table) -> pa.Table:
        """Return segments with their tokens, as a file of rows has them."""
        numbers = segments.column(ROW).to_numpy()
        runs = list(self._runs(numbers))
        asked = [(run, name) for name in self.tokens.names for run in runs]
        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(asked)))) as executor:
            parts = list(executor.map(lambda one: self._read(*one), asked))
            files = sorted({self._flat[batch][0] for batch, _, _ in runs})
            list(executor.map(self.versions.check, files if asked else []))
        columns = {}
        for number, column in enumerate(self.tokens):
            values = parts[number * len(runs) : (number + 1) * len(runs)]
            columns[column.name] = _column(values, column.type)
        own = {name: segments.column(name) for name in segments.column_names if name != ROW}
        found = pa.table(columns | own)
        self._check(found, numbers)
        return found

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of packed rows: a NumPy array a row, its dtype kept."""
        if ROW not in batch:  # some columns were selected: nothing to read
            return batch
        # The transform gets plain Python values; the schema gives them back their types.
        kinds = dict(zip(self.segments.names, self.segments.types, strict=True))
        known = {name: _typed(batch[name], kinds[name]) for name in batch.keys() & kinds.keys()}
        table = self.table(pa.table({name: known[name] for name in batch if name in known}))
        lists = [one.name for one in table.schema if hasattr(one.type, "value_type")]
        found = {name: list(map(row_values, table.column(name))) for name in lists}
        return found | {name: batch[name] for name in batch if name not in (*found, ROW)}

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

    def _check(self, table: pa.Table, numbers: NDArray[np.int64]) -> None:
        """Raise ConnectionError unless tokens are of the segments beside them."""
        if not len(numbers) or not {"segment_ids", "seq_lens"} <= {*table.column_names}:
            return
        lists = joined(table.column("seq_lens"))
        lens, counts = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
        owners = np.repeat(np.arange(len(numbers)), counts)
        ids = _tokens(table, "segment_ids")
        expected = np.zeros_like(ids)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        real = np.arange(ids.shape[1]) < np.bincount(owners, lens, len(numbers))[:, None]
        expected[real] = np.repeat(np.arange(len(lens)) - first + 1, lens)
        wrong = (ids != expected).any(axis=1)
        if {"coords", "grid_hw"} <= {*table.column_names}:
            grids = joined(table.column("grid_hw")).flatten().flatten().to_numpy().reshape(-1, 2)
            coords = _tokens(table, "coords").reshape(*ids.shape, 2)[real]
            outside = (coords >= np.repeat(grids, lens, axis=0)).any(axis=1)
            outside &= coords[:, 0] >= 0  # not of prefix tokens
            wrong[np.repeat(owners, lens)[outside]] = True
        if wrong.any():
            number = int(numbers[int(np.argmax(wrong))])
            batch = int(np.searchsorted(self._starts, number, side="right")) - 1
            what = f"another than row {number} of the folder"
            raise ConnectionError(damaged(self.storage, self._flat[batch][0], what))


def remote_rows(
    storage: Storage,
    records: dict[str, Any],
    versions: Versions,
    paths: Sequence[Path],
    schema: pa.Schema,
) -> RemoteRows:
    """Return what reads the tokens of a folder.

    Args:
        storage: the folder.
        records: its files of rows, in order, with what the manifest says of each.
        versions: of these files.
        paths: of the files that `write_segments` has written, in the same order.
        schema: of the dataset of segments.
    """
    kept = list(map(kept_segments, paths))
    return RemoteRows(
        storage,
        tuple(records),
        tuple(record[CHECKSUM] for record in records.values()),
        schema,
        kept[0].tokens,
        tuple(one.batches for one in kept),
        versions,
    )


def _column(parts: list[NDArray[np.uint8]], kind: pa.DataType) -> pa.Array:
    """Return rows of a column of tokens of their bytes; of bools, of a byte each."""
    joined = np.concatenate([np.empty(0, np.uint8), *parts])
    inner = kind.value_type
    values = pa.array(
        joined.view(np.bool_ if pa.types.is_boolean(inner) else inner.to_pandas_dtype())
    )
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


def _tokens(table: pa.Table, name: str) -> NDArray[Any]:
    """Return a column of numbers of tokens: [rows, values of a row]."""
    values: NDArray[Any] = joined(table.column(name)).flatten().to_numpy()
    return values.reshape(table.num_rows, -1)


def _typed(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Return values of a column as Arrow; of one that was replaced since, of its own type."""
    try:
        return pa.array(values, kind)
    except pa.ArrowException:
        return pa.array(values)
