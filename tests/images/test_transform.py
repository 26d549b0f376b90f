"""A function of the caller's own on decoded pixels: what it is given, and what is refused."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packpipe.images.transform import checked_transform, name_of, transformed
from packpipe.philox import Key

WORD = st.integers(0, 2**64 - 1)
PIXELS = np.random.default_rng(3).integers(0, 256, (32, 48, 3), np.uint8)


def noisy(pixels, rng):
    pixels ^= rng.integers(0, 256, pixels.shape, np.uint8)
    return pixels


def shifted(by, pixels, rng):
    return np.roll(pixels, by + int(rng.integers(4)), axis=1)


def alone(pixels):
    return pixels


def broken(pixels, rng):
    return pixels[rng.integers(2) : "end"]


def floats(pixels, _):
    return pixels / np.float32(255)


def cut(pixels, _):
    return pixels[:16]


def nothing(_pixels, _rng):
    return None


def across(pixels, _):
    return pixels[:, ::-1]


class Blur:
    def __call__(self, pixels, _):
        return pixels


@given(seed=WORD, epoch=WORD, example=st.integers(0, 2**63 - 1))
def test_random_numbers_are_a_function_of_seed_epoch_and_example(seed, epoch, example):
    before = PIXELS.copy()
    found = transformed(noisy, Key(seed, epoch), PIXELS, example)
    words = np.array([seed, epoch, 0, 64, example, 0], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=words[:2], counter=words[2:]))
    assert (found == before ^ rng.integers(0, 256, PIXELS.shape, np.uint8)).all()
    assert np.array_equal(before, PIXELS)  # the function had a copy
    others = [((seed + 1) % 2**64, epoch, example), (seed, (epoch + 1) % 2**64, example)]
    others.append((seed, epoch, (example + 1) % 2**63))
    for *key, other in others:
        assert (transformed(noisy, Key(*key), PIXELS, other) != found).any()


def test_views_of_an_array_are_written_whole():
    found = transformed(across, Key(0, 0), PIXELS, 0)
    assert found.flags.c_contiguous
    assert (found == PIXELS[:, ::-1]).all()


@pytest.mark.parametrize(
    ("function", "error", "what"),
    [
        (
            floats,
            ValueError,
            "'float32[32, 48, 3]', expected uint8[32, 48, 3] as it was given; return levels",
        ),
        (cut, ValueError, "'uint8[16, 48, 3]', expected uint8[32, 48, 3] as it was given; return"),
        (
            nothing,
            TypeError,
            "'NoneType', expected uint8[32, 48, 3] as it was given; return an array",
        ),
    ],
)
def test_other_pixels_are_refused_by_the_example(function, error, what):
    message = f"transform {function.__name__} of example 17 is {what}"
    with pytest.raises(error, match="^" + re.escape(message)):
        transformed(function, Key(0, 0), PIXELS, 17)


def test_an_error_of_the_function_names_the_example_and_keeps_its_traceback():
    message = r"^transform broken of example 17 raised TypeError: slice indices must be integers"
    with pytest.raises(RuntimeError, match=message) as caught:
        transformed(broken, Key(0, 0), PIXELS, 17)
    cause = caught.value.__cause__
    assert isinstance(cause, TypeError)
    assert cause.__traceback__.tb_next.tb_frame.f_code is broken.__code__


@pytest.mark.parametrize(
    ("function", "name"), [(noisy, "noisy"), (partial(shifted, 3), "shifted"), (Blur(), "Blur")]
)
def test_functions_partials_and_objects_are_called_by_their_names(function, name):
    assert checked_transform(function) is function
    assert name_of(function) == name
    assert transformed(function, Key(0, 0), PIXELS, 0).shape == PIXELS.shape


def local():
    return lambda pixels, rng: pixels + rng.integers(9)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("blur", "'blur', expected None or a function f(pixels, rng); it returns uint8 pixels"),
        (alone, "'alone', expected None or a function f(pixels, rng); it returns uint8 pixels"),
        (
            local(),
            "'local.<locals>.<lambda>', expected a function that can be sent to another process",
        ),
        (partial(local(), 1, 2), "'local.<locals>.<lambda>', expected None or a function f(pixels"),
    ],
)
def test_what_cannot_be_called_or_sent_is_refused(function, what):
    with pytest.raises(TypeError, match="^" + re.escape(f"transform is {what}")):
        checked_transform(function)


def test_without_a_transform_there_is_nothing_to_check():
    assert checked_transform(None) is None
