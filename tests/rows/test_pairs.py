"""Rows of pairs: which texts belong to an image of their row, and which rows are no pairs."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packpipe.rows.pairs import PairRows
from packpipe.rows.rows import Rows


def rows(examples: list[list[int]]) -> Rows:
    """Rows of segments of one token, without their tokens."""
    index = np.array([number for row in examples for number in row], np.int64)
    segments = {"example_index": index, "seq_lens": np.ones(len(index), np.int32)}
    return Rows(np.cumsum([0, *map(len, examples)]), segments)


def by_row(found: Rows) -> list[list[int]]:
    return [some.tolist() for some in np.split(found.example_index, found.offsets[1:-1])]


texts = st.lists(st.lists(st.integers(0, 9), unique=True, max_size=5), min_size=1, max_size=4)


@given(texts, st.data())
def test_texts_without_an_image_in_their_row_are_left_out(examples, data):
    lost = [
        data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))) for row in examples
    ]
    images = [
        [number for number, gone in zip(row, some, strict=True) if not gone]
        for row, some in zip(examples, lost, strict=True)
    ]
    pairs = PairRows(rows(images), rows(examples))
    pairs.check()
    assert by_row(pairs.paired().texts) == images
    assert pairs.paired().images is pairs.images


def is_part(some: list[int], whole: list[int]) -> bool:
    """Whether some are among the whole, in that order."""
    left = iter(whole)
    return all(number in left for number in some)


@given(st.data(), texts)
def test_rows_that_hold_others_than_their_texts_are_refused_by_number(data, examples):
    size = len(examples)
    row = st.lists(st.integers(0, 10), unique=True, max_size=5)
    images = data.draw(st.lists(row, min_size=size, max_size=size))
    pairs = PairRows(rows(images), rows(examples))
    parts = map(is_part, images, examples)
    wrong = next((number for number, good in enumerate(parts) if not good), None)
    if wrong is None:
        pairs.check()
        return
    message = (
        f"example_index of images[{wrong}] is {images[wrong]}, expected {examples[wrong]} "
        f"(texts[{wrong}]), or some of them in that order; select and shuffle both alike"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pairs.check()
