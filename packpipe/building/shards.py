"""Shards: the folder of a build, continued where it stopped.

A build writes its rows in fixed shards, file by file: under a temporary name, with a checksum,
synced, renamed, and noted in a journal, to which a line is added. A file that the journal or the
manifest names is safe on the disk; all others are written again. A build that is started again
moves the journal's lines into the manifest, which is replaced whole. The manifest says
``"complete": true`` at the very end, and the journal is removed. A lock, which ends with its
process, lets one build at a time write to a folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from packpipe import checks, durable
from packpipe.rows.files import MANIFEST as MANIFEST
from packpipe.rows.rejects import Reject

log = logging.getLogger(__name__)

REJECTS = "rejects.arrow"
# What a manifest says of the build itself; the rest is the record, on which the rows depend.
FACTS = ("counts", "fill", "undecoded", "complete", "plan", "files")
# What it says of a file while the build goes on, besides what it says at the end.
NOTES = ("rejects", "flags")
_LOCK = ".lock"
# While a build is under way: a line, {name: record}, for each file committed since it was started.
_JOURNAL = "journal.jsonl"
_SHARD = re.compile(r"data-\d{5,}\.arrow")
# A full disk, a used-up quota, and a limit on the size of files (ulimit -f).
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder; of a build under way, with all files committed so far."""
    # The journal first: in between, a build may move its lines into the manifest.
    lines = durable.lines_of(folder / _JOURNAL)
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    match found:
        case {"complete": False, "files": dict(files)}:
            for line in lines:
                files.update(line if isinstance(line, dict) else {})
    return found


def record_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a manifest that the bytes of the folder depend on."""
    return {name: value for name, value in manifest.items() if name not in FACTS}


def digest_of(record: dict[str, Any]) -> str:
    """Return the digest of a record: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def data_files(manifest: dict[str, Any]) -> list[str]:
    """Return the names of the files of rows, in the order of the rows."""
    # By their numbers, which have five digits or more.
    names = (name for name in manifest["files"] if name != REJECTS)
    return sorted(names, key=lambda name: (len(name), name))


def is_complete(folder: Path, record: dict[str, Any]) -> bool:
    """Return whether the build of a record is complete in a folder.

    Raises:
        FileExistsError: the folder holds something else.
    """
    remedy = "choose another output, or remove it"
    if not (folder / MANIFEST).is_file():
        if folder.exists() and (not folder.is_dir() or any(_others(folder))):
            raise FileExistsError(
                checks.sentence("output", str(folder), "an absent or empty folder", remedy)
            )
        return False
    try:
        found = read_manifest(folder)
    except ValueError:  # not packpipe's: it never leaves a manifest half-written
        found = {}
    if not isinstance(found, dict) or not {"complete", "files"} <= found.keys():
        expected = f"{MANIFEST} written by packpipe, or none"
        raise FileExistsError(checks.sentence("output", str(folder), expected, remedy))
    differing = [name for name in differing_in(record, found) if name not in FACTS]
    # A build of other rows may be replaced if it committed no file.
    if differing and (found["complete"] or found["files"]):
        expected = f"rows made with the same {', '.join(differing)}"
        raise FileExistsError(checks.sentence("output", str(folder), expected, remedy))
    return bool(found["complete"])


@contextmanager
def alone_in(folder: Path, *, wait: bool) -> Iterator[None]:
    """Lock a folder until the block ends; the folder is made if there is none.

    Args:
        folder: the folder to lock.
        wait: whether to wait for another process that has locked it.

    Raises:
        FileExistsError: another process has locked it, and wait is False.
    """
    # The kernel releases this lock (flock) when its process ends, however it ends.
    lock = FileLock(folder / _LOCK)
    try:
        _acquire(lock, folder, timeout=0)
    except Timeout:
        if not wait:
            expected = "a folder of its own"
            remedy = "wait for it, or write into another"
            value = f"{folder} (being written by another process)"
            raise FileExistsError(checks.sentence("output", value, expected, remedy)) from None
        log.warning("waiting for the process that is writing %s", folder)
        _acquire(lock, folder, timeout=-1)
    try:
        yield
    finally:
        # Removed before the release. A process that has opened the file and then gets the lock
        # sees that the file has no name any more (filelock looks at st_nlink), and tries again.
        # After the release, the name could be that of a lock which another process holds.
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()


