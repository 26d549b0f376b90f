"""Opens tables of paths and labels: CSV and TSV, and columns of paths in other tables, as images.

A CSV's values are text as it is written: a class may be called 007 or NA; an empty value is none.
"""

from __future__ import annotations

import hashlib
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packpipe import checks

if TYPE_CHECKING:
    from datasets import Dataset, Features

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXT_ENDINGS = tuple(_DELIMITERS)
_IMAGE = "image"  # name of the column of images, beside that of their paths
_LOOKED_AT = 100  # values that tell whether a column holds paths, and whether files are there


class WrongTable(ValueError):
    """A text table that cannot be read."""


def is_text_table(source: str) -> bool:
    """Return whether a file is a CSV or TSV, to judge by its name."""
    return Path(source).suffix.lower() in _DELIMITERS


def read_text_table(source: str) -> Dataset:
    """Return the rows of a CSV or TSV, all its columns as text.

    Raises:
        WrongTable: a ValueError; its first line holds no names of columns, or other delimiters, or
            it is not UTF-8, or a line has too many values.
    """
    import datasets
    import fsspec
    import pyarrow as pa
    from pyarrow import csv

    delimiter = _DELIMITERS[Path(source).suffix.lower()]
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with fsspec.open(source, "rb") as file:
        content = file.read()
    _check_delimited(content, source, delimiter)
    # Columns of text from the start: guessed types would make 7 of 007, and nothing of NA.
    options = csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
    try:
        lines = csv.open_csv(pa.BufferReader(content), parse_options=parsing)
        written = lines.schema.names
        options.column_types = dict.fromkeys(written, pa.string())
        reader = pa.BufferReader(content)
        table = csv.read_csv(reader, parse_options=parsing, convert_options=options)
    except pa.ArrowInvalid as error:
        expected, remedy = "a table of UTF-8 text with names of columns", str(error)
        raise WrongTable(checks.sentence("SOURCE", source, expected, remedy)) from error
    names = [name.strip() for name in written]  # of "path, label"
    table = table.rename_columns(names)
    if any(_look_like_images(names)) or len(set(names)) < len(names):
        expected = "different names of columns in the first line"
        raise WrongTable(checks.sentence("columns", names, expected, "such as path,label"))
    digest = hashlib.sha256(content).hexdigest()
    return datasets.Dataset(table, fingerprint=digest[:16])


def _check_delimited(content: bytes, source: str, delimiter: str) -> None:
    """Raise WrongTable if the first line is one name with delimiters of another table in it."""
    first = content.partition(b"\n")[0].decode("utf-8-sig", "replace").rstrip("\r")
    others = [other for other in (";", "\t", ",") if other in first]
    if others and delimiter not in first:
        named = {",": "commas", "\t": "tabs"}
        remedy = f"write the table anew with {named[delimiter]}"
        if others[0] in named:
            remedy = f"name the file .{'tsv' if delimiter == ',' else 'csv'}"
        expected = f"names with {named[delimiter]} between them in {Path(source).name}"
        raise WrongTable(checks.sentence("columns", first, expected, remedy))


def path_column_of(
    features: Features,
    rows: Dataset,
    asked: str,
    label_column: str = "auto",
    mask_column: str | None = None,
) -> str | None:
    """Return the column of paths of images: the one asked for, or the only one that looks so.

    None if the table holds images themselves, or lists of tokens, or nothing that looks like paths.
    Labels, which may be lists of numbers, are no tokens.

    Raises:
        ValueError: several look so.
    """
    from packpipe.sources.kinds import holds_images, holds_numbers, is_text

    texts = [name for name, feature in features.items() if is_text(feature)]
    if asked != "auto":
        return asked if asked in texts else None
    labels = ("label", "labels") if label_column == "auto" else (label_column,)
    labels = (*labels, mask_column)
    others = [feature for name, feature in features.items() if name not in labels]
    if any(holds_images(one) or holds_numbers(one) for one in others):
        return None
    paths = [name for name in texts if name != mask_column and _holds_paths(rows, name)]
    if len(paths) > 1:
        expected, remedy = "exactly one", "pass --image-column, or --mask-column for that of masks"
        raise ValueError(checks.sentence("columns of paths", paths, expected, remedy))
    return paths[0] if paths else None


