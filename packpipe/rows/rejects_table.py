"""Rejects as an Arrow table: a row an example that is in no packed row."""

from __future__ import annotations

import pyarrow as pa

from packpipe.rows.rejects import Reject

REJECTS_SCHEMA = pa.schema(
    [
        ("example_index", pa.int64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("exception", pa.string()),
    ]
)


def rejects_table(rejects: list[Reject]) -> pa.Table:
    """Return rejects as Arrow, in order of their example."""
    ordered = [reject[:4] for reject in sorted(rejects)]
    return pa.table(
        [list(column) for column in zip(*ordered, strict=True)] or [[]] * 4, REJECTS_SCHEMA
    )
