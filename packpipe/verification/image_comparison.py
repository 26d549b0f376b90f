"""Compares rows of images with their source: all sizes, labels and rejects, and some pixels."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from numpy.typing import NDArray

from packpipe.building.shards import MANIFEST
from packpipe.images.bad_images import BadImage
from packpipe.images.content import content_of
from packpipe.images.fill import Failure, ImageTask, Outcome, fill_row
from packpipe.images.masks import TargetRules
from packpipe.images.pool import ENDED
from packpipe.images.rules import pixel_rules
from packpipe.images.versions import decoder_versions
from packpipe.philox import Key
from packpipe.planning.decisions import decide_all
from packpipe.planning.image_config import PackConfig
from packpipe.rows.encoded import ENCODED, encoded_in
from packpipe.rows.fill_images import Masks, planned_tokens, row_tasks, with_boxes
from packpipe.rows.from_arrow import table_rows
from packpipe.rows.rejects import Reject, one_each
from packpipe.rows.rows import Rows
from packpipe.rows.text import wide
from packpipe.sources.image_source import ImageSource
from packpipe.sources.kinds import holds_images, holds_labels, holds_numbers
from packpipe.sources.labels import bad_values, labels_of, weights_of
from packpipe.sources.sizes import column_sizes
from packpipe.sources.survey import Sizes, probe_sizes, survey
from packpipe.sources.token_columns import TokenColumns
from packpipe.sources.token_source import token_source
from packpipe.verification.problems import FoundRows, Problem, named
from packpipe.verification.reject_checks import reject_problems
from packpipe.verification.row_checks import rows_with, same_numbers, same_values


@dataclass(frozen=True)
class ImageComparison:
    """The source of some rows of images, and how they were made from it.

    Attributes:
        dataset: the source; it has the columns that the manifest names.
        manifest: of the rows.
        config, key: what they were made with.
        texts: with `pack_pairs`, the columns of the texts beside the images; else None.
    """

    dataset: Dataset
    manifest: dict[str, Any]
    config: PackConfig
    key: Key
    texts: TokenColumns | None

    def problems(
        self,
        found: FoundRows,
        rejects: list[Reject] | None,
        undecoded: NDArray[np.int64] | None,
        sample: int | None,
    ) -> Generator[Problem, None, dict[str, int]]:
        """Yield how rows and rejects differ; return the counts that only the source tells."""
        unfit = list(self._unfit())
        if unfit:
            yield from unfit
            return {}
        of_source = labels_of(self.dataset, self.manifest["label_column"])
        labels = None if of_source is None else of_source.values
        stored = _label_type(found)
        # Labels of more than 2 GiB come in the large type.
        if labels is not None and stored is not None and wide(stored) != wide(labels.type):
            yield Problem("dataset", f"has labels of type {labels.type}, expected {stored}")
            labels = None
        sizes = self._sizes()
        weights = weights_of(self.dataset, self.manifest.get("weight_column"))
        usable = survey(sizes, bad_values(of_source, weights))
        num_broken = usable.broken_exif
        if self.texts is not None:
            of_texts = token_source(self.dataset, self.texts)
            usable = usable.without(of_texts.rejects)
        differing = yield from _different_columns(
            found, sizes, labels, None if weights is None else weights.values
        )
        if rejects is not None:
            lost, unknown = self._lost_again(rejects, sizes)
            bad = [*usable.rejects, *lost]
            codecs = decoder_versions(self.config)["codecs"]
            yield from reject_problems(rejects, bad, unknown, self.manifest, self.dataset, codecs)
        if undecoded is not None:
            inside = undecoded[undecoded[:, 0] < len(self.dataset)]
            known = sizes.image_hw[inside[:, 0]]
            # Images that cannot be read now have no size; they are among those that are bad.
            unlike = (known != inside[:, 1:]).any(axis=1) & known.all(axis=1)
            if unlike.any():
                examples = named("example", inside[unlike, 0].tolist())
                yield Problem(MANIFEST, f"undecoded has other sizes than the images of {examples}")
        num_flagged = yield from self._different_pixels(found, differing, sample)
        counts = {"broken_exif": num_broken}
        return counts if num_flagged is None else {**counts, "broken_profile": num_flagged}

    @cached_property
    def _source(self) -> ImageSource:
        rows = self.dataset.select_columns([self.manifest["image_column"]]).with_format("arrow")
        return ImageSource(rows, self.manifest["image_root"])

    @cached_property
    def _masks(self) -> Masks | None:
        if self.manifest.get("mask_column") is None:
            return None
        rows = self.dataset.select_columns([self.manifest["mask_column"]]).with_format("arrow")
        rules = TargetRules(**self.manifest["targets"])
        return Masks(ImageSource(rows, self.manifest["image_root"]), rules)

    def _unfit(self) -> Iterator[Problem]:
        """Yield which columns of the source cannot be what the manifest says they are."""
        features, label = self.dataset.features, self.manifest["label_column"]
        expected = {self.manifest["image_column"]: (holds_images, "images")}
        if label is not None:
            expected[label] = (holds_labels, "labels")
        if (mask := self.manifest.get("mask_column")) is not None:
            expected[mask] = (holds_images, "masks")
        if (weight := self.manifest.get("weight_column")) is not None:
            expected[weight] = (lambda feature: isinstance(feature, Value), "weights")
        for name in [] if self.texts is None else self.texts.lists:
            expected[name] = (holds_numbers, "lists of numbers")
        for name, (fits, what) in expected.items():
            if not fits(features[name]):
                yield Problem("dataset", f"has {name} of {features[name]}, expected {what}")
        for name in self.manifest.get("size_columns") or []:
            if not pa.types.is_integer(features.arrow_schema.field(name).type):
                yield Problem("dataset", f"has {name} of {features[name]}, expected integers")

    def _sizes(self) -> Sizes:
        """Return the sizes of all images: read anew, since kept ones may be what is wrong."""
        columns, most = self.manifest.get("size_columns"), self.config.max_pixels
        if columns is not None:
            return column_sizes(self.dataset, tuple(columns), max_pixels=most)
        with ThreadPoolExecutor() as executor:
            return probe_sizes(self._source, len(self.dataset), max_pixels=most, executor=executor)

    def _lost_again(self, rejects: list[Reject], sizes: Sizes) -> tuple[list[Reject], set[int]]:
        """Decode again what could not be decoded; return what still cannot, and what was not tried.

        Args:
            rejects: of the folder.
            sizes: of all images of the source.
        """
        undecodable = [
            one
            for one in rejects
            if one.stage == "decode"
            and 0 <= one.example_index < len(self.dataset)
            and sizes.image_hw[one.example_index].all()
        ]
        # Not decoded again: it might end this process, or keep it busy for ever.
        unknown = {one.example_index for one in undecodable if one.reason in ENDED}
        index = np.array(
            [one.example_index for one in undecodable if one.reason not in ENDED], np.int64
        )
        views = self.config.num_views
        view = np.tile(np.arange(views, dtype=np.int32), len(index))
        index = np.repeat(index, views)
        image_hw = sizes.image_hw[index]
        grid_hw, num_keep, _ = decide_all(image_hw, self.config, self.key, index=index, view=view)
        lens = num_keep + np.int32(self.config.prefix_tokens)
        segments = {"seq_lens": lens, "grid_hw": grid_hw, "image_hw": image_hw}
        segments |= {"example_index": index, "view": view}
        segments = with_boxes(segments, self.config, self.key)
        alone = Rows(np.arange(len(index) + 1), segments)
        tokens = planned_tokens(alone, self.config, self.key)
        tasks = row_tasks(alone, tokens, self._source, self._masks)
        out = np.empty((self.config.seq_len, self.config.patch_bytes), np.uint8)
        lost = []
        for (task,) in tasks:
            failure = _outcome_of(task, out, self.config, self._masks)[0]
            if isinstance(failure, Failure):
                lost.append(Reject(task.example, "decode", *failure))
        # An image is lost if one of its views is; the first is told.
        return one_each(lost), unknown

    def _different_pixels(
        self, found: FoundRows, differing: NDArray[np.bool_], sample: int | None
    ) -> Generator[Problem, None, int | None]:
        """Decode some images again, and yield how they differ from their tokens.

        Encoded images are compared with those of the source as they are. Returns how many images
        have a broken colour profile; None unless all were decoded by it.

        Args:
            found: the rows.
            differing: bool[segments], those with another size than the source's.
            sample: how many; None for all.
        """
        if not self.manifest["materialized"]:
            return None
        held, num_flagged, num_compared = found.held(), 0, 0
        offsets = held.offsets
        total = int(offsets[-1])
        number = total if sample is None else min(sample, total)
        # A fixed seed, so that a second call looks at the same images; sorted, so that files are
        # read from front to back.
        chosen = np.random.default_rng(0).choice(total, number, replace=False)
        for at in np.sort(chosen[~differing[chosen]]).tolist():
            pack = int(np.searchsorted(offsets, at, side="right")) - 1
            # The grid of a broken row may be anything, and ask for more memory than there is.
            if pack in found.broken:
                continue
            name, stored, row = found.places[pack]
            number = at - int(offsets[pack])
            packed = stored.slice(row, 1)
            if self.manifest.get("store") == ENCODED:
                what = _encoded_difference(packed, number, self._source)
            else:
                what, is_flagged = _pixel_difference(
                    packed, number, self._source, self.config, self._masks
                )
                # Of several views the first is counted.
                num_flagged += is_flagged and int(np.broadcast_to(held.views, total)[at]) == 0
                num_compared += 1
            if what is not None:
                example = held.example_index[at]
                where = f"{name}, row {row}, segment {number + 1} (example {example})"
                yield Problem(where, what)
        is_known = num_compared == total and self.config.profiles != "ignore"
        return num_flagged if is_known else None


def _label_type(found: FoundRows) -> pa.DataType | None:
    """Return the type of the stored labels, None if there are none."""
    for kinds in found.schemas.values():
        if "labels" in kinds.names:
            return kinds.field("labels").type.value_type
    return None


def _different_columns(
    found: FoundRows,
    sizes: Sizes,
    labels: pa.Array | None,
    weight: NDArray[np.float32] | None = None,
) -> Generator[Problem, None, NDArray[np.bool_]]:
    """Yield which rows have other sizes or labels than the source.

    Returns:
        bool[segments], those of other sizes, of unreadable images, or of no example of the source.
    """
    num_examples, parts = len(sizes.image_hw), [np.empty(0, np.bool_)]
    for _, _, _, part, first in found.batches():
        example = part.example_index
        inside = (example >= 0) & (example < num_examples)  # others are in the totals
        known, at = example[inside], np.flatnonzero(inside)
        unlike = np.ones(len(example), np.bool_)
        unlike[at] = (part.image_hw[at] != sizes.image_hw[known]).any(axis=1)
        parts.append(unlike)
        # Images that cannot be read now have no size; they are among those that are bad.
        unsized = ~sizes.image_hw[known].all(axis=1)
        columns = [("image_hw", part.image_hw[at], sizes.image_hw[known], ~unlike[at] | unsized)]
        stored = part.segments.get("labels")
        if labels is not None and stored is not None:
            ours, theirs = stored.take(pa.array(at)), labels.take(pa.array(known))
            columns.append(("labels", ours, theirs, same_values(ours, theirs)))
        if weight is not None and "weight" in part.segments:
            ours, theirs = part.weight[at], weight[known]
            columns.append(("weight", ours, theirs, same_numbers(ours, theirs)))
        for name, ours, theirs, same in columns:
            if same.all():
                continue
            bad = np.zeros(len(example), np.bool_)
            bad[at[~same]] = True
            one = int(np.flatnonzero(~same)[0])
            shown = f"{_plain(ours[one])}, expected {_plain(theirs[one])}"
            what = f"{name} are not those of the source (example {known[one]}: {shown})"
            for where, _ in found.named(first + np.flatnonzero(rows_with(part, bad))):
                yield Problem(where, what)
    return np.concatenate(parts)


def _plain(value: Any) -> Any:
    """Return a value as Python has it."""
    if isinstance(value, pa.Scalar):
        return value.as_py()
    return tuple(value.tolist()) if value.ndim else value.item()


def _pixel_difference(
    row: pa.Table, number: int, source: ImageSource, config: PackConfig, masks: Masks | None
) -> tuple[str | None, bool]:
    """Return how the pixels of a segment differ from its image's; None if they do not.

    And whether the image's colour profile is broken.

    Args:
        row: one packed row.
        number: of the segment in it.
        source: the images.
        config: the options.
        masks: those of the images; None without any.
    """
    rows = table_rows(row)
    example, grid_hw = int(rows.example_index[number]), tuple(rows.grid_hw[number].tolist())
    start = int(rows.seq_lens[:number].sum())
    span = slice(start, start + int(rows.seq_lens[number]))
    # y · columns + x is the number of a token in raster order.
    places = rows.coords[0, span].astype(np.int32)
    kept = np.where(places[:, 0] < 0, ~places[:, 1], places @ np.array([grid_hw[1], 1], np.int32))
    size = tuple(rows.image_hw[number].tolist())
    box = tuple(rows.box[number].tolist()) if "box" in rows.segments else None
    found = rows.patches[0, span]
    expected = np.empty_like(found)
    mask = None if masks is None else partial(masks.read, example)
    task = ImageTask(example, partial(source, example), size, grid_hw, kept, box, mask=mask)
    outcome, targets = _outcome_of(task, expected, config, masks)
    if isinstance(outcome, Failure):
        return f"its image cannot be decoded again: {outcome.exception}", False
    is_flagged = outcome == "broken profile"
    if targets is not None and (other := np.count_nonzero(rows.targets[0, span] != targets)):
        return f"{other:,} of {targets.size:,} targets differ from the mask's", is_flagged
    # int16, since a difference of two uint8 would wrap around.
    apart = np.abs(found.astype(np.int16) - expected)
    if not apart.any():
        return None, is_flagged
    what = (
        f"{np.count_nonzero(apart):,} of {apart.size:,} pixel values differ from the image's, "
        f"by {apart.max()} at most"
    )
    return what, is_flagged


def _encoded_difference(row: pa.Table, number: int, source: ImageSource) -> str | None:
    """Return how a segment's encoded image differs from its source's; None if it does not.

    Args:
        row: one row of encoded images.
        number: of the segment in it.
        source: the images.
    """
    (found,) = encoded_in(row, number)
    try:
        expected = content_of(source(found.example))
    except BadImage as error:
        return f"its image cannot be read again: {error.exception}"
    # One that is damaged was named before. As bytes: Arrow's are signed ones, unlike others.
    if found.image is None or bytes(found.image) == bytes(expected):
        return None
    return f"its {len(found.image):,} bytes are not the {len(expected):,} of its image"


def _outcome_of(
    task: ImageTask, out: NDArray[np.uint8], config: PackConfig, masks: Masks | None
) -> tuple[Outcome, NDArray[np.integer] | None]:
    """Decode an image, and return what came of it, and its targets, if it has any."""
    targets, rules = None, None
    how = pixel_rules(config)  # raises if it needs a package that is not here
    if masks is not None:
        rules = masks.rules
        targets = np.empty((len(out), rules.cells(config.patch_size)), rules.dtype)
    try:
        with _silent():
            (outcome,) = fill_row([task], out, how, None, targets, rules)
    except ValueError as error:  # its pixels have another size than its header or column
        return Failure("unreadable", str(error)), None
    return outcome, None if isinstance(outcome, Failure) else targets


@contextmanager
def _silent() -> Iterator[None]:
    """Keep off the screen what C libraries print: libtiff's complaints are problems here."""
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        os.close(nowhere)
