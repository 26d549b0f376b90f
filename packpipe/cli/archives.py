"""Unpacks archives of images, once, into the cache of `datasets`."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from packpipe import checks

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_SUFFIXES = (*_TARS, ".zip")


def is_archive(path: Path) -> bool:
    """Return whether a file is a tar or zip archive, to judge by its name."""
    return path.name.endswith(_SUFFIXES) and path.is_file()


def unpacked(archive: Path) -> Path:
    """Return the folder that holds the files of an archive, unpacked there now or before.

    It is known by path, size and time of change of the archive. Files lie in it whole or not at
    all; none leads out of it.

    Raises:
        ValueError: the archive is damaged, holds a file that leads out of it, or two of one name.
    """
    import datasets

    status = archive.stat()
    what = f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(what.encode(errors="surrogatepass")).hexdigest()[:32]
    place = Path(datasets.config.HF_DATASETS_CACHE) / "packpipe" / "archives" / digest
    folder = place / archive.name.split(".")[0]
    if folder.is_dir():
        return folder
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        try:
            _check_names(archive)
            if archive.name.endswith(_TARS):
                # The filter refuses links and names that lead out, devices and owners.
                shutil.unpack_archive(archive, unfinished, filter="data")
            else:
                shutil.unpack_archive(archive, unfinished)
        except (tarfile.TarError, zipfile.BadZipFile, shutil.ReadError, EOFError) as error:
            expected, remedy = "a whole archive", f"{type(error).__name__}: {error}"
            raise ValueError(checks.sentence("archive", str(archive), expected, remedy)) from error
        if not folder.is_dir():  # another process may have been faster
            unfinished.rename(folder)
    return folder


def _check_names(archive: Path) -> None:
    """Raise ValueError if a later file of an archive would replace an earlier one."""
    if archive.name.endswith(_TARS):
        with tarfile.open(archive) as tar:
            names = [member.name for member in tar if member.isfile()]
    else:
        with zipfile.ZipFile(archive) as zipped:
            names = [name for name in zipped.namelist() if not name.endswith("/")]
    for name, number in Counter(names).items():
        if number > 1:
            expected, remedy = "one file of each name", "rename one of them"
            what = f"{name} in {archive.name}"
            raise ValueError(checks.sentence(what, f"there {number} times", expected, remedy))
