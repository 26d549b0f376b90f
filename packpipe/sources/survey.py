"""Finds the usable images of a source, and the rejects, from headers and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from packpipe.images.bad_images import BadImage
from packpipe.images.decode import Probe, probe
from packpipe.images.image_data import ImageData
from packpipe.rows.rejects import Reject

# A probe of a plain header takes 4 to 15 µs, one by Pillow 70 to 150 µs: too few for a task.
_PROBES_A_TASK = 256


@dataclass(frozen=True, eq=False)
class Sizes:
    """The image sizes of all rows of a source.

    Attributes:
        image_hw: int32[rows, 2], upright sizes; (0, 0) for a reject.
        broken_exif: bool[rows], whether the EXIF could not be read.
        rejects: the rows without a size.
    """

    image_hw: NDArray[np.int32]
    broken_exif: NDArray[np.bool_]
    rejects: list[Reject]


def probe_sizes(
    read_image: Callable[[int], ImageData],
    num_examples: int,
    *,
    max_pixels: int,
    executor: Executor | None = None,
) -> Sizes:
    """Return the sizes of a source's images from their headers alone.

    Args:
        read_image: row number to encoded image.
        num_examples: rows.
        max_pixels: larger images are rejected.
        executor: runs the probes, 256 a task; None runs them here.
    """

    def outcomes_of(examples: range) -> list[Probe | Reject]:
        return [_probe_or_reject(read_image, example, max_pixels) for example in examples]

    tasks = [
        range(num_examples)[i : i + _PROBES_A_TASK] for i in range(0, num_examples, _PROBES_A_TASK)
    ]
    run = map if executor is None else executor.map
    sizes = Sizes(np.zeros((num_examples, 2), np.int32), np.zeros(num_examples, np.bool_), [])
    for task, outcomes in zip(tasks, run(outcomes_of, tasks), strict=True):
        for row, outcome in zip(task, outcomes, strict=True):
            if isinstance(outcome, Reject):
                sizes.rejects.append(outcome)
            else:
                sizes.image_hw[row], sizes.broken_exif[row] = outcome
    return sizes


@dataclass(frozen=True, eq=False)
class Survey:
    """The usable images of a source, and its rejects.

    Attributes:
        image_hw: int32[good, 2], upright sizes of the usable images.
        index: int64[good], their rows.
        rejects: the other examples, by row.
        broken_exif: how many images had an EXIF that could not be read.
    """

    image_hw: NDArray[np.int32]
    index: NDArray[np.int64]
    rejects: list[Reject]
    broken_exif: int

    def without(self, rejects: list[Reject]) -> Survey:
        """Return the survey with more examples rejected."""
        # An example is rejected once, for the reason that was found first.
        known = {reject.example_index for reject in self.rejects}
        more = [reject for reject in rejects if reject.example_index not in known]
        good = ~np.isin(self.index, [reject.example_index for reject in more])
        return Survey(
            image_hw=self.image_hw[good],
            index=self.index[good],
            rejects=sorted(self.rejects + more),
            broken_exif=self.broken_exif,
        )


def survey(sizes: Sizes, bad_labels: Sequence[Reject] = ()) -> Survey:
    """Return the usable images of a source, and those rejected for their size or label.

    Args:
        sizes: of its images.
        bad_labels: the rows whose label is bad.
    """
    # A bad size goes before a bad label.
    rejects = {reject.example_index: reject for reject in sizes.rejects}
    for reject in bad_labels:
        rejects.setdefault(reject.example_index, reject)
    good = np.ones(len(sizes.image_hw), np.bool_)
    good[list(rejects)] = False
    return Survey(
        image_hw=sizes.image_hw[good],
        index=np.flatnonzero(good),
        rejects=sorted(rejects.values()),
        broken_exif=int(sizes.broken_exif[good].sum()),
    )


def _probe_or_reject(
    read_image: Callable[[int], ImageData], example: int, max_pixels: int
) -> Probe | Reject:
    try:
        return probe(read_image(example), max_pixels=max_pixels)
    except BadImage as error:
        return Reject(example, "probe", error.reason, error.exception)
