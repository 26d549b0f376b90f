"""The bundled data: real images, and the sizes of larger sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from packpipe import checks

_DATA = Path(__file__).parent / "data"
SETS = ("images", "pictures", "jpegs")


def images_folder() -> Path:
    """Return the folder of the 176 bundled images, as ``load_dataset("imagefolder")`` reads it.

    Installed with the package; public domain, sources in the README beside the folder.
    """
    return _DATA / "images"


def image_sizes(name: str) -> NDArray[np.int32]:
    """Return int32[images, 2], (height, width) in pixels of a set of real images.

    Args:
        name: ``"images"`` (the 176 bundled ones), ``"pictures"`` (7,868) or ``"jpegs"`` (571).

    >>> image_sizes("pictures").shape
    (7868, 2)
    """
    checks.choice("name", name, SETS, "choose a set")
    with np.load(_DATA / "sizes.npz") as sizes:
        found: NDArray[np.int32] = sizes[name].astype(np.int32)
    return found
