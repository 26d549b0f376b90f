"""A build: the folder of a packed dataset, its contents and its manifest.

What the rows hold is decided by a plan, and filled by whoever knows their kind (`Contents`:
`image_build`, `token_build`); here the rows are written shard by shard (`shards`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetInfo

from packpipe.building.job import Batch, Contents, Planned
from packpipe.building.shards import (
    REJECTS,
    Shards,
    alone_in,
    check_space,
    clear_if_bare,
    in_bytes,
    is_complete,
    naming_full_disks,
    read_manifest,
)
from packpipe.packing.quality import fill
from packpipe.rows import files, schema
from packpipe.rows.rejects import Reject, Tolerance

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Build:
    """Names, writes and opens the folder that holds some contents."""

    contents: Contents

    def cache_folder(self) -> Path:
        """Return the folder of the `datasets` cache that is this build's own."""
        return Path(datasets.config.HF_DATASETS_CACHE) / "packpipe" / self._digest()[:32]

    def is_at(self, folder: Path) -> bool:
        """Return whether this build is complete in folder; refuse a folder of anything else."""
        return is_complete(folder, self.contents.record)

    def make(
        self,
        folder: Path,
        *,
        tolerance: Tolerance,
        progress: bool,
        wait: bool,
    ) -> None:
        """Write the folder, or what is missing of it.

        Args:
            folder: where.
            progress: as for `pack`.
            tolerance: how many rejects there may be.
            wait: whether to wait for another process that writes it, or to refuse.
        """
        existed = folder.exists()
        try:
            with alone_in(folder, wait=wait):
                if self.is_at(folder):  # another process was first
                    return
                try:
                    self._write(folder, tolerance, progress)
                except BaseException:
                    clear_if_bare(folder)
                    raise
        finally:
            with suppress(OSError):  # another process may be in already
                if not existed and not any(folder.iterdir()):
                    folder.rmdir()

    def open(self, folder: Path, on_error: str) -> Dataset:
        """Return the dataset a complete folder holds; on_error is for rows computed when read."""
        names = sorted(name for name in read_manifest(folder)["files"] if name != REJECTS)
        stored = datasets.concatenate_datasets(
            [Dataset.from_file(str(folder / name)) for name in names]
        )
        return self.contents.opened(stored, on_error)

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.contents.record, sort_keys=True).encode()).hexdigest()

    def _write(self, folder: Path, tolerance: Tolerance, progress: bool) -> None:
        contents = self.contents
        planned = contents.plan()
        # At least one shard, so that an empty dataset has its columns too.
        per_shard = max(1, files.FILE_BYTES // contents.row_bytes)
        packs = _cut(range(planned.num_packs), per_shard) or [range(0)]
        with naming_full_disks(folder):
            shards = Shards(folder, contents.record, [len(some) for some in packs])
        missing = {number: packs[number] for number in shards.missing}
        rejects = planned.rejects + shards.rejects
        tolerance.check(rejects)
        packs_done = [planned.num_packs - sum(map(len, missing.values()))]

        size = planned.stored_bytes(list(missing.values()))
        check_space(folder, size, planned.what)
        bar = datasets.utils.tqdm(
            desc=f"Packing {planned.what}, {in_bytes(size)}",
            total=sum(map(planned.num_examples, missing.values())),
            unit=f" {planned.unit}s",
            disable=not progress,
        )

        def account(batches: Iterator[Batch], failed: list[Reject]) -> Iterator[pa.Table]:
            for rows, undecodable, num_examples in batches:
                failed.extend(undecodable)
                rejects.extend(undecodable)
                tolerance.check(rejects)
                packs_done.append(len(rows))
                bar.set_postfix(packs=sum(packs_done), rejects=len(rejects), refresh=False)
                bar.update(num_examples)
                yield rows

        with bar, naming_full_disks(folder):
            per_batch = max(1, files.BATCH_BYTES // contents.row_bytes)
            batches = {number: _cut(some, per_batch) for number, some in missing.items()}
            with closing(planned.batches(list(chain(*batches.values())))) as filled:
                self._write_shards(shards, batches, filled, account)
            self._write_sidecars(folder, planned, rejects, shards)
        if rejects:
            log.warning(
                "%d of %d examples rejected; packpipe.rejects(packed) says which and why",
                len(rejects),
                contents.num_examples,
            )

    def _write_shards(
        self,
        shards: Shards,
        batches: dict[int, list[range]],
        filled: Iterator[Batch],
        account: Callable[[Iterator[Batch], list[Reject]], Iterator[pa.Table]],
    ) -> None:
        """Write shards from the batches that fill them; one is synced while the next is written."""
        stored = self.contents.features.arrow_schema
        committed: Future[None] | None = None
        with ThreadPoolExecutor(1) as committing:
            for number, some in batches.items():
                failed: list[Reject] = []
                tables = account(islice(filled, len(some)), failed)
                written = files.write_stream(shards.path(number), stored, tables)
                if committed is not None:
                    committed.result()
                committed = committing.submit(shards.commit, number, written, failed)
            if committed is not None:
                committed.result()

    def _write_sidecars(
        self, folder: Path, planned: Planned, rejects: list[Reject], shards: Shards
    ) -> None:
        # `datasets.load_from_disk` opens the folder by these two.
        DatasetInfo(features=self.contents.features).write_to_directory(str(folder))
        files.write_json(folder / "state.json", _state(shards.names, self._digest()[:16]))
        absent = sorted(rejects)
        record = files.write_table(folder / REJECTS, schema.REJECTS, [schema.rejects_table(absent)])
        num_examples = self.contents.num_examples
        counts: dict[str, Any] = {
            "read": num_examples,
            "packed": num_examples - len(absent),
            "rejected": len(absent),
            "rejected_by_reason": dict(sorted(Counter(r.reason for r in absent).items())),
            **planned.counts(rejects),
        }
        share = fill(counts["tokens"], planned.num_packs, planned.seq_len)
        shards.finish(record, counts=counts, fill=share)


def read_rejects(folder: Path) -> list[Reject]:
    """Return the rejects of a complete folder."""
    stored = Dataset.from_file(str(folder / REJECTS))
    return [Reject(**row) for row in stored]


def _cut(packs: range, step: int) -> list[range]:
    """Return consecutive ranges of step packs; none if there are no packs."""
    return [packs[start : start + step] for start in range(0, len(packs), step)]


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
