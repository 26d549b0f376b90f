"""`RemoteEncoded`: rows of encoded images, whose images stay in a store until they are asked for.

The segments of the rows are here (`stored_segments`), with the place of each image. The images of a
row lie side by side, so that a row is one request. Each image is decoded only if it has the
checksum of the one that was packed. That a file is replaced is noticed as of `remote_rows`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.building.stored_segments import PLACES, Versions
from packpipe.rows.digests import checksums_digest
from packpipe.rows.encoded import IMAGES
from packpipe.rows.encoded_rows import EncodedRows
from packpipe.rows.files import CHECKSUM
from packpipe.rows.own_columns import ROW
from packpipe.rows.rows import Rows
from packpipe.rows.text import joined
from packpipe.storage.reading import bytes_of
from packpipe.storage.storage import Storage

# Requests at once.
_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class RemoteEncoded:
    """Reads the images of rows from a store, and decodes them: a transform of their segments.

    Attributes:
        storage: the folder.
        records: its files of rows, in order, with what the manifest says of each.
        versions: of the files, as their store calls those whose segments are here.
        decoder: computes rows of encoded images.
        segments: the schema of the dataset.
    """

    storage: Storage
    records: dict[str, Any]
    versions: Versions
    decoder: EncodedRows
    segments: pa.Schema

    def rows(self, segments: pa.Table) -> Rows:
        """Return the rows of some segments, in memory of their own.

        Raises:
            ConnectionError: the store does not answer, or a file was replaced.
            FileNotFoundError: a file is not there any more.
            ValueError: an image is not as it was packed, or cannot be decoded here; or the columns
                that say where the images are were taken away.
        """
        return self.decoder.rows(self.table(segments))

    def table(self, segments: pa.Table) -> pa.Table:
        """Return segments with their images, as a file of rows has them."""
        for name in (ROW, PLACES):
            if name not in segments.column_names:
                expected, remedy = f"{name!r} among them", "keep it: it says where the images are"
                raise ValueError(
                    checks.sentence("columns", segments.column_names, expected, remedy)
                )
        lists = joined(segments.column(PLACES))
        counts = lists.value_lengths().to_numpy()
        places = lists.flatten().flatten().to_numpy().reshape(-1, 2)
        by_row = np.split(places, np.cumsum(counts)[:-1])
        numbers = segments.column(ROW).to_numpy()
        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(numbers)))) as executor:
            read = executor.map(self._read, numbers.tolist(), by_row[: len(numbers)])
            images = [image for some in read for image in some]
        offsets = pa.array(np.cumsum([0, *counts]), pa.int32())
        column = pa.ListArray.from_arrays(offsets, pa.array(images, pa.large_binary()))
        return segments.drop_columns([ROW, PLACES]).append_column(IMAGES, column)

    def contents(self) -> dict[str, str | None]:
        """Return what decides the pixels, as `EncodedRows` does of a copy."""
        checksums = [record[CHECKSUM] for record in self.records.values()]
        return {**self.decoder.contents(), "files": checksums_digest(checksums)}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of packed rows: a NumPy array a row, its dtype kept."""
        if not batch.keys() >= {*self.segments.names}:  # some columns were selected
            return batch
        # The transform gets plain Python values; the schema gives them back their types.
        named = {name: batch[name] for name in self.segments.names}
        images = self.table(pa.table(named, schema=self.segments)).column(IMAGES).to_pylist()
        others = {name: batch[name] for name in batch if name not in (ROW, PLACES)}
        return self.decoder({**others, IMAGES: images})

    def _read(self, number: int, places: NDArray[np.int64]) -> list[memoryview]:
        """Return the images of a row, which lie side by side."""
        if not len(places):
            return []
        name = self._names[int(np.searchsorted(self._ends, number, side="right"))]
        first = int(places[0, 0])
        found = memoryview(bytes_of(self.storage, name, first, int(places[-1].sum())))
        self.versions.check(name)
        return [found[start - first :][:size] for start, size in places.tolist()]

    @cached_property
    def _names(self) -> list[str]:
        return list(self.records)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([record["rows"] for record in self.records.values()])
