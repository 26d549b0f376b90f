"""What an image is given as: bytes, a path, pixels, or an image of Pillow."""

from __future__ import annotations

from io import FileIO
from typing import Any, NamedTuple, TypeAlias

from numpy.typing import NDArray
from PIL import Image


class Confined(NamedTuple):
    """The path of a file that must lie within a folder.

    Attributes:
        path: absolute, with all links resolved.
        root: the folder, absolute, with all links resolved.
    """

    path: str
    root: str


# The bytes of an encoded image, the path of its file, or its pixels.
ImageData: TypeAlias = "bytes | memoryview | str | Confined | NDArray[Any] | Image.Image"


def name_of(source: object) -> Any:
    """Return the path of a file that is to be opened or is; of other images, the image."""
    if isinstance(source, FileIO):
        return source.name
    return source.path if isinstance(source, Confined) else source
