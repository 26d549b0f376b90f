"""Opens SOURCE, an argument of the command line, as a `datasets.Dataset`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from packpipe import checks
from packpipe.cli.archives import ARCHIVE_ENDINGS, is_archive, unpacked
from packpipe.cli.output import saying, without_bars
from packpipe.cli.path_tables import (
    TEXT_ENDINGS,
    WrongTable,
    is_text_table,
    path_column_of,
    read_text_table,
    with_images,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from packpipe.rows.rejects import Reject

# A dataset's name on the Hub: NAME or OWNER/NAME.
_HUB_NAME = re.compile(r"[\w-]+(/[\w.-]+)?")
_NAMED = 3  # files that an error names
_SHOWN_REJECTS = 5
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}


def open_source(
    source: str,
    split: str,
    options: tuple[str, str] = ("SOURCE", "--split"),
    *,
    image_column: str = "auto",
    label_column: str = "auto",
    mask_column: str | None = None,
    weight_column: str | None = None,
    rows: bool = False,
    texts: bool = False,
    cache_bytes: int | None = None,
) -> Dataset:
    """Return one split of a dataset that is given as a file, a folder or a name.

    Of a store, a file or a folder of packed rows.

    Args:
        source: a file, also behind a scheme: a table, or an archive of images; a folder of images
            or files, what save_to_disk wrote, or a dataset's name.
        split: its name. A table has ``"train"`` alone; a saved Dataset is returned for any.
        options: what errors call the two.
        image_column: of a table of paths, the column of paths; ``"auto"`` finds it.
        label_column: of a table of paths, the column of labels; ``"auto"`` finds it, ``"none"``
            takes none. Other datasets have the columns that they have.
        mask_column: of a table of paths, the column of paths of class maps; None for none.
        weight_column: of a table of paths, the column of weights; None for none.
        rows: whether packed rows will do.
        texts: of a table of paths, whether labels that are texts stay so; else they become classes.
        cache_bytes: of packed rows in a store, as of `packpipe.open_packed`.

    Raises:
        ValueError: there is no such source or split, or `datasets` cannot load it; or it is one of
            packed rows, and they will not do; or a table has no such column.
    """
    with saying("importing datasets"):  # here, since it is slow, and --help does without
        import datasets

    from packpipe.images.remote import is_remote
    from packpipe.rows.own_columns import holds_rows

    with saying(f"reading {source}"):  # an archive is unpacked
        path = folder_of(source)
    if is_remote(source) and is_packed(source):
        if not rows:
            raise ValueError(_packed_already(source, options[0]))
        from packpipe.building.opened import open_packed

        return open_packed(source, cache_bytes=cache_bytes)
    # What looks like a name is left to datasets, which asks the Hub; other paths must exist.
    if not (path.exists() or is_remote(source) or _HUB_NAME.fullmatch(source)):
        expected, remedy = "a file, a folder or a dataset's name", "there is no such file"
        raise ValueError(checks.sentence(options[0], source, expected, remedy))
    _check_built(path)
    _check_some(path, options[0], source)
    try:
        with without_bars(), saying(f"reading {source}"):
            if is_text_table(source) and (path.is_file() or is_remote(source)):
                found = read_text_table(source)
            else:
                found = _loaded(path, source, split)
    except WrongTable:
        raise
    except Exception as error:  # datasets raises errors of many libraries
        remedy = f"{type(error).__name__}: {error}"
        if not (path.exists() or is_remote(source)):
            remedy = f"no file or folder is called so, and no dataset was found: {remedy}"
        expected = "a dataset that datasets can load"
        raise ValueError(checks.sentence(options[0], source, expected, remedy)) from error
    if not isinstance(found, datasets.Dataset):  # a DatasetDict that was saved, say
        if split not in found:
            expected = f"one of {', '.join(found)}"
            raise ValueError(checks.sentence("split", split, expected, f"pass {options[1]}"))
        found = found[split]
    if holds_rows(found.column_names):
        if not rows:
            raise ValueError(_packed_already(source, options[0]))
        return found
    if path.is_file() or is_remote(source):
        paths = path_column_of(found.features, found, image_column, label_column, mask_column)
        if paths is not None:
            more: dict[str, Any] = {"mask_column": mask_column, "weight_column": weight_column}
            return with_images(found, source, paths, label_column, texts=texts, **more)
        if is_text_table(source) and image_column != "auto":
            expected, remedy = f"one of {found.column_names}", "check its spelling"
            raise ValueError(checks.sentence("--image-column", image_column, expected, remedy))
        if is_text_table(source):
            expected, remedy = "paths of images among them", "pass --image-column"
            raise ValueError(checks.sentence("columns", found.column_names, expected, remedy))
    return found


def folder_of(source: str) -> Path:
    """Return the path of a source; of an archive, the folder that its files are unpacked into."""
    path = Path(source)
    return unpacked(path) if is_archive(path) else path


def is_packed(source: str) -> bool:
    """Return whether this is a folder that `pack` has written, here or in a store."""
    from packpipe.building.opened import manifest_at
    from packpipe.building.shards import MANIFEST
    from packpipe.images.remote import is_remote

    if not is_remote(source):
        return (Path(source) / MANIFEST).is_file()
    if _is_file_name(source) or "::" in source:
        return False
    try:
        found = manifest_at(source)
    except (ValueError, PermissionError):  # somebody else's file; or there is none, in some stores
        return False
    return isinstance(found, dict) and {"packpipe", "complete"} <= found.keys()


def _is_file_name(source: str) -> bool:
    """Return whether a name has the ending of a table or an archive."""
    return source.lower().endswith((*_BUILDERS, *TEXT_ENDINGS, *ARCHIVE_ENDINGS))


def _packed_already(source: str, option: str) -> str:
    expected, remedy = "images or sequences, not packed yet", "pass what was packed"
    return checks.sentence(option, f"{source}, packed rows", expected, remedy)


def manifest_in(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder that `pack` has written, or is writing; else None."""
    from packpipe.building.shards import read_manifest

    try:
        found = read_manifest(folder)
    except (OSError, ValueError):  # none, or somebody else's
        return None
    return found if isinstance(found, dict) and {"packpipe", "complete"} <= found.keys() else None


