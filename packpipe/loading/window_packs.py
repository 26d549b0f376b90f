"""`WindowPacks`: images in files as packs that are planned anew every epoch, window by window.

What `pack` of the same files writes, epoch by epoch, without writing it: the blocks in a new order,
cut into windows, each planned by itself. Only sizes are stored. A window is planned and its blocks
are read when its first pack will soon be asked for, and dropped after its last one; what is held
grows with windows, not with the source.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack

import datasets
import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.images.transform import PixelFunction
from packpipe.loading.decoding import Decoding
from packpipe.loading.open_windows import OpenWindow, TakenPacks, open_window, taken_packs
from packpipe.loading.window_plans import WindowPlans
from packpipe.philox import Key
from packpipe.planning.block_windows import EpochWindows, check_constant_drops, checked_window_rows
from packpipe.planning.image_config import PackConfig, config_from
from packpipe.planning.image_options import PackOptions
from packpipe.rows.digests import hexdigest
from packpipe.rows.fill_images import Masks
from packpipe.rows.rejects import ReadFailures, Reject, tolerance_of
from packpipe.rows.rows import Rows
from packpipe.sources.columns import AskedColumns
from packpipe.sources.file_columns import file_columns
from packpipe.sources.file_sizes import file_sizes
from packpipe.sources.image_columns import target_rules_of
from packpipe.sources.image_files import ImageFiles

# Threads that read sizes if nobody says how many: each holds a block, of 2 GiB at most.
_MOST_READERS = 16


class WindowPacks:
    """Images in files as packs, for a loader: ``PackedLoader(WindowPacks(files, 1024), 8)``.

    Every epoch has the rows that ``pack(files, 1024, seed=seed, epoch=epoch)`` would write, window
    after window. The first use reads the size of every image, once for all ranks that share
    `cache_dir`; and the first use of an epoch plans all of its windows once, to count packs.

    Args:
        files: the images.
        seq_len: tokens a row holds, 1..32767.
        window_rows: about how many rows are planned together, and read and held at once, by each
            lane; None is 16,384.
        lanes: at how many places windows are read at once; they divide batch_size · world_size.
            With as many lanes as ranks, or a multiple, each rank reads windows of its own; with
            other numbers several ranks read the same ones, and with one lane each rank reads the
            whole source every epoch, of which a loader warns. The batches depend on the number of
            lanes, never on that of ranks.
        image_column: name of the column of images; ``"auto"`` finds the only one.
        label_column: name of the column of labels, one value an image; ``"auto"`` finds it, None
            leaves labels out.
        weight_column: name of the column of what each image counts in the loss; None is 1 for all.
        mask_column: name of the column of class maps, as in `pack`.
        target_stride: pixels a side of a target, as in `pack`.
        size_columns: names of the columns of upright heights and widths; None reads headers, for
            which all files are read once.
        image_root: the only folder that paths may lead into; None follows every path, as in `pack`.
        cache_dir: the folder of the files of sizes (8 bytes an image) and of counts (8 bytes a
            window of each epoch); None is one in the cache of `datasets`.
        num_workers: threads that read sizes, each of which holds a block, and count packs; None
            is one a processor, but 16 at most that read.
        on_error: ``"quarantine"`` or ``"raise"``, as in `EpochPacks`.
        max_bad_fraction: a larger share of rejects raises an error.
        max_consecutive_bad: this many rejects in a row raise an error.
        transform: a function f(pixels, rng) that returns other pixels, as in `EpochPacks`.
        **options: the options of `PackConfig`.

    Attributes:
        config: the options.
        lanes: how many lanes there are.
        rejects: examples that are in no plan, as a list, of some hundred bytes each, in every
            process. An image that its row names by a path, and that could not be read, stays one
            until the file of sizes is removed; a warning says how many there are, and which file.

    Raises:
        TypeError, ValueError: an argument or a column is wrong, or too many images are bad.
        ConnectionError: a file cannot be read, at the fourth attempt.
    """

    def __init__(
        self,
        files: ImageFiles,
        seq_len: int = 1024,
        *,
        window_rows: int | None = None,
        lanes: int = 1,
        image_column: str = "auto",
        label_column: str | None = "auto",
        weight_column: str | None = None,
        mask_column: str | None = None,
        target_stride: int | None = None,
        size_columns: tuple[str, str] | None = None,
        image_root: str | Path | None = None,
        cache_dir: str | Path | None = None,
        num_workers: int | None = None,
        on_error: str = "quarantine",
        max_bad_fraction: float = 0.01,
        max_consecutive_bad: int = 100,
        transform: PixelFunction | None = None,
        **options: Unpack[PackOptions],
    ) -> None:
        if not isinstance(files, ImageFiles):
            name, remedy = type(files).__name__, "pass a Dataset to EpochPacks"
            raise TypeError(checks.sentence("type(files)", name, "ImageFiles", remedy))
        self.config: PackConfig = config_from(seq_len, dict(options))
        check_constant_drops(self.config)
        self._decoding = Decoding(self.config, transform)
        rows = checked_window_rows(window_rows)
        remedy = "as many as there will be ranks is usual"
        self.lanes = checks.whole_number("lanes", lanes, 1, 2**31, remedy)
        if num_workers is not None:
            remedy = "None is one thread a processor"
            num_workers = checks.whole_number("num_workers", num_workers, 1, 1024, remedy)
        self._tolerance = tolerance_of(len(files), on_error, max_bad_fraction, max_consecutive_bad)
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
        self._columns = columns = file_columns(files, asked, stored=False)
        self._target_rules = target_rules_of(
            files.features, columns.mask, target_stride, self.config.patch_size
        )
        folder = _folder(cache_dir)
        readers = num_workers or min(_MOST_READERS, os.cpu_count() or 1)
        with ThreadPoolExecutor(readers) as executor:
            self._sizes = file_sizes(
                files,
                columns,
                folder,
                max_pixels=self.config.max_pixels,
                tolerance=self._tolerance,
                executor=executor,
            )
        self.rejects: list[Reject] = self._sizes.rejects
        self._files = files
        self._plans = WindowPlans(files, self._sizes, self.config, rows, folder, num_workers)

    def __repr__(self) -> str:
        what = f"{self._files!r} in rows of {self.config.seq_len} tokens"
        lanes, rejects = self.lanes, len(self.rejects)
        counts = f"{checks.counted(lanes, 'lane')}, {checks.counted(rejects, 'reject')}"
        return f"{type(self).__name__}({what}, {counts})"

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
    def has_targets(self) -> bool:
        """Whether rows have the class of every cell."""
        return self._target_rules is not None

    @property
    def transform_name(self) -> str | None:
        """Qualified name of the transform; None without any. Says nothing of what it does."""
        return self._decoding.transform_name

    def num_packs(self, key: Key) -> int:
        """Return the number of packs of an epoch."""
        return self.windows(key).num_packs

    def fingerprint(self, key: Key) -> str:
        """Return a digest of the plans of an epoch, without making them, and of lanes."""
        columns, rules = self._columns, self._target_rules
        named = [columns.image, columns.label, columns.weight, columns.mask, rules]
        return hexdigest(f"{self._plans.digest(key)} {self.lanes} {named!r}".encode())

    def contents(self) -> dict[str, str | None]:
        """Return digests of what the batches show besides the plan, by name."""
        return {"files": self._files.fingerprint, "values": self._sizes.values}

    def windows(self, key: Key) -> EpochWindows:
        """Return the windows of an epoch."""
        return self._plans.epoch(key)

    def opened(self, key: Key, window: int) -> OpenWindow:
        """Return a window of an epoch, planned, and its blocks, which are read."""
        plan = self._plans.window(key, window)
        return open_window(self._files, self._columns, plan, self.windows(key).blocks[window])

    def taken(self, key: Key, windows: list[tuple[OpenWindow, NDArray[np.int64]]]) -> TakenPacks:
        """Return packs with their images.

        Args:
            key: (seed, epoch).
            windows: some of its windows, and the numbers of the packs to take of each.
        """
        if not windows:
            none = np.empty(0, np.int64)
            nothing = self._plans.nothing(key)
            windows = [(open_window(self._files, self._columns, nothing, none), none)]
        return taken_packs(windows)

    def rows(self, key: Key, packs: TakenPacks) -> Rows:
        """Return packs that were taken, their images decoded.

        Raises:
            ValueError: an image's size is not the one planned for.
            TooManyRejects: a ValueError; more images than are allowed cannot be decoded.
        """
        root, masks = self._columns.root, None
        if packs.masks is not None and self._target_rules is not None:
            masks = Masks(packs.masks.reader(root), self._target_rules)
        read = packs.images.reader(root)
        with self._sizes.forgotten_if_wrong():
            rows, rejects = self._decoding.filled(packs.planned, read, key, masks)
        self._undecodable.add(rejects, self._tolerance)
        return rows


def _folder(cache_dir: Any) -> Path:
    """Return the folder that sizes and counts are kept in, made."""
    remedy = "pass a folder that can be written to, and that all ranks see"
    if cache_dir is None:
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "packpipe"
    else:
        folder = checks.local_path("cache_dir", cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(checks.sentence("cache_dir", str(folder), "a folder", remedy)) from error
    if not os.access(folder, os.W_OK):
        expected = "a folder that can be written to"
        raise ValueError(checks.sentence("cache_dir", str(folder), expected, remedy))
    return folder