def with_images(
    rows: Dataset,
    source: str,
    path_column: str,
    label_column: str,
    *,
    texts: bool = False,
    mask_column: str | None = None,
    weight_column: str | None = None,
) -> Dataset:
    """Return a table with a column of the images at its paths, and labels that are found.

    Texts become classes, named and sorted by their value. Classes, numbers and lists of them stay
    what they are: what they mean, the loss says.

    Args:
        rows: the table.
        source: its file; paths that are relative start at its folder.
        path_column: name of its column of paths.
        label_column: name of its column of labels; ``"auto"`` takes label or labels, or the only
            column beside the paths; ``"none"`` takes none.
        texts: whether labels that are texts stay so, for who parses them as numbers.
        mask_column: name of the column of class maps, or of their paths; there are no labels then.
        weight_column: name of the column of weights, which may be texts.

    Raises:
        ValueError: none of the first files is there, or a column is not, or a weight is no number.
    """
    import datasets

    from packpipe.images.remote import is_remote
    from packpipe.sources.kinds import is_text

    there = is_remote(source)
    folder = source.rpartition("/")[0] if there else str(Path(source).absolute().parent)
    images = _images_at(rows, path_column, folder, "--image-column")
    taken = (path_column, mask_column, weight_column)
    asked = label_column if mask_column is None else "none"
    label = _label_of([n for n in rows.column_names if n not in taken], asked)
    name = _IMAGE
    if name in rows.column_names:  # that of the paths, or one that they would hide
        name = path_column
        rows = rows.remove_columns([path_column])
    before = rows._fingerprint
    found = rows.add_column(name, images, feature=datasets.Image())
    if is_text(rows.features.get(mask_column)):
        masks = _images_at(rows, str(mask_column), folder, "--mask-column")
        found = found.remove_columns([mask_column])
        found = found.add_column(mask_column, masks, feature=datasets.Image())
    if is_text(rows.features.get(weight_column)):
        weights = _numbers(rows[weight_column], "--weight-column")
        found = found.remove_columns([weight_column])
        found = found.add_column(weight_column, weights, feature=datasets.Value("float64"))
    if label is not None:
        found = with_labels(found, label, stripped=is_text_table(source), texts=texts)
        if label_column == "auto" and label in found.column_names:
            found = _findable(found, label)
    others = (("mask", mask_column), ("weight", weight_column))
    known = repr((before, folder, name, label, *(other for other in others if other[1])))
    digest = hashlib.sha256(known.encode(errors="surrogatepass"))
    return datasets.Dataset(found.data, found.info, fingerprint=digest.hexdigest()[:16])


def _images_at(rows: Dataset, column: str, folder: str, option: str) -> list[Any]:
    """Return the images at the paths of a column, as `datasets` stores them; option names it."""
    paths = [None if path is None else _joined(folder, path) for path in rows[column]]
    _check_there(paths, rows[column], column, folder, option)
    return [None if path is None else {"bytes": None, "path": path} for path in paths]


def _numbers(texts: Any, option: str) -> list[float | None]:
    """Return texts as numbers; option names their column."""
    found = []
    for text in texts:
        try:
            found.append(None if text is None else float(text))
        except ValueError as error:
            expected, remedy = "a number an image", f"pass another {option}"
            raise ValueError(checks.sentence("a weight", text, expected, remedy)) from error
    return found


def _label_of(names: list[str], asked: str) -> str | None:
    if asked == "none":
        return None
    if asked != "auto":
        if asked not in names:
            expected, remedy = f"one of {names}", "pass --label-column"
            raise ValueError(checks.sentence("--label-column", asked, expected, remedy))
        return asked
    named = [name for name in ("label", "labels") if name in names]
    # Of both label and labels, and of several others, none is taken: the caller has to say.
    return next((some[0] for some in (named, names) if len(some) == 1), None)


def _findable(rows: Dataset, label: str) -> Dataset:
    """Return a table whose labels are found without their name: classes, or a column label."""
    import datasets

    named = label in ("label", "labels") or "label" in rows.column_names
    if named or isinstance(rows.features[label], datasets.ClassLabel):
        return rows
    return rows.rename_column(label, "label")


def with_labels(rows: Dataset, column: str, *, stripped: bool, texts: bool) -> Dataset:
    """Return a table whose labels are classes, numbers or lists of them, or texts if they may."""
    import datasets
    import pyarrow as pa

    from packpipe.sources.kinds import is_text

    feature = rows.features[column]
    dtype = feature.pa_type if isinstance(feature, datasets.Value) else None
    if dtype is None or pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
        return rows
    values = rows[column][:]
    if stripped:  # "path, label" is written with blanks that belong to no name
        values = [None if value is None else value.strip() or None for value in values]
    if texts and is_text(feature):
        return rows.remove_columns([column]).add_column(column, values, feature=feature)
    names = sorted({str(value) for value in values if value is not None})
    numbers = {name: number for number, name in enumerate(names)}
    labels = [None if value is None else numbers[str(value)] for value in values]
    classes = datasets.ClassLabel(names=names)
    return rows.remove_columns([column]).add_column(column, labels, feature=classes)


def _check_there(
    paths: list[str | None], written: Any, column: str, folder: str, option: str
) -> None:
    """Raise ValueError if none of the first files is there: the column or the folder is wrong."""
    from packpipe.images.remote import is_remote

    local = [(path, text) for path, text in zip(paths, written, strict=True) if path is not None]
    local = [pair for pair in islice(local, _LOOKED_AT) if not is_remote(pair[0])]
    if local and not any(os.path.exists(path) for path, _ in local):
        expected = f"files that are there; relative paths start at {folder}"
        what, remedy = local[0][1], f"pass {option}"
        if "\\" in what and os.sep == "/":
            remedy = f"write / for the backslashes of Windows, or pass {option}"
        raise ValueError(checks.sentence(f"column {column!r}", what, expected, remedy))


def _joined(folder: str, path: str) -> str:
    from packpipe.images.remote import is_remote

    if is_remote(path):
        return path
    return f"{folder}/{path}" if is_remote(folder) else os.path.join(folder, path)


def _holds_paths(rows: Dataset, column: str) -> bool:
    first = [value for value in rows[:_LOOKED_AT][column] if value is not None]
    return sum(_look_like_images(first)) * 2 > len(first)


def _look_like_images(texts: list[str]) -> list[bool]:
    from packpipe.sources.kinds import image_suffixes

    suffixes = image_suffixes()
    return [os.path.splitext(text)[1].lower() in suffixes for text in texts]
