"""Damage real image files, and see what `probe` and `decode` make of each (a script; Linux).

    python tests/fuzz_images.py --cases 200000 --seed 0 --workers 2
    python tests/fuzz_images.py --seed 0 --case 1234
    python tests/fuzz_images.py --seed 0 --save 1234 FILE

The law: every file becomes pixels of the planned shape or a `BadImage` of a listed reason; the
same when asked again, by its bytes and by its path (fresh memory is filled with other bytes each
time, so pixels that nobody wrote differ). No other exception, no warning, no crash, no more than
10 s of processor time and no wait, no more memory than some copies of the largest image allowed,
and nothing printed while probing. Half of the cases are decoded with ``pixels="turbo"``. What
codecs print while decoding is counted: `packpipe.images.worker` silences it in its own process.

A case follows from its number and the seed, on one version of Pillow. A child process says in
shared memory which case it is at, so that its end is laid to that case; the parent then starts
another. Pillow's codecs are compiled without coverage, so there is none to be guided by.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import mmap
import multiprocessing
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fuzz_damage import Dice, corpus, damaged

from packpipe.images import jpegxl
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import decode, prepare, probe
from packpipe.images.rules import PixelRules
from packpipe.planning.image_options import FILTERS

MAX_PIXELS = 4_000_000
REASONS = (
    "empty",
    "unreadable",
    "undecodable",
    "too many pixels",
    "unsupported mode",
    "high dynamic range",
    "damaged scan",
)
SECONDS = 10.0  # of processor time that a case may take
WAIT = 600.0  # seconds that it may take by the clock: other work may hold the machine
RSS_KIB = 2**19  # a case may take: 0.5 GiB
ADDRESS_BYTES = 2 * 2**30  # beyond what it starts with, the system refuses a process memory
M_PERTURB = -6  # glibc: fill what is allocated and freed
LIBC = ctypes.CDLL(None)
WORDS = "decode printed"  # no breach
_ADDRESS = re.compile(r"\b0x[0-9a-f]{7,}\b(?! pixels)")  # not a size of no height
FORK = multiprocessing.get_context("fork")
STATE = struct.Struct("q")  # the case a child is at
TURBO = PixelRules((0, 0, 0), MAX_PIXELS, None, "bicubic", "bicubic", "srgb", pixels="turbo")
POLL = 0.05  # seconds


class Line(NamedTuple):
    """What became of a case; a problem is what it is, and its details."""

    case: int
    name: str
    done: list[str]
    size: int
    outcome: str
    problems: list[tuple[str, str]]
    seconds: float
    grown_kib: int

    @property
    def breaks_the_law(self) -> bool:
        return any(not what.startswith(WORDS) for what, _ in self.problems)


class Examiner:
    """Sends cases through probe and decode, and notes what breaks the law."""

    def __init__(self, folder: Path, log: int) -> None:
        self._path = str(folder / f"case-{os.getpid()}")
        self._log = log
        self._problems: list[tuple[str, str]] = []
        warnings.simplefilter("always")
        warnings.showwarning = self._warned

    def outcome(self, encoded: bytes, dice: Dice) -> tuple[str, list[tuple[str, str]], int]:
        """Return ("rows", or the reject's reason), its problems, and memory grown by in KiB."""
        self._problems = []
        rules = PixelRules(
            background=(10, 20, 30),
            max_pixels=MAX_PIXELS,
            reducing_gap=dice.pick((None, 1.0, 1.0, 2.0)),
            downscale_filter=dice.pick(FILTERS),
            upscale_filter=dice.pick(FILTERS),
            profiles="srgb",
            value_range=dice.pick((None, (0.0, 200.0))),
            pixels=dice.pick(("pillow", "turbo")),
        )
        target_hw = 1 + dice.below(40), 1 + dice.below(40)
        fill = dice.below(2)  # filled memory is used memory, so there its use says nothing
        LIBC.mallopt(M_PERTURB, 0x55 * fill)
        at_first = _peak_kib(reset=True)
        first = self._attempt(encoded, target_hw, rules)
        LIBC.mallopt(M_PERTURB, 0xA3 * fill)
        if by_path := dice.below(2):
            Path(self._path).write_bytes(encoded)
        second = self._attempt(self._path if by_path else encoded, target_hw, rules)
        if by_path and first[0] != "rows":
            first, second = first[:1], second[:1]  # what Pillow says depends on the kind of file
        if first != second:
            means = "by path" if by_path else "again"
            said = [one[0] if one[0] == "rows" else str(one) for one in (first, second)]
            self._problems.append((f"another outcome {means}", f"{said[0]} then {said[1]}"))
        grown = 0 if fill else _peak_kib() - at_first
        if grown > RSS_KIB:
            self._problems.append(("took memory", f"{grown // 1024} MiB"))
        return first[0], self._problems, grown

    def _attempt(
        self, data: bytes | str, target_hw: tuple[int, int], rules: PixelRules
    ) -> tuple[Any, ...]:
        stage = "probe"
        try:
            image_hw = probe(data, max_pixels=MAX_PIXELS).image_hw
            self._printed(stage)
            stage = "decode"
            pixels = decode(data, image_hw=image_hw, target_hw=target_hw, rules=rules).pixels
            if pixels.shape != (*target_hw, 3) or pixels.dtype != np.uint8:
                self._problems.append(("other pixels", f"{pixels.dtype}{list(pixels.shape)}"))
            found: tuple[Any, ...] = ("rows", pixels.tobytes())
        except BadImage as error:
            found = error.reason, error.exception
            if error.reason not in REASONS or _ADDRESS.search(error.exception):
                self._problems.append(("unlisted reject", f"{error.reason}: {error.exception}"))
        except BaseException as error:  # noqa: BLE001
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            what = f"{stage} raised {type(error).__name__}: {error}, at {where}"
            found = ("raised", what)
            self._problems.append((what, traceback.format_exc()))
        self._printed(stage)
        return found

    def _printed(self, stage: str) -> None:
        LIBC.fflush(None)
        if os.lseek(self._log, 0, os.SEEK_END):
            said = os.pread(self._log, 2000, 0).decode(errors="replace")
            self._problems.append((f"{stage} printed {said.split(':')[0].strip()}", said))
            os.ftruncate(self._log, 0)

    def _warned(self, message: object, category: type, file: str, line: int, *_: object) -> None:
        what = f"warned {category.__name__} at {Path(file).name}:{line}"
        self._problems.append((what, str(message)))


def _peak_kib(*, reset: bool = False) -> int:
    """Return the most memory this process held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0])


def child(seed: int, cases: range, state: mmap.mmap, folder: Path, worker: int) -> None:
    """Go through some cases, a line each in a file of results."""
    log = os.open(folder / f"log-{worker}", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    examiner = Examiner(folder, log)
    with (folder / f"results-{worker}").open("a", buffering=1) as results:
        for case in cases:
            name, encoded, done = damaged(seed, case)
            started = time.process_time()
            STATE.pack_into(state, 0, case)
            outcome, problems, grown = examiner.outcome(encoded, Dice(seed, case, 1))
            seconds = time.process_time() - started
            if seconds > SECONDS:
                problems.append(("took time", f"{seconds:.1f} s"))
            line = Line(case, name, done, len(encoded), outcome, problems, seconds, grown)
            results.write(json.dumps(line) + "\n")
    STATE.pack_into(state, 0, cases.stop)


def run(seed: int, cases: range, workers: int) -> list[Line]:
    """Return the line of every case, those that ended their process included."""
    corpus()  # once, for all children
    prepare(TURBO)
    # It is asked for and given back untouched, but filled here: half of the time of a run.
    jpegxl._LEAST_MEMORY = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        states = [mmap.mmap(-1, STATE.size) for _ in range(workers)]
        children: dict[int, Any] = {}
        polls: Counter[tuple[int, int]] = Counter()  # that found a worker at a case
        busy: dict[tuple[int, int], float] = {}  # its processor time when it was first found so

        def start(worker: int, first: int) -> None:
            left = range(first, cases.stop, workers)
            if left:
                STATE.pack_into(states[worker], 0, first)
                arguments = (seed, left, states[worker], folder, worker)
                children[worker] = FORK.Process(target=child, args=arguments, daemon=True)
                children[worker].start()

        for worker in range(workers):
            start(worker, cases.start + worker)
        ended = []
        while children:
            time.sleep(POLL)
            for worker, process in list(children.items()):
                (case,) = STATE.unpack_from(states[worker])
                polls[worker, case] += 1  # no clock, which goes on while the machine sleeps
                now = _processor_seconds(process.pid)
                taken = 0.0 if now is None else now - busy.setdefault((worker, case), now)
                waited = polls[worker, case] > WAIT / POLL
                hung = case < cases.stop and (taken > SECONDS or waited)
                if process.is_alive() and not hung:
                    continue
                if process.is_alive():
                    os.kill(process.pid, signal.SIGUSR1)  # write down where it is
                    time.sleep(0.5)
                    process.kill()
                process.join()
                del children[worker]
                (at_last,) = STATE.unpack_from(states[worker])
                if at_last > case:  # it came through after all
                    start(worker, at_last)
                elif process.exitcode:
                    what = "hung" if hung else f"crashed with {process.exitcode}"
                    log = (folder / f"log-{worker}").read_text(errors="replace")
                    name, encoded, done = damaged(seed, case)
                    size, seconds = len(encoded), taken
                    problems = [(f"{what} {_deepest(log)}", log)]
                    ended.append(Line(case, name, done, size, "ended", problems, seconds, 0))
                    start(worker, case + workers)
        files = [path.read_text().splitlines() for path in folder.glob("results-*")]
    return sorted([*ended, *(Line(*json.loads(line)) for lines in files for line in lines)])


def _processor_seconds(process: int) -> float | None:
    """Return the processor time that a process has taken, None where nobody can say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _deepest(log: str) -> str:
    found = re.search(r'File ".*?([^/"]+)", line (\d+) in (\w+)', log)
    return "in " + ":".join(found.groups()) if found else "somewhere"


def summary(lines: list[Line], seconds: float) -> str:
    """Return the tables of a run."""
    by_format: dict[str, Counter[str]] = defaultdict(Counter)
    breaches: dict[str, list[int]] = defaultdict(list)
    for line in lines:
        by_format[line.name.split()[0]][line.outcome] += 1
        for what in {re.sub(r"(?<![:\w])\d+", "N", what) for what, _ in line.problems}:
            breaches[what].append(line.case)
    columns = ["rows", *sorted({line.outcome for line in lines} - {"rows"})]
    said = [
        f"{len(lines)} cases in {seconds:.0f} s",
        "",
        "| format | " + " | ".join(["cases", *columns]) + " |",
    ]
    said.append("| --- |" + " ---: |" * (len(columns) + 1))
    by_format["all"] = sum(by_format.values(), Counter())
    for name, found in by_format.items():
        numbers = [found.total(), *(found[column] for column in columns)]
        said.append(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
    said += ["", f"{sum(line.breaks_the_law for line in lines)} cases break the law"]
    for what, cases in sorted(breaches.items(), key=lambda item: -len(item[1])):
        said.append(f"{len(cases)} x {what}: cases {', '.join(map(str, cases[:6]))}")
    slow = sorted(lines, key=lambda line: -line.seconds)[:5]
    said += ["", *(f"slow: case {line.case}, {line.name}: {line.seconds:.2f} s" for line in slow)]
    most = max(lines, key=lambda line: line.grown_kib)
    said.append(f"most memory: {most.grown_kib // 1024} MiB by case {most.case}, {most.name}")
    return "\n".join(said) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", type=int, help="one case, and all that is known of it")
    parser.add_argument("--save", nargs=2, metavar=("CASE", "FILE"), help="write a case's bytes")
    options = parser.parse_args()
    if options.save:
        Path(options.save[1]).write_bytes(damaged(options.seed, int(options.save[0]))[1])
        return 0
    started = time.monotonic()
    one = options.case is not None
    cases = range(options.case, options.case + 1) if one else range(options.cases)
    lines = run(options.seed, cases, 1 if one else options.workers)
    for line in lines if one else []:
        made = f"{line.name}, {', '.join(line.done)}, {line.size} bytes"
        head = f"case {line.case}: {made}: {line.outcome} in {line.seconds:.3f} s\n"
        details = (f"\n{what}\n{details}\n" for what, details in line.problems)
        sys.stdout.write(head + "".join(details))
    if not one:
        sys.stdout.write(summary(lines, time.monotonic() - started))
    return int(any(line.breaks_the_law for line in lines))


if __name__ == "__main__":
    sys.exit(main())
