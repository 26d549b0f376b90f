"""`augmented`: packed rows of images with what was drawn for each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.augmenting.augment import Augment, Draws
from packpipe.augmenting.colours import inverted_from, matrices
from packpipe.augmenting.mixing import mixed
from packpipe.augmenting.tokens import tokens_of
from packpipe.augmenting.turning import (
    move_patches,
    turned_cells,
    turned_coords,
    turned_grids,
    ways_of,
)
from packpipe.philox import Key
from packpipe.rows.pairs import PairRows
from packpipe.rows.rows import Rows

_ERASED = 128


def refuse_tokens(of_tokens: bool) -> None:
    """Raise ValueError if rows to augment are those of token sequences."""
    if of_tokens:
        expected, remedy = "rows of images, for augment", "leave augment out"
        raise ValueError(checks.sentence("packs", "rows of tokens", expected, remedy))


def refuse_pairs(augment: Augment) -> None:
    """Raise ValueError if pairs of images and texts would be mixed: of texts there is no share."""
    if augment.mixes:
        name = "mixup" if augment.mixup else "cutmix"
        expected, remedy = "0 with pairs of images and texts", "leave mixup and cutmix out"
        raise ValueError(checks.sentence(name, getattr(augment, name), expected, remedy))


def refuse_targets(has_targets: bool) -> None:
    """Raise ValueError if images with a class for each pixel would be mixed."""
    if has_targets:
        expected, remedy = "rows without targets, for mixup and cutmix", "leave those out"
        raise ValueError(checks.sentence("packs", "rows with targets", expected, remedy))


def augmented(rows: Rows | PairRows, augment: Augment, key: Key) -> Any:
    """Return the rows as drawn for an epoch; of pairs, the images.

    Targets are moved as pixels are; those of an erased box stay, as labels do.

    Patches are moved in place where they can be written to, and in a copy where they cannot (views
    of Arrow's memory). Colours are not applied yet: segments gain ``colours``, float32[segments, 3,
    4], and ``solarize``, float32[segments], where the augmentation changes colours. Nor are
    neighbours mixed yet: `mixed` says what the rows gain where they are to be.

    Args:
        rows: in memory of their own.
        augment: what is drawn.
        key: (seed, epoch).

    Raises:
        ValueError: the rows are of token sequences, or do not say which example is which; or they
            are to be mixed, and are of pairs or have no labels.
    """
    if isinstance(rows, PairRows):
        refuse_pairs(augment)
        return rows._replace(images=augmented(rows.images, augment, key))
    refuse_tokens(rows.of_tokens)
    if (rows.example_index < 0).any():
        expected = "rows that say which example is which, for augment"
        remedy = "pack with pack, or map with with_indices=True"
        raise ValueError(checks.sentence("example_index", -1, expected, remedy))
    if augment.mixes:
        refuse_targets("targets" in rows.tokens)
    draws = augment.drawn(key, rows.example_index, rows.views)
    if augment.moves or augment.erase:
        rows = _moved(rows, augment, draws)
    if augment.mixes:
        rows = mixed(rows, augment, key)
    if not augment.colours:
        return rows
    colours: dict[str, Any] = {"colours": matrices(draws)}
    if augment.solarizes:
        colours["solarize"] = inverted_from(draws)
    return replace(rows, segments={**rows.segments, **colours})


def _moved(rows: Rows, augment: Augment, draws: Draws) -> Rows:
    """Return the rows with their pictures flipped, turned and erased."""
    shape = rows.segment_ids.shape
    starts, lens = rows.patch_places(shape[1])
    patches, coords = (
        values if values.flags.writeable and values.flags.c_contiguous else values.copy()
        for values in (rows.patches, rows.coords)
    )
    flat, places = patches.reshape(-1, patches.shape[-1]), coords.reshape(-1, 2)
    grid_hw, moved = rows.grid_hw, {"patches": patches, "coords": coords}
    if augment.moves:
        ways = ways_of(draws.flip, draws.vertical_flip, draws.turns)
        grid_hw = turned_grids(ways, grid_hw)
        real, owner = tokens_of(starts, lens)
        there = turned_coords(ways[owner], rows.grid_hw[owner], places[real])
        # Back into raster order: segment after segment, each by its number in the grid.
        order = np.lexsort((there[:, 1], there[:, 0], owner))
        sources = np.empty(len(flat), np.int64)
        sources[real] = real[order]
        places[real] = there[order]
        move_patches(flat, ways, starts, lens, sources)
        if "targets" in rows.tokens:
            moved["targets"] = rows.targets.copy()
            cells = rows.targets.reshape(len(flat), -1)
            moved["targets"].reshape(cells.shape)[real] = turned_cells(
                cells[sources[real]], ways[owner]
            )
    if augment.erase:
        # After the turns: the box lies where it was drawn in the picture as it is seen.
        flat[_erased(draws, lens, starts, grid_hw, places)] = _ERASED
    segments = {**rows.segments, "grid_hw": grid_hw}
    return replace(rows, segments=segments, tokens={**rows.tokens, **moved})


def _erased(
    draws: Draws,
    lens: NDArray[np.int64],
    starts: NDArray[np.int64],
    grid_hw: NDArray[np.int16],
    coords: NDArray[np.int16],
) -> NDArray[np.int64]:
    """Return the tokens, rows laid end to end, that lie in an erased box."""
    some = np.flatnonzero(draws.erase)
    area, aspect, *corner = draws.box[some].T
    share = np.sqrt(np.stack([area * aspect, area / aspect], 1))  # of each side
    size = np.clip(np.rint(grid_hw[some] * share), 1, grid_hw[some])
    # An image that would be grey all over stays as it is: it would have its label and nothing else.
    size *= (size < grid_hw[some]).any(1, keepdims=True)
    # Every place at which the box lies inside is as likely, the last one too.
    first = np.floor((grid_hw[some] - size + 1) * np.stack(corner, 1))
    tokens, owner = tokens_of(starts[some], lens[some])
    inside = (coords[tokens] >= first[owner]) & (coords[tokens] < (first + size)[owner])
    found: NDArray[np.int64] = tokens[inside.all(1)]
    return found
