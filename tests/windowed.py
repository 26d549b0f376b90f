"""Builds of files by windows that are watched, stopped or killed; as a script, it builds once."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import crashing
import pyarrow as pa
import pyarrow.parquet as pq
from traps import say

from packpipe.building.files_build import FilesBuild
from packpipe.building.pack_files import files_build
from packpipe.building.window_job import WindowJob, build_window
from packpipe.durable import partial_of
from packpipe.rows.rejects import Tolerance
from packpipe.sources.image_files import ImageFiles
from packpipe.storage.storage import Storage, storage_at

NUM_ROWS = 60
OPTIONS = {"seq_len": 6, "patch_size": 4}
TOLERANCE = Tolerance(NUM_ROWS, 1.0, 100)


def write(folder: Path, *, per_file: int = 25, per_block: int = 5) -> None:
    """Write images of one to four patches, some of which cannot be decoded, as Parquet files."""
    dataset = crashing.source(NUM_ROWS)
    schema = dataset.features.arrow_schema
    rows = dataset.data.table.cast(schema)
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, NUM_ROWS, per_file):
        path = folder / f"part-{first:03}.parquet"
        pq.write_table(rows.slice(first, per_file), path, row_group_size=per_block)


def write_as(ending: str, folder: Path, *, per_file: int = 25, per_block: int = 5) -> None:
    """Write the same images as Arrow files, or as tar files whose blocks are as patched."""
    dataset = crashing.source(NUM_ROWS)
    for first in range(0, NUM_ROWS, per_file):
        some = dataset.select(range(first, min(first + per_file, NUM_ROWS)))
        path = folder / f"part-{first:03}.{ending}"
        rows = some.with_format("arrow")[:].cast(dataset.features.arrow_schema)
        if ending == "arrow":
            with pa.ipc.new_stream(path, rows.schema) as writer:
                writer.write_table(rows, max_chunksize=per_block)
        else:
            members = {}
            for number, row in enumerate(rows.to_pylist()):
                members[f"{number:03}.png"] = row["image"]["bytes"]
                members[f"{number:03}.cls"] = str(row["label"]).encode()
            write_tar(path, members)


def write_tar(path: Path, members: dict[str, bytes], **options: Any) -> None:
    """Write files as a tar."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def build_of(
    source: str | Path, output: Any, *, ending: str = "parquet", **asked: Any
) -> FilesBuild:
    """A build of small files: three windows or four, several files each."""
    options = {key: OPTIONS[key] for key in ("patch_size",)}
    asked = {"num_workers": 0, "window_rows": 15, **asked}
    files = ImageFiles(f"{source}/*.{ending}")
    build = files_build(files, OPTIONS["seq_len"], options, TOLERANCE, output=output, **asked)
    small = {name.lower(): size for name, size in crashing.SMALL.items()}
    return replace(build, job=replace(build.job, **small))


def built(build: FilesBuild, executor: Any = None) -> bool:
    """Build; return whether it was complete already."""
    complete = build.claim()
    if not complete:
        build.finish(build.run(executor, progress=False))
    return complete


def watched(build: FilesBuild, step: Callable[[str], None]) -> FilesBuild:
    """The build with a storage that calls step before and after all that is asked of it."""
    return replace(build, job=replace(build.job, storage=Watched(build.job.storage, step)))


@dataclass(frozen=True)
class Watched:
    """A storage that is watched."""

    storage: Storage
    step: Callable[[str], None]

    @property
    def url(self) -> str:
        return self.storage.url

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        real = getattr(self.storage, name)

        def asked(*args: Any) -> Any:
            what = f"{name} {args[0] if args else ''}"
            self.step(f"before {what}")
            found = real(*args)
            self.step(f"after {what}")
            return found

        return self._scratch if name == "scratch" else asked

    @contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        self.step(f"before write {name}")
        with self.storage.scratch(name) as path:
            yield path

    def put_file(self, name: str, path: Path) -> None:
        self.step(f"before put {name}")
        self.storage.put_file(name, path)
        self.step(f"after put {name}")


