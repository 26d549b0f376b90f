"""Pictures of packed rows and of training, as matplotlib figures (floor 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from packpipe.patches import unpatchify
from packpipe.rows import Rows

_TOKENS_A_LINE = 64


def plot_rows(rows: Rows, *, max_thumbnails: int = 8) -> Figure:
    """Return a figure of packed rows: the tokens as they lie, and the images they hold.

    Left, a row's tokens in reading order, 64 a line, each segment framed and tinted in its
    colour, padding hatched. Right, its segments put together again from tokens and coordinates,
    framed in the same colours and drawn to one scale.

    Args:
        rows: what `read_rows` returned; a handful.
        max_thumbnails: images drawn of each row, the first ones.
    """
    lines = -(-rows.segment_ids.shape[1] // _TOKENS_A_LINE)
    figure = Figure(figsize=(13, 0.5 + 1.9 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 2, width_ratios=[1.0, 1.35])
    for row in range(len(rows)):
        _draw_tokens(figure.add_subplot(grid[row, 0]), rows, row, lines)
        _draw_images(figure.add_subplot(grid[row, 1]), rows, row, max_thumbnails)
    figure.suptitle(
        "packed rows: the tokens as stored (left, padding hatched), the images they hold (right)",
        fontsize=10,
    )
    return figure


def plot_losses(losses: Sequence[float], rows_per_epoch: int) -> Figure:
    """Return a figure of the loss at every step, and its mean over each epoch.

    Args:
        losses: one a step.
        rows_per_epoch: steps after which every row was seen once.
    """
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, lw=0.8, alpha=0.5, label="each step")
    epochs = [losses[i : i + rows_per_epoch] for i in range(0, len(losses), rows_per_epoch)]
    ends = np.cumsum([len(epoch) for epoch in epochs])
    axes.plot(ends, [np.mean(epoch) for epoch in epochs], "o-", label="mean of each epoch")
    axes.set(xlabel="step", ylabel="cross-entropy an image", ylim=(0, None))
    axes.legend()
    return figure


def plot_training(records: Sequence[dict[str, Any]]) -> Figure:
    """Return a figure of a training: loss, accuracy and images a second over the steps.

    Args:
        records: what `packpipe.training.read_log` returned.
    """
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    steps = [record["step"] for record in records]
    columns = (
        ("loss", "loss an image"),
        ("accuracy", "accuracy, training images"),
        ("images_per_s", "images a second"),
    )
    for place, (name, label) in enumerate(columns):
        axes = figure.add_subplot(1, 3, place + 1)
        values = np.array([record[name] for record in records])
        axes.plot(steps, values, lw=0.8, alpha=0.5, label="each record")
        width = max(1, len(values) // 20)
        if width > 1:
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axes.plot(steps[width - 1 :], smooth, label=f"mean of {width}")
            axes.legend(fontsize=8)
        axes.set(xlabel="step", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    return figure


def _colours(num_segments: int) -> list[Any]:
    # Steps of the golden ratio keep neighbours apart however many there are.
    hues = (np.arange(max(1, num_segments)) * 0.61803398875) % 1.0
    return [mpl.colors.hsv_to_rgb((hue, 0.85, 0.85)) for hue in hues]


def _draw_tokens(axes: Any, rows: Rows, row: int, lines: int) -> None:
    side = rows.patches.shape[2]
    seq_len = rows.segment_ids.shape[1]
    padded = np.zeros((lines * _TOKENS_A_LINE, side), np.uint8)
    padded[:seq_len] = rows.patches[row]
    ids = np.zeros(lines * _TOKENS_A_LINE, np.int32)
    ids[:seq_len] = rows.segment_ids[row]
    coords = np.stack(np.divmod(np.arange(len(ids)), _TOKENS_A_LINE), axis=1)
    picture = unpatchify(padded, coords, (lines, _TOKENS_A_LINE)).astype(np.float64) / 255
    size = picture.shape[0] // lines
    colours = np.array([(1.0, 1.0, 1.0), *_colours(int(ids.max()))])
    tint = colours[ids].reshape(lines, _TOKENS_A_LINE, 3)
    tint = tint.repeat(size, axis=0).repeat(size, axis=1)
    axes.imshow(np.where(tint.min(-1, keepdims=True) == 1, 1.0, 0.5 * picture + 0.5 * tint))
    # Padding is a tail: the rest of one line, then whole lines.
    used = int((ids > 0).sum())
    line, column = divmod(used, _TOKENS_A_LINE)
    gaps = [
        (line, column, _TOKENS_A_LINE - column, 1),
        (line + 1, 0, _TOKENS_A_LINE, lines - line - 1),
    ]
    for top, left, width, height in gaps:
        if used < seq_len and height > 0 and top < lines:
            corner = (left * size - 0.5, top * size - 0.5)
            axes.add_patch(
                Rectangle(
                    corner, width * size, height * size, fc="white", ec="0.3", hatch="////", lw=0.5
                )
            )
    axes.set_xticks([])
    axes.set_yticks([])
    num_segments = int(ids.max())
    images = "1 image" if num_segments == 1 else f"{num_segments} images"
    axes.set_title(f"{images}, {used} of {seq_len} tokens", fontsize=8, loc="left")


def _draw_images(axes: Any, rows: Rows, row: int, max_thumbnails: int) -> None:
    segments = rows.segments
    first, last = segments.offsets[row], segments.offsets[row + 1]
    shown = range(int(first), int(min(last, first + max_thumbnails)))
    colours = _colours(int(last - first))
    place, tallest, left = 0, 1, 0.0
    for number, segment in enumerate(shown):
        tokens = slice(place, place + int(segments.seq_lens[segment]))
        place = tokens.stop
        height, width = segments.grid_hw[segment].tolist()
        picture = unpatchify(rows.patches[row, tokens], rows.coords[row, tokens], (height, width))
        axes.imshow(picture, extent=(left, left + width, height, 0))
        frame = Rectangle((left, 0), width, height, fill=False, ec=colours[number], lw=2.5)
        axes.add_patch(frame)
        left += width + 1.5
        tallest = max(tallest, height)
    if last - first > len(shown):
        axes.text(left, tallest / 2, f"+ {last - first - len(shown)}", va="center", fontsize=9)
        left += 6
    axes.set_xlim(-0.5, max(left, 3.2 * tallest))
    axes.set_ylim(tallest + 0.5, -0.5)
    axes.set_aspect("equal", anchor="W")
    axes.axis("off")
