"""Brings a folder in a store to a disk of this machine as it is, to be checked there."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from packpipe import checks
from packpipe.building.build import INFO, STATE
from packpipe.building.copies import cache_at
from packpipe.building.files_build import JOB
from packpipe.building.opened import PAIR, file_names, manifest_in
from packpipe.building.shards import MANIFEST, format_bytes, naming_full_disks
from packpipe.storage.reading import found_file, found_files, found_folders, pieces_of
from packpipe.storage.storage import Storage, storage_at

# Files that come at once.
_AT_ONCE = 8


@contextmanager
def copy_for_check(
    url: str, storage_options: dict[str, Any] | None, cache: str | Path | None
) -> Iterator[Path]:
    """Return a context: a copy of a folder, whatever its files hold.

    Raises:
        ValueError: it is no folder that `pack` or `pack_pairs` wrote.
        ConnectionError: the store does not answer.
        OSError: the disk has no room for it.
    """
    storage, copies = storage_at(url, storage_options), cache_at(cache, None)
    content = found_file(storage, MANIFEST)
    if content is None and not set(PAIR) <= found_folders(storage):
        expected, remedy = "a folder that packpipe.pack wrote", "pass what pack was given as output"
        raise ValueError(checks.sentence("folder", url, expected, remedy))
    names = ("",) if content is not None else PAIR
    parts = {
        name: storage_at(f"{storage.url}/{name}".rstrip("/"), storage_options) for name in names
    }
    with copies.for_check() as copy:
        asked = [one for name, part in parts.items() for one in _asked(part, copy / name)]
        size, free = sum(one.size for one in asked), shutil.disk_usage(copy).free
        if not copies.has_room(copy, size) and size > free:
            expected = f"{format_bytes(size)} for a copy of {url}"
            remedy = "free some, or pass a cache on another disk"
            what = f"free space of {copies.folder}"
            message = checks.sentence(what, format_bytes(free), expected, remedy)
            raise OSError(errno.ENOSPC, message)
        with (
            naming_full_disks(copy, "nothing of it is kept"),
            ThreadPoolExecutor(_AT_ONCE) as executor,
        ):
            list(executor.map(_bring, asked))
        yield copy


class _Asked(NamedTuple):
    """A file that is brought: from where, its name, to where, and its bytes."""

    storage: Storage
    name: str
    folder: Path
    size: int


def _asked(storage: Storage, folder: Path) -> Iterator[_Asked]:
    """Yield the files that a manifest names; make those that are amiss there, without bytes."""
    folder.mkdir(exist_ok=True)
    if (manifest := found_file(storage, MANIFEST)) is None:
        return
    (folder / MANIFEST).write_bytes(manifest)
    names = {*file_names(manifest_in(manifest) or {}), INFO, STATE, JOB}
    for name, size in found_files(storage).items():
        if name in names:
            yield _Asked(storage, name, folder, size)
        elif fnmatch(name, "data-*.arrow") or name.endswith(".partial"):
            (folder / name).touch()


def _bring(asked: _Asked) -> None:
    with (asked.folder / asked.name).open("wb") as file:
        file.writelines(pieces_of(asked.storage, asked.name, asked.size))
