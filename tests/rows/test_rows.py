from __future__ import annotations

import itertools
import re

import naive
import numpy as np
import packed
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from strategies import encode, random_image

from packpipe.images.bad_images import BadImage
from packpipe.images.patches import unpatchify
from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch
from packpipe.rows.fill_images import Filled, fill_rows, planned_images
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows, gather

CONFIG = PackConfig(seq_len=24, patch_size=4)
# Whole patches, so that nothing is resized: what goes in must come out.
GRIDS = [(2, 3), (1, 1), (4, 4), (1, 7), (5, 2), (3, 3), (2, 2), (6, 1), (1, 2), (4, 5)]
PIXELS = [
    np.random.default_rng(i).integers(1, 256, (rows * 4, columns * 4, 3), np.uint8)
    for i, (rows, columns) in enumerate(GRIDS)
]
FILES = [encode(Image.fromarray(pixels), "PNG") for pixels in PIXELS]
SIZES = [pixels.shape[:2] for pixels in PIXELS]
LABELS = pa.array([f"label {i}" for i in range(10)])


def segments_of(labels=LABELS) -> Rows:
    plan = plan_epoch(SIZES, CONFIG)
    return planned_images(plan, range(len(plan)), labels)


def by_row(segments: Rows, values) -> list[list]:
    values = values.tolist()
    bounds = segments.offsets.tolist()
    return [values[a:b] for a, b in itertools.pairwise(bounds)]


def assert_rows_are_valid(rows: Rows) -> None:
    """Every column agrees with the grids, and every segment's tokens are its image."""
    segments = rows
    examples = by_row(segments, segments.example_index)
    grids = [[GRIDS[example] for example in row] for row in examples]
    ids, coords = naive.token_columns(grids, CONFIG.seq_len)
    assert rows.segment_ids.tolist() == ids
    assert rows.coords.tolist() == coords
    assert segments.seq_lens.tolist() == [h * w for row in grids for h, w in row]
    assert segments.grid_hw.tolist() == [list(grid) for row in grids for grid in row]
    assert segments.image_hw.tolist() == [list(SIZES[i]) for row in examples for i in row]
    assert segments.labels.to_pylist() == [f"label {i}" for row in examples for i in row]
    assert rows.patches.shape == (len(rows), 24, 48)
    assert rows.patches[rows.segment_ids == 0].sum() == 0
    for row, examples_of_row in enumerate(examples):
        for place, image in enumerate(examples_of_row, start=1):
            tokens = rows.segment_ids[row] == place
            found = unpatchify(rows.patches[row][tokens], rows.coords[row][tokens], GRIDS[image])
            assert (found == PIXELS[image]).all()


def test_rows_hold_every_image_at_its_place():
    rows, rejected, _ = fill_rows(segments_of(), FILES.__getitem__, CONFIG, Key(0, 0))
    assert rejected == []
    assert_rows_are_valid(rows)
    assert sorted(rows.example_index.tolist()) == list(range(10))
    assert rows.segment_ids.max() > 1, "some row must hold several images"
    assert (rows.segment_ids == 0).any(), "some row must be padded"
    dtypes = [rows.patches.dtype, rows.segment_ids.dtype, rows.coords.dtype]
    assert dtypes == [np.uint8, np.int32, np.int16]


def test_the_drawn_example_of_the_docstring():
    config = PackConfig(seq_len=6, patch_size=1)
    segments = packed.planned(
        offsets=np.array([0, 2, 3]),
        seq_lens=np.array([4, 1, 3], np.int32),
        grid_hw=np.array([[2, 2], [1, 1], [1, 3]], np.int16),
        image_hw=np.array([[2, 2], [1, 1], [1, 3]], np.int32),
        example_index=np.arange(3),
    )
    files = [encode(Image.new("L", size, 9), "PNG") for size in [(2, 2), (1, 1), (3, 1)]]
    rows, *_ = fill_rows(segments, files.__getitem__, config, Key(0, 0))
    assert rows.segment_ids.tolist() == [[1, 1, 1, 1, 2, 0], [1, 1, 1, 0, 0, 0]]
    assert rows.coords[..., 0].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert rows.coords[..., 1].tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 0, 0, 0]]
    assert rows.patches[..., 0].tolist() == [[9, 9, 9, 9, 9, 0], [9, 9, 9, 0, 0, 0]]


