"""Labels of datasets as classes: encoded, held out by share, numbered as in a training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, LargeList, List

from packpipe import checks
from packpipe.planning.held_out import held_out
from packpipe.sources.columns import label_column_of
from packpipe.training.losses import LOSSES
from packpipe.training.objective import is_regression


def labelled(dataset: Dataset, loss: str = "softmax") -> Dataset:
    """Return a dataset with its label column as a ClassLabel.

    Lists of numbers stay what they are; so do all numbers for the loss of a regression.

    Args:
        dataset: with a label column.
        loss: what a model is trained with.

    Raises:
        ValueError: it has no label column.
    """
    column = label_column_of(dataset.features, "auto")
    if column is None:
        expected, remedy = "a label column among them", "name it label"
        raise ValueError(checks.sentence("columns", dataset.column_names, expected, remedy))
    is_list = isinstance(dataset.features[column], List | LargeList)
    if is_list or is_regression(LOSSES[loss]) or isinstance(dataset.features[column], ClassLabel):
        return dataset
    return dataset.class_encode_column(column)


def divided(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return a labelled dataset's images to train on, and those held out, in their order.

    Args:
        dataset: with a label column.
        fraction: share of each class that is held out.
        seed: of the draw.
    """
    column = label_column_of(dataset.features, "auto")
    classes = np.zeros(len(dataset), np.int64)  # images without classes are of one
    if isinstance(dataset.features[column], ClassLabel):
        labels = dataset.select_columns([column]).with_format("arrow")[:].column(0)
        classes = labels.cast(pa.int64()).fill_null(-1).to_numpy()
    chosen = held_out(classes, fraction, seed=seed)
    return dataset.select(np.flatnonzero(~chosen)), dataset.select(np.flatnonzero(chosen))


def with_classes_of(dataset: Dataset, trained: Any) -> Dataset:
    """Return a labelled dataset whose classes have the numbers that the trained ones have.

    Args:
        dataset: with a column of classes, told by their names.
        trained: feature of the labels of the training; if it has no classes, there is no number.

    Raises:
        ValueError: it has a class that is not trained; names the first.
    """
    column = label_column_of(dataset.features, "auto")
    own: Any = dataset.features[column]
    if not isinstance(trained, ClassLabel) or own.names == trained.names:
        return dataset
    numbers = {name: number for number, name in enumerate(trained.names)}
    labels = dataset.select_columns([column]).with_format("arrow")[:].column(0).to_pylist()
    known = [None if label is None or label < 0 else own.names[label] for label in labels]
    for name in known:
        if name is not None and name not in numbers:
            expected = f"one of {', '.join(map(repr, trained.names))}"
            raise ValueError(checks.sentence("a label", name, expected, "train on this class, too"))
    renumbered = [None if name is None else numbers[name] for name in known]
    return dataset.remove_columns([column]).add_column(column, renumbered, feature=trained)
