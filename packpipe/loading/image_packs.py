"""Images that a model is asked about, as packs in memory: what `predict` reads. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import probe
from packpipe.images.given import given
from packpipe.images.image_data import ImageData
from packpipe.images.pillow_settings import check_settings
from packpipe.images.remote import fetched
from packpipe.loading.columns import batch_columns
from packpipe.philox import Key
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch
from packpipe.rows.fill_images import fill_rows, planned_images
from packpipe.rows.rows import Rows


@dataclass(frozen=True)
class ImagePacks:
    """Images as packs, with the methods that `PackedLoader` calls."""

    config: PackConfig
    images: Sequence[ImageData]
    plan: EpochPlan

    @property
    def max_segments(self) -> int:
        """Most images a row may hold."""
        return self.config.max_segments

    @property
    def longest(self) -> int:
        """Most tokens that an image may keep."""
        return self.config.longest

    def num_packs(self, key: Key) -> int:
        """Return how many packs there are."""
        del key
        return len(self.plan)

    def fingerprint(self, key: Key) -> str:
        """Return the plan's fingerprint."""
        del key
        return self.plan.fingerprint

    def work(self, key: Key) -> NDArray[np.int64]:
        """Return int64[packs], the work of attention in each."""
        del key
        return self.plan.packs.attention_work

    def rows(self, key: Key, packs: NDArray[np.int64]) -> Rows:
        """Return some packs with their pixels.

        Raises:
            ValueError: an image cannot be decoded; the message has its number.
        """
        planned = planned_images(self.plan, packs, None)
        read = partial(_read, self.images)
        rows, rejects, _ = fill_rows(planned, read, self.config, key)
        for reject in rejects:  # the header was fine, but not the pixels
            raise ValueError(_unreadable(reject.example_index, reject.exception))
        return rows

    def batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """Yield the columns of all packs, batch_size rows at a time; the last ends in empty rows.

        Raises:
            ValueError: an image cannot be decoded; the message has its number.
        """
        for first in range(0, len(self.plan), batch_size):
            numbers = np.arange(first, min(first + batch_size, len(self.plan)))
            rows = self.rows(self.plan.key, numbers).spread(numbers - first, batch_size)
            yield batch_columns(rows, self.max_segments, copy=False)


def image_packs(images: Iterable[Any], config: PackConfig) -> ImagePacks:
    """Return images as packs; each is the example of its number.

    Args:
        images: encoded bytes, open files, paths (also with a scheme, such as ``s3://``), arrays or
            `PIL` images; or one of these alone, but for an array.
        config: how they become rows: see `check_whole`.

    Raises:
        ValueError: an image cannot be read, and the message has its number.
    """
    check_whole(config)
    check_settings()
    # Kept, since images may come from a generator, and are read twice: header, then pixels.
    data = _given(images)
    return ImagePacks(config, data, plan_epoch(_sizes(data, config), config))


def check_whole(config: PackConfig) -> None:
    """Raise ValueError unless each image is one segment with all of its tokens."""
    for name, dropping in (("drop_rate", config.drops), ("fit_last", config.fit_last)):
        if dropping:
            expected = "its default, since fewer tokens come from smaller images"
            remedy = "resize with resolution='budget' and max_tokens"
            raise ValueError(checks.sentence(name, getattr(config, name), expected, remedy))
    if config.num_views > 1:
        expected, remedy = "1, an output an image", "pass rows of several to predict_packs"
        raise ValueError(checks.sentence("views", config.num_views, expected, remedy))


def _given(images: Any) -> list[ImageData]:
    """Return images in the forms that they are decoded from."""
    if isinstance(images, np.ndarray):
        # Rows, or channels, of one image would pass for grey ones.
        if images.ndim == 3 and {images.shape[0], images.shape[2]} & {3, 4}:
            found, expected = list(images.shape), "a list of arrays, channels last"
            remedy = "pass [image], or list(images) if they are grey ones"
            raise ValueError(checks.sentence("images.shape", found, expected, remedy))
    elif (alone := given(images)) is not None:
        return [alone]
    found = []
    for number, image in enumerate(images):
        one = given(image)
        if one is None:
            what, expected = type(image).__name__, "bytes, a path or pixels"
            remedy = "pass one image after the other"
            raise ValueError(checks.sentence(f"type(images[{number}])", what, expected, remedy))
        found.append(one)
    return found


def _read(images: Sequence[ImageData], number: int) -> ImageData:
    return fetched(images[number])


def _sizes(images: Sequence[ImageData], config: PackConfig) -> NDArray[np.int64]:
    sizes = np.empty((len(images), 2), np.int64)
    for number, image in enumerate(images):
        try:
            found = probe(fetched(image), max_pixels=config.max_pixels)
        except BadImage as error:
            raise ValueError(_unreadable(number, error.exception)) from error
        sizes[number] = found.image_hw
    return sizes


def _unreadable(number: int, why: str) -> str:
    remedy = "leave it out, or pack a dataset, which lists such images"
    return checks.sentence(f"images[{number}]", why, "an image that can be read", remedy)
