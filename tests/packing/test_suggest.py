from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe.packing.packs import pack_lengths
from packpipe.packing.suggest import suggest_seq_len

SORTING = ("ffd", "bfd", "spfhp", "balanced")


@st.composite
def candidate_cases(draw: st.DrawFn) -> tuple[strategies.PackingCase, list[int]]:
    """A packing case, and values of seq_len from its longest example on."""
    case = draw(strategies.packing_cases())
    longest = max(case.lengths)
    return case, draw(st.lists(st.integers(longest, longest + 200), min_size=1, max_size=5))


@pytest.mark.parametrize("strategy", SORTING)
@given(drawn=candidate_cases())
def test_figures_are_those_of_packing_at_each_candidate(strategy, drawn):
    case, candidates = drawn
    found = suggest_seq_len(
        case.lengths, candidates, strategy=strategy, max_segments=case.max_segments
    )
    assert [choice.quality.seq_len for choice in found.choices] == sorted(set(candidates))
    work = sum(length**2 for length in case.lengths)
    for choice in found.choices:
        seq_len = choice.quality.seq_len
        packs = pack_lengths(
            case.lengths, seq_len, strategy=strategy, max_segments=case.max_segments
        )
        assert choice.quality == packs.quality
        assert choice.masked_work == pytest.approx(len(packs) * seq_len**2 / work)


@given(candidate_cases(), st.floats(0, 1, exclude_max=True))
def test_the_best_is_the_shortest_within_max_padding_or_pads_least(drawn, max_padding):
    case, candidates = drawn
    found = suggest_seq_len(case.lengths, candidates, max_padding=max_padding)
    padding = {
        seq_len: pack_lengths(case.lengths, seq_len).quality.padding
        for seq_len in sorted(set(candidates))
    }
    good = [seq_len for seq_len, share in padding.items() if share <= max_padding]
    assert found.best == (good[0] if good else min(padding, key=padding.get))


@pytest.mark.parametrize(
    ("max_padding", "best"), [(0.0, 160), (0.01, 160), (0.1, 160), (0.2, 64), (0.99, 64)]
)
def test_more_padding_allows_a_shorter_pack(max_padding, best):
    found = suggest_seq_len([50, 60, 30, 20], [160, 96, 64], max_padding=max_padding)
    assert [choice.quality.padding for choice in found.choices] == pytest.approx([1 / 6, 1 / 6, 0])
    assert found.best == best


def test_one_percent_is_enough_unless_told_otherwise():
    # Padding of 1.2 %, 0.9 % and none.
    assert suggest_seq_len([99] * 110, [100, 110]).best == 100
    assert suggest_seq_len([98] * 110, [99, 98 * 110]).best == 98 * 110


@pytest.mark.parametrize(("max_padding", "best"), [(0.25, 8), (0.24, 12)])
def test_padding_of_just_max_padding_is_small_enough(max_padding, best):
    assert suggest_seq_len([6, 6], [8, 12], max_padding=max_padding).best == best


def test_the_shortest_of_those_that_pad_alike_is_best():
    assert suggest_seq_len([6, 6], [8, 16]).best == 8


