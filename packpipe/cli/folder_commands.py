"""The commands that look at packed rows: stats, show and verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from packpipe import checks
from packpipe.cli.errors import one_line_errors
from packpipe.cli.open_source import say_rejected, with_files
from packpipe.cli.options import (
    AsJson,
    CenterCropArea,
    CropArea,
    CropAspect,
    DropRate,
    Folder,
    MaxTokens,
    PatchSize,
    Sides,
    Sizes,
    crop_of,
    given,
    resolution_of,
)
from packpipe.cli.output import print_json, print_table, saying
from packpipe.cli.packed_source import check_names_source, check_source, packed_source

SourceSplit = Annotated[str | None, typer.Option(help="Of the dataset.  \\[train]")]
SourceImages = Annotated[
    str | None, typer.Option("--image-column", help="Its images, or their paths, as in pack.")
]
SourceLabels = Annotated[str | None, typer.Option("--label-column", help="Its labels, as in pack.")]


@one_line_errors
def stats(
    folder: Folder,
    html: Annotated[Path | None, typer.Option(help="Write a report that opens offline.")] = None,
    source: Annotated[
        str | None,
        typer.Option(help="The dataset that was packed: rejects get the names of their files."),
    ] = None,
    split: SourceSplit = None,
    image_column: SourceImages = None,
    label_column: SourceLabels = None,
    as_json: AsJson = False,
) -> None:
    """Say what packed rows hold: padding, gap, segments a row, lengths, rejects."""
    import packpipe

    if html is not None:
        checks.local_path("--html", html)
    check_names_source(source, split=split, image_column=image_column, label_column=label_column)
    with saying(f"reading {folder}"):
        found, dataset = packpipe.summarize(folder), None
    if source is not None:
        dataset = packed_source(found.manifest, source, split, image_column, label_column)
        check_source(found.manifest, dataset)
    rejected = with_files(dataset, found.rejects)
    if html is not None:
        with saying(f"drawing {html}"):
            from packpipe.cli.report import write_report

            write_report(found, html, [name for name, _ in rejected])
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(folder, found.rows())
        say_rejected(rejected)
        if html is not None:
            typer.echo(checks.plain(f"report: {html}"))


@one_line_errors
def show(
    folder: Annotated[
        str, typer.Argument(help="What pack wrote; with --augment, also what pack would take.")
    ],
    rows: Annotated[
        list[int] | None,
        typer.Argument(
            help="Numbers of rows; with --augment, the row of one image in its source.  \\[a few "
            "rows of several images; with --augment 0]"
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")] = Path(
        "rows.png"
    ),
    mask: Annotated[
        bool, typer.Option("--mask", help="Draw the first one's attention mask instead.")
    ] = False,
    augment: Annotated[
        str | None,
        typer.Option(help="Draw one image over epochs instead, as augmented: three, inception."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=64, help="How many, with --augment.  [8]")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a row, of a source.  [1024]")] = None,
    patch_size: PatchSize = None,
    resolution: Sizes = None,
    sides: Sides = None,
    crop_area: CropArea = None,
    crop_aspect: CropAspect = None,
    center_crop: CenterCropArea = None,
    max_tokens: MaxTokens = None,
    drop_rate: DropRate = None,
    split: Annotated[str | None, typer.Option(help="Of a source.  \\[train]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn.  [0]")] = None,
) -> None:
    """Draw packed rows: patches in place, segments coloured, padding hatched.

    With --augment, one image in several epochs: its crop, flip, colours and kept tokens. The other
    options but --output and --mask are for that; those of sizes and crops for a source alone.
    """
    with saying("importing matplotlib"):
        from packpipe.cli.report import draw_epochs, draw_rows

        _check_picture(output)
    told = given(epochs=epochs, seed=seed, split=split)
    options = given(
        seq_len=seq_len,
        patch_size=patch_size,
        resolution=resolution_of(resolution, sides),
        crop=crop_of(crop_area, crop_aspect, center_crop),
        max_tokens=max_tokens,
        drop_rate=drop_rate,
    )
    if augment is None:
        for name, value in {**options, **told}.items():
            expected, remedy = "left out without augment", "pass --augment"
            raise ValueError(checks.sentence(name, value, expected, remedy))
        with saying(f"drawing rows of {folder}"):
            figure = draw_rows(folder, rows, mask=mask)
    else:
        if mask:
            expected, remedy = "left out with augment", "ask for one of them"
            raise ValueError(checks.sentence("mask", mask, expected, remedy))
        numbers = rows or [0]
        if len(numbers) > 1:
            expected, remedy = "one image, with augment", "call it once for each"
            raise ValueError(checks.sentence("rows", numbers, expected, remedy))
        figure = draw_epochs(
            folder, numbers[0], augment, epochs or 8, seed or 0, split=split, options=options
        )
    figure.savefig(output, dpi=110)
    typer.echo(checks.plain(output))


@one_line_errors
def verify(
    folder: Folder,
    source: Annotated[
        str | None,
        typer.Option(
            help="The dataset that was packed. All labels, sizes, sequences and rejects are "
            "compared with it; some images are decoded again."
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="How many images.")] = 100,
    split: SourceSplit = None,
    image_column: SourceImages = None,
    label_column: SourceLabels = None,
    as_json: AsJson = False,
) -> None:
    """Check every file, row and count of a packed folder, and that no example is lost.

    The plan is made again and compared row by row. --json prints one object: folder, ok, problems
    (a list of where and what) and counts (those of the manifest; {} if it cannot be read).
    """
    import packpipe

    check_names_source(source, split=split, image_column=image_column, label_column=label_column)
    dataset = None
    if source is not None:
        dataset = packed_source(_manifest_of(folder), source, split, image_column, label_column)
    with saying(f"checking every row of {folder}"):
        problems = packpipe.verify(folder, dataset, sample=sample)
    if as_json:
        found = [problem._asdict() for problem in problems]
        counts = _counts_of(folder)
        print_json({"folder": folder, "ok": not found, "problems": found, "counts": counts})
    else:
        for problem in problems:
            typer.echo(checks.plain(problem), err=True)
    if problems:
        raise typer.Exit(1)
    if not as_json:
        typer.echo(checks.plain(f"{folder}: nothing is wrong"))


def _counts_of(folder: str) -> dict[str, Any]:
    """Return the counts of a manifest, which may be broken; of `pack_pairs` those of the images."""
    counts = _manifest_of(folder).get("counts")
    return counts if isinstance(counts, dict) else {}


def _manifest_of(folder: str) -> dict[str, Any]:
    """Return what a manifest holds, {} if it is broken; of `pack_pairs` that of the images."""
    from packpipe.building.opened import manifest_at

    for place in (folder, f"{folder}/images"):
        try:
            found = manifest_at(place)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _check_picture(path: Path) -> None:
    """Raise ValueError if no picture can be written there."""
    from matplotlib.backend_bases import FigureCanvasBase

    checks.local_path("--output", path)
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        expected = "a name that ends in " + ", ".join(f".{kind}" for kind in sorted(known))
        raise ValueError(checks.sentence("--output", str(path), expected, "such as rows.png"))
    if not path.parent.is_dir():
        expected, remedy = "a file in a folder that is there", f"make {path.parent} first"
        raise ValueError(checks.sentence("--output", str(path), expected, remedy))
