"""A build: the folder of a packed dataset, its contents and its manifest (floor 2).

Probes every header, plans once, then lets threads fill the planned rows: the codecs release
the interpreter lock, and the plan, not the workers, decides what a row holds. A build happens
in a hidden folder beside its target and is renamed into place when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import PIL
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features
from PIL import features as codecs

import packpipe
from packpipe import checks, schema, table
from packpipe.config import PackConfig
from packpipe.epoch_plan import EpochPlan
from packpipe.features import packed_features
from packpipe.lazy import LazyRows
from packpipe.plan import plan_epoch
from packpipe.quality import fill
from packpipe.quarantine import Tolerance
from packpipe.rows import Reject, Segments, fill_rows, planned_segments
from packpipe.sizes import sizes_of
from packpipe.source import ImageSource, Survey, labels_of, survey

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REJECTS = "rejects.arrow"
_CODECS = ("jpg", "libjpeg_turbo", "webp", "zlib", "libtiff", "jpg_2000", "avif")


@dataclass(frozen=True)
class Build:
    """What `pack` was asked for; names, writes and opens the folder that holds it.

    Attributes:
        dataset: the source.
        image_column, label_column: its columns; no label column is None.
        size_columns: its columns of heights and widths; None reads headers.
        config, seed, epoch: what the plan is made from.
        materialize: whether pixels are stored, or computed when read.
    """

    dataset: Dataset
    image_column: str
    label_column: str | None
    size_columns: tuple[str, str] | None
    config: PackConfig
    seed: int
    epoch: int
    materialize: bool

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything the bytes of the folder depend on."""
        return {
            "schema_version": schema.VERSION,
            "packpipe": packpipe.__version__,
            "pillow": PIL.__version__,
            "codecs": {name: codecs.version(name) for name in _CODECS if codecs.check(name)},
            "source_fingerprint": self.dataset._fingerprint,
            "source_files": self._source.files_digest(),
            "image_column": self.image_column,
            "label_column": self.label_column,
            "size_columns": None if self.size_columns is None else list(self.size_columns),
            "config": self.config.to_dict(),
            "seed": self.seed,
            "epoch": self.epoch,
            "materialized": self.materialize,
        }

    def cache_folder(self) -> Path:
        """Return the folder of the `datasets` cache that is this build's own."""
        return Path(datasets.config.HF_DATASETS_CACHE) / "packpipe" / self._digest()[:32]

    def is_at(self, folder: Path) -> bool:
        """Return whether this build is complete in folder; refuse a folder of anything else."""
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        remedy = "choose another output, or remove it"
        if not (folder / MANIFEST).is_file():
            raise FileExistsError(
                checks.sentence("output", str(folder), "an absent or empty folder", remedy)
            )
        found = read_manifest(folder)
        differing = [name for name, value in self.record.items() if found.get(name) != value]
        if differing:
            expected = f"rows made with the same {', '.join(differing)}"
            raise FileExistsError(checks.sentence("output", str(folder), expected, remedy))
        return True

    def make(self, target: Path, num_workers: int, tolerance: Tolerance, progress: bool) -> None:
        """Write the folder under a temporary name, then rename it to target."""
        partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
        partial.mkdir(parents=True)
        try:
            self._write(partial, num_workers, tolerance, progress)
            try:
                partial.rename(target)
            except OSError:
                if not self.is_at(target):  # another process may have been first
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def open(self, folder: Path, on_error: str) -> Dataset:
        """Return the dataset a complete folder holds; on_error is for rows computed when read."""
        names = sorted(name for name in read_manifest(folder)["files"] if name != REJECTS)
        packed = datasets.concatenate_datasets(
            [Dataset.from_file(str(folder / name)) for name in names]
        )
        if self.materialize:
            return packed
        lazy = LazyRows(self._source, self.config, self.seed, self.epoch, self._label, on_error)
        return packed.with_transform(lazy)

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    @property
    def _source(self) -> ImageSource:
        return ImageSource(self.dataset.select_columns([self.image_column]).with_format("arrow"))

    @property
    def _label(self) -> Any:
        return None if self.label_column is None else self.dataset.features[self.label_column]

    @property
    def _features(self) -> Features:
        return packed_features(self.config, self._label, tokens=self.materialize)

    def _write(self, folder: Path, num_workers: int, tolerance: Tolerance, progress: bool) -> None:
        labels = labels_of(self.dataset, self.label_column)
        # One worker needs no thread: this one probes and fills.
        threads = nullcontext() if num_workers == 1 else ThreadPoolExecutor(num_workers)
        bar = datasets.utils.tqdm(desc="Packing", unit=" images", disable=not progress)
        with threads as executor, bar:
            sizes = sizes_of(
                self.dataset,
                self._source,
                self.size_columns,
                max_pixels=self.config.max_pixels,
                executor=executor,
            )
            found = survey(sizes, labels, self._label)
            tolerance.check(found.rejects)
            bar.reset(len(found.index))
            plan = plan_epoch(
                found.image_hw, self.config, seed=self.seed, epoch=self.epoch, index=found.index
            )

            def tables(packs: range) -> Iterator[pa.Table]:
                for some in _cut(packs, table.BATCH_BYTES // self.config.row_bytes):
                    segments = planned_segments(plan, some, labels)
                    yield self._stored(segments, executor, found.rejects, tolerance)
                    bar.update(len(segments.seq_lens))

            files = {}
            # At least one file, so that an empty dataset has its columns too.
            per_file = table.FILE_BYTES // self.config.row_bytes
            for number, packs in enumerate(_cut(range(len(plan)), per_file) or [range(0)]):
                name = f"data-{number:05d}.arrow"
                stored = self._features.arrow_schema
                files[name] = table.write_table(folder / name, stored, tables(packs))
        self._write_sidecars(folder, plan, found, files)

    def _stored(
        self,
        segments: Segments,
        executor: Executor | None,
        rejects: list[Reject],
        tolerance: Tolerance,
    ) -> pa.Table:
        """Return the stored columns of some rows; adds what could not be decoded to the rejects."""
        stored = self._features.arrow_schema
        if not self.materialize:
            return schema.segments_table(segments, stored)
        rows, undecodable = fill_rows(
            segments,
            self._source,
            self.config,
            seed=self.seed,
            epoch=self.epoch,
            executor=executor,
        )
        if undecodable:
            rejects.extend(undecodable)
            tolerance.check(rejects)
        return schema.rows_table(rows, stored)

    def _write_sidecars(
        self, folder: Path, plan: EpochPlan, found: Survey, files: dict[str, Any]
    ) -> None:
        if found.rejects:
            log.warning(
                "%d of %d examples rejected; packpipe.rejects(packed) says which and why",
                len(found.rejects),
                len(self.dataset),
            )
        # `datasets.load_from_disk` opens the folder by these two.
        DatasetInfo(features=self._features).write_to_directory(str(folder))
        table.write_json(folder / "state.json", _state(list(files), self._digest()[:16]))
        rejects = schema.rejects_table(found.rejects)
        files[REJECTS] = table.write_table(folder / REJECTS, schema.REJECTS, [rejects])
        counts = _counts(plan, found, len(self.dataset))
        share = fill(counts["tokens"], len(plan), self.config.seq_len)
        table.write_json(
            folder / MANIFEST, {**self.record, "counts": counts, "fill": share, "files": files}
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete folder."""
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return found


def read_rejects(folder: Path) -> list[Reject]:
    """Return the rejects of a complete folder."""
    stored = Dataset.from_file(str(folder / REJECTS))
    return [Reject(**row) for row in stored]


def _cut(packs: range, step: int) -> list[range]:
    """Return consecutive ranges of step packs, at least one each; none if there are no packs."""
    step = max(1, step)
    return [packs[start : start + step] for start in range(0, len(packs), step)]


def _counts(plan: EpochPlan, found: Survey, num_examples: int) -> dict[str, Any]:
    """Return the manifest's counts; an image that failed when decoded gave no tokens."""
    rejects = found.rejects
    lost = [reject.example_index for reject in rejects if reject.stage == "decode"]
    lost_tokens = (
        dict(zip(plan.index.tolist(), plan.num_keep.tolist(), strict=True)) if lost else {}
    )
    return {
        "read": num_examples,
        "packed": num_examples - len(rejects),
        "rejected": len(rejects),
        "rejected_by_reason": dict(sorted(Counter(r.reason for r in rejects).items())),
        "shrunk": plan.num_shrunk,
        "broken_exif": found.broken_exif,
        "packs": len(plan),
        "bound": plan.bound,
        "tokens": plan.num_tokens - sum(lost_tokens[example] for example in lost),
    }


def _state(data_files: list[str], fingerprint: str) -> dict[str, Any]:
    return {
        "_data_files": [{"filename": name} for name in data_files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