@given(strategies.packing_cases(max_seq_len=3000))
@example(strategies.PackingCase([64], 64, None))
@example(strategies.PackingCase([65], 65, None))
def test_candidates_are_the_longest_rounded_up_to_eight_times_that(case):
    found = [choice.quality.seq_len for choice in suggest_seq_len(case.lengths).choices]
    base = -(-max(case.lengths) // 64) * 64
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (base, 8 * base)
    assert {base, 2 * base, 3 * base, 4 * base, 6 * base, 8 * base} <= set(found)
    assert all(seq_len % 64 == 0 for seq_len in found)


def test_candidates_of_a_longest_example_of_250_tokens():
    found = suggest_seq_len([250, 3, 77])
    seq_lens = [choice.quality.seq_len for choice in found.choices]
    assert seq_lens == [256, 320, 384, 512, 768, 1024, 1536, 2048]


def test_long_examples_have_candidates_too():
    longest = 2**21 + 1
    found = suggest_seq_len([longest])
    assert all(longest <= choice.quality.seq_len <= 2**24 for choice in found.choices)


def test_the_table_in_full():
    # At 60 and 64 tokens a pack holds 60, 30 + 30 or as many of 7 as fit; at 128 it holds
    # 60 + 60 (+ 7) or 4 * 30; at 4096 the last pack gets 64 of 30 and 281 of 7.
    found = suggest_seq_len([60] * 900 + [30] * 1800 + [7] * 333, [60, 64, 128, 4096])
    assert str(found) == (
        "seq_len       rows  padding  segments (most)  masked ÷ segment attention\n"
        "     60       1842   0.171%      1.65 (8)                          1.36 <\n"
        "     64       1837   6.156%      1.65 (9)                          1.54\n"
        "    128        900   4.227%      3.37 (4)                          3.02\n"
        "   4096         27   0.236%    112.33 (345)                       92.89"
    )


def test_a_table_of_one_candidate_that_pads_too_much():
    found = suggest_seq_len([5, 5, 5], [8])
    assert found.best == 8
    assert str(found) == (
        "seq_len       rows  padding  segments (most)  masked ÷ segment attention\n"
        "      8          3  37.500%      1.00 (1)                          2.56 <"
    )


@pytest.mark.parametrize(
    "lengths",
    [
        np.array([50, 60, 30, 20], np.uint8),
        np.array([50, 60, 30, 20], ">i4"),
        pa.array([50, 60, 30, 20], pa.int16()),
        pa.chunked_array([[50], [], [60, 30], [20]], pa.uint64()),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, set, iter])
def test_lengths_and_candidates_of_any_kind(lengths, kind):
    found = suggest_seq_len(lengths, kind([np.int16(96), 64]))
    assert found == suggest_seq_len([50, 60, 30, 20], [64, 96])


REMEDY = "raise seq_len, or shorten or reject the example"
FIT = "; the longest example must fit"
SEGMENTS = f"expected an integer in 1..{2**31}; raise it, or pass None for no limit"
RULES = (
    "expected one of 'ffd', 'bfd', 'spfhp', 'nnlshp', 'balanced', 'optimal'; "
    "choose a packing rule for histograms"
)


@pytest.mark.parametrize(
    ("lengths", "options", "error", "message"),
    [
        ([], {}, ValueError, "len(lengths) is 0, expected 1 or more; pass some lengths"),
        (
            pa.chunked_array([], pa.int64()),
            {},
            ValueError,
            "len(lengths) is 0, expected 1 or more; pass some lengths",
        ),
        (
            [5, 0],
            {"candidates": [8]},
            ValueError,
            f"lengths[1] is 0, expected 1..16777216 (seq_len); {REMEDY}",
        ),
        (
            [5, -3],
            {},
            ValueError,
            f"lengths[1] is -3, expected 1..16777216 (seq_len); {REMEDY}",
        ),
        (
            [5.0],
            {},
            TypeError,
            "lengths.dtype is 'float64', expected an integer dtype; pass tokens per example",
        ),
        (
            pa.array([5, None]),
            {},
            ValueError,
            "lengths[1] is None, expected an integer; fill or leave out nulls",
        ),
        (
            [5, 9],
            {"candidates": [16, 8]},
            ValueError,
            f"candidates is 8, expected an integer in 9..{2**24}{FIT}",
        ),
        (
            [5],
            {"candidates": [2**24 + 1]},
            ValueError,
            f"candidates is {2**24 + 1}, expected an integer in 5..{2**24}{FIT}",
        ),
        (
            [5],
            {"candidates": [8.0]},
            TypeError,
            f"candidates is 8.0, expected an integer in 5..{2**24}{FIT}",
        ),
        (
            [5],
            {"candidates": []},
            ValueError,
            "candidates is [], expected one or more; pass None to choose",
        ),
        (
            [5],
            {"max_padding": 1},
            ValueError,
            "max_padding is 1, expected a share in [0, 1); 0.01 is usual",
        ),
        (
            [5],
            {"max_padding": -0.5},
            ValueError,
            "max_padding is -0.5, expected a share in [0, 1); 0.01 is usual",
        ),
        (
            [5],
            {"max_padding": float("nan")},
            ValueError,
            "max_padding is nan, expected a share in [0, 1); 0.01 is usual",
        ),
        (
            [5],
            {"max_padding": True},
            ValueError,
            "max_padding is True, expected a share in [0, 1); 0.01 is usual",
        ),
        (
            [5],
            {"max_segments": 0},
            ValueError,
            f"max_segments is 0, {SEGMENTS}",
        ),
        (
            [5],
            {"strategy": "next_fit"},
            ValueError,
            f"strategy is 'next_fit', {RULES}",
        ),
    ],
)
def test_bad_arguments_are_named(lengths, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        suggest_seq_len(lengths, **options)


@pytest.mark.parametrize("length", [0, -5, -100, 2**25])
def test_without_candidates_a_bad_length_is_still_what_is_named(length):
    message = f"lengths[0] is {length}, expected 1..{2**24}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        suggest_seq_len([length])


def test_candidates_that_are_no_list_are_named():
    message = "candidates is 'int', expected some integers; pass a list"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        suggest_seq_len([5], 8)
