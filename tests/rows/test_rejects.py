from __future__ import annotations

import copy
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packpipe.rows import rejects as module
from packpipe.rows.rejects import Reject, StreamReadFailures, Tally, Tolerance, TooManyRejects


def rejects(*examples: int) -> list[Reject]:
    return [Reject(i, "probe", "empty", f"error {i}") for i in examples]


def test_a_share_above_the_limit_stops_and_names_the_first_five():
    budget = Tolerance(100, 0.05, 100)
    message = (
        "rejected is 6 of 100 examples (6.00%), expected at most 5.00% (max_bad_fraction); "
        "repair the source or raise it. First: example 1 (empty: error 1); "
        "example 3 (empty: error 3); example 5 (empty: error 5); example 7 (empty: error 7); "
        "example 9 (empty: error 9)"
    )
    with pytest.raises(TooManyRejects, match=f"^{re.escape(message)}$") as found:
        budget.check(rejects(9, 7, 11, 5, 3, 1))
    assert [reject.example_index for reject in found.value.rejects] == [1, 3, 5, 7, 9, 11]
    assert isinstance(found.value, ValueError)


@pytest.mark.parametrize(
    ("num_examples", "share"), [(100, 0.05), (100, 0.29), (100, 0.07), (100, 0.57), (1000, 0.009)]
)
def test_a_share_of_exactly_the_limit_passes(num_examples, share):
    num_bad = round(num_examples * share)
    budget = Tolerance(num_examples, share, 100)
    budget.check(rejects(*range(0, 2 * num_bad, 2)))
    with pytest.raises(TooManyRejects):
        budget.check(rejects(*range(0, 2 * num_bad + 2, 2)))


def test_neighbours_stop_a_build_of_any_size():
    budget = Tolerance(10**9, 0.5, 3)
    budget.check(rejects(4, 5, 7, 8, 10))
    message = (
        "rejected is 3 examples in a row up to example 6, expected fewer than 3 "
        "(max_consecutive_bad); repair the source or raise it. First: example 2 (empty: error 2); "
        "example 4 (empty: error 4); example 5 (empty: error 5); example 6 (empty: error 6)"
    )
    with pytest.raises(TooManyRejects, match=f"^{re.escape(message)}$"):
        budget.check(rejects(6, 4, 2, 5))


def test_the_first_examples_count_as_neighbours_too():
    with pytest.raises(TooManyRejects, match=r"^rejected is 2 examples in a row up to example 1,"):
        Tolerance(100, 1.0, 2).check(rejects(0, 1))


@pytest.mark.parametrize("example", [0, 5])
def test_a_limit_of_one_stops_at_the_first(example):
    with pytest.raises(TooManyRejects, match=f"^rejected is 1 .* up to example {example},"):
        Tolerance(100, 1.0, 1).check(rejects(example))


@pytest.mark.parametrize("num_examples", [0, 10])
def test_no_rejects_are_within_any_budget(num_examples):
    Tolerance(num_examples, 0.0, 1).check([])


def test_a_share_of_zero_allows_none():
    with pytest.raises(TooManyRejects, match=re.escape("at most 0.00% (max_bad_fraction)")):
        Tolerance(1000, 0.0, 100).check(rejects(5))


CONSECUTIVE = f"expected an integer in 1..{2**63}; 1 stops at the first bad example"


