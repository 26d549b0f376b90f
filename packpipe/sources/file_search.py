"""Which files a path, a folder or a pattern of `ImageFiles` names.

`datasets` keeps what it has computed of a dataset beside its data, in files that hold the same
images once more. These are left out, and so the folder's own list says which files are its data.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from packpipe import checks
from packpipe.rows.files import MANIFEST

# What `datasets` writes beside the Arrow files of a split, and beside the folders of several.
_STATE, _SPLITS, _CACHE = "state.json", "dataset_dict.json", re.compile(r"cache-[^/]*\.arrow$")
# Nothing can be found in a compressed tar without reading what stands before it.
_COMPRESSED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst|lz4|Z))$", re.IGNORECASE)


def searched(filesystem: Any, path: str, endings: Sequence[str]) -> list[str]:
    """Return the names of the files of a path, sorted; none if there are none.

    Args:
        filesystem: of fsspec.
        path: a file, a pattern, or a folder, whose files of the first of the endings that any has
            are taken, at any depth.
        endings: of names, in lower case.

    Raises:
        ValueError: a folder is one of packed rows or of several splits; or a tar is compressed.
    """
    if filesystem.isfile(path):
        names = [path]
    elif any(one in path for one in "*?["):
        names = [n for n in _files(filesystem, path, lambda _: True) if not _CACHE.search(n)]
    else:
        folder = path.rstrip("/")
        _check_is_no_rows(filesystem, folder)
        names = _files(filesystem, f"{folder}/**/*", lambda name: ending_of(name, endings) != "")
        first = next((e for e in endings if any(ending_of(n, endings) == e for n in names)), "")
        names = [name for name in names if ending_of(name, endings) == first]
        if first == ".arrow":
            names = _data_files(filesystem, folder, names)
    for name in names:
        if _COMPRESSED.search(_without_query(name)):
            expected, remedy = "a tar that is not compressed", "unpack it to one, or write Parquet"
            raise ValueError(checks.sentence("paths", name, expected, remedy))
    return sorted(names)


def ending_of(name: str, endings: Sequence[str]) -> str:
    """Return the ending of a name, whatever its case and the query of a URL; "" for no such."""
    name = _without_query(name).lower()
    return next((ending for ending in endings if name.endswith(ending)), "")


def packed_rows(name: str, found: str = "packed rows") -> ValueError:
    """Return the error of packed rows where images or sequences are to be packed."""
    remedy = "pass packed rows to PackedLoader, or their source"
    return ValueError(checks.sentence(name, found, "images or sequences", remedy))


def _without_query(name: str) -> str:
    return name.partition("?")[0] if checks.has_scheme(name) else name


def _files(filesystem: Any, pattern: str, is_wanted: Callable[[str], bool]) -> list[str]:
    found = filesystem.glob(pattern, detail=True)
    wanted = filter(is_wanted, found)
    return [n for n in wanted if found[n]["type"] == "file" or filesystem.isfile(n)]


def _data_files(filesystem: Any, root: str, names: list[str]) -> list[str]:
    """Return those of Arrow files that hold data, by the lists of their folders if they have one.

    A file of a list that is not there is returned, too: opening it says so.
    """
    kept = []
    for folder, there in groupby(sorted(names), posixpath.dirname):
        above = posixpath.dirname(folder)
        inside = len(above) >= len(filesystem._strip_protocol(root))
        if inside and filesystem.isfile(f"{above}/{_SPLITS}"):
            remedy = f"pass one split's folder, such as {folder}"
            raise ValueError(checks.sentence("paths", above, "no folder of splits", remedy))
        if filesystem.isfile(f"{folder}/{_STATE}"):
            kept += _listed(filesystem, folder)
        else:
            kept += [name for name in there if not _CACHE.search(name)]
    return kept


def _listed(filesystem: Any, folder: str) -> list[str]:
    state = f"{folder}/{_STATE}"
    try:
        files = json.loads(filesystem.cat_file(state))["_data_files"]
        return [f"{folder}/{file['filename']}" for file in files]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "save the dataset anew, or pass its files"
        expected = "what save_to_disk writes"
        raise ValueError(checks.sentence(state, str(error), expected, remedy)) from error


def _check_is_no_rows(filesystem: Any, folder: str) -> None:
    manifest = f"{folder}/{MANIFEST}"
    if filesystem.isfile(manifest):
        try:
            found = json.loads(filesystem.cat_file(manifest))
        except (ValueError, RecursionError):  # somebody else's
            return
        if isinstance(found, dict) and "packpipe" in found:
            raise packed_rows("paths", f"{folder}, packed rows")
