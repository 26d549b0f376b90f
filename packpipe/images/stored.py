"""What an image is to become, and what a decoder makes of it before it is resized and turned."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from packpipe.images.colour import Conversion
from packpipe.images.geometry import Box, least_size, stored_box
from packpipe.images.headers import upright_hw


class Planned(NamedTuple):
    """What is to be made of an image, in pixels of the upright one, as `decode` is told."""

    image_hw: tuple[int, int]
    target_hw: tuple[int, int]
    box: tuple[int, int, int, int]

    def stored(self, orientation: int) -> tuple[Box, tuple[int, int]]:
        """Return the box and the (width, height) it becomes, for an image before it is turned."""
        box = stored_box(self.box, self.image_hw, orientation)
        return box, upright_hw(*self.target_hw[::-1], orientation)[::-1]


class Stored(NamedTuple):
    """An image as it is stored, decoded: grey or RGB, neither turned nor resized.

    Attributes:
        pixels: an image of Pillow's, or an array if `turbo` decoded them.
        box: where what is needed is in them.
        orientation: how they are turned upright, as EXIF has it.
        conversion: of their colours.
    """

    pixels: Image.Image | NDArray[np.uint8]
    box: Box
    orientation: int
    conversion: Conversion


def least_for(
    box: Box, size: tuple[int, int], target: tuple[int, int], gap: float
) -> tuple[int, int]:
    """Return the (width, height) that an image is to be decoded at, at least."""
    return least_size((int(target[0] * gap), int(target[1] * gap)), box, size)
