"""The images, and the masks, that a dataset's columns hold, by row number."""

from __future__ import annotations

from datasets import Dataset

from packpipe.rows.fill_images import Masks
from packpipe.sources.image_columns import ImageColumns, target_rules_of
from packpipe.sources.image_source import ImageSource


def images_of(dataset: Dataset, columns: ImageColumns) -> ImageSource:
    """Return the images of a dataset."""
    return _column(dataset, columns.image, columns.root)


def masks_of(dataset: Dataset, columns: ImageColumns, patch_size: int) -> Masks | None:
    """Return the masks of a dataset's images, None without a column of them.

    Raises:
        TypeError, ValueError: a patch cannot be divided by the stride, or there is no mask.
    """
    rules = target_rules_of(dataset.features, columns.mask, columns.target_stride, patch_size)
    if columns.mask is None or rules is None:
        return None
    return Masks(_column(dataset, columns.mask, columns.root), rules)


def _column(dataset: Dataset, name: str, root: str | None) -> ImageSource:
    return ImageSource(dataset.select_columns([name]).with_format("arrow"), root)
