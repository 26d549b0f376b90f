"""Opens a packed folder, on this machine or in a store."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from packpipe import checks
from packpipe.building.build import read_rejects, stored_rows
from packpipe.building.copies import Cache, bring, cache_at, is_whole
from packpipe.building.remote_encoded import RemoteEncoded
from packpipe.building.remote_rows import remote_rows
from packpipe.building.shards import (
    MANIFEST,
    REJECTS,
    alone_in,
    data_files,
    read_manifest,
)
from packpipe.building.stored_segments import Versions, segments_path, write_segments
from packpipe.rows.encoded import ENCODED
from packpipe.rows.encoded_rows import decoder_of, decoding
from packpipe.rows.rejects import Reject
from packpipe.storage.reading import found_file, found_folders, version_of
from packpipe.storage.storage import Storage, storage_at

# Files whose segments are read at once.
_AT_ONCE = 8
# Names that a manifest may have for its files: no path leads out of a folder.
_NAME = re.compile(r"[\w-][\w.-]*")
# The folders that `pack_pairs` writes.
PAIR = ("images", "texts")
_FOLDER, _REMEDY = "a folder that packpipe.pack wrote", "pass what pack was given as output"


def open_packed(
    folder: str | Path,
    *,
    storage_options: dict[str, Any] | None = None,
    cache: str | Path | None = None,
    cache_bytes: int | None = None,
) -> Dataset:
    """Return the rows that `pack` has written into a folder, here or in a store.

    What lies in a store is copied to a disk of this machine, once, if there is room: each file is
    checked by its checksum when it comes, and the rows are then those of a folder like any other.
    Processes of one machine share the copy. Without room, only what the rows hold is copied, about
    a thousandth (tokens of images, which are most of it, are not); their tokens are read from the
    store whenever a row is asked for, three requests a row, by as many threads as a loader has
    (``num_workers``, whose ``prefetch`` is how far they read ahead). The rows, batches of them and
    states of loaders are the same, byte for byte, of a folder that nobody has changed. A request
    that fails is made four times in all.

    Of rows that are read so: ``features`` has no columns of tokens, single rows and `read_rows`
    have them. Another format, and rows of several folders that are joined, are refused; such rows
    are not saved. That a file is replaced in the store is noticed within a minute, and is an error.
    No checksum is of a single row, as `verify` has them: other pixels, labels and sizes in what the
    store answers are not noticed. Encoded images have one each: their rows are read by a request a
    row, and an image that is not the one that was packed is an error.

    Args:
        folder: a path, or a URL that fsspec knows, such as ``"s3://bucket/rows"``. Of `pack_pairs`,
            ``images`` and ``texts`` in it are opened one by one.
        storage_options: for fsspec, of a URL: credentials, for example.
        cache: a local folder of copies; None is one beside the caches of `datasets`.
        cache_bytes: most bytes of all copies in it; None is half of what they take and what is
            free on its disk. To make room, copies are removed whole, the one opened longest ago
            first; never one that a process has opened that still runs. 0 makes no copy, and uses
            one that is there. What the rows hold is kept whatever the limit, and goes with the rest
            of its folder when a copy needs the room.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `pack` has not written this folder, or not completed it, or with
            ``materialize=False``; or nothing is installed that opens the URL.
        ConnectionError: the store does not answer; or a file that is copied is not what the
            manifest says, or what is read of it does not fit together.
        FileNotFoundError: a file of the manifest is not there.
    """
    found = packed_at(folder, storage_options=storage_options, cache=cache, cache_bytes=cache_bytes)
    if not found.manifest.get("materialized", True):
        expected = "rows with their tokens"
        remedy = "call pack as it was written, which computes them from their images"
        what = f"{folder}, packed with materialize=False"
        raise ValueError(checks.sentence("folder", what, expected, remedy))
    return found.rows()


@dataclass(frozen=True, eq=False)
class PackedFolder:
    """A packed folder whose build is complete.

    Attributes:
        place: its path or URL.
        folder: where its manifest and rejects are on this machine; and its files, if all are here.
        manifest: what it says of itself.
        storage: where it lies, if that is a store.
        cache: of what lies in a store.
    """

    place: str
    folder: Path
    manifest: dict[str, Any]
    storage: Storage | None = None
    cache: Cache | None = None

    def rows(self, *, may_copy: bool = True) -> Dataset:
        """Return the rows.

        Args:
            may_copy: whether rows in a store may be copied whole; they are not to look at a few.
        """
        if self.storage is None or self.cache is None:
            return _decoding(datasets.load_from_disk(str(self.folder)))
        records = {name: self.manifest["files"][name] for name in data_files(self.manifest)}
        size = sum(record["bytes"] for record in records.values())
        whole = is_whole(records, self.folder)
        if whole or (may_copy and self.cache.has_room(self.folder, size)):
            bring(self.storage, records, self.folder)
            return _decoding(stored_rows(self.folder))
        is_encoded = self.manifest.get("store") == ENCODED
        return _segments(self.storage, records, self.folder, is_encoded=is_encoded)

    def rejects(self) -> list[Reject]:
        """Return the source examples that are in no row."""
        return read_rejects(self.folder)


def packed_at(
    folder: str | Path,
    *,
    storage_options: dict[str, Any] | None = None,
    cache: str | Path | None = None,
    cache_bytes: int | None = None,
) -> PackedFolder:
    """Return a packed folder, with the arguments and errors of `open_packed`.

    Of a store, the manifest and the rejects are read, and no row.
    """
    if not isinstance(folder, str | Path):
        raise TypeError(checks.sentence("folder", folder, "a path or a URL", _REMEDY))
    if not isinstance(storage_options, dict | None):
        remedy = "pass what fsspec takes, by name"
        raise TypeError(checks.sentence("storage_options", storage_options, "a dict", remedy))
    place, copies = checks.url_or_path("folder", folder), cache_at(cache, cache_bytes)
    if not checks.has_scheme(place):
        if not (Path(place) / MANIFEST).is_file():
            names = {path.parent.name for path in Path(place).glob(f"*/{MANIFEST}")}
            raise ValueError(_no_folder(place, names))
        found = read_manifest(Path(place))
        _check_complete(place, found)
        return PackedFolder(place, Path(place), found)
    storage = storage_at(place, storage_options)
    content = found_file(storage, MANIFEST)
    manifest = None if content is None else manifest_in(content)
    if content is None or manifest is None:
        raise ValueError(_no_folder(place, found_folders(storage) if content is None else set()))
    _check_complete(place, manifest)
    _check_names(place, manifest)
    path = copies.claim(content)
    bring(storage, {REJECTS: manifest["files"][REJECTS]}, path)
    return PackedFolder(place, path, manifest, storage, copies)


def _decoding(rows: Dataset) -> Dataset:
    """Return rows as they are read: of encoded images, with what decodes them."""
    found: Dataset = decoding(rows)
    return found


def _no_folder(place: str, names: set[str]) -> str:
    """Return the message of a folder that `pack` has not written, given the folders in it."""
    if set(PAIR) <= names:
        remedy = f"open {' and '.join(f'{place}/{name}' for name in PAIR)} one by one"
        return checks.sentence("folder", f"{place}, of pairs", _FOLDER, remedy)
    return checks.sentence("folder", place, _FOLDER, _REMEDY)


def manifest_at(folder: str, storage_options: dict[str, Any] | None = None) -> Any:
    """Return what the manifest of a folder holds, here or in a store; None if there is none.

    Raises:
        ValueError: it is no JSON.
        OSError: it cannot be read.
    """
    place = checks.url_or_path("folder", folder)
    if not checks.has_scheme(place):
        return read_manifest(Path(place)) if (Path(place) / MANIFEST).is_file() else None
    content = found_file(storage_at(place, storage_options), MANIFEST)
    return None if content is None else json.loads(content)


def manifest_in(content: bytes) -> dict[str, Any] | None:
    """Return the manifest that a file holds; None if it is none of packpipe's."""
    try:
        found = json.loads(content)
    except ValueError:  # somebody else's
        return None
    known = isinstance(found, dict) and {"packpipe", "complete", "files"} <= found.keys()
    return found if known else None


