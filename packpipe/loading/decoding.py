"""Decodes the images of packs that are planned anew every epoch."""

from __future__ import annotations

from collections.abc import Callable

from packpipe.images.image_data import ImageData
from packpipe.images.pillow_settings import check_settings
from packpipe.images.rules import pixel_rules
from packpipe.images.transform import PixelFunction, checked_transform, name_of
from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.rows.fill_images import Masks, fill_rows
from packpipe.rows.rejects import Flagged, Reject
from packpipe.rows.rows import Rows


class Decoding:
    """How packs get the pixels of their images; what is amiss with an image is logged.

    Args:
        config: the options of the packs.
        transform: a function of pixels, as in `EpochPacks`; None changes none.

    Attributes:
        transform_name: qualified name of the transform; None without one.

    Raises:
        TypeError, ValueError: transform is no such function, or Pillow is set to take other images.
        ModuleNotFoundError: the options need a package that is not installed.
    """

    def __init__(self, config: PackConfig, transform: PixelFunction | None) -> None:
        pixel_rules(config)  # raises if they need a package that is not installed
        check_settings()
        self._config, self._transform = config, checked_transform(transform)
        self.transform_name = None if self._transform is None else name_of(self._transform)
        self._flagged = Flagged()

    def filled(
        self,
        planned: Rows,
        read: Callable[[int], ImageData],
        key: Key,
        masks: Masks | None = None,
    ) -> tuple[Rows, list[Reject]]:
        """Return packs with their pixels, and the images that could not be decoded.

        Args:
            planned: the packs, without tokens.
            read: returns the image of an example.
            key: (seed, epoch) of the plan.
            masks: the class maps of the images; None without.

        Raises:
            ValueError: an image's size is not the one planned for.
        """
        rows, rejects, flags = fill_rows(planned, read, self._config, key, self._transform, masks)
        self._flagged.add(flags)
        return rows, rejects
