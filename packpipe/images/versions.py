"""The versions of all that makes pixels of images: others may make others."""

from __future__ import annotations

from typing import Any

import PIL
from PIL import features

from packpipe._version import __version__
from packpipe.images.extras import extra_versions
from packpipe.images.rules import engine_versions

# What Pillow decodes with.
_CODECS = ("jpg", "libjpeg_turbo", "webp", "zlib", "zlib_ng", "libtiff", "jpg_2000", "avif")


def decoder_versions(options: Any) -> dict[str, Any]:
    """Return the versions that a manifest names: "packpipe", "pillow" and, by name, "codecs".

    Args:
        options: a configuration, which says what of it is used.
    """
    # Nothing is converted otherwise, and records of rows made before this option do not name it.
    converter = () if options.profiles == "ignore" else ("littlecms2",)
    supported = features.get_supported()
    pillows = {name: features.version(name) for name in (*_CODECS, *converter) if name in supported}
    return {
        "packpipe": __version__,
        "pillow": PIL.__version__,
        "codecs": pillows | extra_versions() | engine_versions(options.pixels),
    }
