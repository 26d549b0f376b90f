"""`EpochPacks`: source images whose packs are planned anew for every epoch.

Only sizes are stored: an epoch's plan is computed when its first batch is asked for, and images are
decoded when their pack is asked for. There is no second copy of the data, and every epoch has new
resolutions, kept tokens and packs.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Unpack

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from packpipe import checks
from packpipe.images.transform import PixelFunction
from packpipe.loading.decoding import Decoding
from packpipe.philox import Key, checked_key
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig, config_from
from packpipe.planning.image_options import PackOptions
from packpipe.planning.plan import plan_epoch
from packpipe.rows.digests import hexdigest, labels_digest
from packpipe.rows.fill_images import planned_images
from packpipe.rows.rejects import ReadFailures, Reject, tolerance_of
from packpipe.rows.rows import Rows
from packpipe.sources.column_images import images_of, masks_of
from packpipe.sources.columns import AskedColumns, check_dataset
from packpipe.sources.labels import bad_values, labels_of, weights_of
from packpipe.sources.sizes import forgetting_wrong_sizes, sizes_of
from packpipe.sources.survey import survey

_PLANS_KEPT = 2  # the epoch under way, and one that a state is checked against


class EpochPacks:
    """A dataset of images as packs, for a loader: ``PackedLoader(EpochPacks(dataset, 1024), 8)``.

    Args:
        dataset: a Dataset with an image column; `WindowPacks` takes `ImageFiles`.
        seq_len: tokens a row holds, 1..32767.
        image_column: name of the column of images; ``"auto"`` finds the only one.
        label_column: name of the column of labels, as in `pack`; ``"auto"`` finds it, None leaves
            labels out.
        weight_column: name of the column of what each image counts in the loss; None is 1 for all.
        mask_column: name of the column of class maps, as in `pack`.
        target_stride: pixels a side of a target, as in `pack`.
        size_columns: names of the columns of upright heights and widths; None reads headers.
        image_root: the only folder that paths may lead into; None follows every path, as in `pack`.
            Processes of a loader read for themselves: of what lies in ``memory://``, those that are
            not forked know nothing.
        num_workers: threads that read the headers, once; None is one a processor. Of the ranks that
            share a file system one reads them, and the others wait for it.
        on_error: ``"quarantine"`` lists images whose header or label is bad in ``rejects``; one
            that cannot be decoded leaves padding in its row, and is logged; so is one whose colour
            profile is broken, which keeps its place. ``"raise"`` allows no reject.
        max_bad_fraction: a larger share of rejects raises an error.
        max_consecutive_bad: this many rejects in a row raise an error.
        transform: a function f(pixels, rng) that returns other pixels, called whenever an image is
            decoded: uint8[height, width, 3] of the planned size in and out; rng is a NumPy
            generator of (seed, epoch, example). Several threads of a loader call it at once. An
            error it raises is raised, not a reject.
        **options: the options of `PackConfig`.

    Attributes:
        config: the options.
        rejects: examples that are in no plan, as a list.

    Raises:
        TypeError, ValueError: an argument or a column is wrong, or too many images are bad.
    """

    def __init__(
        self,
        dataset: Dataset,
        seq_len: int = 1024,
        *,
        image_column: str = "auto",
        label_column: str | None = "auto",
        weight_column: str | None = None,
        mask_column: str | None = None,
        target_stride: int | None = None,
        size_columns: tuple[str, str] | None = None,
        image_root: str | Path | None = None,
        num_workers: int | None = None,
        on_error: str = "quarantine",
        max_bad_fraction: float = 0.01,
        max_consecutive_bad: int = 100,
        transform: PixelFunction | None = None,
        **options: Unpack[PackOptions],
    ) -> None:
        self.config: PackConfig = config_from(seq_len, dict(options))
        self._decoding = Decoding(self.config, transform)
        check_dataset(dataset)
        if num_workers is not None:
            remedy = "None is one thread a processor"
            num_workers = checks.whole_number("num_workers", num_workers, 1, 1024, remedy)
        self._tolerance = tolerance_of(
            len(dataset), on_error, max_bad_fraction, max_consecutive_bad
        )
        self._undecodable = ReadFailures()
        asked = AskedColumns(
            image_column=image_column,
            label_column=label_column,
            size_columns=size_columns,
            image_root=image_root,
            weight_column=weight_column,
            mask_column=mask_column,
            target_stride=target_stride,
        )
        columns = asked.of_images(dataset, stored=False)
        self._source = images_of(dataset, columns)
        self._masks = masks_of(dataset, columns, self.config.patch_size)
        labels = labels_of(dataset, columns.label)
        weights = weights_of(dataset, columns.weight)
        with ThreadPoolExecutor(num_workers or os.cpu_count()) as executor:
            sizes = sizes_of(
                dataset,
                self._source,
                columns.sizes,
                max_pixels=self.config.max_pixels,
                executor=executor,
            )
        found = survey(sizes, bad_values(labels, weights))
        self._tolerance.check(found.rejects)
        self.rejects: list[Reject] = found.rejects
        self._image_hw, self._index = found.image_hw, found.index
        self._labels = None if labels is None else labels.values.take(pa.array(found.index))
        self._weight = None if weights is None else weights.values[found.index]
        self._plans: OrderedDict[Key, EpochPlan] = OrderedDict()
        self._lock = Lock()

    def __repr__(self) -> str:
        held, rejected = len(self._index), len(self.rejects)
        what = f"{held} images in rows of {self.config.seq_len} tokens, {rejected} rejects"
        return f"{type(self).__name__}({what})"

    def plan(self, seed: int, epoch: int) -> EpochPlan:
        """Return the plan of an epoch; the last two are kept."""
        key = checked_key(seed, epoch)
        # Threads that fill the first batches all ask for the plan: one makes it, the others wait.
        with self._lock:
            if key not in self._plans:
                self._plans[key] = plan_epoch(
                    self._image_hw, self.config, **key._asdict(), index=self._index
                )
                if len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
            return self._plans[key]

    @property
    def undecodable(self) -> list[Reject]:
        """Examples of plans that this process could not decode, by now."""
        return self._undecodable.rejects

    @property
    def max_segments(self) -> int:
        """Most segments a pack may hold."""
        return self.config.max_segments

    @property
    def longest(self) -> int:
        """Most tokens that an image may keep."""
        return self.config.longest

    @property
    def labels(self) -> pa.Array | None:
        """Labels of all images in the plans; None without any."""
        return self._labels

    @property
    def has_targets(self) -> bool:
        """Whether rows have the class of every cell."""
        return self._masks is not None

    @property
    def transform_name(self) -> str | None:
        """Qualified name of the transform; None without any. Says nothing of what it does."""
        return self._decoding.transform_name

    def num_packs(self, key: Key) -> int:
        """Return the number of packs of an epoch."""
        return len(self.plan(*key))

    def fingerprint(self, key: Key) -> str:
        """Return the fingerprint of the epoch's plan."""
        return self.plan(*key).fingerprint

    def former_fingerprint(self, key: Key) -> str:
        """Return the fingerprint in states from before some options were there."""
        return replace(self.plan(*key), config=self.config.as_before()).fingerprint

    def contents(self) -> dict[str, str | None]:
        """Return digests of what the batches show besides the plan, by name."""
        return dict(self._contents)

    @cached_property
    def _contents(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        if self._weight is not None:
            found["weights"] = hexdigest(self._weight.data)
        if self._masks is not None:
            source: Any = self._masks.read
            rules = repr(self._masks.rules).encode()
            found["masks"] = hexdigest(rules, source.contents_digest().encode())
        return {
            **found,
            "labels": labels_digest(self._labels),
            "images": self._source.contents_digest(),
        }

    def work(self, key: Key) -> NDArray[np.int64]:
        """Return int64[packs], Σ l² of each pack."""
        return self.plan(*key).packs.attention_work

    def planned(self, key: Key, packs: NDArray[np.int64]) -> Rows:
        """Return some packs of an epoch as planned: rows without tokens yet."""
        return planned_images(self.plan(*key), packs, self._labels, self._weight)

    def rows(self, key: Key, packs: NDArray[np.int64] | Rows) -> Rows:
        """Return some packs of an epoch, their images decoded.

        Args:
            key: (seed, epoch) of the plan.
            packs: their numbers; or what `planned` returned, which needs no plan any more.

        Raises:
            ValueError: an image's size is not the one planned for.
            TooManyRejects: a ValueError; more images than are allowed cannot be decoded.
        """
        planned = packs if isinstance(packs, Rows) else self.planned(key, packs)
        with forgetting_wrong_sizes(self._source, self.config.max_pixels):
            rows, rejects = self._decoding.filled(planned, self._source, key, self._masks)
        self._undecodable.add(rejects, self._tolerance, self._source.file_of)
        return rows

    # A lock cannot be pickled: each worker process makes its own. Plans can be made again.
    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_lock", "_plans"}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self._plans = Lock(), OrderedDict()
