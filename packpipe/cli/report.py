"""Pictures of packed rows, and a report as one HTML page that opens offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features
from matplotlib.figure import Figure

from packpipe import checks
from packpipe.augmenting.augment import Augment
from packpipe.building.opened import packed_at
from packpipe.building.summary import Summary
from packpipe.cli.open_source import is_packed, open_source
from packpipe.images.decode import probe
from packpipe.loading.draws import draws_of_rows, draws_of_source, whole_image
from packpipe.loading.read import read_rows
from packpipe.packing.picture import bars
from packpipe.philox import Key
from packpipe.planning.image_config import config_from
from packpipe.plots import (
    plot_draws,
    plot_fill,
    plot_lengths,
    plot_mask,
    plot_rows,
    plot_segments,
    plot_sizes,
    rows_of_many,
)
from packpipe.rows.from_arrow import table_segments
from packpipe.sources.image_columns import image_column_of
from packpipe.sources.image_source import ImageSource

_SHOWN_REJECTS = 20
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.note { color: #555; margin: .2rem 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0; }
.figures div { background: #f3f5f8; border-radius: .5rem; padding: .6rem .8rem; }
.figures b { display: block; font-size: 1.35rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: .5rem; }
img, svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
.photo img { min-width: 48rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0;
  border-bottom: 1px solid #e4e4e4; overflow-wrap: anywhere; }
th { font-weight: 600; width: 45%; }
"""


def draw_rows(
    folder: str | Path, rows: Sequence[int] | None = None, *, mask: bool = False
) -> Figure:
    """Return a figure of some rows of images, or of the attention mask of the first row.

    Args:
        folder: what `pack` was given as ``output``, also a URL, of which these rows alone are read.
        rows: their numbers; None chooses a few that hold several images, if there are any.
        mask: whether to draw the mask; rows of token sequences have no other picture.

    Raises:
        IndexError: there is no such row.
        ValueError: `pack` has not completed the folder, or it holds no tokens.
    """
    opened = packed_at(folder)
    # Manifests of token sequences have no such entry: their rows always hold their tokens.
    if not opened.manifest.get("materialized", True):
        expected, remedy = "rows with their tokens", "pack with materialize=True"
        raise ValueError(checks.sentence("folder", str(folder), expected, remedy))
    packed = opened.rows(may_copy=False)
    if rows is None:
        rows = rows_of_many(table_segments(packed.data.table).num_segments) or [0]
    found = read_rows(packed, list(rows))
    as_mask = mask or found.of_tokens
    if as_mask:
        return plot_mask(found.segment_ids[0])
    return plot_rows(found, class_names=_class_names(packed.features), numbers=rows)


def _class_names(features: Features) -> list[str] | None:
    """Return the names of the one class that each image of packed rows has, if it has one."""
    label = getattr(features.get("labels"), "feature", None)
    return label.names if isinstance(label, ClassLabel) else None


def draw_epochs(
    source: str,
    example: int,
    augment: str,
    num_epochs: int,
    seed: int,
    *,
    split: str | None,
    options: dict[str, Any],
) -> Figure:
    """Return a figure of one image as a loader draws it in the first epochs.

    Args:
        source: a folder that `pack` wrote, whose sizes, crops and tokens stay as they are; or a
            dataset, of which `EpochPacks` draws all of these anew.
        example: row in the dataset.
        augment: a preset of `Augment`.
        num_epochs: how many epochs, from 0 on.
        seed: of the loader.
        split: of the dataset; None for "train".
        options: of `PackConfig`, for a dataset.

    Raises:
        ValueError: there is no such example, or options are given for a folder of rows.
    """
    drawn, keys = Augment.preset(augment), [Key(seed, epoch) for epoch in range(num_epochs)]
    if is_packed(source):
        for name, value in (options if split is None else {"split": split, **options}).items():
            expected, remedy = "left out for packed rows", "they are as they were packed"
            raise ValueError(checks.sentence(name, value, expected, remedy))
        packed = packed_at(source).rows(may_copy=False)
        return plot_draws(draws_of_rows(packed, example, drawn, keys), None, None)
    config = config_from(options.pop("seq_len", 1024), options)
    dataset = open_source(source, split or "train")
    remedy = "pass a row of the source"
    example = checks.whole_number("example", example, 0, len(dataset) - 1, remedy)
    column = image_column_of(dataset.features, "auto")
    # Header and pixels of this one image: whatever else is wrong with the source is not asked.
    images = ImageSource(dataset.select_columns([column]).with_format("arrow"))
    image_hw = probe(images(example), max_pixels=config.max_pixels).image_hw
    draws = draws_of_source(images, example, config, drawn, keys)
    return plot_draws(draws, whole_image(images, example, config), image_hw)


