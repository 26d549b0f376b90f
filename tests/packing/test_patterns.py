from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe.packing import patterns as pattern_lists

PACKS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), max_size=8)
PAIRS = st.lists(
    st.tuples(st.integers(0, 6), st.lists(st.integers(1, 12), min_size=1, max_size=5)), max_size=8
)


def from_lists(pairs) -> pattern_lists.Patterns:
    return pattern_lists.from_pairs(
        (repeats, pattern_lists.pattern_of(held)) for repeats, held in pairs
    )


def packs_of(patterns: pattern_lists.Patterns) -> list[list[int]]:
    found = []
    for pattern in range(len(patterns)):
        repeats, held = patterns[pattern]
        found += [[length for length, copies in held for _ in range(copies)]] * repeats
    return found


@given(PAIRS)
@example([(2, [3, 3, 1]), (0, [4]), (1, [5])])
def test_patterns_are_what_they_were_made_from(pairs):
    patterns = from_lists(pairs)
    wanted = [sorted(held, reverse=True) for repeats, held in pairs for _ in range(repeats)]
    assert packs_of(patterns) == wanted
    assert patterns.num_packs == len(wanted)
    counts = Counter(length for held in wanted for length in held)
    assert patterns.counts(12).tolist() == [counts[length] for length in range(13)]
    assert patterns.num_segments.tolist() == [len(held) for repeats, held in pairs if repeats]


@given(PAIRS, PAIRS)
def test_joined_patterns_follow_each_other(first, second):
    parts = [from_lists(first), from_lists(second)]
    assert packs_of(pattern_lists.joined(parts)) == packs_of(parts[0]) + packs_of(parts[1])


def naive_fill(packs: list[list[int]], examples: list[int]) -> tuple[list[list[int]], Counter[int]]:
    """Longest first, each into the shortest free slot that holds it, the first of its kind."""
    free = [(length, p, s) for p, pack in enumerate(packs) for s, length in enumerate(pack)]
    filled: list[list[int]] = [[] for _ in packs]
    left: Counter[int] = Counter()
    for length in sorted(examples, reverse=True):
        able = [slot for slot in free if slot[0] >= length]
        if able:
            slot = min(able)
            free.remove(slot)
            filled[slot[1]].append(length)
        else:
            left[length] += 1
    return filled, left


@given(pairs=PAIRS, examples=st.lists(st.integers(1, 12), max_size=40))
@example(pairs=[(3, [5, 5]), (2, [4])], examples=[5, 3, 3, 2])
def test_slots_go_to_the_longest_first_and_empty_packs_are_dropped(pairs, examples):
    slots = from_lists(pairs)
    counts = np.bincount(examples, minlength=13)
    filled, left = pattern_lists.fill_slots(slots, counts)
    packs = packs_of(filled)
    twin, twin_left = naive_fill(packs_of(slots), examples)
    assert Counter({length: n for length, n in enumerate(left.tolist()) if n}) == twin_left
    held = Counter(length for pack in packs for length in pack)
    assert held + twin_left == Counter(examples)
    assert all(packs)
    # Each pack fits into the slots of one it came from: lengths in order are no longer.
    assert sum(map(len, packs)) == sum(map(len, twin))
    sources = [sorted(pack, reverse=True) for pack in packs_of(slots)]
    for pack in packs:
        assert any(
            len(slot) >= len(pack) and all(a <= b for a, b in zip(pack, slot, strict=False))
            for slot in sources
        )


def test_a_slot_takes_a_shorter_example():
    slots = from_lists([(2, [6, 2])])
    filled, left = pattern_lists.fill_slots(slots, np.array([0, 0, 0, 3, 0, 0, 0]))
    assert packs_of(filled) == [[3], [3]]
    assert left.tolist() == [0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("packs", "multiple", "wanted"),
    [
        ([[3, 2, 1]], 2, [[3, 2], [1]]),
        ([[3, 2, 1], [4]], 4, [[3], [2], [1], [4]]),
        ([[4], [4], [4]], 2, [[4], [4], [4], []]),
        ([[2, 2], [2, 2]], 2, [[2, 2], [2, 2]]),
        ([], 4, []),
    ],
)
def test_packs_are_cut_to_a_multiple(packs, multiple, wanted):
    found = pattern_lists.split_to_multiple(from_lists([(1, pack) for pack in packs]), multiple)
    assert packs_of(found) == wanted
