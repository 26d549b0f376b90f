"""Slow, obvious twins: each answers as the definition reads, one item at a time.

Nothing here imports packpipe, so that agreement between the two means something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def first_fit_decreasing(
    lengths: Sequence[int], seq_len: int, max_segments: int | None = None
) -> list[list[int]]:
    """Each example, longest first and ties by position, into the first pack that has room."""
    packs: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # sorted() is stable
        for pack in packs:
            full = max_segments is not None and len(pack) == max_segments
            if not full and sum(lengths[j] for j in pack) + lengths[i] <= seq_len:
                pack.append(i)
                break
        else:
            packs.append([i])
    return packs


def next_fit(
    lengths: Sequence[int], seq_len: int, max_segments: int | None = None
) -> list[list[int]]:
    """Each example as it comes into the last pack, or into a new one."""
    packs: list[list[int]] = []
    for i, length in enumerate(lengths):
        fits = bool(packs) and sum(lengths[j] for j in packs[-1]) + length <= seq_len
        if fits and (max_segments is None or len(packs[-1]) < max_segments):
            packs[-1].append(i)
        else:
            packs.append([i])
    return packs


def martello_toth(lengths: Sequence[int], seq_len: int) -> int:
    """The bound L2 by its definition: the best over every threshold k in 0..seq_len / 2."""
    best = 0
    for k in range(seq_len // 2 + 1):
        huge = [length for length in lengths if length > seq_len - k]
        large = [length for length in lengths if seq_len / 2 < length <= seq_len - k]
        small = [length for length in lengths if k <= length <= seq_len / 2]
        spare = len(large) * seq_len - sum(large)
        more = max(0, math.ceil(Fraction(sum(small) - spare, seq_len)))
        best = max(best, len(huge) + len(large) + more)
    return best


def optimum(lengths: Sequence[int], seq_len: int, max_segments: int | None = None) -> int:
    """The fewest packs there are, by trying every assignment; for ten examples or fewer."""
    slots = len(lengths) if max_segments is None else max_segments
    best = len(lengths)

    def place(i: int, packs: list[tuple[int, int]]) -> None:
        nonlocal best
        if len(packs) >= best:
            return
        if i == len(lengths):
            best = len(packs)
            return
        for p, (used, held) in enumerate(packs):
            if used + lengths[i] <= seq_len and held < slots:
                place(i + 1, [*packs[:p], (used + lengths[i], held + 1), *packs[p + 1 :]])
        place(i + 1, [*packs, (lengths[i], 1)])

    place(0, [])
    return best


def native_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Each axis in whole patches, to the nearest, half to even, one at least."""
    rows, columns = (max(1, round(Fraction(side, patch))) for side in (height, width))
    return rows, columns


def grid_at(scale: Fraction, height: int, width: int, patch: int) -> tuple[int, int]:
    """The grid that covers an image at a scale."""
    rows, columns = (max(1, math.ceil(side * scale / patch)) for side in (height, width))
    return rows, columns


def breakpoints(height: int, width: int, patch: int, max_tokens: int) -> list[Fraction]:
    """Every scale beyond which one axis needs another patch, in rising order."""
    return sorted(
        {Fraction(k * patch, side) for side in (height, width) for k in range(1, max_tokens + 1)}
    )


def budget_grid(height: int, width: int, patch: int, max_tokens: int) -> tuple[int, int]:
    """The grid at the largest breakpoint whose grid holds at most max_tokens patches."""
    best = None
    for scale in breakpoints(height, width, patch, max_tokens):
        rows, columns = grid_at(scale, height, width, patch)
        if rows * columns <= max_tokens:
            best = rows, columns
    assert best is not None
    return best


def naflex_grid(
    height: int, width: int, patch: int, max_tokens: int, eps: float = 1e-5
) -> tuple[int, int]:
    """The published bisection for the scale in [eps / 10, 100], in floating point."""

    def side_at(scale: float, side: int) -> int:
        return max(patch, patch * math.ceil(side * scale / patch))

    low, high = eps / 10, 100.0
    while high - low >= eps:
        scale = (low + high) / 2
        tokens = (side_at(scale, height) / patch) * (side_at(scale, width) / patch)
        if tokens <= max_tokens:
            low = scale
        else:
            high = scale
    return side_at(low, height) // patch, side_at(low, width) // patch


def random_word(seed: int, epoch: int, index: int, stream: int) -> int:
    """The first word of NumPy's own Philox at (seed, epoch), (stream, index)."""
    key = np.array([seed, epoch], np.uint64)
    counter = np.array([0, stream, index, 0], np.uint64)
    return int(np.random.Philox(key=key, counter=counter).random_raw())


def seeded_order(seed: int, epoch: int, index: Sequence[int], stream: int) -> list[int]:
    """Positions of index sorted by their random words."""
    return sorted(range(len(index)), key=lambda i: random_word(seed, epoch, index[i], stream))


def plan(
    tokens: Sequence[int],
    index: Sequence[int],
    seq_len: int,
    *,
    strategy: str,
    max_segments: int,
    window: int,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """The source rows of every pack: seeded order, windows, packing rule, seeded pack order.

    Stream 0 orders examples, stream 1 packs.
    """
    rule = {"ffd": first_fit_decreasing, "next_fit": next_fit}[strategy]
    order = seeded_order(seed, epoch, index, 0)
    packs = []
    for start in range(0, len(order), window):
        some = order[start : start + window]
        for pack in rule([tokens[i] for i in some], seq_len, max_segments):
            packs.append([index[some[j]] for j in pack])
    return [packs[p] for p in seeded_order(seed, epoch, range(len(packs)), 1)]


def token_columns(
    grids: Sequence[Sequence[tuple[int, int]]], seq_len: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """(segment_ids, coords) of rows of whole grids, token by token, zeros in padding."""
    all_ids, all_coords = [], []
    for row in grids:
        ids: list[int] = []
        coords: list[list[int]] = []
        for segment, (rows, columns) in enumerate(row, start=1):
            for y in range(rows):
                for x in range(columns):
                    ids.append(segment)
                    coords.append([y, x])
        padding = seq_len - len(ids)
        all_ids.append(ids + [0] * padding)
        all_coords.append(coords + [[0, 0]] * padding)
    return all_ids, all_coords


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """uint8[tokens, patch * patch * 3], byte by byte: row, column, channel."""
    tokens = []
    for top in range(0, pixels.shape[0], patch):
        for left in range(0, pixels.shape[1], patch):
            token = []
            for y in range(patch):
                for x in range(patch):
                    for channel in range(3):
                        token.append(int(pixels[top + y, left + x, channel]))
            tokens.append(token)
    return np.array(tokens, np.uint8)


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF says stored pixels look like: where row 0 and column 0 belong, orientation 1..8."""
    return {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored, 1),
    }[orientation]
