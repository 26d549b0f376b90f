"""`suggest_seq_len`: compares values of seq_len by padding, rows and attention work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from packpipe import checks
from packpipe.packing import histogram
from packpipe.packing import lengths as fronts
from packpipe.packing.limits import MAX_SEQ_LEN
from packpipe.packing.quality import Quality

_STEPS = (1, 1.25, 1.5, 2, 3, 4, 6, 8)  # candidates, as multiples of the longest example
_MULTIPLE = 64


@dataclass(frozen=True)
class SeqLenChoice:
    """The figures of packing with one seq_len.

    Attributes:
        quality: packs, padding, segments and the other figures.
        masked_work: attention work of whole rows under a dense mask ÷ that of the segments alone:
            packs · seq_len² ÷ Σ length². Varlen or block-sparse attention saves this factor.
    """

    quality: Quality
    masked_work: float


@dataclass(frozen=True)
class SeqLenChoices:
    """The figures of each candidate seq_len, in rising order; prints as a table.

    Attributes:
        choices: one for each candidate.
        best: the shortest seq_len with padding of at most max_padding, or else that with the least.
    """

    choices: tuple[SeqLenChoice, ...]
    best: int

    def __str__(self) -> str:
        lines = ["seq_len       rows  padding  segments (most)  masked ÷ segment attention"]
        for choice in self.choices:
            quality = choice.quality
            mark = " <" if quality.seq_len == self.best else ""
            lines.append(
                f"{quality.seq_len:>7} {quality.num_packs:>10} {quality.padding:>8.3%} "
                f"{quality.packing_factor:>9.2f} {f'({quality.most_segments})':<6} "
                f"{choice.masked_work:>26.2f}{mark}"
            )
        return "\n".join(lines)


def suggest_seq_len(
    lengths: Any,
    candidates: Iterable[int] | None = None,
    *,
    strategy: str = "ffd",
    max_segments: int | None = None,
    max_padding: float = 0.01,
) -> SeqLenChoices:
    """Return the figures of packing some lengths with each candidate seq_len, and the best one.

    Args:
        lengths: int[examples], tokens per example, 1 or more, at least one of them.
        candidates: values of seq_len to try; None for the longest example rounded up to a
            multiple of 64, and up to eight times that.
        strategy: packing rule, one that sorts by length; see `pack_lengths`.
        max_segments: most examples a pack may hold; None for no limit.
        max_padding: share of padding that is small enough, in [0, 1).

    Raises:
        TypeError: lengths, a candidate or max_segments are no integers.
        ValueError: there are no lengths, a length is null or below 1, a candidate is shorter than
            the longest example, or another argument is out of range.

    >>> print(suggest_seq_len([50, 60, 30, 20], [64, 96, 160]))
    seq_len       rows  padding  segments (most)  masked ÷ segment attention
         64          3  16.667%      1.33 (2)                          1.66
         96          2  16.667%      2.00 (2)                          2.49
        160          1   0.000%      4.00 (4)                          3.46 <
    """
    chunks = fronts.chunks_of(lengths)
    if not sum(map(len, chunks)):
        raise ValueError(checks.sentence("len(lengths)", 0, "1 or more", "pass some lengths"))
    fronts.check(chunks, MAX_SEQ_LEN, MAX_SEQ_LEN)
    longest = max(int(chunk.max()) for chunk in chunks)
    if candidates is None:
        base = -(-longest // _MULTIPLE) * _MULTIPLE
        steps = {int(base * step) // _MULTIPLE * _MULTIPLE for step in _STEPS}
        candidates = [step for step in {base, *steps} if step <= MAX_SEQ_LEN]
    elif not isinstance(candidates, Iterable):
        kind = type(candidates).__name__
        raise TypeError(checks.sentence("candidates", kind, "some integers", "pass a list"))
    tried = sorted(
        {
            checks.whole_number(
                "candidates", candidate, longest, MAX_SEQ_LEN, "the longest example must fit"
            )
            for candidate in candidates
        }
    )
    if not tried:
        raise ValueError(checks.sentence("candidates", [], "one or more", "pass None to choose"))
    number = isinstance(max_padding, (int, float)) and not isinstance(max_padding, bool)
    if not number or not 0 <= max_padding < 1:
        expected = "a share in [0, 1)"
        raise ValueError(checks.sentence("max_padding", max_padding, expected, "0.01 is usual"))
    # One histogram serves all: the longer candidates extend it with zeros.
    counts = fronts.count(chunks, tried[0], tried[0])
    # In floats: Σ length² of many long examples is beyond int64.
    segment_work = float(counts @ np.arange(len(counts), dtype=np.float64) ** 2)
    choices = []
    for seq_len in tried:
        plan = histogram.plan_histogram(
            counts, seq_len, strategy=strategy, max_segments=max_segments
        )
        masked = len(plan) * float(seq_len) ** 2
        choices.append(SeqLenChoice(plan.quality, masked / segment_work))
    good = [choice for choice in choices if choice.quality.padding <= max_padding]
    best = good[0] if good else min(choices, key=lambda choice: choice.quality.padding)
    return SeqLenChoices(tuple(choices), best.quality.seq_len)
