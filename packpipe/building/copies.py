"""Copies of packed folders that lie in a store, on a disk of this machine, within a limit.

A copy has the files of the folder under their own names, so that it is read as any other folder. It
is kept whole or not at all: rows are read in an order drawn from all files, so every batch needs
other files, and those that were just removed as often as any. A cache of some files would bring a
file of 512 MB for each row of one. What does not fit is read row by row (`RemoteRows`).

Copies are known by the digest of their manifest, which names the checksums of all rows: the same
rows at two places have one copy, and rows that were written anew another one. A file comes under a
temporary name, and gets its own once its size and its checksum are those of the manifest. One
process at a time brings files; others that want the same folder wait, and find them there. Whoever
opens a folder holds it until its process ends, by a lock that ends with it. If others need room,
whole folders are removed that nobody holds, the one that was opened longest ago first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import datasets
import xxhash

from packpipe import checks, durable
from packpipe.building.shards import MANIFEST, alone_in, naming_full_disks
from packpipe.rows.files import CHECKSUM
from packpipe.storage.reading import pieces_of
from packpipe.storage.storage import Storage

log = logging.getLogger(__name__)

# Files that come at once, and how often one is read whose checksum is wrong.
_AT_ONCE = 8
_READINGS = 2
# What lies in a copy besides files of the folder: one that those who hold it have locked, and whose
# time says when it was opened; and one that says that all files of the manifest will be there.
_USED, _WHOLE = ".used", ".whole"
# How the name begins of a copy that is being removed.
_GONE = ".gone-"
# Descriptors of the files that this process holds, until it ends.
_HELD: dict[Path, int] = {}


@dataclass(frozen=True)
class Cache:
    """A folder of copies.

    Attributes:
        folder: where they are.
        max_bytes: most bytes of all of them; None is half of what the disk has for them, which is
            what they take and what is free.
    """

    folder: Path
    max_bytes: int | None = None

    @property
    def limit(self) -> int:
        """Most bytes of all copies, now."""
        if self.max_bytes is not None:
            return self.max_bytes
        return (_taken(self._copies()) + shutil.disk_usage(self.folder).free) // 2

    def claim(self, manifest: bytes) -> Path:
        """Return the folder of a copy, which this process holds from now on; it may be empty."""
        path = self.folder / hashlib.sha256(manifest).hexdigest()[:32]
        while True:
            path.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # removed since it was made
                if _is_claimed(path / _USED):
                    break
        if not (path / MANIFEST).exists():
            with alone_in(path, wait=True):
                durable.write_bytes(path / MANIFEST, manifest)
        return path

    def has_room(self, path: Path, num_bytes: int) -> bool:
        """Return whether a copy of so many bytes may be made; others make room if nobody has them.

        Args:
            path: what `claim` returned.
            num_bytes: of all of its files.
        """
        with alone_in(self.folder, wait=True):
            for left in self.folder.glob(f"{_GONE}*"):
                shutil.rmtree(left, ignore_errors=True)
            others = sorted((copy for copy in self._copies() if copy != path), key=_opened)
            excess = _taken(others) + num_bytes - self.limit
            # Nothing is removed unless all that may go makes room enough.
            with ExitStack() as stack:
                going: list[Path] = []
                for copy in others:
                    if sum(map(_bytes_of, going)) >= excess:
                        break
                    if stack.enter_context(_alone(copy)):
                        going.append(copy)
                if sum(map(_bytes_of, going)) < excess:
                    return False
                for copy in going:
                    _remove(copy)
                    log.info("%s made room", copy)
            # From now on, others count all of it.
            (path / _WHOLE).write_text(f"{num_bytes}\n", encoding="utf-8")
            return True

    @contextmanager
    def for_check(self) -> Iterator[Path]:
        """Return a context: a folder among the copies, which ends with it, or later if killed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="check-", dir=self.folder) as path:
            with alone_in(self.folder, wait=True):  # or others could remove what is not locked yet
                _is_claimed(used := Path(path) / _USED)
            try:
                yield Path(path)
            finally:
                os.close(_HELD.pop(used))

    def _copies(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if (path / _USED).exists()]


def cache_at(folder: str | Path | None, max_bytes: int | None) -> Cache:
    """Return the cache that is asked for; None is a folder beside the caches of `datasets`."""
    if max_bytes is not None:
        remedy = "None is half of what the disk has for it, 0 keeps no rows"
        max_bytes = checks.whole_number("cache_bytes", max_bytes, 0, 2**62, remedy)
    if folder is None:
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "packpipe-remote"
    path = checks.local_path("cache", folder).absolute()
    if path.exists() and not path.is_dir():
        remedy = "pass a folder that can be written to"
        raise ValueError(checks.sentence("cache", str(path), "a folder, or none", remedy))
    return Cache(path, max_bytes)


