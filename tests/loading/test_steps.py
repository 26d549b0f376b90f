"""Steps: which packs the ranks take, and rows laid together for a batch."""

from __future__ import annotations

import re
from typing import NamedTuple

import naive
import numpy as np
import packed
import pyarrow as pa
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe.loading.steps import NO_PACK, TAILS, even_places, num_steps, step_packs
from packpipe.philox import Key
from packpipe.rows.rows import Rows, gather

STEP_ORDER = 5  # the stream of random words that orders steps


class StepCase(NamedTuple):
    num_packs: int
    global_batch: int
    key: tuple[int, int]
    work: list[int] | None

    def steps(self, tail: str) -> list[list[int]]:
        seed, epoch = self.key
        work = None if self.work is None else np.array(self.work, np.int64)
        found = step_packs(self.num_packs, work, self.global_batch, tail, Key(seed, epoch))
        assert found.dtype == np.int64
        assert found.shape == (len(found), self.global_batch)
        return found.tolist()

    @property
    def order(self) -> list[int]:
        """Packs in the order they are to be taken, by the definition; all lie in one window."""
        packs = list(range(self.num_packs))
        if self.work is None:
            return packs
        by_work = sorted(packs, key=lambda pack: self.work[pack])  # sorted() is stable
        size = self.global_batch
        steps = [sorted(by_work[first : first + size]) for first in range(0, len(packs), size)]
        full = [k for k, step in enumerate(steps) if len(step) == size]
        full.sort(key=lambda k: naive.random_word(*self.key, k, STEP_ORDER))
        return [pack for step in [*(steps[k] for k in full), *steps[len(full) :]] for pack in step]


@st.composite
def step_cases(draw: st.DrawFn, *, balanced: bool | None = None) -> StepCase:
    """Epochs shorter and longer than a step, whole and not, balanced and not."""
    num_packs = draw(st.integers(1, 80))
    work = draw(st.lists(st.integers(0, 50), min_size=num_packs, max_size=num_packs))
    if balanced is None:
        balanced = draw(st.booleans())
    batch = draw(st.integers(1, min(24, num_packs)))
    return StepCase(num_packs, batch, draw(strategies.keys()), work if balanced else None)


def divisors(number: int) -> list[int]:
    return [ranks for ranks in range(1, number + 1) if number % ranks == 0]


@given(step_cases(), st.sampled_from(["drop", "pad"]))
def test_the_steps_are_the_order_cut_into_batches(case, tail):
    steps, size = case.steps(tail), case.global_batch
    whole = case.num_packs // size
    assert [pack for step in steps[:whole] for pack in step] == case.order[: whole * size]
    rest = [pack for step in steps[whole:] for pack in step if pack != NO_PACK]
    assert rest == (case.order[whole * size :] if tail == "pad" else [])


@given(step_cases())
@example(StepCase(10, 5, (0, 0), [1] * 10))
def test_pad_takes_every_pack_once_and_drop_leaves_out_less_than_a_step(case):
    kept = [pack for step in case.steps("drop") for pack in step]
    assert len(kept) == len(set(kept))
    assert set(kept) <= set(range(case.num_packs))
    assert case.num_packs - case.global_batch < len(kept) <= case.num_packs

    padded = [pack for step in case.steps("pad") for pack in step]
    assert sorted(pack for pack in padded if pack != NO_PACK) == list(range(case.num_packs))
    assert len(padded) - case.num_packs < case.global_batch


@given(step_cases())
@example(StepCase(13, 12, (0, 0), None))
@example(StepCase(7, 8, (0, 0), None))
def test_padding_is_spread_over_the_ranks_of_any_world_size(case):
    for world_size in divisors(case.global_batch):
        for step in case.steps("pad"):
            ranks = np.array(step).reshape(world_size, -1)
            packs = (ranks != NO_PACK).sum(axis=1)
            assert packs.max() - packs.min() <= 1, world_size


