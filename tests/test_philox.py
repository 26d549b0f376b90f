from __future__ import annotations

import re

import naive
import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st

from packpipe import philox
from packpipe.philox import Key

INDICES = st.lists(strategies.WORDS, min_size=1, max_size=20)


@given(
    strategies.keys(),
    strategies.WORDS,
    strategies.WORDS,
    st.integers(1, 23),
    strategies.WORDS,
)
@example((0, 0), 0, 0, 4, 0)
@example((2**64 - 1, 2**64 - 1), 2**64 - 1, 2**64 - 1, 23, 2**64 - 1)
@example((2**63, 1), 1, 2**63, 5, 1)
def test_words_are_numpys_philox_bit_for_bit(key, index, stream, num_words, view):
    seed, epoch = key
    found = philox.words(
        Key(seed, epoch),
        index=np.array([index], np.uint64),
        stream=stream,
        num_words=num_words,
        view=view,
    )
    oracle = np.random.Philox(
        key=np.array([seed, epoch], np.uint64),
        counter=np.array([0, stream, index, view], np.uint64),
    )
    assert found.dtype == np.uint64
    assert found.shape == (1, num_words)
    assert found[0].tolist() == oracle.random_raw(num_words).tolist()


def test_the_only_view_is_the_first():
    first, second = (
        philox.words(Key(1, 2), index=np.arange(50), stream=3, view=view) for view in range(2)
    )
    assert first.tolist() == philox.words(Key(1, 2), index=np.arange(50), stream=3).tolist()
    assert not np.isin(first, second).any()


@given(strategies.keys(), strategies.WORDS)
def test_uniform_is_numpys_first_random_number(key, index):
    seed, epoch = key
    found = philox.uniform(
        Key(seed, epoch), index=np.array([index], np.uint64), stream=philox.PACK_ORDER
    )
    oracle = np.random.Philox(
        key=np.array([seed, epoch], np.uint64),
        counter=np.array([0, philox.PACK_ORDER, index, 0], np.uint64),
    )
    assert found.tolist() == [np.random.Generator(oracle).random()]


def test_uniform_lies_in_the_unit_interval_and_spreads_over_it():
    values = philox.uniform(Key(1, 2), index=np.arange(20_000), stream=3)
    assert values.min() >= 0
    assert values.max() < 1
    found, _ = np.histogram(values, bins=10, range=(0, 1))
    assert found.min() > 1800
    assert found.max() < 2200


@given(strategies.keys(), INDICES)
def test_every_row_of_words_depends_on_its_own_index_only(key, indices):
    seed, epoch = key
    indices = np.array(indices, np.uint64)
    together = philox.words(Key(seed, epoch), index=indices, stream=2, num_words=6)
    alone = [
        philox.words(Key(seed, epoch), index=indices[i : i + 1], stream=2, num_words=6)[0]
        for i in range(len(indices))
    ]
    assert together.tolist() == np.stack(alone).tolist()


@given(strategies.keys(), st.lists(strategies.WORDS, min_size=1, max_size=60, unique=True))
def test_permutation_orders_positions_by_numpys_words(key, indices):
    seed, epoch = key
    found = philox.permutation(
        Key(seed, epoch), index=np.array(indices, np.uint64), stream=philox.ROW_ORDER
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
        order = philox.permutation(Key(seed, epoch), index=some, stream=0)
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
        philox.permutation(Key(seed, epoch), index=np.arange(100), stream=0)
        for seed, epoch in (one, other)
    )
    assert first.tolist() != second.tolist()


STREAMS = [
    philox.EXAMPLE_ORDER,
    philox.PACK_ORDER,
    philox.ROW_ORDER,
    philox.MEMBERS,
    philox.STEP_PACKS,
    philox.STEP_ORDER,
    philox.RESOLUTION,
    philox.DROP_RATE,
    philox.KEPT_TOKENS,
    philox.CROP,
]


def test_streams_never_share_numbers_and_never_change_theirs():
    assert STREAMS == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    found = [philox.words(Key(0, 0), index=np.arange(50), stream=s) for s in STREAMS]
    assert len(np.unique(np.concatenate(found))) == 500


SIZES = sorted(
    {2**power + off for power in range(1, 19) for off in (-1, 0, 1)} | {3 * 2**14, 300_001}
)


