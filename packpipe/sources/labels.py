"""The labels of a dataset, as rows store them, and which of them are bad."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, List, Value
from numpy.typing import NDArray

from packpipe.rows.labels import as_arrow, is_vector, label_values, vectors
from packpipe.rows.rejects import Reject
from packpipe.rows.text import joined


class Weights(NamedTuple):
    """What each image of a dataset counts in the loss.

    Attributes:
        values: float32[rows].
        rejects: the rows whose weight is bad.
    """

    values: NDArray[np.float32]
    rejects: list[Reject]


_REMEDY = "; repair it, or pass label_column=None"


class Labels(NamedTuple):
    """The labels of a dataset.

    Attributes:
        values: one a row, as rows store them.
        feature: of `datasets`, of those values.
        rejects: the rows whose label is bad.
    """

    values: pa.Array
    feature: Any
    rejects: list[Reject]


def bad_values(*columns: Labels | Weights | None) -> list[Reject]:
    """Return the rows whose label, or whose weight, is bad."""
    return [reject for column in columns if column is not None for reject in column.rejects]


def labels_of(dataset: Any, label_column: str | None) -> Labels | None:
    """Return the labels of a dataset, or None without a label column.

    Lists of numbers become lists of K numbers each: K is the commonest length, and others are bad.
    A float that is null becomes NaN.
    """
    if label_column is None:
        return None
    rows = dataset.select_columns([label_column]).with_format("arrow")
    values = joined(rows[:].column(0))  # `take` searches every chunk of a column
    if is_vector(values.type):
        return _vector_labels(values)
    if pa.types.is_floating(values.type):  # rows hold no nulls
        values = pa.array(values.to_numpy(zero_copy_only=False), values.type)
    feature = dataset.features[label_column]
    return Labels(values, feature, _bad_labels(values, feature))


def weights_of(dataset: Any, weight_column: str | None) -> Weights | None:
    """Return the weights of a dataset, or None without a column of them."""
    if weight_column is None:
        return None
    rows = dataset.select_columns([weight_column]).with_format("arrow")
    given = joined(rows[:].column(0))
    values = given.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~((values >= 0) & np.isfinite(values)))
    expected = "expected a finite number, 0 or more; repair it, or pass weight_column=None"
    rejects = [
        Reject(row, "label", "bad weight", f"weight is {given[row].as_py()}, {expected}")
        for row in bad.tolist()
    ]
    return Weights(values, rejects)


def _vector_labels(lists: pa.Array) -> Labels:
    values, lens = vectors(lists)
    length = values.shape[1]
    infinite = np.isinf(values)
    rejects = []
    for row in np.flatnonzero((lens != length) | infinite.any(axis=1)).tolist():
        what = f"label has {lens[row]} numbers, expected {length} as most have"
        if lens[row] == length:
            place = int(infinite[row].argmax())
            what = f"label[{place}] is {values[row, place]}, expected a finite number, or NaN"
        rejects.append(Reject(row, "label", "bad label", what + _REMEDY))
    return Labels(as_arrow(values), List(Value("float32"), length=length), rejects)


def _bad_labels(labels: pa.Array, feature: Any) -> list[Reject]:
    """Return the examples whose label is null, or no class of its ClassLabel; or infinite."""
    if pa.types.is_floating(labels.type):  # NaN is a number that is missing, as in lists
        return [
            Reject(
                row,
                "label",
                "bad label",
                f"label is {labels[row].as_py()}, expected a finite number, or NaN{_REMEDY}",
            )
            for row in np.flatnonzero(np.isinf(label_values(labels))).tolist()
        ]
    bad = pc.is_null(labels)
    expected = "a label"
    if isinstance(feature, ClassLabel):
        # A comparison with null gives null; those are in bad already.
        outside = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, feature.num_classes))
        bad = pc.or_(bad, pc.fill_null(outside, False))
        expected = f"0..{feature.num_classes - 1}"
    return [
        Reject(
            row,
            "label",
            "bad label",
            f"label is {labels[row].as_py()}, expected {expected}{_REMEDY}",
        )
        for row in np.flatnonzero(np.asarray(bad)).tolist()
    ]
