"""`RemoteEncoded`: rows of encoded images, whose images stay in a store until they are asked for.

The segments of the rows are here (`stored_segments`), with the place of each image. The images of a
row lie side by side, so that a row is one request. Each image is decoded only if it has the
checksum of the one that was packed. That a file is replaced is noticed as of `remote_rows`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.building.stored_segments import Versions
from packpipe.rows.digests import checksums_digest
from packpipe.rows.encoded import COLUMNS, IMAGES
from packpipe.rows.encoded_rows import EncodedRows, row_with
from packpipe.rows.files import CHECKSUM
from packpipe.rows.own_columns import PLACES, ROW
from packpipe.rows.rows import Rows
from packpipe.rows.schema import IMAGE_SEGMENTS
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
            ValueError: an image is not as it was packed, or cannot be decoded here; or columns that
                this needs were taken away.
        """
        for name in (ROW, PLACES, *IMAGE_SEGMENTS, *COLUMNS):
            if name != IMAGES and name not in segments.column_names:
                expected, remedy = f"{name!r} among them", "keep it: no image is read without it"
                raise ValueError(
                    checks.sentence("columns", segments.column_names, expected, remedy)
                )
        with_images = segments.append_column(IMAGES, self._images(segments))
        return self._decoder_of(segments).rows(with_images.drop_columns([ROW, PLACES]))

    def _images(self, segments: pa.Table) -> pa.ListArray:
        """Return the images of some rows, of which `ROW` and `PLACES` are asked."""
        lists = joined(segments.column(PLACES))
        counts = lists.value_lengths().to_numpy()
        places = lists.flatten().flatten().to_numpy().reshape(-1, 2)
        by_row = np.split(places, np.cumsum(counts)[:-1])
        numbers = segments.column(ROW).to_numpy()
        names = [self._names[file] for file in self._files_of(numbers)]
        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(numbers)))) as executor:
            read = executor.map(self._read, names, by_row[: len(numbers)])
            images = [image for some in read for image in some]
            asked = {name for name, count in zip(names, counts, strict=True) if count}
            list(executor.map(self.versions.check, sorted(asked)))
        offsets = pa.array(np.cumsum([0, *counts]), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(images, pa.large_binary()))

    def contents(self) -> dict[str, str | None]:
        """Return what decides the pixels, as `EncodedRows` does of a copy."""
        checksums = [record[CHECKSUM] for record in self.records.values()]
        return {**self.decoder.contents(), "files": checksums_digest(checksums)}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of packed rows: a NumPy array a row, its dtype kept."""
        others = {name: batch[name] for name in batch if name not in (ROW, PLACES)}
        if not batch.keys() >= {ROW, PLACES}:  # other columns were selected: nothing to read
            return others
        # The transform gets plain Python values; the schema gives them back their types.
        schema = pa.schema([one for one in self.segments if one.name in batch])
        segments = pa.table({name: batch[name] for name in schema.names}, schema=schema)
        images = self._images(segments).to_pylist()
        return self._decoder_of(segments)({**others, IMAGES: images})

    def _decoder_of(self, segments: pa.Table) -> EncodedRows:
        """Return the decoder, which names the rows of these segments in its errors."""
        return replace(self.decoder, where=partial(self._where, segments))

    def _where(self, segments: pa.Table, example: int, view: int) -> str:
        number = segments.column(ROW).take([row_with(segments, example, view)]).to_numpy()
        file = int(self._files_of(number)[0])
        name = self._names[file]
        first = self._ends[file] - self.records[name]["rows"]
        return f"row {number[0] - first} of {self.storage.url}/{name}"

    def _read(self, name: str, places: NDArray[np.int64]) -> list[memoryview]:
        """Return the images of a row of a file, which lie side by side."""
        if not len(places):
            return []
        first = int(places[0, 0])
        found = memoryview(bytes_of(self.storage, name, first, int(places[-1].sum())))
        return [found[start - first :][:size] for start, size in places.tolist()]

    def _files_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the file that each row lies in."""
        return np.searchsorted(self._ends, numbers, side="right")

    @cached_property
    def _names(self) -> list[str]:
        return list(self.records)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([record["rows"] for record in self.records.values()])
