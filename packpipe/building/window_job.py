"""Builds one window of a source in blocks: read, planned, decoded, written and committed by itself.

Windows know nothing of each other, so any machine builds any of them, again if need be: it ends in
the same bytes. The files of a window are put first, under names of window, part and content: an
attempt that saw other bytes overwrites no file of another one. The commit of the window, which says
what they are, comes last, and the first one counts. What no commit names does not count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from packpipe import checks, durable
from packpipe.building.image_job import plan_images
from packpipe.building.image_record import record_of_images
from packpipe.building.images import Images
from packpipe.building.job import FilledRows, PlannedRows
from packpipe.building.shards import naming_full_disks
from packpipe.planning.block_windows import first_pack
from packpipe.rows import files
from packpipe.rows.rejects import Reject, Tolerance
from packpipe.sources.blocks import Block
from packpipe.sources.image_files import BlockReader
from packpipe.sources.sizes import column_sizes
from packpipe.sources.survey import probe_sizes
from packpipe.storage.storage import LocalFolder, Storage

COMMITS = "_commits"
# What machines must have alike, or the same image would give other pixels.
_VERSIONS = ("packpipe", "pillow", "codecs", "pillow_settings")


class Window(NamedTuple):
    """A window of a source, by its number, and the blocks it is made of."""

    number: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class WindowJob:
    """What a machine must know to build any window; a few kilobytes, sent with each.

    Attributes:
        reader: reads the blocks.
        images: the options; its dataset has the columns of the source, and no rows.
        storage: where the rows go.
        record: everything the bytes of a window depend on, but for its blocks.
        digest: of the record of the whole folder.
        tolerance: how many rejects the whole source may have.
        file_bytes: most bytes of the rows of a file.
        batch_bytes: of the rows that are filled at once.
    """

    reader: BlockReader
    images: Images
    storage: Storage
    record: dict[str, Any]
    digest: str
    tolerance: Tolerance
    file_bytes: int
    batch_bytes: int


def data_name(window: int, part: int, checksum: str) -> str:
    """Return the name of a file of rows, which sorts by window, then part."""
    return f"data-{window:06d}-{part:05d}-{checksum[:16]}.arrow"


def commit_name(window: int) -> str:
    """Return the name of the commit of a window, in the folder of commits."""
    return f"{window:06d}.json"


def read_commit(job: WindowJob, name: str) -> dict[str, Any] | None:
    """Return the commit of a name; None if there is none, or if it is of another job."""
    content = job.storage.get(f"{COMMITS}/{name}")
    return None if content is None else _commit_in(job, content)


def _commit_in(job: WindowJob, content: bytes) -> dict[str, Any] | None:
    """Return the commit that a file holds; None if it is none, or of another job."""
    try:
        found = json.loads(content)
    except ValueError:  # cut, by a store that shows files before they are whole
        return None
    return found if isinstance(found, dict) and found.get("job") == job.digest else None


def build_window(job: WindowJob, window: Window) -> dict[str, Any]:
    """Build a window, unless somebody has, and return its commit: the first that was put.

    Raises:
        TooManyRejects: its rejects alone are too many for the whole source.
        ValueError: this machine has other versions than the one that began the job.
    """
    done = read_commit(job, commit_name(window.number))
    if done is not None:
        return done
    made_by = _checked_versions(job)
    try:
        with naming_full_disks(_written_at(job.storage), "windows that are committed stay"):
            commit = {"job": job.digest, "made_by": made_by, **_written(job, window)}
        name = f"{COMMITS}/{commit_name(window.number)}"
        content = durable.json_text(commit).encode()
        first = _commit_in(job, job.storage.put_if_absent(name, content))
        if first is None:  # no commit of this job
            job.storage.put(name, content)
    except FileNotFoundError:
        # Whoever has completed the folder removes what others were still writing.
        done = read_commit(job, commit_name(window.number))
        if done is None:
            raise
        return done
    return commit if first is None else first


def _written_at(storage: Storage) -> Path:
    """Return where files are written before they are put in place: uploads need a disk first."""
    return Path(storage.url if isinstance(storage, LocalFolder) else gettempdir())


def _checked_versions(job: WindowJob) -> dict[str, Any]:
    """Return the versions of this machine, which must be those of the job."""
    ours = record_of_images(job.images)
    for name in _VERSIONS:
        if ours.get(name) != job.record.get(name):
            expected = f"{job.record.get(name)!r}, as where the job began"
            remedy = "install the same versions on all machines"
            raise ValueError(checks.sentence(f"{name} here", ours.get(name), expected, remedy))
    return {name: ours[name] for name in _VERSIONS if name in ours}


def _written(job: WindowJob, window: Window) -> dict[str, Any]:
    """Write the files of a window, and return what its commit says of them."""
    planned = planned_window(job, window)
    rejects, flags = list(planned.rejects), Counter[str]()
    job.tolerance.check(rejects)
    # At least one file, so that a source without rows has its columns too.
    packs = planned.files(range(len(planned.plan)), job.file_bytes) or [range(0)]
    batches = [planned.batches(some, job.batch_bytes) for some in packs]
    stored = job.images.features.arrow_schema

    def accounted(filled: Iterator[FilledRows]) -> Iterator[pa.Table]:
        for rows, undecodable, _, some_flags in filled:
            flags.update(some_flags)
            if undecodable:
                rejects.extend(undecodable)
                job.tolerance.check(rejects)
            yield rows

    written = {}
    with closing(planned.fill(list(chain(*batches)))) as filled:
        for part, some in enumerate(batches):
            with job.storage.scratch(f"data-{window.number:06d}-{part:05d}") as path:
                record = files.write_stream(path, stored, accounted(islice(filled, len(some))))
                name = data_name(window.number, part, record[files.CHECKSUM])
                job.storage.put_file(name, path)
            written[name] = record
    return {
        "window": window.number,
        "read": sum(block.num_rows for block in window.blocks),
        "plan": planned.plan.fingerprint,
        "counts": planned.counts(rejects, flags),
        "rejects": [list(one) for one in sorted(rejects)],
        **planned.facts(rejects),
        "files": written,
    }


def planned_window(job: WindowJob, window: Window) -> PlannedRows:
    """Return the planned rows of a window: each of its blocks is read, once."""
    columns = job.images.columns
    named = [columns.image, columns.label, columns.weight, columns.mask, *(columns.sizes or ())]
    names = dict.fromkeys(name for name in named if name is not None)
    images = replace(job.images, dataset=job.reader.dataset(window.blocks, list(names)))
    images.check_pillow()
    rows = [np.arange(one.first, one.first + one.num_rows) for one in window.blocks]
    numbers = np.concatenate([np.empty(0, np.int64), *rows])
    most = images.config.max_pixels
    if columns.sizes is not None:
        sizes = column_sizes(images.dataset, columns.sizes, max_pixels=most)
    else:
        with ThreadPoolExecutor(max(1, images.num_workers)) as executor:
            sizes = probe_sizes(images.source, len(numbers), max_pixels=most, executor=executor)
    return plan_images(images, sizes, numbers, first_pack(window.number))


def rejects_in(commit: dict[str, Any]) -> list[Reject]:
    """Return the rejects of a window."""
    return [Reject(*one) for one in commit["rejects"]]
