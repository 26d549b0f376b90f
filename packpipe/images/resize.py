"""Resizes pixels of 8 bits: antialiased, turned upright, and cut into tiles, without Pillow.

One filter an axis, with Pillow's weights: down the columns and then across the rows, where Pillow
goes across first; across first only where down first would leave more than `_WIDE` times as much
between them. Both passes read whole rows, one after the other, so they run at the speed of vectors:
between them the pixels are turned, and the last step turns them back, or not, while it cuts them
into tiles. So an EXIF orientation costs nothing: a mirrored axis has its weights in reverse, and a
quarter turn saves a turn. Columns that keep their size are not turned, which takes a quarter of the
time. Some rows at a time go through all steps: what lies between stays in the cache, and takes
little memory, which a system hands out anew, and slowly, where it is large.

Sums are of integers: a weight is a whole number of 2**-bits, and the weights of a pixel sum to 1
(with weights of 14 bits to a little less, on purpose: products by 0 then sum to what others do).
So one colour stays that colour, and the bytes are the same on every machine, whatever its vectors
(the sines of "lanczos" and "hamming" are the C library's, and their last bit is far below a
weight's). A pixel of up to 8 weights, as after decoding at a fraction, has weights of 14 bits and
sums of 16, which takes about half as long as others, with up to 22 bits and sums of 32; where it
has but 6, as of a scale up to 5/4, two products are left out.

A result may differ from that of Pillow's weights, of 22 bits, by one level in each pass: on noise
up to 6 % of levels do, if Pillow is told to go the same way. From a single resize of Pillow's,
which goes across first and rounds in between, up to 38 % of noise differ: most by a level, some by
up to 44 where it grows, since a level beyond 0 or 255 is cut off in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from packpipe.images.geometry import Box

FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
_SUPPORT = (0.0, 0.5, 1.0, 1.0, 2.0, 3.0)  # source pixels on either side, of each filter
_NEAREST, _BOX, _BILINEAR, _HAMMING, _BICUBIC, _LANCZOS = range(len(FILTERS))
_FEW, _FEW_BITS = 8, 14  # weights of a pixel whose sums take 16 bits, and bits of a weight
_SHIFT = 7  # of levels that are multiplied by them
_LEFT = _FEW_BITS + _SHIFT - 16  # of it, in the upper half of a product
# For the shift that rounds down; and a product is half a unit too low in the mean.
_HALF = (1 << (_LEFT - 1)) + _FEW // 2
_MOST_BITS = 22  # with them a sum of 255s, some of them negative, is below 2**31
_LARGEST = 32000.0  # of a weight of 16 bits, leaving room for what makes the sum right
_WIDE = 2
_LANES = 4  # bytes that a pixel of RGB takes while it is turned: a word is moved at once
_BLOCK_BYTES = 2**18  # of rows that are made together: what lies between stays in the cache
_LEAST = 16  # rows that are made together
_MOST_KEPT = 4096  # pixels of an axis, before and after, whose weights are kept: 98 KB at most
# One type for rows that can be written and for those that cannot: each would take 2 s to compile.
_BLEND = types.void(
    types.Array(types.uint8, 2, "C", readonly=True),
    types.int64,
    types.int64[::1],
    types.int16[:, ::1],
    types.int64,
    types.uint8[:, ::1],
)

_FLIPPED_ACROSS, _FLIPPED_DOWN, _FIRST_TURNED = (2, 3, 7, 8), (3, 4, 6, 7), 5


def resize(
    pixels: NDArray[np.uint8],
    box: Box,
    tiles: NDArray[np.uint8],
    *,
    downscale_filter: str,
    upscale_filter: str,
    orientation: int = 1,
) -> None:
    """Write a part of an image, resized and turned upright, into tiles.

    Args:
        pixels: uint8[height, width] of grey or uint8[height, width, 3], as stored. Those outside of
            the box, but for parts of pixels, do not matter.
        box: (left, top, right, bottom) of the part in pixels, also in parts of one.
        tiles: uint8[rows, columns, tile height, tile width, 3], contiguous: the result, cut into
            rows x columns tiles of one size. ``[1, 1, height, width, 3]`` is the result whole.
        downscale_filter: of an axis that shrinks or keeps its size, one of `FILTERS`.
        upscale_filter: of an axis that grows.
        orientation: EXIF orientation of the pixels, 1..8.
    """
    rows, columns, tile_height, tile_width, _ = tiles.shape
    height, width = rows * tile_height, columns * tile_width
    is_turned = orientation >= _FIRST_TURNED
    if is_turned:
        height, width = width, height
    left, top, right, bottom = box
    first, last = math.floor(left), math.ceil(right)
    source = pixels[math.floor(top) : math.ceil(bottom)].reshape(-1, *pixels.shape[1:])
    source = source if source.ndim == 3 else source[..., None]
    down = (float(top - math.floor(top)), float(bottom - math.floor(top)), height)
    across = (float(left - first), float(right - first), width)
    flips = orientation in _FLIPPED_DOWN, orientation in _FLIPPED_ACROSS
    if height * (last - first) > _WIDE * width * len(source):
        source = source[:, first:last].swapaxes(0, 1)
        first, last = 0, source.shape[1]
        down, across, flips, is_turned = across, down, flips[::-1], not is_turned
    source = np.ascontiguousarray(source).view()
    source.setflags(write=False)  # as some are, so that Numba compiles for one type alone
    weights = []
    for n_in, (low, high, n_out), is_flipped in zip(
        (len(source), last - first), (down, across), flips, strict=True
    ):
        is_short = max(n_in, n_out) <= _MOST_KEPT
        make: Callable[..., Any] = _kept_weights if is_short else _weights
        kind = FILTERS.index(upscale_filter if n_out > high - low else downscale_filter)
        weights.append(make(n_in, low, high, n_out, kind, is_flipped))
    _resized(source, first, last, weights[0], weights[1], is_turned, tiles)


@njit(cache=True, nogil=True)
def _weights(n_in, low, high, n_out, kind, is_flipped):  # type: ignore[no-untyped-def]
    """Return (starts, weights, bits): int64[n_out], int16[n_out, taps] in units of 2**-bits.

    Pixel o of n_out is the sum over k of weight [o, k] times pixel starts[o] + k of n_in.

    Source: Pillow's ``precompute_coeffs``, from which weights differ by their rounding.
    """
    scale = (high - low) / n_out
    stretch = max(scale, 1.0)
    support = _SUPPORT[kind] * stretch
    is_moved = scale == 1.0 and low == math.floor(low)  # every filter then takes each pixel itself
    single = kind == _NEAREST or is_moved
    taps = 1
    if not single:
        for place in range(n_out):
            centre = low + (place + 0.5) * scale
            begin, end = int(centre - support + 0.5), int(centre + support + 0.5)
            taps = max(taps, min(end, n_in) - max(begin, 0))
    if 1 < taps <= _FEW <= n_in:
        taps = _FEW
    starts = np.zeros(n_out, np.int64)
    shares = np.zeros((n_out, taps), np.float64)
    largest = 0.0
    for place in range(n_out):
        o = n_out - 1 - place if is_flipped else place
        centre = low + (place + 0.5) * scale
        if single:
            starts[o] = min(max(math.floor(centre), 0), n_in - 1)
            shares[o, 0] = largest = 1.0
            continue
        begin = max(int(centre - support + 0.5), 0)
        end = min(int(centre + support + 0.5), n_in)
        starts[o] = min(begin, n_in - taps)
        total = 0.0
        for at in range(begin, end):
            share = _filter(kind, (at + 0.5 - centre) / stretch)
            shares[o, at - starts[o]] = share
            total += share
        for k in range(taps):
            shares[o, k] /= total
            largest = max(largest, abs(shares[o, k]))
    bits = _FEW_BITS if taps == _FEW else _MOST_BITS
    while largest * (1 << bits) > _LARGEST:
        bits -= 1
    weights = np.zeros((n_out, taps), np.int16)
    for o in range(n_out):
        rest, best = 1 << bits, 0
        for k in range(taps):
            weight = math.floor(shares[o, k] * (1 << bits) + 0.5)
            weights[o, k] = weight
            rest -= weight
            if weights[o, k] > weights[o, best]:
                best = k
        for k in range(taps):
            if abs(rest) <= 1024:  # more would not fit into the largest weight of very many
                break
            step = 1 if rest > 0 else -1
            weights[o, k] += step
            rest -= step
        weights[o, best] += rest
        if (
            taps == _FEW and bits == _FEW_BITS
        ):  # products of every other 0 are a unit too low, as others in the mean
            is_low = False
            for k in range(taps):
                if weights[o, k] == 0:
                    weights[o, k] -= is_low
                    is_low = not is_low
    return starts, weights, bits


# Images of one size follow each other, and their weights take .02 ms. All that are kept: 25 MB.
_kept_weights = lru_cache(256)(_weights)


@njit(cache=True, nogil=True)
def _filter(kind, x):  # type: ignore[no-untyped-def]
    """Return a filter's height at a distance from its middle."""
    if kind == _BOX:
        return 1.0 if -0.5 < x <= 0.5 else 0.0
    x = abs(x)
    if x >= _SUPPORT[kind]:
        return 0.0
    if kind == _BILINEAR:
        return 1.0 - x
    if kind == _BICUBIC:  # a = -1/2
        if x < 1.0:
            return (1.5 * x - 2.5) * x * x + 1.0
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    if x == 0.0:
        return 1.0
    angle = x * math.pi
    if kind == _HAMMING:
        return math.sin(angle) / angle * (0.54 + 0.46 * math.cos(angle))
    third = angle / 3.0
    return math.sin(angle) / angle * math.sin(third) / third


