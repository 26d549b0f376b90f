"""Prints tables and JSON."""

from __future__ import annotations

import json
import sys
from typing import Any


def plain(text: object) -> str:
    """Return a text of one line without what a terminal would obey: escapes for such characters.

    Names of files may hold any; half of a broken character cannot even be printed.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)
    )


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a title, and names with their values below it."""
    from rich.console import Console
    from rich.text import Text

    # Nothing is wrapped or coloured by rich's guess, nor is [text] in a value taken for markup.
    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(plain(title)))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(Text.assemble("  ", (f"{name:<{width}}", "bold"), "  ", plain(value)))


def print_json(value: Any) -> None:
    """Print a value as JSON, one line."""
    sys.stdout.write(json.dumps(value) + "\n")
