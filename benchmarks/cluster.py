"""Files packed by windows on every engine, killed at random moments, and planned by the billion.

    pip install -c tests/constraints.txt -e '.[ray]' distributed 'moto[server]' s3fs psutil
    nice python benchmarks/cluster.py --data FOLDER [--kills 10] [--seconds 100]

FOLDER holds pictures.parquet and jpegs.parquet (columns image, height, width). Writes
benchmarks/results/cluster.md. Whatever a build ends in is compared, byte for byte, with what one
process builds that nobody has killed. Linux only. Rows go to the folder for temporary files, which
needs 8 GB, 4 of them for the sizes of a billion images.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import pickle
import platform
import random
import resource
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
os.environ.update(
    OMP_NUM_THREADS="1",
    PYTHONWARNINGS="ignore",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    RAY_USAGE_STATS_ENABLED="0",
)

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Image, load_dataset

import packpipe
from packpipe import ImageFiles, PackConfig
from packpipe.philox import Key
from packpipe.planning.block_windows import block_windows, plan_window
from packpipe.planning.plan import plan_epoch
from packpipe.rows import files as table

ROOT = Path(__file__).parent.parent
NUM_IMAGES, PER_FILE, PER_BLOCK, WINDOW_ROWS = 1000, 200, 16, 125
PACKAGES = (
    "packpipe",
    "numpy",
    "pyarrow",
    "datasets",
    "pillow",
    "ray",
    "distributed",
    "moto",
    "s3fs",
)
RAY = {"num_cpus": 2, "object_store_memory": 200 * 2**20, "include_dashboard": False}
RAY |= {"_node_ip_address": "127.0.0.1", "logging_level": "ERROR"}
# Ray puts a machine's outer address in place of 127.0.0.1, where the cluster then does not listen.
HEAD, SECOND = "127.0.0.2", "127.0.0.3"
NODES_KILLED = 3
BUILDS = 3  # by each way, after one that warms it up
BILLION, BLOCK = 10**9, 1000
DRAWN = random.Random(0)  # noqa: S311


def write_source(data: Path, folder: Path) -> None:
    """Write pictures and photographs, shuffled, as files of many row groups."""
    tables = []
    for name in ("pictures.parquet", "jpegs.parquet"):
        image = pq.read_table(data / name, columns=["image"]).column(0).combine_chunks()
        fields = [image.field("bytes"), pa.nulls(len(image), pa.string())]
        tables.append(pa.table({"image": pa.StructArray.from_arrays(fields, ["bytes", "path"])}))
    rows = pa.concat_tables(tables)
    order = np.random.default_rng(1).permutation(len(rows))[:NUM_IMAGES]
    rows = rows.take(pa.array(order))
    rows = rows.append_column("label", pa.array(order % 10))
    folder.mkdir()
    for first in range(0, len(rows), PER_FILE):
        path = folder / f"part-{first:05}.parquet"
        pq.write_table(rows.slice(first, PER_FILE), path, row_group_size=PER_BLOCK)


def pack(source: str, output: str, executor: Any = None) -> Any:
    """Pack by small windows and files."""
    table.FILE_BYTES, table.BATCH_BYTES = 32 * 2**20, 16 * 2**20
    options = {"window_rows": WINDOW_ROWS, "progress": False, "executor": executor}
    return packpipe.pack(ImageFiles(f"{source}/*.parquet"), 1024, output=output, **options)


def digest_of(folder: Path) -> str:
    """Return a digest of all files of a folder, and of their names."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


@contextmanager
def processes() -> Iterator[Any]:
    """A pool of processes."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@contextmanager
def dask() -> Iterator[Any]:
    """The client of a Dask cluster of this machine."""
    from distributed import Client

    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with Client(**options, processes=True) as client:
        yield client


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Two nodes of Ray on this machine, of one processor each, and an executor that joins them."""
    with cluster() as (_, executor):
        yield executor


@contextmanager
def cluster() -> Iterator[tuple[Any, Any]]:
    """A Ray cluster whose head and second node have addresses, raylets and workers of their own."""
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        node_of(made, HEAD, include_dashboard=False)
        node_of(made, SECOND)
        joined = {"_node_ip_address": HEAD, "logging_level": "ERROR"}
        with packpipe.RayExecutor(made.address, **joined) as executor:
            yield made, executor
    finally:
        made.shutdown()


