from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from xml.etree import ElementTree

import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import PackingCase

from packpipe.packing import limits
from packpipe.packing.packs import STRATEGIES, Packs, pack_lengths

IN_ORDER = {
    "ffd": naive.first_fit_decreasing,
    "next_fit": naive.next_fit,
    "first_fit": naive.first_fit,
    "best_fit": naive.best_fit,
}
TIGHT_BELOW = {"bfd": 10_000, "spfhp": 0}
GIVEN_CASES = (
    PackingCase([1], 1, None),
    PackingCase([1] * 60, 7, None),
    PackingCase([1] * 60, 64, 8),
    PackingCase([3, 3, 3, 2, 2, 2, 1, 1], 8, 2),
    PackingCase([5, 5, 4, 4, 3, 3, 2, 2, 1, 1], 9, 3),
    PackingCase([64] * 5 + [1] * 5, 64, 1),
)


def listed(packs: Packs) -> list[list[int]]:
    return [pack.tolist() for pack in packs]


def packed(case: PackingCase, strategy: str, **options) -> Packs:
    limit = case.max_segments
    if strategy == "nnlshp" and limit is not None:
        limit = max(limit, 3)  # three a pack is what it does
    return pack_lengths(
        case.lengths, case.seq_len, strategy=strategy, max_segments=limit, **options
    )


def held(packs: Packs, lengths: list[int]) -> list[tuple[int, ...]]:
    return [tuple(lengths[i] for i in pack) for pack in listed(packs)]


@pytest.mark.parametrize("strategy", IN_ORDER)
@given(case=strategies.packing_cases() | st.sampled_from(GIVEN_CASES))
def test_packs_are_the_naive_rules_pack_by_pack(strategy, case):
    found = listed(packed(case, strategy))
    assert found == IN_ORDER[strategy](case.lengths, case.seq_len, case.max_segments)


@pytest.mark.parametrize("strategy", TIGHT_BELOW)
@given(case=strategies.packing_cases() | st.sampled_from(GIVEN_CASES))
def test_packs_are_those_of_the_published_histogram_rules(strategy, case):
    packs = held(packed(case, strategy), case.lengths)
    counts = dict(Counter(case.lengths))
    assert Counter(packs) == naive.by_room(
        counts, case.seq_len, case.max_segments, tight_below=TIGHT_BELOW[strategy]
    )
    # In order of creation: a pack is opened by its longest example.
    assert [pack[0] for pack in packs] == sorted((pack[0] for pack in packs), reverse=True)


@given(strategies.packing_cases(max_seq_len=200, max_examples=100, limited=False))
def test_bfd_is_best_fit_on_the_sorted_lengths(case):
    falling = sorted(case.lengths, reverse=True)
    wanted = naive.best_fit(falling, case.seq_len)
    loads = Counter(sum(pack) for pack in held(packed(case, "bfd"), case.lengths))
    assert loads == Counter(sum(falling[i] for i in pack) for pack in wanted)


@given(case=strategies.packing_cases() | st.sampled_from(GIVEN_CASES))
def test_balanced_packs_are_the_naive_rules(case):
    found = packed(case, "balanced")
    simple = limits.lower_bound(
        np.bincount(case.lengths, minlength=case.seq_len + 1),
        case.seq_len,
        case.max_segments or case.seq_len,
    )
    assert Counter(held(found, case.lengths)) == naive.balanced(
        case.lengths, case.seq_len, simple, case.max_segments
    )


@pytest.mark.parametrize("strategy", ["ffd", "bfd", "spfhp", "balanced", "optimal"])
@given(case=strategies.packing_cases())
def test_equal_lengths_fill_their_places_pack_by_pack_as_they_come(strategy, case):
    packs = packed(case, strategy)
    assert listed(packs) == naive.carried_out(held(packs, case.lengths), case.lengths)


@pytest.mark.parametrize("max_segments", [None, 1, 2, 7])
@pytest.mark.parametrize("seq_len", [100, 331])
def test_many_distinct_lengths_are_packed_as_by_the_naive_rule(seq_len, max_segments):
    lengths = np.random.default_rng(seq_len).integers(1, seq_len + 1, 1500).tolist()
    found = pack_lengths(lengths, seq_len, max_segments=max_segments)
    assert listed(found) == naive.first_fit_decreasing(lengths, seq_len, max_segments)


