"""Which columns of a dataset of token sequences hold what: as named, or found by type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Value

from packpipe import checks
from packpipe.planning.token_config import TokenConfig
from packpipe.rows.fill_tokens import padding_of
from packpipe.rows.rows import NO_LABEL
from packpipe.rows.schema import RESERVED
from packpipe.sources.kinds import holds_numbers, is_text

# Tokenizers' own name: 0 at tokens that only fill up a sequence, as with padding="max_length".
_MASK = "attention_mask"


class TokenColumns(NamedTuple):
    """The columns of a dataset of token sequences.

    Attributes:
        tokens: lists of numbers; the first gives a sequence's length.
        values: one value a sequence.
        mask: lists that are 0 where a sequence has padding, which is left out; None without any.
    """

    tokens: list[str]
    values: list[str]
    mask: str | None = None

    @property
    def lists(self) -> list[str]:
        """The columns of lists: of tokens, and the mask."""
        if self.mask is None or self.mask in self.tokens:
            return self.tokens
        return [*self.tokens, self.mask]


def token_columns_of(features: Features, asked: str | Sequence[str]) -> list[str]:
    """Return the names of the columns that hold tokens; ``"auto"`` finds all lists of numbers.

    The first gives a sequence's length: ``input_ids``, if there is one. Its ``attention_mask`` is
    left out: what stays is 1 everywhere, and with it models of transformers mix the sequences of a
    row, since they look at positions only where no mask is given.
    """
    lists = [name for name, feature in features.items() if holds_numbers(feature)]
    if asked == "auto":
        chosen = [name for name in lists if not _is_mask(features, name)]
        if not chosen:
            expected, remedy = "a list of numbers", "tokenize first, or pass token_columns"
            raise ValueError(checks.sentence("token columns", list(features), expected, remedy))
    else:
        chosen = [asked] if isinstance(asked, str) else list(asked)
        for number, name in enumerate(chosen):
            if name not in lists or name in chosen[:number]:
                expected, remedy = f"different ones of {lists}", "name lists of numbers"
                if name in features and is_text(features[name]):
                    remedy = "tokenize texts first, with dataset.map"
                where = f"token_columns[{number}]"
                raise ValueError(checks.sentence(where, name, expected, remedy))
        if not chosen:
            raise ValueError(
                checks.sentence("token_columns", chosen, "one name at least", "'auto' finds them")
            )
    # Stable: input_ids comes first, the others keep their order.
    chosen.sort(key=lambda name: name != "input_ids")
    _refuse_reserved(chosen)
    return chosen


def value_columns_of(
    features: Features, token_columns: list[str], asked: str | Sequence[str]
) -> list[str]:
    """Return the columns with one value a sequence; ``"auto"`` takes all but those of tokens."""
    others = [name for name in features if name not in token_columns]
    if asked == "auto":
        chosen = [name for name in others if not _is_mask(features, name)]
    else:
        chosen = [asked] if isinstance(asked, str) else list(asked)
    for name in chosen:
        if name not in others or not isinstance(features[name], ClassLabel | Value):
            found = features.get(name)
            expected = "a column of one number, class or text an example"
            remedy = "leave it out of value_columns, or name token_columns"
            raise ValueError(checks.sentence(f"features[{name!r}]", found, expected, remedy))
    _refuse_reserved(chosen)
    return chosen


def _refuse_reserved(names: list[str]) -> None:
    for name in names:
        if name in RESERVED:
            remedy = "rename_column or remove_columns it"
            raise ValueError(
                checks.sentence("column", name, f"none of {', '.join(RESERVED)}", remedy)
            )


def _is_mask(features: Features, name: str) -> bool:
    """Return whether a column says which of the input_ids are tokens, not padding."""
    return name == _MASK and holds_numbers(features[name]) and "input_ids" in features


def mask_of(dataset: Dataset, token_columns: list[str]) -> str | None:
    """Return the column whose zeros are padding in the source; None if there is no such zero.

    It is ``attention_mask``, packed or not, and goes with ``input_ids``.

    Raises:
        ValueError: it holds numbers below 0 or NaN, so it is not 0 in padding alone.
    """
    belongs = not {_MASK, "input_ids"}.isdisjoint(token_columns)
    if not belongs or not holds_numbers(dataset.features.get(_MASK)):
        return None
    # One look at each value, where it lies: a dataset without padding has no other cost.
    masks = dataset.data.column(_MASK)
    if dataset._indices is not None:  # what is not selected does not count
        masks = dataset.select_columns(_MASK).with_format("arrow")[:].column(_MASK)
    values = pc.list_flatten(masks)
    lowest = pc.min(values).as_py()
    if pa.types.is_floating(values.type) and pc.any(pc.is_nan(values)).as_py():
        lowest = float("nan")
    if lowest is not None and not lowest >= 0:
        expected = "0 at padding, and numbers above 0 at tokens"
        raise ValueError(checks.sentence(_MASK, lowest, expected, "rename or remove the column"))
    return None if lowest is None or lowest else _MASK


def check_paddings(features: Features, columns: list[str], config: TokenConfig) -> None:
    """Check that the types of token columns can hold what is written into them.

    Raises:
        ValueError: a type cannot hold its column's padding or -100; the message names the column.
    """
    if config.mask_first_label and not {"labels", "input_ids"} & set(columns):
        expected = "False without a column labels or input_ids"
        raise ValueError(checks.sentence("mask_first_label", True, expected, "rename the column"))
    if config.mask_first_label and "labels" in features and "labels" not in columns:
        found, expected = features["labels"], "a list of numbers, for mask_first_label=True"
        remedy = "rename it, or leave mask_first_label out"
        raise ValueError(checks.sentence("features['labels']", found, expected, remedy))
    written = {name: padding_of(name, config) for name in columns}
    if config.mask_first_label and "labels" not in columns:  # labels are made from input_ids
        written["labels"] = NO_LABEL
    for name, value in written.items():
        dtype = np.dtype(value_type(features, name).to_pandas_dtype())
        if name == "labels" and dtype.kind == "f":  # models would take them as classes, cut off
            expected, remedy = "integers", "cast_column or rename_column it"
            raise ValueError(checks.sentence(f"features[{name!r}]", str(dtype), expected, remedy))
        # -100 in a column of uint32 or of bools, for instance.
        if dtype.kind in "iub" and np.array(value).astype(dtype) != value:
            expected = f"a type that holds {value}"
            remedy = "cast_column it to List(Value('int32'))"
            raise ValueError(checks.sentence(f"features[{name!r}]", str(dtype), expected, remedy))


def value_type(features: Features, name: str) -> Any:
    """Return the Arrow type of a token column's values.

    Labels that packing makes have the type of input_ids.
    """
    feature: Any = features[name if name in features else "input_ids"]
    return feature.feature.pa_type


def bools_of(features: Features, columns: list[str]) -> list[str]:
    """Return which columns of tokens hold bools."""
    return [name for name in columns if pa.types.is_boolean(value_type(features, name))]