def tidy(folder: Path) -> None:
    """Remove what a build leaves that was killed after it had written its last file."""
    if (folder / _LOCK).exists() or (folder / _JOURNAL).exists():
        with suppress(OSError), alone_in(folder, wait=False):  # leaving the block removes the lock
            drop_journal(folder)


def drop_journal(folder: Path) -> None:
    """Remove the journal of a locked folder, whose lines the manifest has or nothing needs."""
    if (folder / _JOURNAL).exists():
        (folder / _JOURNAL).unlink()
        durable.sync(folder)  # else a power failure might bring it back


class Shards:
    """The files of a build under way, and what its manifest says of them.

    Args:
        folder: a folder that `alone_in` has locked.
        record: everything the bytes of the folder depend on that is known without a plan.
        plan: fingerprint of the plan. Sizes that are read again, or an image that can be read only
            now, make another one of the same record.
        num_rows: rows of each data file.

    Attributes:
        names: names of the data files.
    """

    def __init__(
        self, folder: Path, record: dict[str, Any], plan: str, num_rows: list[int]
    ) -> None:
        self._folder, self._record = folder, record
        self.names = shard_names(len(num_rows))
        self._files: dict[str, Any] = {}
        # The folder is locked, so these are left from builds that were killed.
        for leftover in folder.glob("*.partial"):
            leftover.unlink()
        if (folder / MANIFEST).is_file():
            found = read_manifest(folder)
            # Shards of other rows, or cut in another way, are all written again.
            planned = dict(zip(self.names, num_rows, strict=True))
            same = {**record, "plan": plan}
            if all(found.get(name) == value for name, value in same.items()) and all(
                planned.get(name) == file["rows"] for name, file in found["files"].items()
            ):
                self._files = {
                    name: file for name, file in found["files"].items() if self._holds(name, file)
                }
        if not self._files:
            # Before the manifest names this plan: lines of another plan would be taken for its own.
            drop_journal(folder)
        # The first file of a folder: `is_complete` refuses one that has files but no manifest.
        self._write({"complete": False, "plan": plan, "files": dict(sorted(self._files.items()))})
        # Only now, since the manifest holds its lines, and before what they name.
        drop_journal(folder)
        for path in folder.glob("data-*.arrow"):
            if _SHARD.fullmatch(path.name) and path.name not in self.names:
                path.unlink()

    def _holds(self, name: str, file: dict[str, Any]) -> bool:
        # By size, which finds a file that was cut; it is `verify` that compares checksums.
        path = self._folder / name
        return path.is_file() and path.stat().st_size == file["bytes"]

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        return [number for number, name in enumerate(self.names) if name not in self._files]

    @property
    def rejects(self) -> list[Reject]:
        """Examples of committed shards that could not be decoded."""
        return [Reject(*reject) for file in self._files.values() for reject in file["rejects"]]

    def path(self, number: int) -> Path:
        """Return where a shard goes."""
        return self._folder / self.names[number]

    @property
    def flags(self) -> Counter[str]:
        """How many examples of committed shards have something amiss, by a word."""
        # Files of earlier versions say nothing of it.
        return sum((Counter(file.get("flags", {})) for file in self._files.values()), Counter())

    def commit(
        self,
        number: int,
        record: dict[str, Any],
        rejects: list[Reject],
        flags: Counter[str],
    ) -> None:
        """Give a written shard its name, and note it with its rejects and flags in the journal."""
        # In this order, so that the journal never names a file that may still be lost. A line, not
        # the whole manifest: a commit takes the same time however many there were before.
        durable.commit(self.path(number))
        name = self.names[number]
        noted = {**record, "rejects": [list(one) for one in rejects], "flags": dict(flags)}
        durable.append_line(self._folder / _JOURNAL, {name: noted})
        self._files[name] = noted

    def finish(self, rejects_record: dict[str, Any], **facts: Any) -> None:
        """Write the manifest of a complete folder."""
        # Notes of single shards served to continue; rejects.arrow and the counts now hold them all.
        files = {
            name: {key: value for key, value in self._files[name].items() if key not in NOTES}
            for name in self.names
        }
        files[REJECTS] = rejects_record
        self._write({**facts, "complete": True, "files": files})
        drop_journal(self._folder)

    def _write(self, facts: dict[str, Any]) -> None:
        durable.write_json(self._folder / MANIFEST, {**self._record, **facts})


