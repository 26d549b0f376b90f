"""Keeps what images are decoded from, until their rows are filled: it is stored beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from packpipe.images.content import content_of
from packpipe.images.image_data import ImageData
from packpipe.rows.encoded import with_encoded
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows


@dataclass(frozen=True, eq=False)
class KeptImages:
    """Reads encoded images, as `filled_ahead` asks for them, and keeps them for their rows.

    So what rows hold is what was decoded, whatever becomes of a file in between. Each view of an
    image is read, and kept, by itself: they may be filled at different times.

    Attributes:
        read: returns the image of a source row.
        views: which view each of the images is, in the order in which they are asked for.
        held: the images of rows that are being filled, by source row and view.
    """

    read: Callable[[int], ImageData]
    views: Iterator[int]
    held: dict[tuple[int, int], bytes | memoryview] = field(default_factory=dict)

    def __call__(self, example: int) -> bytes | memoryview:
        """Return the bytes of an image.

        Raises:
            BadImage: there are none.
        """
        view = next(self.views)
        self.held[example, view] = content = content_of(self.read(example))
        return content

    def beside(self, rows: Rows, rejects: list[Reject]) -> Rows:
        """Return filled rows with their images in place of tokens; these are kept no longer.

        Args:
            rows: without the images that could not be decoded.
            rejects: these.
        """
        views = np.broadcast_to(rows.views, len(rows.example_index))
        segments = zip(rows.example_index.tolist(), views.tolist(), strict=True)
        images = [self.held.pop(segment) for segment in segments]
        for reject in rejects:
            self.held.pop((reject.example_index, reject.view), None)
        return with_encoded(rows, images)
