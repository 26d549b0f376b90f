"""`Reading`: a pass over a `PackedStream`, with the places from which it can be resumed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from packpipe.images.image_data import ImageData


class Held(NamedTuple):
    """An example that waits in an open pack, undecoded."""

    number: int
    data: ImageData
    image_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    seq_len: int
    label: Any


class Anchor(NamedTuple):
    """The beginning of a window. No pack is open there, so reading can begin there again.

    Attributes:
        num_packs: packs before it.
        num_examples: examples before it.
        source: the dataset's state there; None for the dataset's beginning.
        num_bad: how many of the examples were bad; older states do not say, and count none.
        bad_in_a_row: how many bad ones come right before it.
    """

    num_packs: int
    num_examples: int
    source: dict[str, Any] | None
    num_bad: int = 0
    bad_in_a_row: int = 0


class Reading:
    """The packs of one pass over a stream, and the windows it can be continued from."""

    def __init__(self, packs: Iterator[list[Held]], anchors: deque[Anchor]) -> None:
        self._packs, self._anchors = packs, anchors

    def __iter__(self) -> Iterator[list[Held]]:
        return self._packs

    def forget(self, num_packs: int) -> None:
        """Drop the windows that are not needed any more once this many packs are taken."""
        # The last one that begins at or before num_packs stays: continuing reads from there.
        while len(self._anchors) > 1 and self._anchors[1].num_packs <= num_packs:
            self._anchors.popleft()

    def state(self, num_packs: int) -> dict[str, Any]:
        """Return the place to read from to continue after some packs."""
        self.forget(num_packs)
        return self._anchors[0]._asdict()
