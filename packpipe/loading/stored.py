"""Stored packs: a packed table read by row number, in one copy.

A packed row lies at a constant stride in Arrow's memory, so that reading one is a copy of its
bytes from the mapped file to the batch, and nothing else. `datasets`' own formats widen uint8 to
int64; its ``take`` copies twice.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import philox
from packpipe.loading.read import read_rows, read_tokens
from packpipe.packing.quality import attention_work
from packpipe.rows import schema
from packpipe.rows.rows import Rows, Segments, TokenRows, TokenSegments, gathered, gathered_tokens
from packpipe.rows.schema import is_token_rows, table_tokens


class StoredPacks:
    """The rows of a packed dataset, as a loader takes them: in a new seeded order every epoch.

    Args:
        dataset: what `pack` or ``map(Packer(...))`` returned (a selection or shuffle of it too),
            or a ``pyarrow.Table`` with the same columns.
        shuffle: False takes the rows as they lie, every epoch.

    Raises:
        TypeError, ValueError: as `read_rows`.
    """

    def __init__(self, dataset: Any, *, shuffle: bool = True) -> None:
        self._of_tokens = is_token_rows(getattr(dataset, "column_names", ()))
        self._dataset = dataset
        self._read(range(0))  # says what is wrong with it
        self._shuffle = shuffle
        self._order: tuple[tuple[int, int], NDArray[np.int64]] | None = None
        self._views: dict[int, Rows | TokenRows] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapped files are mapped again where this arrives.
        return partial(StoredPacks, shuffle=self._shuffle), (self._dataset,)

    def num_packs(self, seed: int, epoch: int) -> int:  # noqa: ARG002
        """Return the number of rows, the same in every epoch."""
        return len(self._dataset)

    @cached_property
    def max_segments(self) -> int:
        """Most segments of any row, 1 at least."""
        most = (int(np.diff(segments.offsets).max()) for segments in self._segments)
        return max(1, max(most, default=1))

    def fingerprint(self, seed: int, epoch: int) -> str:  # noqa: ARG002
        """Return a digest of which examples the rows hold and whether they are shuffled.

        Not of the pixels, which would mean reading them; nor of the folder or the time.
        """
        return self._digest

    def work(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return int64[packs], Σ l² of each pack in the order of the epoch."""
        return self._work[self._stored_row(self.order(seed, epoch))]

    def rows(self, seed: int, epoch: int, packs: NDArray[np.int64]) -> Rows | TokenRows:
        """Return the rows at some places of the epoch's order, in memory of their own."""
        numbers = self.order(seed, epoch)[packs]
        if self._is_computed or not len(numbers):
            return self._read(numbers)
        stored = self._stored_row(numbers)
        batches = np.searchsorted(self._starts, stored, side="right") - 1
        views = [self._view(batch) for batch in batches.tolist()]
        within = (stored - self._starts[batches]).tolist()
        gather: Any = gathered_tokens if self._of_tokens else gathered
        found: Rows | TokenRows = gather(views, within)
        return found

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return int64[packs], rows of the dataset in the order of an epoch."""
        if not self._shuffle:
            return np.arange(len(self._dataset))
        known = self._order  # read once: another thread may be at another epoch
        if known is None or known[0] != (seed, epoch):
            numbers = np.arange(len(self._dataset))
            order = philox.permutation(
                seed=seed, epoch=epoch, index=numbers, stream=philox.ROW_ORDER
            )
            known = self._order = (seed, epoch), order
        return known[1]

    @property
    def _is_computed(self) -> bool:
        """Whether a transform computes the rows when they are read."""
        return not isinstance(self._dataset, pa.Table) and self._dataset.format["type"] == "custom"

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        is_table = isinstance(self._dataset, pa.Table)
        table = self._dataset if is_table else self._dataset.data
        return [batch for batch in table.to_batches() if batch.num_rows]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    @cached_property
    def _indices(self) -> NDArray[np.int64] | None:
        """Rows of the table that the dataset selects; None for all."""
        indices = getattr(self._dataset, "_indices", None)
        return None if indices is None else np.asarray(indices.column(0)).astype(np.int64)

    def _stored_row(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers if self._indices is None else self._indices[numbers]

    def _read(self, numbers: Any) -> Rows | TokenRows:
        read: Any = read_tokens if self._of_tokens else read_rows
        found: Rows | TokenRows = read(self._dataset, numbers)
        return found

    def _view(self, batch: int) -> Rows | TokenRows:
        if batch not in self._views:
            table = pa.Table.from_batches([self._batches[batch]])
            self._views[batch] = (table_tokens if self._of_tokens else schema.table_rows)(table)
        return self._views[batch]

    @property
    def _segments(self) -> list[Segments | TokenSegments]:
        return [self._segments_of(pa.Table.from_batches([batch])) for batch in self._batches]

    def _segments_of(self, table: pa.Table) -> Segments | TokenSegments:
        return table_tokens(table).segments if self._of_tokens else schema.table_segments(table)

    @cached_property
    def _work(self) -> NDArray[np.int64]:
        parts = [attention_work(some.seq_lens, some.offsets) for some in self._segments]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(b"shuffled" if self._shuffle else b"as they lie")
        rows = self._read(range(0))
        if isinstance(rows, TokenRows):
            shape: Any = {name: values.shape[1:] for name, values in sorted(rows.tokens.items())}
            names = ["seq_lens", "fragment", "example_index"]
        else:
            shape = rows.patches.shape[1:]
            names = ["seq_lens", "grid_hw", "image_hw", "example_index"]
        digest.update(f"{shape}".encode())
        if self._batches:
            table = pa.Table.from_batches(self._batches)
            table = table if self._of_tokens else table.select(names)
            if self._indices is not None:
                table = table.take(pa.array(self._indices))
            segments = self._segments_of(table)
            digest.update(np.ascontiguousarray(np.diff(segments.offsets)).data)
            for name in names:
                digest.update(np.ascontiguousarray(getattr(segments, name)).data)
        return digest.hexdigest()[:32]
