"""Builds of small shards that are watched, stopped or killed; as a script, it builds once."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import filelock
import pictures
from forked import Forked
from processes import of_session, wait_until
from traps import say

import packpipe
from packpipe.planning.image_config import PackConfig
from packpipe.rows import files as table

OPTIONS: dict[str, Any] = {
    "seq_len": 6,
    "patch_size": 4,
    "max_bad_fraction": 1.0,
    "progress": False,
}
ROW_BYTES = PackConfig(seq_len=6, patch_size=4).row_bytes
# Two batches a shard.
SMALL = {"BATCH_BYTES": 2 * ROW_BYTES, "FILE_BYTES": 4 * ROW_BYTES}
MANIFEST, JOURNAL = "manifest.json", "journal.jsonl"
READY = "ready"


def source(num_images: int = 40) -> datasets.Dataset:
    """Images of one to four patches; every ninth has a header that is sound and no more."""
    sides = ((4, 4), (4, 8), (8, 4), (8, 8), (4, 12))
    images = []
    for number in range(num_images):
        bad = number % 9 == 4
        size = sides[number % len(sides)]
        image = pictures.encoded_image(*size, number, "JPEG" if bad else "PNG")
        images.append(header_of(image) if bad else image)
    return pictures.dataset_of(images)


def header_of(image: bytes) -> bytes:
    """A JPEG as far as its pixels."""
    return image[: image.index(b"\xff\xda")]


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
    """What manifest and journal of a folder say of its files; fails if the former is cut."""
    path, journal = folder / MANIFEST, folder / JOURNAL
    lines = journal.read_text(encoding="utf-8").split("\n")[:-1] if journal.exists() else []
    files = json.loads(path.read_text(encoding="utf-8"))["files"] if path.exists() else {}
    for line in lines:  # of files that a complete manifest has in other words
        files = {**json.loads(line), **files}
    return dict(sorted(files.items()))


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

    def watched(owner: Any, name: str, name_of: Callable[..., str | None]) -> Any:
        real = getattr(owner, name)

        def instead(*args: Any, **options: Any) -> Any:
            file = name_of(*args, **options)
            if file is None:
                return real(*args, **options)
            if step(f"before {name} {file}") is False:
                return None
            result = real(*args, **options)
            try:
                step(f"after {name} {file}")
            except BaseException:
                if name == "open":
                    result.close()
                raise
            return result

        return patch.object(owner, name, instead)

    def own_name(path: Path, *_: Any, **__: Any) -> str:
        return path.name

    def written(path: Path, mode: str = "r", *_: Any, **__: Any) -> str | None:
        return path.name if mode[0] in "wa" else None

    def synced(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    with ExitStack() as stack:
        for name in ("mkdir", "rmdir", "unlink", "replace"):
            stack.enter_context(watched(Path, name, own_name))
        stack.enter_context(watched(Path, "open", written))
        stack.enter_context(watched(os, "fsync", synced))
        stack.enter_context(watched(table._Checksummed, "write", lambda *_: "rows"))
        stack.enter_context(watched(filelock.FileLock, "acquire", lambda *_, **__: ".lock"))
        yield


def send(number: int, leader: int, *, group: bool) -> None:
    """Send a signal to the leader of a session, or to all of it; the leader may be us, so last."""
    others = [pid for pid in of_session(leader) if pid != leader] if group else []
    for pid in [*others, leader]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Stopped(Exception):
    """What stops a build."""


def raising_at(name: str, nth: int, error: BaseException) -> Callable[[str], None]:
    """Return a step for `watching` that raises from the nth step of a name on."""
    left = [nth]

    def step(at: str) -> None:
        if at == name:
            left[0] -= 1
            if left[0] < 0:
                raise error

    return step


def stopped_build(
    dataset: datasets.Dataset, folder: Path, name: str, nth: int = 0, **options: Any
) -> None:
    """Build as far as a step; fails if it is never reached."""
    with suppress(Stopped), watching(raising_at(name, nth, Stopped())):
        build(dataset, folder, **options)
        raise AssertionError(f"{name} was not reached")


def started(arguments: dict[str, Any], command: Sequence[str] = ()) -> subprocess.Popen[str]:
    """This script, in a process and a session of its own, if need be as arguments of a command."""
    return subprocess.Popen(
        [*command, sys.executable, "-W", "ignore", __file__, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


def said_by(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process of a session of its own says; if it does not end, the session is killed."""
    try:
        return process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        send(signal.SIGKILL, process.pid, group=True)
        process.wait()
        raise


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
        self.process = Forked(__file__, json.dumps(arguments))

    def wait_until_ready(self) -> None:
        """Wait until everything is imported and the dataset is open."""
        wait_until(lambda: self.process.said or self.process.poll() is not None)
        assert self.process.said.startswith(READY), self.process.complaint

    def kill(self, *, group: bool) -> None:
        """Kill the process, or its whole session, if it has not ended."""
        if self.process.poll() is None:
            send(signal.SIGKILL, self.process.pid, group=group)

    def result(self) -> tuple[int, list[str]]:
        """Wait for the end; return the status, and the number of steps if it counted them."""
        status = self.process.wait()
        assert status in (0, -signal.SIGKILL), self.process.complaint
        return status, self.process.said.removeprefix(READY).split()


def build_once(arguments: dict[str, Any]) -> None:
    """Build; say when it begins, and how many steps it took."""
    dataset = datasets.load_from_disk(arguments["source"])
    steps = count()

    def step(_: str) -> None:
        number = next(steps)
        if arguments["signal_at"] is not None and number == arguments["signal_at"][0]:
            send(arguments["signal_at"][1], os.getpid(), group=arguments["group"])

    say(READY)
    with watching(step):
        build(dataset, Path(arguments["folder"]), num_workers=arguments["num_workers"])
    say(next(steps))


def fill_up(arguments: dict[str, Any]) -> None:
    """Build on a disk that is full, that fills up meanwhile, and that has room again; say how.

    Args:
        arguments: the source; the disk: a folder; whether it is to be filled by another file, or
            its files are just not allowed to grow.
    """
    dataset, disk = datasets.load_from_disk(arguments["source"]), Path(arguments["disk"])
    folder, other = disk / "out", disk / "other"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        if not arguments["by_another"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
            return
        with suppress(OSError), open(other, "ab", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass

    def make_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        other.unlink(missing_ok=True)

    def error_of(step: Callable[[str], None]) -> str:
        try:
            with watching(step):
                build(dataset, folder)
        except OSError as error:
            return str(error)
        return ""

    def fill_at(name: str) -> None:
        if name == "before open data-00002.arrow.partial":
            wait_until(lambda: len(committed(folder)) == 2)
            fill()

    found: dict[str, Any] = {"filled": error_of(fill_at), "stays": sorted(committed(folder))}
    assert_committed_files_are_whole(folder)
    before = stamps(folder)
    found["again"] = error_of(lambda _: None)
    make_room()
    found["with room"] = error_of(lambda _: None)
    found["kept"] = before.items() <= stamps(folder).items()
    found["contents"] = {name: content.hex() for name, content in contents(folder).items()}
    say(json.dumps(found))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    (fill_up if "disk" in asked else build_once)(asked)