@pytest.mark.parametrize("strategy", ["first_fit", "best_fit"])
def test_thousands_of_open_packs_are_packed_as_by_the_naive_rule(strategy):
    lengths = np.random.default_rng(0).integers(40, 101, 2500).tolist()
    found = listed(pack_lengths(lengths, 100, strategy=strategy))
    assert len(found) > 1024  # where the kernels' first buffers end
    assert found == IN_ORDER[strategy](lengths, 100)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=strategies.packing_cases(max_examples=80, max_seq_len=60))
def test_every_example_lands_in_exactly_one_pack(strategy, case):
    packs = packed(case, strategy)
    assert sorted(i for pack in listed(packs) for i in pack) == list(range(len(case.lengths)))
    assert all(sum(pack) <= case.seq_len for pack in held(packs, case.lengths))
    limit = case.max_segments or case.seq_len
    if strategy == "nnlshp":
        limit = 3
    assert all(1 <= len(pack) <= limit for pack in listed(packs))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packs_hold_several_examples_where_they_fit(strategy):
    packs = pack_lengths([4, 3, 2] * 4, 10, strategy=strategy, max_segments=3)
    assert [len(pack) for pack in packs] == [3, 3, 3, 3]


@given(strategies.packing_cases(limited=False, max_seq_len=200))
@example(PackingCase([3, 3, 2], 4, None))
def test_any_two_ffd_packs_overflow_together(case):
    loads = [sum(pack) for pack in held(packed(case, "ffd"), case.lengths)]
    assert all(one + other > case.seq_len for one, other in combinations(loads, 2))
    assert sum(loads) == sum(case.lengths)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=strategies.packing_cases(max_examples=9, max_seq_len=16))
@example(case=PackingCase([6, 6, 5, 5, 5, 4, 4, 4], 13, None))
def test_the_bound_is_never_above_the_optimum(strategy, case):
    packs = packed(case, strategy)
    limit = case.max_segments
    if strategy == "nnlshp":
        limit = max(limit or 3, 3)
    best = naive.optimum(case.lengths, case.seq_len, limit)
    assert 1 <= packs.quality.bound <= len(packs)
    assert packs.quality.bound <= best or strategy == "nnlshp"
    assert best <= len(packs)
    assert packs.quality.gap == len(packs) - packs.quality.bound
    assert packs.quality.gap >= 0


ALIGNED = [name for name in STRATEGIES if name != "nnlshp"]


