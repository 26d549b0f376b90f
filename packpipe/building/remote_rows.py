"""`RemoteRows`: rows whose tokens stay in a store, and are read from there when they are asked for.

The segments of the rows are here (`stored_segments`), with the places of the tokens. Row by row, a
loader asks for a run of each column of tokens, and each byte comes once an epoch.

No checksum is of a single row. So the length of each run is checked, and that the segment numbers
that came are those of the row, which are others in most files that were put in place of this one.
Pixels that changed in a file that stayed are not noticed: `verify` compares all checksums.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.building.stored_segments import ROW, Stored, damaged, kept_segments
from packpipe.rows.files import CHECKSUM
from packpipe.rows.from_arrow import table_rows
from packpipe.rows.rows import Rows, gather
from packpipe.sources.lazy_rows import row_values
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
            raise ConnectionError(damaged(self.storage, self._flat[batch][0], what))


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
    kept = list(map(kept_segments, paths))
    return RemoteRows(
        storage,
        tuple(records),
        tuple(record[CHECKSUM] for record in records.values()),
        schema,
        kept[0].tokens,
        tuple(one.batches for one in kept),
    )


def _column(parts: list[NDArray[np.uint8]], kind: pa.DataType) -> pa.Array:
    """Return rows of a column of tokens of their bytes; of bools, of a byte each."""
    joined = np.concatenate([np.empty(0, np.uint8), *parts])
    inner = kind.value_type
    values = pa.array(
        joined.view(np.bool_ if pa.types.is_boolean(inner) else inner.to_pandas_dtype())
    )
    return pa.FixedSizeListArray.from_arrays(values, type=kind)
