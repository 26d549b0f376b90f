"""Random numbers as a function of (seed, epoch, index, stream); no generator state.

Philox-4x64-10 with key (seed, epoch) and counter (block, stream, index, view): any
example's numbers can be computed alone, in any order, on any machine. Blocks count
from 1, because NumPy's ``Philox`` increments its counter before each block; so

    words(Key(s, e), index=[i], stream=t, num_words=n, view=v)[0]
        == np.random.Philox(key=u64(s, e), counter=u64(0, t, i, v)).random_raw(n)

bit for bit (u64 makes a uint64 array); the tests check this. A new decision takes a new
stream number; the numbers below never change meaning. Cost: about 15 to 30 ns for a block of four
words on one core.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), 4.3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import ArrayLike, NDArray

from packpipe import checks

# Streams: the decision that a random word is for. Stored rows depend on these numbers.
EXAMPLE_ORDER = 0
PACK_ORDER = 1
ROW_ORDER = 2
MEMBERS = 3
STEP_PACKS = 4
STEP_ORDER = 5
RESOLUTION = 6
DROP_RATE = 7
KEPT_TOKENS = 8
CROP = 9
# Of augmentation.
FLIP = 32
VERTICAL_FLIP = 33
TURNS = 34
ONE_OF_THREE = 35
GREY = 36
SOLARIZE = 37
BRIGHTNESS = 38
CONTRAST = 39
SATURATION = 40
ERASE = 41
ERASED_BOX = (42, 43, 44, 45)  # area, aspect, top, left
VALIDATION = 48
# Of augmentation: how neighbours are mixed.
MIX = 56
MIX_BY_CUT = 57
MIX_SHARE = 58
MIX_CORNER = (59, 60)  # down, across
TRANSFORM = 64
# Of training.
DROP_PATH = 72
# Of sources in blocks.
BLOCK_ORDER = 80


class Key(NamedTuple):
    """The key of random draws: a seed and an epoch, each in 0..2**64-1."""

    seed: int
    epoch: int


def checked_key(seed: Any, epoch: Any) -> Key:
    """Return the key of a seed and an epoch.

    Raises:
        TypeError: one of them is no integer.
        ValueError: one of them is out of range.
    """
    remedy = "pass a non-negative integer below 2**64"
    return Key(
        checks.whole_number("seed", seed, 0, checks.MAX_WORD, remedy),
        checks.whole_number("epoch", epoch, 0, checks.MAX_WORD, remedy),
    )


# The constants of Philox-4x64. Numba turns uint64 mixed with a plain int into float64, so every
# constant is typed.
_MULTIPLIER_0 = np.uint64(0xD2E7470EE14C6C93)
_MULTIPLIER_1 = np.uint64(0xCA5A826395121157)
_WEYL_0 = np.uint64(0x9E3779B97F4A7C15)
_WEYL_1 = np.uint64(0xBB67AE8584CAA73B)
_FINE_BITS = 11  # a coarse bucket has 2**10 to 2**11 keys on average, sorted by this many bits


@intrinsic
def _high_product(typing_context, a, b):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Return the upper 64 bits of the 128-bit product: one machine instruction.

    With four 32-bit products, which Numba's own integers would need, a block takes four times as
    long.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001
        wide = ir.IntType(128)
        left, right = (builder.zext(argument, wide) for argument in arguments)
        high = builder.lshr(builder.mul(left, right), ir.Constant(wide, 64))
        return builder.trunc(high, ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@njit(inline="always", cache=True)
def _block(seed, epoch, number, stream, index, view):  # type: ignore[no-untyped-def]
    """Return the four words of one block: ten rounds."""
    # A counter word each, so streams, blocks and views never overlap.
    c0, c1, c2, c3 = number, stream, index, view
    k0, k1 = seed, epoch
    for _ in range(10):
        high_0, low_0 = _high_product(_MULTIPLIER_0, c0), _MULTIPLIER_0 * c0
        high_1, low_1 = _high_product(_MULTIPLIER_1, c2), _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += _WEYL_0
        k1 += _WEYL_1
    return c0, c1, c2, c3


@njit(cache=True, nogil=True)
def _fill_words(seed, epoch, index, stream, view, out):  # type: ignore[no-untyped-def]
    """Fill out[i] with the words of index[i]; O(index * words / 4) blocks.

    A single view is that of all.
    """
    num_words = out.shape[1]
    step = 1 if view.shape[0] > 1 else 0
    for i in range(index.shape[0]):
        # A block is made whole; words of the last one that were not asked for are dropped.
        for first in range(0, num_words, 4):
            own = view[i * step]
            block = _block(seed, epoch, np.uint64(first // 4 + 1), stream, index[i], own)
            out[i, first] = block[0]
            if first + 1 < num_words:
                out[i, first + 1] = block[1]
            if first + 2 < num_words:
                out[i, first + 2] = block[2]
            if first + 3 < num_words:
                out[i, first + 3] = block[3]


@njit(cache=True, nogil=True)
def _fill_subsets(seed, epoch, index, stream, view, num_items, num_chosen, out):  # type: ignore[no-untyped-def]
    """Fill out with the chosen items of each index, in rising order, index after index.

    Selection sampling (Knuth 3.4.2, algorithm S): item t of n is taken with probability (items
    still to choose) ÷ (items not seen yet), decided by word t. O(words) / 4 blocks. A single view
    is that of all.
    """
    step = 1 if view.shape[0] > 1 else 0
    place = 0
    for i in range(index.shape[0]):
        missing = num_chosen[i]
        # All items are chosen, so no random words are needed.
        if missing == num_items[i]:
            for item in range(missing):
                out[place + item] = item
            place += missing
            continue
        item = 0
        while missing:
            own = view[i * step]
            block = _block(seed, epoch, np.uint64(item // 4 + 1), stream, index[i], own)
            for word in range(4):
                unseen = np.uint64(num_items[i] - item)
                # word · unseen / 2**64 is a uniform number in 0..unseen-1, without a division or
                # floats.
                if missing and _high_product(block[word], unseen) < np.uint64(missing):
                    out[place] = item
                    place += 1
                    missing -= 1
                item += 1


@njit(cache=True, nogil=True)
def _sort_words(keys, starts, sorted_keys, fine_starts, spare, spare_keys, order):  # type: ignore[no-untyped-def]
    """Fill order with the positions of the keys in rising order; equal keys keep their order.

    Random keys are evenly spread, so their leading bits sort them almost: first into buckets of
    some 2**(_FINE_BITS - 1) keys, which fit into the cache, then each bucket by the next bits. An
    insertion sort moves what is left by a place or two. O(keys); takes a seventh of NumPy's time
    for 16 million keys.

    Invariant: the bucket of bits b is filled from starts[b] on, in the order of the keys.
    """
    bits = 0
    while 2**bits < starts.shape[0] - 1:
        bits += 1
    for key in keys:
        # Counted one bucket further on, so that the running sum gives each bucket's start.
        starts[_leading(key, 0, bits) + 1] += 1
    for bucket in range(1, starts.shape[0]):
        starts[bucket] += starts[bucket - 1]
    for i in range(keys.shape[0]):
        bucket = _leading(keys[i], 0, bits)
        order[starts[bucket]] = i
        sorted_keys[starts[bucket]] = keys[i]
        starts[bucket] += 1
    first = 0
    for bucket in range(starts.shape[0] - 1):
        # starts[bucket] has moved on to the end of the bucket. A bucket that is larger than the
        # spare tables, which random keys do not give, is sorted by insertion alone.
        last = starts[bucket]
        if last - first <= spare.shape[0]:
            # Every cell carries `first`, so the running sum takes it off once for each cell. Number
            # by number: array slices made compiling this kernel four times as slow.
            for cell in range(fine_starts.shape[0]):
                fine_starts[cell] = first
            for i in range(first, last):
                fine_starts[_leading(sorted_keys[i], bits, _FINE_BITS) + 1] += 1
            for cell in range(1, fine_starts.shape[0]):
                fine_starts[cell] += fine_starts[cell - 1] - first
            for i in range(last - first):
                spare[i], spare_keys[i] = order[first + i], sorted_keys[first + i]
            for i in range(last - first):
                cell = _leading(spare_keys[i], bits, _FINE_BITS)
                order[fine_starts[cell]] = spare[i]
                sorted_keys[fine_starts[cell]] = spare_keys[i]
                fine_starts[cell] += 1
        for i in range(first + 1, last):
            moved, key = order[i], sorted_keys[i]
            place = i
            while place > first and sorted_keys[place - 1] > key:
                order[place] = order[place - 1]
                sorted_keys[place] = sorted_keys[place - 1]
                place -= 1
            order[place] = moved
            sorted_keys[place] = key
        first = last


@njit(inline="always", cache=True)
def _leading(key, skipped, bits):  # type: ignore[no-untyped-def]
    """Return `bits` bits of a key, after the first `skipped` ones."""
    # Two shifts to the right, since with bits = 0 a single one by 64 would be undefined.
    return np.int64((key << np.uint64(skipped)) >> np.uint64(63 - bits) >> np.uint64(1))


def words(
    key: Key, *, index: ArrayLike, stream: int, num_words: int = 1, view: ArrayLike = 0
) -> NDArray[np.uint64]:
    """Return uint64[len(index), num_words] random words, each row a function of its index.

    Args:
        key: seed and epoch.
        index: int[n], numbers of examples (or packs, or rows), not negative.
        stream: the decision that the words are for.
        num_words: number of words for each index.
        view: which of an example's draws, 0 for the only one: one number for all, or int[n].

    Raises:
        ValueError: the key, stream, view or an index is out of range.
        TypeError: one of them is no integer.
    """
    seed, epoch = checked_key(*key)
    stream = checks.whole_number("stream", stream, 0, checks.MAX_WORD, "use a stream of philox.py")
    num_words = checks.whole_number("num_words", num_words, 0, 2**31, "ask for fewer words")
    array = checks.integer_array("index", index, 1, "pass example numbers")
    if array.size and array.min() < 0:
        where = int(np.flatnonzero(array < 0)[0])
        raise ValueError(
            checks.sentence(f"index[{where}]", int(array[where]), "0 or more", "count from zero")
        )
    out = np.empty((array.shape[0], num_words), np.uint64)
    numbers = array.astype(np.uint64)
    views = _checked_views(view, len(array))
    _fill_words(np.uint64(seed), np.uint64(epoch), numbers, np.uint64(stream), views, out)
    return out


def _checked_views(view: ArrayLike, number: int) -> NDArray[np.uint64]:
    """Return uint64[number], the view of each, or uint64[1], that of all."""
    remedy = "count views from zero"
    if np.ndim(view) == 0:
        return np.array([checks.whole_number("view", view, 0, checks.MAX_WORD, remedy)], np.uint64)
    array = checks.integer_array("view", view, 1, remedy)
    if len(array) != number:
        raise ValueError(
            checks.sentence("len(view)", len(array), f"{number} (index)", "one view an index")
        )
    if array.size and array.min() < 0:
        raise ValueError(checks.sentence("view", int(array.min()), "0 or more", remedy))
    return array.astype(np.uint64)


def uniform(key: Key, *, index: ArrayLike, stream: int, view: ArrayLike = 0) -> NDArray[np.float64]:
    """Return float64[len(index)] uniform on [0, 1): the top 53 bits of each first word.

    Every value drawn from a distribution is ``distribution.quantile(uniform(...))``.

    Raises:
        ValueError: the key, stream, view or an index is out of range.
        TypeError: one of them is no integer.
    """
    first = words(key, index=index, stream=stream, view=view)[:, 0]
    return uniform_from(first)


def generator(key: Key, index: int, *, stream: int, view: int = 0) -> np.random.Generator:
    """Return NumPy's generator of the random words of an index: the same that `words` returns.

    >>> rng = generator(Key(0, 0), 7, stream=TRANSFORM)
    >>> raw = rng.bit_generator.random_raw(4)
    >>> bool((raw == words(Key(0, 0), index=[7], stream=TRANSFORM, num_words=4)[0]).all())
    True
    """
    counter = np.array([0, stream, index, view], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=counter))


def uniform_from(random_words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the top 53 bits of each word, all that float64 holds, as a number in [0, 1)."""
    return (random_words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def subsets(
    key: Key,
    *,
    index: NDArray[np.integer],
    stream: int,
    num_items: NDArray[np.integer],
    num_chosen: NDArray[np.integer],
    view: ArrayLike = 0,
) -> NDArray[np.int32]:
    """Return int32[sum(num_chosen)]: for each index, num_chosen of its items 0, 1, ..., rising.

    Uniform without replacement (up to 2**-64 times num_items); each subset is a function of its
    index and view alone. Only the key and the views are checked.

    Args:
        key: seed and epoch.
        index: int[n], numbers of examples, not negative.
        stream: the decision that the words are for.
        num_items: int[n], items to choose from, below 2**31.
        num_chosen: int[n], items to choose, 0..num_items.
        view: which of an example's draws: one number for all, or int[n].
    """
    seed, epoch = map(np.uint64, checked_key(*key))
    chosen = np.ascontiguousarray(num_chosen, np.int64)
    out = np.empty(int(chosen.sum()), np.int32)
    items = np.ascontiguousarray(num_items, np.int64)
    views = _checked_views(view, len(index))
    numbers = index.astype(np.uint64)
    _fill_subsets(seed, epoch, numbers, np.uint64(stream), views, items, chosen, out)
    return out


def permutation(key: Key, *, index: ArrayLike, stream: int) -> NDArray[np.int64]:
    """Return the positions of index in seeded order: an argsort of one word per index.

    The order of a subset is the order of the whole with the others left out, so a shard
    needs to know only its own examples. Equal words (probability n²/2**65) keep their order.

    Raises:
        ValueError: the key, stream or an index is out of range.
        TypeError: one of them is no integer.
    """
    keys = words(key, index=index, stream=stream)[:, 0]
    num_buckets = 2 ** max(0, len(keys).bit_length() - _FINE_BITS)
    order = np.empty(len(keys), np.int64)
    coarse = np.zeros(num_buckets + 1, np.int64), np.empty(len(keys), np.uint64)
    fine = np.zeros(2**_FINE_BITS + 1, np.int64)
    # Four to eight times the average bucket.
    spare = np.empty(2 ** (_FINE_BITS + 2), np.int64)
    _sort_words(keys, *coarse, fine, spare, spare.astype(np.uint64), order)
    return order
