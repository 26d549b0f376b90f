from __future__ import annotations

import csv
import math
import re
from itertools import pairwise
from pathlib import Path

import naive
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from strategies import PackingCase

from packpipe.packing import decreasing, limits
from packpipe.packing.histogram import count_lengths, plan_histogram
from packpipe.packing.packs import pack_lengths
from packpipe.packing.strategies import STRATEGIES

EXACT = [name for name in STRATEGIES if name != "nnlshp"]


def planned(case: PackingCase, strategy: str = "ffd", **options):
    counts = count_lengths(case.lengths, case.seq_len)
    return plan_histogram(
        counts, case.seq_len, strategy=strategy, max_segments=case.max_segments, **options
    )


def numbers_of(packs) -> list[int]:
    numbers = [-1] * len(packs.order)
    for number, pack in enumerate(packs):
        for example in pack:
            numbers[example] = number
    return numbers


@pytest.mark.parametrize("strategy", EXACT)
@given(case=strategies.packing_cases())
def test_a_plan_carried_out_is_what_pack_lengths_gives(strategy, case):
    plan = planned(case, strategy)
    packs = pack_lengths(
        case.lengths, case.seq_len, strategy=strategy, max_segments=case.max_segments
    )
    order, offsets = plan.expand(case.lengths)
    assert order.tolist() == packs.order.tolist()
    assert offsets.tolist() == packs.offsets.tolist()
    assert plan.pack_numbers(case.lengths).tolist() == numbers_of(packs)
    assert len(plan) == len(packs)
    assert plan.quality == packs.quality
    assert (plan.quality.fill, plan.quality.padding, plan.quality.bound, plan.quality.gap) == (
        packs.quality.fill,
        packs.quality.padding,
        packs.quality.bound,
        packs.quality.gap,
    )


@pytest.mark.parametrize("strategy", EXACT)
@given(case=strategies.packing_cases())
def test_patterns_say_what_the_packs_hold_in_pack_order(strategy, case):
    plan = planned(case, strategy)
    found = []
    for pattern in range(len(plan.patterns)):
        repeats, held = plan.patterns[pattern]
        lengths = [length for length, copies in held for _ in range(copies)]
        assert lengths == sorted(lengths, reverse=True)
        assert len({length for length, _ in held}) == len(held)
        found += [lengths] * repeats
    order, offsets = plan.expand(case.lengths)
    assert found == [
        [case.lengths[i] for i in order[start:stop]] for start, stop in pairwise(offsets)
    ]


