"""`WindowPlans`: the windows of each epoch of `ImageFiles`, and how many packs each of them has.

A window is a run of whole blocks in the order of the epoch; it is planned from the sizes of its own
images when it is needed. How many packs each has decides how many steps an epoch takes, and which
window a pack is in. So all windows of an epoch are planned once and counted, by one process of
those that share a folder, and the counts are kept there: 8 bytes a window. A window is a function
of its images, so it can be planned again at any time, by itself.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from packpipe import checks, durable
from packpipe._version import __version__
from packpipe.philox import Key
from packpipe.planning.block_windows import EpochWindows, block_windows, plan_window
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig
from packpipe.rows.digests import hexdigest
from packpipe.sources.file_sizes import FileSizes
from packpipe.sources.image_files import ImageFiles

log = logging.getLogger(__name__)

_EPOCHS_KEPT = 2  # the one under way, and the next one, which is begun while it ends


class WindowPlans:
    """Plans the windows of files.

    Args:
        source: the files.
        sizes: of their images.
        config: the options.
        window_rows: about how many rows a window has.
        folder: where counts of packs are kept.
        num_workers: threads that count them; None is one a processor.
    """

    def __init__(
        self,
        source: ImageFiles,
        sizes: FileSizes,
        config: PackConfig,
        window_rows: int,
        folder: Path,
        num_workers: int | None,
    ) -> None:
        self._source, self._sizes, self._config = source, sizes, config
        self._window_rows, self._folder, self._num_workers = window_rows, folder, num_workers
        self._epochs: OrderedDict[Key, EpochWindows] = OrderedDict()
        self._lock = Lock()

    def epoch(self, key: Key) -> EpochWindows:
        """Return the windows of an epoch; those of the last two are kept."""
        with self._lock:
            if key not in self._epochs:
                self._epochs[key] = self._counted(key)
                if len(self._epochs) > _EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            return self._epochs[key]

    def window(self, key: Key, window: int) -> EpochPlan:
        """Return the plan of a window of an epoch.

        Raises:
            ValueError: it has not as many packs as were counted.
        """
        epoch = self.epoch(key)
        plan = self._plan(key, window, epoch.blocks[window])
        expected = int(epoch.ends[window]) - epoch.first_pack(window)
        if len(plan) != expected:
            path = self._path(key)
            remedy = f"the sizes or counts were changed: remove {path} and {self._sizes.path}"
            what = f"packs of window {window}"
            raise ValueError(checks.sentence(what, len(plan), f"{expected}, as counted", remedy))
        return plan

    def nothing(self, key: Key) -> EpochPlan:
        """Return the plan of no images."""
        return self._plan(key, 0, np.empty(0, np.int64))

    def digest(self, key: Key) -> str:
        """Return 32 hexadecimal digits, of all that the packs of an epoch depend on."""
        return hexdigest(f"{self._digest} {tuple(key)}".encode())

    @cached_property
    def _digest(self) -> str:
        # Options are equal where their numbers are: 1 and 1.0 are the same max_upscale.
        options = json.loads(json.dumps(self._config.to_dict()), parse_int=float)
        known = [self._sizes.digest, self._window_rows, json.dumps(options, sort_keys=True)]
        return hexdigest(repr(known).encode(), self._source.block_rows.data)

    def _plan(self, key: Key, window: int, blocks: NDArray[np.int64]) -> EpochPlan:
        rows = self._source.rows_of(blocks)
        image_hw = np.asarray(self._sizes.image_hw[rows])
        good = image_hw[:, 0] > 0
        return plan_window(
            image_hw[good], self._config, **key._asdict(), index=rows[good], window=window
        )

    def _path(self, key: Key) -> Path:
        # Another packpipe may pack them in another way.
        name = hexdigest(f"{__version__} {self.digest(key)}".encode())
        return self._folder / f"packpipe-packs-{name}.npy"

    def _counted(self, key: Key) -> EpochWindows:
        blocks = block_windows(self._source.block_rows, self._window_rows, key)
        path = self._path(key)

        def count(window: int) -> int:
            return len(self._plan(key, window, blocks[window]))

        def read() -> NDArray[np.int64] | None:
            return _counts_in(path, len(blocks))

        def write(file: BinaryIO) -> None:
            # Most of a plan is made without the interpreter lock.
            with ThreadPoolExecutor(self._num_workers or os.cpu_count()) as executor:
                np.save(file, np.array(list(executor.map(count, range(len(blocks)))), np.int64))

        return EpochWindows(blocks, np.cumsum(durable.made_once(path, read, write)))

    # A lock cannot be pickled. Counts are read again.
    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_lock", "_epochs"}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self._epochs = Lock(), OrderedDict()


def _counts_in(path: Path, num_windows: int) -> NDArray[np.int64] | None:
    """Return the counts in a file; None without one, or if it is not as written."""
    try:
        found: NDArray[np.int64] = np.load(path)
        if found.shape == (num_windows,) and found.dtype == np.int64 and (found >= 0).all():
            return found
        what = f"{found.shape} of {found.dtype}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:  # EOFError: it is empty
        what = str(error)
    log.warning("%s is broken (%s); counting again", path, what)
    return None
