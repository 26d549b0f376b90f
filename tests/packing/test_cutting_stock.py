from __future__ import annotations

import math
from collections import Counter

import naive
import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import PackingCase

from packpipe.packing import cutting_stock, histogram
from packpipe.packing.packs import pack_lengths


def optimal(case: PackingCase, **options):
    return pack_lengths(
        case.lengths,
        case.seq_len,
        strategy="optimal",
        max_segments=case.max_segments,
        **options,
    )


@given(strategies.packing_cases(max_examples=9, max_seq_len=16))
@example(PackingCase([6, 6, 5, 5, 5, 4, 4, 4], 13, None))
@example(PackingCase([4, 4, 3, 3, 3, 3], 10, None))
def test_it_is_the_optimum_or_reports_its_gap_truly(case):
    packs = optimal(case)
    best = naive.optimum(case.lengths, case.seq_len, case.max_segments)
    assert packs.quality.bound <= best <= len(packs)
    assert len(packs) - best <= packs.quality.gap


@given(strategies.packing_cases(max_examples=60, max_seq_len=40))
def test_it_is_never_worse_than_the_classical_rules(case):
    packs = optimal(case)
    for strategy in ("ffd", "bfd", "spfhp"):
        other = pack_lengths(
            case.lengths, case.seq_len, strategy=strategy, max_segments=case.max_segments
        )
        assert len(packs) <= len(other)
        assert packs.quality.bound >= other.quality.bound


@given(strategies.packing_cases(max_examples=40, max_seq_len=14))
@example(PackingCase([7, 6, 6, 5, 5, 4, 4, 4, 3, 3, 3, 2], 13, None))
@example(PackingCase([6] * 3 + [5] * 5 + [4] * 7, 14, 2))
def test_the_certificate_is_a_proof(case):
    plan = histogram.plan_histogram(
        histogram.count_lengths(case.lengths, case.seq_len),
        case.seq_len,
        strategy="optimal",
        max_segments=case.max_segments,
        budget_s=math.inf,
    )
    proof = plan.certificate
    if proof is None:  # the simple bound was met at once
        assert plan.quality.gap == 0
        return
    prices = {length: int(proof.prices[length]) for length in set(case.lengths)}
    assert min(prices.values()) >= 0
    # No pack that may be made is worth more, so these prices prove the bound.
    assert naive.most_worth(prices, case.seq_len, case.max_segments) <= proof.pack_worth
    worth = sum(prices[length] for length in case.lengths)
    assert proof.bound == -(-worth // proof.pack_worth)
    assert proof.bound <= plan.quality.bound <= len(plan)


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@given(
    prices=st.dictionaries(st.integers(1, 14), st.integers(0, 2**42), min_size=1, max_size=6),
    seq_len=st.integers(14, 20),
)
def test_the_knapsack_kernel_finds_the_pack_worth_most(limit, prices, seq_len):
    lengths = np.array(sorted(prices))
    rows = 1 if limit is None else limit + 1
    worth = np.zeros((rows, seq_len + 1), np.int64)
    last = np.full(worth.shape, -1, np.int32)
    cutting_stock.most_worth(lengths, np.array([prices[n] for n in lengths]), worth, last)
    for room in range(seq_len + 1):
        fitting = {length: price for length, price in prices.items() if length <= room}
        best = naive.most_worth(fitting, room, limit) if fitting else 0
        assert worth[-1, room] == best


def test_there_is_a_proof_where_the_simple_bound_is_not_met():
    lengths = np.random.default_rng(0).integers(150, 400, 2000)
    packs = pack_lengths(lengths, 1000, strategy="optimal", budget_s=math.inf)
    assert packs.plan is not None
    proof = packs.plan.certificate
    assert proof is not None
    assert proof.bound <= packs.quality.bound
    worth = int(proof.prices[lengths].astype(object).sum())
    assert proof.bound == -(-worth // proof.pack_worth)
    assert proof.relaxation >= proof.bound - 1


def test_tables_beyond_memory_are_not_begun():
    counts = np.zeros(131_073, np.int64)
    counts[[1, 43_691, 65_535]] = 30, 35, 35
    plan = histogram.plan_histogram(counts, 131_072, strategy="optimal", max_segments=2)
    assert plan.quality.gap >= 0
    counts[1] = 10_000
    plan = histogram.plan_histogram(counts, 131_072, strategy="optimal", max_segments=2000)
    assert plan.certificate is None


def test_it_closes_a_gap_that_first_fit_leaves():
    lengths = [51, 27, 26, 23, 51, 27, 26, 23] * 50 + [49, 24] * 60
    counts = Counter(lengths)
    first = pack_lengths(lengths, 100)
    best = pack_lengths(lengths, 100, strategy="optimal", budget_s=math.inf)
    assert len(best) < len(first)
    assert best.quality.gap == 0
    assert Counter(lengths[i] for pack in best for i in pack) == counts


def test_a_budget_that_is_over_at_once_gives_the_best_classical_plan():
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 350, 5000)
    packs = pack_lengths(lengths, 1000, strategy="optimal", budget_s=1e-9)
    others = [pack_lengths(lengths, 1000, strategy=name) for name in ("ffd", "bfd", "spfhp")]
    assert len(packs) == min(map(len, others))
    assert packs.plan is not None
    assert packs.plan.certificate is None
    assert packs.quality.gap > 0


def test_a_search_that_ends_in_time_gives_the_same_plan_again():
    lengths = np.random.default_rng(1).integers(30, 90, 3000)
    first, second = (
        pack_lengths(lengths, 200, strategy="optimal", budget_s=math.inf) for _ in range(2)
    )
    assert first.order.tolist() == second.order.tolist()
    assert first.plan is not None
    assert first.plan.certificate is not None
    assert first.plan.certificate.seconds > 0
