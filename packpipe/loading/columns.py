"""The columns of a batch as NumPy arrays of one shape: what batches of tensors are made of, too.

The shapes depend on the batch size, ``seq_len`` and ``max_segments`` alone, never on what the
rows hold, so a model is compiled for one graph only.

Shape letters, here and in the model: B rows, L tokens a row (seq_len), S segments a row
(max_segments), D bytes a patch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.rows.labels import label_values
from packpipe.rows.pairs import PairRows
from packpipe.rows.rows import NO_LABEL, Rows
from packpipe.rows.schema import SEGMENT_TYPES

NO_EXAMPLE = -1
# What augmentation may add to segments, and what stands where there is none.
_DRAWN = {
    "colours": 0,
    "solarize": 0,
    "mix_weight": 0,
    "partner_labels": NO_LABEL,
    "label_weights": 0,
}

# Makes a column of segments an array [B, S, ...]; its second argument is what stands where a row
# has no such segment.
_Pad: TypeAlias = Callable[[NDArray[Any], float], NDArray[Any]]


def batch_columns(rows: Rows | PairRows, max_segments: int, *, copy: bool = True) -> dict[str, Any]:
    """Return the columns of a `PackedBatch`, a `TokenBatch` or a `PairBatch`, as the rows are.

    Args:
        rows: what `read_rows` returned.
        max_segments: S; as many as any row holds, or more.
        copy: False lets the columns share the rows' memory where it is writable; views of Arrow's
            memory are not, and are copied.

    Returns:
        By name, in the order of the batch's fields: NumPy arrays, but lists of each row's values
        where a `TokenBatch` has such. Of pairs, the columns of ``images`` and those of ``texts``.

    Raises:
        ValueError: a row holds more segments than max_segments.
        TypeError: the labels of images are neither numbers nor lists of them.
    """
    if isinstance(rows, PairRows):
        return {
            name: batch_columns(part, max_segments, copy=copy)
            for name, part in rows._asdict().items()
        }
    return (token_columns if rows.of_tokens else image_columns)(rows, max_segments, copy=copy)


def image_columns(rows: Rows, max_segments: int, *, copy: bool) -> dict[str, Any]:
    """Return the columns of a `PackedBatch`; see `batch_columns`."""
    pad = _padding_to(rows, max_segments, "pass the max_segments the rows were packed with")
    tokens = ("patches", "segment_ids", "coords")
    columns = {
        **{name: _owned(rows.tokens[name], copy) for name in tokens},
        "seq_lens": pad(rows.seq_lens, 0),
        "grid_hw": pad(rows.grid_hw, 0),
        "example_index": pad(rows.example_index, NO_EXAMPLE),
    }
    if "labels" in rows.segments:
        labels = label_values(rows.segments["labels"])
        columns["labels"] = pad(labels, NO_LABEL if labels.dtype == np.int64 else np.nan)
    if "targets" in rows.tokens:
        targets = rows.tokens["targets"]
        wide = targets.dtype != np.uint8  # torch has few operations on uint16
        columns["targets"] = targets.astype(np.int32) if wide else _owned(targets, copy)
    if "weight" in rows.segments:
        columns["weight"] = pad(rows.segments["weight"], 0)
    if "view" in rows.segments:
        columns["view"] = pad(rows.segments["view"], NO_EXAMPLE)
    drawn = [name for name in _DRAWN if name in rows.segments]
    columns |= {name: pad(rows.segments[name], _DRAWN[name]) for name in drawn}
    if "mix_offset" in rows.tokens:
        columns["mix_offset"] = _owned(rows.tokens["mix_offset"], copy)
    return columns


def token_columns(rows: Rows, max_segments: int, *, copy: bool) -> dict[str, Any]:
    """Return the columns of a `TokenBatch`; see `batch_columns`."""
    pad = _padding_to(rows, max_segments, "pass as many as the rows hold")
    own = ("segment_ids", "position_ids")
    names = [*(name for name in rows.tokens if name not in own), *own]
    return {
        **{name: _owned(_signed(rows.tokens[name]), copy) for name in names},
        "seq_lens": pad(rows.seq_lens, 0),
        "fragment": pad(rows.fragment, 0),
        "example_index": pad(rows.example_index, NO_EXAMPLE),
        **{
            name: _values(name, values, rows, pad)
            for name, values in rows.segments.items()
            if name not in SEGMENT_TYPES
        },
    }


def _padding_to(rows: Rows, max_segments: int, remedy: str) -> _Pad:
    """Return what pads columns of segments; raise ValueError if a row holds more than there are."""
    width = checks.whole_number("max_segments", max_segments, 1, 2**31 - 1, remedy)
    num_segments = rows.num_segments
    too_many = np.flatnonzero(num_segments > width)
    if too_many.size:
        name, found = f"num_segments[{too_many[0]}]", int(num_segments[too_many[0]])
        expected = f"at most {width} (max_segments)"
        raise ValueError(checks.sentence(name, found, expected, remedy))
    places = rows.places(width)  # worked out once for all columns

    def pad(values: NDArray[Any], absent: float) -> NDArray[Any]:
        column = np.full((len(rows) * width, *values.shape[1:]), absent, values.dtype)
        column[places] = values
        return column.reshape(len(rows), width, *values.shape[1:])

    return pad


def _owned(values: NDArray[Any], copy: bool) -> NDArray[Any]:
    # torch has no read-only tensors, and JAX may take the memory over: writing to that of a mapped
    # file would end the process.
    return values.copy() if copy or not values.flags.writeable else values


def _signed(values: NDArray[Any]) -> NDArray[Any]:
    # torch has few operations on unsigned integers, uint8 excepted.
    wide = values.dtype.kind == "u" and values.dtype.itemsize > 1
    return values.astype(np.int64) if wide else values


def _values(name: str, values: pa.Array, rows: Rows, pad: _Pad) -> NDArray[Any] | list[list[Any]]:
    """Return a column with one value a segment: numbers as [B, S], others as lists of the rows."""
    kind = values.type
    if pa.types.is_floating(kind):
        return pad(values.to_numpy(zero_copy_only=False), np.nan)  # a null is NaN
    if not values.null_count and pa.types.is_boolean(kind):
        return pad(values.to_numpy(zero_copy_only=False), False)
    if not values.null_count and pa.types.is_integer(kind):
        return pad(values.to_numpy().astype(np.int64), NO_LABEL if name == "labels" else 0)
    ends = rows.offsets.tolist()
    return [values[a:b].to_pylist() for a, b in itertools.pairwise(ends)]
