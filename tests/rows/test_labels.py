"""Labels that are lists of numbers are the numbers they were, NaN where one is missing."""

import math
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packpipe.rows.digests import labels_digest
from packpipe.rows.labels import as_arrow, is_vector, label_values, vectors

numbers = st.one_of(st.none(), st.floats(width=32, allow_nan=True, allow_infinity=False))
KINDS = {"list": pa.list_, "large": pa.large_list}


@given(
    lists=st.lists(st.one_of(st.none(), st.lists(numbers, min_size=1, max_size=4)), min_size=1),
    kind=st.sampled_from([*KINDS]),
    skip=st.integers(0, 3),
)
def test_lists_of_the_commonest_length_keep_their_numbers(lists, kind, skip):
    lens = [len(one) for one in lists if one is not None]
    if not lens:
        return
    wanted = max(sorted(set(lens)), key=lens.count)
    array = pa.array([[0.5]] * skip + lists, KINDS[kind](pa.float64())).slice(skip)
    found = vectors(array)
    assert found.values.shape == (len(lists), wanted)
    assert found.values.dtype == np.float32
    for one, row, length in zip(lists, found.values.tolist(), found.lens.tolist(), strict=True):
        assert length == (wanted if one is None else len(one))
        known = one if one is not None and len(one) == wanted else [None] * wanted
        for number, value in zip(known, row, strict=True):
            missing = number is None or math.isnan(number)
            assert math.isnan(value) if missing else value == np.float32(number)
    assert np.array_equal(label_values(as_arrow(found.values)), found.values, equal_nan=True)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (pa.array([3, -100], pa.int8()), [3, -100]),
        (pa.array([0.5, 2.0], pa.float64()), [[0.5], [2.0]]),
        (pa.array([[True, False], [None, True]]), [[1, 0], [math.nan, 1]]),
        (pa.array([[1, 2], None], pa.list_(pa.int64(), 2)), [[1, 2], [math.nan, math.nan]]),
    ],
)
def test_batches_show_classes_as_integers_and_other_numbers_as_vectors(given, wanted):
    found = label_values(given)
    assert found.dtype == (np.float32 if np.ndim(wanted) == 2 else np.int64)
    assert np.array_equal(found, np.array(wanted, found.dtype), equal_nan=True)


def test_a_digest_of_vectors_tells_others_apart():
    one, other = pa.array([[0.5, 1.0], [0.0, 2.0]]), pa.array([[0.5, 1.0], [0.0, 3.0]])
    assert labels_digest(one) == labels_digest(as_arrow(label_values(one)))
    assert labels_digest(one) != labels_digest(other)


def test_what_is_no_label_is_refused():
    assert not is_vector(pa.list_(pa.string()))
    assert is_vector(pa.list_(pa.bool_()))
    message = "numbers in labels[2] is 1, expected 2, as most have; make them equally long"
    with pytest.raises(ValueError, match=re.escape(message)):
        label_values(pa.array([[1, 2], [3, 4], [5]]))
    with pytest.raises(ValueError, match=r"^labels is 'empty', expected lists of numbers, or "):
        vectors(pa.array([[], None], pa.list_(pa.float32())))
