"""What blocks of files are, whatever the format of the files."""

from __future__ import annotations

import hashlib
import io
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Features, Image

from packpipe import checks

_NO_RANGES = "its server gives no parts of files: copy the file, or serve it from a store"


class Block(NamedTuple):
    """Neighbouring rows of a file, which are read together.

    Attributes:
        file: path or URL of its file.
        group: its number in the file.
        first: number of its first row in the whole source.
        num_rows: its rows.
        start, stop: its bytes in the file are start..stop - 1; 0 in Parquet, which knows them.
        digest: 8 bytes, of what the file said of it when it was opened; none in Parquet.
    """

    file: str
    group: int
    first: int
    num_rows: int
    start: int = 0
    stop: int = 0
    digest: bytes = b""


class Known(NamedTuple):
    """What is known of a file before it is read.

    Attributes:
        size: its bytes.
        rows: of each of its blocks.
        digest: of what the file says of its rows.
        features: of its columns.
        spans: the (start, stop, digest) of each block; none in Parquet.
    """

    size: int
    rows: list[int]
    digest: str
    features: Features
    spans: list[tuple[int, int, bytes]]


def is_of_system(error: Exception) -> bool:
    """Return whether a disk or a network failed; of a damaged file Arrow raises a bare OSError."""
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None)


def damaged(what: str, error: Exception) -> ValueError:
    """Return the error of a block that cannot be read as what it was."""
    remedy = "repair the file, or pack the files anew to another output"
    return ValueError(
        checks.sentence(what, str(error), "what it was when the file was opened", remedy)
    )


def check_rows(what: str, found: int, block: Block, digest: bytes = b"") -> None:
    """Raise ValueError if a block has other rows than before, or another digest."""
    remedy = "the file was changed: pack the files anew, to another output"
    if found != block.num_rows:
        raise ValueError(checks.sentence(f"rows of {what}", found, str(block.num_rows), remedy))
    if digest != block.digest:
        known = f"{block.digest.hex()}, as when the file was opened"
        raise ValueError(checks.sentence(f"digest of {what}", digest.hex(), known, remedy))


def digest_of(content: bytes) -> bytes:
    """Return the 8 bytes that `Block` keeps of what a file says of a block."""
    return hashlib.blake2b(content, digest_size=8).digest()


def size_of(filesystem: Any, file: str) -> int:
    """Return the bytes of a file; UnsupportedOperation if its server does not tell them."""
    size = filesystem.size(file)
    if size is None:
        raise io.UnsupportedOperation(
            checks.sentence(f"size of {file}", "not told", "a number of bytes", _NO_RANGES)
        )
    return int(size)


def bytes_of(filesystem: Any, file: str, start: int, stop: int) -> bytes:
    """Return the bytes start..stop - 1 of a file.

    Raises:
        UnsupportedOperation, a ValueError: more came, as from servers that know no ranges.
        ValueError: fewer came.
    """
    content = bytes(filesystem.cat_file(file, start=start, end=stop))
    check_answer(content, stop - start, file)
    if len(content) < stop - start:
        raise ValueError(f"{len(content):,} bytes came of bytes {start}..{stop - 1}")
    return content


def check_answer(content: bytes, asked: int, file: str) -> None:
    """Raise UnsupportedOperation if more bytes came than were asked for."""
    if len(content) > asked:
        what, expected = f"answer to a request for a part of {file}", f"{asked:,} bytes"
        found = f"{len(content):,} bytes"
        raise io.UnsupportedOperation(checks.sentence(what, found, expected, _NO_RANGES))


def features_of(schema: pa.Schema, file: str) -> Features:
    """Return the features of a file's schema: a column of ``bytes`` and ``path`` holds images.

    Raises:
        ValueError: two columns have one name.
    """
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        what = f"columns {twice[0]!r} of {file}"
        raise ValueError(checks.sentence(what, len(twice), "one of a name", "rename the others"))
    found = Features.from_arrow_schema(schema)
    images = [name for name, kind in found.items() if _is_image(kind)]
    return Features({**found, **dict.fromkeys(images, Image())})


def _is_image(kind: Any) -> bool:
    return isinstance(kind, dict) and kind.keys() == {"bytes", "path"}
