"""Slow, obvious twins: each answers as the definition reads, one item at a time.

Nothing here imports packpipe, so that agreement between the two means something.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from heapq import merge
from itertools import count
from typing import Any

import numpy as np
from scipy import stats


def first_fit_decreasing(
    lengths: Sequence[int], seq_len: int, max_segments: int | None = None
) -> list[list[int]]:
    """Each example, longest first and ties by position, into the first pack that has room."""
    packs: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # sorted() is stable
        for pack in packs:
            full = max_segments is not None and len(pack) == max_segments
            if not full and sum(lengths[j] for j in pack) + lengths[i] <= seq_len:
                pack.append(i)
                break
        else:
            packs.append([i])
    return packs


def next_fit(
    lengths: Sequence[int], seq_len: int, max_segments: int | None = None
) -> list[list[int]]:
    """Each example as it comes into the last pack, or into a new one."""
    packs: list[list[int]] = []
    for i, length in enumerate(lengths):
        fits = bool(packs) and sum(lengths[j] for j in packs[-1]) + length <= seq_len
        if fits and (max_segments is None or len(packs[-1]) < max_segments):
            packs[-1].append(i)
        else:
            packs.append([i])
    return packs


def first_fit(
    lengths: Sequence[int], seq_len: int, max_segments: int | None = None
) -> list[list[int]]:
    """Each example as it comes into the first pack that has room."""
    packs: list[list[int]] = []
    for i, length in enumerate(lengths):
        for pack in packs:
            if len(pack) != max_segments and sum(lengths[j] for j in pack) + length <= seq_len:
                pack.append(i)
                break
        else:
            packs.append([i])
    return packs


def best_fit(
    lengths: Sequence[int], seq_len: int, max_segments: int | None = None
) -> list[list[int]]:
    """Each example as it comes into the fullest pack with room, of equals the last one touched."""
    packs: list[list[int]] = []
    touched: list[int] = []
    for i, length in enumerate(lengths):
        open_packs = []
        for p, pack in enumerate(packs):
            tokens = sum(lengths[j] for j in pack)
            if len(pack) != max_segments and tokens + length <= seq_len:
                open_packs.append((tokens, touched[p], p))
        if open_packs:
            p = max(open_packs)[2]
        else:
            p = len(packs)
            packs.append([])
            touched.append(i)
        packs[p].append(i)
        touched[p] = i
    return packs


def by_room(
    counts: dict[int, int],
    seq_len: int,
    max_segments: int | None = None,
    *,
    tight_below: int,
    num_packs: int = 0,
) -> Counter[tuple[int, ...]] | None:
    """What the packs hold by the histogram rules of Krell: contents (longest first) and how many.

    Lengths of tight_below and more go to the packs with the most room, one each; shorter ones
    to those with the least room that suffices. With num_packs, no others are opened (None if
    they do not suffice).
    """
    slots = seq_len if max_segments is None else max_segments
    # Stacks of (how many packs, what each holds), by room.
    stacks: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    done: Counter[tuple[int, ...]] = Counter()

    def put(packs: int, held: tuple[int, ...]) -> None:
        room = seq_len - sum(held)
        if room == 0 or len(held) == slots:
            done[held] += packs
        else:
            stacks.setdefault(room, []).append((packs, held))

    if num_packs:
        put(num_packs, ())
    for length in sorted(counts, reverse=True):
        left = counts[length]
        spread = length >= tight_below
        room = seq_len if spread else length
        while left:
            while length <= room <= seq_len and not stacks.get(room):
                room += -1 if spread else 1
            if not length <= room <= seq_len:
                if num_packs:
                    return None
                copies = 1 if spread else min(seq_len // length, slots, left)
                put(left // copies, (length,) * copies)
                left -= left // copies * copies
                continue
            packs, held = stacks[room].pop()
            copies = 1 if spread else min(room // length, slots - len(held), left)
            served = min(packs, left // copies)
            if served < packs:
                stacks[room].append((packs - served, held))
            put(served, held + (length,) * copies)
            left -= served * copies
            room = room if spread else length
    for stack in stacks.values():
        for packs, held in stack:
            done[held] += packs
    return done


def balanced(
    lengths: Sequence[int], seq_len: int, bound: int, max_segments: int | None = None
) -> Counter[tuple[int, ...]]:
    """The fewest packs, as bisection from the bound finds, that take all by least load.

    The shortest lengths, as long as all of them are fewer than bound, go by least room.
    """
    counts = dict(Counter(lengths))
    tight_below = seq_len
    for length in range(seq_len, 0, -1):
        if sum(other <= length for other in lengths) >= bound:
            tight_below = length

    def packed(num_packs: int) -> Counter[tuple[int, ...]] | None:
        return by_room(counts, seq_len, max_segments, tight_below=tight_below, num_packs=num_packs)

    low, high, step = bound - 1, bound, max(1, bound // 10_000)
    while packed(high) is None:
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = low + (high - low) // 2
        if packed(middle) is None:
            low = middle
        else:
            high = middle
    found = packed(high)
    assert found is not None
    return found


def carried_out(packs: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Examples for packs given as lengths: those of one length go pack by pack, as they come."""
    waiting = {
        length: [i for i, other in enumerate(lengths) if other == length] for length in set(lengths)
    }
    return [[waiting[length].pop(0) for length in sorted(pack, reverse=True)] for pack in packs]


