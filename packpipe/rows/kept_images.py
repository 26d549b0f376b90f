"""Keeps what images are decoded from, until their rows are filled: it is stored beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from packpipe.images.content import content_of
from packpipe.images.image_data import ImageData
from packpipe.rows.encoded import with_encoded
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows


@dataclass(frozen=True, eq=False)
class KeptImages:
    """Reads encoded images, as `fill_rows` asks for them, and keeps them; threads may share it.

    So a file is read once, and what rows hold is what was decoded.

    Attributes:
        read: returns the image of a source row.
        held: the images of rows that are being filled, by source row.
    """

    read: Callable[[int], ImageData]
    held: dict[int, bytes | memoryview] = field(default_factory=dict)

    def __call__(self, example: int) -> bytes | memoryview:
        """Return the bytes of an image.

        Raises:
            BadImage: there are none.
        """
        self.held[example] = content = content_of(self.read(example))
        return content

    def beside(self, rows: Rows, rejects: list[Reject]) -> Rows:
        """Return filled rows with their images in place of tokens; these are kept no longer.

        Args:
            rows: without the images that could not be decoded.
            rejects: these.
        """
        examples = rows.example_index.tolist()
        # Of several views in rows that are filled at once, the first one takes it along.
        images = [self.held[one] if one in self.held else self(one) for one in examples]
        for example in {*examples, *(reject.example_index for reject in rejects)}:
            self.held.pop(example, None)
        return with_encoded(rows, images)