@pytest.mark.parametrize("strategy", ALIGNED)
@given(case=strategies.packing_cases(max_seq_len=40), data=st.data())
def test_alignment_is_counted_in_the_capacity(strategy, case, data):
    segment = data.draw(st.integers(1, case.seq_len))
    pack = data.draw(st.integers(1, case.seq_len))
    room = case.seq_len // pack * pack
    longest = room // segment * segment
    assume(longest >= 1)
    lengths = [min(length, longest) for length in case.lengths]
    found = pack_lengths(
        lengths,
        case.seq_len,
        strategy=strategy,
        max_segments=case.max_segments,
        segment_multiple=segment,
        pack_multiple=pack,
    )
    taken = [[-(-length // segment) * segment for length in pack] for pack in held(found, lengths)]
    assert all(sum(pack) <= room for pack in taken)
    # The same packs as those of the rounded lengths.
    units = [-(-length // segment) for length in lengths]
    rounded = pack_lengths(
        units, room // segment, strategy=strategy, max_segments=case.max_segments
    )
    assert listed(found) == listed(rounded)
    assert found.quality.num_tokens == sum(lengths)
    assert found.quality.bound == rounded.quality.bound


@pytest.mark.parametrize("strategy", ["ffd", "bfd", "spfhp", "next_fit", "best_fit"])
@given(case=strategies.packing_cases(), ranks=st.integers(1, 12))
@example(case=PackingCase([8, 8, 8], 8, None), ranks=4)
@example(case=PackingCase([1] * 6, 8, None), ranks=4)
def test_packs_are_cut_to_a_multiple_of_the_ranks(strategy, case, ranks):
    found = packed(case, strategy, ranks=ranks)
    assert len(found) % ranks == 0
    whole = held(packed(case, strategy), case.lengths)
    cut = naive.cut_to_multiple([list(pack) for pack in whole], ranks)
    assert [list(pack) for pack in held(found, case.lengths)] == cut
    assert sorted(i for pack in listed(found) for i in pack) == list(range(len(case.lengths)))
    assert found.quality.bound % ranks == 0
    assert found.quality.gap >= 0


@pytest.mark.parametrize("strategy", ["balanced", "optimal"])
@given(case=strategies.packing_cases(), ranks=st.integers(1, 12))
def test_packs_are_a_multiple_of_the_ranks(strategy, case, ranks):
    found = packed(case, strategy, ranks=ranks)
    assert len(found) % ranks == 0
    assert sorted(i for pack in listed(found) for i in pack) == list(range(len(case.lengths)))
    if len(case.lengths) >= len(found):
        assert min(len(pack) for pack in found) >= 1


@given(case=strategies.packing_cases(), seed=strategies.WORDS, epoch=strategies.WORDS)
def test_an_epoch_redraws_the_members_and_keeps_the_shapes(case, seed, epoch):
    packs = packed(case, "ffd")
    redrawn = packs.redraw(seed=seed, epoch=epoch)
    assert held(redrawn, case.lengths) == held(packs, case.lengths)
    stand_in = naive.redrawn(case.lengths, seed, epoch)
    assert listed(redrawn) == [[stand_in[i] for i in pack] for pack in listed(packs)]


def test_redrawing_reaches_every_member_alike():
    packs = pack_lengths([5, 5, 5, 3], 8)
    partners = Counter(int(packs.redraw(seed=1, epoch=e)[0][0]) for e in range(600))
    assert sorted(partners) == [0, 1, 2]
    assert min(partners.values()) > 150  # 200 expected, deviation 11.5


def test_a_large_redraw_is_whole_and_is_another_in_another_epoch():
    lengths = np.random.default_rng(0).integers(1, 5, 2**18 + 1000)  # two draws of random words
    packs = pack_lengths(lengths, 16)
    first, again, second = (packs.redraw(seed=3, epoch=epoch) for epoch in (0, 0, 1))
    assert np.array_equal(np.sort(first.order), np.arange(len(lengths)))
    assert np.array_equal(lengths[first.order], lengths[packs.order])
    assert np.array_equal(first.order, again.order)
    assert (first.order != second.order).mean() > 0.9
    assert (first.order != packs.order).mean() > 0.9


def test_lengths_changed_behind_the_packs_are_noticed():
    lengths = np.repeat(np.array([1, 8], np.int32), 1000)
    packs = pack_lengths(lengths, 8)
    lengths[:] = 1
    message = "examples of length 1 is 2000, expected 1000 (the plan's); pass the lengths that were"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        packs.redraw(seed=0)


@pytest.mark.parametrize("seed", [None, -1, "x"])
def test_a_bad_seed_is_named(seed):
    with pytest.raises((TypeError, ValueError), match=f"^seed is {seed!r}, expected an integer"):
        pack_lengths([], 8).redraw(seed=seed)


def test_packs_of_a_million_tiny_segments_are_a_small_picture():
    assert len(pack_lengths([1] * 100_000, 10_000)._repr_html_()) < 300_000


def test_packs_taken_as_they_come_cannot_be_redrawn():
    message = (
        "plan is None, expected a strategy that sorts by length, such as 'ffd', and no "
        "second limit; give the examples in a new order instead"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack_lengths([1, 2], 8, strategy="best_fit").redraw(seed=0)


@pytest.fixture
def packs() -> Packs:
    return pack_lengths([5, 3, 4, 2, 1], 8)


def test_packs_are_a_sequence(packs):
    assert len(packs) == 2
    assert listed(packs) == [[0, 1], [2, 3, 4]]
    assert packs[0].tolist() == [0, 1]
    assert packs[-1].tolist() == [2, 3, 4]
    assert packs[np.int64(1)].tolist() == [2, 3, 4]
    assert packs.order.dtype == np.int32
    assert packs.offsets.dtype == np.int64


def test_packs_know_their_segments_tokens_and_attention_work(packs):
    assert packs.segments_per_pack.tolist() == [2, 3]
    assert packs.tokens_per_pack.tolist() == [8, 7]
    assert packs.attention_work.tolist() == [34, 21]
    assert packs.quality.packing_factor == 2.5
    assert packs.lengths.tolist() == [5, 3, 4, 2, 1]
    assert packs.seq_len == 8
    assert packs.also_fill is None
    assert packs.harmonic_fill is None


def test_packs_print_as_a_short_table(packs):
    assert str(packs) == (
        "examples  5\n"
        "tokens    15\n"
        "packs     2 of 8 tokens (at least 2 needed, gap 0)\n"
        "padding   6.250%\n"
        "segments  2.50 a pack, 3 at most"
    )


def test_a_notebook_shows_the_table_and_a_bar_of_each_pack(packs):
    html = packs._repr_html_()
    assert html.count("<tr>") == 5
    assert "6.250%" in html
    svg = ElementTree.fromstring(html[html.index("<svg") :])  # noqa: S314 - it is our own
    bars = [rect for rect in svg.iter() if rect.tag.endswith("rect")]
    padding = [bar for bar in bars if bar.get("fill") == "#d0d0d0"]
    assert len(padding) == 2
    assert len(bars) == 2 + 5
    titles = [rect.text for rect in svg.iter() if rect.tag.endswith("title")]
    assert titles == [f"pack {p}: {n} tokens" for p, n in [(0, 5), (0, 3), (1, 4), (1, 2), (1, 1)]]
    # Proportional to tokens: the first segment of pack 0 ends where the second begins.
    starts = [float(bar.get("x")) / float(padding[0].get("width")) for bar in bars]
    assert np.allclose(starts, [0, 0, 5 / 8, 0, 0, 4 / 8, 6 / 8], atol=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_packs_are_a_picture_of_twelve(strategy):
    lengths = np.random.default_rng(0).integers(1, 65, 500)
    html = pack_lengths(lengths, 64, strategy=strategy)._repr_html_()
    assert html.count("#d0d0d0") == 12


@pytest.mark.parametrize("pack", [2, -3])
def test_a_pack_out_of_range_is_an_index_error(packs, pack):
    with pytest.raises(IndexError):
        packs[pack]


def test_packs_say_how_full_they_are(packs):
    assert packs.quality.num_tokens == 15
    assert packs.quality.fill == 15 / 16
    assert packs.quality.padding == 1 / 16
    assert packs.quality.bound == 2
    assert packs.quality.gap == 0
    assert repr(packs) == (
        "Packs(5 examples in 2 packs of 8 tokens: padding 6.25%, at most 0 packs above the optimum)"
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_examples_give_no_packs(strategy):
    packs = pack_lengths([], 8, strategy=strategy)
    assert len(packs) == 0
    assert listed(packs) == []
    assert packs.quality.fill == 1.0
    assert packs.quality.padding == 0.0
    assert packs.quality.gap == packs.quality.bound == 0
    assert repr(packs) == (
        "Packs(0 examples in 0 packs of 8 tokens: padding 0.00%, at most 0 packs above the optimum)"
    )


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4"]
)
@pytest.mark.parametrize("strategy", IN_ORDER)
def test_every_integer_dtype_is_accepted(dtype, strategy):
    lengths = np.array([100, 60, 40, 20, 100], dtype)
    packs = pack_lengths(lengths, 120, strategy=strategy)
    assert listed(packs) == IN_ORDER[strategy](lengths.tolist(), 120)


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
RULES = (
    "expected one of 'ffd', 'bfd', 'spfhp', 'nnlshp', 'balanced', 'optimal', 'next_fit', "
    "'first_fit', 'best_fit'; choose a packing rule"
)
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
            {"strategy": "wfd"},
            ValueError,
            f"strategy is 'wfd', {RULES}",
        ),
        (
            {"strategy": None},
            ValueError,
            f"strategy is None, {RULES}",
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
