"""Random numbers addressed by (seed, epoch, index, stream), never drawn in turn.

Philox-4x64-10 with key (seed, epoch) and counter (block, stream, index, 0): any
example's numbers can be computed alone, in any order, on any machine. Blocks count
from 1, because NumPy's ``Philox`` steps its counter before each block; so

    words(seed=s, epoch=e, index=[i], stream=t, num_words=n)[0]
        == np.random.Philox(key=u64(s, e), counter=u64(0, t, i, 0)).random_raw(n)

bit for bit (u64 makes a uint64 array), which is how it is tested. A new decision takes a new
stream number; the numbers below never change meaning. Cost: about 15 to 30 ns a block of four
words on one core.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), 4.3.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import ArrayLike, NDArray

from packpipe import checks

# Streams: which decision a random word is for.
EXAMPLE_ORDER = 0
PACK_ORDER = 1
ROW_ORDER = 2
MEMBERS = 3
STEP_PACKS = 4
STEP_ORDER = 5
RESOLUTION = 6
DROP_RATE = 7
KEPT_TOKENS = 8

# Numba turns uint64 mixed with a plain int into float64, so every constant is typed.
_MULTIPLIER_0 = np.uint64(0xD2E7470EE14C6C93)
_MULTIPLIER_1 = np.uint64(0xCA5A826395121157)
_WEYL_0 = np.uint64(0x9E3779B97F4A7C15)
_WEYL_1 = np.uint64(0xBB67AE8584CAA73B)
_ZERO = np.uint64(0)
_FINE_BITS = 11


@intrinsic
def _high_product(typing_context, a, b):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Return the upper 64 bits of the 128-bit product: one machine instruction.

    From four 32-bit products, as Numba's own integers would need, a block takes four times as long.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001
        wide = ir.IntType(128)
        left, right = (builder.zext(argument, wide) for argument in arguments)
        high = builder.lshr(builder.mul(left, right), ir.Constant(wide, 64))
        return builder.trunc(high, ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@njit(inline="always", cache=True)
def _block(seed, epoch, number, stream, index):  # type: ignore[no-untyped-def]
    """Return the four words of one block: ten rounds."""
    c0, c1, c2, c3 = number, stream, index, _ZERO
    k0, k1 = seed, epoch
    for _ in range(10):
        high_0, low_0 = _high_product(_MULTIPLIER_0, c0), _MULTIPLIER_0 * c0
        high_1, low_1 = _high_product(_MULTIPLIER_1, c2), _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += _WEYL_0
        k1 += _WEYL_1
    return c0, c1, c2, c3


@njit(cache=True, nogil=True)
def _fill_words(seed, epoch, index, stream, out):  # type: ignore[no-untyped-def]
    """Fill out[i] with the words of index[i]; O(index * words / 4) blocks."""
    num_words = out.shape[1]
    for i in range(index.shape[0]):
        for first in range(0, num_words, 4):
            block = _block(seed, epoch, np.uint64(first // 4 + 1), stream, index[i])
            out[i, first] = block[0]
            if first + 1 < num_words:
                out[i, first + 1] = block[1]
            if first + 2 < num_words:
                out[i, first + 2] = block[2]
            if first + 3 < num_words:
                out[i, first + 3] = block[3]


@njit(cache=True, nogil=True)
def _fill_subsets(seed, epoch, index, stream, num_items, num_chosen, out):  # type: ignore[no-untyped-def]
    """Fill out with the chosen items of each index, in rising order, one after the other.

    Selection sampling (Knuth 3.4.2, algorithm S): item t of n is taken with probability (still to
    choose) ÷ (still to see), decided by word t. O(words) / 4 blocks.
    """
    place = 0
    for i in range(index.shape[0]):
        missing = num_chosen[i]
        if missing == num_items[i]:
            for item in range(missing):
                out[place + item] = item
            place += missing
            continue
        item = 0
        while missing:
            block = _block(seed, epoch, np.uint64(item // 4 + 1), stream, index[i])
            for word in range(4):
                unseen = np.uint64(num_items[i] - item)
                if missing and _high_product(block[word], unseen) < np.uint64(missing):
                    out[place] = item
                    place += 1
                    missing -= 1
                item += 1


@njit(cache=True, nogil=True)
def _sort_words(keys, starts, sorted_keys, fine_starts, spare, spare_keys, order):  # type: ignore[no-untyped-def]
    """Fill order with the positions of the keys in rising order, equal ones as they come.

    Keys are spread evenly, so their leading bits sort them almost: dealt out to buckets of some
    2**(_FINE_BITS - 1), which fit into the cache, each of these dealt out by the bits that follow,
    and what is left moved a step or two. O(keys); a seventh of NumPy's time for 16 million.

    Invariant: the bucket of bits b is filled from starts[b] on, in the order of the keys.
    """
    bits = 0
    while 2**bits < starts.shape[0] - 1:
        bits += 1
    for key in keys:
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
        last = starts[bucket]
        if last - first <= spare.shape[0]:
            fine_starts[:] = first
            for i in range(first, last):
                fine_starts[_leading(sorted_keys[i], bits, _FINE_BITS) + 1] += 1
            for cell in range(1, fine_starts.shape[0]):
                fine_starts[cell] += fine_starts[cell - 1] - first
            spare[: last - first] = order[first:last]
            spare_keys[: last - first] = sorted_keys[first:last]
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
    """Return the bits that follow the first skipped ones; a shift by 64 would be undefined."""
    return np.int64((key << np.uint64(skipped)) >> np.uint64(63 - bits) >> np.uint64(1))


def words(
    *, seed: int, epoch: int, index: ArrayLike, stream: int, num_words: int = 1
) -> NDArray[np.uint64]:
    """Return uint64[len(index), num_words] random words, each row a function of its index.

    Args:
        seed: first key word, 0..2**64-1.
        epoch: second key word, 0..2**64-1.
        index: int[n] example (or pack, or row) numbers, not negative.
        stream: which decision the words are for.
        num_words: words an index.

    Raises:
        ValueError: seed, epoch, stream or an index is out of range.
        TypeError: one of them is no integer.
    """
    seed, epoch = checks.seed_and_epoch(seed, epoch)
    stream = checks.whole_number("stream", stream, 0, checks.MAX_WORD, "use a stream of philox.py")
    num_words = checks.whole_number("num_words", num_words, 0, 2**31, "ask for fewer words")
    array = checks.integer_array("index", index, 1, "pass example numbers")
    if array.size and array.min() < 0:
        where = int(np.flatnonzero(array < 0)[0])
        raise ValueError(
            checks.sentence(f"index[{where}]", int(array[where]), "0 or more", "count from zero")
        )
    out = np.empty((array.shape[0], num_words), np.uint64)
    key = np.uint64(seed), np.uint64(epoch)
    _fill_words(*key, array.astype(np.uint64), np.uint64(stream), out)
    return out


def uniform(*, seed: int, epoch: int, index: ArrayLike, stream: int) -> NDArray[np.float64]:
    """Return float64[len(index)] uniform on [0, 1): the top 53 bits of each first word.

    Any random value in packpipe is ``distribution.quantile(uniform(...))``. Raises as `words`.
    """
    first = words(seed=seed, epoch=epoch, index=index, stream=stream)[:, 0]
    return uniform_from(first)


def uniform_from(random_words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the top 53 bits of each word as a number in [0, 1)."""
    return (random_words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def subsets(
    *,
    seed: int,
    epoch: int,
    index: NDArray[np.integer],
    stream: int,
    num_items: NDArray[np.integer],
    num_chosen: NDArray[np.integer],
) -> NDArray[np.int32]:
    """Return int32[sum(num_chosen)]: of each index's items 0, 1, ... as many as asked, rising.

    Uniform without replacement (to 2**-64 times num_items), each subset a function of its index
    alone. Arguments are trusted, but for the key.

    Args:
        seed: as for `words`.
        epoch: likewise.
        index: int[n], likewise.
        stream: likewise.
        num_items: int[n], items to choose from, below 2**31.
        num_chosen: int[n], 0..num_items.
    """
    seed, epoch = checks.seed_and_epoch(seed, epoch)
    chosen = np.ascontiguousarray(num_chosen, np.int64)
    out = np.empty(int(chosen.sum()), np.int32)
    items = np.ascontiguousarray(num_items, np.int64)
    key = np.uint64(seed), np.uint64(epoch)
    _fill_subsets(*key, index.astype(np.uint64), np.uint64(stream), items, chosen, out)
    return out


def permutation(*, seed: int, epoch: int, index: ArrayLike, stream: int) -> NDArray[np.int64]:
    """Return the positions of index in seeded order: an argsort of one word per index.

    The order of a subset is the order of the whole with the others left out, so a shard
    needs to know only its own examples. Equal words (odds n²/2**65) keep their position.
    Raises as `words`.
    """
    keys = words(seed=seed, epoch=epoch, index=index, stream=stream)[:, 0]
    num_buckets = 2 ** max(0, len(keys).bit_length() - _FINE_BITS)
    order = np.empty(len(keys), np.int64)
    coarse = np.zeros(num_buckets + 1, np.int64), np.empty(len(keys), np.uint64)
    fine = np.zeros(2**_FINE_BITS + 1, np.int64)
    spare = np.empty(2 ** (_FINE_BITS + 2), np.int64)
    _sort_words(keys, *coarse, fine, spare, spare.astype(np.uint64), order)
    return order
