"""Computes packed rows when they are read: what a transform of a `datasets.Dataset` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from packpipe.rows.rows import Rows
from packpipe.rows.to_arrow import rows_table


def computed_columns(
    batch: dict[str, list[Any]],
    stored: pa.Schema,
    whole: pa.Schema,
    compute: Callable[[pa.Table], Rows],
) -> dict[str, list[Any]]:
    """Return the columns of packed rows: a NumPy array a row, its dtype kept.

    Args:
        batch: stored rows, as `datasets` hands them to a transform.
        stored: the columns they must have; if some were not selected, the batch stays as it is.
        whole: the columns of whole rows. Other columns of the batch are kept beside them.
        compute: returns the rows of a table of the stored columns.
    """
    if not batch.keys() >= set(stored.names):
        return batch
    # The transform gets plain Python values; the schema gives them back their types.
    table = pa.table({name: batch[name] for name in stored.names}, schema=stored)
    rows = rows_table(compute(table), whole)
    computed = {name: [row_values(row) for row in rows.column(name)] for name in rows.column_names}
    others = batch.keys() - computed.keys() - {*stored.names}
    return computed | {name: batch[name] for name in batch if name in others}


def row_values(row: pa.Scalar) -> Any:
    """Return a list scalar as a NumPy array of its own dtype (strings and the like as a list)."""
    values = row.values
    if pa.types.is_fixed_size_list(values.type):
        return values.flatten().to_numpy().reshape(-1, values.type.list_size)
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return values.to_numpy()
    return values.to_pylist()
