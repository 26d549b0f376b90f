"""Opening what the command line is given as SOURCE."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packpipe import checks

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_NAME = re.compile(r"[\w-]+(/[\w.-]+)?")
_NAMED = 3  # files
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}


def open_source(source: str, split: str) -> Dataset:
    """Return a split of a dataset, of whichever form it is.

    Args:
        source: a file, a folder of images or files, what save_to_disk wrote, or a dataset's name.
        split: which split; of what has none, ``"train"``.

    Raises:
        ValueError: there is none, or `datasets` cannot load it.
    """
    import datasets

    path = Path(source)
    if not path.exists() and not _HUB_NAME.fullmatch(source):
        expected, remedy = "a file, a folder or a dataset's name", "there is no such file"
        raise ValueError(checks.sentence("SOURCE", source, expected, remedy))
    datasets.disable_progress_bars()
    try:
        found = _loaded(path, source, split)
    except Exception as error:
        remedy = f"{type(error).__name__}: {error}"
        expected = "a dataset that datasets can load"
        raise ValueError(checks.sentence("SOURCE", source, expected, remedy)) from error
    finally:
        if sys.stderr.isatty():
            datasets.enable_progress_bars()
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        expected = f"one of {', '.join(found)}"
        raise ValueError(checks.sentence("split", split, expected, "pass --split"))
    return found[split]


@contextmanager
def naming_files(dataset: Dataset) -> Iterator[None]:
    """Have an error about too many rejects say in which files the first ones lie."""
    from packpipe.rows.rejects import TooManyRejects

    try:
        yield
    except TooManyRejects as error:
        found = [file_of(dataset, reject.example_index) for reject in error.rejects[:_NAMED]]
        files = ", ".join(file for file in found if file)
        raise TooManyRejects(
            f"{error} ({files})" if files else str(error), error.rejects
        ) from error


def file_of(dataset: Dataset, example: int) -> str | None:
    """Return the file that an example's image lies in; None if it lies in the dataset."""
    row = dataset.with_format("arrow")[example]
    for name in row.column_names:
        value = row.column(name)[0].as_py()
        if isinstance(value, dict) and value.get("path") and not value.get("bytes"):
            return str(value["path"])
    return None


def _loaded(path: Path, source: str, split: str) -> Any:
    import datasets

    if path.is_file():
        builder = _BUILDERS.get(path.suffix, "parquet")
        return datasets.load_dataset(builder, data_files=str(path), split=split)
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(str(path))
    if path.is_dir():
        return datasets.load_dataset(str(path), split=split)
    return datasets.load_dataset(source, split=split)