DROPPING = PackConfig(seq_len=16, patch_size=4, drop_rate=[0.25, 0.6])
KEY = 3, 4
DROPPED = plan_epoch(SIZES, DROPPING, seed=3, epoch=4)


def kept_rows(files=FILES) -> Filled:
    segments = planned_images(DROPPED, range(len(DROPPED)), LABELS)
    return fill_rows(segments, files.__getitem__, DROPPING, Key(3, 4))


def assert_kept_tokens_are_right(rows: Rows) -> None:
    """Token by token: segment, place in the full grid, and the full image's patch there."""
    segments = rows
    examples = by_row(segments, segments.example_index)
    for row, held in enumerate(examples):
        ids, coords, patches = [], [], []
        for number, image in enumerate(held, start=1):
            height, width = GRIDS[image]
            keep = int(DROPPED.num_keep[image])
            tokens = naive.subset(*KEY, image, 8, height * width, keep)
            ids += [number] * keep
            coords += [list(divmod(token, width)) for token in tokens]
            patches += naive.patchify(PIXELS[image], 4)[tokens].tolist()
        padding = 16 - len(ids)
        assert rows.segment_ids[row].tolist() == ids + [0] * padding
        assert rows.coords[row].tolist() == coords + [[0, 0]] * padding
        assert rows.patches[row].tolist() == patches + [[0] * 48] * padding
    flat = [image for row in examples for image in row]
    assert segments.seq_lens.tolist() == DROPPED.num_keep[flat].tolist()
    assert segments.grid_hw.tolist() == [list(GRIDS[image]) for image in flat]
    assert segments.labels.to_pylist() == [f"label {image}" for image in flat]


def test_rows_hold_the_kept_tokens_only():
    rows, rejected, _ = kept_rows()
    assert rejected == []
    assert_kept_tokens_are_right(rows)
    assert sorted(rows.example_index.tolist()) == list(range(10))
    assert rows.segment_ids.max() > 1, "some row must hold several images"
    tokens = np.array([height * width for height, width in GRIDS])
    assert (DROPPED.num_keep < tokens).any(), "some image must have lost tokens"
    assert len({len(row) for row in by_row(rows, rows.seq_lens)}) > 1


@given(st.sets(st.integers(0, 9), min_size=1))
def test_an_image_that_fails_moves_no_kept_token_of_another(failing):
    whole, *_ = kept_rows()
    files = [file[:-30] if i in failing else file for i, file in enumerate(FILES)]
    rows, rejected, _ = kept_rows(files)
    assert {reject.example_index for reject in rejected} == failing
    assert_kept_tokens_are_right(rows)
    assert by_row(rows, rows.example_index) == [
        [example for example in row if example not in failing]
        for row in by_row(whole, whole.example_index)
    ]


def test_an_image_that_was_fitted_keeps_the_tokens_of_its_new_number():
    config = PackConfig(seq_len=20, patch_size=4, drop_rate=0.5, fit_last="drop_rate", fit_limit=9)
    plan = plan_epoch([SIZES[9], SIZES[2]], config, index=[9, 2])
    (pack,) = plan
    assert pack.tolist() == [2, 9]
    assert plan.num_keep.tolist() == [12, 8]  # of 20, not 10, and of 16
    segments = planned_images(plan, range(1), None)
    rows, *_ = fill_rows(segments, FILES.__getitem__, config, Key(0, 0))
    tokens = naive.subset(0, 0, 9, 8, 20, 12)
    second = rows.segment_ids[0] == 2
    assert rows.coords[0][second].tolist() == [list(divmod(token, 5)) for token in tokens]
    patches = naive.patchify(PIXELS[9], 4)[tokens]
    assert rows.patches[0][second].tolist() == patches.tolist()


@given(st.sets(st.integers(0, 9), min_size=1))
def test_an_image_that_fails_leaves_its_row_valid_and_moves_nobody_else(failing):
    segments = segments_of()
    whole = by_row(segments, segments.example_index)
    files = [file[:-30] if i in failing else file for i, file in enumerate(FILES)]
    rows, rejected, _ = fill_rows(segments, files.__getitem__, CONFIG, Key(0, 0))
    assert_rows_are_valid(rows)
    assert max(map(len, whole)) > 1
    assert by_row(rows, rows.example_index) == [
        [example for example in row if example not in failing] for row in whole
    ]
    assert {reject.example_index for reject in rejected} == failing
    assert {(reject.stage, reject.reason) for reject in rejected} == {("decode", "undecodable")}
    assert all(reject.exception.startswith("OSError: ") for reject in rejected)


