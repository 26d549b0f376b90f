"""`Problem` and `FoundRows`, the types in which the checks of `verify` report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.rows.rows import Rows

_NAMED = 3  # rows, or examples, of one problem


class Problem(NamedTuple):
    """Something that is not as `pack` wrote it: in which file or row, and what is wrong there."""

    where: str
    what: str

    def __str__(self) -> str:
        return checks.plain(f"{self.where}: {self.what}")


class Broken(NamedTuple):
    """What is wrong, with which rows (int64[n]), and whether the rows can still be read."""

    what: str
    rows: NDArray[np.int64]
    readable: bool


@dataclass
class FoundRows:
    """The rows found in files that can be read, in order.

    Attributes:
        none: rows of the same columns of segments, none of them.
        places: file, table and number of each row.
        parts: the segments of each record batch, without tokens.
        broken: positions in places of the rows with which something is wrong.
        schemas: of each file.
        whole: whether every file could be read.
    """

    none: Rows
    places: list[tuple[str, pa.Table, int]] = field(default_factory=list)
    parts: list[Rows] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    schemas: dict[str, pa.Schema] = field(default_factory=dict)
    whole: bool = True

    def held(self) -> Rows:
        """Return packpipe's own columns of the segments of all rows."""
        offsets = np.concatenate([[0], *(part.num_segments for part in self.parts)])
        # That of no rows comes first, which gives columns their type if there are no others.
        segments = {
            name: np.concatenate([empty, *(part.segments[name] for part in self.parts)])
            for name, empty in self.none.segments.items()
        }
        return Rows(np.cumsum(offsets), segments)

    def batches(self) -> Iterator[tuple[str, pa.Table, int, Rows, int]]:
        """Yield each part that has rows, and where they are.

        Yields:
            The file, its table, and the part's first row in it; the part; its first row in places.
        """
        first = 0
        for part in self.parts:
            if len(part):  # its rows are one record batch, so they follow each other in one file
                yield *self.places[first], part, first
            first += len(part)

    def named(self, rows: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Yield text that names some of the rows, file by file, and which rows it names.

        Args:
            rows: positions in places, ascending.
        """
        for file, of_file in groupby(rows.tolist(), lambda row: self.places[row][0]):
            some = list(of_file)
            numbers = [self.places[row][2] for row in some]
            yield f"{file}, {named('row', numbers)}", np.array(some)


def rows_of(path: Path) -> pa.Table:
    """Return a file's table, mapped into memory."""
    # Rows are read when they are looked at; the table keeps the map open after this block.
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all()


def named(what: str, numbers: list[int]) -> str:
    """Return text that names rows or examples by number, only the first if there are many."""
    first = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {first}{more}"


def same_json(one: Any, other: Any) -> bool:
    """Return whether two values are the same JSON; in Python 1, 1.0 and True are equal, too."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
