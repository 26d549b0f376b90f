"""Opens a folder of image files as a dataset, every one of them.

`datasets` reads such folders too, and its rows are those given here: in the order of the paths, the
folder around an image as its label. A file NAME.cls beside NAME.jpg holds its label instead, as in
webdataset. But it guesses splits from names: a class folder ``test`` or a
file ``my_test_shot.png`` is left out of ``train``; and it leaves out formats that it does not know.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset

# Words that make the name of a folder one of a split, alone or beside one of -._ 0-9.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# A folder with one of these is one of tables, whatever lies beside them.
_TABLES = (".parquet", ".arrow")
# The rows of a folder with such a file are those of the file.
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Of files that hold a class, in webdataset.
_CLASS = ".cls"


class FolderFiles(NamedTuple):
    """The files of a folder, sorted; hidden ones and those in ``__folders__`` are left out.

    Attributes:
        images: those with a suffix of images.
        metadata: those that say which images there are, with their columns.
        classes: those that hold the class of the image of the same name.
        others: the rest.
    """

    images: list[str]
    metadata: list[str]
    classes: list[str]
    others: list[str]

    @property
    def are_images(self) -> bool:
        """Whether this is a folder of images, not one of tables or texts."""
        suffixes = Counter(_suffix(path) for path in self.others)
        # One text or more beside every image describes it; more texts than images are the data.
        return (
            not any(map(suffixes.__contains__, _TABLES))
            and bool(self.images)
            and len(self.images) >= max(suffixes.values(), default=0)
        )


def files_of(folder: Path) -> FolderFiles:
    """Return the files of a folder and the folders within it.

    Raises:
        OSError: a folder cannot be read.
    """
    from packpipe.sources.kinds import image_suffixes  # loads `datasets`

    suffixes = image_suffixes()
    found = FolderFiles([], [], [], [])
    for path in sorted(_files(str(folder), frozenset())):
        if os.path.basename(path) in _METADATA:
            found.metadata.append(path)
        elif _suffix(path) == _CLASS:
            found.classes.append(path)
        else:
            (found.images if _suffix(path) in suffixes else found.others).append(path)
    return found


def image_splits(folder: Path, files: FolderFiles) -> dict[str, Dataset]:
    """Return the images of a folder as a dataset a split, ``train`` alone if it has no splits.

    Args:
        folder: the folder.
        files: of it.
    """
    import datasets

    if files.metadata:
        by_split = splits_of(folder, files.metadata)
        # Without a pattern: a name may hold one.
        named = {split: list(map(glob.escape, paths)) for split, paths in by_split.items()}
        return dict(datasets.load_dataset("imagefolder", data_files=named))
    by_split = splits_of(folder, files.images)
    beside = _classes_beside(files) if files.classes else None
    names = sorted(set(beside.values())) if beside else _class_names(by_split)
    return {split: _dataset(paths, names, beside) for split, paths in by_split.items()}


def splits_of(folder: Path, paths: list[str]) -> dict[str, list[str]]:
    """Return paths by split, from the first folders with names of splits; else all as ``train``.

    Classes may be named like splits: where one of another name lies beside them, and images lie in
    them and not in folders below, they are classes.
    """
    parts = [os.path.relpath(path, folder).split(os.sep) for path in paths]
    depth = 0
    while any(len(some) > depth + 1 for some in parts):
        below = [some[depth:] for some in parts if len(some) > depth + 1]
        names = {some[0] for some in below}
        of_split = {name: split for name in names if (split := _split_named(name))}
        if of_split:
            classes = len(of_split) < len(names) and all(
                len(some) == 2 for some in below if some[0] in of_split
            )
            if classes:
                break
            found: dict[str, list[str]] = {split: [] for split in _SPLITS}
            for path, some in zip(paths, parts, strict=True):
                if len(some) > depth + 1 and some[depth] in of_split:
                    found[of_split[some[depth]]].append(path)
            return {split: those for split, those in found.items() if those}
        if len(names) > 1:
            break
        depth += 1
    return {"train": paths}


def _split_named(name: str) -> str | None:
    for split, words in _SPLITS.items():
        if re.fullmatch(rf"(.*[-._ 0-9])?({'|'.join(words)})([-._ 0-9].*)?", name):
            return split
    return None


def _class_names(by_split: dict[str, list[str]]) -> list[str] | None:
    """Return the names of the folders around images, if they are classes: several, of one depth."""
    around = {os.path.dirname(path) for paths in by_split.values() for path in paths}
    depths = {path.count(os.sep) for path in around}
    names = sorted({os.path.basename(path) for path in around})
    of_splits = len(by_split) > 1 and all(map(_split_named, names))
    return names if len(names) > 1 and len(depths) == 1 and not of_splits else None


def _classes_beside(files: FolderFiles) -> dict[str, str]:
    """Return the classes that files hold, by the path of an image without its suffix."""
    found = {}
    for path in files.classes:
        with open(path, encoding="utf-8") as file:
            found[os.path.splitext(path)[0]] = file.read().strip()
    return found


def _dataset(
    paths: list[str], names: list[str] | None, beside: Mapping[str, str] | None
) -> Dataset:
    import datasets

    columns: dict[str, list[Any]] = {"image": paths}
    features = datasets.Features({"image": datasets.Image()})
    known: tuple[Any, ...] = paths, names
    if names is not None:
        columns["label"] = (
            [os.path.basename(os.path.dirname(path)) for path in paths]
            if beside is None
            else [beside.get(os.path.splitext(path)[0]) for path in paths]
        )
        features["label"] = datasets.ClassLabel(names=names)
        known += () if beside is None else (columns["label"],)
    found = datasets.Dataset.from_dict(columns, features=features)
    # Of the paths: the same in every process, so that a build that was stopped goes on.
    digest = hashlib.sha256(repr(known).encode(errors="surrogatepass")).hexdigest()
    return datasets.Dataset(found.data, found.info, fingerprint=digest[:16])


def _files(folder: str, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder around it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith((".", "__")):
                    yield from _files(entry.path, above | {real})
            elif not entry.name.startswith("."):
                yield entry.path


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
