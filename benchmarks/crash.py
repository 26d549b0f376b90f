"""Builds that are killed at random moments, and on disks that fill: do they end in the same bytes?

    pip install -c tests/constraints.txt -e .
    python benchmarks/crash.py --data FOLDER [--builds 100] [--pixels turbo]

FOLDER holds pictures.parquet and jpegs.parquet (column image). Writes benchmarks/results/crash.md,
or crash_turbo.md of rows made with that engine.
Each build is killed with SIGKILL at a moment drawn from all of it, started again, killed again with
probability 1/2, and so on; whatever it ends in is compared, byte for byte, with a build that nobody
has killed. Then a build runs on a small tmpfs, mounted in a namespace of its own, that another file
fills up. Linux only. Rows go to the folder for temporary files, which needs 1 GB.
"""

from __future__ import annotations

import argparse
import datetime
import filecmp
import json
import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Image

import packpipe
from packpipe import PackConfig
from packpipe.building.shards import MANIFEST, read_manifest
from packpipe.rows import files as table

ROOT = Path(__file__).parent.parent
SEQ_LEN = 1024
ROW_BYTES = PackConfig(seq_len=SEQ_LEN).row_bytes
# One image of so many is cut in half: its header is sound, its pixels are not.
CUT = 100
PLANNING = "probing and planning"
PLANNING_AGAIN = "the same, in a build that goes on"
LAST = "the last files and the manifest of it all"
NOT_KILLED = "none: it was finished before its kill"
WRITING = [f"rows, shards {quarter}/4" for quarter in range(1, 5)]
STAGES = [PLANNING, PLANNING_AGAIN, *WRITING, LAST, NOT_KILLED]
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$0" && shift && exec "$@"'


