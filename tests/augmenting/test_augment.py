"""`Augment`: options that are checked, draws that are functions of seed, epoch and example."""

from __future__ import annotations

import json
import re
from typing import Any

import naive_augment
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import WORDS, keys

from packpipe import Augment
from packpipe.philox import Key

MANY = 100_000
SHARES = st.floats(0, 1)


@st.composite
def augments(draw: st.DrawFn) -> Augment:
    """Any augmentation there can be."""
    three = draw(st.booleans())
    names = ["flip", "vertical_flip", "brightness", "contrast", "saturation", "erase"]
    names += ["mixup", "cutmix"]
    names += [] if three else ["grey", "solarize"]
    some = {name: draw(SHARES) for name in draw(st.sets(st.sampled_from(names)))}
    return Augment(**some, turns=draw(st.booleans()), three_augment=three)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"flip": 1.5}, ValueError, "flip is 1.5, expected a number in [0, 1]; pass a share of"),
        ({"erase": -0.1}, ValueError, "erase is -0.1, expected a number in [0, 1]; pass a share"),
        ({"vertical_flip": True}, TypeError, "vertical_flip is True, expected a number; pass a"),
        ({"grey": float("nan")}, ValueError, "grey is nan, expected a finite number; pass a share"),
        ({"brightness": 2}, ValueError, "brightness is 2, expected a number in [0, 1]; 0.3 is us"),
        ({"contrast": "0.3"}, TypeError, "contrast is '0.3', expected a number; 0.3 is usual, 0"),
        (
            {"mixup": -1},
            ValueError,
            "mixup is -1, expected a number in [0, 1000]; timm uses mixup=",
        ),
        ({"cutmix": 1e9}, ValueError, "cutmix is 1000000000.0, expected a number in [0, 1000]; t"),
        ({"mixup": True}, TypeError, "mixup is True, expected a number; timm uses mixup=0.8 and"),
        (
            {"mix_prob": 0.5},
            ValueError,
            "mix_prob is 0.5, expected 1 without mixup and cutmix; pass one of them, too",
        ),
        ({"turns": 1}, TypeError, "turns is 1, expected True or False; pass a bool"),
        ({"three_augment": None}, TypeError, "three_augment is None, expected True or False; pas"),
        (
            {"three_augment": True, "solarize": 0.2},
            ValueError,
            "solarize is 0.2, expected 0 with three_augment; it chooses grey and solarize itself",
        ),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        Augment(**options)


def test_unknown_names_are_refused():
    with pytest.raises(
        TypeError, match=r"^option is 'hue', expected one of flip, .*, mix_prob; use"
    ):
        Augment.from_dict({"hue": 0.1})
    message = r"^preset is 'two', expected one of 'three', 'inception'; choose a recipe$"
    with pytest.raises(ValueError, match=message):
        Augment.preset("two")


@given(augments())
def test_it_is_made_again_from_what_json_holds_of_it(augment):
    assert Augment.from_dict(json.loads(json.dumps(augment.to_dict()))) == augment


def test_the_presets_are_what_their_sources_say():
    jitters = dict.fromkeys(("brightness", "contrast", "saturation"), 0.3)
    assert Augment.preset("three") == Augment(flip=0.5, three_augment=True, **jitters)
    inception = Augment.preset("inception")
    assert inception == Augment(flip=0.5)
    assert not inception.colours
    assert not inception.mixes


def test_options_of_mixing_are_named_only_where_they_are_used():
    assert list(Augment().to_dict())[-1] == "erase"
    assert Augment(mixup=0.8).to_dict() == {**Augment().to_dict(), "mixup": 0.8}
    assert not Augment(mixup=0.8, mix_prob=0).mixes


@given(augments(), keys(), st.lists(st.integers(0, 2**40), min_size=1, max_size=9))
def test_an_example_s_draws_depend_on_nothing_but_the_key_and_its_index(augment, key, index):
    drawn = augment.drawn(Key(*key), np.array(index))._asdict()
    for place, example in enumerate(index):
        found = augment.draws(*key, example)
        box = found.pop("erase")
        assert (box is not None) == drawn["erase"][place]
        if box is not None:
            assert list(box.values()) == drawn["box"][place].tolist()
        assert found == {name: drawn[name][place].item() for name in found}