def splits_in(source: str) -> list[str]:
    """Return the names of the splits of a source that can be opened."""
    import datasets

    from packpipe.cli.image_folder import files_of, image_splits
    from packpipe.images.remote import is_remote

    path = folder_of(source)
    if path.is_file() or is_remote(source) or (path / "state.json").is_file():
        return ["train"]
    if (path / "dataset_dict.json").is_file():
        return list(datasets.load_from_disk(str(path)))
    if path.is_dir():
        files = files_of(path.absolute())
        if files.are_images:
            return list(image_splits(path.absolute(), files))
    return list(datasets.get_dataset_split_names(source))


@contextmanager
def naming_files(dataset: Dataset) -> Iterator[None]:
    """Add the files of the first rejects to the message of a `TooManyRejects`."""
    from packpipe.rows.rejects import TooManyRejects

    try:
        yield
    except TooManyRejects as error:
        found = [file_of(dataset, reject.example_index) for reject in error.rejects[:_NAMED]]
        files = ", ".join(file for file in found if file)
        raise TooManyRejects(
            f"{error} ({files})" if files else str(error), error.rejects
        ) from error


def with_files(dataset: Dataset | None, rejects: list[Reject]) -> list[tuple[str, Reject]]:
    """Return rejects, each with its file, or its number where the dataset is not at hand or holds
    the image itself.
    """
    numbers = [reject.example_index for reject in rejects]
    files = [None if dataset is None else file_of(dataset, number) for number in numbers]
    names = [file or f"example {number}" for file, number in zip(files, numbers, strict=True)]
    return list(zip(names, rejects, strict=True))


def say_rejected(rejected: list[tuple[str, Reject]]) -> None:
    """Print the first rejects, and how many more there are, on stderr."""
    for name, reject in rejected[:_SHOWN_REJECTS]:
        typer.echo(checks.plain(f"rejected {name}: {reject.exception}"), err=True)
    if (more := len(rejected) - _SHOWN_REJECTS) > 0:
        typer.echo(f"and {more:,} more are rejected", err=True)


