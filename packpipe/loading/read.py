"""Reads rows of a packed dataset by number, as NumPy views where it can."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from packpipe import checks
from packpipe.rows.encoded_rows import reader_of
from packpipe.rows.files import picked_rows
from packpipe.rows.from_arrow import table_rows
from packpipe.rows.rows import Rows


def read_rows(dataset: Any, rows: Any = None) -> Rows:
    """Return packed rows, of images or of tokens, as views of Arrow's memory where possible.

    uint8 stays uint8: `datasets`' own torch and numpy formats widen it to int64. Texts of more than
    2 GiB come as Arrow's large types.

    Args:
        dataset: what `pack` or ``map(Packer(...))`` returned (selections and shuffles of it
            too), or a ``pyarrow.Table`` with the same columns.
        rows: an int, a slice, or int[n] row numbers; None for all. Rows that are computed when they
            are read, as those of encoded images, then all take memory, as rows of pixels do not.

    Raises:
        IndexError: a row number is out of range.
        ValueError: the columns are not those of packed rows, or the rows are ragged; or the dataset
            has a transform of the caller's. An encoded image is damaged, or cannot be decoded here.
        TypeError: dataset is something else.
    """
    reader = reader_of(dataset)
    table = picked_rows(dataset, rows)
    if reader is not None:
        return reader.rows(table)
    # With materialize=False, the dataset's transform (`LazyRows`) computes the tokens; of encoded
    # images it is `EncodedRows`, of rows in a store `RemoteRows`.
    kwargs = {} if isinstance(dataset, pa.Table) else dataset.format["format_kwargs"]
    transform = kwargs.get("transform")
    if transform is not None and hasattr(transform, "rows"):
        computed: Rows = transform.rows(table)
        return computed
    if transform is not None:
        checks.untransformed("dataset", dataset)
    return table_rows(table)


read_tokens = read_rows  # an older name, from when rows of tokens had a function of their own