@given(st.integers(1, 40), st.integers(1, 40))
def test_even_places_are_different_and_rise(one, other):
    num_packs, global_batch = min(one, other), max(one, other)
    places = even_places(num_packs, global_batch).tolist()
    assert len(places) == num_packs
    assert places == sorted(set(places))
    assert 0 <= places[0] <= places[-1] < global_batch


@given(step_cases(balanced=True))
def test_work_changes_which_packs_share_a_step_and_nothing_else(case):
    plain = case._replace(work=None)
    for tail in ("drop", "pad"):
        one, other = np.array(case.steps(tail)), np.array(plain.steps(tail))
        assert ((one == NO_PACK) == (other == NO_PACK)).all()


@pytest.mark.parametrize("global_batch", [10, 12])
def test_balanced_steps_take_the_packs_of_a_window_before_those_of_the_next(global_batch):
    work = np.random.default_rng(0).integers(1, 99, 2500)
    steps = step_packs(2500, work, global_batch, "drop", Key(0, 0))
    window = -(-1024 // global_batch)
    for first in range(0, len(steps) - window, window):
        some = steps[first : first + window].reshape(-1).tolist()
        assert sorted(some) == list(range(first * global_batch, (first + window) * global_batch))
        assert some != sorted(some)
    loads = work[steps]
    assert (loads.max(axis=1) - loads.min(axis=1)).max() < 10


@given(step_cases())
@example(StepCase(12, 4, (0, 0), None))
def test_tail_error_takes_whole_steps_and_refuses_others(case):
    if case.num_packs % case.global_batch == 0:
        assert case.steps("error") == case.steps("drop") == case.steps("pad") != []
        return
    message = (
        f"num_packs is {case.num_packs}, expected a multiple of {case.global_batch} (batch_size "
        "times world_size); choose another batch size, or tail='drop' or 'pad'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        case.steps("error")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        num_steps(case.num_packs, case.global_batch, "error")


@given(step_cases(), st.sampled_from(["drop", "pad"]))
def test_num_steps_counts_the_steps(case, tail):
    assert num_steps(case.num_packs, case.global_batch, tail) == len(case.steps(tail))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("work", [None, np.empty(0, np.int64)], ids=["plain", "balanced"])
def test_no_packs_make_no_steps(tail, work):
    assert step_packs(0, work, 6, tail, Key(0, 0)).shape == (0, 6)
    assert num_steps(0, 6, tail) == 0


LABEL_TYPES = [
    pa.int64(),
    pa.uint8(),
    pa.string(),
    pa.large_string(),
    pa.float64(),
    pa.bool_(),
    pa.timestamp("us"),
    pa.decimal128(25, 2),
    None,
]


@st.composite
def row_parts(draw: st.DrawFn) -> list[Rows]:
    """Several Rows of one shape and one label type."""
    seq_len = draw(st.sampled_from([1, 3, 8]))
    label_type = draw(st.sampled_from(LABEL_TYPES))
    parts = []
    for seed in range(draw(st.integers(1, 3))):
        lens = []
        for _ in range(draw(st.integers(1, 3))):
            ends = sorted(draw(st.sets(st.integers(1, seq_len), max_size=4)))
            lens.append([b - a for a, b in zip([0, *ends], ends, strict=False)])
        case = packed.RowSet(lens, seq_len, max_segments=8, seed=seed)
        size = sum(map(len, lens))
        labels = None
        if label_type is not None:
            numbers = pa.array(range(size + 1), pa.int64())[1:]  # a slice: its offset is not zero
            labels = numbers.cast(label_type)
        index = [100 * seed + number for number in range(size)]
        parts.append(packed.rows_of(case, labels=labels, example_index=index))
    return parts


def plain_row(rows: Rows, number: int) -> dict:
    """One row as plain Python values."""
    a, b = rows.offsets[number : number + 2].tolist()
    names = ("seq_lens", "grid_hw", "image_hw", "example_index")
    labels = rows.segments.get("labels")
    return {
        **{name: getattr(rows, name)[a:b].tolist() for name in names},
        "labels": None if labels is None else labels.to_pylist()[a:b],
        "patches": rows.patches[number].tolist(),
        "segment_ids": rows.segment_ids[number].tolist(),
        "coords": rows.coords[number].tolist(),
    }


def assert_owned(rows: Rows, sources: list[Rows]) -> None:
    """Nothing of the rows is a part of another array, and all of it can be written."""
    segments = rows
    arrays = [rows.patches, rows.segment_ids, rows.coords, segments.offsets, segments.seq_lens]
    arrays += [segments.grid_hw, segments.image_hw, segments.example_index]
    for array in arrays:
        assert array.flags.writeable
        assert array.flags.c_contiguous
    for source in sources:
        for name in ("patches", "segment_ids", "coords"):
            assert not np.shares_memory(getattr(rows, name), getattr(source, name))


@given(row_parts(), st.data())
def test_gathered_rows_are_the_rows_asked_for_one_after_the_other(parts, data):
    which = st.integers(0, len(parts) - 1)
    picked = [parts[part] for part in data.draw(st.lists(which, min_size=1, max_size=5))]
    numbers = [data.draw(st.integers(0, len(part) - 1)) for part in picked]
    rows = gather(picked, numbers)
    assert len(rows) == len(picked)
    found = [plain_row(rows, number) for number in range(len(rows))]
    wanted = [plain_row(part, number) for part, number in zip(picked, numbers, strict=True)]
    assert found == wanted
    assert rows.offsets.tolist()[-1] == len(rows.seq_lens)
    dtypes = [getattr(rows, name).dtype for name in ("seq_lens", "grid_hw", "image_hw")]
    assert dtypes == [np.int32, np.int16, np.int32]
    assert [rows.patches.dtype, rows.coords.dtype] == [np.uint8, np.int16]
    if "labels" in rows.segments:
        assert rows.labels.type == parts[0].labels.type
    assert_owned(rows, parts)


@given(row_parts(), st.data())
def test_spread_rows_stand_at_their_places_and_the_others_are_empty(parts, data):
    rows = parts[0]
    size = data.draw(st.integers(len(rows), len(rows) + 4))
    places = sorted(data.draw(st.permutations(range(size)))[: len(rows)])
    found = rows.spread(np.array(places, np.int64), size)
    assert len(found) == size
    empty = {
        "seq_lens": [],
        "grid_hw": [],
        "image_hw": [],
        "example_index": [],
        "labels": None if "labels" not in rows.segments else [],
        "patches": np.zeros(rows.patches.shape[1:], int).tolist(),
        "segment_ids": np.zeros(rows.segment_ids.shape[1:], int).tolist(),
        "coords": np.zeros(rows.coords.shape[1:], int).tolist(),
    }
    wanted = [empty] * size
    for number, place in enumerate(places):
        wanted[place] = plain_row(rows, number)
    assert [plain_row(found, number) for number in range(size)] == wanted
    assert_owned(found, [rows])


def test_a_rank_without_any_pack_gets_rows_without_segments():
    segments = packed.planned(
        offsets=np.zeros(1, np.int64),
        seq_lens=np.empty(0, np.int32),
        grid_hw=np.empty((0, 2), np.int16),
        image_hw=np.empty((0, 2), np.int32),
        example_index=np.empty(0, np.int64),
        labels=pa.array([], pa.string()),
    )
    none = packed.filled(
        segments,
        patches=np.empty((0, 4, 12), np.uint8),
        segment_ids=np.empty((0, 4), np.int32),
        coords=np.empty((0, 4, 2), np.int16),
    )
    found = none.spread(np.empty(0, np.int64), 3)
    assert found.offsets.tolist() == [0, 0, 0, 0]
    assert found.patches.shape == (3, 4, 12)
    assert not found.patches.any()
    assert found.labels.type == pa.string()
