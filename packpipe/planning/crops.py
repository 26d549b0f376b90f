"""Decides which part of an image is packed: a box, from its size and perhaps a draw.

It is decided first. Whatever comes after takes the box's size for the image's: the resolution law,
limits on enlarging, shrinking to fit. Three laws:

* `Crop`: a share of the area, a shape and a place, all drawn: new ones every epoch.
* `CenterCrop`: a share of the area, in the middle.
* `FixedCrop`: a place and a size in shares of the image.

No draw is repeated, as it is elsewhere until a box fits: a box with a share a of the area has room
in the image as long as its width ÷ height is a to 1/a times the image's, so a factor beyond that is
moved to its end. The share stays as drawn. Of `Crop()`'s own boxes that is one in seven.

*Local*: a box depends on its image's size, the law and (seed, epoch, index, view) only. It is not
in the plan, which stays at 51 bytes an image, but found again when a row is filled. Sides are
rounded to whole pixels, at least one. Cost: about 0.2 µs an image.

Source: Szegedy et al., Going Deeper with Convolutions (arXiv 1409.4842), 6; torchvision's
RandomResizedCrop, whose area and aspect ratio are the defaults here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.philox import Key
from packpipe.planning.distributions import Distribution, Uniform, distribution

SHAPES = ("image", "square")
_USUAL_AREA = Uniform(0.08, 1.0)
_ROUNDING = 1e-9  # that sums of shares may be above 1


@dataclass(frozen=True)
class Crop:
    """Crop a random box: `torchvision`'s RandomResizedCrop, but for the resizing.

    Attributes:
        area: distribution of the box's share of the image's area, above 0 and at most 1; a number
            is a constant, a list a choice.
        aspect: (least, largest) factor on width ÷ height, drawn evenly on a logarithmic scale.
        shape: what the factor is on: ``"image"``, the image's own width ÷ height; or ``"square"``,
            so that it is the box's width ÷ height itself, as far as the image has room for it.
    """

    area: Distribution | float = _USUAL_AREA
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    shape: str = "image"

    def __post_init__(self) -> None:
        area = distribution("area", self.area)
        least, largest = area.support
        if not 0 < least <= largest <= 1:
            remedy = "it is the box's share of the image's area"
            raise ValueError(checks.sentence("area", self.area, "shares in (0, 1]", remedy))
        object.__setattr__(self, "area", area)
        object.__setattr__(self, "aspect", _checked_aspect(self.aspect))
        checks.choice("shape", self.shape, SHAPES, "choose what aspect is a factor on")


@dataclass(frozen=True)
class CenterCrop:
    """Crop the middle of an image.

    Attributes:
        area: the box's share of the area of the largest box of its shape, above 0 and at most 1.
            0.765625, the default, is 224² of 256².
        shape: ``"image"``: the box has the image's own shape; ``"square"``: it is a square.
    """

    area: float = 0.765625
    shape: str = "image"

    def __post_init__(self) -> None:
        checks.real_attributes(self, "area")
        if not 0 < self.area <= 1:
            remedy = "it is a share of an area"
            raise ValueError(checks.sentence("area", self.area, "a share in (0, 1]", remedy))
        checks.choice("shape", self.shape, SHAPES, "choose the shape of the box")


@dataclass(frozen=True)
class FixedCrop:
    """Crop a box at one place, given in shares of the image.

    Attributes:
        top, height: shares of the image's height.
        left, width: shares of the image's width.
    """

    top: float
    left: float
    height: float
    width: float

    def __post_init__(self) -> None:
        checks.real_attributes(self, "top", "left", "height", "width")
        for start, size in (("top", "height"), ("left", "width")):
            low, share = getattr(self, start), getattr(self, size)
            remedy = "pass shares of the image"
            if not 0 <= low < 1:
                raise ValueError(checks.sentence(start, low, "a share in [0, 1)", remedy))
            if not 0 < share <= 1 - low + _ROUNDING:
                expected = f"above 0 and at most 1 - {low!r} ({start})"
                raise ValueError(checks.sentence(size, share, expected, remedy))


CropLaw: TypeAlias = Crop | CenterCrop | FixedCrop


def checked(value: Any) -> CropLaw | None:
    """Return value if it is a crop or None; the error names all crops."""
    if value is None or isinstance(value, CropLaw):
        return value
    expected = "None or a crop"
    remedy = "pass Crop(...), CenterCrop(...) or FixedCrop(...)"
    raise TypeError(checks.sentence("crop", value, expected, remedy))


def crop_boxes(
    law: CropLaw | None,
    image_hw: NDArray[np.integer],
    key: Key,
    *,
    index: ArrayLike,
    view: ArrayLike = 0,
) -> NDArray[np.int32] | None:
    """Return int32[images, 4], the boxes of images: (top, left, height, width); None if law is.

    A box lies within its image. Each is the same whatever other images are passed.

    Args:
        law: how images are cropped.
        image_hw: int[images, 2], upright (height, width) in pixels, 1..2**31-1.
        key: (seed, epoch) of all draws.
        index: int[images], each image's row in its source.
        view: int[images], which of an image's draws; one number for all, 0 for the only one.

    >>> crop_boxes(CenterCrop(0.25), np.array([[30, 40]]), Key(0, 0), index=[7]).tolist()
    [[7, 10, 15, 20]]
    >>> crop_boxes(FixedCrop(0, 0.5, 1, 0.5), np.array([[30, 40]]), Key(0, 0), index=[7]).tolist()
    [[0, 20, 30, 20]]
    """
    if law is None:
        return None
    sides = image_hw.astype(np.float64)  # exact: below 2**31
    if isinstance(law, FixedCrop):
        start = np.minimum(np.rint(sides * (law.top, law.left)), sides - 1)
        end = np.rint(sides * (law.top + law.height, law.left + law.width))
        box_hw = np.clip(end - start, 1, sides - start)
    elif isinstance(law, CenterCrop):
        largest = (
            sides
            if law.shape == "image"
            else np.broadcast_to(sides.min(1, keepdims=True), sides.shape)
        )
        box_hw = np.maximum(np.rint(largest * math.sqrt(law.area)), 1)
        start = np.floor((sides - box_hw) / 2)
    else:
        words = philox.words(key, index=index, stream=philox.CROP, num_words=4, view=view)
        u = philox.uniform_from(words)  # for area, aspect, top and left
        box_hw = _drawn_hw(law, sides, u[:, 0], u[:, 1])
        free = sides - box_hw
        # The product may round up to a place more than there is.
        start = np.minimum(np.floor((free + 1) * u[:, 2:]), free)
    return np.concatenate([start, box_hw], axis=1).astype(np.int32)


def _drawn_hw(
    law: Crop,
    sides: NDArray[np.float64],
    u_area: NDArray[np.float64],
    u_aspect: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return float64[images, 2], the boxes' (height, width) in whole pixels."""
    share = distribution("area", law.area).quantile(u_area)
    low, high = (math.log(end) for end in law.aspect)
    factor = np.exp(low + u_aspect * (high - low))
    if law.shape == "square":
        factor *= sides[:, 0] / sides[:, 1]
    factor = np.clip(factor, share, 1 / share)
    box_hw = np.empty_like(sides)
    # One root of one quotient or product each, of which IEEE 754 fixes the last bit.
    box_hw[:, 0] = np.sqrt(share / factor)
    box_hw[:, 1] = np.sqrt(share * factor)
    box_hw *= sides
    return np.clip(np.rint(box_hw, out=box_hw), 1, sides)


def _checked_aspect(aspect: Any) -> tuple[float, float]:
    remedy = "(1, 1) keeps the shape"
    try:
        low, high = aspect
    except (TypeError, ValueError):
        expected = "(least, largest) factor on width ÷ height"
        raise TypeError(checks.sentence("aspect", aspect, expected, remedy)) from None
    least = checks.positive_number("aspect[0]", low, remedy)
    largest = checks.positive_number("aspect[1]", high, remedy)
    if least > largest:
        expected = f"{least!r} (aspect[0]) or more"
        raise ValueError(checks.sentence("aspect[1]", largest, expected, "swap them"))
    return least, largest
