"""Builds of small shards that are watched, stopped or killed; as a script, it builds once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import filelock
import pictures
from traps import say

import packpipe
from packpipe import table
from packpipe.config import PackConfig

OPTIONS: dict[str, Any] = {
    "seq_len": 6,
    "patch_size": 4,
    "max_bad_fraction": 1.0,
    "progress": False,
}
ROW_BYTES = PackConfig(seq_len=6, patch_size=4).row_bytes
# Two batches a shard.
SMALL = {"BATCH_BYTES": 2 * ROW_BYTES, "FILE_BYTES": 4 * ROW_BYTES}
MANIFEST = "manifest.json"
READY = "ready"


def source(num_images: int = 40) -> datasets.Dataset:
    """Images of one to four patches; every ninth has a header that is sound and no more."""
    sides = ((4, 4), (4, 8), (8, 4), (8, 8), (4, 12))
    images = []
    for number in range(num_images):
        bad = number % 9 == 4
        size = sides[number % len(sides)]
        image = pictures.encoded_image(*size, number, "JPEG" if bad else "PNG")
        images.append(image[:-60] if bad else image)
    return pictures.dataset_of(images)


def build(dataset: datasets.Dataset, folder: Path, **options: Any) -> datasets.Dataset:
    """Pack a dataset into small shards."""
    with ExitStack() as stack:
        for name, value in SMALL.items():
            stack.enter_context(patch.object(table, name, value))
        return packpipe.pack(dataset, output=folder, **{**OPTIONS, "num_workers": 0, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones and leftovers among them."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def committed(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest of a folder says of its files; fails if it is half-written."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8"))["files"] if path.exists() else {}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file each committed one is, and when it was written."""
    status = {name: (folder / name).stat() for name in committed(folder)}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in status.items()}


def assert_committed_files_are_whole(folder: Path) -> None:
    """Whatever the manifest says is there, is there."""
    for name, record in committed(folder).items():
        assert table.checksum_of(folder / name) == record["xxh3_128"], name
        assert (folder / name).stat().st_size == record["bytes"], name


@contextmanager
def watching(step: Callable[[str], bool | None]) -> Iterator[None]:
    """Have step called before and after all that a build does to the file system.

    Args:
        step: gets ``"before"`` or ``"after"``, what is done and the name of the file; may raise.
            If it returns False before something, that is not done.
    """

    def watched(owner: Any, name: str, file_of: Callable[..., str | None]) -> Any:
        real = getattr(owner, name)

        def instead(*args: Any, **options: Any) -> Any:
            file = file_of(*args, **options)
            if file is None:
                return real(*args, **options)
            if step(f"before {name} {file}") is False:
                return None
            result = real(*args, **options)
            step(f"after {name} {file}")
            return result

        return patch.object(owner, name, instead)

    def name_of(path: Path, *_: Any, **__: Any) -> str:
        return path.name

    def written(path: Path, mode: str = "r", *_: Any, **__: Any) -> str | None:
        return path.name if "w" in mode else None

    with ExitStack() as stack:
        for name in ("mkdir", "rmdir", "unlink", "replace"):
            stack.enter_context(watched(Path, name, name_of))
        stack.enter_context(watched(Path, "open", written))
        stack.enter_context(watched(os, "fsync", lambda file: os.readlink(f"/proc/self/fd/{file}")))
        stack.enter_context(watched(table._Checksummed, "write", lambda *_: "rows"))
        stack.enter_context(watched(filelock.FileLock, "acquire", lambda *_, **__: ".lock"))
        stack.enter_context(
            watched(datasets.DatasetInfo, "write_to_directory", lambda *_, **__: "info")
        )
        yield


class Run:
    """A build in a process and a session of its own.

    Args:
        source_folder: a dataset that was saved to disk: its fingerprint is the same everywhere.
        folder: where to build.
        num_workers: as for `pack`.
        signal_at: (number, signal): which of the steps of `watching` the process, or its whole
            session if group, sends itself the signal at; None lets it build.
        group: likewise.
    """

    def __init__(
        self,
        source_folder: Path,
        folder: Path,
        *,
        num_workers: int = 0,
        signal_at: tuple[int, int] | None = None,
        group: bool = False,
    ) -> None:
        arguments = {
            "source": str(source_folder),
            "folder": str(folder),
            "num_workers": num_workers,
            "signal_at": signal_at,
            "group": group,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        """Wait until everything is imported and the dataset is open."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == READY + "\n", self.process.communicate()[1]

    def kill(self, *, group: bool) -> None:
        """Kill the process, or its whole session, if it has not ended."""
        if self.process.poll() is None:
            (os.killpg if group else os.kill)(self.process.pid, signal.SIGKILL)

    def result(self) -> tuple[int, list[str]]:
        """Wait for the end; return the status, and the number of steps if it counted them."""
        said, complaint = self.process.communicate(timeout=120)
        assert self.process.returncode in (0, -signal.SIGKILL), complaint
        return self.process.returncode, said.split()


def main(arguments: dict[str, Any]) -> None:
    """Build; say when it begins, and how many steps it took."""
    dataset = datasets.load_from_disk(arguments["source"])
    steps = 0

    def step(_: str) -> None:
        nonlocal steps
        if arguments["signal_at"] is not None and steps == arguments["signal_at"][0]:
            number = arguments["signal_at"][1]
            (os.killpg if arguments["group"] else os.kill)(os.getpid(), number)
        steps += 1

    say(READY)
    with watching(step):
        build(dataset, Path(arguments["folder"]), num_workers=arguments["num_workers"])
    say(steps)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