def file_of(dataset: Dataset, example: int) -> str | None:
    """Return the path of an example's image file; None if the dataset itself holds the image."""
    # In Arrow format, or `datasets` would decode the image, which may be the broken one.
    row = dataset.with_format("arrow")[example]
    for name in row.column_names:
        value = row.column(name)[0].as_py()
        if isinstance(value, dict) and value.get("path") and not value.get("bytes"):
            return str(value["path"])
    return None


def _from_folder(folder: Path, split: str) -> Any:
    """Return what a folder holds, and say on stderr which of its files are not in it."""
    import datasets

    from packpipe.cli.image_folder import files_of, image_splits

    files = files_of(folder)
    found: Any = (
        image_splits(folder, files)
        if files.are_images
        else datasets.load_dataset(str(folder), split=split)
    )
    rows = found.get(split) if isinstance(found, dict) else found
    if rows is not None and files.images:
        there = files.images + (files.others if files.are_images else [])
        _say_left_out(folder, split, there, set(_paths_in(rows)))
    return found


def _say_left_out(folder: Path, split: str, there: list[str], loaded: set[str]) -> None:
    left = [os.path.relpath(path, folder) for path in there if path not in loaded]
    if left:
        named = ", ".join(left[:_NAMED]) + (", ..." if len(left) > _NAMED else "")
        many = len(there) - len(left)
        said = f"{folder.name}: {many} of {len(there)} files are in split {split}; not {named}"
        typer.echo(checks.plain(said), err=True)


def _paths_in(rows: Dataset) -> Iterator[str]:
    """Yield the paths of all images of a dataset."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            for batch in rows.select_columns([name]).with_format("arrow").iter(batch_size=10_000):
                yield from filter(None, batch.column(0).combine_chunks().field("path").to_pylist())


def _check_built(folder: Path) -> None:
    """Raise ValueError if `pack` has not completed this folder, or `pack_pairs` wrote it."""
    from packpipe.building.shards import MANIFEST

    if (manifest := manifest_in(folder)) is not None and not manifest["complete"]:
        remedy = "call pack again, and it continues"
        raise ValueError(checks.sentence("SOURCE", str(folder), "a complete build", remedy))
    if all((folder / part / MANIFEST).is_file() for part in ("images", "texts")):
        expected, remedy = "rows of images alone", f"pass {folder / 'images'}"
        raise ValueError(checks.sentence("SOURCE", f"{folder}, of pairs", expected, remedy))


def _check_some(path: Path, name: str, source: str) -> None:
    """Raise ValueError if this is a folder without files, or an image alone."""
    from packpipe.cli.image_folder import files_of
    from packpipe.sources.kinds import image_suffixes

    expected = "a folder of images, a table or an archive"
    if path.is_dir() and not any(files_of(path)):
        remedy = "put images into it, or pass another one"
        raise ValueError(checks.sentence(name, f"{source}, without any file", expected, remedy))
    if path.is_file() and path.suffix.lower() in image_suffixes():
        remedy = "pass the folder around it"
        raise ValueError(checks.sentence(name, f"{source}, an image", expected, remedy))


def _loaded(path: Path, source: str, split: str) -> Any:
    import datasets

    from packpipe.images.remote import is_remote

    if path.is_file() or is_remote(source):
        builder = _BUILDERS.get(path.suffix.lower(), "parquet")
        is_file = path.is_file() or _is_file_name(source) or _is_remote_file(source)
        files = source if is_file else f"{source.rstrip('/')}/*.parquet"
        return datasets.load_dataset(builder, data_files=files, split=split)
    # Files that save_to_disk writes for a Dataset and for a DatasetDict.
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(str(path))
    if path.is_dir():
        return _from_folder(path.absolute(), split)
    return datasets.load_dataset(source, split=split)


def _is_remote_file(source: str) -> bool:
    """Return whether a store has a file at a URL whose name does not tell."""
    import fsspec  # loads on first use

    filesystem, path = fsspec.url_to_fs(source)
    return bool(filesystem.isfile(path))
