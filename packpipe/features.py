"""`datasets` features of packed rows, as Arrow schemas know them in packpipe.schema (floor 2)."""

from __future__ import annotations

from typing import Any

from datasets import Features, List

from packpipe import schema
from packpipe.config import PackConfig


def packed_features(config: PackConfig, label: Any, *, tokens: bool = True) -> Features:
    """Return the features of packed rows; labels keep the source column's own feature.

    Args:
        config: the options the rows are made with.
        label: feature of the label column, or None.
        tokens: False leaves only the segment columns, the plan of a row.
    """
    label_type = None if label is None else label.pa_type
    found = schema.row_schema(config, label_type) if tokens else schema.segment_schema(label_type)
    features = Features.from_arrow_schema(found)
    if label is not None:
        features["labels"] = List(label)
    return features
