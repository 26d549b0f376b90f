"""`datasets` features of packed rows, as Arrow schemas know them in packpipe.rows.schema."""

from __future__ import annotations

from typing import Any

from datasets import Features, List

from packpipe.planning.image_config import PackConfig
from packpipe.planning.token_config import TokenConfig
from packpipe.rows import schema
from packpipe.rows.schema import token_schema
from packpipe.sources.columns import value_type


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


def token_features(
    features: Features, token_columns: list[str], value_columns: list[str], config: TokenConfig
) -> Features:
    """Return the features of packed rows; other columns keep their source's own feature."""
    tokens = {name: value_type(features, name) for name in token_columns}
    if config.mask_first_label and "labels" not in tokens:
        tokens["labels"] = value_type(features, "input_ids")
    values = {name: features[name].pa_type for name in value_columns}
    found = Features.from_arrow_schema(token_schema(config, tokens, values))
    for name in value_columns:
        found[name] = List(features[name])
    return found
