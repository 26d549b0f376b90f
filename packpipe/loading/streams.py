"""`PackedStream`: packs of a dataset that is read from front to back.

Sizes are not known beforehand. Examples come one at a time. Each is decided alone (by
`packpipe.planning.decisions`, with its number in the stream as its index), and its length goes to
an `OnlinePacker`. After every window of examples all open packs are closed, so that the stream can
continue from the beginning of any window. A state is the beginning of a window, how many examples
were bad before it, and how many packs were taken; the packs between are read and planned again, but
not decoded. So a stream that is resumed stops at the bad example at which it would have stopped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from datasets import Features, Image, IterableDataset
from datasets import iterable_dataset as sources

from packpipe import checks
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import probe
from packpipe.images.transform import PixelFunction
from packpipe.loading.decoding import Decoding
from packpipe.loading.reading import Anchor, Held, Reading
from packpipe.loading.stream_examples import check_label, image_data, label_values, length_of
from packpipe.packing.online import OnlinePacker
from packpipe.philox import Key
from packpipe.planning.decisions import decide
from packpipe.planning.image_config import PackConfig, config_from
from packpipe.planning.image_options import PackOptions
from packpipe.rows.fill_images import with_boxes
from packpipe.rows.rejects import NAMED, Reject, StreamReadFailures, Tally, tolerance_of
from packpipe.rows.rows import Rows
from packpipe.sources.image_columns import check_labels, image_column_of, label_column_of
from packpipe.sources.image_source import checked_root
from packpipe.sources.kinds import pixel_type

log = logging.getLogger(__name__)

_AT_ONCE = 64  # examples decided and packed together; the packs do not depend on it


class PackedStream:
    """An IterableDataset of images as packs: ``PackedLoader(PackedStream(dataset, 1024), 8)``.

    Every rank reads all examples and decodes those of its own packs. They must be the same on every
    rank: a file that one rank lacks is not noticed, and ranks may take different numbers of steps.
    ``example_index`` is the place in the epoch's stream; `datasets` shuffles shards anew each epoch
    where it shuffles at all.

    Args:
        dataset: an IterableDataset with an image column. To resume exactly, it must resume exactly
            itself: `datasets` refills the buffer of ``shuffle`` instead of saving it, so shuffle
            the shards, or the rows before they are read.
        seq_len: tokens a row holds, 1..32767.
        image_column: name of the column of images; ``"auto"`` finds the only one, of a dataset
            with features.
        label_column: name of the column of labels; ``"auto"`` finds it, None leaves labels out.
        image_root: the only folder that paths may lead into; None follows every path, as in
            `pack`.
        open_packs: packs open at once.
        num_examples: about how many examples an epoch has; needed for a drop rate that changes over
            the training.
        on_error: ``"quarantine"`` leaves out images that are bad and logs them; ``"raise"`` stops.
            Images whose colour profile is broken are logged, and kept.
        max_bad_fraction: a larger share of rejects among the examples of the epoch so far stops the
            stream, once it has more than 30 or has ended. Images with a sound header that cannot
            be decoded are counted apart: by each process, among all that it has decoded.
        max_consecutive_bad: this many rejects in a row stop it.
        transform: a function of pixels, as in `EpochPacks`.
        **options: the options of `PackConfig`; all open packs are closed after every ``window``
            examples, and ``strategy`` is ``"best_fit"`` or ``"first_fit"``.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        seq_len: int = 1024,
        *,
        image_column: str = "auto",
        label_column: str | None = "auto",
        image_root: str | Path | None = None,
        open_packs: int = 64,
        num_examples: int | None = None,
        on_error: str = "quarantine",
        max_bad_fraction: float = 0.01,
        max_consecutive_bad: int = 100,
        transform: PixelFunction | None = None,
        **options: Unpack[PackOptions],
    ) -> None:
        if not isinstance(dataset, IterableDataset):
            name, remedy = type(dataset).__name__, "pass a Dataset to EpochPacks instead"
            raise TypeError(checks.sentence("type(dataset)", name, "IterableDataset", remedy))
        options.setdefault("strategy", "best_fit")
        options.setdefault("window", 16384)
        self.config: PackConfig = config_from(seq_len, dict(options))
        self._decoding = Decoding(self.config, transform)
        _check_streams(self.config, dataset)
        self._num_examples = _checked_number(num_examples, self.config)
        self._open_packs = open_packs
        self._packer()  # raises if one of its options is wrong
        self._tolerance = tolerance_of(0, on_error, max_bad_fraction, max_consecutive_bad)
        self._undecodable = StreamReadFailures()
        features = dataset.features
        self._length: int | None = None  # numbers of a label that is a list
        if features is None:
            if image_column == "auto" or label_column == "auto":
                remedy = "pass image_column and label_column"
                raise ValueError(
                    checks.sentence("dataset.features", None, "known, for 'auto'", remedy)
                )
            self._features = Features()
        else:
            image_column = image_column_of(features, image_column)
            label_column = label_column_of(features, label_column)
            check_labels(features, label_column, "pass label_column=None")
            self._length = length_of(features, label_column)
            self._features = features
            if isinstance(features[image_column], Image):
                dataset = dataset.cast_column(image_column, Image(decode=False))
        self._image_column, self._label_column = image_column, label_column
        self._root = checked_root(image_root)
        self._pixels = pixel_type(self._features.get(image_column))
        self._dataset = dataset
        # Every pass reads a copy; a dataset that cannot be copied is refused now.
        try:
            self._copy()
        except TypeError as error:
            remedy = "open files and the like inside the functions it maps"
            expected = "one that can be copied, for every pass"
            raise TypeError(checks.sentence("dataset", str(error), expected, remedy)) from error
        try:
            self.check_resumable()
        except ValueError as error:
            log.warning("%s (a state of this stream will be refused)", error)

    @property
    def max_segments(self) -> int:
        """Most segments a pack may hold."""
        return self.config.max_segments

    @property
    def longest(self) -> int:
        """Most tokens that an image may keep."""
        return self.config.longest

    @property
    def transform_name(self) -> str | None:
        """Qualified name of the transform; None without any. Says nothing of what it does."""
        return self._decoding.transform_name

    def fingerprint(self, key: Key) -> str:  # noqa: ARG002
        """Return a text that identifies the packing options; it cannot identify the data."""
        return self._fingerprint(self.config)

    def former_fingerprint(self, key: Key) -> str:  # noqa: ARG002
        """Return the fingerprint in states from before some options were there."""
        return self._fingerprint(self.config.as_before())

    def _fingerprint(self, config: PackConfig) -> str:
        columns = f"columns={self._image_column!r}, {self._label_column!r}"
        packing = f"open_packs={self._open_packs} num_examples={self._num_examples}"
        return f"{config!r} {packing} {columns}"

    def check_resumable(self) -> None:
        """Raise if the dataset cannot continue where it stopped.

        Raises:
            ValueError: it shuffles through a buffer.
        """
        # Each step of a dataset (map, shuffle, ...) wraps the one before it, or several.
        found = self._dataset._ex_iterable
        waiting = [found]
        while waiting:
            found = waiting.pop()
            if isinstance(found, sources.BufferShuffledExamplesIterable):
                expected = "a dataset that continues exactly"
                remedy = "datasets refills a shuffle buffer; shuffle the rows before they are read"
                raise ValueError(
                    checks.sentence("dataset", "shuffled in a buffer", expected, remedy)
                )
            inner = getattr(found, "ex_iterable", None)
            waiting += getattr(found, "ex_iterables", [] if inner is None else [inner])

    def stream_packs(self, key: Key, state: dict[str, Any] | None, num_packs: int) -> Reading:
        """Return the packs of an epoch, as lists of examples that are not decoded yet.

        Args:
            key: (seed, epoch) of all random choices; the dataset's `set_epoch` gets the epoch.
            state: where to begin reading, from `Reading.state`; None for the beginning.
            num_packs: packs that were taken before, and are left out.
        """
        anchor = Anchor(0, 0, None) if state is None else Anchor(**state)
        dataset = self._copy()
        dataset.set_epoch(key.epoch)
        if anchor.source is not None:
            dataset.load_state_dict(anchor.source)
        anchors = deque([anchor])
        packs = self._packs(dataset, anchors, key)
        # Packs before num_packs are planned again, since the state is the beginning of a window.
        return Reading(islice(packs, num_packs - anchor.num_packs, None), anchors)

    def _packs(
        self, dataset: IterableDataset, anchors: deque[Anchor], key: Key
    ) -> Iterator[list[Held]]:
        """Yield all packs from an anchor on, and add the anchor of each window to anchors."""
        examples = iter(dataset)
        num_packs, num_examples, _, *bad = anchors[0]
        tally = Tally(num_examples, *bad)
        latest: deque[Reject] = deque(maxlen=NAMED)
        while True:
            before = tally.num_examples
            window = _up_to(examples, self.config.window)
            tally, packed = yield from self._window(window, tally, key, latest)
            if tally.num_examples == before:
                return
            num_packs += packed
            # All packs are closed here, so there is no more to keep.
            num_examples, *bad = tally
            anchors.append(Anchor(num_packs, num_examples, dataset.state_dict(), *bad))

    def rows(self, key: Key, packs: list[list[Held]]) -> Rows:
        """Return packs as rows, their images decoded."""
        images = {held.number: held.data for pack in packs for held in pack}
        planned = self._planned(key, packs)
        rows, rejects = self._decoding.filled(planned, images.__getitem__, key)
        self._undecodable.add(key.epoch, len(images), rejects, self._tolerance)
        return rows

    def _copy(self) -> IterableDataset:
        """Return a copy of the dataset, for one pass.

        A dataset that has loaded a state begins there in every later pass, too, and datasets that
        are made from one another share the parts that count what was read.
        """
        return deepcopy(self._dataset).with_format(None)

    def _packer(self) -> OnlinePacker:
        return OnlinePacker(
            self.config.seq_len,
            max_segments=self.config.max_segments,
            strategy=self.config.strategy,
            open_packs=self._open_packs,
        )

    def _window(
        self, examples: Iterator[dict[str, Any]], tally: Tally, key: Key, latest: deque[Reject]
    ) -> Generator[list[Held], None, tuple[Tally, int]]:
        """Yield the packs of a window; return the tally after it, and how many packs it has."""
        packer = self._packer()
        waiting: dict[int, Held] = {}
        end = tally.num_examples + self.config.window
        pushed = 0
        while some := list(islice(examples, _AT_ONCE)):
            held, tally = self._decided(some, tally, key, latest)
            waiting.update(enumerate(held, pushed))
            pushed += len(held)
            lengths = np.array([one.seq_len for one in held], np.int64)
            yield from _taken(waiting, *packer.push(lengths))
        if tally.num_examples < end:
            self._tolerance.check_so_far(tally, latest, ended=True)
        yield from _taken(waiting, *packer.flush())
        return tally, packer.num_packs

    def _decided(
        self,
        examples: list[dict[str, Any]],
        tally: Tally,
        key: Key,
        latest: deque[Reject],
    ) -> tuple[list[Held], Tally]:
        """Return the usable examples with their decisions, and the tally after all of them.

        The others are added to the latest rejects.
        """
        good = []
        for number, example in enumerate(examples, tally.num_examples):
            for what, name in (("image", self._image_column), ("label", self._label_column)):
                if name is not None and name not in example:
                    expected, remedy = f"one of {list(example)}", f"pass {what}_column"
                    raise ValueError(checks.sentence(f"{what}_column", name, expected, remedy))
            label = None if self._label_column is None else example[self._label_column]
            try:
                data = image_data(example[self._image_column], self._pixels, self._root)
                found = probe(data, max_pixels=self.config.max_pixels)
                if self._label_column is not None:
                    check_label(label, self._features.get(self._label_column), self._length)
            except BadImage as error:
                latest.append(Reject(number, "probe", error.reason, error.exception))
                tally = tally.plus(bad=True)
                self._tolerance.check_so_far(tally, latest)
                log.warning("example %d left out: %s", number, error.exception)
                continue
            tally = tally.plus(bad=False)
            good.append((number, data, found.image_hw, label))
        if not good:
            return [], tally
        index = np.array([number for number, *_ in good])
        progress = None
        if self._num_examples is not None and self.config.epochs is not None:
            # num_examples is a guess, and may be too small.
            place = np.minimum(index / self._num_examples, 1.0)
            progress = (key.epoch + place) / self.config.epochs
        decisions = decide(
            np.array([image_hw for _, _, image_hw, _ in good], np.int32),
            self.config,
            key,
            index=index,
            progress=progress,
        )
        lens = (decisions.num_keep + self.config.prefix_tokens).tolist()
        held = [
            Held(number, data, image_hw, tuple(grid), length, label)
            for (number, data, image_hw, label), grid, length in zip(
                good, decisions.grid_hw.tolist(), lens, strict=True
            )
        ]
        return held, tally

    def _planned(self, key: Key, packs: list[list[Held]]) -> Rows:
        """Return packs as rows without tokens."""
        held = [one for pack in packs for one in pack]
        segments: dict[str, Any] = {
            "seq_lens": np.array([one.seq_len for one in held], np.int32),
            "grid_hw": np.array([one.grid_hw for one in held], np.int16).reshape(-1, 2),
            "image_hw": np.array([one.image_hw for one in held], np.int32).reshape(-1, 2),
            "example_index": np.array([one.number for one in held], np.int64),
        }
        if self._label_column is not None:
            feature = self._features.get(self._label_column)
            labels = [one.label for one in held]
            segments["labels"] = label_values(labels, feature, self._length)
        segments = with_boxes(segments, self.config, key)
        return Rows(np.cumsum([0, *map(len, packs)]), segments)