def node_of(made: Any, address: str, **options: Any) -> Any:
    """Add a node of one processor to a cluster."""
    store = RAY["object_store_memory"]
    return made.add_node(num_cpus=1, node_ip_address=address, object_store_memory=store, **options)


@contextmanager
def here() -> Iterator[Any]:
    """No executor."""
    yield None


def engines(source: str, work: Path) -> list[tuple[str, float, str]]:
    """Return (engine, seconds, digest) of each engine."""
    found = []
    made: dict[str, Callable[[], Any]] = {
        "`executor=None`": here,
        "pool of 2 processes": processes,
        "Dask, 2 workers": dask,
        "Ray, 2 CPUs": lambda: packpipe.RayExecutor(**RAY),
        "Ray, 2 nodes": two_nodes,
    }
    for number, (name, context) in enumerate(made.items()):
        output = work / f"engine-{number}"
        with context() as executor:
            began = time.perf_counter()
            pack(source, str(output), executor)
            seconds = time.perf_counter() - began
        found.append((name, seconds, digest_of(output)))
    output, began = work / "parts", time.perf_counter()
    for some in (["1/2", "2/2"], ["finish"]):
        drivers = [driver(source, output, part) for part in some]
        if any(process.wait() for process in drivers):
            raise SystemExit(f"{some} failed")
    seconds = time.perf_counter() - began
    return [*found, ("two `--part` and `--finish`", seconds, digest_of(output))]


def overhead(source: str, work: Path) -> list[tuple[str, float, float]]:
    """Return (way, seconds, the machine's processor seconds) of a build by two workers.

    Medians of builds by executors that are warm, on a machine that does nothing else: whatever a
    scheduler does in processes of its own counts.
    """
    options = {"split": "train", "cache_dir": str(work / "cache")}
    dataset = load_dataset("parquet", data_files=f"{source}/*.parquet", **options)
    dataset = dataset.cast_column("image", Image())

    def of_a_dataset(_: str, output: str, __: Any) -> None:
        packpipe.pack(dataset, 1024, output=output, num_workers=2, progress=False)

    ways: dict[str, tuple[Callable[[], Any], Callable[[str, str, Any], Any]]] = {
        "`pack(Dataset, num_workers=2)`": (here, of_a_dataset),
        "windows, pool of 2 processes": (processes, pack),
        "windows, Dask, 2 workers": (dask, pack),
        "windows, Ray, 2 CPUs": (lambda: packpipe.RayExecutor(**RAY), pack),
    }
    found = []
    for number, (name, (context, build)) in enumerate(ways.items()):
        took = []
        with context() as executor:
            for again in range(1 + BUILDS):
                began, before = time.perf_counter(), machine_seconds()
                build(source, str(work / f"overhead-{number}-{again}"), executor)
                took.append((time.perf_counter() - began, machine_seconds() - before))
        seconds, busy = zip(*took[1:], strict=True)
        found.append((name, statistics.median(seconds), statistics.median(busy)))
    return found


def machine_seconds() -> float:
    """Return the processor seconds of all processes of this machine since its start."""
    taken = psutil.cpu_times()
    return taken.user + taken.nice + taken.system + taken.irq + taken.softirq


def driver(source: str, output: Path, what: str = "all") -> subprocess.Popen[bytes]:
    """A driver in a process of its own: all windows, a part of them, or the end."""
    arguments = [sys.executable, __file__, "--drive", source, str(output), what]
    return subprocess.Popen(arguments, start_new_session=True)  # noqa: S603


def drive(source: str, output: str, what: str) -> None:
    """Be a driver."""
    from packpipe.building.pack_files import files_build
    from packpipe.rows.rejects import Tolerance

    if what == "all":
        pack(source, output)
        return
    table.FILE_BYTES, table.BATCH_BYTES = 32 * 2**20, 16 * 2**20
    files = ImageFiles(f"{source}/*.parquet")
    limits = Tolerance(len(files), 0.01, 100)
    build = files_build(files, 1024, {}, limits, output=output, window_rows=WINDOW_ROWS)
    build.claim()
    if what == "finish":
        build.finish()
    else:
        number, parts = map(int, what.split("/"))
        build.run(None, part=(number, parts), progress=False)


def left_in(folder: Path) -> tuple[int, int]:
    """Return how many commits and how many unfinished files a folder has."""
    return len(list(folder.glob("_commits/*.json"))), len(list(folder.rglob("*.partial")))