@dataclass
class Memory:
    """A storage in memory: an object store that knows a condition, and that may fail."""

    url: str = "store://rows"
    files: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str, content: bytes) -> None:
        self.files[name] = content

    def put_if_absent(self, name: str, content: bytes) -> bytes:
        return self.files.setdefault(name, content)

    def scratch(self, name: str) -> Any:
        return storage_at("memory://unused").scratch(name)

    def put_file(self, name: str, path: Path) -> None:
        self.put(name, partial_of(path).read_bytes())

    def get(self, name: str) -> bytes | None:
        return self.files.get(name)

    def get_range(self, name: str, start: int, stop: int) -> bytes | None:
        return None if name not in self.files else self.files[name][start:stop]

    def version(self, name: str) -> str | None:
        return None if name not in self.files else str(hash(self.files[name]))

    def listed(self, folder: str = "") -> dict[str, int]:
        parts = {name: name.rpartition("/") for name in self.files}
        return {part[2]: len(self.files[n]) for n, part in parts.items() if part[0] == folder}

    def folders(self) -> set[str]:
        return {name.partition("/")[0] for name in self.files if "/" in name}

    def remove(self, name: str) -> None:
        self.files.pop(name, None)


class Killing:
    """A step that kills its process at the nth time it is called."""

    def __init__(self, nth: int) -> None:
        self.nth, self.steps = nth, count()

    def __call__(self, _: str) -> None:
        if next(self.steps) == self.nth:
            os.kill(os.getpid(), signal.SIGKILL)


def build_and_die(job: WindowJob, window: Any, nth: int) -> dict[str, Any]:
    """Build a window on a machine that dies at a step of the storage."""
    return build_window(replace(job, storage=Watched(job.storage, Killing(nth))), window)


def on_ray(asked: dict[str, Any]) -> None:
    """Build on a cluster of one machine; say what an error and a cancelled task come to."""
    import packpipe

    options = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    found: dict[str, Any] = {}
    # Ray's sockets lie in its folder, and a socket's path has 107 bytes at most.
    short = TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
    options |= {"_node_ip_address": "127.0.0.1", "_temp_dir": short.name}
    with short, packpipe.RayExecutor(**options) as executor:
        built(build_of(Path(asked["source"]), asked["output"]), executor)
        error = executor.submit(int, "three").exception()
        found["data"] = packed_by_ray_data(Path(asked["source"]))
        found["error"] = [isinstance(error, ValueError), str(error).splitlines()[-1]]
        waiting = [executor.submit(time.sleep, 3600) for _ in range(4)]
        executor.shutdown(cancel_futures=True)
        found["cancelled"] = [future.cancelled() for future in waiting]
        try:
            executor.submit(int, "3")
        except RuntimeError as error_after:
            found["after"] = str(error_after)
    say(json.dumps(found))


def packed_by_ray_data(source: Path) -> dict[str, bool]:
    """Say whether Ray Data's batches, of each format, are packed to the rows of their table."""
    import numpy as np
    import ray.data

    import packpipe

    ray.data.DataContext.get_current().enable_progress_bars = False
    packer = packpipe.Packer(**OPTIONS, on_error="drop")
    path = str(min(source.glob("*.parquet")))
    pixels = [np.full((4 + row, 8, 3), row, np.uint8) for row in range(3)]
    data = {"encoded": ray.data.read_parquet(path)}
    data["pixels"] = ray.data.from_items([{"image": one} for one in pixels], override_num_blocks=1)
    wanted = {"encoded": packer(pq.read_table(path)), "pixels": packer({"image": pixels})}
    found = {}
    for name, form in ((name, form) for name in data for form in ("pyarrow", "numpy")):
        rows = data[name].map_batches(packer, batch_format=form, batch_size=None)
        tables = ray.get(rows.to_arrow_refs())
        found[f"{name}, {form}"] = pa.concat_tables(tables).to_pydict() == wanted[name].to_pydict()
    return found


def in_s3(asked: dict[str, Any]) -> None:
    """Build from a stand-in of S3 to the same; say what was asked of it, and what it holds."""
    import s3fs
    from stand_in_s3 import stand_in_s3

    server, store = stand_in_s3(asked["source"])
    calls = []
    real = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *args: Any, **options: Any) -> Any:
        # Some callers give them in a dict of their own.
        given = {key: value for one in args if isinstance(one, dict) for key, value in one.items()}
        given |= options
        calls.append((method, given.get("Prefix", given.get("Key", "")), given))
        return await real(self, method, *args, **options)

    s3fs.S3FileSystem._call_s3 = call
    build = build_of("s3://bucket/train", "s3://bucket/rows")
    try:
        built(watched(build, Failing({40})))
    except Failed:
        names = [name.removeprefix("bucket/rows/") for name in store.find("bucket/rows")]
        say(json.dumps(names))
    built(build_of("s3://bucket/train", "s3://bucket/rows"))
    another = build_of("s3://bucket/train", "s3://bucket/rows", seed=1)
    try:
        another.claim()
    except FileExistsError as error:
        say(json.dumps(str(error)))
    say(json.dumps([[method, key] for method, key, _ in calls]))
    store.invalidate_cache()
    held = {
        name.removeprefix("bucket/rows/"): store.cat_file(name)
        for name in store.find("bucket/rows")
    }
    say(json.dumps({name: content.hex() for name, content in held.items()}))
    say(json.dumps(opened_from(calls, "s3://bucket/rows", Path(asked["cache"]))))
    say(json.dumps(images_in(store)))
    server.stop()