def _check_streams(config: PackConfig, dataset: IterableDataset) -> None:
    """Raise ValueError if options, or the dataset, do not go with a stream."""
    if config.fit_last is not None:
        remedy = "the open packs of a stream are nearly full"
        raise ValueError(checks.sentence("fit_last", config.fit_last, "None", remedy))
    if config.num_views > 1:
        expected, remedy = "1, of a stream", "pass a Dataset to EpochPacks"
        raise ValueError(checks.sentence("views", config.num_views, expected, remedy))
    if dataset._distributed is not None:
        expected, remedy = "the whole dataset", "each rank takes its own packs of all examples"
        raise ValueError(checks.sentence("dataset", "split by node", expected, remedy))


def _checked_number(num_examples: Any, config: PackConfig) -> int | None:
    """Return num_examples, checked; None if it is not given and no option needs it.

    Raises:
        TypeError, ValueError: it is no whole number from 1; or an option needs it, and it is None.
    """
    remedy = "pass about as many as an epoch has"
    if num_examples is not None:
        return checks.whole_number("num_examples", num_examples, 1, 2**62, remedy)
    if config.uses_progress:
        expected = "a number, for OverTraining"
        raise ValueError(checks.sentence("num_examples", None, expected, remedy))
    return None


def _up_to(examples: Iterator[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """Yield the next examples, `most` in number, or fewer at the end of the stream."""
    # Exactly that many are taken, so that the dataset's state is then that of the window's end.
    for _ in range(most):
        try:
            yield next(examples)
        except StopIteration:
            return


def _taken(
    waiting: dict[int, Held], order: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]
) -> Iterator[list[Held]]:
    """Yield the examples of each closed pack, and remove them from the waiting ones."""
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        yield [waiting.pop(place) for place in order[start:stop].tolist()]