def test_a_reject_says_why():
    def read_image(example):
        if example == 4:
            raise BadImage("missing", "the image is null")
        return b"" if example == 7 else FILES[example]

    rows, rejected, _ = fill_rows(segments_of(), read_image, CONFIG, Key(0, 0))
    assert_rows_are_valid(rows)
    assert sorted(rejected) == [
        Reject(4, "decode", "missing", "BadImage: the image is null"),
        Reject(7, "decode", "empty", "BadImage: the file holds no bytes"),
    ]


def test_a_size_that_is_not_the_planned_one_names_the_example_and_both_sizes():
    files = [*FILES[:4], encode(random_image("RGB", 9, 8), "PNG"), *FILES[5:]]
    message = (
        "example 4: image_hw is (9, 8), expected (20, 8) as planned; "
        "plan again (stored rows: into another folder), the source has changed"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fill_rows(segments_of(), files.__getitem__, CONFIG, Key(0, 0))


def test_images_are_resized_to_their_grid():
    config = PackConfig(seq_len=12, patch_size=4)
    plan = plan_epoch([(50, 70)], config)
    assert plan.grid_hw.tolist() == [[3, 4]]
    segments = planned_images(plan, range(1), None)
    file = encode(Image.new("RGB", (70, 50), (1, 2, 3)), "PNG")
    rows, *_ = fill_rows(segments, lambda _: file, config, Key(0, 0))
    assert (rows.patches.reshape(-1, 3) == [1, 2, 3]).all()
    assert rows.segment_ids.tolist() == [[1] * 12]


def test_no_rows_at_all():
    plan = plan_epoch([], CONFIG)
    none = planned_images(plan, range(0), None)
    rows, rejected, _ = fill_rows(none, FILES.__getitem__, CONFIG, Key(0, 0))
    assert len(rows) == 0
    assert rows.patches.shape == (0, 24, 48)
    assert rows.segment_ids.shape == (0, 24)
    assert rows.coords.shape == (0, 24, 2)
    assert rejected == []


@pytest.mark.parametrize("cut", [1, 2])
def test_planned_segments_of_some_packs_are_a_part_of_all(cut):
    plan = plan_epoch(SIZES, CONFIG)
    assert len(plan) > cut
    whole = planned_images(plan, range(len(plan)), LABELS)
    parts = [
        planned_images(plan, range(cut), LABELS),
        planned_images(plan, range(cut, len(plan)), LABELS),
    ]
    rows = [row for part in parts for row in by_row(part, part.example_index)]
    assert rows == by_row(whole, whole.example_index) == [pack.tolist() for pack in plan]
    assert [int(part.offsets[0]) for part in parts] == [0, 0]
    labels = [label for part in parts for label in part.labels.to_pylist()]
    assert labels == whole.labels.to_pylist()


@given(st.lists(st.integers(0, len(DROPPED) - 1), max_size=8))
@example([1, 0, 0])
def test_planned_segments_of_any_packs_are_theirs_in_that_order(packs):
    found = planned_images(DROPPED, np.array(packs, np.int64), LABELS)
    assert by_row(found, found.example_index) == [DROPPED[pack].tolist() for pack in packs]
    members = [int(i) for pack in packs for i in DROPPED.packs[pack]]
    assert found.seq_lens.tolist() == DROPPED.num_keep[members].tolist()
    assert found.grid_hw.tolist() == DROPPED.grid_hw[members].tolist()
    assert found.image_hw.tolist() == DROPPED.image_hw[members].tolist()
    assert found.labels.to_pylist() == [f"label {i}" for i in found.example_index]


def row_of(rows: Rows, number: int) -> list:
    """All that one row holds."""
    segments = rows
    span = slice(*segments.offsets[number : number + 2])
    names = ("seq_lens", "grid_hw", "image_hw", "example_index")
    held = [getattr(segments, name)[span].tolist() for name in names]
    tokens = [getattr(rows, name)[number].tolist() for name in ("patches", "segment_ids", "coords")]
    return [*held, segments.labels.to_pylist()[span], *tokens]


@given(st.lists(st.integers(0, len(DROPPED) - 1), min_size=1, max_size=6))
@example([1, 0, 0])
def test_gathered_rows_are_the_ones_asked_for(numbers):
    rows, *_ = kept_rows()
    found = gather([rows] * len(numbers), numbers)
    assert [row_of(found, place) for place in range(len(found))] == [
        row_of(rows, number) for number in numbers
    ]


def test_gathered_rows_have_memory_of_their_own():
    rows, *_ = kept_rows()
    found = gather([rows, rows], [0, 1])
    before = row_of(found, 0)
    rows.patches[...] = 0
    rows.seq_lens[...] = 0
    assert row_of(found, 0) == before


@pytest.mark.parametrize("places", [[0, 2, 5], [1, 3, 4], [2, 3, 4]])
def test_spread_rows_stand_at_their_places_and_the_others_are_empty(places):
    rows, *_ = kept_rows()
    assert len(rows) >= 3
    three = gather([rows] * 3, [0, 1, 2])
    found = three.spread(np.array(places), 6)
    assert len(found) == 6
    for row in range(6):
        if row in places:
            assert row_of(found, row) == row_of(three, places.index(row))
        else:
            assert found.offsets[row] == found.offsets[row + 1]
            assert not found.patches[row].any()
            assert not found.segment_ids[row].any()
            assert not found.coords[row].any()


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["none", *LABELS.to_pylist()])[1:],
        LABELS,
    ],
    ids=["sliced", "plain"],
)
def test_labels_are_taken_by_source_row(labels):
    segments = segments_of(labels)
    assert isinstance(segments.labels, pa.Array)
    assert segments.labels.to_pylist() == [f"label {i}" for i in segments.example_index]