def write_report(summary: Summary, path: Path, names: Sequence[str] | None = None) -> None:
    """Write a page about packed rows: figures, pictures and rejects, in one file.

    Args:
        summary: of the rows.
        path: the file to write, in a folder that exists.
        names: of the rejects, such as their files; None numbers them.
    """
    path.write_text(report(summary, names), encoding="utf-8")


def report(summary: Summary, names: Sequence[str] | None = None) -> str:
    """Return a page about packed rows as HTML, with its pictures inside; `write_report`."""
    quality = summary.quality
    title = f"{quality.num_packs:,} packed rows"
    made = f"{summary.folder}, packpipe {summary.manifest['packpipe']}, {date.today()}"
    tiles = [
        (f"{quality.padding:.2%}", "padding"),
        (f"{summary.padding_alone:.2%}", f"with one {summary.unit} a row"),
        (f"{quality.gap:,}", "rows above the proven least"),
        (f"{quality.packing_factor:.2f}", f"{summary.unit}s a row"),
        (f"{len(summary.rejects):,}", "rejected"),
    ]
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="note">{escape(made)}</p>',
        '<div class="figures">',
        *(f"<div><b>{value}</b>{escape(what)}</div>" for value, what in tiles),
        "</div>",
        _table(summary.rows()),
        "<h2>Some rows, and what they hold</h2>",
        f'<p class="note">A bar a row; colours tell {summary.unit}s apart, grey is padding.</p>',
        bars(summary.seq_lens, summary.offsets, quality.seq_len, "row"),
    ]
    if len(summary.seq_lens):
        charts = [
            (plot_fill(summary.tokens, quality), "fill of each row"),
            (plot_segments(summary.segments, summary.unit), "segments of each row"),
            (plot_lengths(summary.seq_lens, quality.seq_len, summary.unit), "tokens of segments"),
        ]
        if summary.image_hw is not None:
            charts.append((plot_sizes(summary.image_hw), "sizes of images"))
        images = "".join(_image(figure, alt) for figure, alt in charts)
        parts += ["<h2>Fill and lengths</h2>", f'<div class="charts">{images}</div>']
        if summary.unit == "image" and summary.manifest["materialized"]:
            chosen = rows_of_many(summary.segments)
            picture = draw_rows(summary.folder, chosen)
            named = ", ".join(map(str, chosen))
            image = _image(picture, "packed rows", as_photo=True)
            # On a telephone it is scrolled, since its words could not be read so narrow.
            parts += [f"<h2>Rows {named}</h2>", f'<div class="wide photo">{image}</div>']
    # Not all: a page that lists a million of them opens nowhere.
    if summary.rejects:
        shown = summary.rejects[:_SHOWN_REJECTS]
        called = names or [f"example {reject.example_index}" for reject in shown]
        more = f", the first {len(shown)}" if len(shown) < len(summary.rejects) else ""
        why = [f"{reject.reason}: {reject.exception}" for reject in shown]
        rows = list(zip(called[: len(shown)], why, strict=True))
        parts += [f"<h2>Rejects{more}</h2>", _table(rows)]
    config = {name: str(value) for name, value in summary.manifest["config"].items()}
    parts += ["<h2>Options</h2>", _table(list(config.items()))]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _table(rows: list[tuple[str, str]]) -> str:
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _image(figure: Figure, alt: str, *, as_photo: bool = False) -> str:
    """Return a figure as an ``img`` element that holds its data."""
    # JPEG for rows of photographs, which PNG compresses badly.
    out, kind = io.BytesIO(), "jpeg" if as_photo else "png"
    figure.savefig(out, format=kind, dpi=150, pil_kwargs={"quality": 85} if as_photo else {})
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'
