"""What `verify` finds in a folder: its rows, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_NAMED = 3  # rows, or examples, of one problem


class Problem(NamedTuple):
    """Something that is not as `pack` wrote it: in which file or row, and what is wrong there."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Broken(NamedTuple):
    """What is wrong, with which rows (int64[n]), and whether they can be read all the same."""

    what: str
    rows: NDArray[np.int64]
    readable: bool


class Held(NamedTuple):
    """Which examples rows hold: the same names in rows of images and of tokens.

    Attributes:
        offsets: int64[rows + 1]; row r holds the segments offsets[r]..offsets[r + 1] - 1.
        example_index: int64[segments], row in the source.
        seq_lens: int32[segments], tokens.
        fragment: int32[segments], which piece of its example.
    """

    offsets: NDArray[np.int64]
    example_index: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    fragment: NDArray[np.int32]


@dataclass
class FoundRows:
    """What the sound files of rows hold, in their order.

    Attributes:
        places: file, table and number of each row.
        parts: what each batch of them holds.
        whole: whether every file could be read.
    """

    places: list[tuple[str, pa.Table, int]] = field(default_factory=list)
    parts: list[Held] = field(default_factory=list)
    whole: bool = True

    def held(self) -> Held:
        """Return what all rows hold."""
        sizes = [np.diff(part.offsets) for part in self.parts]
        return Held(
            np.cumsum(np.concatenate([np.zeros(1, np.int64), *sizes])),
            np.concatenate([np.empty(0, np.int64), *(part.example_index for part in self.parts)]),
            np.concatenate([np.empty(0, np.int32), *(part.seq_lens for part in self.parts)]),
            np.concatenate([np.empty(0, np.int32), *(part.fragment for part in self.parts)]),
        )


def rows_of(path: Path) -> pa.Table:
    """Return a file's table, mapped into memory."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all()


def named(what: str, numbers: list[int]) -> str:
    """Return rows or examples by their numbers, the first of them if there are many."""
    first = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {first}{more}"
