from __future__ import annotations

import naive
import numpy as np
import strategies
from hypothesis import example, given
from strategies import PackingCase

from packpipe.packing import limits


def histogram(case: PackingCase) -> np.ndarray:
    return np.bincount(case.lengths, minlength=case.seq_len + 1)


@given(strategies.packing_cases())
@example(PackingCase([1], 1, None))
@example(PackingCase([3, 3, 2, 2, 2], 5, None))
@example(PackingCase([3] * 4 + [2] * 4, 6, None))
def test_martello_toth_is_its_definition(case):
    found = limits.martello_toth_bound(histogram(case), case.seq_len)
    assert found == naive.martello_toth(case.lengths, case.seq_len)
    assert found >= limits.sum_bound(histogram(case), case.seq_len)


@given(strategies.packing_cases())
def test_the_sum_bound_is_tokens_over_seq_len_rounded_up(case):
    found = limits.sum_bound(histogram(case), case.seq_len)
    tokens = sum(case.lengths)
    assert (found - 1) * case.seq_len < tokens <= found * case.seq_len


@given(strategies.packing_cases(limited=True, max_examples=9, max_seq_len=16))
def test_the_lower_bound_is_at_most_the_optimum_and_at_least_each_of_its_parts(case):
    found = limits.lower_bound(histogram(case), case.seq_len, case.max_segments)
    assert found <= naive.optimum(case.lengths, case.seq_len, case.max_segments)
    assert found * case.max_segments >= len(case.lengths)
    assert found >= naive.martello_toth(case.lengths, case.seq_len)


def test_three_long_examples_need_a_pack_each_though_their_tokens_fill_two():
    counts = np.bincount([6, 6, 6], minlength=11)
    assert limits.sum_bound(counts, 10) == 2
    assert limits.martello_toth_bound(counts, 10) == 3
