"""Packs as a small picture for notebooks: plain SVG, no plotting library (floor 0)."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from packpipe.packing import Packs

_PACKS, _WIDTH, _HEIGHT = 12, 640, 14
_SEGMENTS = 100
_COLOURS = ("#4878a8", "#e49444", "#6a9f58", "#85629c", "#d1615d", "#a87c5f")


def html(packs: Packs) -> str:
    """Return the figures of packs as a table, and as bars what the first ones hold."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in packs.rows()
    )
    return f"<table>{rows}</table>{bars(packs)}"


def bars(packs: Packs) -> str:
    """Return an SVG of some packs, evenly chosen: one bar each, segments coloured, padding grey."""
    shown = sorted({len(packs) * i // _PACKS for i in range(_PACKS)} if len(packs) else ())
    parts = []
    for line, pack in enumerate(shown):
        y = line * (_HEIGHT + 3)
        parts.append(f'<rect x="0" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" fill="#d0d0d0"/>')
        ends = np.concatenate([[0], np.cumsum(packs.lengths[packs[pack]], dtype=np.int64)])
        if len(ends) > _SEGMENTS:  # too narrow to be seen one by one: some are drawn as one
            ends = ends[np.linspace(0, len(ends) - 1, _SEGMENTS).astype(int)]
        for number, (start, stop) in enumerate(pairwise(ends.tolist())):
            x, width = (_WIDTH * tokens / packs.seq_len for tokens in (start, stop - start))
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{max(width - 0.5, 0.5):.2f}" '
                f'height="{_HEIGHT}" fill="{_COLOURS[number % len(_COLOURS)]}">'
                f"<title>pack {pack}: {stop - start} tokens</title></rect>"
            )
    height = len(shown) * (_HEIGHT + 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" '
        f'aria-label="{len(shown)} of {len(packs)} packs">{"".join(parts)}</svg>'
    )