def shard_names(number: int) -> list[str]:
    """Return the names of a build's data files, which sort into their order."""
    digits = max(5, len(str(number - 1)))
    return [f"data-{shard:0{digits}d}.arrow" for shard in range(number)]


def clear_if_bare(folder: Path) -> None:
    """Remove what a build has written to a folder, unless it committed a file."""
    if not (folder / MANIFEST).is_file() or not read_manifest(folder)["files"]:
        for name in ("data-*.arrow", "*.partial", _JOURNAL, MANIFEST):
            for leftover in folder.glob(name):
                leftover.unlink()


def check_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise if a folder's disk has less than num_bytes of free space.

    Raises:
        OSError: the space is too small; names both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        expected = f"{format_bytes(num_bytes)} for {what}"
        remedy = (
            "packed uint8 patches are many times a JPEG: free some, choose another output, or "
            "pass store='encoded', which stores images as they are, or materialize=False, which "
            "stores the plan alone"
        )
        message = f"free space of {folder} is {format_bytes(free)}, expected {expected}; {remedy}"
        raise OSError(errno.ENOSPC, message)


@contextmanager
def naming_full_disks(folder: Path, stays: str | None = None) -> Iterator[None]:
    """Raise errors of a full disk with the free space, and what need not be written again.

    Args:
        folder: on the disk that is written.
        stays: the end of the error; None is the number of committed files.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = format_bytes(shutil.disk_usage(folder).free)
        if stays is None:
            done = len(read_manifest(folder)["files"]) if (folder / MANIFEST).is_file() else 0
            stays = f"{done} files are committed and stay"
        message = (
            f"free space of {folder} is {free}, expected room for the next file "
            f"({error.strerror}); free some and call again: {stays}"
        )
        raise OSError(error.errno, message) from error


def format_bytes(number: int) -> str:
    """Return a number of bytes as text, such as ``"1.6 MB"``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1000:.1f} kB"


def _acquire(lock: FileLock, folder: Path, *, timeout: float) -> None:
    """Acquire a lock in a folder; the folder is made again if another process removes it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout)
            return
        except FileNotFoundError:  # removed since, by a build that failed and left it empty
            continue


def differing_in(record: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """Yield the names of what differs between two records; of a configuration, its options."""
    # What only the folder names differs, too: texts packed beside the images, for example.
    for name in [*record, *(found.keys() - record.keys())]:
        ours, theirs = record.get(name), found.get(name)
        if name == "config" and isinstance(ours, dict) and isinstance(theirs, dict):
            yield from differing_in(ours, theirs)
        elif name == "codecs" and isinstance(ours, dict) and isinstance(theirs, dict):
            # A codec that only one of the two had made no pixel of the other.
            if any(ours[codec] != theirs[codec] for codec in ours.keys() & theirs.keys()):
                yield name
        elif ours != theirs:
            yield name


def _others(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder besides the lock file and an unfinished first manifest."""
    own = {_LOCK, durable.partial_of(folder / MANIFEST).name}
    return (path for path in folder.iterdir() if path.name not in own)
