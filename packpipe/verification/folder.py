"""Reads the files of a folder of rows, and checks each of them by itself."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from packpipe.building.shards import MANIFEST, REJECTS, data_files
from packpipe.rows import files
from packpipe.rows.from_arrow import table_segments
from packpipe.rows.rejects import Reject
from packpipe.verification.manifest import checks_of
from packpipe.verification.problems import FoundRows, Problem, named, rows_of
from packpipe.verification.reject_checks import read_rejects
from packpipe.verification.row_checks import RowChecks, broken_rows


@dataclass(frozen=True, eq=False)
class Opened:
    """A folder whose files were read.

    Attributes:
        folder: where it is.
        checks: of its rows, with the manifest.
        found: the rows of all files that can be read.
        rejects: None if they cannot be read.
    """

    folder: Path
    checks: RowChecks
    found: FoundRows
    rejects: list[Reject] | None

    @property
    def manifest(self) -> dict[str, Any]:
        """What the folder says of itself."""
        return self.checks.manifest


def read_folder(folder: Path) -> Generator[Problem, None, Opened | None]:
    """Yield what is wrong with each file by itself, and return what they hold."""
    row_checks = checks_of(folder)
    if isinstance(row_checks, str):
        yield Problem(MANIFEST, row_checks)
        return None
    manifest, found = row_checks.manifest, FoundRows(row_checks.no_rows())
    for name in data_files(manifest):
        damage = _damage(folder / name, manifest["files"][name])
        if damage is None:
            yield from _row_problems(row_checks, folder / name, manifest["files"][name], found)
        else:
            yield Problem(name, damage)
            found.whole = False
    rejects: list[Reject] | None = None
    if REJECTS in manifest["files"]:
        record = manifest["files"][REJECTS]
        read = _damage(folder / REJECTS, record) or read_rejects(folder / REJECTS)
        if isinstance(read, str):
            yield Problem(REJECTS, read)
        else:
            rejects = read
            if len(read) != record["rows"]:
                yield Problem(REJECTS, f"holds {len(read)} rows, expected {record['rows']}")
    for pattern in ("data-*.arrow", "*.partial"):
        for stray in sorted(folder.glob(pattern)):
            if stray.name not in manifest["files"]:
                yield Problem(stray.name, "is not in the manifest")
    return Opened(folder, row_checks, found, rejects)


def _damage(path: Path, record: dict[str, Any]) -> str | None:
    """Return what is wrong with the bytes of a file, None if nothing is."""
    if not path.is_file():
        return "is missing"
    # The size first, since a file that was cut need not be read.
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"holds {size} bytes, expected {record['bytes']}"
    checksum = files.checksum_of(path)
    if checksum != record[files.CHECKSUM]:
        return f"{files.CHECKSUM} is {checksum}, expected {record[files.CHECKSUM]}"
    return None


def _row_problems(
    row_checks: RowChecks, path: Path, record: dict[str, Any], found: FoundRows
) -> Iterator[Problem]:
    """Check the rows of a file, batch by batch, and add them to found."""
    try:
        stored = rows_of(path)
    except (pa.ArrowInvalid, OSError) as error:
        yield Problem(path.name, f"cannot be read: {error}")
        found.whole = False
        return
    if stored.num_rows != record["rows"]:
        yield Problem(path.name, f"holds {stored.num_rows} rows, expected {record['rows']}")
    if missing := [name for name in row_checks.columns() if name not in stored.column_names]:
        yield Problem(path.name, f"lacks the columns {', '.join(missing)}")
        found.whole = False
        return
    if stored.column_names != row_checks.columns():
        what = f"has the columns {stored.column_names}, expected {row_checks.columns()}"
        yield Problem(path.name, what)
    found.schemas[path.name] = stored.schema
    start = 0
    for batch in stored.to_batches():
        rows = pa.Table.from_batches([batch])
        amiss = list(broken_rows(row_checks, rows))
        for broken in amiss:
            where = f"{path.name}, {named('row', (broken.rows + start).tolist())}"
            yield Problem(where, broken.what)
        readable = all(broken.readable for broken in amiss)
        if readable:
            # Numbered through all files, while a problem names the row within its file.
            for broken in amiss:
                found.broken.update((broken.rows + len(found.places)).tolist())
            numbers = range(start, start + batch.num_rows)
            found.places += [(path.name, stored, number) for number in numbers]
            found.parts.append(table_segments(rows))
        found.whole &= readable
        start += batch.num_rows