def _check_complete(place: str, manifest: dict[str, Any]) -> None:
    if not manifest["complete"]:
        remedy = "call pack again, and it continues"
        raise ValueError(checks.sentence("folder", place, "a complete build", remedy))


def file_names(manifest: dict[str, Any]) -> list[str]:
    """Return the names of the files of a manifest that lie in its folder, as all of pack's do."""
    files = manifest.get("files")
    return [name for name in files if _NAME.fullmatch(name)] if isinstance(files, dict) else []


def _check_names(place: str, manifest: dict[str, Any]) -> None:
    """Raise ValueError if a file of a manifest would be written outside of its folder."""
    inside = file_names(manifest)
    for name in manifest["files"]:
        if name not in inside:
            expected, remedy = "a name without a folder", "pass a folder that packpipe.pack wrote"
            where = f"a file of {place}/{MANIFEST}"
            raise ValueError(checks.sentence(where, name, expected, remedy))


def _segments(
    storage: Storage, records: dict[str, Any], folder: Path, *, is_encoded: bool
) -> Dataset:
    """Return a dataset of the segments of rows, whose tokens or images are read from the store."""
    with ThreadPoolExecutor(_AT_ONCE) as executor:
        versions = list(executor.map(partial(version_of, storage), records))
    named = zip(records, versions, strict=True)
    paths = [segments_path(storage, name, version, folder) for name, version in named]
    if not all(path.exists() for path in paths):
        first, tasks = 0, []
        with alone_in(folder, wait=True), ThreadPoolExecutor(_AT_ONCE) as executor:
            for name, version, path in zip(records, versions, paths, strict=True):
                record = records[name]
                tasks.append(
                    executor.submit(write_segments, storage, name, record, first, version, path)
                )
                first += record["rows"]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise
    found = datasets.concatenate_datasets([Dataset.from_file(str(path)) for path in paths])
    known, schema = Versions(storage, dict(zip(records, versions, strict=True))), found.data.schema
    if is_encoded:
        decoder = replace(decoder_of(found), folder=storage.url)
        return found.with_transform(RemoteEncoded(storage, records, known, decoder, schema))
    return found.with_transform(remote_rows(storage, records, known, paths, schema))
