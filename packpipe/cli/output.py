"""Prints tables and JSON."""

from __future__ import annotations

import json
import os
import select
import sys
from typing import TYPE_CHECKING, Any

from packpipe import checks

if TYPE_CHECKING:
    from rich.console import Console


def console(**options: Any) -> Console:
    """Return a console that lets the command know if nobody reads: rich's ends it with status 1."""
    from rich.console import Console

    class Told(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Told(**options)


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a title, and names with their values below it."""
    from rich.text import Text

    # Nothing is wrapped or coloured by rich's guess, nor is [text] in a value taken for markup.
    told = console(soft_wrap=True, highlight=False)
    told.print(Text(checks.plain(title)))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        told.print(Text.assemble("  ", (f"{name:<{width}}", "bold"), "  ", checks.plain(value)))


def print_json(value: Any) -> None:
    """Print a value as JSON, one line."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()  # if nobody reads it, the command is told, not Python at its end


def nobody_reads() -> bool:
    """Return whether who read the output has gone, as ``head`` does; the rest goes nowhere then."""
    try:
        poll, out = select.poll(), sys.stdout.fileno()
    except (AttributeError, OSError):  # Windows has no poll, and not every output a descriptor
        return False
    poll.register(out, select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:  # Python writes what is left when it ends, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return gone


def say_if_kernels_compile() -> None:
    """Let a person who waits know once that kernels compile, which they do at the first start."""
    if not sys.stderr.isatty():
        return
    from numba.core import event

    class Once(event.Listener):
        said = False

        def on_start(self, _: event.Event) -> None:
            if not self.said:
                sys.stderr.write("compiling kernels, at the first start alone ...\n")
            self.said = True

        def on_end(self, _: event.Event) -> None:
            pass

    event.register("numba:compile", Once())  # type: ignore[no-untyped-call]
