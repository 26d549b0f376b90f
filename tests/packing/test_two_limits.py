from __future__ import annotations

import re
from typing import NamedTuple

import naive
import naive_streams
import numpy as np
import pyarrow as pa
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import PackingCase

from packpipe.packing.packs import Packs, pack_lengths
from packpipe.packing.two_limits import STRATEGIES

HUGE = 2**62


class TwoLimits(NamedTuple):
    lengths: list[int]
    costs: list[int]
    seq_len: int
    limit: int
    max_segments: int | None

    def packs(self, strategy: str) -> Packs:
        return pack_lengths(
            self.lengths,
            self.seq_len,
            strategy=strategy,
            max_segments=self.max_segments,
            also=(self.costs, self.limit),
        )

    def twin(self, strategy: str) -> list[list[int]]:
        return naive_streams.two_limits(
            self.lengths, self.costs, self.seq_len, self.limit, strategy, self.max_segments
        )


@st.composite
def two_limit_cases(draw: st.DrawFn, max_examples: int = 60, max_limit: int = 40) -> TwoLimits:
    """Lengths and costs of few or many distinct values, none and all of the limit among them."""
    case = draw(strategies.packing_cases(max_examples=max_examples))
    limit = draw(st.integers(1, max_limit))
    few = draw(st.lists(st.integers(0, limit), min_size=1, max_size=4))
    one = st.sampled_from(few) if draw(st.booleans()) else st.integers(0, limit)
    num_examples = len(case.lengths)
    costs = draw(st.lists(one, min_size=num_examples, max_size=num_examples))
    return TwoLimits(case.lengths, costs, case.seq_len, limit, case.max_segments)


def listed(packs: Packs) -> list[list[int]]:
    return [pack.tolist() for pack in packs]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=two_limit_cases())
