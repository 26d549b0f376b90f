"""Fills the rows of images: segments come from the plan, patches from the decoded images.

An image that cannot be decoded is left out of its row: the segments after it move up, and the
end of the row becomes padding. No other image changes its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.images.bad_images import BadImage
from packpipe.images.fill import Failure, ImageTask, Outcome, fill_row
from packpipe.images.image_data import ImageData
from packpipe.images.masks import TargetRules
from packpipe.images.rules import pixel_rules
from packpipe.images.transform import PixelFunction, transformed
from packpipe.philox import Key
from packpipe.planning.decisions import boxes
from packpipe.planning.dropping import kept_tokens
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows


class Masks(NamedTuple):
    """Where the masks of images are, and how they become targets.

    Attributes:
        read: returns the mask of a source row.
        rules: stride and dtype.
    """

    read: Callable[[int], ImageData]
    rules: TargetRules

    def padding(self, num_rows: int, config: PackConfig) -> NDArray[np.integer]:
        """Return targets of rows [num_rows, seq_len, T], all to be ignored."""
        shape = (num_rows, config.seq_len, self.rules.cells(config.patch_size))
        return np.full(shape, self.rules.ignore, self.rules.dtype)


class Filled(NamedTuple):
    """Rows with their tokens.

    Attributes:
        rows: the rows, without the images that could not be decoded.
        rejects: those images, one a view.
        flags: of the images in the rows that something is amiss with, by example: what, in a word.
            Told of an image's first view, so that it is counted once.
    """

    rows: Rows
    rejects: list[Reject]
    flags: dict[int, str]


def planned_images(
    plan: EpochPlan,
    packs: range | NDArray[np.int64],
    labels: pa.Array | None,
    weight: NDArray[np.float32] | None = None,
) -> Rows:
    """Return the segments that a plan puts into some packs: rows without tokens yet.

    Args:
        plan: the plan.
        packs: the numbers of its packs, in the order of the rows.
        labels: one value an image of the plan, in the order of its arrays, or None.
        weight: what each image counts in the loss; None without weights.
    """
    numbers = np.asarray(packs, np.int64)
    held = plan.offsets[numbers + 1] - plan.offsets[numbers]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(held)])
    # For every segment its place in plan.order, without a loop and for packs in any order.
    places = np.repeat(plan.offsets[numbers] - offsets[:-1], held) + np.arange(offsets[-1])
    members, views = plan.order[places], plan.config.num_views
    images = members if views == 1 else members // views
    segments: dict[str, Any] = {
        "seq_lens": plan.seq_lens[members],
        "grid_hw": plan.grid_hw[members],
        "image_hw": plan.image_hw[images],
        "example_index": plan.index[images],
    }
    if views > 1:
        segments["view"] = (members % views).astype(np.int32)
    if weight is not None:
        segments["weight"] = weight[images]
    if labels is not None:
        segments["labels"] = labels.take(pa.array(images))
    return Rows(offsets, with_boxes(segments, plan.config, plan.key))


def with_boxes(segments: dict[str, Any], config: PackConfig, key: Key) -> dict[str, Any]:
    """Return columns of segments, with ``box`` among them if images are cropped.

    Args:
        segments: ``image_hw``, ``example_index`` and, with several views, ``view`` among them.
        config: the options.
        key: (seed, epoch) of the plan.
    """
    # Drawn again, like kept tokens: a plan takes as much memory with crops as without.
    index, view = segments["example_index"], segments.get("view", 0)
    box = boxes(config, segments["image_hw"], key, index=index, view=view)
    return segments if box is None else {**segments, "box": box}


def fill_rows(
    planned: Rows,
    read_image: Callable[[int], ImageData],
    config: PackConfig,
    key: Key,
    transform: PixelFunction | None = None,
    masks: Masks | None = None,
) -> Filled:
    """Return planned rows with their tokens, and the images that could not be decoded.

    Args:
        planned: rows without tokens; see `planned_images`.
        read_image: returns the image of a source row (an ``example_index``).
        config: the options the plan was made with.
        key: (seed, epoch) of the plan.
        transform: called on the pixels of every image, not on its mask.
        masks: gives the rows targets.

    Raises:
        ValueError: an image's size is not the planned one; names the example and both sizes.
        RuntimeError, TypeError, ValueError: transform raised an error, or returned no such pixels.
    """
    tokens = planned_tokens(planned, config, key)
    # `fill_row` writes every byte of a row, zeros in padding, so nothing is cleared here.
    patches = np.empty((len(planned), config.seq_len, config.patch_bytes), np.uint8)
    rules, target_rules = pixel_rules(config), None if masks is None else masks.rules
    tasks = row_tasks(planned, tokens, read_image, masks)
    change = None if transform is None else partial(transformed, transform, key)
    targets = None if masks is None else masks.padding(len(planned), config)
    outcomes = [
        fill_row(
            row, out, rules, change, None if targets is None else targets[number], target_rules
        )
        for number, (row, out) in enumerate(zip(tasks, patches, strict=True))
    ]
    return filled_rows(planned, tokens, patches, outcomes, targets)


def planned_tokens(planned: Rows, config: PackConfig, key: Key) -> NDArray[np.int32]:
    """Return int32[tokens], which patches of its grid each segment keeps, segment by segment.

    Prefix tokens come first: ~k, which is below 0, for the k-th of a segment.
    """
    # Drawn again from the key and example_index instead of stored: a plan takes about 50 bytes an
    # image, whatever it keeps.
    num_keep, slots = planned.seq_lens - config.prefix_tokens, config.prefix_tokens
    kept = kept_tokens(
        key,
        index=planned.example_index,
        num_tokens=planned.grid_hw.astype(np.int64).prod(axis=1),
        num_keep=num_keep,
        view=planned.views,
    )
    if not slots:
        return kept
    firsts = np.cumsum(num_keep, dtype=np.int64) - num_keep
    prefixes = np.tile(~np.arange(slots, dtype=np.int32), len(firsts))
    return np.insert(kept, np.repeat(firsts, slots), prefixes)


def row_tasks(
    planned: Rows,
    tokens: NDArray[np.int32],
    read_image: Callable[[int], ImageData],
    masks: Masks | None = None,
) -> Iterator[list[ImageTask]]:
    """Yield the images of each row, in order, with the tokens they keep.

    Args:
        planned: rows without tokens.
        tokens: their `planned_tokens`.
        read_image: returns the image of a source row; called when the image's turn comes.
        masks: those of the images; None without any.
    """
    lens, ends = planned.seq_lens.tolist(), np.cumsum(planned.seq_lens).tolist()
    grids, sizes = planned.grid_hw.tolist(), planned.image_hw.tolist()
    examples, offsets = planned.example_index.tolist(), planned.offsets.tolist()
    boxes = planned.segments["box"].tolist() if "box" in planned.segments else None
    views = np.broadcast_to(planned.views, len(examples)).tolist()

    def task(at: int) -> ImageTask:
        rows, columns = grids[at]
        own = tokens[ends[at] - lens[at] : ends[at]]
        # None for a whole grid, which `patchify` writes in one pass.
        kept = None if len(own) == rows * columns and own[0] >= 0 else own
        # Read when its turn comes, so memory does not hold all the images of a batch.
        data = partial(_read, read_image, examples[at])
        box = None if boxes is None else tuple(boxes[at])
        size, grid = tuple(sizes[at]), (rows, columns)
        mask = None if masks is None else partial(_read, masks.read, examples[at], what="mask ")
        return ImageTask(examples[at], data, size, grid, kept, box, views[at], mask)

    for start, stop in pairwise(offsets):
        yield [task(at) for at in range(start, stop)]


def _read(
    read_image: Callable[[int], ImageData], example: int, what: str = ""
) -> ImageData | Failure:
    """Return the image or mask of a source row, or why there is none."""
    try:
        return read_image(example)
    except BadImage as error:
        return Failure(f"{what}{error.reason}", error.exception)


def filled_rows(
    planned: Rows,
    tokens: NDArray[np.int32],
    patches: NDArray[np.uint8],
    outcomes: Sequence[Sequence[Outcome]],
    targets: NDArray[np.integer] | None = None,
) -> Filled:
    """Return rows with their patches and without the images that failed, and those as rejects.

    Args:
        planned: the rows as planned.
        tokens: their `planned_tokens`.
        patches: uint8[rows, seq_len, P·P·3], as `fill_row` wrote them.
        outcomes: what `fill_row` returned, row by row.
        targets: [rows, seq_len, T], as `fill_row` wrote them; None without masks.
    """
    flat = [outcome for row in outcomes for outcome in row]
    examples, views = planned.example_index, np.broadcast_to(planned.views, len(flat))
    by_example = list(zip(examples.tolist(), views.tolist(), flat, strict=True))
    rejected = [
        Reject(example, "decode", *outcome, view)
        for example, view, outcome in by_example
        if isinstance(outcome, Failure)
    ]
    flags = {
        example: outcome
        for example, view, outcome in by_example
        if isinstance(outcome, str) and view == 0
    }
    if rejected:
        # `fill_row` has already moved up the patches; here the segments follow.
        good = np.array([not isinstance(outcome, Failure) for outcome in flat], np.bool_)
        tokens = tokens[np.repeat(good, planned.seq_lens)]
        planned = planned.keep(good)
    segment_ids, coords = token_columns(planned, tokens, patches.shape[1])
    columns: dict[str, NDArray[Any]] = {
        "patches": patches,
        "segment_ids": segment_ids,
        "coords": coords,
    }
    if targets is not None:
        columns["targets"] = targets
    return Filled(replace(planned, tokens=columns), rejected, flags)


def token_columns(
    planned: Rows, tokens: NDArray[np.int32], seq_len: int
) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
    """Return (segment_ids, coords) of the rows, derived from lengths, grids and kept tokens."""
    lens = planned.seq_lens
    before = np.cumsum(lens, dtype=np.int64) - lens
    places = np.repeat(planned.first_places(seq_len) - before, lens) + np.arange(len(tokens))
    columns = np.repeat(planned.grid_hw[:, 1], lens)

    segment_ids = np.zeros(len(planned) * seq_len, np.int32)
    segment_ids[places] = np.repeat(planned.numbers + 1, lens)
    # int16 is enough: a grid has at most 32767 patches (`MAX_IMAGE_SEQ_LEN`).
    coords = np.zeros((len(planned) * seq_len, 2), np.int16)
    coords[places, 0] = tokens // columns
    coords[places, 1] = tokens % columns
    if (tokens < 0).any():
        prefix = np.flatnonzero(tokens < 0)
        coords[places[prefix], 0] = -1
        coords[places[prefix], 1] = ~tokens[prefix]
    return segment_ids.reshape(-1, seq_len), coords.reshape(-1, seq_len, 2)
