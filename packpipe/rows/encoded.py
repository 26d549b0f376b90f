"""Rows of encoded images: columns of segments and, beside them, the bytes of each image's file.

They take about what their source does for each view; rows of pixels took 13 times that, of the
photographs measured. `pack` decodes every view once, so that an image that is bad is in the rejects
and not in a row; and the pixels are computed again when rows are read, by the options in the
manifest beside them: the bytes that rows of pixels hold.

=============  ===================  ============================================================
encoded        list<large_binary>   the image as its source has it: JPEG, PNG and so on
encoded_xxh3   list<uint64>         XXH3-64 of these bytes
=============  ===================  ============================================================

An image is decoded only if its bytes are those that were packed: of a JPEG in which a bit changed
many decoders make noise, without an error. To look costs a thousandth of decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from packpipe import checks
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import probe
from packpipe.rows import text
from packpipe.rows.from_arrow import table_segments
from packpipe.rows.rows import Rows

# What a row may hold of its images: their pixels, or their files.
PIXELS, ENCODED = STORES = ("pixels", "encoded")
IMAGES, _SUMS = "encoded", "encoded_xxh3"
COLUMNS = {IMAGES: pa.list_(pa.large_binary()), _SUMS: pa.list_(pa.uint64())}


def checked_store(store: Any) -> str:
    """Return what rows hold of their images, checked."""
    return checks.choice("store", store, STORES, "choose what rows hold of their images")


def encoded_schema(segments: pa.Schema) -> pa.Schema:
    """Return the schema of rows of encoded images, given that of their segments."""
    return pa.schema([*segments, *COLUMNS.items()])


def with_encoded(rows: Rows, images: Sequence[bytes | memoryview]) -> Rows:
    """Return rows with the bytes of each segment's image, and no tokens."""
    sums = np.array([xxhash.xxh3_64_intdigest(image) for image in images], np.uint64)
    held = {IMAGES: pa.array(images, pa.large_binary()), _SUMS: sums}
    return replace(rows, segments={**rows.segments, **held}, tokens={})


class Encoded(NamedTuple):
    """The image of a segment: its bytes, None if they are not those that were packed."""

    example: int
    view: int
    image: memoryview | None


def encoded_in(table: pa.Table, only: int | None = None) -> Iterator[Encoded]:
    """Yield the image of each segment of rows of encoded images, in their order.

    Args:
        table: the rows.
        only: the segment that is wanted; None for all.

    Raises:
        pyarrow.ArrowInvalid: the table says that bytes are where there is no memory.
    """
    table.validate(full=True)
    rows = table_segments(table)
    images, sums = (text.joined(table.column(name)).flatten() for name in COLUMNS)
    views = np.broadcast_to(rows.views, len(images)).tolist()
    segments = zip(rows.example_index.tolist(), views, images, sums.to_pylist(), strict=True)
    wanted = segments if only is None else islice(segments, only, only + 1)
    for example, view, image, known in wanted:
        data = memoryview(image.as_buffer()) if image.is_valid else None
        is_sound = data is not None and xxhash.xxh3_64_intdigest(data) == known
        yield Encoded(example, view, data if is_sound else None)


def image_damage(table: pa.Table, max_pixels: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return bool[segments] twice: whose bytes are others than packed, and whose size is another.

    Args:
        table: rows of encoded images.
        max_pixels: most of an image.
    """
    sizes = table_segments(table).image_hw.tolist()
    found = [one.image for one in encoded_in(table)]
    damaged = np.array([image is None for image in found], np.bool_)
    unlike = np.zeros(len(found), np.bool_)
    for at, (image, size) in enumerate(zip(found, sizes, strict=True)):
        if image is not None:
            unlike[at] = _size_of(image, max_pixels) != tuple(size)
    return damaged, unlike


def _size_of(image: memoryview, max_pixels: int) -> tuple[int, int] | None:
    with suppress(BadImage):
        return probe(image, max_pixels=max_pixels).image_hw
    return None
