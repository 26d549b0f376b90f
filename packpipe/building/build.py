"""Writes a packed dataset to a folder, shard by shard; the manifest is written last.

A `Job` says what: a plan, and a function that fills its packs.
"""

from __future__ import annotations

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
from datasets import Dataset, Features

from packpipe import durable
from packpipe.building.job import FilledRows, Job, PlannedRows
from packpipe.building.shards import (
    REJECTS,
    Shards,
    alone_in,
    check_space,
    clear_if_bare,
    data_files,
    digest_of,
    drop_journal,
    format_bytes,
    is_complete,
    naming_full_disks,
    read_manifest,
)
from packpipe.packing.quality import fill
from packpipe.rows import files
from packpipe.rows.rejects import Reject, Tolerance, one_each
from packpipe.rows.rejects_table import REJECTS_SCHEMA, rejects_table

log = logging.getLogger(__name__)

# `datasets.load_from_disk` opens a folder by these files.
STATE, INFO = "state.json", "dataset_info.json"


@dataclass(frozen=True)
class Build:
    """Names, writes and opens the folder of a job."""

    job: Job

    def cache_folder(self) -> Path:
        """Return this build's own folder in the `datasets` cache."""
        return cache_folder_of(self._digest())

    def is_at(self, folder: Path) -> bool:
        """Return whether this build is complete in folder; raise if it holds anything else."""
        return is_complete(folder, self.job.record())

    def make(
        self,
        folder: Path,
        *,
        tolerance: Tolerance,
        progress: bool,
        wait: bool,
    ) -> None:
        """Write the folder, or the part of it that is missing.

        Args:
            folder: the folder to write.
            progress: whether to show a progress bar.
            tolerance: how many rejects there may be.
            wait: whether to wait for another process that writes the folder, or to raise.
        """
        existed = folder.exists()
        try:
            with alone_in(folder, wait=wait):
                if self.is_at(folder):  # another process wrote it while this one waited
                    drop_journal(folder)
                    return
                try:
                    self._write(folder, tolerance, progress)
                except BaseException:
                    # A build that failed early leaves no trace; committed shards stay.
                    clear_if_bare(folder)
                    raise
        finally:
            with suppress(OSError):  # another process may write to it already
                if not existed and not any(folder.iterdir()):
                    folder.rmdir()

    def open(self, folder: Path, on_error: str) -> Dataset:
        """Return the dataset in a complete folder; on_error is for rows computed when read."""
        return self.job.opened(stored_rows(folder), on_error)

    def _digest(self) -> str:
        return digest_of(self.job.record())

    def _write(self, folder: Path, tolerance: Tolerance, progress: bool) -> None:
        job = self.job
        planned = job.plan()
        num_packs = len(planned.plan)
        # At least one, so that an empty dataset has its columns too.
        packs = planned.files(range(num_packs), files.FILE_BYTES) or [range(0)]
        with naming_full_disks(folder):
            rows = [len(some) for some in packs]
            shards = Shards(folder, job.record(), planned.plan.fingerprint, rows)
        missing = {number: packs[number] for number in shards.missing}
        # Those of shards that an earlier call wrote count for this call's limits, too.
        rejects, flags = planned.rejects + shards.rejects, shards.flags
        tolerance.check(rejects)
        packs_done = [num_packs - sum(map(len, missing.values()))]

        size = planned.stored_bytes(list(missing.values()))
        check_space(folder, size, planned.what)
        bar = datasets.utils.tqdm(
            desc=f"Packing {planned.what}, {format_bytes(size)}",
            total=sum(map(planned.num_examples, missing.values())),
            unit=f" {planned.unit}s",
            disable=not progress,
        )

        # Runs while a shard is written, so too many rejects stop the build at their batch.
        def account(
            batches: Iterator[FilledRows], failed: list[Reject], flagged: Counter[str]
        ) -> Iterator[pa.Table]:
            for rows, undecodable, num_examples, some_flags in batches:
                flagged.update(some_flags)
                flags.update(some_flags)
                failed.extend(undecodable)
                if undecodable:
                    rejects.extend(undecodable)
                    tolerance.check(rejects)
                packs_done.append(len(rows))
                bar.set_postfix(rows=sum(packs_done), rejects=len(rejects), refresh=False)
                bar.update(num_examples)
                yield rows

        with bar, naming_full_disks(folder):
            batches = {
                number: planned.batches(some, files.BATCH_BYTES) for number, some in missing.items()
            }
            # One generator fills all shards: worker processes go on past the end of a shard.
            # Closed also after an error, which ends those processes.
            with closing(planned.fill(list(chain(*batches.values())))) as filled:
                self._write_shards(shards, batches, filled, account)
            self._write_sidecars(folder, planned, rejects, flags, shards)
        if rejects:
            log.warning(
                "%d of %d examples rejected; packpipe.rejects(packed) says which and why",
                len(one_each(rejects)),
                job.num_examples,
            )

    def _write_shards(
        self,
        shards: Shards,
        batches: dict[int, list[range]],
        filled: Iterator[FilledRows],
        account: Callable[[Iterator[FilledRows], list[Reject], Counter[str]], Iterator[pa.Table]],
    ) -> None:
        """Write each shard from its batches, and sync it while the next one is written."""
        stored = self.job.features.arrow_schema
        committed: Future[None] | None = None
        # One thread: fsync releases the interpreter lock, and only one commit at a time may write
        # the journal.
        with ThreadPoolExecutor(1) as committing:
            for number, some in batches.items():
                failed: list[Reject] = []
                flagged: Counter[str] = Counter()
                tables = account(islice(filled, len(some)), failed, flagged)
                written = files.write_stream(shards.path(number), stored, tables)
                # At most one shard waits to be synced; raises if the last one could not be.
                if committed is not None:
                    committed.result()
                committed = committing.submit(shards.commit, number, written, failed, flagged)
            if committed is not None:
                committed.result()

    def _write_sidecars(
        self,
        folder: Path,
        planned: PlannedRows,
        rejects: list[Reject],
        flags: Counter[str],
        shards: Shards,
    ) -> None:
        durable.write_text(folder / INFO, info_of(self.job.features))
        durable.write_json(folder / STATE, state_of(shards.names, self._digest()))
        # Sorted, so that the bytes do not depend on the order in which images failed.
        absent = one_each(rejects)
        record = files.write_table(folder / REJECTS, REJECTS_SCHEMA, [rejects_table(absent)])
        counts = counts_of(self.job.num_examples, absent, planned.counts(rejects, flags))
        share = fill(counts["tokens"], len(planned.plan), planned.plan.config.seq_len)
        # The manifest comes last: complete means that all other files are written.
        shards.finish(record, counts=counts, fill=share, **planned.facts(rejects))


