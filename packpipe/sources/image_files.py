"""`ImageFiles`: images in Parquet files, read block by block, where they lie.

A block is a row group. Which blocks there are is known from the ends of the files alone, so that a
source of any size is opened without reading it, and every machine reads its own blocks only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby, repeat, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from packpipe import checks
from packpipe.storage.reading import patiently

# What is read at once: waiting for an object store takes no processor.
_AT_ONCE = 16
# Blocks of a file that are read one after the other: the end of the file is read once for them.
_TOGETHER = 4
# Arrow holds a column of a row group with offsets of 32 bits.
_MOST_BYTES = 2**31
# What a file is told from a later one by, by the names that file systems of fsspec give it.
_VERSIONS = (
    *("ETag", "etag", "generation", "blob_id"),
    *("mtime", "LastModified", "last_modified", "created"),
)
_REMEDY = "pass Parquet files, or a pattern such as 'train/*.parquet'"


class Block(NamedTuple):
    """A row group.

    Attributes:
        file: path or URL of its file.
        group: its number in the file.
        first: number of its first row in the whole source.
        num_rows: its rows.
    """

    file: str
    group: int
    first: int
    num_rows: int


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

        def read() -> list[pa.Table]:
            with _opened(file, self.storage_options) as parquet:
                return [_row_group(parquet, block, schema) for block in blocks]

        return patiently(f"row group {groups} of {file}", read)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images and labels in Parquet files, for `pack`: nothing is converted, copied or downloaded.

    Rows are numbered file by file. Paths are local or of any scheme that fsspec knows (``s3://``,
    ``gs://``, ``https://``), and must lead to the same files on every machine that packs.

    Args:
        paths: a file, a folder, whose ``*.parquet`` are taken at any depth, a pattern with ``*``,
            ``?`` or ``[ ]``, or several of them. Files of one are in the order of their names.
        storage_options: passed to fsspec, for example credentials; they are sent to the machines
            that pack, and written nowhere.

    Raises:
        TypeError: paths are no texts or paths.
        ValueError: there are no such files, one is named twice or is no Parquet file, or one has
            other columns, other classes, or a row group above 2 GiB.

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
        for file, end in zip(self.files, self._ends, strict=True):
            if end.features != self.features:
                raise ValueError(_other_column(file, end.features, self.files[0], self.features))
        return [(end.size, end.rows) for end in self._ends]

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, of the files' names, sizes, rows of blocks, and their footers.

        The folder that all files lie in is left out: machines may see it in different places. A
        footer has the size of every column and, as a rule, its least and largest value. So it
        differs when a file is written anew with other content, unless that has all of them alike:
        two labels that changed places are not noticed, and `versions` tells of those.
        """
        parts = [file.split("/") for file in self.files]
        levels = zip(*(folders for *folders, _ in parts), strict=False)
        shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
        names = ["/".join(part[shared:]) for part in parts]
        known = json.dumps([names, self.files_blocks, [end.footer for end in self._ends]])
        return hashlib.sha256(known.encode()).hexdigest()[:32]

    @cached_property
    def versions(self) -> str:
        """32 hexadecimal digits, of when the files were written, or of what a store tells by.

        They differ when a file is written anew, and may differ between two copies of it.
        """
        known = json.dumps([end.version for end in self._ends])
        return hashlib.sha256(known.encode()).hexdigest()[:32]

    @cached_property
    def block_rows(self) -> NDArray[np.int64]:
        """int64[blocks], the rows of each block."""
        return np.array([n for _, rows in self.files_blocks for n in rows], np.int64)

    @property
    def features(self) -> Features:
        """The features of `datasets` that the files name, or that their types give.

        A column of ``bytes`` and ``path`` holds images, as `datasets` stores them.
        """
        return self._ends[0].features

    @property
    def reader(self) -> BlockReader:
        """What reads the blocks."""
        return BlockReader(self.features, self.fingerprint, self.storage_options)

    def block(self, number: int) -> Block:
        """Return a block by its number, 0 or more."""
        file = int(np.searchsorted(self._first_block, number, side="right")) - 1
        group = number - int(self._first_block[file])
        rows = int(self.block_rows[number])
        return Block(self.files[file], group, int(self._first_row[number]), rows)

    def rows_of(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64[rows], the numbers of the rows of some blocks, block after block."""
        rows = self.block_rows[blocks]
        before = np.cumsum(rows) - rows
        return np.repeat(self._first_row[blocks] - before, rows) + np.arange(rows.sum())

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __repr__(self) -> str:
        blocks = len(self.block_rows)
        return f"ImageFiles({len(self.files)} files, {blocks} blocks, {len(self):,} rows)"

    @cached_property
    def _first_block(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(rows) for _, rows in self.files_blocks)])

    @cached_property
    def _first_row(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.block_rows)])

    @cached_property
    def _ends(self) -> list[_End]:
        with ThreadPoolExecutor(_AT_ONCE) as executor:
            ask = [partial(self._end, file) for file in self.files]
            return list(executor.map(patiently, self.files, ask))

    def _end(self, file: str) -> _End:
        """Return what the end of a file says."""
        filesystem = _filesystem(file, self.storage_options)
        with filesystem.open(file, "rb") as source:
            parquet = _parquet(source, file)
            # Files of most stores have asked for it when they are opened.
            details = getattr(source, "details", None) or filesystem.info(file)
            version = next((str(details[name]) for name in _VERSIONS if details.get(name)), "")
            found = parquet.metadata
            rows = []
            for group in range(found.num_row_groups):
                _check_bytes(found.row_group(group), group, file)
                rows.append(found.row_group(group).num_rows)
            # The last eight bytes are the length of the footer, and a word.
            size = source.seek(-8, os.SEEK_END) + 8
            source.seek(-8 - int.from_bytes(source.read(4), "little"), os.SEEK_END)
            footer = hashlib.sha256(source.read()).hexdigest()
        return _End(size, rows, footer, version, _features(parquet.schema_arrow))

    def _found(self, path: str) -> list[str]:
        """Return the files of a path, folder or pattern, sorted; local ones as absolute paths."""
        path = checks.url_or_path("paths", path)
        filesystem = _filesystem(path, self.storage_options)
        if filesystem.isfile(path):
            names = [path]
        else:
            is_pattern = any(one in path for one in "*?[")
            pattern = path if is_pattern else f"{path.rstrip('/')}/**/*.parquet"
            found = filesystem.glob(pattern, detail=True)
            names = [n for n in found if found[n]["type"] == "file" or filesystem.isfile(n)]
        if not names:
            raise ValueError(checks.sentence("paths", path, "files that there are", _REMEDY))
        remote = checks.has_scheme(path)
        return [
            filesystem.unstrip_protocol(name) if remote else os.path.abspath(name)
            for name in sorted(names)
        ]


class _End(NamedTuple):
    """What the end of a file says: its bytes, the rows of its blocks, a digest, its columns.

    And its version, which the end does not say.
    """

    size: int
    rows: list[int]
    footer: str
    version: str
    features: Features


@contextmanager
def _opened(file: str, options: dict[str, Any]) -> Iterator[pq.ParquetFile]:
    with _filesystem(file, options).open(file, "rb") as source:
        yield _parquet(source, file)


def _parquet(source: Any, file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source, pre_buffer=True)
    except (pa.ArrowInvalid, OSError) as error:
        if _is_of_system(error):
            raise
        raise ValueError(checks.sentence("paths", file, "Parquet files", str(error))) from error


def _row_group(parquet: pq.ParquetFile, block: Block, schema: pa.Schema) -> pa.Table:
    try:
        found = parquet.read_row_group(block.group, columns=schema.names)
        found = found.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, KeyError) as error:
        if _is_of_system(error):
            raise
        what, expected = f"row group {block.group} of {block.file}", "the images it had"
        remedy = "repair the file, or pack the files anew to another output"
        raise ValueError(checks.sentence(what, str(error), expected, remedy)) from error
    if found.num_rows != block.num_rows:
        what = f"rows of row group {block.group} of {block.file}"
        remedy = "the file was changed: pack the files anew, to another output"
        raise ValueError(checks.sentence(what, found.num_rows, str(block.num_rows), remedy))
    return found


def _is_of_system(error: Exception) -> bool:
    """Return whether a disk or a network failed; of a damaged file Arrow raises a bare OSError."""
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None)


def _check_bytes(group: Any, number: int, file: str) -> None:
    """Raise for a column of a row group that Arrow cannot hold as one."""
    columns = range(group.num_columns)
    largest = max((group.column(one).total_uncompressed_size for one in columns), default=0)
    if largest >= _MOST_BYTES:
        what, expected = f"largest column of row group {number} of {file}", "less than 2 GiB"
        remedy = "write smaller row groups, of about a thousand images"
        raise ValueError(checks.sentence(what, f"{largest:,} bytes", expected, remedy))


def _other_column(file: str, theirs: Features, first: str, ours: Features) -> str:
    """Return the sentence of an error: the first column in which two files differ."""
    name = next(one for one in {**ours, **theirs} if ours.get(one) != theirs.get(one))
    expected, remedy = (
        f"{ours.get(name)}, as in {first}",
        "pack files of other columns by themselves",
    )
    return checks.sentence(f"column {name!r} of {file}", theirs.get(name), expected, remedy)


def _features(schema: pa.Schema) -> Features:
    found = Features.from_arrow_schema(schema)
    images = [name for name, kind in found.items() if _is_image(kind)]
    return Features({**found, **dict.fromkeys(images, Image())})


def _filesystem(path: str, options: dict[str, Any]) -> Any:
    import fsspec  # loads on first use

    return fsspec.url_to_fs(path, **options)[0]


def _is_image(kind: Any) -> bool:
    return isinstance(kind, dict) and kind.keys() == {"bytes", "path"}
