from __future__ import annotations

import csv
import re
from itertools import combinations, pairwise
from pathlib import Path

import naive
import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import PackingCase

from packpipe import bounds, rules
from packpipe.packing import STRATEGIES, Packs, pack_lengths

TWINS = {"ffd": naive.first_fit_decreasing, "next_fit": naive.next_fit}


def listed(packs: Packs) -> list[list[int]]:
    return [pack.tolist() for pack in packs]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=strategies.packing_cases())
@example(case=PackingCase([1], 1, None))
@example(case=PackingCase([1] * 60, 7, None))
@example(case=PackingCase([1] * 60, 64, 8))
@example(case=PackingCase([3, 3, 3, 2, 2, 2, 1, 1], 8, 2))
@example(case=PackingCase([5, 5, 4, 4, 3, 3, 2, 2, 1, 1], 9, 3))
@example(case=PackingCase([64] * 5 + [1] * 5, 64, 1))
def test_packs_are_the_naive_rules_pack_by_pack(strategy, case):
    found = pack_lengths(
        case.lengths, case.seq_len, strategy=strategy, max_segments=case.max_segments
    )
    assert listed(found) == TWINS[strategy](case.lengths, case.seq_len, case.max_segments)


@pytest.mark.parametrize("max_segments", [None, 1, 2, 7])
@pytest.mark.parametrize("seq_len", [100, 331])
def test_many_distinct_lengths_outgrow_the_kernels_first_buffers(seq_len, max_segments):
    lengths = np.random.default_rng(seq_len).integers(1, seq_len + 1, 1500).tolist()
    found = pack_lengths(lengths, seq_len, max_segments=max_segments)
    assert listed(found) == naive.first_fit_decreasing(lengths, seq_len, max_segments)


@pytest.mark.parametrize("block_size", [3, 4, 64])
@given(case=strategies.packing_cases(max_examples=200, max_seq_len=300))
def test_the_size_of_the_blocks_changes_nothing(block_size, case):
    limit = case.max_segments or case.seq_len
    lengths = np.array(case.lengths, np.int32)
    counts = np.bincount(lengths, minlength=case.seq_len + 1)
    rows, used, num_packs = rules.first_fit_decreasing(counts, case.seq_len, limit, block_size)
    order, offsets = rules.expand(
        lengths, counts, rows[:used], num_packs, np.empty(len(lengths), np.int32)
    )
    found = [order[a:b].tolist() for a, b in pairwise(offsets)]
    assert found == naive.first_fit_decreasing(case.lengths, case.seq_len, case.max_segments)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=strategies.packing_cases(max_examples=200, max_seq_len=300))
def test_every_example_lands_in_exactly_one_pack(strategy, case):
    packs = pack_lengths(
        case.lengths, case.seq_len, strategy=strategy, max_segments=case.max_segments
    )
    assert sorted(i for pack in listed(packs) for i in pack) == list(range(len(case.lengths)))
    assert all(sum(case.lengths[i] for i in pack) <= case.seq_len for pack in listed(packs))
    assert all(1 <= len(pack) <= (case.max_segments or case.seq_len) for pack in listed(packs))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packs_hold_several_examples_where_they_fit(strategy):
    packs = pack_lengths([2] * 12, 8, strategy=strategy, max_segments=3)
    assert [len(pack) for pack in packs] == [3, 3, 3, 3]


@given(strategies.packing_cases(limited=False, max_seq_len=200))
@example(PackingCase([3, 3, 2], 4, None))
def test_any_two_ffd_packs_overflow_together(case):
    packs = pack_lengths(case.lengths, case.seq_len)
    loads = [sum(case.lengths[i] for i in pack) for pack in packs]
    assert all(one + other > case.seq_len for one, other in combinations(loads, 2))
    assert sum(loads) == sum(case.lengths)


@given(strategies.packing_cases(max_seq_len=200))
def test_equal_lengths_keep_their_order(case):
    packs = pack_lengths(case.lengths, case.seq_len, max_segments=case.max_segments)
    place = {i: p for p, pack in enumerate(listed(packs)) for i in pack}
    for length in set(case.lengths):
        places = [place[i] for i, other in enumerate(case.lengths) if other == length]
        assert places == sorted(places)
    for pack in packs:
        found = [(-case.lengths[i], i) for i in pack]
        assert found == sorted(found)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=strategies.packing_cases(max_examples=9, max_seq_len=16))
