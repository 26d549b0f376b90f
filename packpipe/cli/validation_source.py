"""What ``--val`` and ``--val-split`` say: a share of the images of SOURCE, or other images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from packpipe import checks
from packpipe.cli.open_source import file_of, open_source, splits_in

if TYPE_CHECKING:
    from datasets import Dataset

_HELD_OUT = ("validation", "test")  # splits to validate on, the first one that there is


def check_validates(val: str | None, options: dict[str, Any]) -> None:
    """Raise ValueError if an option of validation is given without ``--val``."""
    given = {name: value for name, value in options.items() if value is not None}
    if val is None and given:
        name = next(iter(given))
        remedy = "pass --val, such as --val 0.1"
        raise ValueError(checks.sentence(name, given[name], "none without --val", remedy))


def validation_of(
    val: str,
    val_split: str | None,
    *,
    dataset: Dataset,
    source: str,
    split: str,
    columns: dict[str, Any] | None = None,
) -> float | Dataset:
    """Return the share of images that is held out, or the images of another source or split.

    Args:
        val: a share; or a source, as is every path that exists, whatever its name.
        val_split: the split of that source; None takes ``"train"``, and of the source that is
            trained on another one, ``"validation"`` or ``"test"``, if it has one.
        dataset: the images that are trained on.
        source: where they are from.
        split: their split.
        columns: names that were asked for, which the other source may have, too.

    Raises:
        ValueError: there is no such share, source or split, or all of its images are trained on.
    """
    from packpipe.cli.labels import chosen, shared_images  # here, since they import `datasets`

    share = None if Path(val).exists() else _number(val)
    if share is not None:
        if not 0 < share < 1:
            expected = "a share between 0 and 1, or a source of images"
            raise ValueError(checks.sentence("--val", val, expected, "0.1 holds out a tenth"))
        if val_split is not None:
            remedy = "leave it out, or pass a source as --val"
            raise ValueError(checks.sentence("--val-split", val_split, "none of a share", remedy))
        return share
    is_same = _place(val) == _place(source)
    if val_split is None:
        there = splits_in(source) if is_same else []
        val_split = next((s for s in _HELD_OUT if s in there and s != split), "train")
    asked = columns or {}
    names = ("--val", "--val-split")
    found = open_source(val, val_split, names, rows=True, texts=True, **asked)
    # A folder beside a table, say, has no columns of these names.
    found = chosen(found, **{n: name for n, name in asked.items() if name in found.column_names})
    shared = shared_images(dataset, found)
    if len(shared) and len(shared) < len(found):
        _say_shared(found, shared.tolist())
    is_same = is_same and val_split == split
    if is_same or found._fingerprint == dataset._fingerprint or len(shared) == len(found) > 0:
        expected = "other images than those that are trained on"
        remedy = "pass a share to hold out, such as 0.1, or another --val-split"
        raise ValueError(checks.sentence("--val", f"{val} ({val_split})", expected, remedy))
    return found


def _say_shared(found: Dataset, shared: list[int]) -> None:
    """Say on stderr, once of all ranks, that images are validated on that are trained on, too."""
    if os.environ.get("RANK", "0") != "0":
        return
    first = file_of(found, shared[0]) or f"example {shared[0]}"
    said = f"--val: {len(shared)} of {len(found)} images are trained on, too, the first is {first}"
    typer.echo(checks.plain(said), err=True)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _place(source: str) -> str:
    path = Path(source)
    return str(path.resolve()) if path.exists() else source
