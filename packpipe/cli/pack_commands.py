"""The commands that plan rows: pack, and plan, which writes nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from packpipe import checks
from packpipe.cli.errors import one_line_errors
from packpipe.cli.open_source import naming_files, open_source, say_rejected, with_files
from packpipe.cli.options import (
    AsJson,
    CenterCropArea,
    CropArea,
    CropAspect,
    DamagedScans,
    DropRate,
    Epoch,
    MaxBadFraction,
    MaxSegments,
    MaxTokens,
    Overflow,
    PatchSize,
    Pixels,
    PrefixTokens,
    Profiles,
    Seed,
    SeqLen,
    Sides,
    Sizes,
    Source,
    Split,
    Strategy,
    ValueRange,
    Views,
    ViewsTogether,
    crop_of,
    given,
    resolution_of,
)
from packpipe.cli.output import print_json, print_table, say_what_is_done_once
from packpipe.cli.pack_windows import pack_windows
from packpipe.cli.packed_source import source_to_pack

_MOST_IN_A_ROW = 100  # bad examples, as `packpipe.pack` has it
# What the table of `suggest_seq_len` is read by.
_CHOICES = """<  the shortest that pads 1% at most, or else the one that pads least
(most): segments of the fullest row; ffd puts short examples together, balanced spreads them
masked ÷ segment attention: the work of attention over whole rows, masked, in units of that within
segments alone"""


@one_line_errors
def pack(
    source: Source,
    output: Annotated[str, typer.Argument(help="Folder to write; of windows also a URL.")],
    seq_len: SeqLen = 1024,
    patch_size: PatchSize = None,
    prefix_tokens: PrefixTokens = None,
    resolution: Sizes = None,
    sides: Sides = None,
    crop_area: CropArea = None,
    crop_aspect: CropAspect = None,
    center_crop: CenterCropArea = None,
    max_tokens: MaxTokens = None,
    drop_rate: DropRate = None,
    views: Views = None,
    views_together: ViewsTogether = None,
    max_segments: MaxSegments = None,
    strategy: Strategy = None,
    profiles: Profiles = None,
    damaged_scans: DamagedScans = None,
    pixels: Pixels = None,
    value_range: ValueRange = None,
    image_column: Annotated[str, typer.Option(help="Its name; auto finds the only one.")] = "auto",
    label_column: Annotated[str, typer.Option(help="Its name; auto finds it, none is none.")] = (
        "auto"
    ),
    image_root: Annotated[
        Path | None, typer.Option(help="The only folder that paths may lead into.")
    ] = None,
    token_column: Annotated[
        list[str] | None, typer.Option(help="A column of tokens; may be given again.")
    ] = None,
    overflow: Overflow = None,
    layout: Annotated[str | None, typer.Option(help="Of tokens: fixed or ragged.")] = None,
    pad_token_id: Annotated[int | None, typer.Option(help="What padding holds.")] = None,
    mask_first_label: Annotated[
        bool | None, typer.Option("--mask-first-label", help="Labels that nothing predicts.")
    ] = None,
    split: Split = "train",
    seed: Seed = 0,
    epoch: Epoch = 0,
    store: Annotated[
        str, typer.Option(help="Of images: pixels, or encoded, small and decoded when read.")
    ] = "pixels",
    num_workers: Annotated[int, typer.Option(help="Processes that decode.")] = 1,
    on_error: Annotated[str, typer.Option(help="Of bad images: quarantine, raise.")] = (
        "quarantine"
    ),
    max_bad_fraction: MaxBadFraction = 0.01,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, and write nothing.")] = False,
    window_rows: Annotated[
        int | None,
        typer.Option(
            help="Pack Parquet, tar or Arrow files (a folder or a pattern, also s3://) by windows "
            "of so many images, each by itself.  [16384 with --ray, --part, --finish]"
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Windows on a Ray cluster: auto, local, or its address.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="Windows of one of N parts, such as 3/100, here.")
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="Complete the folder after all parts.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pack a dataset into a folder; if stopped or killed, the same command resumes.

    Every example is in exactly one row, or in the rejects with its reason.
    """
    import packpipe
    from packpipe.sources.kinds import is_text

    say_what_is_done_once()
    by_windows = finish or any(one is not None for one in (window_rows, ray, part))
    if not by_windows:
        checks.local_path("OUTPUT", output)
    options = given(
        patch_size=patch_size,
        prefix_tokens=prefix_tokens,
        resolution=resolution_of(resolution, sides),
        crop=crop_of(crop_area, crop_aspect, center_crop),
        max_tokens=max_tokens,
        drop_rate=drop_rate,
        views=views,
        views_together=views_together,
        max_segments=max_segments,
        strategy=strategy,
        profiles=profiles,
        damaged_scans=damaged_scans,
        pixels=pixels,
        value_range=value_range,
        overflow=overflow,
        layout=layout,
        pad_token_id=pad_token_id,
        mask_first_label=mask_first_label,
    )
    where: dict[str, Any] = {
        "image_column": image_column,
        # A command line has no None.
        "label_column": None if label_column == "none" else label_column,
        "image_root": image_root,
        "token_columns": token_column or "auto",
        "seed": seed,
        "epoch": epoch,
        "store": store,
        "num_workers": num_workers,
    }
    if by_windows:
        if dry_run:
            expected, remedy = "none with windows", "plan one of the files by itself"
            raise ValueError(checks.sentence("--dry-run", dry_run, expected, remedy))
        if split != "train":
            expected, remedy = "none with windows", "name its files, by a pattern"
            raise ValueError(checks.sentence("--split", split, expected, remedy))
        manifest = pack_windows(
            source,
            output,
            seq_len,
            options,
            (on_error, max_bad_fraction, _MOST_IN_A_ROW),
            window_rows=window_rows,
            ray=ray,
            part=part,
            finish=finish,
            progress=sys.stderr.isatty(),
            **where,
        )
        if manifest is None:
            typer.echo(f"part {part} is packed; after all parts: --finish")
        elif as_json:
            print_json(manifest["counts"])
        else:
            print_table(output, [_said(*count) for count in manifest["counts"].items()])
        return
    columns = {"image_column": image_column, "label_column": label_column}
    dataset = source_to_pack(source, split, columns, tokens=bool(token_column))
    if is_text(dataset.features.get(image_column)):  # of paths: the images are beside it
        where["image_column"] = "auto"
    if dry_run:
        _print_plan(dataset, seq_len, where, options, as_json)
        return
    with naming_files(dataset):
        packpipe.pack(
            dataset,
            seq_len,
            **where,
            output=output,
            on_error=on_error,
            max_bad_fraction=max_bad_fraction,
            progress=sys.stderr.isatty(),
            **options,
        )
    found = packpipe.summarize(output)
    if as_json:
        print_json(found.to_dict())
        return
    print_table(output, found.rows())
    say_rejected(with_files(dataset, found.rejects))  # on stderr: stdout holds the figures alone