def killed_drivers(source: str, work: Path, kills: int, seconds: float) -> Counter[str]:
    """Kill drivers at random moments, continue, and count what came of it."""
    found: Counter[str] = Counter()
    while found["killed"] < kills:
        output = work / f"driver-{found.total()}"
        process = driver(source, output)
        # From when it has begun to write: before that there is nothing to lose.
        while process.poll() is None and not (output / "job.json").exists():
            time.sleep(0.01)
        time.sleep(DRAWN.uniform(0, seconds))
        ended = process.poll() is not None
        found["had ended before" if ended else "killed"] += 1
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        commits, partial = left_in(output)
        found["commits kept"] += commits
        found["unfinished files"] += partial
        pack(source, str(output))
        found[digest_of(output)] += 1
        shutil.rmtree(output)
    return found


def killed_workers(source: str, work: Path, kills: int, seconds: float) -> Counter[str]:
    """Kill a Ray worker at a random moment of each build, which goes on by itself."""
    found: Counter[str] = Counter()
    with packpipe.RayExecutor(**RAY) as executor:
        executor.submit(packpipe.PackConfig).result()
        while found["killed"] < kills:
            output = work / f"worker-{found.total()}"

            def kill(output: Path = output) -> None:
                while not list(output.glob("_commits/*.json")):
                    time.sleep(0.01)
                time.sleep(DRAWN.uniform(0, seconds))
                busy = [p for p in psutil.Process().children(recursive=True) if is_busy(p)]
                if busy:
                    chosen = DRAWN.choice(busy)
                    decoders = chosen.children(recursive=True)
                    chosen.kill()
                    found["killed"] += 1
                    _, alive = psutil.wait_procs(decoders, timeout=10)
                    found["decoders alive after 10 s"] += len(alive)

            thread = Thread(target=kill)
            thread.start()
            pack(source, str(output), executor)
            thread.join()
            found[digest_of(output)] += 1
            shutil.rmtree(output)
    return found


def killed_nodes(source: str, work: Path, kills: int, seconds: float) -> Counter[str]:
    """Kill the second node of a Ray cluster while it builds a window; the head ends the build."""
    found: Counter[str] = Counter()
    with cluster() as (made, executor):
        while found["killed"] < kills:
            output = work / f"node-{found.total()}"
            (node,) = made.worker_nodes or [node_of(made, SECOND)]
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)

            def kill(output: Path = output, raylet: psutil.Process = raylet) -> None:
                while not list(output.glob("_commits/*.json")):
                    time.sleep(0.01)
                time.sleep(DRAWN.uniform(0, seconds))
                processes = [raylet, *raylet.children(recursive=True)]
                found["killed"] += any(map(is_busy, processes))
                found["processes of nodes"] += len(processes)
                found["commits when killed"] += left_in(output)[0]
                for process in processes:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()

            thread = Thread(target=kill)
            thread.start()
            pack(source, str(output), executor)
            thread.join()
            found[digest_of(output)] += 1
            made.remove_node(node, allow_graceful=False)
            shutil.rmtree(output)
    return found


def is_busy(process: psutil.Process) -> bool:
    """Return whether this is a worker of Ray that builds a window."""
    with suppress(psutil.Error):
        return any("ray::_called" in text for text in process.cmdline())
    return False