@pytest.mark.parametrize("size", SIZES)
def test_a_permutation_of_any_size_is_the_argsort_of_the_words(size):
    index = np.arange(size) * 3
    keys = philox.words(Key(size, 1), index=index, stream=0)[:, 0]
    found = philox.permutation(Key(size, 1), index=index, stream=0)
    assert (found == np.argsort(keys, kind="stable")).all()


def sorted_positions(keys, bits):
    """What the kernel says of some keys, dealt out to 2**bits buckets first."""
    keys = np.array(keys, np.uint64)
    order = np.full(len(keys), -1)
    sorted_keys = np.zeros(len(keys), np.uint64)
    spare = np.empty(2**13, np.int64)
    philox._sort_words(
        keys,
        np.zeros(2**bits + 1, np.int64),
        sorted_keys,
        np.zeros(2**11 + 1, np.int64),
        spare,
        spare.astype(np.uint64),
        order,
    )
    assert (sorted_keys == keys[order]).all()
    return order.tolist()


# Keys that agree in their first bits, in all, or in none.
CLUSTERS = st.one_of(
    strategies.WORDS,
    st.integers(0, 5),
    st.integers(2**64 - 5, 2**64 - 1),
    st.integers(2**53 - 3, 2**53 + 3),
    st.integers(0, 63).map(lambda bit: 2**bit),
)


@given(st.lists(CLUSTERS, max_size=80), st.integers(0, 10))
@example([2**64 - 1, 0, 2**63, 2**63 - 1], 0)
@example([1, 0], 10)
@example([7] * 5 + [2**63] * 5 + [7] * 5, 3)
def test_equal_and_clustered_keys_are_sorted_too_and_equal_ones_as_they_come(keys, bits):
    wanted = sorted(range(len(keys)), key=keys.__getitem__)  # sorted() is stable
    assert sorted_positions(keys, bits) == wanted


@pytest.mark.parametrize(
    "clustered",
    [
        np.zeros,  # all alike
        lambda size: np.arange(size)[::-1] // 3,  # in one bucket, more than fit into the cache
        lambda size: np.arange(size) % 7 * 2**61,
        lambda size: np.where(np.arange(size) % 100, np.uint64(2**63), np.arange(size)),
        lambda size: np.random.default_rng(1).integers(0, 2**44, size) << 20,
    ],
    ids=["equal", "falling", "seven", "one in a hundred", "even"],
)
def test_many_clustered_keys_are_sorted_too(clustered):
    keys = clustered(12_000).astype(np.uint64)
    assert sorted_positions(keys, 3) == np.argsort(keys, kind="stable").tolist()


@st.composite
def subset_cases(draw):
    index = draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=10))
    num_items = [draw(st.integers(0, 40)) for _ in index]
    return index, num_items, [draw(st.integers(0, n)) for n in num_items]


@given(strategies.keys(), subset_cases(), strategies.WORDS)
@example((0, 0), ([1, 2, 3], [5, 0, 9], [5, 0, 0]), 8)
@example((2**64 - 1, 7), ([2**63 - 1], [7], [6]), 2**64 - 1)
def test_subsets_are_chosen_by_numpys_words(key, case, stream):
    index, num_items, num_chosen = case
    found = philox.subsets(
        Key(*key),
        index=np.array(index),
        stream=stream,
        num_items=np.array(num_items),
        num_chosen=np.array(num_chosen),
    )
    wanted = [naive.subset(*key, i, stream, n, k) for i, n, k in zip(*case, strict=True)]
    assert found.dtype == np.int32
    assert found.tolist() == [item for subset in wanted for item in subset]
    assert list(map(len, wanted)) == num_chosen


@pytest.mark.parametrize("name", ["seed", "epoch"])
def test_subsets_check_their_key(name):
    key = Key(**{"seed": 0, "epoch": 0, name: -1})
    one = np.ones(1, np.int64)
    message = f"{name} is -1, expected an integer in 0..{2**64 - 1}; {KEY_REMEDY}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        philox.subsets(key, index=one, stream=8, num_items=one, num_chosen=one)


def test_an_empty_index_gives_no_words():
    found = philox.words(Key(0, 0), index=[], stream=0, num_words=4)
    assert found.shape == (0, 4)
    assert philox.permutation(Key(0, 0), index=[], stream=0).shape == (0,)


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
        (
            "view",
            -1,
            ValueError,
            f"view is -1, expected an integer in 0..{2**64 - 1}; count views from zero",
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
    key = Key(arguments.pop("seed"), arguments.pop("epoch"))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        philox.words(key, **arguments)
