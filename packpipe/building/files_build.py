"""Packs `ImageFiles` into a folder, window by window, on any executor.

The driver hands out windows and adds up their commits. It holds no plan and no image: its memory
grows with the windows, not with the images. In the folder lie ``job.json``, which says what is
packed and is put by the first driver; the files of rows; ``_commits``, one for each window; and at
the end the manifest. Drivers that are stopped, or work at once, end in the same bytes: a window
that has a commit is not built again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from queue import SimpleQueue
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks, durable
from packpipe.building.build import INFO, STATE, counts_of, info_of, state_of
from packpipe.building.shards import MANIFEST, REJECTS, differing_in
from packpipe.building.window_job import (
    COMMITS,
    Window,
    WindowJob,
    build_window,
    commit_name,
    read_commit,
    rejects_in,
)
from packpipe.packing.quality import fill
from packpipe.rows import files as table_files
from packpipe.rows.rejects import Reject, Tally, one_each
from packpipe.rows.rejects_table import REJECTS_SCHEMA, rejects_table
from packpipe.sources.image_files import ImageFiles
from packpipe.storage.storage import Storage

log = logging.getLogger(__name__)

JOB = "job.json"
# Commits that are read at once.
_AT_ONCE = 16
# Windows that an executor has at once: work for a thousand machines, in some tens of megabytes.
_WAITING = 4096
# More drivers than ever work on one job.
_DRIVERS = 64
_REMEDY = "choose another output, or remove it"


@dataclass(frozen=True, eq=False)
class FilesBuild:
    """The windows of a source, and the folder they are packed into.

    Attributes:
        source: the files.
        windows: the numbers of the blocks of each window.
        job: what builds a window.
        record: everything the bytes of the folder depend on.
    """

    source: ImageFiles
    windows: list[NDArray[np.int64]]
    job: WindowJob
    record: dict[str, Any]

    def claim(self) -> bool:
        """Say in the folder what is packed there; return whether it is complete.

        A complete folder is tidied. One whose files are gone is not complete.

        Raises:
            FileExistsError: the folder holds something else.
            TooManyRejects: it is complete, and an earlier call allowed more rejects than this one.
        """
        storage, own = self.job.storage, durable.json_text(self.record).encode()
        found = storage.get(JOB)
        if found is None:
            names = [name for name in storage.listed() if not name.endswith(".partial")]
            names += storage.folders()
            # Asked again: another driver of this job may have come first.
            if names and storage.get(JOB) is None:
                expected = "an absent or empty folder"
                raise FileExistsError(checks.sentence("output", storage.url, expected, _REMEDY))
            found = storage.put_if_absent(JOB, own)
        self._check_claimed(found)
        complete, files = finished(storage), storage.listed()
        if complete is None or _gone(complete["files"], files):
            return False
        with pa.ipc.open_stream(storage.get(REJECTS)) as rejects:
            self.job.tolerance.check([Reject(**row) for row in rejects.read_all().to_pylist()])
        self._remove_strays(files, complete["files"].keys())
        return True

    def _check_claimed(self, found: bytes) -> None:
        """Raise if what a folder says is packed there is another job."""
        storage = self.job.storage
        if found == durable.json_text(self.record).encode():
            return
        expected = f"rows made with the same {', '.join(_differing(self.record, found))}"
        remedy = _REMEDY
        if not storage.listed(COMMITS):
            remedy = "no window is committed there: choose another output, or remove it"
        raise FileExistsError(checks.sentence("output", storage.url, expected, remedy))

    def committed(self, windows: Iterable[int] | None = None) -> dict[int, dict[str, Any]]:
        """Return the commits in the folder, by window; one whose files are gone is removed.

        Args:
            windows: those whose commits are read; None reads all.
        """
        storage = self.job.storage
        # In this order: a file that a commit names was there before it.
        names = {name for name in storage.listed(COMMITS) if name.endswith(".json")}
        if windows is not None:
            names &= {commit_name(window) for window in windows}
        known, doubtful = self._whole(names)
        # Another driver may have built one anew meanwhile, so each is looked at again.
        again, gone = self._whole(doubtful)
        for name in gone:
            storage.remove(f"{COMMITS}/{name}")
        return known | again

    def _whole(self, names: set[str]) -> tuple[dict[int, dict[str, Any]], set[str]]:
        """Return the commits whose files are there, by window, and the names of the others."""
        if not names:
            return {}, set()
        with ThreadPoolExecutor(_AT_ONCE) as executor:
            found = list(executor.map(lambda name: read_commit(self.job, name), sorted(names)))
        sizes = self.job.storage.listed()
        whole = [one for one in found if one is not None and not _gone(one["files"], sizes)]
        known = {commit["window"]: commit for commit in whole}
        return known, names - {commit_name(window) for window in known}

    def run(
        self, executor: Executor | None, *, part: tuple[int, int] = (1, 1), progress: bool = True
    ) -> dict[int, dict[str, Any]]:
        """Build the windows that have no commit; return the commits of all that have one.

        Args:
            executor: builds them; None builds them here, one after the other.
            part: (k, n) builds every n-th window, from the k-th on; each part may be built by a
                process of its own.
            progress: whether to show a progress bar.

        Raises:
            TooManyRejects: of all windows together.
        """
        number, parts = part
        wanted = range(number - 1, len(self.windows), parts)
        known = self.committed(wanted)
        num_bad = 0
        for commit in known.values():
            num_bad = self._num_bad(commit, num_bad)
        missing = [window for window in wanted if window not in known]
        done = sum(known[window]["read"] for window in wanted if window in known)
        bar = datasets.utils.tqdm(
            desc=f"Packing {len(missing):,} windows",
            total=done + sum(int(self.source.block_rows[self.windows[w]].sum()) for w in missing),
            initial=done,
            unit=" images",
            disable=not progress,
        )
        with bar:
            for commit in _built(executor, self.job, map(self._window, missing)):
                known[commit["window"]] = commit
                num_bad = self._num_bad(commit, num_bad)
                bar.update(commit["read"])
        return known

    def _num_bad(self, commit: dict[str, Any], before: int) -> int:
        """Return how many examples are bad with those of a commit; raise if it is too many."""
        bad = one_each([one for one in rejects_in(commit) if one.is_bad])
        found, tolerance = before + len(bad), self.job.tolerance
        # Runs of bad ones are seen within windows, and of all windows at the end.
        if bad:
            tolerance.check_so_far(Tally(tolerance.num_examples, found), bad, ended=True)
        return found

    def finish(self, known: dict[int, dict[str, Any]] | None = None) -> None:
        """Complete the folder: put what `datasets` opens it by, and the manifest last.

        Args:
            known: the commits of all windows; None reads them.

        Raises:
            ValueError: a window has no commit.
        """
        known = self.committed() if known is None else known
        missing = [window for window in range(len(self.windows)) if window not in known]
        if missing:
            what = f"{len(missing)} of {len(self.windows)}, the first is {missing[0]}"
            remedy = "pack their parts first: window W is of part W % N + 1 of N"
            raise ValueError(checks.sentence("windows without a commit", what, "none", remedy))
        commits = [known[window] for window in range(len(self.windows))]
        rejects = [one for commit in commits for one in rejects_in(commit)]
        self.job.tolerance.check(rejects)
        absent = one_each(rejects)
        written = {name: record for one in commits for name, record in one["files"].items()}
        found = self.job.storage.listed()
        if gone := _gone(written, found):
            what = f"{len(gone)} of {len(written)}, the first is {gone[0]}"
            remedy = "let all machines write to one output, then pack again: these are built anew"
            name = f"files missing in {self.job.storage.url}"
            raise ValueError(checks.sentence(name, what, "none", remedy))
        self._remove_strays(found, written.keys())
        for attempt in range(_DRIVERS):
            try:
                self._put_sidecars(commits, absent, written)
                break
            except FileNotFoundError:
                # Another driver took it for a stray, which each of them does once.
                if attempt == _DRIVERS - 1:
                    raise
        if absent:
            text = "%d of %d examples rejected; packpipe.rejects(packed) says which and why"
            log.warning(text, len(absent), len(self.source))

    def _put_sidecars(
        self, commits: list[dict[str, Any]], absent: list[Reject], written: dict[str, Any]
    ) -> None:
        """Put what `datasets` opens the folder by, the rejects, and the manifest last."""
        storage = self.job.storage
        storage.put(INFO, info_of(self.job.images.features).encode())
        storage.put(STATE, durable.json_text(state_of([*written], self.job.digest)).encode())
        with storage.scratch(REJECTS) as path:
            tables = [rejects_table(absent)]
            rejects = table_files.write_stream(path, REJECTS_SCHEMA, tables)
            storage.put_file(REJECTS, path)
        totals = sum((Counter(commit["counts"]) for commit in commits), Counter())
        # A Counter drops what is zero: the names are those of a window, and its order.
        of_plan = {name: totals[name] for name in commits[0]["counts"]}
        counts = counts_of(len(self.source), absent, of_plan)
        facts = {
            "counts": counts,
            "fill": fill(counts["tokens"], counts["packs"], self.job.images.config.seq_len),
            "undecoded": sorted(one for commit in commits for one in commit["undecoded"]),
        }
        files = {**written, REJECTS: rejects}
        manifest = {**self.record, **facts, "complete": True, "files": files}
        # A store that knows no condition lets two jobs claim a folder: it is the later one's.
        self._check_claimed(storage.get(JOB) or b"")
        storage.put(MANIFEST, durable.json_text(manifest).encode())

    def _window(self, number: int) -> Window:
        return Window(number, tuple(map(self.source.block, self.windows[number].tolist())))

    def _remove_strays(self, found: Iterable[str], kept: Collection[str]) -> None:
        """Remove files that a killed process left half-written, or without their commit."""
        storage = self.job.storage
        for name in found:
            stray = fnmatch(name, "data-*.arrow") and name not in kept
            if stray or name.endswith(".partial"):
                storage.remove(name)
        commits = {commit_name(window) for window in range(len(self.windows))}
        for name in storage.listed(COMMITS).keys() - commits:
            storage.remove(f"{COMMITS}/{name}")


def finished(storage: Storage) -> dict[str, Any] | None:
    """Return the manifest of a folder that is complete; None of any other."""
    content = storage.get(MANIFEST)
    try:
        found = None if content is None else json.loads(content)
    except ValueError:  # cut, by a store that shows files before they are whole
        return None
    return found if isinstance(found, dict) and found.get("complete") else None


def _built(
    executor: Executor | None, job: WindowJob, windows: Iterator[Window]
) -> Iterator[dict[str, Any]]:
    """Yield the commits of windows as they are built, in whatever order."""
    if executor is None:
        yield from (build_window(job, window) for window in windows)
        return
    done: SimpleQueue[Future[dict[str, Any]]] = SimpleQueue()
    waiting = set()

    def submit(some: Iterator[Window]) -> None:
        for window in some:
            future = executor.submit(build_window, job, window)
            waiting.add(future)
            future.add_done_callback(done.put)

    try:
        submit(islice(windows, _WAITING))
        while waiting:
            future = done.get()
            waiting.remove(future)
            submit(islice(windows, 1))
            yield future.result()
    finally:
        for future in waiting:
            future.cancel()


def _gone(files: dict[str, Any], sizes: dict[str, int]) -> list[str]:
    """Return the files that are not there as their records say."""
    return [name for name, record in files.items() if sizes.get(name) != record["bytes"]]


def _differing(record: dict[str, Any], found: bytes) -> list[str]:
    """Return the names of what differs between this job and the one of a folder."""
    try:
        theirs = json.loads(found)
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):  # somebody else's file of that name
        theirs = {}
    ours = json.loads(json.dumps(record))
    return list(differing_in(ours, theirs)) or [
        name for name in ours if ours[name] != theirs.get(name)
    ]