def test_keep_leaves_rows_where_they_are():
    segments = packed.planned(
        offsets=np.array([0, 2, 3, 3, 5]),
        seq_lens=np.array([1, 2, 3, 4, 5], np.int32),
        grid_hw=np.array([[1, n] for n in (1, 2, 3, 4, 5)], np.int16),
        image_hw=np.array([[9, n] for n in (1, 2, 3, 4, 5)], np.int32),
        example_index=np.array([10, 20, 30, 40, 50]),
        labels=pa.array(["a", "b", "c", "d", "e"]),
    )
    kept = segments.keep(np.array([False, True, False, True, True]))
    assert kept.offsets.tolist() == [0, 1, 1, 1, 3]
    assert kept.seq_lens.tolist() == [2, 4, 5]
    assert kept.grid_hw.tolist() == [[1, 2], [1, 4], [1, 5]]
    assert kept.image_hw.tolist() == [[9, 2], [9, 4], [9, 5]]
    assert kept.example_index.tolist() == [20, 40, 50]
    assert kept.labels.to_pylist() == ["b", "d", "e"]
    assert len(kept) == len(segments) == 4


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=3), max_size=4),
    st.integers(0, 2),
)
def test_kept_segments_bring_their_tokens_along(drawn, padding):
    seq_len = 9 + padding
    names = {"input_ids": (7, 0), "labels": (-100, -100)}  # what stands in padding, before and then

    def columns(some, absent):
        """Columns of rows of (tokens, ...) by plain loops; the n-th segment of all is full of n."""
        found = {name: [] for name in ("segment_ids", "position_ids", *names)}
        for row in some:
            flat = [(s, p, n) for s, (n, length) in enumerate(row, 1) for p in range(length)]
            end = [0] * (seq_len - len(flat))
            found["segment_ids"].append([s for s, _, _ in flat] + end)
            found["position_ids"].append([p for _, p, _ in flat] + end)
            for name in names:
                found[name].append([n for _, _, n in flat] + [names[name][absent]] * len(end))
        return {
            name: np.array(values, np.int32).reshape(-1, seq_len) for name, values in found.items()
        }

    numbers = itertools.count(1)
    drawn = [[(next(numbers), *segment) for segment in row] for row in drawn]
    whole = [[(n, length) for n, length, _ in row] for row in drawn]
    rows = Rows(
        np.cumsum([0, *map(len, whole)]),
        {"seq_lens": np.array([length for row in whole for _, length in row], np.int32)},
        columns(whole, 0),
    )
    found = rows.keep(np.array([kept for row in drawn for _, _, kept in row], np.bool_))
    left = [[(n, length) for n, length, kept in row if kept] for row in drawn]
    assert found.offsets.tolist() == np.cumsum([0, *map(len, left)]).tolist()
    for name, values in columns(left, 1).items():
        assert found.tokens[name].tolist() == values.tolist()
        assert found.tokens[name].dtype == np.int32
