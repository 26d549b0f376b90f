"""Unpacks archives of images, once, into the cache of `datasets`."""

from __future__ import annotations

import hashlib
import lzma
import posixpath
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from packpipe import checks

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVE_ENDINGS = (*_TARS, ".zip")
_DAMAGES = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)
# Of an archive from Windows, too: its parts are no folders elsewhere.
_LEADS_OUT = re.compile(r"/|[A-Za-z]:/|.*\\|(.*/)?\.\.(/|$)", re.DOTALL)


def is_archive(path: Path) -> bool:
    """Return whether a file is a tar or zip archive, to judge by its name."""
    return path.name.lower().endswith(ARCHIVE_ENDINGS) and path.is_file()


def unpacked(archive: Path) -> Path:
    """Return the folder that holds the files of an archive, unpacked there now or before.

    It is known by path, size and time of change of the archive. Files lie in it whole or not at
    all; none leads out of it.

    Raises:
        ValueError: the archive is damaged or encrypted, holds a file that leads out of it, or two
            of one name, or is larger than the free space of the disk.
    """
    import datasets

    status = archive.stat()
    what = f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(what.encode(errors="surrogatepass")).hexdigest()[:32]
    place = Path(datasets.config.HF_DATASETS_CACHE) / "packpipe" / "archives" / digest
    folder = place / archive.name.lstrip(".").split(".")[0]
    if folder.is_dir():
        return folder
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        try:
            _unpack(archive, unfinished)
        except (*_DAMAGES, OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            message = " ".join(str(error).split())  # of several lines, for some suffixes
            expected, remedy = "a whole archive", f"{type(error).__name__}: {message}"
            raise ValueError(checks.sentence("archive", str(archive), expected, remedy)) from error
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been faster
                raise
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Write all files of an archive into an empty folder.

    Raises:
        ValueError: a name leads out or is there twice, or the files need more than the free space.
        TarError, BadZipFile, EOFError, LZMAError, error of zlib, OSError without a number:
            the archive is damaged.
        RuntimeError: it is encrypted.
    """
    from packpipe.sources.tar_blocks import check_end

    opened: Any
    if archive.name.lower().endswith(_TARS):
        with tarfile.open(archive) as opened:
            members = opened.getmembers()
            check_end(opened)
            sizes = [(one.name, one.size) for one in members if not one.isdir()]
            _check(archive, [one.name for one in members], sizes, folder)
            _extract(opened, members, folder)
    else:
        with zipfile.ZipFile(archive) as opened:
            sizes = [(one.filename, one.file_size) for one in opened.infolist() if not one.is_dir()]
            _check(archive, opened.namelist(), sizes, folder)
            for member in opened.infolist():
                opened.extract(member, folder)
    written = sum(path.is_symlink() or path.is_file() for path in folder.rglob("*"))
    if written != len(sizes):  # on a disk that takes A for a, for example
        expected, remedy = f"{len(sizes)}, as in {archive.name}", "rename files, or unpack it"
        raise ValueError(checks.sentence("files unpacked", written, expected, remedy))


def _extract(tar: tarfile.TarFile, members: list[tarfile.TarInfo], folder: Path) -> None:
    """Write the members of a tar, but no owners, no devices and no links that lead out.

    Raises:
        ValueError: a member is a link or a device, and this Python has no filter for them.
    """
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    for member in members:  # Python 3.11.3 and before
        if not (member.isreg() or member.isdir()):
            what, expected = f"{member.name} in a tar", "a file or a folder"
            remedy = "unpack it, or take Python 3.11.4 or later, which checks where links lead"
            raise ValueError(checks.sentence(what, "a link or a device", expected, remedy))
        tar.extract(member, folder, set_attrs=False)


def _check(archive: Path, names: list[str], sizes: list[tuple[str, int]], folder: Path) -> None:
    """Raise ValueError if an archive cannot be unpacked whole.

    Args:
        archive: its path.
        names: of its members, folders among them.
        sizes: of all but folders, the names and the bytes.
        folder: where they are to lie.
    """
    from packpipe.building.shards import format_bytes

    for name in names:
        if _LEADS_OUT.match(name):
            expected = "a path inside it, without .. or \\ or a root"
            what = f"a name in {archive.name}"
            raise ValueError(checks.sentence(what, name, expected, "pack the archive anew"))
    # Different names may be those of one file, such as a//b and ./a/b.
    counts = Counter(posixpath.normpath(name) for name, _ in sizes)
    folders = {str(parent) for name in counts for parent in PurePosixPath(name).parents}
    for name, number in counts.items():
        if number > 1 or name in folders:
            found = f"there {number} times" if number > 1 else "a file and a folder"
            expected, remedy = "one file of each name", "rename one of them"
            raise ValueError(checks.sentence(f"{name} in {archive.name}", found, expected, remedy))
    size, free = sum(size for _, size in sizes), shutil.disk_usage(folder).free
    if size > free:
        what = f"{archive}, {format_bytes(size)} unpacked"
        expected = f"{format_bytes(free)} at most, the free space of its cache"
        remedy = "free some, or set HF_DATASETS_CACHE to a folder of another disk"
        raise ValueError(checks.sentence("archive", what, expected, remedy))
