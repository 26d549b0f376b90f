"""The `datasets` features of packed rows, made from the schemas in packpipe.rows.schema."""

from __future__ import annotations

from typing import Any

from datasets import Features, List

from packpipe.images.masks import TargetRules
from packpipe.planning.image_config import PackConfig
from packpipe.planning.token_config import TokenConfig
from packpipe.rows import schema
from packpipe.rows.encoded import encoded_schema
from packpipe.sources.token_columns import TokenColumns, value_type


def packed_features(
    config: PackConfig,
    label: Any,
    *,
    tokens: bool = True,
    encoded: bool = False,
    weighted: bool = False,
    targets: TargetRules | None = None,
) -> Features:
    """Return the features of packed rows of images; labels keep their feature of the source.

    Args:
        config: the options the rows are made with.
        label: feature of the label column, or None.
        tokens: False leaves only the segment columns, the plan of a row.
        encoded: whether the rows hold encoded images in place of their tokens.
        weighted: whether images have weights.
        targets: how masks become targets; None without masks.
    """
    # Asked of a schema, since a list's feature does not say its type.
    label_type = None if label is None else Features({"l": label}).arrow_schema.field("l").type
    found = schema.row_schema(config, label_type, weighted=weighted, targets=targets)
    if encoded or not tokens:
        found = schema.segment_schema(label_type, config, weighted=weighted)
        found = encoded_schema(found) if encoded else found
    features = Features.from_arrow_schema(found)
    if label is not None:
        features["labels"] = List(label)  # an Arrow schema knows no names of classes
    return features


def token_features(features: Features, columns: TokenColumns, config: TokenConfig) -> Features:
    """Return the features of packed rows of tokens; values keep their feature of the source."""
    tokens = {name: value_type(features, name) for name in columns.tokens}
    if config.mask_first_label and "labels" not in tokens:
        tokens["labels"] = value_type(features, "input_ids")
    values = {name: features[name].pa_type for name in columns.values}
    found = Features.from_arrow_schema(schema.token_schema(config, tokens, values))
    # Arrow's type would do for the bytes, but drops a ClassLabel's names.
    for name in columns.values:
        found[name] = List(features[name])
    return found
