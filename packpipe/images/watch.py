"""Finds processes that no longer run.

A process may be stopped by a signal, or wait for a file system that hangs; it then takes no
processor time, so a limit on that never ends it. Time alone proves nothing, since a busy machine
can make any work take long. But a process that was not run once for ten minutes, though somebody
waits for it all the while, is not slow: it stands still. Linux tells how long each thread has run,
to the nanosecond; on other systems nothing is found.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from threading import Event, Thread
from typing import TypeAlias

# How long a process that is waited for must stand still.
STILL_SECONDS = 600.0
# How often it is looked at meanwhile.
_LOOKS = 20

# What is waited for now, and how far each has got: anything that changes when it makes progress.
Progress: TypeAlias = dict[Hashable, object]


class Watch:
    """Looks at what is waited for, in a thread of its own, and reports what stands still.

    Args:
        look: returns the progress of all that is waited for now.
        report: called with each that stood still for `seconds`, once each time.
        seconds: how long.
    """

    def __init__(
        self, look: Callable[[], Progress], report: Callable[[Hashable], None], seconds: float
    ) -> None:
        self._look, self._report, self._pause = look, report, seconds / _LOOKS
        self._ended = Event()
        self._thread = Thread(target=self._run, name="packpipe watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        before: Progress = {}
        looks: dict[Hashable, int] = {}
        # Looks are counted, not seconds: when this process itself was stopped for an hour, those
        # that it waits for must get their chance to run, too.
        while not self._ended.wait(self._pause):
            now = self._look()
            still = [who for who in now if who in before and before[who] == now[who]]
            looks = {who: looks.get(who, 0) + 1 for who in still}
            before = now
            for who in still:
                if looks[who] == _LOOKS:
                    self._report(who)


def run_time(process: int) -> object:
    """Return a value that changes whenever a process runs; where nobody knows, at every call."""
    try:
        threads = sorted(Path(f"/proc/{process}/task").iterdir())
        times = [(thread.name, (thread / "schedstat").read_text()) for thread in threads]
    except OSError:
        return object()
    # A process that has started has run; a kernel that does not count says 0 for ever.
    return times if any(not time.startswith("0 ") for _, time in times) else object()
