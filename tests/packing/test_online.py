from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import naive_streams
import numpy as np
import pyarrow as pa
import pytest
import strategies
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from packpipe.packing.online import STRATEGIES, OnlinePacker


class Stream(NamedTuple):
    lengths: list[int]
    seq_len: int
    options: dict[str, Any]

    def packer(self) -> OnlinePacker:
        return OnlinePacker(self.seq_len, **self.options)

    @property
    def slots(self) -> int:
        """Most examples a pack may hold; each takes a token at least."""
        return min(self.options["max_segments"] or self.seq_len, self.seq_len)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Few open packs and short waits, so that packs are closed for every reason."""
    case = draw(strategies.packing_cases(max_examples=80))
    options = {
        "strategy": draw(st.sampled_from(STRATEGIES)),
        "open_packs": draw(st.integers(1, 6)),
        "max_segments": case.max_segments,
        "max_wait": draw(st.none() | st.integers(1, 12)),
    }
    return Stream(case.lengths, case.seq_len, options)


def listed(closed: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    order, offsets = closed
    assert order.dtype == offsets.dtype == np.int64
    assert len(order) == offsets[-1]
    return [order[start:stop].tolist() for start, stop in pairwise(offsets)]


def cut(lengths: list[int], places: list[int]) -> list[list[int]]:
    ends = sorted(place % (len(lengths) + 1) for place in places)
    return [lengths[start:stop] for start, stop in pairwise([0, *ends, len(lengths)])]


@given(streams())
@example(Stream([5, 5, 5, 8, 1], 8, {"strategy": "best_fit", "open_packs": 3, "max_wait": 1}))
def test_packs_are_the_naive_rules_pack_by_pack(stream):
    packer = stream.packer()
    closed, left = naive_streams.online(stream.lengths, stream.seq_len, **stream.options)
    assert listed(packer.push(stream.lengths)) == closed
    assert packer.num_packs == len(closed)
    assert listed(packer.flush()) == left
    assert packer.num_packs == len(closed) + len(left) > 0


def test_64_packs_are_open_unless_told_otherwise():
    packer = OnlinePacker(100)
    assert listed(packer.push([60] * 64)) == []
    assert listed(packer.push([60])) == [[0]]
    assert len(packer) == 64


@pytest.mark.parametrize(("options", "max_wait"), [({}, 2048), ({"open_packs": 2}, 64)])
def test_a_pack_waits_for_32_times_open_packs_unless_told_otherwise(options, max_wait):
    packer = OnlinePacker(100, **options)
    assert listed(packer.push([20] + [100] * (max_wait - 1))) == [[i] for i in range(1, max_wait)]
    assert listed(packer.push([100])) == [[max_wait], [0]]


@pytest.mark.parametrize(
    ("strategy", "closed", "left"),
    [("best_fit", [[1, 2]], [[0]]), ("first_fit", [], [[0, 2], [1]])],
)
def test_best_fit_takes_the_least_room_and_first_fit_the_first_place(strategy, closed, left):
    packer = OnlinePacker(10, strategy=strategy, open_packs=2)
    assert listed(packer.push([4, 7, 3])) == closed
    assert listed(packer.flush()) == left


def test_the_fullest_pack_is_closed_when_no_place_is_free():
    packer = OnlinePacker(10, open_packs=2)
    assert listed(packer.push([6, 7, 8])) == [[1]]
    assert listed(packer.flush()) == [[0], [2]]


@given(streams(), st.lists(st.integers(0, 80), max_size=8))
def test_any_cut_into_calls_gives_the_same_packs(stream, places):
    whole, pieces = stream.packer(), stream.packer()
    at_once = listed(whole.push(stream.lengths))
    found = [pack for piece in cut(stream.lengths, places) for pack in listed(pieces.push(piece))]
    assert found == at_once
    last = listed(whole.flush())
    assert listed(pieces.flush()) == last
    assert at_once + last


def test_a_push_longer_than_the_packer_takes_at_once_gives_the_same_packs():
    lengths = np.random.default_rng(0).integers(1, 65, 2**17 + 5)
    options = {"open_packs": 3, "max_segments": 5}
    whole, pieces = OnlinePacker(64, **options), OnlinePacker(64, **options)
    packs = listed(whole.push(lengths))
    found = []
    for piece in np.split(lengths, range(14_000, 2**17, 14_000)):
        found += listed(pieces.push(piece))
    assert found == packs
    packs += listed(whole.flush())
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))


def test_chunks_of_an_arrow_array_are_one_stream():
    lengths = [5, 4, 3, 6, 2, 2, 7]
    chunked = pa.chunked_array([lengths[:3], [], lengths[3:]], pa.uint8())
    packs = listed(OnlinePacker(8, open_packs=2).push(chunked))
    assert packs == listed(OnlinePacker(8, open_packs=2).push(lengths)) == [[0, 2], [3, 4]]


@given(streams(), st.integers(0, 80))
def test_a_state_through_json_goes_on_where_it_was_taken(stream, place):
    first, rest = cut(stream.lengths, [place])
    packer, resumed = stream.packer(), stream.packer()
    packer.push(first)
    state = json.dumps(packer.state_dict())
    expected = listed(packer.push(rest)), packer.fill, len(packer), listed(packer.flush())
    resumed.push(stream.lengths)  # what was there before is forgotten
    resumed.load_state_dict(json.loads(state))
    assert json.dumps(resumed.state_dict()) == state
    assert (listed(resumed.push(rest)), resumed.fill, len(resumed), listed(resumed.flush())) == (
        expected
    )
    assert resumed.num_packs == packer.num_packs > 0


def test_a_state_is_not_changed_by_what_is_pushed_later():
    packer, resumed = OnlinePacker(8, open_packs=2), OnlinePacker(8, open_packs=2)
    packer.push([5, 4])
    state = packer.state_dict()
    # In arrays too, which need not be copied to be read.
    arrays = {name: np.array(value) for name, value in state.items() if isinstance(value, list)}
    before = json.dumps(state)
    resumed.load_state_dict({**state, **arrays})
    packer.push([3, 6, 7])
    resumed.push([1, 1, 1])
    assert json.dumps(state) == before
    assert {name: array.tolist() for name, array in arrays.items()}.items() <= state.items()


@given(streams())
def test_every_example_comes_out_exactly_once_in_a_pack_within_the_limits(stream):
    packer = stream.packer()
    packs = listed(packer.push(stream.lengths)) + listed(packer.flush())
    assert sorted(i for pack in packs for i in pack) == list(range(len(stream.lengths)))
    assert all(sum(stream.lengths[i] for i in pack) <= stream.seq_len for pack in packs)
    assert all(1 <= len(pack) <= stream.slots for pack in packs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("max_segments", "held"), [(None, 4), (3, 3)])
def test_packs_hold_several_examples_where_they_fit(strategy, max_segments, held):
    packer = OnlinePacker(8, strategy=strategy, max_segments=max_segments)
    assert [len(pack) for pack in listed(packer.push([2] * 12))] == [held] * (12 // held)
    assert listed(packer.flush()) == []


def closed_after_each_push(stream: Stream) -> tuple[list[int], list[list[int]]]:
    """Packs closed once each example was pushed alone, and the packs in closing order."""
    packer = stream.packer()
    packs: list[list[int]] = []
    counts = []
    for length in stream.lengths:
        packs += listed(packer.push([length]))
        counts.append(len(packs))
    return counts, packs


@given(streams())
def test_no_example_still_waits_when_max_wait_packs_were_closed_since_it_came(stream):
    options = {**stream.options, "max_wait": stream.options["max_wait"] or 5}
    counts, packs = closed_after_each_push(stream._replace(options=options))
    closed_at = {i: p for p, pack in enumerate(packs) for i in pack}
    for i, count in enumerate(counts):
        # Pushes after its own that left it waiting.
        still = [later for later in counts[i:] if later <= closed_at.get(i, len(packs))]
        assert all(later - count < options["max_wait"] for later in still)


@given(streams())
def test_packs_that_are_due_together_wait_for_each_other_and_no_more(stream):
    options = {**stream.options, "max_wait": stream.options["max_wait"] or 5}
    counts, packs = closed_after_each_push(stream._replace(options=options))
    longest = options["max_wait"] + options["open_packs"]
    for place, pack in enumerate(packs):
        assert all(place - counts[i] <= longest for i in pack)


@given(streams())
def test_memory_holds_the_open_packs_only(stream):
    packer = stream.packer()
    came = gone = 0
    for length in stream.lengths:
        order, _ = packer.push([length])
        came, gone = came + 1, gone + len(order)
        assert len(packer) == came - gone
        assert len(packer) <= stream.options["open_packs"] * stream.slots
        assert len(packer.state_dict()["waiting"]) == len(packer)
    packer.flush()
    assert len(packer) == 0


@given(streams())
def test_fill_is_the_share_that_closed_packs_hold(stream):
    packer = stream.packer()
    assert packer.fill == 1.0
    tokens = packs = 0
    calls = [partial(packer.push, [length]) for length in stream.lengths]
    for call in [*calls, packer.flush]:
        order, offsets = call()
        tokens += sum(stream.lengths[i] for i in order)
        packs += len(offsets) - 1
        assert packer.fill == (tokens / (packs * stream.seq_len) if packs else 1.0)
        assert 0 < packer.fill <= 1
    assert tokens == sum(stream.lengths)


@given(streams())
def test_after_a_flush_the_stream_goes_on_with_new_packs(stream):
    packer, fresh = stream.packer(), stream.packer()
    packer.push(stream.lengths)
    packer.flush()
    again = listed(packer.push(stream.lengths)) + listed(packer.flush())
    packs = listed(fresh.push(stream.lengths)) + listed(fresh.flush())
    assert again == [[i + len(stream.lengths) for i in pack] for pack in packs]
    assert packer.num_packs == 2 * fresh.num_packs > 0
    assert packer.fill == pytest.approx(fresh.fill)


@pytest.mark.parametrize("nothing", [[], np.empty(0, np.uint8), pa.array([], pa.int32())])
def test_an_empty_push_changes_nothing(nothing):
    packer = OnlinePacker(8, open_packs=2)
    packer.push([5, 4])
    state = packer.state_dict()
    assert listed(packer.push(nothing)) == []
    assert packer.state_dict() == state
    assert listed(packer.flush()) == [[0], [1]]
    assert listed(packer.flush()) == []


def test_the_example_of_the_docstring():
    packer = OnlinePacker(8, open_packs=2)
    assert listed(packer.push([5, 4, 3, 6])) == [[0, 2]]
    assert (len(packer), packer.num_packs, packer.fill) == (2, 1, 1.0)
    assert listed(packer.flush()) == [[1], [3]]
    assert (len(packer), packer.num_packs, packer.fill) == (0, 3, 18 / 24)


SEQ_LEN = f"expected an integer in 1..{2**24}; choose a shorter pack"
RULES = "expected one of 'best_fit', 'first_fit'; choose a packing rule"
OPEN = "expected an integer in 1..65536; 64 is usual; for more, use pack_lengths"
SEGMENTS = f"expected an integer in 1..{2**31}; raise it, or pass None for no limit"
WAIT = f"expected an integer in 1..{2**22}; 32 times open_packs costs next to nothing"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, f"seq_len is 0, {SEQ_LEN}"),
        ({"seq_len": 2**24 + 1}, ValueError, f"seq_len is {2**24 + 1}, {SEQ_LEN}"),
        ({"seq_len": 8.0}, TypeError, f"seq_len is 8.0, {SEQ_LEN}"),
        ({"strategy": "ffd"}, ValueError, f"strategy is 'ffd', {RULES}"),
        ({"strategy": None}, ValueError, f"strategy is None, {RULES}"),
        ({"open_packs": 0}, ValueError, f"open_packs is 0, {OPEN}"),
        ({"open_packs": 65537}, ValueError, f"open_packs is 65537, {OPEN}"),
        ({"open_packs": True}, TypeError, f"open_packs is True, {OPEN}"),
        ({"max_segments": 0}, ValueError, f"max_segments is 0, {SEGMENTS}"),
        ({"max_segments": "3"}, TypeError, f"max_segments is '3', {SEGMENTS}"),
        ({"max_wait": 0}, ValueError, f"max_wait is 0, {WAIT}"),
        ({"max_wait": 2**22 + 1}, ValueError, f"max_wait is {2**22 + 1}, {WAIT}"),
        ({"max_wait": 2.5}, TypeError, f"max_wait is 2.5, {WAIT}"),
    ],
)
def test_a_bad_option_is_named(options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        OnlinePacker(**{"seq_len": 8, **options})


REMEDY = "raise seq_len, or shorten or reject the example"


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3, 0], ValueError, f"lengths[1] is 0, expected 1..8 (seq_len); {REMEDY}"),
        ([3, 2, 9], ValueError, f"lengths[2] is 9, expected 1..8 (seq_len); {REMEDY}"),
        (
            pa.chunked_array([[3, 4], [], [1, -2]]),
            ValueError,
            f"lengths[3] is -2, expected 1..8 (seq_len); {REMEDY}",
        ),
        (
            pa.array([3, None]),
            ValueError,
            "lengths[1] is None, expected an integer; fill or leave out nulls",
        ),
        (
            [3.0],
            TypeError,
            "lengths.dtype is 'float64', expected an integer dtype; pass tokens per example",
        ),
        (3, ValueError, "lengths.ndim is 0, expected 1; pass tokens per example"),
    ],
)
def test_bad_lengths_are_named_and_none_is_taken(lengths, error, message):
    packer = OnlinePacker(8, open_packs=2)
    packer.push([5, 4])
    state = packer.state_dict()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        packer.push(lengths)
    assert packer.state_dict() == state
    assert listed(packer.push([3, 6])) == [[0, 2]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 0}, "version is 0, expected 1"),
        ({"seq_len": 9}, "seq_len is 9, expected 8"),
        ({"max_segments": None}, "max_segments is None, expected 3"),
        ({"strategy": "best_fit"}, "strategy is 'best_fit', expected 'first_fit'"),
        ({"open_packs": 3}, "open_packs is 3, expected 2"),
        ({"max_wait": 7}, "max_wait is 7, expected 64"),
    ],
)
def test_a_state_of_other_options_is_refused_and_nothing_changes(changed, message):
    packer = OnlinePacker(8, strategy="first_fit", open_packs=2, max_segments=3)
    packer.push([5, 4])
    state = packer.state_dict()
    message = f"{message}; make the packer with the options of the state"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packer.load_state_dict({**state, **changed})
    assert packer.state_dict() == state
    packer.load_state_dict(state)


WHOLE = "pass a state_dict() as it was"


def open_state() -> tuple[OnlinePacker, dict[str, Any]]:
    """A packer of 8 tokens with packs 1 (examples 1 and 3) and 2 (example 4) open, and its state.

    Pack 0 (examples 0 and 2) is closed; its place is taken by pack 2.
    """
    packer = OnlinePacker(8, open_packs=3, max_segments=3)
    assert listed(packer.push([5, 4, 3, 1, 7])) == [[0, 2]]
    state = packer.state_dict()
    assert state["counters"] == [3, 1, 96]
    assert state["rooms"] == [1, 3, 0]
    assert state["table"] == [[2, 2, 1], [1, 1, 0], [0, 0, 0]]
    assert (state["waiting"], state["waiting_in"]) == ([1, 3, 4], [1, 1, 2])
    assert (state["num_examples"], state["num_tokens"]) == (5, 20)
    return packer, state


@pytest.mark.parametrize("counters", [[3, 4, 96], [3, 2, 96], [2, 1, 96], [2**62, 1, 96]], ids=str)
def test_a_state_with_more_or_fewer_open_packs_than_it_counts_is_refused(counters):
    packer, state = open_state()
    expected = f"{counters[0] - counters[1]} (opened - closed)"
    message = f"np.count_nonzero(state['rooms']) is 2, expected {expected}; {WHOLE}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        packer.load_state_dict({**state, "counters": counters})
    assert packer.state_dict() == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counters": [3, 1]}, "['counters'].shape is (2,), expected (3,)"),
        ({"counters": [3, 1, 97]}, "['counters'][2] is 97, expected 96"),
        ({"counters": [3, 1, 95]}, "['counters'][2] is 95, expected 96"),
        ({"rooms": 7}, "['rooms'].ndim is 0, expected 1"),
        ({"rooms": [1, 3]}, "['rooms'].shape is (2,), expected (3,)"),
        ({"rooms": [1.0, 3.0, 0.0]}, "['rooms'].dtype is 'float64', expected an integer dtype"),
        ({"rooms": [True, False, True]}, "['rooms'].dtype is 'bool', expected an integer dtype"),
        ({"rooms": [1, "3", 0]}, "['rooms'].dtype is '<U21', expected an integer dtype"),
        ({"rooms": None}, "['rooms'].dtype is 'object', expected an integer dtype"),
        ({"rooms": [-1, 3, 0]}, "['rooms'][0] is -1, expected 0..4611686018427387904"),
        (
            {"rooms": np.array([2**63, 3, 0], np.uint64)},
            "['rooms'][0] is 9223372036854775808, expected 0..4611686018427387904",
        ),
        ({"rooms": [8, 3, 0]}, "['rooms'][0] is 8, expected 1..7"),
        ({"rooms": [1, 7, 0]}, "['rooms'][1] is 7, expected 1..6"),
        (
            {"table": [[2, 2, 1], [1, 1], [0, 0, 0]]},
            "['table'] is 'ragged', expected an integer array of 2 dimensions",
        ),
        ({"table": [[2, 2, 1, 0]] * 3}, "['table'].shape is (3, 4), expected (3, 3)"),
        ({"table": [[3, 2, 1], [1, 1, 0], [0, 0, 0]]}, "['table'][0][0] is 3, expected 2"),
        ({"table": [[2, 3, 1], [1, 1, 0], [0, 0, 0]]}, "['table'][0][1] is 3, expected 2"),
        ({"table": [[2, 1, 1], [1, 1, 0], [0, 0, 0]]}, "['table'][1][1] is 1, expected 2"),
        ({"table": [[2, 2, 2], [1, 1, 0], [0, 0, 0]]}, "['table'][0][2] is 2, expected 0..1"),
        ({"table": [[2, 2, 0], [1, 1, 1], [0, 0, 0]]}, "['table'][0][2] is 0, expected 1"),
        ({"waiting": [1, 3]}, "['waiting_in'].shape is (3,), expected (2,)"),
        ({"waiting": [1, 3, 5]}, "['waiting'][2] is 5, expected 4"),
        ({"waiting": [1, 1, 4]}, "['waiting'][1] is 1, expected 2..4"),
        ({"waiting_in": [1, 1, 0]}, "['waiting_in'][2] is 0, expected 1"),
        ({"waiting_in": [1, 1, 3]}, "['waiting_in'][2] is 3, expected -1"),
        ({"waiting_in": [1, 2, 2]}, "['table'][1][0] is 1, expected 2"),
        ({"waiting_in": [2, 1, 1]}, "['waiting_in'][0] is 2, expected 0..1"),
        ({"num_examples": "x"}, "['num_examples'] is 'x', expected an integer in 4..6"),
        ({"num_examples": 7}, "['num_examples'] is 7, expected an integer in 4..6"),
        ({"num_tokens": True}, "['num_tokens'] is True, expected an integer in 14..20"),
        ({"num_tokens": 21}, "['num_tokens'] is 21, expected an integer in 14..20"),
        ({"num_tokens": 13}, "['num_tokens'] is 13, expected an integer in 14..20"),
    ],
)
def test_a_state_that_is_amiss_is_named_and_changes_nothing(change, message):
    packer, state = open_state()
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(f'state{message}; {WHOLE}')}$"):
        packer.load_state_dict({**state, **change})
    assert packer.state_dict() == state


def test_a_state_without_one_of_its_fields_is_refused():
    packer, state = OnlinePacker(8), OnlinePacker(8).state_dict()
    assert len(state) == 13
    for name in state:
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(
            ValueError, match=rf"^(state\['{name}'\]|{name}) is 'missing', expected "
        ):
            packer.load_state_dict(rest)


def test_numbers_of_an_option_are_integers():
    state = OnlinePacker(8).state_dict()
    for name in ("version", "seq_len", "open_packs", "max_wait"):
        message = f"{name} is {float(state[name])}, expected {state[name]}; make the packer"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            OnlinePacker(8).load_state_dict({**state, name: float(state[name])})


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a state, lists and their numbers alike."""
    found = [path] if path else []
    if not isinstance(value, dict | list):
        return found
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    return found + [leaf for key, part in inside for leaf in leaves(part, (*path, key))]