def bring(storage: Storage, records: dict[str, Any], path: Path) -> None:
    """Bring the files of a folder that are not there yet, each checked when it has come.

    Args:
        storage: the folder they lie in.
        records: what the manifest says of each.
        path: of the copy.

    Raises:
        ConnectionError: the store does not answer, or a file is not what the manifest says.
        FileNotFoundError: a file is missing in the store.
        OSError: the disk is full. Files that have come stay.
    """
    if is_whole(records, path):
        return
    with alone_in(path, wait=True), naming_full_disks(path, "files that have come stay"):
        missing = _missing(records, path)  # another process may have brought some
        sizes = sum(records[name]["bytes"] for name in missing)
        bar = datasets.utils.tqdm(
            desc=f"Copying {storage.url}", total=sizes, unit="B", unit_scale=True, disable=None
        )
        with bar, ThreadPoolExecutor(_AT_ONCE) as executor:
            futures = {
                executor.submit(_bring_one, storage, name, records[name], path): name
                for name in missing
            }
            try:
                for future, name in futures.items():
                    future.result()
                    bar.update(records[name]["bytes"])
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise


def _bring_one(storage: Storage, name: str, record: dict[str, Any], path: Path) -> None:
    target = path / name
    try:
        for _ in range(_READINGS):
            digest = xxhash.xxh3_128()
            with durable.partial_of(target).open("wb") as file:
                for piece in pieces_of(storage, name, record["bytes"]):
                    digest.update(piece)
                    file.write(piece)
            found = digest.hexdigest()
            if found == record[CHECKSUM]:
                durable.commit(target)
                return
    finally:
        durable.partial_of(target).unlink(missing_ok=True)
    what = f"{CHECKSUM} of {storage.url}/{name}"
    expected, remedy = f"{record[CHECKSUM]!r}, as in its manifest", "copy or pack the folder again"
    raise ConnectionError(checks.sentence(what, found, expected, remedy))


def is_whole(records: dict[str, Any], path: Path) -> bool:
    """Return whether all files of a folder are in its copy."""
    return not _missing(records, path)


def _missing(records: dict[str, Any], path: Path) -> list[str]:
    """Return the files that are not there; those that are were checked when they came."""
    return [name for name in records if not _is_there(path / name, records[name]["bytes"])]


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_claimed(path: Path) -> bool:
    """Lock a file as one of its users, until this process ends; return whether it is still there.

    Its time of change says when it was opened: now.
    """
    descriptor = _HELD.get(path)
    if descriptor is None or not _is_at(descriptor, path):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
        _lock(descriptor, is_user=True)
        if not _is_at(descriptor, path):  # the copy was removed while this waited
            os.close(descriptor)
            return False
        _HELD[path] = descriptor
    os.utime(path)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextmanager
def _alone(copy: Path) -> Iterator[bool]:
    """Yield whether nobody holds a copy; if so, nobody can take hold of it within the block."""
    # To close a file that this process holds, too, would let go of it on some file systems.
    if copy / _USED in _HELD:
        yield False
        return
    with ExitStack() as stack:
        found = False
        with suppress(OSError):
            file = stack.enter_context((copy / _USED).open("r+b"))
            found = _lock(file.fileno(), is_user=False)
        yield found


def _remove(copy: Path) -> None:
    """Remove a copy that nobody holds."""
    with suppress(OSError):
        # Renamed first: who wants it now makes another one.
        gone = copy.rename(copy.with_name(f"{_GONE}{uuid4().hex}"))
        shutil.rmtree(gone, ignore_errors=True)


def _lock(descriptor: int, *, is_user: bool) -> bool:
    """Lock a file as one of its users, which waits, or alone; return whether that was possible."""
    try:
        import fcntl  # POSIX has it; elsewhere nothing is removed

        fcntl.flock(descriptor, fcntl.LOCK_SH if is_user else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # held by a user, or a file system without locks
        return False
    return True


def _opened(copy: Path) -> float:
    with suppress(FileNotFoundError):
        return (copy / _USED).stat().st_mtime
    return time.time()


def _taken(copies: Iterable[Path]) -> int:
    return sum(map(_bytes_of, copies))


def _bytes_of(copy: Path) -> int:
    """Return the bytes that a copy takes, or will take; its manifest and notes are next to none."""
    planned = there = 0
    with suppress(OSError, ValueError):
        planned = int((copy / _WHOLE).read_text(encoding="utf-8"))
    for path in copy.rglob("*"):
        if path.name != MANIFEST and not path.name.startswith("."):
            with suppress(FileNotFoundError):  # temporary files come and go
                there += path.stat().st_size if path.is_file() else 0
    return max(planned, there)