def test_epochs_and_seeds_draw_anew():
    augment = Augment(turns=True, brightness=1)
    found = [augment.drawn(Key(*key), np.arange(64)) for key in ((0, 0), (0, 1), (1, 0))]
    assert len({draws.brightness.tobytes() for draws in found}) == 3
    assert len({draws.turns.tobytes() for draws in found}) == 3


@given(st.integers(0, 2**40), keys())
def test_draws_are_those_of_numpy_s_philox_and_never_move(example, key):
    def u(stream: int) -> float:
        return naive_augment.uniform(*key, example, stream)

    every = Augment(
        vertical_flip=0.5, turns=True, grey=0.2, solarize=0.3, erase=1, brightness=0.4, contrast=0.3
    )
    found = every.draws(*key, example)
    assert (found["flip"], found["vertical_flip"]) == (u(32) < 0.5, u(33) < 0.5)
    assert found["turns"] == int(4 * u(34))
    assert (found["grey"], found["solarize"]) == (u(36) < 0.2, u(37) < 0.3)
    factors = [1 + 0.4 * (2 * u(38) - 1), 1 + 0.3 * (2 * u(39) - 1), 1.0]
    assert [found["brightness"], found["contrast"], found["saturation"]] == factors
    box = [0.02 + (0.4 - 0.02) * u(42), 0.3 + (1 / 0.3 - 0.3) * u(43), u(44), u(45)]
    assert list(found["erase"].values()) == box
    assert (Augment(erase=0.4).draws(*key, example)["erase"] is None) == (u(41) >= 0.4)
    three = Augment(flip=0, saturation=0.5, three_augment=True).draws(*key, example)
    assert three["grey"] == (u(35) < 1 / 3)
    assert three["solarize"] == (int(3 * u(35)) == 1)
    assert three["saturation"] == 1 + 0.5 * (2 * u(40) - 1)


def within(found: Any, share: float, number: int = MANY) -> bool:
    """Whether a share of so many draws is that which was wanted, to 4 standard errors."""
    return bool(abs(found - share) <= 4 * np.sqrt(share * (1 - share) / number))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("name", ["flip", "vertical_flip", "grey", "solarize", "erase"])
def test_chances_are_kept(name, share):
    drawn = getattr(Augment(**{name: share}).drawn(Key(5, 7), np.arange(MANY)), name)
    assert within(drawn.mean(), share)


def test_each_quarter_turn_and_each_of_three_is_as_likely():
    drawn = Augment(turns=True, three_augment=True).drawn(Key(5, 7), np.arange(MANY))
    for turns in range(4):
        assert within((drawn.turns == turns).mean(), 1 / 4)
    assert within(drawn.grey.mean(), 1 / 3)
    assert within(drawn.solarize.mean(), 1 / 3)
    assert not (drawn.grey & drawn.solarize).any()


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_are_uniform_about_one(name):
    drawn = getattr(Augment(**{name: 0.4}).drawn(Key(5, 7), np.arange(MANY)), name)
    assert 0.6 <= drawn.min() < 0.601
    assert 1.399 < drawn.max() <= 1.4
    assert within((drawn < 0.8).mean(), 1 / 4)
    assert within((drawn < 1).mean(), 1 / 2)


def test_decisions_are_drawn_independently():
    augment = Augment(vertical_flip=0.5, turns=True, grey=0.5, solarize=0.5, erase=0.5)
    drawn = augment.drawn(Key(5, 7), np.arange(MANY))
    yes = [
        drawn.flip,
        drawn.vertical_flip,
        drawn.turns < 2,
        drawn.grey,
        drawn.solarize,
        drawn.erase,
    ]
    for place, one in enumerate(yes):
        for other in yes[:place]:
            assert within((one & other).mean(), 1 / 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((-1, 0, 0), "seed is -1, expected an integer in 0..18446744073709551615"),
        ((0, 0.5, 0), "epoch is 0.5, expected an integer in 0..18446744073709551615"),
        ((0, 0, -1), "example_index is -1, expected an integer in 0..9223372036854775807; pass a"),
    ],
)
def test_draws_of_what_is_no_example_are_refused(given, message):
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        Augment().draws(*given)


@given(WORDS)
def test_nothing_is_drawn_where_nothing_is_asked_for(seed):
    drawn = Augment(flip=0).drawn(Key(seed, 0), np.arange(3))
    assert not any(values.any() for values in (*drawn[:5], drawn.erase, drawn.box))
    assert all((values == 1).all() for values in drawn[5:8])
