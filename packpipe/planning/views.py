"""`View`: what is drawn for some of an image's views, such as the global and local crops of DINO.

Source: Caron et al., arXiv 2104.14294, 3.1 (multi-crop: 2 views of 224² pixels, 8 of 96²).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from packpipe import checks
from packpipe.planning import crops, resolution
from packpipe.planning.crops import CropLaw
from packpipe.planning.resolution import Resolution

MOST_VIEWS = 2**16


@dataclass(frozen=True, kw_only=True)
class View:
    """One or more views of each image, alike but for their draws.

    Attributes:
        count: how many views.
        crop, resolution, max_tokens: as in `PackConfig`, of these views.
    """

    count: int = 1
    crop: CropLaw | None = None
    resolution: Resolution = "native"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        count = checks.whole_number("count", self.count, 1, MOST_VIEWS, "2 global ones are usual")
        object.__setattr__(self, "count", count)
        crops.checked(self.crop)
        resolution.checked(self.resolution)
        if self.max_tokens is not None:
            most = checks.whole_number(
                "max_tokens", self.max_tokens, 1, 2**15 - 1, "a view must fit into a row"
            )
            object.__setattr__(self, "max_tokens", most)


def checked(views: Any) -> int | tuple[View, ...]:
    """Return a number of views, or the laws of several; views of one law are not taken apart.

    Raises:
        TypeError, ValueError: there are no such views.
    """
    if not isinstance(views, tuple | list):
        return checks.whole_number("views", views, 1, MOST_VIEWS, "1 is one segment an image")
    remedy = "pass a number, or View(...) of each law"
    if not views or not all(isinstance(view, View) for view in views):
        raise TypeError(checks.sentence("views", views, "a number, or some View", remedy))
    if sum(view.count for view in views) > MOST_VIEWS:
        found = sum(view.count for view in views)
        raise ValueError(checks.sentence("views", found, f"at most {MOST_VIEWS}", remedy))
    return tuple(views)
