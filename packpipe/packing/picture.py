"""Draws packs as a small SVG picture for notebooks, without a plotting library."""

from __future__ import annotations

from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_PACKS, _WIDTH, _HEIGHT = 12, 640, 14
_SEGMENTS = 100
_COLOURS = ("#4878a8", "#e49444", "#6a9f58", "#85629c", "#d1615d", "#a87c5f")


def html(
    figures: list[tuple[str, str]],
    seq_lens: NDArray[np.integer],
    offsets: NDArray[np.int64],
    seq_len: int,
    pack: str = "pack",
) -> str:
    """Return HTML: a table of figures, and below it some packs as bars.

    Args:
        figures: (name, value) of each.
        seq_lens: int[segments], tokens of each, pack by pack.
        offsets: int64[packs + 1], where each pack begins in seq_lens.
        seq_len: tokens a pack holds.
        pack: what a pack is called.
    """
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in figures
    )
    return f"<table>{rows}</table>{bars(seq_lens, offsets, seq_len, pack)}"


def bars(
    seq_lens: NDArray[np.integer], offsets: NDArray[np.int64], seq_len: int, pack: str = "pack"
) -> str:
    """Return an SVG of some packs, evenly chosen: one bar each, segments coloured, padding grey."""
    num_packs = len(offsets) - 1
    # A set, since fewer than _PACKS packs give the same number several times.
    shown = sorted({num_packs * i // _PACKS for i in range(_PACKS)} if num_packs else ())
    parts = []
    for line, number in enumerate(shown):
        y = line * (_HEIGHT + 3)
        parts.append(f'<rect x="0" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" fill="#d0d0d0"/>')
        lens = seq_lens[offsets[number] : offsets[number + 1]]
        ends = np.concatenate([[0], np.cumsum(lens, dtype=np.int64)])
        if len(ends) > _SEGMENTS:  # too narrow to be seen one by one: neighbours are merged
            ends = ends[np.linspace(0, len(ends) - 1, _SEGMENTS).astype(int)]
        for place, (start, stop) in enumerate(pairwise(ends.tolist())):
            # A gap of half a pixel separates neighbours; a segment is drawn at least half a pixel
            # wide.
            x, width = (_WIDTH * tokens / seq_len for tokens in (start, stop - start))
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{max(width - 0.5, 0.5):.2f}" '
                f'height="{_HEIGHT}" fill="{_COLOURS[place % len(_COLOURS)]}">'
                f"<title>{pack} {number}: {stop - start} tokens</title></rect>"
            )
    height = len(shown) * (_HEIGHT + 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" style="max-width:100%;height:auto" role="img" '
        f'aria-label="{len(shown)} of {num_packs} {pack}s">{"".join(parts)}</svg>'
    )
