"""Brings a folder in a store to a disk of this machine as it is, to be checked there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from packpipe import checks
from packpipe.building.build import INFO, STATE
from packpipe.building.copies import cache_at
from packpipe.building.opened import file_names, manifest_in
from packpipe.building.shards import MANIFEST, naming_full_disks
from packpipe.storage.reading import found_file, found_files, found_folders, pieces_of
from packpipe.storage.storage import Storage, storage_at

# The folders that `pack_pairs` writes.
PAIR = ("images", "texts")


@contextmanager
def copy_for_check(url: str, storage_options: dict[str, Any] | None) -> Iterator[Path]:
    """Return a context: a copy of a folder, whatever its files hold.

    Raises:
        ValueError: it is no folder that `pack` or `pack_pairs` wrote.
        ConnectionError: the store does not answer.
    """
    storage = storage_at(url, storage_options)
    content = found_file(storage, MANIFEST)
    if content is None and not set(PAIR) <= found_folders(storage):
        expected, remedy = "a folder that packpipe.pack wrote", "pass what pack was given as output"
        raise ValueError(checks.sentence("folder", url, expected, remedy))
    with (
        cache_at(None, None).for_check() as copy,
        naming_full_disks(copy, "nothing of it is kept"),
    ):
        if content is not None:
            _bring(storage, content, copy)
        for name in () if content is not None else PAIR:
            part = storage_at(f"{storage.url}/{name}", storage_options)
            (copy / name).mkdir()
            if (own := found_file(part, MANIFEST)) is not None:
                _bring(part, own, copy / name)
        yield copy


def _bring(storage: Storage, manifest: bytes, copy: Path) -> None:
    """Bring the files that a manifest names; of others that are amiss there, their names."""
    (copy / MANIFEST).write_bytes(manifest)
    names = {*file_names(manifest_in(manifest) or {}), INFO, STATE}
    for name, size in found_files(storage).items():
        if name in names:
            with (copy / name).open("wb") as file:
                file.writelines(pieces_of(storage, name, size))
        elif fnmatch(name, "data-*.arrow") or name.endswith(".partial"):
            (copy / name).touch()
