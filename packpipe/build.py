"""A build: the folder of a packed dataset, its contents and its manifest (floor 2).

What the rows hold is decided by a plan, and filled by whoever knows their kind (`Contents`:
`image_build`, `token_build`); here the rows are written shard by shard (`shards`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features
from numpy.typing import NDArray

from packpipe import schema, table
from packpipe.quality import Quality, fill
from packpipe.quarantine import Tolerance
from packpipe.rows import Reject
from packpipe.shards import (
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

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Some stored rows, and what became of the examples that were meant for them."""

    rows: pa.Table
    rejects: list[Reject]
    num_examples: int


class Planned(Protocol):
    """The packs of a build, before they are filled."""

    @property
    def num_packs(self) -> int:
        """How many there are."""

    @property
    def seq_len(self) -> int:
        """Tokens a pack holds."""

    @property
    def quality(self) -> Quality:
        """Fill, bound, gap and the other figures."""

    @property
    def seq_lens(self) -> NDArray[np.int32]:
        """int32[segments], tokens of each, in no order that matters."""

    @property
    def rejects(self) -> list[Reject]:
        """Examples that are in no pack."""

    @property
    def what(self) -> str:
        """What is packed, for a reader."""

    @property
    def unit(self) -> str:
        """What an example is called."""

    def num_examples(self, packs: range) -> int:
        """Return how many examples are in some packs."""

    def stored_bytes(self, packs: list[range]) -> int:
        """Return about how many bytes some packs take on the disk."""

    def batches(self, packs: list[range]) -> Generator[Batch, None, None]:
        """Yield the rows of packs, one batch for each range of them."""

    def counts(self, rejects: list[Reject]) -> dict[str, int]:
        """Return the manifest's counts of packs, tokens and what was changed."""


class Contents(Protocol):
    """What a build is to make: rows of one kind from one source."""

    @property
    def num_examples(self) -> int:
        """Examples of the source."""

    @property
    def record(self) -> dict[str, Any]:
        """Everything the bytes of the folder depend on."""

    @property
    def features(self) -> Features:
        """Features of the stored rows."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that are worth counting."""

    def plan(self) -> Planned:
        """Return the packs."""

    def opened(self, stored: Dataset, on_error: str) -> Dataset:
        """Return the stored rows as the caller gets them."""


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
        per_shard = max(1, table.FILE_BYTES // contents.row_bytes)
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
            per_batch = max(1, table.BATCH_BYTES // contents.row_bytes)
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
                written = table.write_stream(shards.path(number), stored, tables)
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
        table.write_json(folder / "state.json", _state(shards.names, self._digest()[:16]))
        absent = sorted(rejects)
        record = table.write_table(folder / REJECTS, schema.REJECTS, [schema.rejects_table(absent)])
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
