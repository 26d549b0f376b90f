"""What is drawn for one image in some epochs, to look at: its crop, size, tokens, flips, colours.

Everything is made by what fills batches: the decisions of the plan, the rows, the augmentation. Two
options that look at more than one image, ``fit_last`` and a drop rate that changes over an epoch,
show what they would be for the image alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.augmenting.augment import Augment
from packpipe.augmenting.colours import coloured
from packpipe.augmenting.rows import augmented
from packpipe.images.decode import decode, probe
from packpipe.images.patches import unpatchify
from packpipe.images.rules import pixel_rules
from packpipe.loading.columns import batch_columns
from packpipe.loading.read import read_rows
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key
from packpipe.planning.decisions import decide
from packpipe.planning.image_config import PackConfig
from packpipe.rows.fill_images import fill_rows, with_boxes
from packpipe.rows.rejects import bad_example
from packpipe.rows.rows import Rows
from packpipe.sources.image_source import ImageSource

DROPPED = 222  # the level, a light grey, of tokens that are not kept
_LONGEST = 256  # pixels of the longer side of the whole image


class Draw(NamedTuple):
    """One image as a loader's batch shows it in an epoch.

    Attributes:
        epoch: the epoch.
        pixels: uint8[height, width, 3], in their colours; grey where tokens are dropped.
        grid_hw: (rows, columns) of patches, after turning.
        num_keep: tokens kept.
        box: (top, left, height, width) of the crop in pixels of the upright image, or None.
        drawn: what `Augment.draws` says.
    """

    epoch: int
    pixels: NDArray[np.uint8]
    grid_hw: tuple[int, int]
    num_keep: int
    box: tuple[int, int, int, int] | None
    drawn: dict[str, Any]

    @property
    def changes(self) -> list[str]:
        """What augmentation does to the image, in words: ``["flip", "brightness 0.85"]``."""
        nothing = Augment(flip=0).draws(0, 0, 0)
        found = {name: value for name, value in self.drawn.items() if value != nothing.get(name)}
        return [
            name if isinstance(value, bool | dict) else f"{name} {value:.3g}"
            for name, value in found.items()
        ]


def draws_of_source(
    source: ImageSource, example: int, config: PackConfig, augment: Augment, keys: list[Key]
) -> list[Draw]:
    """Return an image as `EpochPacks` and a loader draw it in some epochs.

    Args:
        source: the images.
        example: row in the source.
        config: the options of the packs.
        augment: the augmentation of the loader.
        keys: (seed, epoch) of each draw.

    Raises:
        ValueError: the image cannot be decoded.
    """
    image_hw = np.array([probe(source(example), max_pixels=config.max_pixels).image_hw], np.int32)
    index = np.array([example])
    found = []
    for key in keys:
        decided = decide(image_hw, config, key, index=index)
        segments = {
            "seq_lens": decided.num_keep + np.int32(config.prefix_tokens),
            "grid_hw": decided.grid_hw,
            "image_hw": image_hw,
            "example_index": index,
        }
        planned = Rows(np.array([0, 1]), with_boxes(segments, config, key))
        rows, rejects, _ = fill_rows(planned, source, config, key)
        for reject in rejects:
            raise ValueError(bad_example(reject))
        found.append(_draw(rows, 0, augment, key))
    return found


def draws_of_rows(packed: Any, example: int, augment: Augment, keys: list[Key]) -> list[Draw]:
    """Return an image of packed rows as a loader draws it in some epochs.

    Args:
        packed: what `pack` returned, of images.
        example: row in the source.
        augment: the augmentation of the loader.
        keys: (seed, epoch) of each draw; size, crop and tokens are those of packing in all of them.

    Raises:
        ValueError: no row holds the example.
    """
    examples = StoredPacks(packed).examples
    places = np.flatnonzero(examples.example_index == example)
    if not len(places):
        remedy = "it may be among the rejects"
        raise ValueError(checks.sentence("example", example, "one that a row holds", remedy))
    row = int(np.searchsorted(examples.offsets, places[0], side="right")) - 1
    number = int(places[0] - examples.offsets[row])
    # Read for each draw, since rows that are computed may be changed in place.
    return [_draw(read_rows(packed, [row]), number, augment, key) for key in keys]


def whole_image(source: ImageSource, example: int, config: PackConfig) -> NDArray[np.uint8]:
    """Return uint8[height, width, 3], the upright image with at most 256 pixels a side."""
    image = source(example)
    image_hw = probe(image, max_pixels=config.max_pixels).image_hw
    scale = min(1.0, _LONGEST / max(image_hw))
    height, width = (max(1, round(side * scale)) for side in image_hw)
    rules = pixel_rules(config)
    return decode(image, image_hw=image_hw, target_hw=(height, width), rules=rules).pixels


def _draw(rows: Rows, number: int, augment: Augment, key: Key) -> Draw:
    """Return a segment of the only row, by its number, as it is drawn."""
    boxes = rows.segments.get("box")
    columns = batch_columns(augmented(rows, augment, key), int(rows.num_segments.max()))
    own = columns["segment_ids"][0] == number + 1
    patches, coords = coloured(columns)[0, own], columns["coords"][0, own]
    grid: Any = tuple(columns["grid_hw"][0, number].tolist())
    there = unpatchify(np.ones_like(patches), coords, grid)
    pixels = np.where(there, unpatchify(patches, coords, grid), np.uint8(DROPPED))
    box = None if boxes is None else tuple(boxes[number].tolist())
    drawn = augment.draws(*key, int(columns["example_index"][0, number]))
    num_keep = int((coords[:, 0] >= 0).sum())
    return Draw(key.epoch, pixels, grid, num_keep, box, drawn)
