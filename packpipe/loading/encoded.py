"""`EncodedImages`: images, or masks, as files hold them, until their packs need their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from packpipe.images.image_data import ImageData
from packpipe.sources.image_source import image_data


class EncodedImages(NamedTuple):
    """Images, or masks, as files hold them.

    Attributes:
        examples: int64[images], the row of each in its source, ascending.
        values: one each.
    """

    examples: NDArray[np.int64]
    values: pa.ChunkedArray

    def of(self, examples: NDArray[np.int64]) -> EncodedImages:
        """Return those of some rows, ascending, in memory of their own."""
        at = np.searchsorted(self.examples, examples)
        chunks, start = [], 0
        # Chunk by chunk: `take` of all of them would join them first.
        for chunk in self.values.chunks:
            own = at[np.searchsorted(at, start) : np.searchsorted(at, start + len(chunk))]
            if len(own):
                chunks.append(chunk.take(pa.array(own - start)))
            start += len(chunk)
        return EncodedImages(examples, pa.chunked_array(chunks, self.values.type))

    def reader(self, root: str | None) -> partial[ImageData]:
        """Return a function that returns the image of a row of the source."""
        places = dict(zip(self.examples.tolist(), range(len(self.examples)), strict=True))
        return partial(_image_of, self.values, places, root)


def encoded(dataset: Dataset, rows: NDArray[np.int64], column: str) -> EncodedImages:
    """Return a column of a dataset, whose rows have these numbers in the source."""
    # The Arrow table, since `datasets` decodes images.
    return EncodedImages(rows, dataset.data.column(column))


def in_one(parts: Sequence[EncodedImages]) -> EncodedImages:
    """Return the images of several parts, one at least, part after part."""
    chunks = [chunk for part in parts for chunk in part.values.chunks]
    values = pa.chunked_array(chunks, parts[0].values.type)
    return EncodedImages(np.concatenate([part.examples for part in parts]), values)


def _image_of(
    values: pa.ChunkedArray, places: dict[int, int], root: str | None, example: int
) -> ImageData:
    return image_data(values[places[example]], root)
