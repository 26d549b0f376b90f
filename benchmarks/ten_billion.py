"""The driver of a job of ten billion images on a thousand workers, whose windows are made up.

    python benchmarks/ten_billion.py --data FOLDER [--images 10000000000] [--workers 1000]

FOLDER holds jpegs.parquet. A window of real photographs is built once, for what a commit says and
how long a worker takes. Then `FilesBuild`, as `pack` runs it, goes through a job of as many images
as asked: the source's blocks, the executor's answers and the store are made up, and everything else
is the driver's own work: cutting windows, handing them out, adding up commits, listing the folder,
reading commits again after a restart, and the manifest. Writes benchmarks/results/ten_billion.md.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import pickle
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from packpipe import ImageFiles, durable
from packpipe.building.files_build import FilesBuild
from packpipe.building.pack_files import files_build
from packpipe.building.window_job import COMMITS, Window, build_window, commit_name, data_name
from packpipe.philox import Key
from packpipe.planning.block_windows import WINDOW_ROWS, block_windows, runs_of
from packpipe.rows import files as table
from packpipe.rows.rejects import Tolerance

ROOT = Path(__file__).parent.parent
ROWS_OF_BLOCK, BLOCKS_OF_FILE = 1000, 100
ANSWER = 0.05  # seconds that a store takes for a small request: assumed, and named as such
AT_ONCE = 16  # of files_build
LISTED = 1000  # names that S3 gives at a time


@dataclass
class MadeUp:
    """A `Storage` that has the commits of all windows, and keeps nothing that is put.

    Attributes:
        commit: what a window says, but for its number and names.
        windows: how many there are.
        put_bytes: of every file that was put.
    """

    commit: dict[str, Any]
    windows: int = 0
    put_bytes: dict[str, int] = field(default_factory=dict)
    url: str = "s3://bucket/rows"
    job: bytes = b""

    def of_window(self, number: int) -> dict[str, Any]:
        """Return the commit of a window."""
        records = self.commit["files"].values()
        named = {data_name(number, part, f"{number:016x}"): r for part, r in enumerate(records)}
        return {**self.commit, "window": number, "files": named}

    def get(self, name: str) -> bytes | None:
        """Return a file that the driver reads."""
        if name.startswith(COMMITS):
            number = int(name.split("/")[1].split(".")[0])
            return json.dumps(self.of_window(number)).encode()
        return self.job if name == "job.json" and self.job else None

    def put(self, name: str, content: bytes) -> None:
        """Count a file."""
        self.put_bytes[name] = len(content)

    def put_if_absent(self, name: str, content: bytes) -> bytes:
        """Keep the job."""
        self.put(name, content)
        self.job = content
        return content

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Return a path for what is uploaded."""
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, name)

    def put_file(self, name: str, path: Path) -> None:
        """Count a file."""
        self.put_bytes[name] = durable.partial_of(path).stat().st_size

    def listed(self, folder: str = "") -> dict[str, int]:
        """Return the names of a folder: of commits, or of files of rows."""
        numbers = range(self.windows)
        if folder == COMMITS:
            return {commit_name(number): 1000 for number in numbers}
        records = list(self.commit["files"].values())
        return {
            data_name(number, part, f"{number:016x}"): record["bytes"]
            for number in numbers
            for part, record in enumerate(records)
        }

    def folders(self) -> set[str]:
        """Return no folder."""
        return set()

    def remove(self, name: str) -> None:
        """Raise: nothing here is a stray."""
        raise AssertionError(name)


class Answering(Executor):
    """Answers with a made-up commit at once; what a cluster would be sent is pickled."""

    def __init__(self, store: MadeUp) -> None:
        self.store, self.sent = store, 0

    def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        """Return a future that is done."""
        job, window = arguments
        self.sent += len(pickle.dumps((function, job, window)))
        future: Future[Any] = Future()
        # A commit arrives as bytes, and its texts are nobody else's.
        future.set_result(pickle.loads(pickle.dumps(self.store.of_window(window.number))))  # noqa: S301
        return future


def real_window(data: Path, work: Path) -> tuple[FilesBuild, dict[str, Any], float]:
    """Return the build of a window of photographs, its commit, and its seconds of a processor."""
    image = pq.read_table(data / "jpegs.parquet", columns=["image"]).column(0).combine_chunks()
    rows = image.take(np.arange(ROWS_OF_BLOCK) % len(image))
    fields = [rows.field("bytes"), rows.field("path")]
    struct = pa.StructArray.from_arrays(fields, ["bytes", "path"])
    pq.write_table(pa.table({"image": struct}), work / "source.parquet")
    files = ImageFiles(work / "source.parquet")
    options = {"output": work / "rows", "num_workers": 0}
    build = files_build(files, 1024, {}, Tolerance(len(files), 0.01, 100), **options)
    build.claim()
    before = time.process_time()
    commit = build_window(build.job, Window(0, (files.block(0),)))
    return build, commit, time.process_time() - before


