"""Labels of images, or of packed rows of them: encoded as classes, held out, numbered as trained.

Rows hold a list of labels each, images one; classes are told by their names in both. Lists of
numbers, and the numbers of a regression, are no classes, and stay what they are.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, LargeList, List, Value, concatenate_datasets
from numpy.typing import NDArray

from packpipe import checks
from packpipe.cli.output import without_bars
from packpipe.planning.held_out import held_out
from packpipe.rows.labels import label_values
from packpipe.rows.own_columns import holds_rows
from packpipe.sources.image_columns import (
    image_column_of,
    label_column_of,
    mask_column_of,
    weight_column_of,
)
from packpipe.sources.image_source import ImageSource
from packpipe.sources.kinds import holds_images, is_text
from packpipe.sources.labels import labels_of
from packpipe.training.losses import LOSSES
from packpipe.training.objective import is_regression

_OF_ROWS = "labels"
_QUICK = 10_000  # examples whose labels become classes within a second or so


def labelled(dataset: Dataset, loss: str = "softmax") -> Dataset:
    """Return images, or rows of them, with their labels as numbers of a ClassLabel.

    Classes that have no names are named by their value, and sorted by name. Lists of numbers stay
    what they are; so do all numbers for the loss of a regression, which texts are parsed as.

    Args:
        dataset: with a label column.
        loss: what a model is trained with.

    Raises:
        ValueError: there is no label column, or no image, or no such loss; or a text is no number,
            for a regression.
    """
    checks.choice("loss", loss, LOSSES, "choose a loss")
    if not len(dataset):
        expected, remedy = "one at least", "the source holds none"
        raise ValueError(checks.sentence("examples", 0, expected, remedy))
    if holds_rows(dataset.column_names):
        return _labelled_rows(dataset, loss)
    image_column_of(dataset.features, "auto")  # first: without images labels are no matter
    column = label_column_of(dataset.features, "auto")
    if column is None:
        expected = "a label column among them"
        remedy = "pass --label-column, or put the images of each class into a folder of its own"
        raise ValueError(checks.sentence("columns", dataset.column_names, expected, remedy))
    if is_text(dataset.features[column]) and is_regression(LOSSES[loss]):
        return _parsed(dataset, column, loss)
    if _is_encoded(dataset.features[column], loss):
        return dataset
    # The bar of what takes no second is a line that nobody asked for.
    with without_bars() if len(dataset) < _QUICK else nullcontext():
        return dataset.class_encode_column(column)


def with_names(images: Dataset, names: list[str] | None) -> Dataset:
    """Return images whose labels, if they are numbers without names, have the names that are given.

    `labelled` would name them by their value and sort those as text, 10 before 2.

    Raises:
        ValueError: they are whole numbers, but there are no names, or not of one of them; or they
            are other numbers.
    """
    column = label_column_of(images.features, "auto")
    kind = getattr(images.features.get(column), "pa_type", pa.null())
    if isinstance(images.features.get(column), ClassLabel):
        return images
    if pa.types.is_floating(kind):
        expected, remedy = "whole numbers, or texts", "pass another --label-column"
        raise ValueError(checks.sentence("labels", str(kind), expected, remedy))
    if not pa.types.is_integer(kind):
        return images
    if not names:
        expected, remedy = "the names of labels that are numbers", "pass --classes FILE"
        raise ValueError(checks.sentence("classes", names, expected, remedy))
    labels = _flat(images)
    for label in labels.unique().to_pylist():
        if label is not None and not 0 <= label < len(names):
            expected = f"an integer in 0..{len(names) - 1}"
            remedy = "pass --classes FILE with a line for each, 0 first"
            raise ValueError(checks.sentence("a label", label, expected, remedy))
    return _with_labels(images, labels, ClassLabel(names=names))


def _parsed(dataset: Dataset, column: str, loss: str) -> Dataset:
    """Return images whose labels, which are texts, are numbers."""
    numbers = []
    for text in dataset[column][:]:
        try:
            numbers.append(None if text is None else float(text))
        except ValueError as error:
            expected, remedy = f"a number for --loss {loss}", "train classes with --loss sigmoid"
            raise ValueError(checks.sentence("a label", text, expected, remedy)) from error
    return _with_labels(dataset, pa.array(numbers, pa.float64()), Value("float64"))


def _is_encoded(feature: Any, loss: str) -> bool:
    """Return whether labels are what a model can be trained on with a loss."""
    return isinstance(feature, ClassLabel | List | LargeList) or is_regression(LOSSES[loss])


def chosen(
    dataset: Dataset,
    image_column: str = "auto",
    label_column: str = "auto",
    *,
    mask_column: str | None = None,
    weight_column: str | None = None,
) -> Dataset:
    """Return a dataset of images in which the columns that are asked for are the only ones.

    Args:
        dataset: the images; rows of them have their own columns.
        image_column: its name; ``"auto"`` finds the only one.
        label_column: its name; ``"auto"`` leaves the labels to be found.
        mask_column: that of class maps, which are in the place of labels; None for none.
        weight_column: that of weights; None for none.

    Raises:
        ValueError: there is no such column, or it holds something else.
    """
    asked_for = (image_column, label_column, mask_column, weight_column)
    if holds_rows(dataset.column_names) or asked_for == ("auto", "auto", None, None):
        return dataset
    # Of a table of paths the images have a column of their own.
    asked = "auto" if is_text(dataset.features.get(image_column)) else image_column
    mask = mask_column_of(dataset.features, mask_column)
    image = image_column_of(dataset.features, asked, mask=mask)
    label = None if mask is not None else label_column_of(dataset.features, label_column)
    weight = weight_column_of(dataset.features, weight_column)
    # The image first, by whose file an example is named.
    names = [name for name in (image, label, mask, weight) if name is not None]
    found = dataset.select_columns(names)
    # So that it is found, whatever its name; what numbers mean, the loss says.
    if label is None or isinstance(found.features[label], ClassLabel):
        return found
    return found if label == "label" else found.rename_column(label, "label")


def with_one_image(dataset: Dataset, image_column: str) -> Dataset:
    """Return a dataset without other columns of images than the one that is asked for.

    Packed rows have their own columns.
    """
    if holds_rows(dataset.column_names):
        return dataset
    asked = dataset.features.get(image_column)
    if image_column == "auto" or is_text(asked):  # of a table of paths it is the only one
        return dataset
    image_column_of(dataset.features, image_column)  # raises if it holds none
    images = [name for name, feature in dataset.features.items() if holds_images(feature)]
    return dataset.remove_columns([name for name in images if name != image_column])


def names_in(path: Path, expected: str = "a file of text in UTF-8") -> list[str]:
    """Return the names of classes in a file, a line each; empty lines are none.

    Args:
        path: the file.
        expected: what a command expects, for the error.

    Raises:
        ValueError: it cannot be read, or is no text, or a name is there twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors may write a mark first
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        remedy = "write a name a line"
        raise ValueError(
            checks.sentence("--classes", str(path), f"{expected} ({why})", remedy)
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        what, expected = f"a name in --classes {path}", "one line of that name"
        raise ValueError(checks.sentence(what, twice[0], expected, "a line is a class"))
    return names


def classes_of(dataset: Dataset) -> ClassLabel | None:
    """Return the classes of what `labelled` returned; None if the labels are no classes."""
    found = _feature_of(dataset)
    return found if isinstance(found, ClassLabel) else None


def num_outputs(dataset: Dataset) -> int:
    """Return how many outputs a model of what `labelled` returned has: classes, or numbers."""
    found = _feature_of(dataset)
    if isinstance(found, ClassLabel):
        return len(found.names)
    if isinstance(found, Value):
        return 1
    if holds_rows(dataset.column_names):  # of as many numbers each
        return int(found.length)
    labels = labels_of(dataset, _column(dataset))
    return 1 if labels is None else int(label_values(labels.values[:1]).shape[1])


def _feature_of(dataset: Dataset) -> Any:
    """Return the feature of one label."""
    found: Any = dataset.features[_column(dataset)]
    return found.feature if holds_rows(dataset.column_names) else found


def divided(
    dataset: Dataset, fraction: float, seed: int, *, by_class: bool = True
) -> tuple[Dataset, Dataset]:
    """Return what is trained on, and what is held out, in their order.

    Of images, a share of each class, or of all if there are no classes, and all or none of those
    that are one file or the same bytes (`ImageSource.same_files`); of packed rows a share of
    the rows, whatever their classes, since a row is read whole.

    Args:
        dataset: what `labelled` returned.
        fraction: the share that is held out.
        seed: of the draw.
        by_class: whether images have labels, which may be classes.

    Raises:
        ValueError: no class has two images; there are no two rows, or an image has views on both
            sides.
    """
    if holds_rows(dataset.column_names):
        return _divided_rows(dataset, fraction, seed)
    labels = np.zeros(len(dataset), np.int64)
    if by_class and classes_of(dataset):
        labels = _flat(dataset).fill_null(-1).to_numpy()
    chosen = held_out(labels, fraction, seed=seed, groups=_files(dataset))
    return dataset.select(np.flatnonzero(~chosen)), dataset.select(np.flatnonzero(chosen))


def _files(dataset: Dataset) -> NDArray[np.int64]:
    """Return int64[images], a number for each file or, of images in the dataset, for its bytes."""
    image = str(_image_of(dataset))  # there is one: `labelled`, or `chosen`, has seen to it
    return ImageSource(dataset.select_columns([image]).with_format("arrow")).same_files()


def _image_of(dataset: Dataset) -> str | None:
    """Return the name of the column of images; None of packed rows, or without one."""
    # The first column of images: another one is of masks, which `chosen` puts behind it.
    names = [name for name, feature in dataset.features.items() if holds_images(feature)]
    return None if holds_rows(dataset.column_names) else next(iter(names), None)


def shared_images(trained: Dataset, other: Dataset) -> NDArray[np.int64]:
    """Return int64[shared], the rows of another dataset whose file, or bytes, are trained on, too.

    Of packed rows, and of images that are stored in another way, nothing is known: they are none.

    Args:
        trained: images that are trained on, or rows of them.
        other: images, or rows of them.
    """
    name, other_name = _image_of(trained), _image_of(other)
    if name is None or other_name is None or trained.features[name] != other.features[other_name]:
        return np.zeros(0, np.int64)
    both = [
        images.select_columns([column]).rename_columns({column: "image"}).with_format("arrow")
        for images, column in ((trained, name), (other, other_name))
    ]
    joined = concatenate_datasets(both)
    first = ImageSource(joined).same_files()[len(trained) :]
    return np.flatnonzero(first < len(trained))


def with_classes_of(dataset: Dataset, trained: ClassLabel | None) -> Dataset:
    """Return images, or rows of them, whose classes have the numbers that the trained ones have.

    Args:
        dataset: what `labelled` returned.
        trained: the classes of the training; of other labels, None, nothing is numbered.

    Raises:
        ValueError: it has a class that is not trained; names the first.
    """
    own = classes_of(dataset)
    if own is None or trained is None or own.names == trained.names:
        return dataset
    numbers = {name: number for number, name in enumerate(trained.names)}
    labels = _flat(dataset).to_pylist()
    known = [None if label is None or label < 0 else own.names[label] for label in labels]
    for name in known:
        if name is not None and name not in numbers:
            expected = f"one of {', '.join(map(repr, trained.names))}"
            raise ValueError(checks.sentence("a label", name, expected, "train on this class, too"))
    renumbered = pa.array([None if n is None else numbers[n] for n in known], pa.int64())
    return _with_labels(dataset, renumbered, trained)


def _column(dataset: Dataset) -> str:
    if holds_rows(dataset.column_names):
        return _OF_ROWS
    found: Any = label_column_of(dataset.features, "auto")  # never None: `labelled` has seen to it
    return str(found)


def _labelled_rows(rows: Dataset, loss: str) -> Dataset:
    feature: Any = rows.features.get(_OF_ROWS)
    if feature is None:
        remedy = "pack a source with a label column"
        raise ValueError(checks.sentence("columns", rows.column_names, "labels among them", remedy))
    one = getattr(feature, "feature", None)
    if one is not None and _is_encoded(one, loss):
        return rows
    if not isinstance(one, Value):
        expected, remedy = "lists of classes", "pack with another label column"
        raise ValueError(checks.sentence("features['labels']", feature, expected, remedy))
    labels = _flat(rows).to_pylist()
    names = sorted({str(label) for label in labels if label is not None})
    numbers = {name: number for number, name in enumerate(names)}
    found = [None if label is None else numbers[str(label)] for label in labels]
    return _with_labels(rows, pa.array(found, pa.int64()), ClassLabel(names=names))


def _divided_rows(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    remedy = "pass a source as --val"
    if len(rows) < 2:
        expected = "2 or more, to hold some out"
        raise ValueError(checks.sentence("packed rows", len(rows), expected, remedy))
    chosen = held_out(np.zeros(len(rows), np.int64), fraction, seed=seed)
    parts = rows.select(np.flatnonzero(~chosen)), rows.select(np.flatnonzero(chosen))
    both = np.intersect1d(_examples_in(parts[0]), _examples_in(parts[1]))
    if len(both):
        expected = "a source, since views of an image would be on both sides"
        what = f"{fraction}, with example {both[0]} in several rows"
        raise ValueError(checks.sentence("--val", what, expected, remedy))
    return parts


def _examples_in(rows: Dataset) -> NDArray[np.int64]:
    found = rows.select_columns(["example_index"]).with_format("arrow")[:].column(0)
    examples: NDArray[np.int64] = found.combine_chunks().flatten().to_numpy()
    return examples


def _flat(dataset: Dataset) -> pa.Array:
    """Return the labels, one an image, in the order of the images."""
    column = dataset.select_columns([_column(dataset)]).with_format("arrow")[:].column(0)
    found = column.combine_chunks()
    return found.flatten() if pa.types.is_list(found.type) else found.cast(pa.int64())


def _with_labels(dataset: Dataset, labels: pa.Array, classes: ClassLabel | Value) -> Dataset:
    """Return images, or rows of them, with other labels; the other columns are not copied."""
    column = _column(dataset)
    if not holds_rows(dataset.column_names):
        return dataset.remove_columns([column]).add_column(column, labels, feature=classes)
    lists = dataset.select_columns([column]).with_format("arrow")[:].column(0).combine_chunks()
    lens = lists.value_lengths().fill_null(0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    found = pa.ListArray.from_arrays(pa.array(offsets), labels)
    renamed = dataset.remove_columns([column]).add_column(column, found, feature=List(classes))
    # What reads the tokens of rows in a store, which a new column takes off.
    transform = dataset.format["format_kwargs"].get("transform")
    return renamed if transform is None else renamed.with_transform(transform)
