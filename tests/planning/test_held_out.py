"""What is held out: of each class the examples with the least words, a share, not all, not none."""

import re

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packpipe.planning.held_out import held_out

labels_of = st.lists(st.integers(-1, 4), min_size=2, max_size=60).filter(
    lambda labels: any(labels.count(label) > 1 for label in labels if label >= 0)
)
shares = st.floats(0.01, 0.99)


def by_class(labels, fraction, seed):
    """The same by a loop over classes."""
    chosen = set()
    for label in {label for label in labels if label >= 0}:
        members = [number for number, other in enumerate(labels) if other == label]
        ranked = sorted(members, key=lambda number: naive.random_word(seed, 0, number, 48))
        most = len(members) - 1
        chosen |= set(ranked[: min(most, max(1, round(fraction * len(members))))])
    return [number in chosen for number in range(len(labels))]


@given(labels_of, shares, st.integers(0, 2**64 - 1))
def test_it_is_what_a_loop_over_classes_holds_out(labels, fraction, seed):
    assert held_out(labels, fraction, seed=seed).tolist() == by_class(labels, fraction, seed)


@given(labels_of, shares, st.integers(0, 9))
def test_every_class_is_trained_on_and_if_it_can_be_validated(labels, fraction, seed):
    chosen = held_out(labels, fraction, seed=seed)
    for label in set(labels):
        here = chosen[np.array(labels) == label]
        if label < 0:
            assert not here.any()
        else:
            assert not here.all()
            assert here.any() == (len(here) > 1)


@given(labels_of, shares, st.integers(0, 9), st.data())
def test_examples_of_a_group_are_held_out_together_as_the_first_alone(labels, fraction, seed, data):
    """Copies of examples, put anywhere behind them, change nothing of which ones are held out."""
    alone = held_out(labels, fraction, seed=seed)
    copied = data.draw(st.lists(st.integers(0, len(labels) - 1), max_size=20))
    others = data.draw(st.lists(st.integers(0, 4), min_size=len(copied), max_size=len(copied)))
    groups = [*range(len(labels)), *copied]
    # A copy of one without a class would be the first that has one.
    own = [labels[n] if labels[n] < 0 else other for n, other in zip(copied, others, strict=True)]
    found = held_out([*labels, *own], fraction, seed=seed, groups=groups)
    assert found[: len(labels)].tolist() == alone.tolist()
    assert found[len(labels) :].tolist() == alone[copied].tolist()
    numbers = np.array(groups) * 7 - 50
    again = held_out([*labels, *own], fraction, seed=seed, groups=numbers)
    assert again.tolist() == found.tolist()


def test_the_first_example_with_a_class_decides_for_its_group():
    # Example 0 has none: example 3 is in its place, and alone in its class.
    labels, groups = [-1, 0, 0, 1, 0], [7, 1, 2, 7, 1]
    found = held_out(labels, 0.5, groups=groups)
    assert not found[[0, 3]].any()
    assert found[1] == found[4] != found[2]


def test_another_seed_holds_out_others():
    draws = {held_out([0] * 100, 0.1, seed=seed).tobytes() for seed in range(20)}
    assert len(draws) == 20
    mean = np.mean([held_out([0] * 100, 0.1, seed=seed) for seed in range(200)], axis=0)
    assert mean.min() > 0.0
    assert mean.max() < 0.2


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 0], 0, "fraction is 0, expected a number between 0 and 1; pass a share of the exampl"),
        ([0, 0], 1.0, "fraction is 1.0, expected a number between 0 and 1"),
        ([0, 1, -1, -1], 0.5, "labels is '4 lone ones', expected two or more examples of a class"),
        ([], 0.5, "labels is '0 lone ones', expected two or more examples of a class"),
    ],
)
def test_what_leaves_nothing_to_hold_out_is_refused(labels, fraction, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        held_out(labels, fraction)


def test_groups_are_one_for_each_example():
    with pytest.raises(ValueError, match=re.escape("len(groups) is 1, expected 2, as of labels;")):
        held_out([0, 0], 0.5, groups=[0])
    with pytest.raises(TypeError, match="groups"):
        held_out([0, 0], 0.5, groups=[0.5, 1])
    with pytest.raises(ValueError, match="labels is '3 lone ones', expected two or more examples"):
        held_out([0, 0, 0], 0.5, groups=[4, 4, 4])