@pytest.mark.parametrize(
    ("share", "in_a_row", "error", "message"),
    [
        (-0.1, 1, ValueError, "max_bad_fraction is -0.1, expected 0..1; it is a share"),
        (1.5, 1, ValueError, "max_bad_fraction is 1.5, expected 0..1; it is a share"),
        (float("nan"), 1, ValueError, "max_bad_fraction is nan, expected 0..1; it is a share"),
        ("1%", 1, TypeError, "max_bad_fraction is '1%', expected 0..1; it is a share"),
        (0.1, 0, ValueError, f"max_consecutive_bad is 0, {CONSECUTIVE}"),
        (0.1, 1.0, TypeError, f"max_consecutive_bad is 1.0, {CONSECUTIVE}"),
    ],
)
def test_bad_limits_are_named(share, in_a_row, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Tolerance(100, share, in_a_row)


def stops_at(outcomes, limit, in_a_row):
    """Where a stream stops and why, by the rule as its docstring puts it: the slow twin."""
    for read in range(1, len(outcomes) + 1):
        so_far = outcomes[:read]
        if not so_far[-1]:
            continue
        if sum(so_far) > limit * read and (sum(so_far) > module._AT_FIRST or limit == 0):
            return read, "fraction"
        if read >= in_a_row and all(so_far[-in_a_row:]):
            return read, "consecutive"
    if outcomes and sum(outcomes) > limit * len(outcomes):
        return "the end", "fraction"
    return None


@given(
    outcomes=st.lists(st.sampled_from([True, False, False, False]), max_size=250)
    | st.lists(st.sampled_from([True, True, False]), max_size=60),
    limit=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    in_a_row=st.integers(1, 6) | st.just(100),
)
def test_a_stream_stops_when_it_has_read_too_many_bad_examples(outcomes, limit, in_a_row):
    allowed, tally = Tolerance(0, limit, in_a_row), Tally()
    wanted = stops_at(outcomes, limit, in_a_row)
    place, found = None, None
    try:
        for place, bad in enumerate(outcomes, 1):
            tally = tally.plus(bad=bad)
            if bad:
                allowed.check_so_far(tally, rejects(place - 1))
        place = "the end"
        allowed.check_so_far(tally, [], ended=True)
    except TooManyRejects as error:
        found = place, "consecutive" if "(max_consecutive_bad)" in str(error) else "fraction"
        if (limit, in_a_row) == (0, 1):
            found = place, "fraction"
    assert found == wanted


def test_the_error_of_a_stream_names_the_latest():
    allowed = Tolerance(0, 0.01, 100)
    allowed.check_so_far(Tally(40, 30, 1), rejects(39))
    message = (
        "rejected is 31 of 41 examples (75.61%), expected at most 1.00% (max_bad_fraction); repair "
        "the source or raise it. Last: example 38 (empty: error 38); example 40 (empty: error 40)"
    )
    with pytest.raises(TooManyRejects, match=f"^{re.escape(message)}$"):
        allowed.check_so_far(Tally(41, 31, 1), rejects(38, 40))
    message = (
        "rejected is 2 of 41 examples (4.88%), expected at most 1.00% (max_bad_fraction); repair "
        "the source or raise it"
    )
    with pytest.raises(TooManyRejects, match=f"^{re.escape(message)}$"):
        allowed.check_so_far(Tally(41, 2, 0), [], ended=True)


def test_images_that_a_process_cannot_decode_are_a_share_of_those_it_has_decoded():
    allowed, counted = Tolerance(0, 0.1, 100), StreamReadFailures()
    for epoch in range(40):  # two of twenty are not more than a tenth
        counted.add(epoch, 10, [], allowed)
        counted.add(epoch, 10, rejects(3, 5), allowed)
    counted.add(40, 10, rejects(3), allowed)
    with pytest.raises(TooManyRejects, match=r"^rejected is 82 of 810 examples \(10\.12%\), "):
        counted.add(40, 0, rejects(7), allowed)
    copy.copy(counted).add(0, 10, rejects(1), allowed)  # another process counts its own


def test_neighbours_that_cannot_be_decoded_stop_a_stream_in_any_order():
    allowed = Tolerance(0, 1.0, 4)
    for order in ([1, 2, 3, 4], [4, 2, 1, 3], [1, 4, 3, 2]):
        counted = StreamReadFailures()
        for example in order[:-1]:
            counted.add(0, 1, rejects(example), allowed)
        with pytest.raises(TooManyRejects, match=r"^rejected is 4 examples in a row up to example"):
            counted.add(0, 1, rejects(order[-1]), allowed)
    counted = StreamReadFailures()
    for epoch in range(3):  # numbers of another epoch are other examples
        counted.add(epoch, 2, rejects(2 * epoch, 2 * epoch + 1), allowed)


def test_a_run_goes_on_where_a_resumed_stream_has_met_none_of_it_itself():
    allowed = Tolerance(0, 1.0, 3)
    allowed.check_so_far(Tally(5, 2, 2), [], ended=True)
    with pytest.raises(TooManyRejects, match="3 examples in a row up to example 5, expected fewer"):
        allowed.check_so_far(Tally(6, 3, 3), [], ended=True)
