"""The log of a training: log.jsonl, one record a line.

Records are appended. The only other change is made when a training goes on from an earlier step:
then a file without the records that will be repeated takes its place, whole. So a kill or a full
disk costs no record that was there, and a damaged line costs itself.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from packpipe.durable import sync, write_bytes

log = logging.getLogger(__name__)

_NAME = "log.jsonl"


def json_line(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON, which has no NaN and no infinities: they become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_log(folder: Path | str) -> list[dict[str, Any]]:
    """Return the records of a training's folder, in order.

    A figure that was NaN or infinite is None. A last line that was cut short is left out; so is
    any other line that cannot be read, with a warning.
    """
    path = Path(folder) / _NAME
    *lines, rest = _content(path).split(b"\n")
    records = [_record(line) for line in lines]
    if damaged := [str(number) for number, found in enumerate(records, 1) if found is None]:
        log.warning("%s: cannot read line %s; left out", path, ", ".join(damaged))
    return [record for record in (*records, _record(rest)) if record is not None]


def begin_log(folder: Path, step: int) -> None:
    """Make the log ready for a training that goes on from a step: drop records of later ones.

    Lines that cannot be read stay, but for a last one that was cut short.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME
    content = _content(path)
    *lines, rest = content.split(b"\n")
    if _record(rest) is not None:  # all of a record but for its line break
        lines.append(rest)
    kept = [line for line in lines if (found := _record(line)) is None or found["step"] <= step]
    wanted = b"".join(line + b"\n" for line in kept)
    if wanted != content:
        write_bytes(path, wanted)


def append_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a record behind those that are there."""
    with (folder / _NAME).open("a", encoding="utf-8") as file:
        file.write(json_line(record))


def sync_log(folder: Path) -> None:
    """Wait until the disk has all records, as it must before it has a checkpoint of their steps."""
    if (path := folder / _NAME).exists():  # not before the first record
        sync(path)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, None if it is none."""
    try:
        # NaN is no JSON, but older logs have it.
        found = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
