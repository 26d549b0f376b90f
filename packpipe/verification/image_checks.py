"""Checks rows of images, with the plan that they follow."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from packpipe import checks
from packpipe.building.shards import MANIFEST
from packpipe.images.masks import TargetRules, checked_rules
from packpipe.philox import Key
from packpipe.planning.block_windows import (
    block_rows_of,
    block_windows,
    joined,
    plan_window,
    runs_of,
    windows_of,
)
from packpipe.planning.decisions import boxes, decide, decide_all
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import MAX_SIDE, plan_epoch
from packpipe.planning.token_config import TokenConfig
from packpipe.rows import schema
from packpipe.rows.encoded import ENCODED, encoded_schema, image_damage
from packpipe.rows.fill_images import planned_images, planned_tokens, token_columns
from packpipe.rows.from_arrow import table_rows, table_segments
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows
from packpipe.sources.kinds import holds_numbers
from packpipe.sources.token_columns import TokenColumns
from packpipe.sources.token_source import token_source
from packpipe.verification.image_comparison import ImageComparison
from packpipe.verification.problems import FoundRows, Problem, same_json
from packpipe.verification.row_checks import Again, Check, rows_with, value_type_of


class Texts(NamedTuple):
    """What rows of images say of the texts beside them: their columns, and limits of a pack."""

    columns: TokenColumns
    seq_len: int
    longest: int


class ImageChecks:
    """The checks of rows of images, stored with their pixels, encoded, or without them."""

    KEYS = ("materialized", "image_column", "label_column", "image_root")
    COUNTS = ("shrunk", "broken_exif")
    VERSION_KEY, VERSION = "schema_version", schema.VERSION

    def __init__(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.config = PackConfig.from_dict(manifest["config"])
        self.key = Key(manifest["seed"], manifest["epoch"])
        # Raises if the epoch lies after the end of the training.
        decide(np.ones((1, 2), np.int32), self.config, self.key, index=np.zeros(1, np.int64))
        self.targets = _targets(manifest.get("targets"), self.config.patch_size)
        self.texts = None if "beside" not in manifest else _texts(manifest["beside"])
        self.undecoded = _undecoded(manifest.get("undecoded"))
        self.windows: dict[str, Any] | None = manifest.get("windows")
        # Rows of pixels do not say what they hold.
        if manifest.get("store", ENCODED) != ENCODED:
            raise ValueError(f"store is {manifest['store']!r}, expected {ENCODED!r} or none")
        self.encodes = "store" in manifest

    def counted(self) -> set[str]:
        """Return the names of the manifest's counts that rows of any kind do not have."""
        converts = self.manifest["materialized"] and self.config.profiles != "ignore"
        more = {"broken_profile": converts, "segments": self.config.num_views > 1}
        return {*self.COUNTS, *(name for name, counted in more.items() if counted)}

    def columns(self) -> list[str]:
        """Return the columns that stored rows must have."""
        label = None if self.manifest["label_column"] is None else pa.null()
        weighted = self.manifest.get("weight_column") is not None
        has_pixels = self.manifest["materialized"] and not self.encodes
        return list(self._schema(label, has_pixels, weighted).names)

    def schema_of(self, rows: pa.Table) -> pa.Schema:
        """Return the schema rows must have, given the type of their labels."""
        label = value_type_of(rows, "labels") if "labels" in rows.column_names else None
        return self._schema(label, "patches" in rows.column_names, "weight" in rows.column_names)

    def _schema(
        self, label: pa.DataType | None, has_pixels: bool, weighted: bool = False
    ) -> pa.Schema:
        if has_pixels:
            return schema.row_schema(self.config, label, weighted=weighted, targets=self.targets)
        segments = schema.segment_schema(label, self.config, weighted=weighted)
        return encoded_schema(segments) if self.encodes else segments

    def broken_segments(self, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with segments."""
        config, grids, lens = self.config, segments.grid_hw, segments.seq_lens
        below = segments.example_index < 0
        yield "an example below 0", rows_with(segments, below)
        views = np.broadcast_to(segments.views, len(lens))
        no_view = (views < 0) | (views >= config.num_views)
        yield f"a view that is none of {config.num_views}", rows_with(segments, no_view)
        no_grid = np.minimum(grids, segments.image_hw).min(axis=1, initial=1) < 1
        yield "a size or a grid below 1", rows_with(segments, no_grid)
        kept = lens - config.prefix_tokens
        outside = (kept < 1) | (kept > grids.astype(np.int64).prod(axis=1))
        what = "a segment with no token, or with more than its grid has"
        yield what, rows_with(segments, outside)
        # Sizes below 1 cannot be planned again.
        if (below | no_view | no_grid | outside).any():
            return
        yield from self._broken_boxes(segments)
        # Grids and numbers of tokens follow from size, options and key: decide again and compare.
        grid_hw, num_keep, _ = decide_all(
            segments.image_hw,
            config,
            self.key,
            index=segments.example_index,
            view=segments.views,
        )
        differs = (grids != grid_hw).any(axis=1) | (kept != num_keep)
        if config.fit_last is not None:  # may have enlarged the last segment of a row
            last = segments.offsets[1:][segments.num_segments > 0] - 1
            differs[last] = kept[last] < num_keep[last]
        what = "a grid or a number of tokens that its size does not give"
        yield what, rows_with(segments, differs)

    def _broken_boxes(self, segments: Rows) -> Iterator[Check]:
        """Yield which boxes are not within their image, or not those of the plan."""
        image_hw, index = segments.image_hw, segments.example_index
        view = segments.views
        expected = boxes(self.config, image_hw, self.key, index=index, view=view)
        if expected is None:
            return
        start, size = segments.box[:, :2].astype(np.int64), segments.box[:, 2:]
        beyond = (start < 0) | (size < 1) | (start + size > image_hw)
        yield "a box that is not within its image", rows_with(segments, beyond.any(axis=1))
        differs = (segments.box != expected).any(axis=1)
        yield "a box that is not the plan's", rows_with(segments, differs)

    def broken_tokens(self, rows: pa.Table, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with tokens whose segments are sound."""
        if self.encodes:
            damaged, unlike = image_damage(rows, self.config.max_pixels)
            yield "an encoded image with another checksum", rows_with(segments, damaged)
            yield "an encoded image of another size", rows_with(segments, unlike)
        if "patches" not in rows.column_names:
            return
        found = table_rows(rows)
        tokens = planned_tokens(segments, self.config, self.key)
        segment_ids, coords = token_columns(segments, tokens, self.config.seq_len)
        differing = (found.segment_ids != segment_ids).any(axis=1)
        yield "segment_ids are not those of seq_lens", differing
        yield "coords are not those of the kept tokens", (found.coords != coords).any(axis=(1, 2))
        held = np.count_nonzero(segment_ids, axis=1)
        if self.targets is not None:
            padding = segment_ids == 0
            some = np.zeros(len(held), np.bool_)
            for row, own in enumerate(found.targets):
                some[row] = (own[padding[row]] != self.targets.ignore).any()
            yield "targets are classes in padding", some
        # Row by row: one comparison of all rows would need as much memory again.
        pixels = zip(found.patches, held, strict=True)
        left = np.array([patches[end:].any() for patches, end in pixels], np.bool_)
        yield "patches are not zero in padding", left

    def no_rows(self) -> Rows:
        """Return rows with packpipe's own columns of segments, and no row."""
        return table_segments(self._schema(None, False).empty_table())

    def values(self) -> list[str]:
        """Return no columns: no value of the source but the label goes with an image."""
        return []

    def token_names(self) -> list[str]:
        """Return no columns: tokens of images are patches, in lists of fixed length."""
        return []

    def counts(self, held: Rows) -> dict[str, int]:
        """Return how many segments there are, if that is not the number of images."""
        return {"segments": len(held.seq_lens)} if self.config.num_views > 1 else {}

    def views(self) -> int:
        """Return how many segments each image has in the rows."""
        return self.config.num_views

    def stages(self) -> set[str]:
        """Return the stages that an example may be rejected at."""
        sized = "probe" if self.manifest.get("size_columns") is None else "size"
        found = {
            "label": self.manifest["label_column"] is not None
            or self.manifest.get("weight_column") is not None,
            "tokens": self.texts is not None,
            "decode": self.manifest["materialized"],
        }
        return {sized, *(name for name, possible in found.items() if possible)}

    def total_problems(self, held: Rows, rejects: list[Reject]) -> Iterator[Problem]:  # noqa: ARG002
        """Yield whether the sizes of images that could not be decoded are not of those."""
        lost = [reject.example_index for reject in rejects if reject.stage == "decode"]
        if self.undecoded is not None and self.undecoded[:, 0].tolist() != lost:
            found = self.undecoded[:, 0].tolist()
            yield Problem(MANIFEST, f"undecoded names the examples {found}, expected {lost}")

    def plan_again(self, held: Rows, rejects: list[Reject], beside: Any) -> Again | None:
        """Return the plan of all rows, made again; None if a size or a text is not known.

        Args:
            held: the rows, in which each view of an example is once.
            rejects: of the folder.
            beside: int64[rows of the source], tokens of the texts of `pack_pairs`.
        """
        lost = self.undecoded
        if lost is None:  # written before manifests had it
            if any(reject.stage == "decode" for reject in rejects):
                return None
            lost = np.empty((0, 3), np.int64)
        # Of an example of which only some views could be decoded, too, the size is told twice.
        index = np.concatenate([held.example_index, lost[:, 0]])
        image_hw = np.concatenate([held.image_hw, lost[:, 1:]])
        _, by_row = np.unique(index, return_index=True)
        also = None
        if self.texts is not None:
            if beside is None:
                return None
            if index.max(initial=-1) >= len(beside):
                raise ValueError(f"example {index.max()} has no text")
            also = np.minimum(beside[index[by_row]], self.texts.longest), self.texts.seq_len
        plans = self._plans(image_hw[by_row], index[by_row], also)
        plan = joined(plans)
        rows = planned_images(plan, range(len(plan)), None)
        # Images that could not be decoded were planned, and left out of their rows.
        gone = np.isin(rows.example_index, lost[:, 0])
        if self.config.num_views > 1:
            gone &= ~np.isin(self._numbers(rows), self._numbers(held))
        rows = rows.keep(~gone)
        bound = sum(one.quality.bound for one in plans)
        return Again(plan, rows, {"shrunk": plan.num_shrunk, "bound": bound})

    def _plans(
        self, image_hw: NDArray[np.int32], index: NDArray[np.int64], also: Any
    ) -> list[EpochPlan]:
        """Return the plan of all images; of a source in blocks, that of each window."""
        if self.windows is None:
            return [plan_epoch(image_hw, self.config, **self.key._asdict(), index=index, also=also)]
        block_rows, read = block_rows_of(self.windows["blocks"]), self.manifest["counts"]["read"]
        written = {"rows": self.windows["rows"], "blocks": runs_of(block_rows)}
        if not same_json(self.windows, written):
            raise ValueError(f"windows is {short(self.windows)}, expected {short(written)}")
        # In Python's integers, which are of any size.
        total = sum(rows * times for rows, times in self.windows["blocks"])
        if total != read:
            raise ValueError(f"windows are of {total} examples, expected {read}")
        windows = block_windows(block_rows, self.windows["rows"], self.key)
        window = windows_of(index, block_rows, windows)
        ends = np.cumsum(np.bincount(window, minlength=len(windows)))
        of_window = np.split(np.argsort(window, kind="stable"), ends[:-1])
        named = self.key._asdict()
        return [
            plan_window(image_hw[some], self.config, **named, index=index[some], window=number)
            for number, some in enumerate(of_window)
        ]

    def _numbers(self, rows: Rows) -> NDArray[np.int64]:
        """Return int64[segments], a number for each view of each example."""
        numbers: NDArray[np.int64] = rows.example_index * self.config.num_views + rows.views
        return numbers

    def beside_from(self, dataset: Dataset) -> NDArray[np.int64] | None:
        """Return int64[rows of the source], tokens of the texts beside the images, if there are."""
        if self.texts is None or len(dataset) != self.manifest["counts"].get("read"):
            return None
        if not all(holds_numbers(dataset.features.get(name)) for name in self.texts.columns.lists):
            return None
        return token_source(dataset, self.texts.columns).lens

    def source_columns(self) -> list[str]:
        """Return the columns of the source that rows were made from."""
        names = [self.manifest["image_column"], self.manifest["label_column"]]
        names += self.manifest.get("size_columns") or []
        names += [self.manifest.get("weight_column"), self.manifest.get("mask_column")]
        names += [] if self.texts is None else self.texts.columns.lists
        return [name for name in names if name is not None]

    def source_problems(
        self,
        dataset: Dataset,
        sample: int | None,
        found: FoundRows,
        rejects: list[Reject] | None,
    ) -> Generator[Problem, None, dict[str, int]]:
        """Compare sizes, labels and rejects with the source, and some pixels."""
        texts = None if self.texts is None else self.texts.columns
        comparison = ImageComparison(dataset, self.manifest, self.config, self.key, texts)
        return (yield from comparison.problems(found, rejects, self.undecoded, sample))


def _texts(beside: Any) -> Texts:
    """Return what a manifest says of texts beside the images.

    Raises:
        KeyError, TypeError, ValueError: it is not what `pack_pairs` writes.
    """
    config, columns = TokenConfig(**beside["config"]), beside["token_columns"]
    mask = beside.get("mask_column")
    for name, found in (
        ("token_columns", columns),
        ("mask_column", [] if mask is None else [mask]),
    ):
        if not all(isinstance(one, str) for one in found) or not columns:
            raise ValueError(f"beside.{name} is {found!r}, expected names")
    longest = checks.whole_number(
        "beside.max_text", beside["max_text"], 1, config.seq_len, "a text must fit into a row"
    )
    return Texts(TokenColumns(list(columns), [], mask), config.seq_len, longest)


def _targets(found: Any, patch_size: int) -> TargetRules | None:
    """Return how masks became targets; None if there are none.

    Raises:
        TypeError, ValueError: it is no such rule, or a patch cannot be divided by it.
    """
    if found is None:
        return None
    rules, remedy = TargetRules(**found), "mend the manifest"
    stride = checks.whole_number("targets.stride", rules.stride, 1, patch_size, remedy)
    dtype = checks.choice("targets.dtype", rules.dtype, ("uint8", "uint16"), remedy)
    return checked_rules(stride, patch_size, dtype)


def _undecoded(found: Any) -> NDArray[np.int64] | None:
    """Return int64[images, 3], the example and size of images that could not be decoded.

    Raises:
        TypeError, ValueError: they are no such numbers.
    """
    if found is None:
        return None
    numbers = np.array(
        [[checks.whole_number("undecoded", one, 0, 2**63 - 1, "") for one in row] for row in found],
        np.int64,
    ).reshape(len(found), 3)
    if (numbers[:, 1:] < 1).any() or (numbers[:, 1:] > MAX_SIDE).any():
        raise ValueError(f"undecoded is {found!r}, expected [example, height, width] of images")
    return numbers