def source_of(data: Path, num_images: int) -> Dataset:
    """Return pictures and, one in ten, JPEGs, as they are stored but for those that are cut."""
    images = []
    for name, number in (("pictures", num_images - num_images // 10), ("jpegs", num_images // 10)):
        files = str(data / f"{name}.parquet")
        rows = datasets.load_dataset("parquet", data_files=files, split="train")
        column = rows.select(range(number)).with_format("arrow")[:]["image"]
        images += [image["bytes"].as_py() for image in column]
    for cut in range(CUT // 2, len(images), CUT):
        images[cut] = images[cut][: len(images[cut]) // 2]
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    stored = [{"bytes": images[place], "path": None} for place in order]
    return Dataset.from_dict({"image": stored}, features=Features(image=Image()))


def build(source: str | Path, folder: str | Path, num_workers: int, pixels: str) -> None:
    """Build in shards of five rows and batches of two."""
    table.BATCH_BYTES, table.FILE_BYTES = 2 * ROW_BYTES, 5 * ROW_BYTES
    packpipe.pack(
        datasets.load_from_disk(source),
        SEQ_LEN,
        output=folder,
        num_workers=num_workers,
        pixels=pixels,
        max_bad_fraction=1.0,
        progress=False,
    )


def started(task: dict[str, Any], command: list[str] | None = None) -> subprocess.Popen[str]:
    """Return this script, in a session of its own and about to begin."""
    own = [sys.executable, "-W", "ignore", __file__, "--task", json.dumps(task)]
    process = subprocess.Popen(  # noqa: S603
        [*(command or []), *own], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    if process.stdout is None or process.stdout.readline() != "ready\n":
        raise RuntimeError(f"{task} was not begun")
    return process


def session(leader: int) -> list[int]:
    """Return the processes of a session that have not ended, its leader last."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            state, _, _, member_of, *_ = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(member_of) == leader and state not in "ZX":
                found.append(int(folder.name))
    return sorted(found, key=lambda pid: pid == leader)


def kill(processes: list[int]) -> None:
    """Kill processes, in their order."""
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def seconds_until_ended(leader: int) -> float:
    """Return how long there are processes of a session yet; infinite for over ten seconds."""
    begun = time.perf_counter()
    while session(leader):
        if time.perf_counter() - begun > 10:
            return math.inf
        time.sleep(0.002)
    return time.perf_counter() - begun


def stamp(path: Path) -> tuple[int, int] | None:
    """Return which file a path is and when it was written."""
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def committed(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Return the stamps of the files that a manifest names."""
    if not (folder / MANIFEST).is_file():
        return {}
    return {name: stamp(folder / name) for name in read_manifest(folder)["files"]}


def differences(folder: Path, wanted: Path) -> list[str]:
    """Return the names of files that only one of two folders has, or that differ in a byte."""
    names = {path.name for where in (folder, wanted) for path in where.iterdir()}
    _, differ, missing = filecmp.cmpfiles(folder, wanted, names, shallow=False)
    return sorted([*differ, *missing])


@dataclass(frozen=True)
class Reference:
    """A build that nobody has killed: its folder, its shards, its seconds by num_workers."""

    folder: Path
    num_shards: int
    seconds: dict[int, float]
    pixels: str


def undisturbed(source: Path, work: Path, pixels: str) -> Reference:
    """Return the reference, after a build with each number of workers."""
    seconds = {}
    for number, num_workers in enumerate((2, 0, 1, 2)):  # the first one warms up
        own = Path(shutil.copytree(source, work / f"source {number}"))
        folder = work / f"out {number}"
        task = {"source": str(own), "folder": str(folder), "pixels": pixels}
        process = started({**task, "num_workers": num_workers})
        begun = time.perf_counter()
        said = process.communicate()[0]
        seconds[num_workers] = time.perf_counter() - begun
        if said != "done\n" or differences(folder, work / "out 0"):
            raise RuntimeError(f"a build that nobody kills gives no or other bytes: {said}")
    num_shards = len(list(folder.glob("data-*")))
    return Reference(folder, num_shards, seconds, pixels)


@dataclass
class Outcome:
    """What became of a build, or of many.

    Attributes:
        kills: by stage, and whether of the whole session.
        chains: builds by number of kills.
        differing: files that are not those of the reference.
        problems: what `packpipe.verify` said.
        written_again: committed files that a later run wrote anew.
        left: sessions in which a process was alive ten seconds after the kill.
        longest: seconds that a decoding process outlived the one it worked for.
        litter: files beside the source that nobody removes.
    """

    kills: Counter[tuple[str, bool]] = field(default_factory=Counter)
    chains: Counter[int] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    written_again: int = 0
    left: int = 0
    longest: float = 0.0
    litter: int = 0

    def add(self, other: Outcome) -> None:
        """Add another build's."""
        self.kills += other.kills
        self.chains += other.chains
        self.differing += other.differing
        self.problems += other.problems
        self.written_again += other.written_again
        self.left += other.left
        self.longest = max(self.longest, other.longest)
        self.litter += other.litter


def stage(folder: Path, before: tuple[int, int] | None, ended: bool, num_shards: int) -> str:
    """Return what a run was at, given the stamp of the manifest before it."""
    if ended:
        return NOT_KILLED
    if stamp(folder / MANIFEST) == before:
        return PLANNING if before is None else PLANNING_AGAIN
    done = sum(name.startswith("data-") for name in committed(folder))
    return LAST if done == num_shards else WRITING[done * 4 // num_shards]


def killed(number: int, source: Path, work: Path, reference: Reference) -> Outcome:
    """Kill one build as often as it is drawn, have it finished, and say what became of it."""
    draw, outcome = np.random.default_rng(number), Outcome()
    own, folder = work / "source", work / "out"
    whole_session = bool(number % 2)
    num_workers = (2, 0, 2, 1)[number // 2 % 4]
    task = {"source": str(own), "folder": str(folder), "pixels": reference.pixels}
    num_kills = 0
    while num_kills == 0 or draw.random() < 0.5:
        if num_kills == 0:  # the first time, or finished before its kill
            for made in (folder, own):
                shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(source, own)
        before, kept = stamp(folder / MANIFEST), committed(folder)
        share = 1 - len(kept) / (reference.num_shards + 1)
        process = started({**task, "num_workers": num_workers})
        time.sleep(draw.uniform(0, reference.seconds[num_workers] * share))
        kill(session(process.pid) if whole_session else [process.pid])
        ended = process.wait() == 0
        longest = seconds_until_ended(process.pid)
        outcome.left += math.isinf(longest)
        if not ended and not whole_session and num_workers and math.isfinite(longest):
            outcome.longest = max(outcome.longest, longest)
        outcome.kills[stage(folder, before, ended, reference.num_shards), whole_session] += 1
        outcome.written_again += len(kept.items() - committed(folder).items())
        if ended and num_kills:
            break
        num_kills += not ended
        num_workers = int(draw.choice([0, 1, 2, 2]))
    kept = committed(folder)
    process = started({**task, "num_workers": num_workers})
    if process.communicate()[0] != "done\n":
        outcome.problems.append(f"build {number} does not go on")
        return outcome
    outcome.written_again += len(kept.items() - committed(folder).items())
    outcome.chains[num_kills] += 1
    outcome.differing += [
        f"build {number}: {name}" for name in differences(folder, reference.folder)
    ]
    outcome.problems += [f"build {number}: {problem}" for problem in packpipe.verify(folder)]
    outcome.litter += len(list(own.glob("packpipe-sizes-*.arrow.*")))
    return outcome


def killed_builds(num_builds: int, source: Path, work: Path, reference: Reference) -> Outcome:
    """Kill builds, two at a time."""
    total = Outcome()

    def one(number: int) -> Outcome:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            return killed(number, source, Path(folder), reference)

    with ThreadPoolExecutor(2) as threads:
        for number, outcome in enumerate(threads.map(one, range(num_builds)), 1):
            total.add(outcome)
            if number % 10 == 0:
                print(f"{number} builds, {total.kills.total()} kills", flush=True)
    return total


def report(outcome: Outcome, num_builds: int) -> list[str]:
    """Return the tables of the killed builds."""
    not_killed = sum(outcome.kills[NOT_KILLED, group] for group in (False, True))
    facts = {
        "builds": num_builds,
        "kills": outcome.kills.total() - not_killed,
        "builds killed 1, 2, 3, … times": ", ".join(
            str(outcome.chains[number]) for number in range(1, max(outcome.chains) + 1)
        ),
        "builds that ended in the reference's bytes, and no other file": num_builds
        - len({name.split(":")[0] for name in [*outcome.differing, *outcome.problems]}),
        "files that differ": len(outcome.differing),
        "problems that `packpipe.verify` names": len(outcome.problems),
        "committed files that were written again": outcome.written_again,
        "kills that a decoding process outlived by 10 s": outcome.left,
        "longest that one outlived the process it worked for, ms": f"{outcome.longest * 1000:.0f}",
        "temporary files of sizes left beside a source": outcome.litter,
    }
    lines = ["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in facts.items())]
    lines += [f"\n* {line}" for line in [*outcome.differing, *outcome.problems][:20]]
    lines += ["", "| killed at | the process alone | its whole session |", "| --- | ---: | ---: |"]
    for name in STAGES:
        lines.append(f"| {name} | {outcome.kills[name, False]} | {outcome.kills[name, True]} |")
    return [*lines, ""]


def fill_up(source: str, disk: str, reference: str, pixels: str) -> dict[str, Any]:
    """Build where there is no room, where another file takes it meanwhile, and where it is back."""
    folder, other = Path(disk, "out"), Path(disk, "other")
    num_files = len(list(Path(reference).glob("data-*")))

    def take(leave: int) -> None:
        with suppress(OSError), other.open("ab") as file:
            while (room := shutil.disk_usage(disk).free - leave) > 0:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), min(room, 2**20))

    def take_all_later() -> None:
        while len(committed(folder)) < num_files // 3:
            time.sleep(0.001)
        take(0)

    def error_of_build() -> str:
        try:
            build(source, folder, 2, pixels)
        except OSError as error:
            return str(error).replace(disk, "DISK")
        return "none"

    found: dict[str, Any] = {"disk": shutil.disk_usage(disk).total}
    take(found["disk"] // 2)
    begun = time.perf_counter()
    found["refused"], found["refused after"] = error_of_build(), time.perf_counter() - begun
    found["left by it"] = [path.name for path in Path(disk).iterdir() if path != other]
    other.unlink()
    taker = Thread(target=take_all_later)
    taker.start()
    found["filled"] = error_of_build()
    taker.join()
    kept = committed(folder)
    found["stays"] = sorted(kept)
    found["not whole"] = [
        name
        for name, record in read_manifest(folder)["files"].items()
        if table.checksum_of(folder / name) != record[table.CHECKSUM]
    ]
    found["beside it"] = sorted(path.name for path in folder.iterdir() if path.name not in kept)
    found["still full"] = error_of_build()
    other.unlink()
    found["with room"] = error_of_build()
    found["written again"] = len(kept.items() - committed(folder).items())
    found["differing"] = differences(folder, Path(reference))
    found["problems"] = list(map(str, packpipe.verify(folder)))
    return found


def full_disk(source: Path, work: Path, reference: Reference) -> str:
    """Return what is to be said of a small disk."""
    disk = work / "disk"
    disk.mkdir()
    taken = sum(path.stat().st_size for path in reference.folder.iterdir())
    task = {"source": str(source), "disk": str(disk), "reference": str(reference.folder)}
    task["pixels"] = reference.pixels
    mounted = ["unshare", "-rm", "sh", "-c", MOUNT, str(disk), str(taken * 5 // 4)]
    found = json.loads(started(task, mounted).communicate()[0])
    size, refused_after = found["disk"] / 1e6, found["refused after"]
    return (
        f"A tmpfs of {size:.0f} MB; a build takes {taken / 1e6:.0f} MB. Half of it is another "
        f"file's: `pack` refuses after {refused_after:.1f} s and leaves "
        f"{found['left by it'] or 'nothing'}.\n\n    {found['refused']}\n\n"
        "Another file takes all the room there is when a third of the shards is there:\n\n"
        f"    {found['filled']}\n\n"
        f"{len(found['stays'])} files are committed, {len(found['not whole'])} of them not whole; "
        f"beside them {', '.join(found['beside it'])}. Called again on the full disk:\n\n"
        f"    {found['still full']}\n\n"
        f"Called again with room, it ends with this error: {found['with room']}. Committed files "
        f"written again: {found['written again']}. Files that differ from the reference: "
        f"{len(found['differing'])}. Problems that `packpipe.verify` names: "
        f"{len(found['problems'])}.\n"
    )


def about(num_builds: int, num_images: int, pixels: str) -> str:
    """Return where and with what this ran."""
    cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    names = ("packpipe", "numpy", "pyarrow", "datasets", "pillow", "filelock", "xxhash")
    return (
        f"{datetime.date.today()}, `python benchmarks/crash.py --data FOLDER --builds "
        f"{num_builds} --images {num_images} --pixels {pixels}`: "
        f"{os.cpu_count()} cores ({cpu}), shared with others, Linux "
        f"{platform.release()}. CPython {platform.python_version()}, "
        f"{', '.join(f'{name} {version(name)}' for name in names)}.\n"
    )


def main() -> None:
    """Kill builds, fill disks, print and write what came of it; or do a task of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--builds", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pixels", choices=("pillow", "turbo"), default="pillow")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.task is not None:
        logging.disable(logging.WARNING)  # that there are rejects
        print("ready", flush=True)
        if "disk" in options.task:
            said = json.dumps(fill_up(**options.task))
        else:
            build(**options.task)
            said = "done"
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # it has nobody to tell: it ends, and quietly
        print(said, flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        work, source = Path(folder), Path(folder, "source")
        datasets.config.HF_DATASETS_CACHE = work / "cache"
        source_of(options.data, options.images).save_to_disk(source)
        reference = undisturbed(source, work, options.pixels)
        begun = time.perf_counter()
        outcome = killed_builds(options.builds, source, work, reference)
        took = time.perf_counter() - begun
        seconds = " / ".join(f"{taken:.1f}" for taken in reference.seconds.values())
        note = (
            f"{options.images} real images, one in {CUT} of them cut in half, "
            f"{reference.num_shards} shards; a build takes {seconds} s with 0 / 1 / 2 processes "
            "that decode, from a source whose headers were not read yet. SIGKILL, at a moment "
            "drawn from all of the build, to the process alone or to its whole session; started "
            "again, it is killed again with probability 1/2, at a moment drawn from what is left; "
            "one that is finished before its first kill begins anew. "
            f"Half of the builds begin with 2 such processes, the others with 0 or 1; a restart "
            f"draws anew. Two builds at a time, {took / 60:.1f} minutes.\n"
        )
        parts = [
            "# Killed builds and full disks\n",
            about(options.builds, options.images, options.pixels),
        ]
        parts += ["## Killed at random moments\n", note, *report(outcome, options.builds)]
        parts += ["## A disk that fills\n", full_disk(source, work, reference)]
    print("\n".join(parts))
    options.out.mkdir(parents=True, exist_ok=True)
    name = "crash.md" if options.pixels == "pillow" else f"crash_{options.pixels}.md"
    (options.out / name).write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
