"""Where a pass stands: what is read, what is held, and where it can begin again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from packpipe.images.opening import ImageData


class Held(NamedTuple):
    """An example that waits in an open pack, undecoded."""

    number: int
    data: ImageData
    image_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    num_keep: int
    label: Any


class Anchor(NamedTuple):
    """A place where no example waits: the beginning of a window."""

    num_packs: int
    num_examples: int
    source: dict[str, Any] | None


class Reading:
    """Packs of one pass, and from where to read to continue after some of them."""

    def __init__(self, packs: Iterator[list[Held]], anchors: deque[Anchor]) -> None:
        self._packs, self._anchors = packs, anchors

    def __iter__(self) -> Iterator[list[Held]]:
        return self._packs

    def forget(self, num_packs: int) -> None:
        """Drop what is not needed any more once so many packs were taken."""
        while len(self._anchors) > 1 and self._anchors[1].num_packs <= num_packs:
            self._anchors.popleft()

    def state(self, num_packs: int) -> dict[str, Any]:
        """Return from where to read to continue after some packs."""
        self.forget(num_packs)
        return self._anchors[0]._asdict()
