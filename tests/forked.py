"""Scripts of the tests in processes that begin with everything imported.

A Python that imports torch and datasets takes longer than most of what is asked of it. One server
for each test process imports them once, and does nothing else; children are forked from it. They
end without taking Python down: what is tested of that needs a Python of its own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["crashing", "disagreeing", "contrasting", "accelerate", "pytorch_lightning", "torch._dynamo"]
)


class Forked:
    """A script in a process and a session of its own.

    Args:
        script: where it lies.
        arguments: of its command line.
        environment: variables that it has beside those of this process.
    """

    def __init__(self, script: str, *arguments: object, **environment: str) -> None:
        # Unlike pipes, files in memory are never full. The child opens them by these names.
        self._files = []
        for name in ("out", "err"):
            descriptor = os.memfd_create(name)
            weakref.finalize(self, os.close, descriptor)
            self._files.append(Path(f"/proc/{os.getpid()}/fd/{descriptor}"))
        argv = [script, *map(str, arguments)]
        self._process = CONTEXT.Process(target=_run, args=(argv, environment, self._files))
        # The server finds the modules of the tests as this process does.
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            multiprocessing.forkserver.ensure_running()
        self._process.start()
        self.pid: int = self._process.pid
        # A test that fails does not wait for it, but Python would when it ends.
        atexit.register(_kill, self._process)

    @property
    def said(self) -> str:
        """What it has written so far."""
        return self._files[0].read_text(errors="replace")

    @property
    def complaint(self) -> str:
        """What it has written to standard error so far."""
        return self._files[1].read_text(errors="replace")

    def poll(self) -> int | None:
        """Its status as `subprocess` tells it, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """Kill it, and all that it has started, if it has not ended."""
        _kill(self._process)

    def wait(self, seconds: float = 300) -> int:
        """Wait until it ends; return its status. If it does not, it is killed, and this fails."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"it had not ended after {seconds} s: {self.complaint}")
        return self._process.exitcode


def _kill(process: Any) -> None:
    if process.exitcode is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has just ended, or has no session of its own yet
        process.kill()


def _run(argv: list[str], environment: dict[str, str], files: list[Path]) -> None:
    """Be a Python that runs a script."""
    os.setsid()
    for number, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
