"""What the command line prints: tables, JSON, and errors as one line."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print names and values, below a title."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(title))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(Text.assemble("  ", (f"{name:<{width}}", "bold"), "  ", value))


def print_json(value: Any) -> None:
    """Print a value as JSON, one line."""
    sys.stdout.write(json.dumps(value) + "\n")


def in_a_line(error: BaseException) -> str:
    """Return what an error says, without a line break."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install 'packpipe[demo]'"
    said = " ".join(str(error).split())
    named = isinstance(error, ValueError | TypeError | IndexError | OSError) and said
    return said if named else f"{type(error).__name__}: {said}"


def call_is_wrong(error: BaseException) -> bool:
    """Return whether an error is the caller's: an argument, not the data."""
    from packpipe.rows.rejects import TooManyRejects

    if isinstance(error, TooManyRejects):
        return False
    wrong = (
        *(ValueError, TypeError, IndexError),
        *(FileExistsError, FileNotFoundError, ModuleNotFoundError),
    )
    return isinstance(error, wrong)
