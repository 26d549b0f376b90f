"""How a model is asked that was trained on rows: nothing is drawn or dropped."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packpipe import (
    Area,
    Budget,
    CenterCrop,
    Choice,
    Crop,
    OverTraining,
    PackConfig,
    PixelRange,
    Side,
    Square,
    Uniform,
    View,
)
from packpipe.philox import Key
from packpipe.planning.decisions import decide
from packpipe.planning.evaluation import evaluation_of

LAWS = (
    "native",
    "budget",
    Side(Uniform(20, 90)),
    Area(Choice((400, 5000))),
    Budget(Uniform(3, 40)),
    Square(Choice((32, 70))),
)


@given(
    st.sampled_from(LAWS),
    st.sampled_from([None, 9, 30]),
    st.sampled_from([0.0, 0.5, OverTraining(0.2, 0.8, 0.5, 0.1)]),
    st.sampled_from([None, Crop(0.5), CenterCrop(0.5)]),
    st.sampled_from([1, 2]),
    st.integers(8, 64),
)
def test_every_image_keeps_all_its_tokens_and_no_draw_decides(
    law, most, drop_rate, crop, views, seq_len
):
    most = None if most is None else min(most, seq_len)
    trained = PackConfig(
        seq_len=seq_len,
        patch_size=10,
        resolution=law,
        max_tokens=most,
        drop_rate=drop_rate,
        epochs=2,
        crop=crop,
        views=views,
        background=(1, 2, 3),
        profiles="ignore",
    )
    asked = evaluation_of(trained)
    sizes = np.array([[10, 10], [300, 40], [77, 1000], [500, 500]])
    index = np.arange(4)
    found, other = (decide(sizes, asked, Key(seed, 0), index=index) for seed in (0, 1))
    np.testing.assert_array_equal(found.grid_hw, other.grid_hw)
    np.testing.assert_array_equal(found.num_keep, found.grid_hw.astype(int).prod(axis=1))
    assert found.num_keep.max() <= min(seq_len, most or seq_len)
    assert (asked.background, asked.profiles) == ((1, 2, 3), "ignore")
    assert asked.crop == (crop if isinstance(crop, CenterCrop) else None)
    assert PackConfig.from_dict(asked.to_dict()) == asked


@pytest.mark.parametrize(
    ("law", "tokens"),
    [
        (Side(Uniform(20, 90)), 81),
        (Area(Choice((400, 4900))), 49),
        (Budget(Uniform(3, 40)), 40),
        (Side(Uniform(20, 2000)), 128),
        (Side(Uniform(2, 6)), 1),
    ],
)
def test_a_size_that_is_drawn_becomes_the_largest(law, tokens):
    asked = evaluation_of(PackConfig(seq_len=128, patch_size=10, resolution=law))
    assert (asked.resolution, asked.max_tokens) == ("budget", tokens)


@pytest.mark.parametrize(
    ("side", "seq_len", "found"), [(224, 196, 224), (230, 196, 224), (64, 9, 48)]
)
def test_squares_stay_squares(side, seq_len, found):
    law = Square(Uniform(32, side))
    asked = evaluation_of(PackConfig(seq_len=seq_len, resolution=law))
    assert asked.resolution.pixels.value == found


def test_a_range_of_pixels_stays_one():
    config = PackConfig(seq_len=64, resolution=PixelRange(), drop_rate=0.5, max_tokens=100)
    asked = evaluation_of(config)
    assert asked == PackConfig(seq_len=64, resolution=PixelRange(), max_tokens=64)


def test_of_several_laws_it_is_the_first_view_s():
    views = (View(resolution="budget", max_tokens=20), View(count=2, max_tokens=4))
    asked = evaluation_of(PackConfig(seq_len=64, views=views))
    assert (asked.max_tokens, asked.num_views) == (20, 1)
    alike = evaluation_of(PackConfig(seq_len=64, views=2, max_tokens=32, views_together=True))
    assert alike == PackConfig(seq_len=64, max_tokens=32)