@example(case=PackingCase([6, 6, 5, 5, 5, 4, 4, 4], 13, None))
def test_the_bound_is_never_above_the_optimum(strategy, case):
    packs = pack_lengths(
        case.lengths, case.seq_len, strategy=strategy, max_segments=case.max_segments
    )
    best = naive.optimum(case.lengths, case.seq_len, case.max_segments)
    assert 1 <= packs.bound <= best <= len(packs)
    assert packs.gap == len(packs) - packs.bound
    assert packs.gap >= 0


@pytest.fixture(scope="module")
def wikipedia() -> np.ndarray:
    counts = np.zeros(513, np.int64)
    with (Path(__file__).parent / "data" / "wikipedia512.csv").open() as file:
        for row in csv.DictReader(file):
            counts[int(row["length"])] = int(row["count"])
    assert counts.sum() == 16_279_552
    assert counts @ np.arange(513) == 4_164_796_173
    return counts


def test_wikipedia_bounds_are_the_published_ones(wikipedia):
    assert bounds.sum_bound(wikipedia, 512) == 8_134_368
    assert bounds.martello_toth_bound(wikipedia, 512) == 8_135_727
    assert bounds.lower_bound(wikipedia, 512, 512) == 8_135_727


@pytest.mark.parametrize(("depth", "bound"), [(1, 16_279_552), (2, 8_139_776), (3, 8_135_727)])
def test_wikipedia_bound_obeys_the_limit_on_segments(wikipedia, depth, bound):
    assert bounds.lower_bound(wikipedia, 512, depth) == bound


def test_wikipedia_in_first_fit_decreasing_is_close_to_the_bound(wikipedia):
    placements, used, num_packs = rules.first_fit_decreasing(wikipedia, 512, 512, 64)
    placed = np.zeros(513, np.int64)
    loads = np.zeros(num_packs, np.int64)
    for length, first, packs, per_pack in placements[:used].tolist():
        placed[length] += packs * per_pack
        loads[first : first + packs] += length * per_pack
    assert placed.tolist() == wikipedia.tolist()
    assert loads.min() > 0
    assert loads.max() <= 512
    # The published packers need 8,138,483 (best fit) and 8,166,708 (worst fit).
    assert 8_135_727 <= num_packs <= 8_140_000


def test_wikipedia_one_example_a_pack_needs_a_pack_each(wikipedia):
    assert rules.first_fit_decreasing(wikipedia, 512, 1, 64)[2] == 16_279_552


@pytest.fixture
def packs() -> Packs:
    return pack_lengths([5, 3, 4, 2, 1], 8)


def test_packs_are_a_sequence(packs):
    assert len(packs) == 2
    assert listed(packs) == [[0, 1], [2, 3, 4]]
    assert packs[0].tolist() == [0, 1]
    assert packs[-1].tolist() == [2, 3, 4]
    assert packs[np.int64(1)].tolist() == [2, 3, 4]
    assert packs.order.dtype == packs.offsets.dtype == np.int64


@pytest.mark.parametrize("pack", [2, -3])
def test_a_pack_out_of_range_is_an_index_error(packs, pack):
    with pytest.raises(IndexError):
        packs[pack]


