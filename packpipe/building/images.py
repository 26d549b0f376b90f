"""`Images`: the images to pack, the options to pack them with, and what rows store of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset, Features
from numpy.typing import NDArray

from packpipe import checks
from packpipe.images.pillow_settings import check_limit, check_settings
from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.rows.encoded import ENCODED, PIXELS
from packpipe.rows.fill_images import Masks
from packpipe.rows.rejects import Reject
from packpipe.sources.column_images import images_of, masks_of
from packpipe.sources.features import packed_features
from packpipe.sources.image_columns import ImageColumns
from packpipe.sources.image_source import ImageSource
from packpipe.sources.kinds import pixel_type
from packpipe.sources.labels import Labels, Weights, labels_of, weights_of

# Processor time that decoding an image may take, if the caller does not say.
IMAGE_SECONDS = 60.0


def checked_resources(num_workers: Any, image_seconds: Any) -> tuple[int, float]:
    """Return how many processes decode, and the processor time of an image, checked."""
    remedy = "0 decodes in this process"
    number = checks.whole_number("num_workers", num_workers, 0, 1024, remedy)
    return number, checks.positive_number("image_seconds", image_seconds, "60 is usual")


@dataclass(frozen=True, eq=False)
class PairedTexts:
    """The texts that `pack_pairs` packs beside the images, in rows of their own.

    Attributes:
        lens: int64[source rows], tokens of each text.
        seq_len: most text tokens of a pack.
        rejects: examples without a text that can be packed.
        record: everything that the fields above depend on.
    """

    lens: NDArray[np.int64]
    seq_len: int
    rejects: list[Reject]
    record: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Images:
    """The images to pack, and the options to pack them with.

    Attributes:
        dataset: the source.
        columns: its columns of images, labels and sizes, and the folder of its paths.
        config, key: what the plan is made from.
        materialize: whether pixels are stored; else they are computed when rows are read.
        num_workers: processes that decode; 0 decodes in this one. The rows do not depend on it.
        image_seconds: processor time that decoding an image may take in such a process.
        texts: the texts packed beside the images; None without texts.
        store: what rows hold of their images, ``"pixels"`` or ``"encoded"``.
    """

    dataset: Dataset
    columns: ImageColumns
    config: PackConfig
    key: Key
    materialize: bool = True
    num_workers: int = 0
    image_seconds: float = IMAGE_SECONDS
    texts: PairedTexts | None = None
    store: str = PIXELS

    def __post_init__(self) -> None:
        if self.encodes:
            self._check_encodes()

    def _check_encodes(self) -> None:
        """Raise if rows cannot hold these images as they are encoded."""
        pixels = pixel_type(self.dataset.features[self.columns.image])
        refused = {
            "materialize=False, which stores no images": not self.materialize,
            "mask_column, whose targets are made with the pixels": self.columns.mask is not None,
            f"arrays of {pixels} pixels, which are not encoded": pixels is not None,
        }
        for what, is_so in refused.items():
            if is_so:
                raise ValueError(checks.sentence("store", self.store, repr(PIXELS), f"of {what}"))

    @property
    def encodes(self) -> bool:
        """Whether rows hold the encoded images, decoded once while they are packed."""
        return self.store == ENCODED

    @property
    def stores_pixels(self) -> bool:
        """Whether rows hold the pixels of their images."""
        return self.materialize and not self.encodes

    @cached_property
    def source(self) -> ImageSource:
        """The images by row number."""
        return images_of(self.dataset, self.columns)

    @cached_property
    def labels(self) -> Labels | None:
        """The labels by row number, or None."""
        return labels_of(self.dataset, self.columns.label)

    @cached_property
    def weights(self) -> Weights | None:
        """What each row counts in the loss, or None."""
        return weights_of(self.dataset, self.columns.weight)

    @cached_property
    def masks(self) -> Masks | None:
        """The masks by row number, and how they become targets; None without any."""
        found = masks_of(self.dataset, self.columns, self.config.patch_size)
        if found is not None and not self.materialize:
            expected, remedy = "True with mask_column", "EpochPacks makes rows when they are read"
            raise ValueError(checks.sentence("materialize", False, expected, remedy))
        return found

    def check_pillow(self) -> None:
        """Raise if Pillow, as it is set here, would take other images than a build does."""
        check_limit(self.config.max_pixels)
        # Worker processes do not inherit what a script has set in Pillow.
        if self.materialize and self.num_workers == 0:
            check_settings()

    @property
    def label(self) -> Any:
        """Feature of the stored labels, or None."""
        return None if self.labels is None else self.labels.feature

    @property
    def features(self) -> Features:
        """Features of the stored rows."""
        weighted = self.columns.weight is not None
        targets = None if self.masks is None else self.masks.rules
        return packed_features(
            self.config,
            self.label,
            tokens=self.stores_pixels,
            encoded=self.encodes,
            weighted=weighted,
            targets=targets,
        )
