"""Rows of images, for `verify`: what they must be, and what their source gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from packpipe.images.decode import pixel_rules, probe
from packpipe.images.fill import Failure, Order, fill_row
from packpipe.images.opening import BadImage
from packpipe.planning.image_config import PackConfig
from packpipe.rows import schema
from packpipe.sources.image_source import ImageSource, labels_of
from packpipe.verification import row_checks
from packpipe.verification.problems import Broken, FoundRows, Held, Problem

KEYS: tuple[str, ...] = ("materialized", "image_column", "label_column", "image_root")
VERSION_KEY, VERSION = "schema_version", schema.VERSION
config_of = PackConfig.from_dict


def columns(manifest: dict[str, Any]) -> list[str]:
    """Return the columns that stored rows must have."""
    if manifest["materialized"]:
        return list(schema.row_schema(config_of(manifest["config"]), None).names)
    return list(schema.segment_schema(None).names)


def broken_rows(rows: pa.Table, manifest: dict[str, Any]) -> Iterator[Broken]:
    """Yield what is wrong with which rows of a table, from what they say alone."""
    config = config_of(manifest["config"])
    return row_checks.broken_rows(rows, config, seed=manifest["seed"], epoch=manifest["epoch"])


def held(rows: pa.Table) -> Held:
    """Return which examples rows hold."""
    found = schema.table_segments(rows)
    whole = np.zeros(len(found.seq_lens), np.int32)
    return Held(found.offsets, found.example_index, found.seq_lens, whole)


def total_problems(found: Held, manifest: dict[str, Any]) -> Iterator[Problem]:
    """Yield nothing: what holds of all rows of images holds of all rows."""
    del found, manifest
    yield from ()


def counts(found: Held) -> dict[str, int]:
    """Return the manifest's counts that only rows of images have."""
    del found
    return {}


def source_columns(manifest: dict[str, Any]) -> list[str]:
    """Return the columns of the source that rows were made from."""
    names = (manifest["image_column"], manifest["label_column"])
    return [name for name in names if name is not None]


def source_problems(
    dataset: Dataset, sample: int | None, manifest: dict[str, Any], found: FoundRows
) -> Iterator[Problem]:
    """Decode some images again, and compare them with their tokens."""
    image_column, label_column = manifest["image_column"], manifest["label_column"]
    rows = dataset.select_columns([image_column]).with_format("arrow")
    source = ImageSource(rows, manifest["image_root"])
    labels = labels_of(dataset, label_column)
    stored_type = _label_type(found)
    if labels is not None and stored_type not in (None, labels.type):
        yield Problem("dataset", f"has labels of type {labels.type}, expected {stored_type}")
        labels = None
    offsets = found.held().offsets
    total = int(offsets[-1])
    number = total if sample is None else min(sample, total)
    chosen = np.random.default_rng(0).choice(total, number, replace=False)
    for at in np.sort(chosen).tolist():
        pack = int(np.searchsorted(offsets, at, side="right")) - 1
        name, stored, row = found.places[pack]
        number = at - int(offsets[pack])
        segment = _segment_of(stored.slice(row, 1), number)
        where = f"{name}, row {row}, segment {number + 1} (example {segment.example_index})"
        for what in _differences(segment, source, labels, manifest):
            yield Problem(where, what)


def _label_type(found: FoundRows) -> pa.DataType | None:
    """Return the type of the stored labels, None if there are none."""
    for _, stored, _ in found.places[:1]:
        if "labels" in stored.column_names:
            return stored.schema.field("labels").type.value_type
    return None


class _Segment(NamedTuple):
    """What a row holds of an example; no patches and no kept tokens where none are stored."""

    example_index: int
    image_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    label: Any
    patches: NDArray[np.uint8] | None
    kept: NDArray[np.int32] | None


def _segment_of(row: pa.Table, number: int) -> _Segment:
    segments = schema.table_segments(row)
    height, width = segments.image_hw[number].tolist()
    rows, columns = segments.grid_hw[number].tolist()
    patches = kept = None
    if "patches" in row.column_names:
        tokens = schema.table_rows(row)
        start = int(segments.seq_lens[:number].sum())
        span = slice(start, start + int(segments.seq_lens[number]))
        patches = tokens.patches[0, span]
        kept = (tokens.coords[0, span] @ np.array([columns, 1])).astype(np.int32)
    label = None if segments.labels is None else segments.labels[number].as_py()
    example = int(segments.example_index[number])
    return _Segment(example, (height, width), (rows, columns), label, patches, kept)


def _differences(
    found: _Segment, source: ImageSource, labels: pa.Array | None, manifest: dict[str, Any]
) -> Iterator[str]:
    """Yield how a segment differs from its example."""
    example = found.example_index
    if not 0 <= example < len(source.rows):  # said before
        return
    if labels is not None and labels[example].as_py() != found.label:
        yield f"its label is {found.label!r}, expected {labels[example].as_py()!r}"
    config = config_of(manifest["config"])
    try:
        data = source(example)
        image_hw = probe(data, max_pixels=config.max_pixels).image_hw
    except BadImage as error:
        yield f"its image cannot be read again: {error}"
        return
    if image_hw != found.image_hw:
        yield f"image_hw is {found.image_hw}, expected {image_hw}"
        return
    if found.patches is None:
        return
    order = Order(example, data, image_hw, found.grid_hw, found.kept)
    expected = np.empty_like(found.patches)
    (failure,) = fill_row([order], expected, pixel_rules(config))
    if isinstance(failure, Failure):
        yield f"its image cannot be decoded again: {failure.exception}"
        return
    apart = np.abs(found.patches.astype(np.int16) - expected)
    if apart.any():
        yield (
            f"{np.count_nonzero(apart):,} of {apart.size:,} pixel values differ from the image's, "
            f"by {apart.max()} at most"
        )
