"""Digests of labels, pixels and tokens, by which a resumed loader sees that its data changed.

A loader's state says with them what its batches show. Labels are digested whole: 8 bytes each. Of
pixels and tokens, which would all have to be read for that, 16 MB are read, evenly spread. No
digest depends on the folder, the time or how Arrow cuts a column into pieces, nor on `datasets`'
own fingerprint, which holds paths and times of change, and is drawn anew by some of its methods.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from packpipe.rows.files import CHECKSUM, MANIFEST
from packpipe.rows.labels import label_values

_STRETCHES = 64
_SAMPLE_BYTES = 2**24


def hexdigest(*parts: Any) -> str:
    """Return 32 hexadecimal digits, a digest of bytes laid end to end."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def labels_digest(labels: Any) -> str | None:
    """Return a digest of labels as batches show them, or None if there are none.

    Args:
        labels: an Arrow array; None for none.
    """
    if labels is None:
        return None
    try:
        return hexdigest(np.ascontiguousarray(label_values(labels)).data)
    except TypeError:  # no batch can hold them
        return str(labels.type)


def sample_digest(num_entries: int, read: Callable[[int, int, int], Iterable[Any]]) -> str:
    """Return a digest of 16 MB of the bytes of entries, or of all of them if they are fewer.

    The entries are cut into 64 stretches of equal number, and of each the first bytes are taken:
    what lies together on a disk is read together.

    Args:
        num_entries: how many entries there are.
        read: called with (start, stop, most), returns the bytes of the entries of a stretch, in
            order, in buffers; those after the first `most` bytes may be left out.
    """
    digest = hashlib.sha256()
    stretches = max(1, min(_STRETCHES, num_entries))
    bounds = [num_entries * number // stretches for number in range(stretches + 1)]
    for start, stop in pairwise(bounds):
        left = _SAMPLE_BYTES // stretches
        for buffer in read(start, stop, left):
            part = pa.py_buffer(buffer)[:left]
            digest.update(part)
            left -= len(part)
            if not left:
                break
    return digest.hexdigest()[:32]


def files_digest(paths: Iterable[str]) -> str | None:
    """Return a digest of the checksums of files that lie beside a manifest; None if none does.

    The files themselves are not read.

    Args:
        paths: of Arrow files, in the order of their rows.
    """
    manifests: dict[Path, Any] = {}
    found = []
    for path in map(Path, paths):
        if path.parent not in manifests:
            manifests[path.parent] = _files_of(path.parent / MANIFEST)
        record = manifests[path.parent].get(path.name)
        # Other files may lie there, too: `datasets` keeps what it has computed beside the data.
        if isinstance(record, dict) and record.get("bytes") == path.stat().st_size:
            found.append(str(record.get(CHECKSUM)))
    return checksums_digest(found) if found else None


def checksums_digest(checksums: Iterable[str]) -> str:
    """Return a digest of the checksums of files, in the order of their rows."""
    return hexdigest("\n".join(checksums).encode())


def _files_of(manifest: Path) -> Any:
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or not packpipe's
        return {}
    return files if isinstance(files, dict) else {}