def in_s3(source: str, work: Path) -> tuple[Counter[str], str]:
    """Pack from a stand-in of S3 to the same; return what it was asked for, and a digest."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication
    from stand_in_s3 import stand_in_s3

    requests: Counter[str] = Counter()
    real = DomainDispatcherApplication.__call__

    def logged(self: Any, environ: dict[str, Any], start: Any) -> Any:
        copied = "HTTP_X_AMZ_COPY_SOURCE" in environ
        listed = "list-type" in environ["QUERY_STRING"]
        what = "copy" if copied else "list" if listed else environ["REQUEST_METHOD"]
        place = "rows" if "rows" in environ["PATH_INFO"] + environ["QUERY_STRING"] else "source"
        requests[f"{what} of {place}"] += 1
        return real(self, environ, start)

    DomainDispatcherApplication.__call__ = logged
    server, store = stand_in_s3(source)
    requests.clear()
    with processes() as executor:
        pack("s3://bucket/train", "s3://bucket/rows", executor)
    made = Counter(requests)
    store.invalidate_cache()
    output = work / "s3"
    store.get("bucket/rows", str(output), recursive=True)
    server.stop()
    return made, digest_of(output)


def sizes_like(data: Path, number: int) -> np.ndarray[Any, Any]:
    """Return int32[number, 2], sizes drawn from those of pictures and photographs."""
    known = []
    for name in ("pictures.parquet", "jpegs.parquet"):
        found = pq.read_table(data / name, columns=["height", "width"])
        known.append(np.column_stack([np.asarray(column) for column in found.columns]))
    drawn = np.concatenate(known)
    return drawn[np.random.default_rng(2).integers(0, len(drawn), number)].astype(np.int32)


def losses(data: Path) -> list[tuple[str, int, int, int]]:
    """Return (order, rows of a window, packs of windows, packs of one plan) of sources."""
    number = 2**20
    sizes = sizes_like(data, number)
    by_area = sizes[np.argsort(sizes.prod(axis=1), kind="stable")]
    found = []
    for order, some in (("shuffled", sizes), ("sorted by area", by_area)):
        whole = len(plan_epoch(some, PackConfig(seq_len=1024, window=number)))
        for rows in (4096, 16_384, 65_536):
            windows = block_windows(np.full(number // 256, 256), rows, Key(0, 0))
            packs = 0
            for window, blocks in enumerate(windows):
                index = np.add.outer(blocks * 256, np.arange(256)).ravel()
                config = PackConfig(seq_len=1024, window=number)
                packs += len(plan_window(some[index], config, index=index, window=window))
            found.append((order, rows, packs, whole))
    return found


def billion(data: Path, work: Path, seconds: float) -> dict[str, Any]:
    """Plan windows of a billion images from a file of sizes, as far as the time goes."""
    path = work / "sizes"
    with path.open("wb") as file:
        some = sizes_like(data, 10**7).astype(np.uint16).tobytes()
        for _ in range(BILLION // 10**7):
            file.write(some)
    read = partial(np.fromfile, path, np.uint16, BLOCK * 2)  # not mapped: its pages would count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    windows = block_windows(np.full(BILLION // BLOCK, BLOCK), 16_384, Key(0, 0))
    cut = time.process_time() - began
    config, times, packs, images = PackConfig(seq_len=1024), [], 0, 0
    end = time.perf_counter() + seconds
    for window, blocks in enumerate(windows):
        began = time.process_time()
        index = np.add.outer(blocks * BLOCK, np.arange(BLOCK)).ravel()
        sizes = np.concatenate([read(offset=block * BLOCK * 4) for block in blocks.tolist()])
        image_hw = sizes.reshape(-1, 2).astype(np.int32)
        plan = plan_window(image_hw, config, index=index, window=window)
        times.append(time.process_time() - began)
        packs, images = packs + len(plan), images + len(index)
        if time.perf_counter() > end:
            break
    path.unlink()
    return {
        "windows": len(windows),
        "cut": cut,
        "planned": len(times),
        "images": images,
        "packs": packs,
        "median": statistics.median(times),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "before": before / 2**20,
    }


def billion_apart(data: Path, work: Path, seconds: float) -> dict[str, Any]:
    """The same in a process of its own, whose memory is that of planning alone."""
    arguments = [sys.executable, __file__, "--billion", str(data), str(work), str(seconds)]
    said = subprocess.run(arguments, check=True, capture_output=True).stdout  # noqa: S603
    return json.loads(said)


def dispatch(source: str, work: Path) -> tuple[float, int]:
    """Return the microseconds and bytes that handing out a window of 16 blocks takes a driver."""
    from packpipe.building.pack_files import files_build
    from packpipe.building.window_job import Window
    from packpipe.rows.rejects import Tolerance

    files = ImageFiles(f"{source}/*.parquet")
    limits = Tolerance(len(files), 0.01, 100)
    job = files_build(files, 1024, {}, limits, output=work / "none", window_rows=512).job
    began = time.process_time()
    for number in range(1000):
        sent = pickle.dumps((job, Window(number, tuple(files.block(n) for n in range(16)))))
    return (time.process_time() - began) * 1e3, len(sent)


def told(match: Counter[str], reference: str) -> str:
    """Return how many folders are the same, and whatever else was counted."""
    same = match.pop(reference, 0)
    rest = ", ".join(f"{name}: {number}" for name, number in match.items() if number)
    return f"{same} the same ({rest})" if rest else f"{same} the same"


def report(found: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Return the page of results."""
    reference = found["engines"][0][2]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in cpuinfo if "model name" in line), "?").strip()
    requests, digest = found["s3"]
    asked = ", ".join(f"{number} {what}" for what, number in sorted(requests.items()))
    b, (micro, sent) = found["billion"], found["dispatch"]
    engines = "\n".join(
        f"| {name} | {seconds:.1f} | {'same' if own == reference else 'DIFFERS'} |"
        for name, seconds, own in found["engines"]
    )
    losses = "\n".join(
        f"| {order} | {rows:,} | {packs:,} | {whole:,} | {packs / whole - 1:+.3%} |"
        for order, rows, packs, whole in found["losses"]
    )
    return f"""# Windows of blocks, on every engine

{datetime.date.today()}, `python benchmarks/cluster.py --data FOLDER --kills {arguments.kills}
--seconds {arguments.seconds:g}`: {os.cpu_count()} cores ({cpu}), shared with others, Linux
{platform.release()}. CPython {platform.python_version()}, {versions}.

{NUM_IMAGES:,} real images in row groups of {PER_BLOCK}, windows of about {WINDOW_ROWS},
`seq_len=1024`, one process that decodes beside each that packs. Folders are compared byte for
byte, with their commits. Seconds are of one build each, on a machine that was not idle, and
hold the starts of processes and their imports.

| engine | s | folder |
| --- | ---: | --- |
{engines}

Drivers killed with SIGKILL, with all that they had started, at moments drawn from their builds,
then continued: {told(found["drivers"], reference)}.

Ray workers killed with SIGKILL at such moments, one a build, which goes on by itself:
{told(found["workers"], reference)}.

Nodes of Ray killed with SIGKILL (raylet, workers and what they had started) at such moments, one a
build, of a cluster of a head and a second node, which is killed; the head ends the build:
{told(found["nodes"], reference)}.

From a stand-in of S3 (moto) to the same, by a pool of 2 processes: folder
{"same" if digest == reference else "DIFFERS"}; all requests: {asked}.

## What windows cost

1,048,576 images of the sizes of the same pictures, in blocks of 256: plans alone.

| source | rows of a window | packs | one plan of all | more |
| --- | ---: | ---: | ---: | ---: |
{losses}

## A billion images

A made-up file of sizes, in blocks of {BLOCK:,}: {b["windows"]:,} windows of about 16,384 rows,
cut in {b["cut"]:.2f} s. In {arguments.seconds:g} s one core planned {b["planned"]:,} of them:
{b["images"]:,} images, {b["packs"]:,} packs. A window takes {b["median"] * 1e3:.1f} ms of
processor time (median), so all of them {b["windows"] * b["median"] / 60:.0f} minutes of one core:
that is windows × time, and was not run. The process held {b["peak"]:.2f} GiB at most, of which
{b["before"]:.2f} GiB before the first window.

Handing out a window of 16 blocks takes a driver {micro:.0f} µs and {sent:,} bytes, beside what
the scheduler of a cluster takes.
"""


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--drive", nargs=3)
    parser.add_argument("--billion", nargs=3)
    parser.add_argument("--overhead", action="store_true", help="that part alone; prints its table")
    arguments = parser.parse_args()
    if arguments.drive:
        drive(*arguments.drive)
        return
    if arguments.billion:
        data, work, seconds = arguments.billion
        print(json.dumps(billion(Path(data), Path(work), float(seconds))))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = str(work / "source")
        write_source(arguments.data, Path(source))
        pack(source, str(work / "warm"))  # kernels are compiled, modules read
        if arguments.overhead:
            print("| way | s | processor s |", "| --- | ---: | ---: |", sep="\n")
            for name, seconds, busy in overhead(source, work):
                print(f"| {name} | {seconds:.1f} | {busy:.1f} |")
            return
        found: dict[str, Any] = {"engines": engines(source, work)}
        seconds = found["engines"][0][1]
        print(found["engines"], flush=True)
        found["drivers"] = killed_drivers(source, work, arguments.kills, seconds)
        print(found["drivers"], flush=True)
        found["workers"] = killed_workers(source, work, arguments.kills, seconds / 2)
        print(found["workers"], flush=True)
        found["nodes"] = killed_nodes(source, work, NODES_KILLED, seconds / 2)
        print(found["nodes"], flush=True)
        found["s3"] = in_s3(source, work)
        print(found["s3"], flush=True)
        found["dispatch"] = dispatch(source, work)
        found["losses"] = losses(arguments.data)
        found["billion"] = billion_apart(arguments.data, work, arguments.seconds)
    text = report(found, arguments)
    (ROOT / "benchmarks" / "results" / "cluster.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