def cache_folder_of(digest: str) -> Path:
    """Return the folder in the `datasets` cache for the rows of a record, by its digest."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "packpipe" / digest[:32]


def stored_rows(folder: Path) -> Dataset:
    """Return the rows in the files of a complete folder, mapped into memory."""
    names = data_files(read_manifest(folder))
    return datasets.concatenate_datasets([Dataset.from_file(str(folder / name)) for name in names])


def read_rejects(folder: Path) -> list[Reject]:
    """Return the rejects of a complete folder."""
    stored = Dataset.from_file(str(folder / REJECTS))
    return [Reject(**row) for row in stored]


def counts_of(num_examples: int, absent: list[Reject], of_plan: dict[str, int]) -> dict[str, Any]:
    """Return the counts of a manifest.

    Args:
        num_examples: of the source.
        absent: one reject of each example that is in no row.
        of_plan: what `PlannedRows.counts` says.
    """
    return {
        "read": num_examples,
        "packed": num_examples - len(absent),
        "rejected": len(absent),
        "rejected_by_reason": dict(sorted(Counter(r.reason for r in absent).items())),
        **of_plan,
    }


def info_of(features: Features) -> str:
    """Return what `datasets` keeps in the dataset_info.json of a saved dataset."""
    # `DatasetInfo` writes these, too, but in place: a power failure would leave an empty file.
    texts = dict.fromkeys(("description", "citation", "homepage", "license"), "")
    return json.dumps({**texts, "features": features.to_dict()})


def state_of(names: list[str], digest: str) -> dict[str, Any]:
    """Return what `datasets` keeps in the state.json of a saved dataset.

    Args:
        names: its files.
        digest: of the record of its rows.
    """
    return {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
