"""Prints the tables of benchmarks in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def table(rows: Iterable[list[str]], columns: list[str]) -> str:
    """Return a Markdown table, printed row by row as it is made."""
    lines = ["| " + " | ".join(columns) + " |", "| --- " + "| ---: " * (len(columns) - 1) + "|"]
    print("\n".join(lines), flush=True)
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    print(flush=True)
    return "\n".join(lines) + "\n"