def images_in(store: Any) -> list[list[int]]:
    """Say how many tokens each image has in rows of paths in a store, packed in several ways."""
    from zipfile import ZipFile

    from datasets import Dataset, Features
    from datasets import Image as ImageFeature
    from PIL import Image

    import packpipe

    image, archive = BytesIO(), BytesIO()
    Image.new("RGB", (32, 16), (9, 8, 7)).save(image, "JPEG")
    with ZipFile(archive, "w") as file:
        file.writestr("in.jpg", image.getvalue())
    store.pipe_file("bucket/images/in.jpg", image.getvalue())
    store.pipe_file("bucket/images/in.zip", archive.getvalue())
    paths = ["s3://bucket/images/in.jpg", "zip://in.jpg::s3://bucket/images/in.zip"]
    rows = {"image": [{"bytes": None, "path": path} for path in paths]}
    source = Dataset.from_dict(rows, features=Features({"image": ImageFeature()}))
    small = {"seq_len": 8, "patch_size": 16}
    epochs = packpipe.EpochPacks(source, **small)
    stream = packpipe.PackedStream(source.to_iterable_dataset(), **small)
    loaded = (
        next(iter(packpipe.PackedLoader(some, 1, as_numpy=True, tail="pad")))
        for some in (epochs, stream)
    )
    packed = packpipe.pack(source, num_workers=1, progress=False, **small)
    return [packed[0]["seq_lens"], *(batch["seq_lens"][0, :2].tolist() for batch in loaded)]


def opened_from(calls: list[tuple[str, str, dict[str, Any]]], url: str, cache: Path) -> Any:
    """Say what is asked of a store to open rows as a copy and row by row, and to load epochs."""
    import packpipe
    from packpipe.building.opened import packed_at

    def asked_for(what: Callable[[], Any]) -> list[tuple[str, str, str]]:
        calls.clear()
        what()
        return [(method, key, str(more.get("Range", ""))) for method, key, more in calls]

    loaders: dict[str, Any] = {}

    def load(name: str, **options: Any) -> None:
        rows = packpipe.open_packed(url, cache=cache / name, **options)
        loaders[name] = packpipe.PackedLoader(rows, 4, as_numpy=True)

    def batches(name: str) -> None:
        loaders[name].found = [batch["patches"].tobytes() for batch in loaders[name]]

    found = {
        "looked at": asked_for(lambda: packed_at(url, cache=cache / "looked at")),
        "copied": asked_for(lambda: load("copies")),
        "epoch of the copy": asked_for(lambda: batches("copies")),
        "opened again": asked_for(lambda: load("copies")),
        "opened": asked_for(lambda: load("rows", cache_bytes=0)),
        "epoch by row": asked_for(lambda: batches("rows")),
    }
    batches("copies")
    same = loaders["copies"].found == loaders["rows"].found
    return {"asked": found, "same": same, "state": loaders["rows"].state_dict()}


class Failed(OSError):
    """What a store raises that fails."""


class Failing:
    """A step that fails at some of the times that it is called."""

    def __init__(self, failures: Collection[int]) -> None:
        self.failures, self.steps = failures, 0

    def __call__(self, _: str) -> None:
        self.steps += 1
        if self.steps - 1 in self.failures:
            raise Failed(f"at step {self.steps - 1}")


def until_killed(asked: dict[str, Any]) -> None:
    """Build as far as a step, and die."""
    step = Killing(asked["kill_at"])
    built(watched(build_of(Path(asked["source"]), asked["output"]), step))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    {"ray": on_ray, "s3": in_s3, "die": until_killed}[asked["what"]](asked)
