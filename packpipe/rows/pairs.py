"""Rows of images and rows of their texts: segment s of row r is the same example in both.

`pack_pairs` stores an image's text even where the image could not be decoded. Here such a text is
left out, so that no pair of a row is shifted.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.rows.rows import Rows


class PairRows(NamedTuple):
    """Rows of images, and as many of texts.

    Attributes:
        images: rows of images.
        texts: rows of token sequences.
    """

    images: Rows
    texts: Rows

    def spread(self, places: NDArray[np.int64], num_rows: int) -> PairRows:
        """Return num_rows rows of each: these rows at ascending places, empty rows elsewhere."""
        return PairRows(*(rows.spread(places, num_rows) for rows in self))

    def paired(self) -> PairRows:
        """Return the rows without the texts whose image is missing."""
        of_images, of_texts, _ = self._examples()
        kept = np.isin(of_texts, of_images)
        return self if kept.all() else self._replace(texts=self.texts.keep(kept))

    def check(self) -> None:
        """Raise ValueError if a row of images holds others than its texts, or in another order."""
        for name, rows in self._asdict().items():
            if (rows.example_index < 0).any():
                what, remedy = (
                    "rows that say which example is which",
                    "pass what pack_pairs returned",
                )
                raise ValueError(checks.sentence(f"example_index of {name}", -1, what, remedy))
        of_images, of_texts, span = self._examples()
        found = of_texts[np.isin(of_texts, of_images)]
        if np.array_equal(of_images, found):
            return
        pairs = zip_longest(of_images.tolist(), found.tolist(), fillvalue=np.inf)
        row = int(next(min(pair) for pair in pairs if pair[0] != pair[1]) // span)
        images, texts = (
            rows.example_index[slice(*rows.offsets[row : row + 2])].tolist() for rows in self
        )
        expected = f"{texts} (texts[{row}]), or some of them in that order"
        remedy = "select and shuffle both alike"
        raise ValueError(
            checks.sentence(f"example_index of images[{row}]", images, expected, remedy)
        )

    def _examples(self) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return a number for each image and each text, and how many there are for a row.

        Numbers are equal where the example and the row are.
        """
        span = 2 + max(int(rows.example_index.max(initial=0)) for rows in self)
        of_images, of_texts = (
            np.repeat(np.arange(len(rows)) * span, rows.num_segments) + rows.example_index + 1
            for rows in self
        )
        return of_images, of_texts, span
