"""Checks rejects: that they are whole, and that each is as bad as it says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa
from datasets import Dataset

from packpipe._version import __version__
from packpipe.building.shards import REJECTS
from packpipe.images.pillow_settings import changed_settings
from packpipe.rows.rejects import Reject
from packpipe.rows.rejects_table import REJECTS_SCHEMA as SCHEMA
from packpipe.verification.problems import Problem, named, rows_of
from packpipe.verification.row_checks import has_nulls


def read_rejects(path: Path) -> list[Reject] | str:
    """Return the rejects of a folder, or what is wrong with their file."""
    try:
        table = rows_of(path)
    except (pa.ArrowInvalid, OSError) as error:
        return f"cannot be read: {error}"
    if not table.schema.equals(SCHEMA):
        return f"has the columns {table.schema.names}, expected {SCHEMA.names}"
    if any(has_nulls(column) for column in table.columns):
        return "holds nulls"
    return [Reject(**row) for row in table.to_pylist()]


def order_problems(rejects: list[Reject], stages: set[str]) -> Iterator[Problem]:
    """Yield whether rejects are out of order, or of a stage that such rows do not have."""
    if any(one > other for one, other in pairwise(rejects)):
        yield Problem(REJECTS, "is not in the order of the examples")
    for one in [reject for reject in rejects if reject.stage not in stages][:1]:
        expected = f"one of {', '.join(sorted(stages))}"
        yield Problem(REJECTS, f"stage is {one.stage!r}, expected {expected}")


def reject_problems(
    stored: list[Reject],
    bad: list[Reject],
    unknown: set[int],
    manifest: dict[str, Any],
    dataset: Dataset,
    codecs: dict[str, str],
) -> Iterator[Problem]:
    """Yield how rejects differ from the examples that are bad now.

    Args:
        stored: the rejects of the folder.
        bad: the examples of the source that cannot be packed, each once.
        unknown: examples of which nobody knows whether they are bad.
        manifest: of the folder.
        dataset: the source.
        codecs: versions of what decodes images here, as a manifest names them.
    """
    now = {reject.example_index: reject for reject in bad}
    there = {reject.example_index: reject for reject in stored}
    good = sorted(there.keys() - now.keys() - unknown)
    if good:
        yield Problem(named("example", good), "is among the rejects, but good")
    lost = sorted(now.keys() - there.keys() - unknown)
    if lost:
        reason, exception = now[lost[0]].reason, now[lost[0]].exception
        first = "" if len(lost) == 1 else f"example {lost[0]} "
        what = f"is bad ({first}{reason}: {exception}), but not among the rejects"
        yield Problem(named("example", lost), what)
    both = sorted((there.keys() & now.keys()) - unknown)
    depths = {example: _depth(now[example], manifest, dataset, codecs) for example in both}
    told = {
        example: (there[example][1:depth], now[example][1:depth])
        for example, depth in depths.items()
    }
    unlike = [example for example, (found, expected) in told.items() if found != expected]
    if unlike:
        found, expected = told[unlike[0]]
        what = f"{named('example', unlike)}: rejected as {found}, expected {expected}"
        yield Problem(REJECTS, what + ", the first of them" * (len(unlike) > 1))


def _depth(
    reject: Reject, manifest: dict[str, Any], dataset: Dataset, codecs: dict[str, str]
) -> int:
    """Return how many fields of a reject follow from the source: 1, 3 or 4.

    Other versions and settings of Pillow may say otherwise why an image is bad, other codecs say
    it in other words, and a copy elsewhere has other paths.
    """
    if manifest.get("pillow_settings", {}) != changed_settings():
        return 1
    if manifest.get("packpipe") != __version__ or manifest.get("pillow", PIL.__version__) != (
        PIL.__version__
    ):
        return 1
    is_here = manifest.get("source_fingerprint") == dataset._fingerprint
    same_text = is_here or not {"/", os.sep} & {*reject.exception}
    return 4 if same_text and manifest.get("codecs", codecs) == codecs else 3