def commit_of(commit: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return the commit of a window of as many rows: its counts, and files of their full size."""
    times = rows / ROWS_OF_BLOCK
    record = next(iter(commit["files"].values()))
    total = sum(one["bytes"] for one in commit["files"].values()) * times
    parts = max(1, round(total / table.FILE_BYTES))
    size = {**record, "bytes": int(total / parts), "rows": int(record["rows"] * times / parts)}
    counts = {name: int(number * times) for name, number in commit["counts"].items()}
    files = {str(part): size for part in range(parts)}
    return {**commit, "read": rows, "counts": counts, "files": files}


def source_of(real: ImageFiles, images: int) -> ImageFiles:
    """Return a source of as many images, which nobody reads: its files are names."""
    blocks = images // ROWS_OF_BLOCK
    source = object.__new__(ImageFiles)
    number = blocks // BLOCKS_OF_FILE
    rows = [ROWS_OF_BLOCK] * BLOCKS_OF_FILE
    source.__dict__.update(
        paths="s3://bucket/train",
        storage_options={},
        files=tuple(f"s3://bucket/train/part-{file:08}.parquet" for file in range(number)),
        files_blocks=[(10**8, rows)] * number,
        block_rows=np.full(blocks, ROWS_OF_BLOCK, np.int64),
        fingerprint=real.fingerprint,
        _ends=real._ends * number,
    )
    return source


def measured(name: str, found: dict[str, Any], began: float) -> None:
    """Note the processor seconds since, and the most memory so far, in GiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found[name] = (time.process_time() - began, most)
    print(name, found[name], flush=True)


def simulated(data: Path, work: Path, images: int) -> dict[str, Any]:
    """Go through the job; return processor seconds and memory of each step."""
    real, commit, seconds = real_window(data, work)
    found: dict[str, Any] = {"photographs": seconds / ROWS_OF_BLOCK}
    source = source_of(real.source, images)
    store = MadeUp(commit_of(commit, WINDOW_ROWS))
    began = time.process_time()
    windows = block_windows(source.block_rows, WINDOW_ROWS, Key(0, 0))
    measured("windows are cut", found, began)
    store.windows = len(windows)
    blocks = {"rows": WINDOW_ROWS, "blocks": runs_of(source.block_rows)}
    job = replace(real.job, storage=store, tolerance=Tolerance(images, 0.01, 100))
    build = FilesBuild(source, windows, job, {**real.record, "windows": blocks})
    store.windows = 0
    build.claim()
    executor = Answering(store)
    began = time.process_time()
    known = build.run(executor, progress=False)
    measured("all windows are handed out, and their commits added up", found, began)
    found |= {"windows": len(windows), "files": sum(len(one["files"]) for one in known.values())}
    found |= {"sent": executor.sent, "commit bytes": len(json.dumps(known[0]))}
    store.windows = len(windows)
    began = time.process_time()
    build.finish(known)
    measured("the folder is listed, checked and completed", found, began)
    found["manifest"] = dict(store.put_bytes)
    del known
    began = time.process_time()
    build.committed()
    measured("a driver that starts again lists and reads all commits", found, began)
    return found


def report(found: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the page of results."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in cpuinfo if "model name" in line), "?").strip()
    out = io.StringIO()
    windows, files, workers = found["windows"], found["files"], options.workers
    work = found["photographs"] * options.images / workers
    out.write(f"""# {options.images:,} images on {workers:,} workers: the driver

{datetime.date.today()}, `python benchmarks/ten_billion.py --data FOLDER --images {options.images}
--workers {workers}`: one core of {os.cpu_count()} ({cpu}), shared with others, CPython
{platform.python_version()}. Nothing ran on a cluster: workers, source and store are made up, and
the driver is real. {options.images:,} images in blocks of {ROWS_OF_BLOCK:,}: {windows:,} windows of
about {WINDOW_ROWS:,} rows, {files:,} files of rows of about 512 MB.

| step of the driver | processor seconds | most memory so far |
| --- | ---: | ---: |
""")
    for name, value in found.items():
        if isinstance(value, tuple):
            out.write(f"| {name} | {value[0]:,.0f} | {value[1]:.1f} GiB |\n")
    sidecars = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in found["manifest"].items())
    reading = windows * ANSWER / AT_ONCE
    listing = (windows + files) / LISTED * ANSWER
    out.write(f"""
The workers: a photograph takes {found["photographs"] * 1e3:.1f} ms of a core here, so
{workers:,} of them need {work / 3600:,.1f} hours: a window every {work / windows * 1e3:,.0f} ms
comes back to the driver. It is sent {found["sent"] / windows:,.0f} bytes a window; a commit has
{found["commit bytes"]:,} bytes. What it puts at the end: {sidecars}.

What it waits for, at an assumed {ANSWER * 1e3:.0f} ms an answer: {reading / 60:,.0f} minutes to
read all commits, {AT_ONCE} at once, when it starts again at the very end; {listing / 60:,.1f}
minutes to list all names once, {LISTED:,} at a time.

{bottleneck(found, options)}
""")
    return out.getvalue()


def bottleneck(found: dict[str, Any], options: argparse.Namespace) -> str:
    """Return what limits a driver: how many workers it serves, and the memory that it ends with."""
    steps = {name: value for name, value in found.items() if isinstance(value, tuple)}
    cut, dispatched, completed, _ = steps.values()
    busiest = max(steps, key=lambda name: steps[name][0])
    total = sum(round(seconds) for seconds, _ in steps.values())  # as the table says
    own = dispatched[0] / found["windows"]
    served = found["photographs"] * options.images / found["windows"] / own
    grown = (completed[1] - cut[1]) / options.images * 1e9
    return f"""Most of the {total:,.0f} processor seconds go to one step: {busiest}. Dispatch and
commits take {own * 1e3:.2f} ms a window together, so one core of a driver would serve {served:,.0f}
workers that decode as fast as this machine. The bottleneck is memory: what the driver holds until
the manifest is written grows by {grown:.2f} GiB a billion images, so it takes
{cut[1] + 10 * grown:.1f} GiB at ten billion."""


def main() -> None:
    """Run the job, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10**10)
    parser.add_argument("--workers", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = simulated(options.data, Path(folder), options.images)
    text = report(found, options)
    (ROOT / "benchmarks" / "results" / "ten_billion.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