@example(case=TwoLimits([1] * 60, [0] * 60, 7, 1, None))
@example(case=TwoLimits([1] * 60, [3] * 60, 64, 7, 2))
@example(case=TwoLimits([6, 6, 3, 3, 2, 2, 2], [1, 3, 0, 4, 4, 1, 2], 8, 5, None))
def test_packs_are_the_naive_rules_pack_by_pack(strategy, case):
    assert listed(case.packs(strategy)) == case.twin(strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("max_segments", [None, 2])
@pytest.mark.parametrize("seq_len", [20, 100])
def test_many_packs_outgrow_the_kernels_first_buffers(strategy, max_segments, seq_len):
    rng = np.random.default_rng(seq_len)
    # One of the long in each pack, and short ones to fill the first packs after buffers grew.
    long, short = rng.integers(seq_len // 2 + 1, seq_len, 2100), rng.integers(1, 6, 1200)
    costs = [*rng.integers(0, 1001, 2100).tolist(), *rng.integers(0, 201, 1200).tolist()]
    case = TwoLimits([*long.tolist(), *short.tolist()], costs, seq_len, 1000, max_segments)
    packs = case.packs(strategy)
    assert len(packs) > 2048  # buffers for 1024 grow twice
    assert listed(packs) == case.twin(strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=two_limit_cases(max_limit=HUGE))
@example(case=TwoLimits([1, 3, 2, 4], [HUGE // 2, 1, HUGE, HUGE // 2], 8, HUGE, None))
@example(case=TwoLimits([64, 1, 1], [0, 2**56, 2**56 - 1], 64, 2**56, None))
def test_costs_near_the_largest_integers_do_not_overflow_the_order_or_the_packs(strategy, case):
    assert listed(case.packs(strategy)) == case.twin(strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=two_limit_cases(max_examples=200))
def test_every_example_lands_in_exactly_one_pack_within_both_limits(strategy, case):
    packs = listed(case.packs(strategy))
    assert sorted(i for pack in packs for i in pack) == list(range(len(case.lengths)))
    assert all(sum(case.lengths[i] for i in pack) <= case.seq_len for pack in packs)
    assert all(sum(case.costs[i] for i in pack) <= case.limit for pack in packs)
    assert all(1 <= len(pack) <= (case.max_segments or case.seq_len) for pack in packs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("cost", "held"), [(0, 4), (1, 4), (2, 3), (3, 2), (4, 1)])
def test_packs_hold_as_many_examples_as_either_limit_allows(strategy, cost, held):
    packs = pack_lengths([2] * 12, 8, strategy=strategy, also=([cost] * 12, 6))
    assert [len(pack) for pack in packs] == [held] * (12 // held)


def test_bfd_takes_the_least_room_then_the_most_left_then_the_first_opened():
    # Examples 0 to 3 open a pack each and leave (tokens, cost) of (2, 5), (2, 7), (2, 7), (1, 9).
    lengths, costs = [18, 18, 18, 19, 1, 1, 1, 1], [15, 13, 13, 11, 7, 6, 6, 3]
    packs = pack_lengths(lengths, 20, strategy="bfd", also=(costs, 20))
    assert listed(packs) == [[3, 4], [0, 7], [1, 5], [2, 6]]


@given(strategies.packing_cases(limited=True, max_seq_len=200))
@example(PackingCase([3, 3, 3, 2, 2, 2, 1, 1], 8, 2))
def test_ffd_with_costs_of_one_is_ffd_with_a_limit_on_segments(case):
    ones = [1] * len(case.lengths)
    packs = pack_lengths(case.lengths, case.seq_len, also=(ones, case.max_segments))
    limited = pack_lengths(case.lengths, case.seq_len, max_segments=case.max_segments)
    assert listed(packs) == listed(limited)
    assert packs.order.dtype == limited.order.dtype
    assert packs.quality.num_tokens == limited.quality.num_tokens > 0
    assert packs.quality.most_segments == limited.quality.most_segments


@given(strategies.packing_cases(max_seq_len=200))
def test_ffd_with_costs_of_zero_is_ffd(case):
    packs = pack_lengths(
        case.lengths,
        case.seq_len,
        max_segments=case.max_segments,
        also=([0] * len(case.lengths), 1),
    )
    twin = naive.first_fit_decreasing(case.lengths, case.seq_len, case.max_segments)
    assert listed(packs) == twin
    assert packs.also_fill == packs.harmonic_fill == 0.0


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=two_limit_cases())
def test_also_fill_is_the_share_used_of_the_second_limit(strategy, case):
    packs = case.packs(strategy)
    assert packs.also_fill == sum(case.costs) / (len(packs) * case.limit)
    assert packs.quality.fill == sum(case.lengths) / (len(packs) * case.seq_len)
    both = packs.quality.fill + packs.also_fill
    assert packs.harmonic_fill == pytest.approx(2 * packs.quality.fill * packs.also_fill / both)
    assert 0 <= packs.also_fill <= 1


def test_a_second_limit_is_printed():
    packs = pack_lengths([5, 3, 4, 2], 8, also=([1, 2, 3, 0], 4))
    assert listed(packs) == [[2, 3], [0, 1]]
    assert (packs.quality.fill, packs.also_fill) == (14 / 16, 6 / 8)
    assert str(packs) == (
        "examples  4\n"
        "tokens    14\n"
        "packs     2 of 8 tokens (at least 2 needed, gap 0)\n"
        "padding   12.500%\n"
        "segments  2.00 a pack, 2 at most\n"
        "second    75.000% filled, harmonic mean 80.769%"
    )


def test_without_a_second_limit_there_is_no_second_fill():
    packs = pack_lengths([5, 3], 8)
    assert packs.also_fill is None
    assert packs.harmonic_fill is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_examples_give_no_packs(strategy):
    packs = pack_lengths([], 8, strategy=strategy, also=([], 4))
    assert listed(packs) == []
    assert packs.also_fill == packs.harmonic_fill == packs.quality.fill == 1.0
    assert packs.quality.bound == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=two_limit_cases())
def test_the_bound_knows_both_limits(strategy, case):
    packs = case.packs(strategy)
    assert -(-sum(case.costs) // case.limit) <= packs.quality.bound <= len(packs)
    alone = pack_lengths(case.lengths, case.seq_len, max_segments=case.max_segments)
    assert packs.quality.bound >= alone.quality.bound >= 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=two_limit_cases(max_examples=7))
@example(case=TwoLimits([6, 6, 3, 3, 2, 2, 2], [1, 3, 0, 4, 4, 1, 2], 8, 5, None))
def test_the_bound_is_never_above_the_optimum(strategy, case):
    packs = case._replace(max_segments=None).packs(strategy)
    best = naive_streams.fewest_packs(case.lengths, case.costs, case.seq_len, case.limit)
    assert 1 <= packs.quality.bound <= best <= len(packs)


def test_the_sum_of_huge_costs_does_not_overflow():
    packs = pack_lengths([1, 1], 8, also=([HUGE, HUGE], HUGE))
    assert listed(packs) == [[0], [1]]
    assert packs.also_fill == 1.0
    assert packs.quality.bound == 2


@pytest.mark.parametrize("ranks", [2, 3, 5])
@given(case=two_limit_cases())
def test_packs_are_cut_to_a_multiple_of_the_ranks(ranks, case):
    packs = pack_lengths(case.lengths, case.seq_len, ranks=ranks, also=(case.costs, case.limit))
    assert len(packs) % ranks == 0
    assert sorted(packs.order.tolist()) == list(range(len(case.lengths)))
    assert all(sum(case.costs[i] for i in pack) <= case.limit for pack in listed(packs))
    assert packs.also_fill == sum(case.costs) / (len(packs) * case.limit)
    assert packs.quality.bound % ranks == 0
    assert packs.quality.gap >= 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "costs",
    [
        (1, 2, 3, 0),
        np.array([1, 2, 3, 0], np.uint8),
        np.array([1, 2, 3, 0], ">i8"),
        np.array([1, 9, 2, 9, 3, 9, 0])[::2],
        pa.array([1, 2, 3, 0], pa.uint16()),
        pa.chunked_array([[1, 2], [3, 0]]),
    ],
)
def test_costs_are_any_integers(strategy, costs):
    packs = pack_lengths([5, 3, 4, 2], 8, strategy=strategy, also=(costs, np.uint8(4)))
    assert listed(packs) == [[2, 3], [0, 1]]


COST = "pass the second cost per example"
LIMIT = f"expected an integer in 1..{HUGE}; pass what a pack may hold"
RANGE = "expected 0..4 (also[1]); raise the limit, or leave the example out"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("also", "error", "message"),
    [
        ([[1, 1], 4], TypeError, "also is 'list', expected a pair (cost, limit); pass a tuple"),
        (([1, 1],), TypeError, "also is '1 values', expected a pair (cost, limit); pass a tuple"),
        (([1, 1], 0), ValueError, f"also[1] is 0, {LIMIT}"),
        (([1, 1], HUGE + 1), ValueError, f"also[1] is {HUGE + 1}, {LIMIT}"),
        (([1, 1], 4.0), TypeError, f"also[1] is 4.0, {LIMIT}"),
        (([1, 1], True), TypeError, f"also[1] is True, {LIMIT}"),
        (
            ([1.0, 1.0], 4),
            TypeError,
            f"also[0].dtype is 'float64', expected an integer dtype; {COST}",
        ),
        (([[1], [1]], 4), ValueError, f"also[0].ndim is 2, expected 1; {COST}"),
        (([1], 4), ValueError, "len(also[0]) is 1, expected 2 (examples); one an example"),
        (([1, 1, 1], 4), ValueError, "len(also[0]) is 3, expected 2 (examples); one an example"),
        (([4, 5], 4), ValueError, f"also[0][1] is 5, {RANGE}"),
        (([-1, 5], 4), ValueError, f"also[0][0] is -1, {RANGE}"),
        ((np.array([0, 2**63], np.uint64), 4), ValueError, f"also[0][1] is {2**63}, {RANGE}"),
    ],
)
def test_a_bad_second_limit_is_named(strategy, also, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        pack_lengths([1, 2], 8, strategy=strategy, also=also)


@pytest.mark.parametrize("strategy", ["spfhp", "optimal", "next_fit", "best_fit"])
def test_other_strategies_take_no_second_limit(strategy):
    message = f"strategy is '{strategy}', expected 'ffd' or 'bfd' with also=...; choose one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack_lengths([1, 2], 8, strategy=strategy, also=([1, 1], 4))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "uint64"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_narrow_lengths_are_aligned_like_wide_ones(dtype, strategy):
    lengths = np.array([5, 3, 5, 3], dtype)
    packs = pack_lengths(
        lengths, 400, strategy=strategy, segment_multiple=200, also=([1, 1, 1, 1], 9)
    )
    assert listed(packs) == [[0, 1], [2, 3]]


def test_a_null_cost_is_named():
    message = "also[0][1] is None, expected an integer; fill or leave out nulls"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack_lengths([1, 2], 8, also=(pa.array([1, None]), 9))