@njit(cache=True, nogil=True)
def _resized(source, first, last, down, across, is_turned, tiles):  # type: ignore[no-untyped-def]
    """Write source[:, first:last], resized along both axes, into tiles.

    Args:
        source: uint8[height, width, channels], contiguous.
        first: column that is read first.
        last: column behind the last one.
        down: what `_weights` returns of the rows.
        across: the same of the columns.
        is_turned: whether columns of the result are rows of the tiles.
        tiles: as in `resize`.
    """
    height, width, channels = source.shape
    few = last - first
    lanes = _LANES if channels == 3 else 1
    starts, weights, bits = down
    column_starts, column_weights, column_bits = across
    lines = source.reshape(height, width * channels)
    high = min(max(_BLOCK_BYTES // (few * channels), _LEAST), len(starts))
    low_bytes = np.empty(few * high * channels, np.uint8)
    # Columns that stay as they are need not be turned to be blended.
    is_kept = channels == 3 and not is_turned and _is_kept(column_starts, column_weights)
    spare = 0 if is_kept else high * lanes
    standing_bytes = np.empty(few * spare, np.uint8)
    narrow_bytes = np.empty(len(column_starts) * spare, np.uint8)
    for top in range(0, len(starts), high):
        high = min(high, len(starts) - top)
        block, size = slice(top, top + high), high * lanes
        low = low_bytes[: few * high * channels].reshape(high, few * channels)
        _blend(lines, first * channels, starts[block], weights[block], bits, low)
        if is_kept:
            _cut_rows(low, channels * column_starts[0], top, tiles)
            continue
        standing = standing_bytes[: few * size].reshape(few, size)
        narrow = narrow_bytes[: len(column_starts) * size].reshape(len(column_starts), size)
        if channels == 3:
            _turn(low, standing.view(np.uint32))
        else:
            for x in range(few):
                for y in range(high):
                    standing[x, y] = low[y, x]
        _blend(standing, 0, column_starts, column_weights, column_bits, narrow)
        if channels == 3:
            words = narrow.view(np.uint32)
        else:
            words = narrow.astype(np.uint32) * np.uint32(0x010101)
        if is_turned:
            _cut(words.T, 0, top, tiles)
        else:
            _cut(words, top, 0, tiles)


@njit(cache=True, nogil=True)
def _turn(low, standing):  # type: ignore[no-untyped-def]
    """Write rows of RGB as columns, uint32[columns, rows], whose fourth byte does not matter."""
    columns, rows = standing.shape
    for x in range(columns - 1):
        for y in range(rows):  # so written, the compiler reads the four bytes at once
            standing[x, y] = (
                np.uint32(low[y, 3 * x])
                | np.uint32(low[y, 3 * x + 1]) << np.uint32(8)
                | np.uint32(low[y, 3 * x + 2]) << np.uint32(16)
                | np.uint32(low[y, 3 * x + 3]) << np.uint32(24)
            )
    for y in range(rows):
        red, green, blue = low[y, -3], low[y, -2], low[y, -1]
        standing[columns - 1, y] = (
            np.uint32(red) | np.uint32(green) << np.uint32(8) | np.uint32(blue) << np.uint32(16)
        )


@njit(cache=True, nogil=True)
def _is_kept(starts, weights):  # type: ignore[no-untyped-def]
    """Return whether pixels of an axis become one pixel each, in their order."""
    for o in range(len(starts)):
        if starts[o] != starts[0] + o:
            return False
    return weights.shape[1] == 1


@njit(cache=True, nogil=True)
def _cut_rows(lines, first, top, tiles):  # type: ignore[no-untyped-def]
    """Write rows of RGB from a place on, from a byte of each on, into tiles."""
    rows, columns, tile_height, tile_width, _ = tiles.shape
    tile_bytes = 3 * tile_width
    pixels = tiles.reshape(rows, columns, tile_height, tile_bytes)
    for y in range(len(lines)):
        row, down = (top + y) // tile_height, (top + y) % tile_height
        for column in range(columns):
            # Byte by byte: an assignment of slices takes three times as long.
            piece, line = pixels[row, column, down], lines[y, first + column * tile_bytes :]
            for i in range(tile_bytes):
                piece[i] = line[i]


@njit(cache=True, nogil=True)
def _cut(words, top, left, tiles):  # type: ignore[no-untyped-def]
    """Write three bytes of each word into tiles, as the pixels from a place on.

    Args:
        words: uint32[across, down].
        top: the place's row.
        left: its column.
        tiles: as in `resize`.
    """
    _, columns, tile_height, tile_width, _ = tiles.shape
    flat, right = tiles.reshape(-1), left + words.shape[0]
    for y in range(words.shape[1]):
        row, down = (top + y) // tile_height, (top + y) % tile_height
        for column in range(left // tile_width, (right - 1) // tile_width + 1):
            first = max(column * tile_width, left)
            last = min((column + 1) * tile_width, right) - 1
            at = ((row * columns + column) * tile_height + down) * tile_width
            at = 3 * (at + first - column * tile_width)
            line = words[first - left : last - left, y]
            # Indices without a sign: so four bytes are written at once. The fourth lies in the next
            # pixel of the line, which is written after it; the last pixel gets three alone.
            for i in range(len(line)):
                word = line[i]
                flat[np.uint64(at)] = np.uint8(word)
                flat[np.uint64(at + 1)] = np.uint8(word >> np.uint32(8))
                flat[np.uint64(at + 2)] = np.uint8(word >> np.uint32(16))
                flat[np.uint64(at + 3)] = np.uint8(word >> np.uint32(24))
                at += 3
            word = words[last - left, y]
            flat[np.uint64(at)] = np.uint8(word)
            flat[np.uint64(at + 1)] = np.uint8(word >> np.uint32(8))
            flat[np.uint64(at + 2)] = np.uint8(word >> np.uint32(16))


@njit(cache=True, nogil=True)
def _blend_few(source, first, starts, weights, out):  # type: ignore[no-untyped-def]
    """Do what `_blend` does for `_FEW` weights, in sums of 16 bits that stay in registers."""
    # Starts go one way, or the other if flipped.
    size, begin, last = out.shape[1], min(starts[0], starts[-1]), max(starts[0], starts[-1])
    wide = np.empty((last + _FEW - begin, source.shape[1]), np.int16)
    levels, narrow = wide.reshape(-1), source.reshape(-1)[begin * source.shape[1] :]
    for i in range(len(levels)):
        levels[i] = np.int16(narrow[i]) << _SHIFT
    end = first + size
    for o in range(len(starts)):
        at, w, line = starts[o] - begin, weights[o], out[o]
        a, b, c, d = (
            wide[at, first:end],
            wide[at + 1, first:end],
            wide[at + 2, first:end],
            wide[at + 3, first:end],
        )
        e, f, g, h = (
            wide[at + 4, first:end],
            wide[at + 5, first:end],
            wide[at + 6, first:end],
            wide[at + 7, first:end],
        )
        w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
        is_six = -1 <= w6 <= 0 and -1 <= w7 <= 0  # no weight, though perhaps a unit too low
        half = np.int16(_HALF + (w6 + w7 if is_six else 0))
        for i in range(size):
            total = np.int16(
                half
                + (_high(a[i], w0) + _high(b[i], w1) + _high(c[i], w2) + _high(d[i], w3))
                + (_high(e[i], w4) + _high(f[i], w5))
            )
            if not is_six:  # the compiler makes two loops of it
                total = np.int16(total + (_high(g[i], w6) + _high(h[i], w7)))
            line[i] = min(max(total >> _LEFT, 0), 255)


@njit(cache=True, nogil=True)
def _high(level, weight):  # type: ignore[no-untyped-def]
    """Return the upper 16 bits of a product of 16 bits each, which is one instruction."""
    return np.int16((np.int32(level) * np.int32(weight)) >> 16)


@njit(cache=True, nogil=True)
def _blend_many(source, first, starts, weights, bits, out):  # type: ignore[no-untyped-def]
    """Do what `_blend` does, with sums of 32 bits."""
    size, taps = out.shape[1], weights.shape[1]
    sums = np.empty(size, np.int32)
    whole = taps - taps % 4
    for o in range(len(starts)):
        for i in range(size):
            sums[i] = 1 << (bits - 1)  # a half, since the shift below rounds down
        for k in range(0, whole, 4):
            start = starts[o] + k
            a, b = source[start, first : first + size], source[start + 1, first : first + size]
            c, d = source[start + 2, first : first + size], source[start + 3, first : first + size]
            wa, wb = np.int32(weights[o, k]), np.int32(weights[o, k + 1])
            wc, wd = np.int32(weights[o, k + 2]), np.int32(weights[o, k + 3])
            for i in range(size):
                sums[i] += (
                    wa * np.int32(a[i])
                    + wb * np.int32(b[i])
                    + (wc * np.int32(c[i]) + wd * np.int32(d[i]))
                )
        for k in range(whole, taps):
            a, weight = source[starts[o] + k, first : first + size], np.int32(weights[o, k])
            if weight == 0:  # most pixels have less than the most weights
                continue
            for i in range(size):
                sums[i] += weight * np.int32(a[i])
        for i in range(size):
            out[o, i] = min(max(sums[i] >> bits, 0), 255)


@njit(_BLEND, cache=True, nogil=True)
def _blend(source, first, starts, weights, bits, out):  # type: ignore[no-untyped-def]
    """Write rows that are weighted sums of source's, from byte `first` of each on."""
    size, taps = out.shape[1], weights.shape[1]
    if taps == 1:
        for o in range(len(starts)):
            line = source[starts[o], first : first + size]
            for i in range(size):  # the compiler takes 2 s for an assignment of slices
                out[o, i] = line[i]
    elif taps == _FEW and bits == _FEW_BITS:
        _blend_few(source, first, starts, weights, out)
    else:
        _blend_many(source, first, starts, weights, bits, out)