HOSTILE = [-1, 0, 1, 2, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 1.5, "1", None, True, [], {}]


@st.composite
def harmed_states(draw: st.DrawFn, state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state in which one part is changed, left out, doubled or swapped."""
    harmed = json.loads(json.dumps(state))
    *parents, key = draw(st.sampled_from(leaves(state)))
    holder = harmed
    for name in parents:
        holder = holder[name]
    old = holder[key]
    kinds = ["change", "nudge"] + ["double", "leave out", "swap"] * isinstance(holder, list)
    kind = draw(st.sampled_from(kinds))
    if kind == "nudge" and isinstance(old, int):
        holder[key] = old + draw(st.integers(-3, 3))
    elif kind == "double":
        holder.insert(key, old)
    elif kind == "leave out":
        del holder[key]
    elif kind == "swap":
        other = draw(st.integers(0, len(holder) - 1))
        holder[key], holder[other] = holder[other], old
    else:
        holder[key] = draw(st.sampled_from(HOSTILE))
    return harmed


def refusal(packer: OnlinePacker, state: dict[str, Any]) -> Exception | None:
    """Load a state; return the error that refuses it."""
    try:
        packer.load_state_dict(state)
    except (TypeError, ValueError) as error:
        return error
    return None


@settings(max_examples=6 * settings().max_examples)
@given(streams(), st.integers(0, 80), st.booleans(), st.data())
def test_a_harmed_state_is_refused_by_name_or_goes_on_by_the_rules(stream, place, flush, data):
    first, rest = cut(stream.lengths, [place])
    packer = stream.packer()
    packer.push(first)
    if flush:
        packer.flush()
    whole = packer.state_dict()
    state = data.draw(harmed_states(whole))
    error = refusal(packer, state)
    if error is not None:
        named = rf"(np\.count_nonzero\()?state\['(\w+)'\]|({'|'.join(whole)}) is "
        assert re.match(named, str(error))
        assert packer.state_dict() == whole
        return
    event("accepted as it was" if state == whole else "accepted")
    # It goes on as the rules say of what it holds, with every example once.
    closed, left = naive_streams.online(rest, stream.seq_len, **stream.options, state=state)
    assert listed(packer.push(rest)) == closed
    assert 0 < packer.fill <= 1
    assert listed(packer.flush()) == left
    assert 0 < packer.fill <= 1
    came = range(state["num_examples"], state["num_examples"] + len(rest))
    assert sorted(i for pack in closed + left for i in pack) == sorted([*state["waiting"], *came])


def test_a_state_that_is_no_dict_is_named():
    message = "state is 'NoneType', expected a dict; pass a state_dict()"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        OnlinePacker(8).load_state_dict(None)
