"""`Encoder`: what a family's files become, and what families have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from packpipe import checks
from packpipe.model.config import NaViTConfig
from packpipe.planning.image_config import MAX_IMAGE_SEQ_LEN, PackConfig

# Pillow's numbers of its resampling filters, which image processors store.
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_ABOUT = 1024  # tokens a row


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder that was trained elsewhere.

    Attributes:
        config: the shape.
        weights: by the names of ``NaViT.state_dict``.
        packing: how images become rows for it.
    """

    config: NaViTConfig
    weights: dict[str, Tensor]
    packing: PackConfig


def filters(processing: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `PackConfig` that give a Pillow image processor's pixels.

    Args:
        processing: its settings, ``resample`` among them.

    Raises:
        ValueError: the filter is not known, or images are not resized, rescaled and normalised.
    """
    remedy = "packed images are resized, and scaled by 1/255"
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if processing.get(name, True) is not True:
            raise ValueError(checks.sentence(name, processing[name], "True", remedy))
    scale = processing.get("rescale_factor", 1 / 255)
    if not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        raise ValueError(checks.sentence("rescale_factor", scale, "1/255", remedy))
    number = processing["resample"]
    if number not in range(len(_RESAMPLING)):
        expected = f"a number of Pillow's filters, 0..{len(_RESAMPLING) - 1}"
        raise ValueError(checks.sentence("resample", number, expected, "correct the processor's"))
    name = _RESAMPLING[number]
    # Processors resize in one step, and take numbers of any colour profile for sRGB.
    return {
        "downscale_filter": name,
        "upscale_filter": name,
        "reducing_gap": None,
        "profiles": "ignore",
    }


def seq_len_of(tokens: int) -> int:
    """Return the multiple of most tokens of an image that is nearest to 1024: rows fill well.

    >>> seq_len_of(256), seq_len_of(196), seq_len_of(729)
    (1024, 980, 729)
    """
    return min(tokens * max(1, round(_ABOUT / tokens)), MAX_IMAGE_SEQ_LEN)
