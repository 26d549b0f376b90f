"""Checks rows of images, and compares their pixels with the source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from packpipe.images.decode import pixel_rules, probe
from packpipe.images.fill import Failure, ImageTask, fill_row
from packpipe.images.opening import BadImage
from packpipe.philox import Key
from packpipe.planning.decisions import decide_all
from packpipe.planning.image_config import PackConfig
from packpipe.rows import schema
from packpipe.rows.fill_images import planned_tokens, token_columns
from packpipe.rows.rows import Rows
from packpipe.rows.text import wide
from packpipe.sources.image_source import ImageSource, labels_of
from packpipe.verification.problems import FoundRows, Problem
from packpipe.verification.row_checks import Check, RowChecks, rows_with, value_type_of


class ImageChecks(RowChecks):
    """The checks of rows of images, stored with or without their pixels."""

    KEYS = ("materialized", "image_column", "label_column", "image_root")
    VERSION_KEY, VERSION = "schema_version", schema.VERSION
    config: PackConfig

    @staticmethod
    def config_of(values: dict[str, Any]) -> PackConfig:
        """Return the options of a manifest."""
        return PackConfig.from_dict(values)

    @property
    def key(self) -> Key:
        """(seed, epoch) that the rows were made with."""
        return Key(self.manifest["seed"], self.manifest["epoch"])

    def columns(self) -> list[str]:
        """Return the columns that stored rows must have."""
        return list(self._schema(None, self.manifest["materialized"]).names)

    def schema_of(self, rows: pa.Table) -> pa.Schema:
        """Return the schema rows must have, given the type of their labels."""
        label = value_type_of(rows, "labels") if "labels" in rows.column_names else None
        return self._schema(label, "patches" in rows.column_names)

    def _schema(self, label: pa.DataType | None, has_pixels: bool) -> pa.Schema:
        return schema.row_schema(self.config, label) if has_pixels else schema.segment_schema(label)

    def broken_segments(self, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with segments."""
        config, grids, lens = self.config, segments.grid_hw, segments.seq_lens
        below = segments.example_index < 0
        yield "an example below 0", rows_with(segments, below)
        no_grid = np.minimum(grids, segments.image_hw).min(axis=1, initial=1) < 1
        yield "a size or a grid below 1", rows_with(segments, no_grid)
        outside = (lens < 1) | (lens > grids.astype(np.int64).prod(axis=1))
        what = "a segment with no token, or with more than its grid has"
        yield what, rows_with(segments, outside)
        # Sizes below 1 cannot be planned again.
        if (below | no_grid | outside).any():
            return
        # Grids and numbers of tokens follow from size, options and key: decide again and compare.
        grid_hw, num_keep, _ = decide_all(
            segments.image_hw, config, self.key, index=segments.example_index
        )
        differs = (grids != grid_hw).any(axis=1) | (lens != num_keep)
        if config.fit_last is not None:  # may have enlarged the last segment of a row
            last = segments.offsets[1:][segments.num_segments > 0] - 1
            differs[last] = lens[last] < num_keep[last]
        what = "a grid or a number of tokens that its size does not give"
        yield what, rows_with(segments, differs)

    def broken_tokens(self, rows: pa.Table, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with tokens whose segments are sound."""
        if "patches" not in rows.column_names:
            return
        found = schema.table_rows(rows)
        tokens = planned_tokens(segments, self.key)
        segment_ids, coords = token_columns(segments, tokens, self.config.seq_len)
        differing = (found.segment_ids != segment_ids).any(axis=1)
        yield "segment_ids are not those of seq_lens", differing
        yield "coords are not those of the kept tokens", (found.coords != coords).any(axis=(1, 2))
        held = np.count_nonzero(segment_ids, axis=1)
        # Row by row: one comparison of all rows would need as much memory again.
        pixels = zip(found.patches, held, strict=True)
        left = np.array([patches[end:].any() for patches, end in pixels], np.bool_)
        yield "patches are not zero in padding", left

    def source_columns(self) -> list[str]:
        """Return the columns of the source that rows were made from."""
        names = (self.manifest["image_column"], self.manifest["label_column"])
        return [name for name in names if name is not None]

    def source_problems(
        self, dataset: Dataset, sample: int | None, found: FoundRows
    ) -> Iterator[Problem]:
        """Decode some images again, and yield how they differ from their tokens."""
        rows = dataset.select_columns([self.manifest["image_column"]]).with_format("arrow")
        source = ImageSource(rows, self.manifest["image_root"])
        labels = labels_of(dataset, self.manifest["label_column"])
        stored = _label_type(found)
        # Labels of more than 2 GiB come in the large type.
        if labels is not None and stored is not None and wide(labels.type) != wide(stored):
            yield Problem("dataset", f"has labels of type {labels.type}, expected {stored}")
            labels = None
        offsets = found.held().offsets
        total = int(offsets[-1])
        number = total if sample is None else min(sample, total)
        # A fixed seed, so that a second call looks at the same images; sorted, so that files are
        # read from front to back.
        chosen = np.random.default_rng(0).choice(total, number, replace=False)
        for at in np.sort(chosen).tolist():
            pack = int(np.searchsorted(offsets, at, side="right")) - 1
            name, stored, row = found.places[pack]
            number = at - int(offsets[pack])
            segment = _segment_of(stored.slice(row, 1), number)
            # The grid of a broken row may be anything, and ask for more memory than there is.
            if pack in found.broken:
                segment = segment._replace(patches=None)
            where = f"{name}, row {row}, segment {number + 1} (example {segment.example_index})"
            for what in _differences(segment, source, labels, self.config):
                yield Problem(where, what)


def _label_type(found: FoundRows) -> pa.DataType | None:
    """Return the type of the stored labels, None if there are none."""
    for _, stored, _ in found.places[:1]:
        if "labels" in stored.column_names:
            return stored.schema.field("labels").type.value_type
    return None


class _Segment(NamedTuple):
    """A segment as it is stored; patches and kept are None in rows without pixels."""

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
        # y · columns + x is the number of a token in raster order.
        kept = (tokens.coords[0, span] @ np.array([columns, 1])).astype(np.int32)
    labels = segments.segments.get("labels")
    label = None if labels is None else labels[number].as_py()
    example = int(segments.example_index[number])
    return _Segment(example, (height, width), (rows, columns), label, patches, kept)


def _differences(
    found: _Segment, source: ImageSource, labels: pa.Array | None, config: PackConfig
) -> Iterator[str]:
    """Yield how a segment differs from its example."""
    example = found.example_index
    if not 0 <= example < len(source.rows):  # the totals report it
        return
    if labels is not None and labels[example].as_py() != found.label:
        yield f"its label is {found.label!r}, expected {labels[example].as_py()!r}"
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
    task = ImageTask(example, data, image_hw, found.grid_hw, found.kept)
    expected = np.empty_like(found.patches)
    (failure,) = fill_row([task], expected, pixel_rules(config))
    if isinstance(failure, Failure):
        yield f"its image cannot be decoded again: {failure.exception}"
        return
    # int16, since a difference of two uint8 would wrap around.
    apart = np.abs(found.patches.astype(np.int16) - expected)
    if apart.any():
        yield (
            f"{np.count_nonzero(apart):,} of {apart.size:,} pixel values differ from the image's, "
            f"by {apart.max()} at most"
        )
