"""`measured_packs`: makes packs of images, or takes packed rows, to measure a model on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset

from packpipe import checks
from packpipe.cli.compared import LABELS, Compared
from packpipe.cli.labelled_data import LabelledData
from packpipe.cli.labels import labelled, with_classes_of
from packpipe.cli.layouts import packs_of
from packpipe.cli.open_source import naming_files
from packpipe.loading.epochs import EpochPacks
from packpipe.loading.read import read_rows
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.rows.from_arrow import table_segments
from packpipe.rows.own_columns import holds_rows
from packpipe.rows.rejects import TooManyRejects
from packpipe.rows.rows import Rows


@dataclass(frozen=True)
class NamingPacks:
    """Packs of images whose errors name files.

    Attributes:
        packs: those of the dataset.
        dataset: the images.
    """

    packs: EpochPacks
    dataset: Dataset

    def rows(self, key: Key, packs: Any) -> Rows:
        """Return some packs; of too many images that cannot be decoded the first are named."""
        with naming_files(self.dataset):
            return self.packs.rows(key, packs)

    def __getattr__(self, name: str) -> Any:
        # Not self.packs: a copy, which has none yet, would ask for ever.
        return getattr(object.__getattribute__(self, "packs"), name)


def measured_packs(
    dataset: Dataset,
    classes: ClassLabel | None,
    packing: PackConfig,
    *,
    loss: str,
    num_workers: int,
    max_bad_fraction: float,
    compared: Compared = LABELS,
) -> EpochPacks | StoredPacks:
    """Return images, or packed rows of them, as packs with the classes of a training.

    Args:
        dataset: labelled images; or rows, which are measured as they were packed.
        classes: of the training; None if nobody knows them, or labels are no classes.
        packing: how images become rows.
        loss: of the training.
        num_workers: threads that read the headers.
        max_bad_fraction: a larger share of images that cannot be read is an error.
        compared: what images are compared with; of masks the loss has no say.

    Raises:
        TooManyRejects: too many images cannot be read.
        ValueError: there is no label, or one that is not trained; or rows have other patches, or
            stand where masks are wanted.
    """
    if compared.mask is not None:
        found = compared.telling(dataset)
        if holds_rows(found.column_names):
            expected, remedy = "images and their masks", "pass those that the rows were packed of"
            raise ValueError(checks.sentence("source", "packed rows", expected, remedy))
        options: dict[str, Any] = {"max_bad_fraction": max_bad_fraction, **compared.measured}
        return packs_of(found, packing, num_workers, **options)
    found = labelled(dataset, loss)
    found = with_classes_of(found, classes)
    if holds_rows(found.column_names):
        check_patches(found, packing.patch_size, "of the model")
        return StoredPacks(found, shuffle=False)
    return packs_of(found, packing, num_workers, max_bad_fraction=max_bad_fraction)


def validation_packs(
    data: LabelledData, packing: PackConfig, **options: Any
) -> NamingPacks | StoredPacks | None:
    """Return what a training is validated on as packs; None without any.

    Errors say that they are of the validation images.

    Args:
        data: what is trained and validated on.
        packing: how images become rows.
        **options: of `measured_packs`.

    Raises:
        TooManyRejects: too many images cannot be read. Without the rejects, whose numbers are not
            those of the images that are trained on.
    """
    dataset = data.validated
    if dataset is None:
        return None
    try:
        with naming_files(dataset):
            found = measured_packs(dataset, data.classes, packing, loss=data.loss, **options)
    except TooManyRejects as error:
        raise TooManyRejects(f"of the validation images, {error}", []) from error
    return NamingPacks(found, dataset) if isinstance(found, EpochPacks) else found


def check_patches(rows: Dataset, patch_size: int, whose: str) -> None:
    """Raise ValueError if these are no rows of images, or of patches of another size.

    Args:
        rows: packed ones.
        patch_size: side of a patch in pixels.
        whose: it is, for the error.
    """
    none = read_rows(rows, range(0))
    if none.of_tokens:
        expected, remedy = "rows of images", "pass what pack made of images"
        raise ValueError(checks.sentence("rows", "of token sequences", expected, remedy))
    own = patch_size_of(rows)
    if own != patch_size:
        expected = f"{patch_size} ({whose})"
        remedy = f"take a model of patches of {own}, or pack with --patch-size {patch_size}"
        raise ValueError(checks.sentence("patch size of the rows", own, expected, remedy))


def patch_size_of(rows: Dataset) -> int:
    """Return the side of the patches of packed rows of images in pixels."""
    patches = read_rows(rows, range(0)).patches
    return math.isqrt(int(patches.shape[-1]) // 3)


def num_images(dataset: Dataset) -> int:
    """Return how many images a dataset holds, or one of packed rows."""
    if not holds_rows(dataset.column_names):
        return len(dataset)
    return len(segments_of(dataset).seq_lens)


def num_measured(dataset: Dataset, packs: Any) -> int:
    """Return how many images of a dataset are in its packs, as far as their headers tell."""
    rejects = [] if isinstance(packs, StoredPacks) else packs.rejects
    return num_images(dataset) - len(rejects)


def segments_of(rows: Dataset) -> Rows:
    """Return what rows say of their images, without labels and pixels."""
    names = ["seq_lens", "grid_hw", "image_hw", "example_index"]
    return table_segments(rows.select_columns(names).with_format("arrow")[:])
