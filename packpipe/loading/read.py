"""Rows of a packed dataset by number, as NumPy views."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from packpipe.rows import schema
from packpipe.rows.files import picked_rows
from packpipe.rows.rows import Rows, TokenRows
from packpipe.rows.schema import table_tokens


def read_rows(dataset: Any, rows: Any = None) -> Rows:
    """Return packed rows as NumPy arrays, views of Arrow's memory where they are contiguous.

    uint8 stays uint8: `datasets`' own torch and numpy formats widen it to int64.

    Args:
        dataset: what `pack` or ``map(Packer(...))`` returned (selections and shuffles of it
            too), or a ``pyarrow.Table`` with the same columns.
        rows: an int, a slice, or int[n] row numbers; None for all.

    Returns:
        Rows.

    Raises:
        IndexError: a row number is out of range.
        ValueError: the columns are not those of packed rows.
        TypeError: dataset is something else.
    """
    table = picked_rows(dataset, rows)
    # Rows computed when read carry what computes them as the dataset's transform.
    kwargs = {} if isinstance(dataset, pa.Table) else dataset.format["format_kwargs"]
    transform = kwargs.get("transform")
    if transform is not None and hasattr(transform, "rows"):
        computed: Rows = transform.rows(table)
        return computed
    return schema.table_rows(table)


def read_tokens(dataset: Any, rows: Any = None) -> TokenRows:
    """Return packed rows of tokens as NumPy arrays, views of Arrow's memory where they can be.

    Args:
        dataset: as for `read_rows`.
        rows: likewise.

    Raises:
        IndexError: a row number is out of range.
        ValueError: the columns are not those of packed rows of tokens, or the rows are ragged.
        TypeError: dataset is something else.
    """
    return table_tokens(picked_rows(dataset, rows))
