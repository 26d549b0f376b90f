"""What blocks of files are, whatever the format of the files."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Features, Image

from packpipe import checks


class Block(NamedTuple):
    """Neighbouring rows of a file, which are read together.

    Attributes:
        file: path or URL of its file.
        group: its number in the file.
        first: number of its first row in the whole source.
        num_rows: its rows.
        start, stop: its bytes in the file are start..stop - 1; 0 in Parquet, which knows them.
    """

    file: str
    group: int
    first: int
    num_rows: int
    start: int = 0
    stop: int = 0


class Known(NamedTuple):
    """What is known of a file before it is read.

    Attributes:
        size: its bytes.
        rows: of each of its blocks.
        digest: of what the file says of its rows.
        features: of its columns.
        spans: the (start, stop) of each block; none in Parquet.
    """

    size: int
    rows: list[int]
    digest: str
    features: Features
    spans: list[tuple[int, int]]


def is_of_system(error: Exception) -> bool:
    """Return whether a disk or a network failed; of a damaged file Arrow raises a bare OSError."""
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None)


def damaged(what: str, error: Exception) -> ValueError:
    """Return the error of a block that cannot be read as what it was."""
    remedy = "repair the file, or pack the files anew to another output"
    return ValueError(checks.sentence(what, str(error), "the images it had", remedy))


def check_rows(what: str, found: int, block: Block) -> None:
    """Raise ValueError if a block has other rows than before."""
    if found != block.num_rows:
        remedy = "the file was changed: pack the files anew, to another output"
        raise ValueError(checks.sentence(f"rows of {what}", found, str(block.num_rows), remedy))


def features_of(schema: pa.Schema) -> Features:
    """Return the features of a schema: a column of ``bytes`` and ``path`` holds images."""
    found = Features.from_arrow_schema(schema)
    images = [name for name, kind in found.items() if _is_image(kind)]
    return Features({**found, **dict.fromkeys(images, Image())})


def _is_image(kind: Any) -> bool:
    return isinstance(kind, dict) and kind.keys() == {"bytes", "path"}
