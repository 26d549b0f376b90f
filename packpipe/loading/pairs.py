"""Stored pairs: both tables of `pack_pairs`, read row by row in one order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key
from packpipe.rows.digests import hexdigest
from packpipe.rows.pairs import PairRows


class StoredPairs:
    """Rows of images and rows of their texts as packs for a loader: a pack is a row of each.

    Args:
        tables: what `pack_pairs` returned (images, texts); or the same selection of both.
        shuffle: False takes the rows in their stored order, every epoch.

    Raises:
        TypeError, ValueError: these are not rows of images and rows of their texts.
    """

    def __init__(self, tables: tuple[Any, ...], *, shuffle: bool = True) -> None:
        if len(tables) != 2:
            remedy = "pass what pack_pairs returned"
            raise ValueError(
                checks.sentence("len(packs)", len(tables), "2 (images, texts)", remedy)
            )
        # Their order is drawn by the number of rows alone, so it is the same in both.
        self._images, self._texts = (StoredPacks(one, shuffle=shuffle) for one in tables)
        for place, packs in enumerate((self._images, self._texts)):
            if packs.of_tokens != bool(place):
                kinds = ("rows of images", "rows of tokens")
                found, expected = kinds[packs.of_tokens], kinds[place]
                name, remedy = f"packs[{place}]", "pass (images, texts), as pack_pairs returned it"
                raise ValueError(checks.sentence(name, found, expected, remedy))
        number, expected = len(tables[1]), f"{len(tables[0])} (rows of images)"
        if number != len(tables[0]):
            remedy = "select and shuffle both alike"
            raise ValueError(checks.sentence("len(texts)", number, expected, remedy))
        # The examples of all rows are compared now: a row that does not fit is no row to find
        # after hours of training.
        PairRows(self._images.examples, self._texts.examples).check()

    @property
    def max_segments(self) -> int:
        """Most images of any row, at least 1."""
        return self._images.max_segments

    def num_packs(self, key: Key) -> int:
        """Return the number of rows, the same in every epoch."""
        return self._images.num_packs(key)

    def fingerprint(self, key: Key) -> str:
        """Return a digest of which pairs the rows hold and whether they are shuffled."""
        return hexdigest(*(packs.fingerprint(key).encode() for packs in self._both.values()))

    def contents(self) -> dict[str, str | None]:
        """Return digests of what the rows of both hold, by names such as ``images.rows``."""
        return {
            f"{name}.{what}": digest
            for name, packs in self._both.items()
            for what, digest in packs.contents().items()
        }

    def work(self, key: Key) -> NDArray[np.int64]:
        """Return int64[packs], Σ l² of each pack, images and texts, in the order of the epoch."""
        return self._images.work(key) + self._texts.work(key)

    def rows(self, key: Key, packs: NDArray[np.int64]) -> PairRows:
        """Return the pairs at some places of the epoch's order, in memory of their own."""
        return PairRows(self._images.rows(key, packs), self._texts.rows(key, packs)).paired()

    @property
    def _both(self) -> dict[str, StoredPacks]:
        return {"images": self._images, "texts": self._texts}
