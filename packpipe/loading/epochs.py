"""`EpochPacks`: source images whose packs are planned anew for every epoch.

Nothing is stored but the sizes: an epoch's plan is computed when its first batch is asked for, and
its images are decoded when their pack is. No second copy of the data, and new resolutions, tokens
and neighbours every epoch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, Unpack

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from packpipe import checks
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig, PackOptions, config_from
from packpipe.planning.plan import plan_epoch
from packpipe.rows.fill_images import fill_rows, planned_segments
from packpipe.rows.rejects import Reject, Undecodable, tolerance_of
from packpipe.rows.rows import Rows
from packpipe.sources.columns import check_dataset, image_column_of, label_column_of
from packpipe.sources.image_source import ImageSource, checked_root, labels_of
from packpipe.sources.sizes import sizes_of
from packpipe.sources.survey import survey

_PLANS_KEPT = 2  # the epoch under way, and one that a state is checked against


class EpochPacks:
    """A dataset of images as packs, for a loader: ``PackedLoader(EpochPacks(dataset, 1024), 8)``.

    Args:
        dataset: a Dataset with an image column.
        seq_len: tokens a row holds, 1..32767.
        image_column: as for `pack`.
        label_column: likewise.
        size_columns: likewise.
        image_root: likewise.
        num_workers: threads that probe headers, once; None is one a processor.
        on_error: ``"quarantine"`` lists images whose header or label is bad in ``rejects``; one
            that cannot be decoded leaves padding in its row, and is logged. ``"raise"`` allows
            neither.
        max_bad_fraction: a larger share of rejects is refused.
        max_consecutive_bad: as many rejects in a row are refused.
        **options: the options of `PackConfig`.

    Attributes:
        config: the options.
        rejects: examples that are in no plan, as a list.

    Raises:
        TypeError, ValueError: as `pack`.
    """

    def __init__(
        self,
        dataset: Dataset,
        seq_len: int = 1024,
        *,
        image_column: str = "auto",
        label_column: str | None = "auto",
        size_columns: tuple[str, str] | None = None,
        image_root: str | Path | None = None,
        num_workers: int | None = None,
        on_error: str = "quarantine",
        max_bad_fraction: float = 0.01,
        max_consecutive_bad: int = 100,
        **options: Unpack[PackOptions],
    ) -> None:
        self.config: PackConfig = config_from(seq_len, dict(options))
        check_dataset(dataset)
        if num_workers is not None:
            remedy = "None is one thread a processor"
            num_workers = checks.whole_number("num_workers", num_workers, 1, 1024, remedy)
        self._tolerance = tolerance_of(
            len(dataset), on_error, max_bad_fraction, max_consecutive_bad
        )
        self._undecodable = Undecodable()
        image_column = image_column_of(dataset.features, image_column)
        label_column = label_column_of(dataset.features, label_column)
        rows = dataset.select_columns([image_column]).with_format("arrow")
        self._source = ImageSource(rows, checked_root(image_root))
        self._labels = labels_of(dataset, label_column)
        label = None if label_column is None else dataset.features[label_column]
        with ThreadPoolExecutor(num_workers or os.cpu_count()) as executor:
            sizes = sizes_of(
                dataset,
                self._source,
                size_columns,
                max_pixels=self.config.max_pixels,
                executor=executor,
            )
        found = survey(sizes, self._labels, label)
        self._tolerance.check(found.rejects)
        self.rejects: list[Reject] = found.rejects
        self._image_hw, self._index = found.image_hw, found.index
        self._plans: OrderedDict[tuple[int, int], EpochPlan] = OrderedDict()
        self._lock = Lock()

    def plan(self, seed: int, epoch: int) -> EpochPlan:
        """Return the plan of an epoch; the last two are kept."""
        with self._lock:
            if (seed, epoch) not in self._plans:
                plan = plan_epoch(
                    self._image_hw, self.config, seed=seed, epoch=epoch, index=self._index
                )
                self._plans[seed, epoch] = plan
                if len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
            return self._plans[seed, epoch]

    @property
    def max_segments(self) -> int:
        """Most segments a pack may hold."""
        return self.config.max_segments

    def num_packs(self, seed: int, epoch: int) -> int:
        """Return the packs of an epoch."""
        return len(self.plan(seed, epoch))

    def fingerprint(self, seed: int, epoch: int) -> str:
        """Return the fingerprint of the epoch's plan."""
        return self.plan(seed, epoch).fingerprint

    def work(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return int64[packs], Σ l² of each pack."""
        return self.plan(seed, epoch).attention_work

    def rows(self, seed: int, epoch: int, packs: NDArray[np.int64]) -> Rows:
        """Return some packs of an epoch, their images decoded.

        Raises:
            ValueError: an image's size is not the one planned for.
            TooManyRejects: a ValueError; more images than are allowed cannot be decoded.
        """
        segments = planned_segments(self.plan(seed, epoch), packs, self._labels)
        rows, rejects = fill_rows(segments, self._source, self.config, seed=seed, epoch=epoch)
        self._undecodable.add(rejects, self._tolerance)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = Lock()
