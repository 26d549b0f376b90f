"""The options by which images are packed to evaluate a model: nothing is drawn or dropped."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import Any

from packpipe.planning.crops import Crop
from packpipe.planning.distributions import Constant, distribution
from packpipe.planning.image_config import PackConfig
from packpipe.planning.resolution import Area, Budget, Side, Square


def evaluation_of(config: PackConfig) -> PackConfig:
    """Return the options by which images become rows when the model is evaluated.

    Images are whole, unless trained on by `CenterCrop` or `FixedCrop`, and keep all tokens. A size
    that is drawn becomes the largest of its law: as many tokens at most as a square of the largest
    side has. What decides pixels stays. Of several views, it is as the first.

    >>> found = evaluation_of(PackConfig(resolution=Side(Constant(128)), drop_rate=0.5))
    >>> found.resolution, found.max_tokens, found.drop_rate
    ('budget', 64, 0.0)
    """
    first, law = config.law_of(0), config.law_of(0).resolution
    most = config.room if first.max_tokens is None else min(first.max_tokens, config.room)
    changes: dict[str, Any] = {"max_tokens": None if first.max_tokens is None else most}
    if isinstance(law, Square):
        # Whole patches, no more than fit.
        side = round(distribution("pixels", law.pixels).support[1] / config.patch_size)
        side = min(max(1, side), isqrt(most)) * config.patch_size
        changes["resolution"] = Square(Constant(side))
    elif isinstance(law, Side | Area | Budget):
        changes["resolution"] = "budget"
        changes["max_tokens"] = max(1, min(most, _most_tokens(law, config.patch_size)))
    return replace(
        first,
        crop=None if isinstance(first.crop, Crop) else first.crop,
        drop_rate=0.0,
        epochs=None,
        fit_last=None,
        views=1,
        views_together=False,
        **changes,
    )


def _most_tokens(law: Side | Area | Budget, patch_size: int) -> int:
    """Return the tokens of the largest square that a law draws."""
    if isinstance(law, Budget):
        return int(distribution("tokens", law.tokens).support[1])
    pixels = distribution("pixels", law.pixels).support[1]
    side = int(pixels) if isinstance(law, Side) else isqrt(int(pixels))
    return (side // patch_size) ** 2
