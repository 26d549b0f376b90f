"""Pictures of packed rows and of training, as matplotlib figures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray

from packpipe.images.patches import unpatchify
from packpipe.loading.draws import Draw
from packpipe.packing.quality import Quality
from packpipe.rows.picture import colours, row_picture
from packpipe.rows.rows import Rows

_EPOCHS_A_LINE = 8
# Inches: of the images of a row, of the space between two, of a line of a caption.
_WIDTH, _HEIGHT, _GAP, _LINE = 7.3, 1.95, 0.12, 0.16
_CAPTION_SIZE, _CAPTION_LINES = 10, 3  # points, and lines at most
_NARROWEST = 0.035  # inches of an i


def rows_of_many(num_segments: NDArray[np.integer], most: int = 4) -> list[int]:
    """Return the numbers of a few rows that show what packing does: many images, then fewer.

    Args:
        num_segments: int[rows], segments of each row.
        most: how many rows at most.

    >>> rows_of_many(np.array([1, 1, 9, 2, 1, 3]))
    [2, 5, 3, 0]
    """
    by_segments = np.argsort(-num_segments, kind="stable")
    place = np.arange(min(most, len(by_segments)))
    # At 0/32, 1/32, 3/32 and 6/32 of this order: many rows of photographs hold one alone.
    spread = place * (place + 1) // 2 * len(by_segments) // 32
    chosen: list[int] = by_segments[np.maximum(place, spread)].tolist()
    return chosen


def plot_rows(
    rows: Rows,
    *,
    max_thumbnails: int = 8,
    class_names: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
) -> Figure:
    """Return a figure of packed rows: the tokens as they are stored, and the images they hold.

    Left, a row's tokens in reading order, 64 a line, each segment tinted and edged in a colour of
    its own, padding hatched. Right, its images, put together again from tokens and coordinates,
    framed in the same colours, drawn to one scale and named by their classes.

    Args:
        rows: what `read_rows` returned; a few.
        max_thumbnails: how many images of each row are drawn, the first ones.
        class_names: of the labels 0, 1, ...; None draws no names.
        numbers: of the rows, for their titles; None leaves them out.
    """
    # Figure, not pyplot, which would keep every figure open and choose a window's backend.
    figure = Figure(figsize=(13, 0.6 + 2.2 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 2, width_ratios=[1.0, 1.35])
    for row in range(len(rows)):
        named = "" if numbers is None else f"row {numbers[row]}: "
        _draw_tokens(figure.add_subplot(grid[row, 0]), rows, row, named)
        images = figure.add_subplot(grid[row, 1])
        _draw_images(images, rows, row, max_thumbnails, class_names)
    figure.suptitle(
        "Left: rows as stored, each image in its colour, padding hatched. Right: the images.",
        fontsize=15,
    )
    return figure


def plot_mask(segment_ids: NDArray[np.int32]) -> Figure:
    """Return a figure of a row's attention mask: which token (down) sees which (across).

    Args:
        segment_ids: int32[seq_len], of one row; 0 in padding, which sees nothing.
    """
    ids = np.asarray(segment_ids)
    sees = (ids[:, None] == ids) & (ids > 0)
    # Number 0, padding, is white.
    tint = np.concatenate([[(1.0, 1.0, 1.0)], colours(int(ids.max(initial=0)))])
    picture = np.where(sees[..., None], tint[ids][:, None], 1.0)
    figure = Figure(figsize=(5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, interpolation="nearest")
    axes.set(xlabel="token that is seen", ylabel="token that sees")
    axes.set_title(f"{sees.mean():.1%} of all pairs", fontsize=10)
    return figure


def plot_draws(draws: Sequence[Draw], whole: NDArray[np.uint8] | None, image_hw: Any) -> Figure:
    """Return a figure of one image in some epochs: above where it is cropped, below as it is drawn.

    Dropped tokens are grey. Tokens are drawn to one scale.

    Args:
        draws: what is drawn in each epoch.
        whole: uint8[height, width, 3], the upright image in any size; None leaves it out.
        image_hw: its own (height, width) in pixels, in which boxes are given.
    """
    columns, kinds = min(len(draws), _EPOCHS_A_LINE), 1 if whole is None else 2
    lines = -(-len(draws) // columns)
    figure = Figure(figsize=(0.4 + 1.9 * columns, 2.1 * kinds * lines), layout="constrained")
    grid = figure.add_gridspec(kinds * lines, columns)
    most = np.max([draw.grid_hw for draw in draws], axis=0)  # rows, columns
    for place, draw in enumerate(draws):
        line, column = divmod(place, columns)
        title = f"epoch {draw.epoch}"
        if whole is not None:
            axes = figure.add_subplot(grid[kinds * line, column])
            axes.imshow(whole, extent=(0, image_hw[1], image_hw[0], 0), interpolation="antialiased")
            axes.set_title(title, fontsize=9)
            if draw.box is not None:
                top, left, height, width = draw.box
                axes.add_patch(Rectangle((left, top), width, height, fill=False, ec="r", lw=1.8))
                title = f"{height} × {width} of {image_hw[0]} × {image_hw[1]}"
            else:
                title = "all of it"
            axes.axis("off")
        axes = figure.add_subplot(grid[kinds * (line + 1) - 1, column])
        rows, across = draw.grid_hw
        # Axes count patches.
        axes.imshow(draw.pixels, extent=(0, across, rows, 0), interpolation="antialiased")
        axes.set(xlim=(0, most[1]), ylim=(most[0], 0), xticks=[], yticks=[])
        axes.set_title(f"{title}\n{draw.num_keep} of {rows} × {across} tokens", fontsize=8)
        axes.set_xlabel("\n".join(draw.changes) or "as it is", fontsize=7)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def plot_fill(tokens: NDArray[np.integer], quality: Quality) -> Figure:
    """Return a figure of the tokens of all rows, fullest first.

    Args:
        tokens: int[rows], tokens of each row.
        quality: the figures of the packing, for the title.
    """
    figure, axes = _small_figure()
    shares = np.sort(tokens)[::-1] / quality.seq_len
    axes.stairs(shares, np.linspace(0, 1, len(shares) + 1), fill=True)
    axes.axhline(1, color="0.4", lw=0.8)
    axes.set(xlabel="share of all rows, fullest first", ylabel="fill: 1 − padding")
    axes.set(xlim=(0, 1), ylim=(0, 1.05))
    gap = f"{quality.num_packs:,} rows, {quality.gap:,} above the proven least"
    axes.set_title(f"padding {quality.padding:.3%}; {gap}", fontsize=9)
    return figure


def plot_segments(segments: NDArray[np.integer], unit: str) -> Figure:
    """Return a figure of how many segments rows hold.

    Args:
        segments: int[rows], segments of each row.
        unit: what a segment is, such as ``"image"``.
    """
    figure, axes = _small_figure()
    counts = np.bincount(segments)
    axes.bar(np.arange(len(counts)), counts, width=0.9)
    axes.set(xlabel=f"{unit}s a row", ylabel="rows", xlim=(0.4, len(counts) - 0.4))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{np.mean(segments) if len(segments) else 0:.2f} {unit}s a row", fontsize=9)
    return figure


def plot_lengths(seq_lens: NDArray[np.integer], seq_len: int, unit: str) -> Figure:
    """Return a figure of how many tokens segments have.

    Args:
        seq_lens: int[segments], tokens of each segment.
        seq_len: tokens a row holds.
        unit: what a segment is, such as ``"image"``.
    """
    figure, axes = _small_figure()
    axes.hist(seq_lens, bins=min(64, seq_len), range=(0, seq_len))
    axes.set(xlabel=f"tokens of an {unit}" if unit == "image" else f"tokens of a {unit}")
    axes.set(ylabel=f"{unit}s", xlim=(0, seq_len))
    axes.set_title(f"{len(seq_lens):,} {unit}s", fontsize=9)
    return figure


def plot_sizes(image_hw: NDArray[np.integer]) -> Figure:
    """Return a figure of how large images are.

    Args:
        image_hw: int[images, 2], size in pixels.
    """
    figure, axes = _small_figure()
    height, width = np.asarray(image_hw).T  # [images] each
    axes.scatter(width, height, s=8, alpha=0.5, lw=0)
    axes.set(xlabel="width in pixels", ylabel="height in pixels", xscale="log", yscale="log")
    axes.set_title("images of the source", fontsize=9)
    return figure


def plot_losses(losses: Sequence[float], rows_per_epoch: int) -> Figure:
    """Return a figure of the loss at every step, and its mean over each epoch.

    Args:
        losses: one a step.
        rows_per_epoch: steps of an epoch, after which every row was seen once.
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

    Of a regression it is the mean absolute error instead of the accuracy. Loss and accuracy on
    validation images, if there are any, are drawn beside those in training. Figures that are None
    or absent leave a gap.

    Args:
        records: what `packpipe.training.read_log` returned.
    """
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    steps = [record["step"] for record in records]
    regresses = any(record.get("error") is not None for record in records)
    columns = (
        ("loss", "loss an image"),
        ("error", "mean absolute error") if regresses else ("accuracy", "accuracy"),
        ("images_per_s", "images a second"),
    )
    for place, (name, label) in enumerate(columns):
        axes = figure.add_subplot(1, 3, place + 1)
        values = np.array([record.get(name) for record in records], float)  # None becomes NaN
        axes.plot(steps, values, lw=0.8, alpha=0.5, label="training, each record")
        width = max(1, len(values) // 20)
        if width > 1:  # a twentieth of the training; few records need no smoothing
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axes.plot(steps[width - 1 :], smooth, label=f"mean of {width}")
        measured = [r for r in records if r.get(f"val_{name}") is not None]
        if measured:
            axes.plot(
                *zip(*((r["step"], r[f"val_{name}"]) for r in measured), strict=True),
                "o-",
                ms=3,
                lw=1,
                label="validation",
            )
        if width > 1 or measured:
            axes.legend(fontsize=8)
        axes.set(xlabel="step", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    return figure


def _small_figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    return figure, figure.add_subplot()


def _draw_tokens(axes: Any, rows: Rows, row: int, named: str) -> None:
    ids = rows.segment_ids[row]
    axes.imshow(row_picture(rows.patches[row], ids))
    axes.set_xticks([])
    axes.set_yticks([])
    num_segments = int(ids.max())
    images = "1 image" if num_segments == 1 else f"{num_segments} images"
    axes.set_title(
        f"{named}{images}, {int((ids > 0).sum())} of {len(ids)} tokens", fontsize=14, loc="left"
    )


def _draw_images(
    axes: Any, rows: Rows, row: int, max_thumbnails: int, class_names: Sequence[str] | None
) -> None:
    """Draw the first images of a row, to one scale, each below its whole caption.

    Axes count inches, in which captions have their size: an image that is narrower than its caption
    gets the caption's room, so that no caption is cut or runs into the next.
    """
    first, last = rows.offsets[row : row + 2]
    shown = range(int(first), int(min(last, first + max_thumbnails)))
    more = f"+ {last - first - len(shown)}" if last - first > len(shown) else ""
    captions = [""] * len(shown)
    width = _WIDTH - 0.16 * len(more)
    gap = min(_GAP, 0.3 * width / max(1, len(shown)))  # of very many, else nothing would be left
    if class_names is not None and len(shown):
        captions = [class_names[int(rows.segments["labels"][segment])] for segment in shown]
        whole = np.array([_inches(name) for name in captions])
        # Inches of a caption at most: what short ones do not need is left to the longer ones.
        most = max(whole)
        while sum(np.minimum(whole, most) + gap) > 0.97 * width:
            most *= 0.97
        captions = [_caption(name, most) for name in captions]
    room = [_inches(lines) for lines in captions]
    above = _LINE * max((lines.count("\n") + 1 for lines in captions if lines), default=0)
    grids = rows.grid_hw[first : shown.stop].astype(float)  # (height, width) in patches
    # Inches of a patch's side, the most with which all images have room.
    patch = (_HEIGHT - above) / max(grids[:, 0], default=1)
    while sum(np.maximum(grids[:, 1] * patch, room) + gap) > width:
        patch *= 0.97
    found = colours(int(last - first))
    place, left = 0, 0.0
    for number, (segment, caption) in enumerate(zip(shown, captions, strict=True)):
        tokens = slice(place, place + int(rows.seq_lens[segment]))
        place = tokens.stop
        grid_hw = rows.grid_hw[segment].tolist()
        picture = unpatchify(rows.patches[row, tokens], rows.coords[row, tokens], grid_hw)
        high, wide = grid_hw[0] * patch, grid_hw[1] * patch
        axes.imshow(picture, extent=(left, left + wide, above + high, above))
        axes.add_patch(Rectangle((left, above), wide, high, fill=False, ec=found[number], lw=2.5))
        if caption:
            # A class may be called "$5 to $9", which is no formula.
            axes.text(
                left, above - 0.05, caption, fontsize=_CAPTION_SIZE, va="bottom", parse_math=False
            )
        left += max(wide, room[number]) + gap
    if more:
        axes.text(left, above + _HEIGHT / 4, more, va="center", fontsize=14)
    axes.set(xlim=(-0.03, _WIDTH), ylim=(_HEIGHT + 0.03, -0.03))
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")


def _caption(name: str, most: float) -> str:
    r"""Return a name in lines of so many inches at most, three of them; a longer one ends in dots.

    >>> _caption("golden retriever", 0.8)
    'golden\nretriever'
    """
    for letters in range(min(len(name), int(most / _NARROWEST)), 0, -1):
        lines = textwrap.wrap(name, letters, max_lines=_CAPTION_LINES, placeholder="…")
        if _inches(caption := "\n".join(lines)) <= most:
            return caption
    return ""


def _inches(caption: str) -> float:
    """Return the width of a caption's longest line."""
    font = FontProperties(size=_CAPTION_SIZE)
    sizes = (
        text_to_path.get_text_width_height_descent(line, font, ismath=False)
        for line in caption.split("\n")
    )
    return max(float(width) for width, _, _ in sizes) / 72
