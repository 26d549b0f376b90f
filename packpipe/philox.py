"""Random numbers addressed by (seed, epoch, index, stream), never drawn in turn (floor 0).

Philox-4x64-10 with key (seed, epoch) and counter (block, stream, index, 0): any
example's numbers can be computed alone, in any order, on any machine. Blocks count
from 1, because NumPy's ``Philox`` steps its counter before each block; so

    words(seed=s, epoch=e, index=[i], stream=t, num_words=n)[0]
        == np.random.Philox(key=u64(s, e), counter=u64(0, t, i, 0)).random_raw(n)

bit for bit (u64 makes a uint64 array), which is how it is tested. A new decision takes a new
stream number; the numbers below never change meaning. Cost: about 0.1 µs a block of four words on
one core.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), 4.3.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from packpipe import checks

# Streams: which decision a random word is for.
EXAMPLE_ORDER = 0
PACK_ORDER = 1
ROW_ORDER = 2
MEMBERS = 3
STEP_PACKS = 4
STEP_ORDER = 5

# Numba turns uint64 mixed with a plain int into float64, so every constant is typed.
_MULTIPLIER_0 = np.uint64(0xD2E7470EE14C6C93)
_MULTIPLIER_1 = np.uint64(0xCA5A826395121157)
_WEYL_0 = np.uint64(0x9E3779B97F4A7C15)
_WEYL_1 = np.uint64(0xBB67AE8584CAA73B)
_LOW_32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ZERO = np.uint64(0)


@njit(inline="always", cache=True)
def _high_product(a, b):  # type: ignore[no-untyped-def]
    """Return the upper 64 bits of the 128-bit product, from four 32-bit products."""
    a_low, a_high = a & _LOW_32, a >> _32
    b_low, b_high = b & _LOW_32, b >> _32
    middle = a_high * b_low + ((a_low * b_low) >> _32)
    return a_high * b_high + (middle >> _32) + ((a_low * b_high + (middle & _LOW_32)) >> _32)


@njit(cache=True)
def _fill_words(seed, epoch, index, stream, out):  # type: ignore[no-untyped-def]
    """Fill out[i] with the words of index[i]; O(index * words / 4) blocks of ten rounds."""
    num_words = out.shape[1]
    for i in range(index.shape[0]):
        for first in range(0, num_words, 4):
            c0, c1, c2, c3 = np.uint64(first // 4 + 1), stream, index[i], _ZERO
            k0, k1 = seed, epoch
            for _ in range(10):
                high_0, low_0 = _high_product(_MULTIPLIER_0, c0), _MULTIPLIER_0 * c0
                high_1, low_1 = _high_product(_MULTIPLIER_1, c2), _MULTIPLIER_1 * c2
                c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
                k0 += _WEYL_0
                k1 += _WEYL_1
            out[i, first] = c0
            if first + 1 < num_words:
                out[i, first + 1] = c1
            if first + 2 < num_words:
                out[i, first + 2] = c2
            if first + 3 < num_words:
                out[i, first + 3] = c3


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


def permutation(*, seed: int, epoch: int, index: ArrayLike, stream: int) -> NDArray[np.int64]:
    """Return the positions of index in seeded order: an argsort of one word per index.

    The order of a subset is the order of the whole with the others left out, so a shard
    needs to know only its own examples. Equal words (odds n²/2**65) keep their position.
    Raises as `words`.
    """
    keys = words(seed=seed, epoch=epoch, index=index, stream=stream)[:, 0]
    return np.argsort(keys, kind="stable")
