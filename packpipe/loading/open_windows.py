"""Reads the blocks of a planned window, and takes packs out of windows that are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.loading.encoded import EncodedImages, encoded, in_one
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.rows.fill_images import planned_images
from packpipe.rows.rows import Rows, gather
from packpipe.sources.image_columns import ImageColumns
from packpipe.sources.image_files import ImageFiles
from packpipe.sources.labels import labels_of, weights_of


@dataclass(frozen=True, eq=False)
class OpenWindow:
    """A window that is planned, and its images.

    Attributes:
        plan: its plan.
        images: encoded, of all rows of its blocks.
        masks: encoded class maps of the same rows; None without.
        labels: one an image of the plan; None without.
        weight: float32, one an image of the plan; None without.
    """

    plan: EpochPlan
    images: EncodedImages
    masks: EncodedImages | None
    labels: pa.Array | None
    weight: NDArray[np.float32] | None


class TakenPacks(NamedTuple):
    """Packs with the images they need and no others, which may be sent to another process.

    Attributes:
        planned: the packs as rows without tokens.
        images: those of the packs.
        masks: class maps of the packs; None without.
    """

    planned: Rows
    images: EncodedImages
    masks: EncodedImages | None


def open_window(
    files: ImageFiles, columns: ImageColumns, plan: EpochPlan, blocks: NDArray[np.int64]
) -> OpenWindow:
    """Return a window with its images.

    Args:
        files: the images of all windows.
        columns: which columns of them hold what.
        plan: of the window.
        blocks: int64[blocks], the numbers of its blocks, ascending.

    Raises:
        ConnectionError: a file cannot be read, at the fourth attempt.
    """
    named = [columns.image, columns.label, columns.weight, columns.mask]
    names = list(dict.fromkeys(name for name in named if name is not None))
    dataset = files.reader.dataset([files.block(number) for number in blocks.tolist()], names)
    rows = files.rows_of(blocks)
    at = np.searchsorted(rows, plan.index)
    labels, weights = labels_of(dataset, columns.label), weights_of(dataset, columns.weight)
    return OpenWindow(
        plan=plan,
        images=encoded(dataset, rows, columns.image),
        masks=None if columns.mask is None else encoded(dataset, rows, columns.mask),
        labels=None if labels is None else labels.values.take(pa.array(at)),
        weight=None if weights is None else weights.values[at],
    )


def taken_packs(windows: list[tuple[OpenWindow, NDArray[np.int64]]]) -> TakenPacks:
    """Return packs of windows, one window at least, with their images.

    Args:
        windows: each with the numbers of the packs to take of it.
    """
    planned, images, masks = list[Rows](), list[EncodedImages](), list[EncodedImages]()
    for window, packs in windows:
        rows = planned_images(window.plan, packs, window.labels, window.weight)
        examples = np.unique(rows.example_index)
        planned.append(rows)
        images.append(window.images.of(examples))
        if window.masks is not None:
            masks.append(window.masks.of(examples))
    return TakenPacks(_rows_in_one(planned), in_one(images), in_one(masks) if masks else None)


def _rows_in_one(planned: list[Rows]) -> Rows:
    """Return the rows of several windows as one."""
    if len(planned) == 1:
        return planned[0]
    each = [(part, row) for part in planned for row in range(len(part))]
    return gather([part for part, _ in each], [row for _, row in each])
