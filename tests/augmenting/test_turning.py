"""Flips and turns of tokens are those of the picture, byte for byte, with dropped tokens too."""

from __future__ import annotations

from typing import Any, NamedTuple

import naive_augment
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from packed import filled, planned

from packpipe import Augment
from packpipe.augmenting.rows import augmented
from packpipe.philox import Key
from packpipe.rows.rows import Rows

KEY = Key(3, 1)


class Picture(NamedTuple):
    """A grid, and which of its patches are kept, by their numbers in raster order."""

    grid: tuple[int, int]
    kept: list[int]


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    numbers = st.integers(0, grid[0] * grid[1] - 1)
    return Picture(grid, sorted(draw(st.sets(numbers, min_size=1))))


tables = st.lists(st.lists(pictures(), max_size=4), min_size=1, max_size=3)


def rows_of(table: list[list[Picture]], side: int, first_example: int = 0) -> Rows:
    """Rows of random pixels, with a token of padding at least."""
    rng = np.random.default_rng(0)
    seq_len = 1 + max(sum(len(one.kept) for one in row) for row in table)
    shape = (len(table), seq_len)
    patches = np.zeros((*shape, side * side * 3), np.uint8)
    segment_ids, coords = np.zeros(shape, np.int32), np.zeros((*shape, 2), np.int16)
    for number, row in enumerate(table):
        place = 0
        for segment, one in enumerate(row, 1):
            for token in one.kept:
                patches[number, place] = rng.integers(0, 256, side * side * 3)
                segment_ids[number, place] = segment
                coords[number, place] = divmod(token, one.grid[1])
                place += 1
    every = [one for row in table for one in row]
    grids = np.array([one.grid for one in every], np.int16).reshape(-1, 2)
    rows = planned(
        offsets=np.cumsum([0, *map(len, table)]),
        seq_lens=np.array([len(one.kept) for one in every], np.int32),
        grid_hw=grids,
        image_hw=(grids * side).astype(np.int32),
        example_index=first_example + np.arange(len(every)),
    )
    return filled(rows, patches=patches, segment_ids=segment_ids, coords=coords)


def bytes_of(rows: Rows) -> dict[str, bytes]:
    values = {**rows.tokens, **rows.segments}
    return {name: value.tobytes() for name, value in values.items()}


def segments_of(rows: Rows) -> list[tuple[list[Any], tuple[int, int]]]:
    """Each segment's tokens and grid."""
    found = []
    side = int((rows.patches.shape[2] // 3) ** 0.5)
    for row in range(len(rows)):
        for number in range(1, int(rows.num_segments[row]) + 1):
            own = rows.segment_ids[row] == number
            tokens = zip(rows.coords[row, own], rows.patches[row, own], strict=True)
            grid = rows.grid_hw[rows.offsets[row] + number - 1]
            shown = [(tuple(yx), patch.reshape(side, side, 3)) for yx, patch in tokens]
            found.append((shown, tuple(grid)))
    return found


@given(tables, st.integers(1, 5), st.integers(0, 2**40))
def test_every_flip_and_turn_of_tokens_is_that_of_the_picture(table, side, first_example):
    rows = rows_of(table, side, first_example)
    augment = Augment(vertical_flip=0.5, turns=True)
    wanted = []
    for (tokens, grid), example in zip(segments_of(rows), rows.example_index, strict=True):
        drawn = augment.draws(*KEY, int(example))
        way = drawn["flip"], drawn["vertical_flip"], drawn["turns"]
        wanted.append(naive_augment.turned(tokens, grid, *way))
    found = augmented(rows, augment, KEY)
    assert len(wanted) == sum(map(len, table))
    for (tokens, grid), (wanted_tokens, wanted_grid) in zip(
        segments_of(found), wanted, strict=True
    ):
        assert grid == wanted_grid
        assert [yx for yx, _ in tokens] == [yx for yx, _ in wanted_tokens]  # raster order, too
        for (_, patch), (_, wanted_patch) in zip(tokens, wanted_tokens, strict=True):
            assert np.array_equal(patch, wanted_patch)
    padding = found.segment_ids == 0
    assert padding.any()
    assert not found.patches[padding].any()
    assert not found.coords[padding].any()


def test_all_eight_ways_to_lie_occur():
    drawn = Augment(vertical_flip=0.5, turns=True).drawn(KEY, np.arange(200))
    assert len(set(zip(drawn.flip, drawn.vertical_flip, drawn.turns, strict=True))) == 16


@given(tables, st.sampled_from([{"flip": 1}, {"flip": 0, "vertical_flip": 1}]))
def test_a_flip_twice_is_nothing(table, options):
    rows = rows_of(table, 3)
    before = bytes_of(rows)
    once = augmented(rows, Augment(**options), KEY)
    if any(one.grid != (1, 1) for row in table for one in row):
        assert bytes_of(once) != before
    assert bytes_of(augmented(once, Augment(**options), KEY)) == before


@given(tables)
def test_turns_four_times_are_nothing(table):
    rows = rows_of(table, 2)
    before = bytes_of(rows)
    augment = Augment(vertical_flip=0.5, turns=True)  # each example's own turn, four times
    for _ in range(4):
        rows = augmented(rows, augment, KEY)
    assert bytes_of(rows) == before


def read_only(values: NDArray[Any]) -> NDArray[Any]:
    view = values.view()
    view.flags.writeable = False
    return view


def test_what_may_not_be_written_to_is_copied_and_the_rest_moved_in_place():
    rows = rows_of([[Picture((2, 3), [0, 1, 4]), Picture((1, 2), [0, 1])]], 2)
    before = bytes_of(rows)
    mapped = filled(rows, **{name: read_only(values) for name, values in rows.tokens.items()})
    copied = augmented(mapped, Augment(flip=1, erase=1), KEY)
    assert bytes_of(rows) == before != bytes_of(copied)
    moved = augmented(rows, Augment(flip=1, erase=1), KEY)
    assert moved.patches is rows.patches
    assert bytes_of(moved) == bytes_of(copied)


@given(tables, st.integers(0, 1000))
def test_an_erased_box_is_whole_tokens_of_the_drawn_size_and_place(table, first_example):
    rows = rows_of(table, 2, first_example)
    augment = Augment(flip=0.5, turns=True, erase=0.7)
    flipped = augmented(rows_of(table, 2, first_example), Augment(turns=True), KEY)
    found = augmented(rows, augment, KEY)
    cases = zip(segments_of(flipped), segments_of(found), rows.example_index, strict=True)
    for (before, grid), (after, _), example in cases:
        box = augment.draws(*KEY, int(example))["erase"]
        inside = set()
        if box is not None:
            assert 0.02 <= box["area"] < 0.4
            sides = (box["area"] * box["aspect"]) ** 0.5, (box["area"] / box["aspect"]) ** 0.5
            size = [min(max(round(n * side), 1), n) for n, side in zip(grid, sides, strict=True)]
            top, left = (
                int((n - s + 1) * share)
                for n, s, share in zip(grid, size, (box["top"], box["left"]), strict=True)
            )
            inside = {
                (y, x) for y in range(top, top + size[0]) for x in range(left, left + size[1])
            }
            assert all(y < grid[0] and x < grid[1] for y, x in inside)
            if len(inside) == grid[0] * grid[1]:  # nothing would be left of it
                inside = set()
        for (yx, old), (_, new) in zip(before, after, strict=True):
            assert np.array_equal(new, np.full_like(old, 128) if yx in inside else old)