@one_line_errors
def plan(
    source: Source,
    seq_len: SeqLen = 1024,
    patch_size: PatchSize = None,
    prefix_tokens: PrefixTokens = None,
    resolution: Sizes = None,
    sides: Sides = None,
    crop_area: CropArea = None,
    crop_aspect: CropAspect = None,
    center_crop: CenterCropArea = None,
    max_tokens: MaxTokens = None,
    drop_rate: DropRate = None,
    views: Views = None,
    views_together: ViewsTogether = None,
    max_segments: MaxSegments = None,
    strategy: Strategy = None,
    overflow: Overflow = None,
    split: Split = "train",
    seed: Seed = 0,
    epoch: Epoch = 0,
    as_json: AsJson = False,
) -> None:
    """Say how a dataset would be packed, from its sizes alone, and which seq_len suits it."""
    options = given(
        patch_size=patch_size,
        prefix_tokens=prefix_tokens,
        resolution=resolution_of(resolution, sides),
        crop=crop_of(crop_area, crop_aspect, center_crop),
        max_tokens=max_tokens,
        drop_rate=drop_rate,
        views=views,
        views_together=views_together,
        max_segments=max_segments,
        strategy=strategy,
        overflow=overflow,
    )
    # From sizes alone, so labels of any type will do.
    where: dict[str, Any] = {"label_column": None, "seed": seed, "epoch": epoch}
    say_what_is_done_once()
    _print_plan(open_source(source, split), seq_len, where, options, as_json)


def _said(name: str, count: Any) -> tuple[str, str]:
    """Return a count of a manifest as (name, value), ready to print."""
    if isinstance(count, dict):
        by_reason = ", ".join(f"{number:,} {reason}" for reason, number in count.items())
        return name.replace("_", " "), by_reason or "none"
    return ("rows" if name == "packs" else name.replace("_", " ")), f"{count:,}"


def _print_plan(
    dataset: Any, seq_len: int, where: dict[str, Any], options: dict[str, Any], as_json: bool
) -> None:
    from packpipe.building.pack import job_of
    from packpipe.building.shards import format_bytes
    from packpipe.packing.suggest import suggest_seq_len

    # The same job as `pack` builds, so the figures are those of the build.
    planned = job_of(dataset, seq_len, options, **where).plan()
    quality, size = planned.plan.quality, planned.stored_bytes([range(len(planned.plan))])
    if as_json:
        figures = {"fill": quality.fill, "padding": quality.padding, "gap": quality.gap}
        counts = {"read": len(dataset), **planned.counts(planned.rejects, None)}
        counts["rejected"] = len(planned.rejects)
        print_json({"seq_len": seq_len, "counts": counts, **figures, "bytes": size})
        return
    kept = len(dataset) - len(planned.rejects)
    found = [
        (f"{planned.unit}s", f"{kept:,} of {len(dataset):,}"),
        ("rejected", f"{len(planned.rejects):,}"),
        *quality.rows("row")[1:],
        ("stored", format_bytes(size)),
    ]
    print_table(planned.what, found)
    if len(planned.plan.packs.lengths):
        limit = options.get("max_segments")
        choices = suggest_seq_len(planned.plan.packs.lengths, max_segments=limit)
        heading = "other seq_len for these token counts, each by --strategy ffd"
        typer.echo(f"\n{heading}:\n{choices}\n\n{_CHOICES}")
