"""Stored packs: a packed table read by row number, in one copy.

A packed row lies at a constant stride in Arrow's memory, so reading it is one copy of its bytes
from the mapped file to the batch. The formats of `datasets` widen uint8 to int64, and its ``take``
copies twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import philox
from packpipe.loading.read import read_rows
from packpipe.packing.quality import attention_work
from packpipe.philox import Key
from packpipe.rows.digests import (
    checksums_digest,
    files_digest,
    hexdigest,
    labels_digest,
    sample_digest,
)
from packpipe.rows.encoded_rows import decoding
from packpipe.rows.from_arrow import table_rows, table_segments
from packpipe.rows.own_columns import has_labels, holds_tokens, is_number, packed_columns
from packpipe.rows.rows import Rows, gather
from packpipe.rows.schema import SEGMENT_TYPES

log = logging.getLogger(__name__)


class StoredPacks:
    """The rows of a packed dataset as packs for a loader, in a new seeded order every epoch.

    Args:
        dataset: what `pack` or ``map(Packer(...))`` returned (a selection or shuffle of it too),
            or a ``pyarrow.Table`` with the same columns. Columns that were added to rows of tokens
            are in the batches if they have, in all rows, a number for every token or a value for
            every segment; others are left out, with a warning.
        shuffle: False takes the rows in their stored order, every epoch.

    Raises:
        TypeError, ValueError: dataset does not hold packed rows of one length.
    """

    def __init__(self, dataset: Any, *, shuffle: bool = True) -> None:
        self._dataset = decoding(dataset)
        read_rows(self._dataset, range(0))  # raises if these are no packed rows
        has_labels(self._table)  # raises if somebody has put others there
        self._shuffle = shuffle
        self._orders: dict[Key, NDArray[np.int64]] = {}
        self._views: dict[int, Rows] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._dataset)} rows)"

    def __reduce__(self) -> tuple[Any, ...]:
        # Without views: where this is unpickled, the files are mapped again.
        return partial(type(self), shuffle=self._shuffle), (self._dataset,)

    def num_packs(self, key: Key) -> int:  # noqa: ARG002
        """Return the number of rows, the same in every epoch."""
        return len(self._dataset)

    @cached_property
    def max_segments(self) -> int:
        """Most segments of any row, at least 1."""
        most = (int(some.num_segments.max()) for some in self._segments)
        return max(1, max(most, default=1))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest segment of any row, at least 1."""
        most = (int(some.seq_lens.max(initial=1)) for some in self._segments)
        return max(most, default=1)

    @property
    def of_tokens(self) -> bool:
        """Whether these are rows of token sequences, not of images."""
        return read_rows(self._dataset, range(0)).of_tokens

    @property
    def labels(self) -> pa.Array | None:
        """Labels of all images in the rows; None without any, and of rows of tokens."""
        none = read_rows(self._dataset, range(0))
        return None if none.of_tokens else self._labels(none)

    @property
    def has_targets(self) -> bool:
        """Whether the rows have the class of every cell of their images."""
        return "targets" in read_rows(self._dataset, range(0)).tokens

    @property
    def examples(self) -> Rows:
        """Which examples the rows hold, without their tokens."""
        names = ["seq_lens", "example_index"]
        return self._all_segments(names) if self._batches else read_rows(self._dataset, range(0))

    def fingerprint(self, key: Key) -> str:  # noqa: ARG002
        """Return a digest of which examples the rows hold and whether they are shuffled.

        Labels, pixels and tokens are those of `contents`.
        """
        return self._digest

    def contents(self) -> dict[str, str | None]:
        """Return digests of what the rows hold, by name.

        ``labels`` is of all labels of images, ``weights`` of their weights, ``values`` of all
        numbers beside tokens; ``rows`` of 16 MB of tokens or pixels, evenly spread; ``targets`` of
        as much of class maps; ``files`` of the checksums of the files, where `pack` has written
        them, so that no byte escapes it. Rows that are computed when they are read have those of
        `LazyRows` or `EncodedRows` instead; those that are read from a store have the same as a
        copy of them.
        """
        return dict(self._contents)

    def work(self, key: Key) -> NDArray[np.int64]:
        """Return int64[packs], Σ l² of each pack in the order of the epoch."""
        return self._work[self._stored_row(self.order(key))]

    def rows(
        self,
        key: Key,
        packs: NDArray[np.int64],
        empty: Callable[..., NDArray[Any]] = np.empty,
    ) -> Rows:
        """Return the rows at some places of the epoch's order, in memory of their own.

        Args:
            key: (seed, epoch) of the order.
            packs: the places.
            empty: makes memory of a shape and a dtype; tokens that are copied are put there, but
                not rows that are computed when they are read.
        """
        numbers = self.order(key)[packs]
        # Computed rows have no tokens to copy, and `gather` needs one row at least.
        if self._is_computed:
            return read_rows(self._dataset, numbers)
        if not len(numbers):
            return self._no_rows
        stored = self._stored_row(numbers)
        batches = np.searchsorted(self._starts, stored, side="right") - 1
        views = [self._view(batch) for batch in batches.tolist()]
        within = (stored - self._starts[batches]).tolist()
        return gather(views, within, empty)

    def order(self, key: Key) -> NDArray[np.int64]:
        """Return int64[packs], rows of the dataset in the order of an epoch."""
        if not self._shuffle:
            return np.arange(len(self._dataset))
        known = self._orders  # read once: another thread may replace it
        if key not in known:
            numbers = np.arange(len(self._dataset))
            order = philox.permutation(key, index=numbers, stream=philox.ROW_ORDER)
            # The last two: while an epoch ends, the next one is begun.
            known = self._orders = dict([*list(known.items())[-1:], (key, order)])
        return known[key]

    @property
    def _is_computed(self) -> bool:
        """Whether a transform computes the rows when they are read, or reads them in a store."""
        return not isinstance(self._dataset, pa.Table) and self._dataset.format["type"] == "custom"

    @property
    def _transform(self) -> Any:
        return self._dataset.format["format_kwargs"].get("transform")

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        # Without empty ones, of which `max_segments` could not take the maximum.
        return [batch for batch in self._table.to_batches() if batch.num_rows]

    @property
    def _table(self) -> Any:
        return self._dataset if isinstance(self._dataset, pa.Table) else self._dataset.data

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

    def _view(self, batch: int) -> Rows:
        # No lock: two threads may make the same view, which is a view of the same memory.
        if batch not in self._views:
            table = pa.Table.from_batches([self._batches[batch]]).select(self._columns)
            # Views are kept, and would hold a byte for every bool of the data.
            self._views[batch] = table_rows(table, keep_bits=True)
        return self._views[batch]

    @cached_property
    def _columns(self) -> list[str]:
        """The columns of the batches: those that are packed rows' in every record batch."""
        names: list[str] = self._table.column_names
        if not holds_tokens(names):
            return names
        tables = [pa.Table.from_batches([batch]) for batch in self._batches]
        shown = packed_columns(tables or [self._table.schema.empty_table()])
        hidden = [name for name in names if name not in shown]
        if hidden:
            log.warning("batches do not show %s, which some row has no value of", hidden)
        return shown

    @property
    def _no_rows(self) -> Rows:
        return table_rows(self._table.schema.empty_table().select(self._columns))

    @property
    def _segments(self) -> list[Rows]:
        """The segments of the rows, without their tokens, record batch by record batch."""
        return [table_segments(pa.Table.from_batches([batch])) for batch in self._batches]

    @cached_property
    def _work(self) -> NDArray[np.int64]:
        parts = [attention_work(some.seq_lens, some.offsets) for some in self._segments]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(b"shuffled" if self._shuffle else b"as they lie")
        rows = read_rows(self._dataset, range(0))
        # Saved states hold this digest, so it must stay the same from version to version. How rows
        # are cut into files and record batches is left out, since it changes no batch.
        if not rows.of_tokens:
            shape: Any = rows.patches.shape[1:]
            more = [name for name in ("box", "view") if name in rows.segments]
            names = ["seq_lens", "grid_hw", "image_hw", *more, "example_index"]
        else:
            own = rows.tokens.keys() - {"segment_ids", "position_ids"}
            shape = {name: rows.tokens[name].shape[1:] for name in sorted(own)}
            names = ["seq_lens", "fragment", "example_index"]
        digest.update(f"{shape}".encode())
        if self._batches:
            segments = self._all_segments(names)
            # Where rows end, which the flat columns alone do not tell.
            digest.update(np.ascontiguousarray(segments.num_segments).data)
            for name in names:
                digest.update(np.ascontiguousarray(segments.segments[name]).data)
        return digest.hexdigest()[:32]

    def _all_segments(self, names: list[str]) -> Rows:
        """Return some columns of segments of all rows, as the dataset selects them."""
        return table_segments(self._selected(names))

    def _selected(self, names: list[str]) -> pa.Table:
        """Return some columns of all rows, as the dataset selects them."""
        table = pa.Table.from_batches(self._batches).select(names)
        return table if self._indices is None else table.take(pa.array(self._indices))

    @cached_property
    def _contents(self) -> dict[str, str | None]:
        none = read_rows(self._dataset, range(0))
        found: dict[str, str | None] = {}
        if none.of_tokens:
            found["values"] = self._values_digest(none)
        else:
            found["labels"] = labels_digest(self._labels(none))
            if "weight" in none.segments and self._batches:
                found["weights"] = hexdigest(self._all_segments(["seq_lens", "weight"]).weight.data)
        if self._is_computed and hasattr(transform := self._transform, "contents"):
            found |= transform.contents()
            return found
        found["rows"] = sample_digest(len(self._dataset), self._first_tokens)
        if not none.of_tokens and self.has_targets:  # which come after all pixels of a stretch
            found["targets"] = sample_digest(len(self._dataset), self._targets)
        files = self._files_digest()
        return found if files is None else {**found, "files": files}

    def _files_digest(self) -> str | None:
        if isinstance(self._dataset, pa.Table):
            return None
        if self._is_computed and hasattr(transform := self._transform, "checksums"):
            return checksums_digest(transform.checksums)
        return files_digest(file["filename"] for file in self._dataset.cache_files)

    def _values_digest(self, none: Rows) -> str | None:
        """Return a digest of all numbers beside tokens, None without any."""
        numbers = [
            name
            for name, values in sorted(none.segments.items())
            if name not in SEGMENT_TYPES and isinstance(values, pa.Array) and is_number(values.type)
        ]
        if not numbers or not self._batches:
            return None
        table = self._selected(numbers)
        columns = [table.column(name).combine_chunks().flatten() for name in numbers]
        # A null among integers makes them floats, and is NaN.
        arrays = [values.to_numpy(zero_copy_only=False) for values in columns]
        return hexdigest(*(np.ascontiguousarray(values).data for values in arrays))

    def _labels(self, none: Rows) -> pa.Array | None:
        """Return the labels of all rows of images, or None; ``none`` has no row, but types."""
        if self._batches and "labels" in none.segments:
            return self._all_segments(["seq_lens", "labels"]).labels
        return none.segments.get("labels")

    def _first_tokens(self, start: int, stop: int, most: int) -> list[Any]:
        """Return the tokens of rows, as many as hold so many bytes."""
        first = read_rows(self._dataset, slice(start, min(start + 1, stop))).tokens
        row_bytes = max(1, sum(values.nbytes for values in first.values()))
        end = min(stop, start + -(-most // row_bytes))
        tokens = first
        if end > start + 1:
            tokens = read_rows(self._dataset, slice(start, end)).tokens
        return [tokens[name] for name in sorted(tokens)]

    def _targets(self, start: int, stop: int, most: int) -> Iterator[Any]:  # noqa: ARG002
        """Yield the targets of rows, row by row: who asks takes as many as it needs."""
        for row in range(start, stop):
            yield np.ascontiguousarray(read_rows(self._dataset, row).targets).data