def redrawn(lengths: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Which example stands in for each: Fisher-Yates inside each length, longest first.

    Place i of all draws the (i % 4)-th word of index i // 4 on stream 3.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    members = list(order)
    for i, example in enumerate(order):
        end = sum(other >= lengths[example] for other in lengths)
        word = random_words(seed, epoch, i // 4, 3, 4)[i % 4]
        other = i + int((word >> 11) * 2.0**-53 * (end - i))
        members[i], members[other] = members[other], members[i]
    stand_in = [0] * len(lengths)
    for example, member in zip(order, members, strict=True):
        stand_in[example] = member
    return stand_in


def cut_to_multiple(packs: Sequence[list[int]], multiple: int) -> list[list[int]]:
    """The last pack of two or more cut in half until the packs are a multiple; then empty ones."""
    packs = list(packs)
    while len(packs) % multiple:
        large = [p for p, pack in enumerate(packs) if len(pack) > 1]
        if large:
            pack = packs[large[-1]]
            half = (len(pack) + 1) // 2
            packs[large[-1] : large[-1] + 1] = [pack[:half], pack[half:]]
        else:
            packs.append([])
    return packs


def most_worth(prices: dict[int, int], seq_len: int, max_segments: int | None = None) -> int:
    """The most that one pack can be worth, by trying every pack; for small cases."""
    best = 0

    def add(lengths: list[int], room: int, slots: int, worth: int) -> None:
        nonlocal best
        best = max(best, worth)
        for k, length in enumerate(lengths):
            if length <= room and slots:
                add(lengths[k:], room - length, slots - 1, worth + prices[length])

    add(sorted(prices), seq_len, seq_len if max_segments is None else max_segments, 0)
    return best


def martello_toth(lengths: Sequence[int], seq_len: int) -> int:
    """The bound L2 by its definition: the best over every threshold k in 0..seq_len / 2."""
    best = 0
    for k in range(seq_len // 2 + 1):
        huge = [length for length in lengths if length > seq_len - k]
        large = [length for length in lengths if seq_len / 2 < length <= seq_len - k]
        small = [length for length in lengths if k <= length <= seq_len / 2]
        spare = len(large) * seq_len - sum(large)
        more = max(0, math.ceil(Fraction(sum(small) - spare, seq_len)))
        best = max(best, len(huge) + len(large) + more)
    return best


def optimum(lengths: Sequence[int], seq_len: int, max_segments: int | None = None) -> int:
    """The fewest packs there are, by trying every assignment; for ten examples or fewer."""
    slots = len(lengths) if max_segments is None else max_segments
    best = len(lengths)

    def place(i: int, packs: list[tuple[int, int]]) -> None:
        nonlocal best
        if len(packs) >= best:
            return
        if i == len(lengths):
            best = len(packs)
            return
        for p, (used, held) in enumerate(packs):
            if used + lengths[i] <= seq_len and held < slots:
                place(i + 1, [*packs[:p], (used + lengths[i], held + 1), *packs[p + 1 :]])
        place(i + 1, [*packs, (lengths[i], 1)])

    place(0, [])
    return best


def native_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Each axis in whole patches, to the nearest, half to even, one at least."""
    rows, columns = (max(1, round(Fraction(side, patch))) for side in (height, width))
    return rows, columns


def whole_root(square: Fraction, rounding: str) -> int:
    """The square root of a number as a whole one, one at least, without rounding on the way."""
    below = math.isqrt(math.floor(square))
    half = Fraction(2 * below + 1, 2) ** 2
    up = {
        "floor": False,
        "ceil": square > below**2,
        "nearest": square > half or (square == half and below % 2 == 1),
    }[rounding]
    return max(1, below + up)


def scaled_grid(
    scale: float, height: int, width: int, patch: int, rounding: str
) -> tuple[int, int]:
    """The grid of an image at a scale, in floating point."""
    to_whole = {"nearest": round, "floor": math.floor, "ceil": math.ceil}[rounding]
    rows, columns = (max(1, to_whole(side * scale / patch)) for side in (height, width))
    return rows, columns


def area_grid(
    area: Fraction,
    height: int,
    width: int,
    patch: int,
    rounding: str,
    max_upscale: float | None = None,
) -> tuple[int, int]:
    """The grid of an image resized to so many pixels, or as far as it may be enlarged."""
    scale_squared = area / (height * width)
    if max_upscale is not None and scale_squared > Fraction(max_upscale) ** 2:
        return scaled_grid(max_upscale, height, width, patch, rounding)
    rows, columns = (
        whole_root(side**2 * scale_squared / patch**2, rounding) for side in (height, width)
    )
    return rows, columns


def limited_budget_grid(
    height: int, width: int, patch: int, max_tokens: int, max_upscale: float | None
) -> tuple[int, int]:
    """The largest grid within a budget, of those at a scale of max_upscale or less."""
    if max_upscale is not None:
        rows, columns = scaled_grid(max_upscale, height, width, patch, "ceil")
        if rows * columns <= max_tokens:
            return rows, columns
    return budget_grid(height, width, patch, max_tokens)


def square_grid(side: Fraction, patch: int, rounding: str) -> tuple[int, int]:
    """A square of so many pixels a side, in whole patches, one at least."""
    to_whole = {"nearest": round, "floor": math.floor, "ceil": math.ceil}[rounding]
    patches = max(1, to_whole(side / patch))
    return patches, patches


def largest_grid(
    height: int, width: int, config: Any, max_tokens: int, max_upscale: float | None = None
) -> tuple[int, int]:
    """The largest grid within a budget: for a law of squares the largest square."""
    if type(config.resolution).__name__ == "Square":
        side = next(k for k in count(1) if (k + 1) ** 2 > max_tokens)
        return side, side
    return limited_budget_grid(height, width, config.patch_size, max_tokens, max_upscale)


def grid_at(scale: Fraction, height: int, width: int, patch: int) -> tuple[int, int]:
    """The grid that covers an image at a scale."""
    rows, columns = (max(1, math.ceil(side * scale / patch)) for side in (height, width))
    return rows, columns


def breakpoints(height: int, width: int, patch: int) -> Iterator[Fraction]:
    """Every scale beyond which an axis needs another patch, in rising order, without end."""

    def of(side: int) -> Iterator[Fraction]:
        return (Fraction(k * patch, side) for k in count(1))

    return merge(of(height), of(width))


def budget_scales(height: int, width: int, patch: int, max_tokens: int) -> list[Fraction]:
    """The breakpoints whose grid holds at most max_tokens patches, in rising order."""
    scales: list[Fraction] = []
    for scale in breakpoints(height, width, patch):
        rows, columns = grid_at(scale, height, width, patch)
        if rows * columns > max_tokens:
            break
        if scale not in scales[-1:]:
            scales.append(scale)
    return scales


def budget_grid(height: int, width: int, patch: int, max_tokens: int) -> tuple[int, int]:
    """The grid at the largest of them."""
    return grid_at(budget_scales(height, width, patch, max_tokens)[-1], height, width, patch)


def naflex_grid(
    height: int, width: int, patch: int, max_tokens: int, eps: float = 1e-5
) -> tuple[int, int]:
    """The published bisection for the scale in [eps / 10, 100], in floating point."""

    def side_at(scale: float, side: int) -> int:
        return max(patch, patch * math.ceil(side * scale / patch))

    low, high = eps / 10, 100.0
    while high - low >= eps:
        scale = (low + high) / 2
        tokens = (side_at(scale, height) / patch) * (side_at(scale, width) / patch)
        if tokens <= max_tokens:
            low = scale
        else:
            high = scale
    return side_at(low, height) // patch, side_at(low, width) // patch


def random_words(
    seed: int, epoch: int, index: int, stream: int, num_words: int, view: int = 0
) -> list[int]:
    """The first words of NumPy's own Philox at (seed, epoch), (stream, index, view)."""
    key = np.array([seed, epoch], np.uint64)
    counter = np.array([0, stream, index, view], np.uint64)
    return [int(w) for w in np.random.Philox(key=key, counter=counter).random_raw(num_words)]


def random_word(seed: int, epoch: int, index: int, stream: int, view: int = 0) -> int:
    """The first of them."""
    return random_words(seed, epoch, index, stream, 1, view)[0]


def seeded_order(seed: int, epoch: int, index: Sequence[int], stream: int) -> list[int]:
    """Positions of index sorted by their random words."""
    return sorted(range(len(index)), key=lambda i: random_word(seed, epoch, index[i], stream))


def uniform(seed: int, epoch: int, index: int, stream: int, view: int = 0) -> float:
    """The top 53 bits of the first word, as a share of 1."""
    return (random_word(seed, epoch, index, stream, view) >> 11) / 2**53


def subset(
    seed: int,
    epoch: int,
    index: int,
    stream: int,
    num_items: int,
    num_chosen: int,
    view: int = 0,
) -> list[int]:
    """Selection sampling: item t of n is taken if word t, as a share of 1, times the items not
    yet seen is below the number still missing.
    """
    chosen: list[int] = []
    for item, word in enumerate(random_words(seed, epoch, index, stream, num_items, view)):
        if (word * (num_items - item)) >> 64 < num_chosen - len(chosen):
            chosen.append(item)
    return chosen


def quantile(law: Any, u: float) -> float:
    """The value of a distribution below which the share u lies, by SciPy's."""
    if isinstance(law, int | float):
        return law
    kind = type(law).__name__
    if kind == "Constant":
        return law.value
    if kind == "Uniform":
        return law.low + u * (law.high - law.low)
    if kind == "TruncatedNormal":
        ends = [(end - law.mean) / law.deviation for end in (law.low, law.high)]
        return float(stats.truncnorm.ppf(u, *ends, loc=law.mean, scale=law.deviation))
    if kind == "Beta":
        alpha = 7 / 3 * law.mean / law.maximum
        cell = math.floor(u * 2**14)
        left, right = stats.beta.ppf([cell / 2**14, (cell + 1) / 2**14], alpha, 7 / 3 - alpha)
        return law.maximum * float(left + (u * 2**14 - cell) * (right - left))
    values, weights = (law, None) if kind in ("list", "tuple") else (law.values, law.weights)
    weights = weights or [1] * len(values)
    ends = [sum(weights[: n + 1]) for n in range(len(weights))]
    return values[bisect_right(ends, u * ends[-1])]


def drop_rate(law: Any, u: float, num_tokens: int, progress: float | None) -> float:
    """The share of an image's tokens that is dropped, by the law's definition."""
    kind = type(law).__name__
    if kind == "OverTraining":
        low, high = (drop_rate(end, u, num_tokens, progress) for end in (law.low, law.high))
        return low + (high - low) / (1 + math.exp(-(progress - law.midpoint) / law.width))
    if kind == "ByResolution":
        ends = [law.min_tokens, law.max_tokens], [law.min_rate, law.max_rate]
        mean = float(np.interp(num_tokens, *ends))
        return mean + law.deviation * float(stats.truncnorm.ppf(u, -2, 2))
    return quantile(law, u)


def num_kept(num_tokens: int, rate: float) -> int:
    """The share of the tokens that is left, to the nearest, half to even, one at least."""
    return max(1, round(num_tokens * (1 - rate)))


def token_limit(config: Any) -> int:
    """Most tokens of an image before dropping."""
    if config.max_tokens is not None:
        return config.max_tokens
    unlimited = config.drop_rate != 0 and config.resolution != "budget"
    return 2**15 - 1 if unlimited else config.seq_len - config.prefix_tokens


def crop_box(
    height: int, width: int, law: Any, seed: int, epoch: int, index: int, view: int = 0
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of an image's box; stream 9 has a word for each of four draws."""
    kind = type(law).__name__
    sides = height, width
    if kind == "FixedCrop":
        starts = [
            min(round(side * share), side - 1)
            for side, share in zip(sides, (law.top, law.left), strict=True)
        ]
        ends = round(height * (law.top + law.height)), round(width * (law.left + law.width))
        rows, columns = (
            min(max(1, end - start), side - start)
            for start, end, side in zip(starts, ends, sides, strict=True)
        )
        return *starts, rows, columns
    if kind == "CenterCrop":
        largest = (min(sides),) * 2 if law.shape == "square" else sides
        rows, columns = (max(1, round(side * math.sqrt(law.area))) for side in largest)
        return (height - rows) // 2, (width - columns) // 2, rows, columns
    u = [(word >> 11) / 2**53 for word in random_words(seed, epoch, index, 9, 4, view)]
    share, (low, high) = quantile(law.area, u[0]), law.aspect
    factor = low * (high / low) ** u[1]
    if law.shape == "square":  # from now on a factor on the image's own shape
        factor *= height / width
    factor = min(max(factor, share), 1 / share)
    rows = min(max(1, round(height * math.sqrt(share / factor))), height)
    columns = min(max(1, round(width * math.sqrt(share * factor))), width)
    top, left = math.floor((height - rows + 1) * u[2]), math.floor((width - columns + 1) * u[3])
    return min(top, height - rows), min(left, width - columns), rows, columns


def shown_hw(
    size: tuple[int, int], config: Any, seed: int, epoch: int, index: int, view: int = 0
) -> tuple[int, int]:
    """(height, width) of what is left of an image after cropping."""
    if config.crop is None:
        return size
    _, _, height, width = crop_box(*size, config.crop, seed, epoch, index, view)
    return height, width


def decide(
    height: int, width: int, config: Any, seed: int, epoch: int, index: int, view: int = 0
) -> tuple[tuple[int, int], int, bool]:
    """(grid, tokens kept, whether shrunk) of one image.

    Streams 0, 6, 7 and 9 are for the order, the resolution, the drop rate and the crop.
    """
    height, width = shown_hw((height, width), config, seed, epoch, index, view)
    law, patch, limit = config.resolution, config.patch_size, token_limit(config)
    kind = type(law).__name__
    upscale = config.max_upscale
    u = uniform(seed, epoch, index, 6, view)
    if law == "native":
        grid = native_grid(height, width, patch)
        if upscale is not None and upscale < 1:
            grid = scaled_grid(upscale, height, width, patch, "nearest")
    elif kind == "Side":
        side = Fraction(quantile(law.pixels, u))
        grid = area_grid(side**2, height, width, patch, law.rounding, upscale)
    elif kind == "Area":
        area = Fraction(quantile(law.pixels, u))
        grid = area_grid(area, height, width, patch, law.rounding, upscale)
    elif kind == "Square":
        grid = square_grid(Fraction(quantile(law.pixels, u)), patch, law.rounding)
    else:
        budget = limit
        if law != "budget":
            budget = max(1, min(limit, math.floor(quantile(law.tokens, u))))
        grid = limited_budget_grid(height, width, patch, budget, upscale)
    shrunk = grid[0] * grid[1] > limit
    if shrunk:
        grid = largest_grid(height, width, config, limit)
    if config.drop_rate == 0:
        return grid, grid[0] * grid[1], shrunk
    progress = None
    if config.epochs is not None:
        progress = (epoch + uniform(seed, epoch, index, 0)) / config.epochs
    u = uniform(seed, epoch, index, 7, view)
    rate = drop_rate(config.drop_rate, u, grid[0] * grid[1], progress)
    keep = num_kept(grid[0] * grid[1], rate)
    room = config.seq_len - config.prefix_tokens
    if keep > room:
        shrunk = True
        most = min(limit, math.floor(room / (1 - rate)))
        grid = largest_grid(height, width, config, most)
        keep = min(room, num_kept(grid[0] * grid[1], rate))
    return grid, keep, shrunk


def plan(
    tokens: Sequence[int],
    index: Sequence[int],
    seq_len: int,
    *,
    rule: Callable[[Sequence[int], int, int], list[list[int]]],
    max_segments: int,
    window: int,
    seed: int,
    epoch: int,
    views: int = 1,
    together: bool = False,
) -> list[list[int]]:
    """The positions in every pack: seeded order, equal windows, packing rule, seeded pack order.

    Of several views all tokens are given, image by image; together they are packed as one.
    Stream 0 orders examples, stream 1 the packs of a window by their numbers in the whole.
    """
    order = seeded_order(seed, epoch, index, 0)
    num_windows = math.ceil(len(order) / window)
    packs: list[list[int]] = []
    for w in range(num_windows):
        some = order[len(order) * w // num_windows : len(order) * (w + 1) // num_windows]
        units = [[i * views + v for v in range(views)] for i in some]
        if not together:
            units = [[segment] for unit in units for segment in unit]
        most = max_segments // len(units[0])
        found = rule([sum(tokens[s] for s in unit) for unit in units], seq_len, most)
        turn = seeded_order(seed, epoch, range(len(packs), len(packs) + len(found)), 1)
        packs += [[s for j in found[p] for s in units[j]] for p in turn]
    return packs


def fit_last(
    packs: Sequence[Sequence[int]],
    sizes: Sequence[tuple[int, int]],
    grids: Sequence[tuple[int, int]],
    keeps: Sequence[int],
    config: Any,
) -> tuple[list[list[int]], list[tuple[int, int]], list[int], int]:
    """(packs, grids, tokens kept, images grown), with one image a pack grown into the room."""
    packs, grids, keeps = [list(pack) for pack in packs], list(grids), list(keeps)
    grown = 0
    for pack in packs:
        room = config.seq_len - sum(keeps[i] + config.prefix_tokens for i in pack)
        best, best_place, best_grid = 0, 0, (0, 0)
        for place, i in enumerate(pack):
            target = keeps[i] + min(room, math.floor(keeps[i] * config.fit_limit))
            grid = grids[i]
            if config.fit_last == "resolution":
                # Of so many tokens, as large a share is dropped as now.
                budget = math.ceil(Fraction(math.prod(grid) * target, keeps[i]))
                budget = min(budget, token_limit(config))
                larger = largest_grid(*sizes[i], config, budget, config.max_upscale)
                if math.prod(larger) > math.prod(grid):
                    grid = larger
            growth = min(target, math.prod(grid)) - keeps[i]
            if growth > best:  # the first of equals
                best, best_place, best_grid = growth, place, grid
        if best:
            i = pack[best_place]
            pack[best_place], pack[-1] = pack[-1], i
            keeps[i] += best
            grids[i] = best_grid
            grown += 1
    return packs, grids, keeps, grown


def token_columns(
    grids: Sequence[Sequence[tuple[int, int]]], seq_len: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """(segment_ids, coords) of rows of whole grids, token by token, zeros in padding."""
    all_ids, all_coords = [], []
    for row in grids:
        ids: list[int] = []
        coords: list[list[int]] = []
        for segment, (rows, columns) in enumerate(row, start=1):
            for y in range(rows):
                for x in range(columns):
                    ids.append(segment)
                    coords.append([y, x])
        padding = seq_len - len(ids)
        all_ids.append(ids + [0] * padding)
        all_coords.append(coords + [[0, 0]] * padding)
    return all_ids, all_coords


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """uint8[tokens, patch * patch * 3], byte by byte: row, column, channel."""
    tokens = []
    for top in range(0, pixels.shape[0], patch):
        for left in range(0, pixels.shape[1], patch):
            token = []
            for y in range(patch):
                for x in range(patch):
                    for channel in range(3):
                        token.append(int(pixels[top + y, left + x, channel]))
            tokens.append(token)
    return np.array(tokens, np.uint8)


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF says stored pixels look like: where row 0 and column 0 belong, orientation 1..8."""
    return {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored, 1),
    }[orientation]


def mean_average_precision(scores, labels):
    """Σ (recall - recall before) · precision over thresholds, the mean of all classes with one."""
    found = []
    for own, wanted in zip(zip(*scores, strict=True), zip(*labels, strict=True), strict=True):
        pairs = [pair for pair in zip(own, wanted, strict=True) if not math.isnan(pair[1])]
        positive = sum(label > 0.5 for _, label in pairs)
        if not positive:
            continue
        total = before = 0.0
        for threshold in sorted({score for score, _ in pairs}, reverse=True):
            chosen = [label > 0.5 for score, label in pairs if score >= threshold]
            recall = sum(chosen) / positive
            total += (recall - before) * sum(chosen) / len(chosen)
            before = recall
        found.append(total)
    return sum(found) / len(found) if found else None