def test_packs_say_how_full_they_are(packs):
    assert packs.num_tokens == 15
    assert packs.fill == 15 / 16
    assert packs.padding == 1 / 16
    assert packs.bound == 2
    assert packs.gap == 0
    assert repr(packs) == (
        "Packs(5 examples in 2 packs of 8 tokens: padding 6.25%, at most 0 packs above the optimum)"
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_examples_give_no_packs(strategy):
    packs = pack_lengths([], 8, strategy=strategy)
    assert len(packs) == 0
    assert listed(packs) == []
    assert packs.fill == 1.0
    assert packs.padding == 0.0
    assert packs.gap == packs.bound == 0
    assert repr(packs) == (
        "Packs(0 examples in 0 packs of 8 tokens: padding 0.00%, at most 0 packs above the optimum)"
    )


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4"]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_integer_dtype_is_accepted(dtype, strategy):
    lengths = np.array([100, 60, 40, 20, 100], dtype)
    packs = pack_lengths(lengths, 120, strategy=strategy)
    assert listed(packs) == TWINS[strategy](lengths.tolist(), 120)


def test_strided_lengths_are_accepted():
    lengths = np.array([5, 9, 3, 9, 4, 9])[::2]
    assert listed(pack_lengths(lengths, 8)) == [[0, 1], [2]]


def test_lengths_are_not_written_to():
    lengths = np.array([5, 3, 4], np.int32)
    lengths.setflags(write=False)
    assert listed(pack_lengths(lengths, 8)) == [[0, 1], [2]]


REMEDY = "raise seq_len, or shorten or reject the example"
BAD_LENGTHS = [
    ([5, 0, 3], ValueError, f"lengths[1] is 0, expected 1..8 (seq_len); {REMEDY}"),
    ([5, 3, -4], ValueError, f"lengths[2] is -4, expected 1..8 (seq_len); {REMEDY}"),
    ([9, 0], ValueError, f"lengths[0] is 9, expected 1..8 (seq_len); {REMEDY}"),
    (
        np.array([1, 2**63], np.uint64),
        ValueError,
        f"lengths[1] is {2**63}, expected 1..8 (seq_len); {REMEDY}",
    ),
    (
        np.array([2**32 + 1]),
        ValueError,
        f"lengths[0] is {2**32 + 1}, expected 1..8 (seq_len); {REMEDY}",
    ),
    (
        [1.0, 2.0],
        TypeError,
        "lengths.dtype is 'float64', expected an integer dtype; pass tokens per example",
    ),
    (
        [float("nan")],
        TypeError,
        "lengths.dtype is 'float64', expected an integer dtype; pass tokens per example",
    ),
    (
        [True, False],
        TypeError,
        "lengths.dtype is 'bool', expected an integer dtype; pass tokens per example",
    ),
    (
        None,
        TypeError,
        "lengths.dtype is 'object', expected an integer dtype; pass tokens per example",
    ),
    ([[1, 2]], ValueError, "lengths.ndim is 2, expected 1; pass tokens per example"),
    (3, ValueError, "lengths.ndim is 0, expected 1; pass tokens per example"),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("lengths", "error", "message"), BAD_LENGTHS)
def test_bad_lengths_are_named(lengths, error, message, strategy):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        pack_lengths(lengths, 8, strategy=strategy)


SEQ_LEN = f"expected an integer in 1..{2**24}; choose a shorter pack"
SEGMENTS = f"expected an integer in 1..{2**31}; raise it, or pass None for no limit"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, f"seq_len is 0, {SEQ_LEN}"),
        ({"seq_len": -8}, ValueError, f"seq_len is -8, {SEQ_LEN}"),
        ({"seq_len": 2**24 + 1}, ValueError, f"seq_len is {2**24 + 1}, {SEQ_LEN}"),
        ({"seq_len": 2**70}, ValueError, f"seq_len is {2**70}, {SEQ_LEN}"),
        ({"seq_len": True}, TypeError, f"seq_len is True, {SEQ_LEN}"),
        ({"seq_len": 8.0}, TypeError, f"seq_len is 8.0, {SEQ_LEN}"),
        ({"seq_len": None}, TypeError, f"seq_len is None, {SEQ_LEN}"),
        ({"max_segments": 0}, ValueError, f"max_segments is 0, {SEGMENTS}"),
        ({"max_segments": -1}, ValueError, f"max_segments is -1, {SEGMENTS}"),
        ({"max_segments": 2**31 + 1}, ValueError, f"max_segments is {2**31 + 1}, {SEGMENTS}"),
        ({"max_segments": "3"}, TypeError, f"max_segments is '3', {SEGMENTS}"),
        ({"max_segments": True}, TypeError, f"max_segments is True, {SEGMENTS}"),
        (
            {"strategy": "bfd"},
            ValueError,
            "strategy is 'bfd', expected one of 'ffd', 'next_fit'; choose a packing rule",
        ),
        (
            {"strategy": None},
            ValueError,
            "strategy is None, expected one of 'ffd', 'next_fit'; choose a packing rule",
        ),
    ],
)
def test_bad_limits_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        pack_lengths([1, 2], **{"seq_len": 8, **arguments})


@given(st.integers(1, 50), st.integers(1, 200))
def test_numpy_integers_are_limits_too(length, max_segments):
    found = pack_lengths([length] * 5, np.int16(50), max_segments=np.uint64(max_segments))
    assert listed(found) == naive.first_fit_decreasing([length] * 5, 50, max_segments)