@pytest.mark.parametrize("segment_multiple", [1, 3])
@given(case=strategies.packing_cases(), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_shards_planned_as_one_get_the_numbers_of_the_whole(segment_multiple, case, cuts):
    seq_len = case.seq_len * segment_multiple
    lengths = np.array(case.lengths) * segment_multiple - (segment_multiple - 1)
    ends = sorted(min(cut, len(lengths)) for cut in cuts)
    shards = np.split(lengths, ends)
    counts = [count_lengths(shard, seq_len) for shard in shards]
    plan = plan_histogram(
        sum(counts), seq_len, max_segments=case.max_segments, segment_multiple=segment_multiple
    )
    whole = plan.pack_numbers(lengths)
    before = np.zeros(seq_len + 1, np.int64)
    found = []
    for shard, held in zip(shards, counts, strict=True):
        found += plan.pack_numbers(shard, before=before).tolist()
        before += held
    assert found == whole.tolist()
    assert before.sum() == len(lengths)


@given(case=strategies.packing_cases(), seed=strategies.WORDS, epoch=strategies.WORDS)
def test_an_expansion_with_a_seed_is_the_redrawn_one(case, seed, epoch):
    order, _ = planned(case).expand(case.lengths, seed=seed, epoch=epoch)
    redrawn = pack_lengths(case.lengths, case.seq_len, max_segments=case.max_segments)
    assert order.tolist() == redrawn.redraw(seed=seed, epoch=epoch).order.tolist()


@pytest.mark.parametrize("block_size", [4, 5, 64])
@given(case=strategies.packing_cases(max_examples=200, max_seq_len=300))
def test_the_size_of_the_blocks_changes_nothing(block_size, case):
    counts = np.bincount(case.lengths, minlength=case.seq_len + 1)
    limit = case.max_segments or case.seq_len
    steps, groups = decreasing.first_fit_decreasing(counts, limit, block_size)
    offsets, entries = decreasing.contents(steps, groups)
    found = []
    for group, (start, stop) in enumerate(pairwise(offsets)):
        held = [length for length, copies in entries[start:stop].tolist() for _ in range(copies)]
        found += [held] * int(groups[group, 1])
    packs = naive.first_fit_decreasing(case.lengths, case.seq_len, case.max_segments)
    assert found == [[case.lengths[i] for i in pack] for pack in packs]


def test_a_table_that_is_full_is_made_larger():
    counts = np.ones(400, np.int64)
    counts[0] = 0
    steps, groups = decreasing.first_fit_decreasing(counts, 399, 4)
    small = np.empty((4, 5), np.int64), np.empty((1, 3), np.int64), np.empty((4, 3), np.int64)
    assert decreasing._first_fit_decreasing(counts, 1, 399, 4, *small) == (-1, -1)
    table, few = np.empty((4, 6), np.int64), np.empty((4, 3), np.int64)
    shelves, tree = np.full(400, -1), np.zeros(1024, np.bool_)
    assert decreasing._shelved(counts, 1, 399, 0, 0, table, few, shelves, tree) == (-1, -1)
    assert groups[:, 1].sum() == len(naive.first_fit_decreasing(list(range(1, 400)), 399))
    assert len(steps) >= 399


def test_ten_thousand_distinct_lengths_are_planned_whole():
    lengths = np.arange(1, 10_001)
    plan = plan_histogram(count_lengths(lengths, 10_000), 10_000)
    order, offsets = plan.expand(lengths)
    assert sorted(order.tolist()) == list(range(10_000))
    loads = np.diff(np.concatenate([[0], np.cumsum(lengths[order])])[offsets])
    assert loads.max() <= 10_000
    assert plan.quality.gap == 0


def test_a_plan_prints_as_a_table_and_as_a_line():
    plan = plan_histogram([0, 0, 2, 4], 8)
    assert repr(plan) == (
        "HistogramPlan(6 examples in 2 packs of 8 tokens, 1 patterns: padding 0.00%, "
        "at most 0 packs above the optimum)"
    )
    assert str(plan).splitlines()[2] == "packs     2 of 8 tokens (at least 2 needed, gap 0)"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_empty_histogram_gives_no_packs(strategy):
    plan = plan_histogram([], 8, strategy=strategy)
    assert len(plan) == 0
    assert plan.quality.fill == 1.0
    assert plan.quality.gap == 0
    order, offsets = plan.expand([])
    assert order.tolist() == []
    assert offsets.tolist() == [0]
    assert plan.pack_numbers([]).tolist() == []


def test_half_a_trillion_packs_of_one_pattern_are_planned():
    counts = np.zeros(1025, np.int64)
    counts[512] = 2**40
    plan = plan_histogram(counts, 1024)
    assert len(plan) == 2**39
    assert len(plan.patterns) == 1
    assert plan.quality.gap == 0


REMEDY = "pass examples of length 0, 1, ... 8"


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([0, -1], ValueError, "counts[1] is -1, expected 0 or more; counts only"),
        ([3, 1], ValueError, f"counts[0] is 3, expected 0, since lengths are 1..8; {REMEDY}"),
        (
            [0] * 9 + [4],
            ValueError,
            f"counts[9] is 4, expected 0, since lengths are 1..8; {REMEDY}",
        ),
        (
            [0.0, 1.0],
            TypeError,
            f"counts.dtype is 'float64', expected an integer dtype; {REMEDY}",
        ),
        ([[0, 1]], ValueError, f"counts.ndim is 2, expected 1; {REMEDY}"),
    ],
)
def test_bad_counts_are_named(counts, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        plan_histogram(counts, 8)


BUDGET = "expected seconds above 0; math.inf sets no limit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": "next_fit"},
            (
                "strategy is 'next_fit', expected one of 'ffd', 'bfd', 'spfhp', 'nnlshp', "
                "'balanced', 'optimal'; choose a packing rule for histograms"
            ),
        ),
        ({"budget_s": 0}, f"budget_s is 0, {BUDGET}"),
        ({"budget_s": float("nan")}, f"budget_s is nan, {BUDGET}"),
        (
            {"segment_multiple": 9},
            "segment_multiple is 9, expected an integer in 1..8; pass 1 for any length",
        ),
        (
            {"pack_multiple": 0},
            "pack_multiple is 0, expected an integer in 1..8; pass 1 for any length",
        ),
        (
            {"segment_multiple": 7, "pack_multiple": 5},
            (
                "segment_multiple is 7, expected 1..5 (seq_len rounded down to pack_multiple); "
                "lower it"
            ),
        ),
        (
            {"ranks": 0},
            f"ranks is 0, expected an integer in 1..{2**20}; pass 1 for any number of packs",
        ),
        (
            {"strategy": "nnlshp", "max_segments": 2},
            "max_segments is 2, expected 3 or more for 'nnlshp'; choose 'optimal'",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_histogram([0, 1], 8, **options)


@pytest.mark.parametrize("budget", ["5", True, None])
def test_a_budget_that_is_no_number_is_named(budget):
    with pytest.raises(TypeError, match=f"^{re.escape(f'budget_s is {budget!r}, {BUDGET}')}$"):
        plan_histogram([0, 1], 8, budget_s=budget)
    with pytest.raises(TypeError, match=f"^{re.escape(f'budget_s is {budget!r}, {BUDGET}')}$"):
        pack_lengths([1], 8, strategy="next_fit", budget_s=budget)


@pytest.mark.parametrize(
    "counts", [[0, 2**58], np.array([0, 2**63 + 5], np.uint64), [0, *[2**57] * 4]]
)
def test_counts_too_large_to_add_up_are_named(counts):
    total = sum(int(count) for count in counts)
    message = f"sum(counts) is {total}, expected below 2**62 / 16 (seq_len); plan fewer at once"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_histogram(counts, 16)


@pytest.mark.parametrize("before", [[0, 2**50, 0], [0, 4, 5]])
def test_more_before_than_the_plan_has_is_named(before):
    plan = plan_histogram([0, 4, 4], 8)
    with pytest.raises(ValueError, match=r"^examples of length \d is \d+, expected at most 4 "):
        plan.pack_numbers([1, 2], before=before)


def test_nnlshp_says_what_it_cannot_do():
    message = (
        "seq_len is 4096, expected at most 1024 units for 'nnlshp', which needs a dense matrix; "
        "choose 'optimal'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_histogram([0, 1], 4096, strategy="nnlshp")


def test_other_lengths_than_the_plans_are_named():
    plan = plan_histogram(count_lengths([3, 3, 2], 8), 8)
    remedy = "pass the lengths that were counted"
    message = f"examples of length 2 is 2, expected 1 (the plan's); {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan.expand([3, 2, 2])
    message = f"examples of length 3 is 2, expected at most 1 (the plan's); {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan.pack_numbers([3, 3], before=[0, 0, 0, 1])


@pytest.fixture(scope="module")
def wikipedia() -> np.ndarray:
    """The published histogram (Krell's packedBERT code, MIT)."""
    counts = np.zeros(513, np.int64)
    with (Path(__file__).parent.parent / "data" / "wikipedia512.csv").open() as file:
        for row in csv.DictReader(file):
            counts[int(row["length"])] = int(row["count"])
    assert counts.sum() == 16_279_552
    assert counts @ np.arange(513) == 4_164_796_173
    return counts


def test_wikipedia_bounds_are_the_published_ones(wikipedia):
    assert limits.sum_bound(wikipedia, 512) == 8_134_368
    assert limits.martello_toth_bound(wikipedia, 512) == 8_135_727
    assert limits.lower_bound(wikipedia, 512, 512) == 8_135_727


@pytest.mark.parametrize(("depth", "bound"), [(1, 16_279_552), (2, 8_139_776), (3, 8_135_727)])
def test_wikipedia_bound_obeys_the_limit_on_segments(wikipedia, depth, bound):
    assert limits.lower_bound(wikipedia, 512, depth) == bound


PUBLISHED = [
    (1, 16_279_552, 49.967, 16_279_552, 49.967),
    (2, 10_101_683, 80.525, 10_099_081, 80.546),
    (3, 9_094_695, 89.441, 9_090_154, 89.486),
    (4, 8_658_996, 93.941, 8_657_119, 93.962),
    (8, 8_224_673, 98.902, 8_207_569, 99.108),
    (12, 8_166_708, 99.604, 8_149_619, 99.813),
    (None, 8_166_708, 99.604, 8_138_483, 99.949),
]


@pytest.mark.parametrize(("depth", "spfhp", "spfhp_fill", "lpfhp", "lpfhp_fill"), PUBLISHED)
def test_wikipedia_is_packed_as_published(wikipedia, depth, spfhp, spfhp_fill, lpfhp, lpfhp_fill):
    roomiest = plan_histogram(wikipedia, 512, strategy="spfhp", max_segments=depth)
    assert len(roomiest) == spfhp
    assert abs(100 * roomiest.quality.fill - spfhp_fill) < 0.001
    tightest = plan_histogram(wikipedia, 512, strategy="bfd", max_segments=depth)
    assert len(tightest) == lpfhp
    assert abs(100 * tightest.quality.fill - lpfhp_fill) < 0.001
    for plan in (roomiest, tightest):
        assert plan.patterns.counts(512).tolist() == wikipedia.tolist()
        assert plan.quality.most_segments <= (depth or 512)


def test_wikipedia_in_first_fit_decreasing_is_as_close_as_best_fit(wikipedia):
    plan = plan_histogram(wikipedia, 512)
    assert len(plan) == 8_138_483
    assert plan.quality.gap == 8_138_483 - 8_135_727
    assert plan.patterns.counts(512).tolist() == wikipedia.tolist()


def test_wikipedia_at_the_optimum_is_one_above_the_proven_bound(wikipedia):
    plan = plan_histogram(wikipedia, 512, strategy="optimal", budget_s=math.inf)
    assert len(plan) <= 8_135_728
    assert plan.quality.bound == 8_135_727
    assert plan.certificate is not None
    assert plan.certificate.bound == 8_135_727
    assert plan.patterns.counts(512).tolist() == wikipedia.tolist()


@pytest.mark.parametrize("depth", [8, 12, 16, 32])
def test_balanced_fill_is_close_to_the_bound_where_decreasing_rules_are_not(depth):
    rng = np.random.default_rng(0)
    images = (rng.uniform(64, 384, 200_000) / 16) ** 2 * rng.beta(7 / 6, 7 / 6, 200_000)
    chats = rng.lognormal(np.log(400), 1.0, 200_000)
    for values, seq_len in ((images, 1024), (chats, 4096)):
        counts = count_lengths(np.clip(values, 1, seq_len).astype(np.int32), seq_len)
        balanced = plan_histogram(counts, seq_len, strategy="balanced", max_segments=depth)
        falling = plan_histogram(counts, seq_len, strategy="bfd", max_segments=depth)
        assert balanced.quality.gap <= 0.006 * balanced.quality.bound
        assert len(falling) > len(balanced)
        assert depth > 12 or falling.quality.gap > 0.08 * falling.quality.bound
