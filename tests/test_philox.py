from __future__ import annotations

import re

import naive
import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe import philox

INDICES = st.lists(strategies.WORDS, min_size=1, max_size=20)


@given(
    strategies.keys(),
    strategies.WORDS,
    strategies.WORDS,
    st.integers(1, 23),
)
@example((0, 0), 0, 0, 4)
@example((2**64 - 1, 2**64 - 1), 2**64 - 1, 2**64 - 1, 23)
@example((2**63, 1), 1, 2**63, 5)
def test_words_are_numpys_philox_bit_for_bit(key, index, stream, num_words):
    seed, epoch = key
    found = philox.words(
        seed=seed,
        epoch=epoch,
        index=np.array([index], np.uint64),
        stream=stream,
        num_words=num_words,
    )
    oracle = np.random.Philox(
        key=np.array([seed, epoch], np.uint64),
        counter=np.array([0, stream, index, 0], np.uint64),
    )
    assert found.dtype == np.uint64
    assert found.shape == (1, num_words)
    assert found[0].tolist() == oracle.random_raw(num_words).tolist()


@given(strategies.keys(), strategies.WORDS)
def test_uniform_is_numpys_first_random_number(key, index):
    seed, epoch = key
    found = philox.uniform(
        seed=seed, epoch=epoch, index=np.array([index], np.uint64), stream=philox.PACK_ORDER
    )
    oracle = np.random.Philox(
        key=np.array([seed, epoch], np.uint64),
        counter=np.array([0, philox.PACK_ORDER, index, 0], np.uint64),
    )
    assert found.tolist() == [np.random.Generator(oracle).random()]


def test_uniform_lies_in_the_unit_interval_and_spreads_over_it():
    values = philox.uniform(seed=1, epoch=2, index=np.arange(20_000), stream=3)
    assert values.min() >= 0
    assert values.max() < 1
    found, _ = np.histogram(values, bins=10, range=(0, 1))
    assert found.min() > 1800
    assert found.max() < 2200


@given(strategies.keys(), INDICES)
def test_every_row_of_words_depends_on_its_own_index_only(key, indices):
    seed, epoch = key
    indices = np.array(indices, np.uint64)
    together = philox.words(seed=seed, epoch=epoch, index=indices, stream=2, num_words=6)
    alone = [
        philox.words(seed=seed, epoch=epoch, index=indices[i : i + 1], stream=2, num_words=6)[0]
        for i in range(len(indices))
    ]
    assert together.tolist() == np.stack(alone).tolist()


@given(strategies.keys(), st.lists(strategies.WORDS, min_size=1, max_size=60, unique=True))
def test_permutation_orders_positions_by_numpys_words(key, indices):
    seed, epoch = key
    found = philox.permutation(
        seed=seed, epoch=epoch, index=np.array(indices, np.uint64), stream=philox.ROW_ORDER
    )
    assert found.dtype == np.int64
    assert found.tolist() == naive.seeded_order(seed, epoch, indices, 2)
    assert sorted(found.tolist()) == list(range(len(indices)))


@given(
    strategies.keys(),
    st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=60, unique=True),
    st.data(),
)
def test_the_order_of_a_subset_is_the_whole_order_with_the_others_left_out(key, indices, data):
    seed, epoch = key
    chosen = data.draw(st.lists(st.sampled_from(indices), min_size=1, unique=True))

    def ordered(some):
        order = philox.permutation(seed=seed, epoch=epoch, index=some, stream=0)
        return [some[i] for i in order]

    assert ordered(chosen) == [i for i in ordered(indices) if i in set(chosen)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 1), (1, 0)),
        ((0, 0), (0, 1)),
        ((3, 4), (4, 3)),
        ((0, 2), (1, 1)),
        ((0, 0), (2**63, 0)),
        ((0, 0), (2**32, 0)),
    ],
)
def test_every_seed_and_epoch_have_an_order_of_their_own(one, other):
    first, second = (
        philox.permutation(seed=seed, epoch=epoch, index=np.arange(100), stream=0)
        for seed, epoch in (one, other)
    )
    assert first.tolist() != second.tolist()


def test_streams_never_share_numbers():
    streams = [philox.EXAMPLE_ORDER, philox.PACK_ORDER, philox.ROW_ORDER]
    assert streams == [0, 1, 2]
    found = [philox.words(seed=0, epoch=0, index=np.arange(50), stream=s) for s in streams]
    assert len(np.unique(np.concatenate(found))) == 150


def test_an_empty_index_gives_no_words():
    found = philox.words(seed=0, epoch=0, index=[], stream=0, num_words=4)
    assert found.shape == (0, 4)
    assert philox.permutation(seed=0, epoch=0, index=[], stream=0).shape == (0,)


KEY_REMEDY = "pass a non-negative integer below 2**64"


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        (
            "seed",
            -1,
            ValueError,
            f"seed is -1, expected an integer in 0..{2**64 - 1}; {KEY_REMEDY}",
        ),
        (
            "seed",
            2**64,
            ValueError,
            f"seed is {2**64}, expected an integer in 0..{2**64 - 1}; {KEY_REMEDY}",
        ),
        (
            "seed",
            True,
            TypeError,
            f"seed is True, expected an integer in 0..{2**64 - 1}; {KEY_REMEDY}",
        ),
        (
            "epoch",
            1.0,
            TypeError,
            f"epoch is 1.0, expected an integer in 0..{2**64 - 1}; {KEY_REMEDY}",
        ),
        (
            "epoch",
            "1",
            TypeError,
            f"epoch is '1', expected an integer in 0..{2**64 - 1}; {KEY_REMEDY}",
        ),
        (
            "stream",
            -1,
            ValueError,
            f"stream is -1, expected an integer in 0..{2**64 - 1}; use a stream of philox.py",
        ),
        (
            "num_words",
            -1,
            ValueError,
            f"num_words is -1, expected an integer in 0..{2**31}; ask for fewer words",
        ),
        ("index", [3, -2], ValueError, "index[1] is -2, expected 0 or more; count from zero"),
        (
            "index",
            [0.5],
            TypeError,
            "index.dtype is 'float64', expected an integer dtype; pass example numbers",
        ),
        ("index", [[1]], ValueError, "index.ndim is 2, expected 1; pass example numbers"),
    ],
)
def test_bad_arguments_are_named(argument, value, error, message):
    arguments = {"seed": 0, "epoch": 0, "index": [0], "stream": 0, argument: value}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        philox.words(**arguments)
