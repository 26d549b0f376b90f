"""A folder that many machines write at once, on a file system or in an object store.

Four things are asked of it: put a file, put it if there is none of that name, list a folder, get a
file or some bytes of it. A file that was put is there whole or not at all. On a file system it is
written under a name of its own, synced and renamed (`packpipe.durable`). In an object store, where
a rename is a copy, it is one upload, which nobody sees before it is complete; nothing is renamed,
copied or locked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from uuid import uuid4

from packpipe import checks, durable

# What stores call the version of a file: a digest, or else the time it was written.
_VERSIONS = (
    *("ETag", "etag", "generation", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified"),
    *("Last-Modified", "updated", "modified", "modify", "modificationTime", "created"),
)


class Storage(Protocol):
    """A folder, by `storage_at`. Names may lead into folders of it: ``"_commits/000003.json"``."""

    @property
    def url(self) -> str:
        """Where it is: a path, or a URL."""

    def put(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all; one of that name is replaced."""

    def put_if_absent(self, name: str, content: bytes) -> bytes:
        """Write a file if there is none of that name; return the one that is there then."""

    def scratch(self, name: str) -> Any:
        """Return a context: a path whose `partial_of` is the block's to write, then to put.

        The name is that of the file, or how it begins: it may depend on what is written.
        """

    def put_file(self, name: str, path: Path) -> None:
        """Put the file that was written at a path of `scratch`; one of that name is replaced."""

    def get(self, name: str) -> bytes | None:
        """Return a file, None if there is none."""

    def get_range(self, name: str, start: int, stop: int) -> bytes | None:
        """Return some bytes of a file, fewer if it ends before; None if there is no such file."""

    def version(self, name: str) -> str | None:
        """Return a text that changes when a file is replaced; None if there is no such file."""

    def listed(self, folder: str = "") -> dict[str, int]:
        """Return the names of the files that lie in a folder, and how many bytes each has."""

    def folders(self) -> set[str]:
        """Return the names of the folders in it."""

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""


def storage_at(where: str | Path, options: dict[str, Any] | None = None) -> Storage:
    """Return the folder at a path or a URL; it need not be there yet.

    Args:
        where: a path, or a URL of any scheme that fsspec knows.
        options: for fsspec.

    Raises:
        FileExistsError: it is a file.
        ValueError: it is a URL with one slash after its scheme.
    """
    text = checks.url_or_path("output", where)
    if checks.has_scheme(text):
        return RemoteFolder(text.rstrip("/"), options or {})
    if os.path.exists(text) and not os.path.isdir(text):
        remedy = "choose another output, or remove it"
        raise FileExistsError(checks.sentence("output", text, "a folder, or none", remedy))
    return LocalFolder(os.path.abspath(text))


@dataclass(frozen=True)
class LocalFolder:
    """A `Storage` on a file system, which may be one that many machines share."""

    url: str

    def put(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        with self.scratch(name) as path:
            durable.partial_of(path).write_bytes(content)
            self.put_file(name, path)

    def put_if_absent(self, name: str, content: bytes) -> bytes:
        """Write a file if there is none of that name; return the one that is there then."""
        path, own = self._path(name), self._own(name)
        partial = durable.partial_of(own)
        try:
            partial.write_bytes(content)
            durable.sync(partial)
            # A second name of the file: of several processes one gets it, and it is whole.
            with suppress(FileExistsError):
                try:
                    os.link(partial, path)
                except FileExistsError:
                    raise
                except OSError:  # a file system without second names
                    _write_new(path, content)
                durable.sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)
        return path.read_bytes()

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Return a path in the folder of a file, whose `partial_of` ends with the block."""
        own = self._own(name)
        try:
            yield own
        finally:
            durable.partial_of(own).unlink(missing_ok=True)

    def put_file(self, name: str, path: Path) -> None:
        """Put the file that was written at a path of `scratch`."""
        durable.commit_as(durable.partial_of(path), self._path(name))

    def get(self, name: str) -> bytes | None:
        """Return a file, None if there is none."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def get_range(self, name: str, start: int, stop: int) -> bytes | None:
        """Return some bytes of a file, fewer if it ends before; None if there is none."""
        try:
            with self._path(name).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except FileNotFoundError:
            return None

    def version(self, name: str) -> str | None:
        """Return a text that changes when a file is replaced; None if there is none."""
        try:
            status = self._path(name).stat()
        except FileNotFoundError:
            return None
        return f"{status.st_size} bytes, mtime {status.st_mtime_ns}"

    def listed(self, folder: str = "") -> dict[str, int]:
        """Return the files in a folder, with their sizes."""
        found = {}
        with suppress(FileNotFoundError), os.scandir(self._path(folder)) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # temporary files come and go
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def folders(self) -> set[str]:
        """Return the names of the folders in it."""
        with suppress(FileNotFoundError), os.scandir(self.url) as entries:
            return {entry.name for entry in entries if entry.is_dir()}
        return set()

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return Path(self.url, name)

    def _own(self, name: str) -> Path:
        """Return a path that no other process writes, in the folder of a file."""
        path = self._path(name)
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.sync(path.parent.parent)
        return path.with_name(f"{path.name}.{uuid4().hex}")


