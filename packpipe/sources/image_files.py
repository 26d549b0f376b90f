"""`ImageFiles`: images in files, read block by block, where they lie.

A block is a row group of a Parquet file, a record batch of an Arrow file, or a run of members of a
tar. Which blocks there are is known from the ends of Parquet files and the heads of record batches
alone, so that a source of any size is opened without reading it, and every machine reads its own
blocks only. Tar files are read through once, for the headers of their members.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby, repeat, takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from packpipe import checks
from packpipe.sources import arrow_blocks, parquet_blocks, tar_blocks
from packpipe.sources.blocks import Block, Known
from packpipe.sources.file_search import ending_of, searched
from packpipe.storage.reading import patiently

# What is read at once: waiting for an object store takes no processor.
_AT_ONCE = 16
# Blocks of a file that are read one after the other: the end of the file is read once for them.
_TOGETHER = 4
# What a file is told from a later one by, by the names that file systems of fsspec give it.
_VERSIONS = (
    *("ETag", "etag", "generation", "blob_id"),
    *("mtime", "LastModified", "last_modified", "created"),
)
_REMEDY = "pass Parquet, tar or Arrow files, or a pattern such as 'train/*.parquet'"


class _Format(Protocol):
    """A format of files: what is known of one, and how its blocks are read."""

    BLOCK: str

    def known(self, filesystem: Any, file: str) -> Known:
        """Return what is known of a file before it is read."""

    def tables(self, filesystem: Any, blocks: list[Block], schema: pa.Schema) -> list[pa.Table]:
        """Return the rows of blocks of one file, with the columns of a schema."""


# By the endings of names, in the order in which a folder is searched.
_FORMATS: dict[str, _Format] = {
    ".parquet": parquet_blocks,
    ".tar": tar_blocks,
    ".arrow": arrow_blocks,
}


def _format_of(file: str) -> _Format:
    return _FORMATS[ending_of(file, tuple(_FORMATS)) or ".parquet"]


@dataclass(frozen=True, eq=False)
class BlockReader:
    """Reads blocks, on any machine: what it must know of their source, in a few kilobytes.

    Attributes:
        features: of `datasets`, of all columns.
        fingerprint: of the source.
        storage_options: for fsspec.
    """

    features: Features
    fingerprint: str
    storage_options: dict[str, Any] = field(repr=False)

    def dataset(self, blocks: Sequence[Block], columns: Sequence[str] | None = None) -> Dataset:
        """Return the rows of some blocks as a Dataset in memory.

        Args:
            blocks: in any order; up to four that stand together in a file are read one after the
                other, and 16 such runs at once.
            columns: names of those to read; None reads all.

        Raises:
            ValueError: a block is damaged, or has other rows or columns by now.
            ConnectionError: a file cannot be read, at the fourth attempt.
        """
        names = list(self.features) if columns is None else list(columns)
        features = Features({name: self.features[name] for name in names})
        schema = features.arrow_schema
        tables = [schema.empty_table(), *self._tables(blocks, schema)]
        # A fingerprint of its own, for which `datasets` would read all rows, is not needed.
        return Dataset(InMemoryTable(pa.concat_tables(tables)), fingerprint=self.fingerprint)

    def _tables(self, blocks: Sequence[Block], schema: pa.Schema) -> Iterator[pa.Table]:
        numbered = groupby(enumerate(blocks), lambda one: (one[1].file, one[0] // _TOGETHER))
        runs = [[block for _, block in some] for _, some in numbered]
        if len(runs) < 2:  # no threads for a few blocks
            yield from (table for run in runs for table in self._run(run, schema))
            return
        with ThreadPoolExecutor(min(_AT_ONCE, len(runs))) as executor:
            for tables in executor.map(self._run, runs, repeat(schema)):
                yield from tables

    def _run(self, blocks: list[Block], schema: pa.Schema) -> list[pa.Table]:
        """Return the rows of blocks of one file, which is opened once."""
        file, groups = blocks[0].file, ", ".join(str(block.group) for block in blocks)
        filesystem, found = _filesystem(file, self.storage_options), _format_of(file)
        ask = partial(found.tables, filesystem, blocks, schema)
        return patiently(f"{found.BLOCK} {groups} of {file}", ask)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images and labels in files, for `pack`: nothing is converted, copied or downloaded.

    They are Parquet; tar, as WebDataset writes it: an image and a ``.cls`` with the number of its
    class, of one name; or Arrow, as `datasets` writes it. The ending of a name tells: ``.tar``,
    ``.arrow``, and others are Parquet. Rows are numbered file by file. Paths are local or of any
    scheme that fsspec knows (``s3://``, ``gs://``, ``https://``), and must lead to the same files
    on every machine that packs.

    Args:
        paths: a file, a folder, whose ``*.parquet`` are taken at any depth, or else ``*.tar``, or
            else ``*.arrow``; a pattern with ``*``, ``?`` or ``[ ]``, or several of them. Files of
            one are in the order of their names. Left out are Arrow files that `datasets` computed
            beside the data: those called ``cache-*``, and in a folder all that its list has not.
        storage_options: passed to fsspec, for example credentials; they are sent to the machines
            that pack, and written nowhere.

    Raises:
        TypeError: paths are no texts or paths.
        ValueError: there are no such files, one is named twice, is damaged or of another format, or
            one has other columns, other classes, or a row group above 2 GiB; or a folder is one of
            packed rows or of several splits.

    >>> packpipe.ImageFiles("s3://bucket/train/*.parquet")  # doctest: +SKIP
    ImageFiles(2 files, 20 blocks, 18,431 rows)
    """

    paths: str | Path | Sequence[str | Path]
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.files_blocks  # noqa: B018 a path that leads nowhere is found at once

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The paths or URLs of the files, in the order of their rows."""
        paths = [self.paths] if isinstance(self.paths, str | Path) else self.paths
        if not isinstance(paths, Sequence) or not all(isinstance(p, str | Path) for p in paths):
            raise TypeError(checks.sentence("paths", paths, "paths of files", _REMEDY))
        found = tuple(file for path in paths for file in self._found(str(path)))
        if not found:
            raise ValueError(checks.sentence("paths", paths, "one file at least", _REMEDY))
        file, times = Counter(found).most_common(1)[0]
        if times > 1:
            remedy = "its images would be packed twice"
            raise ValueError(checks.sentence("paths", file, "each file once", remedy))
        return found

    @cached_property
    def files_blocks(self) -> list[tuple[int, list[int]]]:
        """Of each file its size in bytes, and the rows of each of its blocks."""
        for file, (known, _) in zip(self.files, self._ends, strict=True):
            if known.features != self.features:
                raise ValueError(_other_column(file, known.features, self.files[0], self.features))
        return [(known.size, known.rows) for known, _ in self._ends]

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, of the files' names, sizes, rows of blocks, and their footers.

        The folder that all files lie in is left out: machines may see it in different places. A
        footer has the size of every column and, as a rule, its least and largest value; instead of
        it, the heads of record batches have the sizes of columns, and the headers of a tar name,
        size and time of each member. So it differs when a file is written anew with other content,
        unless that has all of them alike: two labels that changed places are not noticed, and
        `versions` tells of those.
        """
        parts = [file.split("/") for file in self.files]
        levels = zip(*(folders for *folders, _ in parts), strict=False)
        shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
        names = ["/".join(part[shared:]) for part in parts]
        known = json.dumps([names, self.files_blocks, [known.digest for known, _ in self._ends]])
        return hashlib.sha256(known.encode()).hexdigest()[:32]

    @cached_property
    def versions(self) -> str:
        """32 hexadecimal digits, of when the files were written, or of what a store tells by.

        They differ when a file is written anew, and may differ between two copies of it.
        """
        known = json.dumps([version for _, version in self._ends])
        return hashlib.sha256(known.encode()).hexdigest()[:32]

    @cached_property
    def block_rows(self) -> NDArray[np.int64]:
        """int64[blocks], the rows of each block."""
        return np.array([n for _, rows in self.files_blocks for n in rows], np.int64)

    @property
    def features(self) -> Features:
        """The features of `datasets` that the files name, or that their types give.

        A column of ``bytes`` and ``path`` holds images, as `datasets` stores them. Of a tar,
        ``image`` and, if there are labels, ``label``.
        """
        return self._ends[0][0].features

    @property
    def reader(self) -> BlockReader:
        """What reads the blocks."""
        return BlockReader(self.features, self.fingerprint, self.storage_options)

    def block(self, number: int) -> Block:
        """Return a block by its number, 0 or more."""
        file = int(np.searchsorted(self._first_block, number, side="right")) - 1
        group = number - int(self._first_block[file])
        rows, spans = int(self.block_rows[number]), self._ends[file][0].spans
        span = spans[group] if spans else ()
        return Block(self.files[file], group, int(self._first_row[number]), rows, *span)

    def rows_of(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64[rows], the numbers of the rows of some blocks, block after block."""
        rows = self.block_rows[blocks]
        before = np.cumsum(rows) - rows
        return np.repeat(self._first_row[blocks] - before, rows) + np.arange(rows.sum())

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __repr__(self) -> str:
        counts = {"file": len(self.files), "block": len(self.block_rows), "row": len(self)}
        return f"ImageFiles({', '.join(checks.counted(n, name) for name, n in counts.items())})"

    @cached_property
    def _first_block(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(rows) for _, rows in self.files_blocks)])

    @cached_property
    def _first_row(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.block_rows)])

    @cached_property
    def _ends(self) -> list[tuple[Known, str]]:
        with ThreadPoolExecutor(_AT_ONCE) as executor:
            ask = [partial(self._end, file) for file in self.files]
            return list(executor.map(patiently, self.files, ask))

    def _end(self, file: str) -> tuple[Known, str]:
        """Return what is known of a file before it is read, and its version."""
        filesystem = _filesystem(file, self.storage_options)
        found = _format_of(file).known(filesystem, file)
        details = filesystem.info(file)
        return found, next((str(details[name]) for name in _VERSIONS if details.get(name)), "")

    def _found(self, path: str) -> list[str]:
        """Return the files of a path, folder or pattern, sorted; local ones as absolute paths."""
        path = checks.url_or_path("paths", path)
        filesystem = _filesystem(path, self.storage_options)
        names = searched(filesystem, path, tuple(_FORMATS))
        if not names:
            raise ValueError(checks.sentence("paths", path, "at least one file there", _REMEDY))
        remote = checks.has_scheme(path)
        return [
            filesystem.unstrip_protocol(name) if remote else os.path.abspath(name) for name in names
        ]


def _other_column(file: str, theirs: Features, first: str, ours: Features) -> str:
    """Return the sentence of an error: the first column in which two files differ."""
    name = next(one for one in {**ours, **theirs} if ours.get(one) != theirs.get(one))
    expected, remedy = (
        f"{ours.get(name)}, as in {first}",
        "pack files of other columns by themselves",
    )
    return checks.sentence(f"column {name!r} of {file}", theirs.get(name), expected, remedy)


def _filesystem(path: str, options: dict[str, Any]) -> Any:
    import fsspec  # loads on first use

    return fsspec.url_to_fs(path, **options)[0]
