"""Prints tables and JSON."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def saying(what: str, after: float = 1.0) -> Iterator[None]:
    """Let a person who waits know what a block does, once it has taken longer than some seconds."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":  # one rank says it for all
        yield
        return
    from tqdm import tqdm  # whose `write` leaves a bar whole that is shown meanwhile

    line = f"{checks.plain(what)} ..."
    timer = threading.Timer(after, tqdm.write, (line,), {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence the bars of `datasets` for a block; a terminal has them again after it."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    finally:
        # On a terminal `pack` shows its progress with the bar of `datasets`.
        if sys.stderr.isatty():
            datasets.enable_progress_bars()


def say_what_is_done_once() -> None:
    """Let a person who waits know that kernels compile, or that many sizes are read."""
    if not sys.stderr.isatty():
        return
    log = logging.getLogger("packpipe.sources.sizes")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
        log.propagate = False
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