def _write_new(path: Path, content: bytes) -> None:
    """Write a file of which there is none; who reads it meanwhile may see it cut."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class RemoteFolder:
    """A `Storage` behind a scheme that fsspec knows."""

    url: str
    options: dict[str, Any] = field(repr=False)

    def put(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        self._filesystem.pipe_file(self._path(name), content)

    def put_if_absent(self, name: str, content: bytes) -> bytes:
        """Write a file if there is none of that name; return the one that is there then."""
        # Stores that know a condition check it themselves (S3, GCS). The others leave a moment in
        # which two may write; both then read what the later one has written.
        try:
            self._filesystem.pipe_file(self._path(name), content, mode="create")
        except OSError:  # each store says in its own words that there is one
            found = self.get(name)
            if found is None:
                raise
            return found
        found = self.get(name)
        return content if found is None else found

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Return a path on this machine, whose folder ends with the block."""
        with TemporaryDirectory(prefix="packpipe-") as folder:
            yield Path(folder, Path(name).name)

    def put_file(self, name: str, path: Path) -> None:
        """Upload the file that was written at a path of `scratch`."""
        self._filesystem.put_file(str(durable.partial_of(path)), self._path(name))

    def get(self, name: str) -> bytes | None:
        """Return a file, None if there is none."""
        self._filesystem.invalidate_cache()
        try:
            # From its beginning: s3fs would first ask for the size of a whole file, and list a
            # folder of that name if there is none.
            return bytes(self._filesystem.cat_file(self._path(name), start=0))
        except FileNotFoundError:
            return None

    def get_range(self, name: str, start: int, stop: int) -> bytes | None:
        """Return some bytes of a file, fewer if it ends before; None if there is none."""
        try:
            return bytes(self._filesystem.cat_file(self._path(name), start=start, end=stop))
        except FileNotFoundError:
            return None

    def version(self, name: str) -> str | None:
        """Return a text that changes when a file is replaced; None if there is no such file.

        Of a store that tells nothing else of a file, its size.
        """
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.info(self._path(name))
        except FileNotFoundError:
            return None
        known = next((f", {key} {found[key]}" for key in _VERSIONS if found.get(key)), "")
        return f"{found.get('size')} bytes{known}"

    def listed(self, folder: str = "") -> dict[str, int]:
        """Return the files in a folder, with their sizes."""
        files = (one for one in self._entries(folder) if one["type"] == "file")
        return {one["name"].rsplit("/", 1)[-1]: one["size"] for one in files}

    def folders(self) -> set[str]:
        """Return the names of the folders in it."""
        found = (one["name"] for one in self._entries("") if one["type"] == "directory")
        return {name.rstrip("/").rsplit("/", 1)[-1] for name in found}

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path(name))

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        self._filesystem.invalidate_cache()
        try:
            return list(self._filesystem.ls(self._path(folder).rstrip("/"), detail=True))
        except FileNotFoundError:
            return []

    @property
    def _filesystem(self) -> Any:
        import fsspec  # loads on first use

        # fsspec keeps what it makes, one for each process.
        return fsspec.url_to_fs(self.url, **self.options)[0]

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}"
