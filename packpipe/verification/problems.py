"""What `verify` finds in a folder: its rows, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.rows.rows import Rows

_NAMED = 3  # rows, or examples, of one problem


class Problem(NamedTuple):
    """Something that is not as `pack` wrote it: in which file or row, and what is wrong there."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Broken(NamedTuple):
    """What is wrong, with which rows (int64[n]), and whether the rows can still be read."""

    what: str
    rows: NDArray[np.int64]
    readable: bool


@dataclass
class FoundRows:
    """The rows found in files that can be read, in order.

    Attributes:
        places: file, table and number of each row.
        parts: the segments of each record batch, without tokens.
        broken: positions in places of the rows with which something is wrong.
        whole: whether every file could be read.
    """

    places: list[tuple[str, pa.Table, int]] = field(default_factory=list)
    parts: list[Rows] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    whole: bool = True

    def held(self) -> Rows:
        """Return example_index, seq_lens and fragment of the segments of all rows."""
        offsets = np.concatenate([[0], *(part.num_segments for part in self.parts)])
        types = {"example_index": np.int64, "seq_lens": np.int32, "fragment": np.int32}
        # An empty array comes first, which gives columns their type if there are no rows.
        segments = {
            name: np.concatenate([np.empty(0, kind), *(_column(part, name) for part in self.parts)])
            for name, kind in types.items()
        }
        return Rows(np.cumsum(offsets), segments)


def _column(rows: Rows, name: str) -> NDArray[Any]:
    """Return a column of segments; fragment is 0 for images, which are never cut."""
    found: NDArray[Any] = rows.segments.get(name, np.zeros(len(rows.seq_lens), np.int32))
    return found


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
