"""How many packed rows a loader hands out, beside what memory can be copied; where a step waits.

    pip install -e '.[torch]'
    python benchmarks/feeding.py     # no GPU; under a minute

Batches of 64 rows of 1024 tokens, as ViT-S is trained on, of images of real pictures' sizes, mapped
from a file that lies in memory. Processor time is that of the process, whatever else the machine
does; seconds are not. Rows are gathered into new memory, as batches are, and into memory that is
used again, as page-locked memory is. With ``--waits``, on an idle machine, it is measured how long
steps wait that only sleep, in loops of an epoch each and in `PackedLoader.passes`. Writes
feeding.md.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import arms
import gpu
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from packpipe import PackedLoader
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key

RESULTS = Path(__file__).parent / "results"
WANTED = 13_000  # images a second: S at .45 of an H100's matrix rate
CORES = 16  # beside such a card


def main() -> None:
    """Measure, print tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--waits", action="store_true")
    parser.add_argument("--step-ms", type=float, default=25, help="of a step that sleeps")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    images = arms.drawn_images(max(1500, options.rows * 40), 1024, (64, 256))
    most = max(map(len, images.packs))
    steps = list(arms.packed_steps(images, options.rows, 2, most))
    patches = steps[0].inputs.patches.numpy()
    per_row = len(images.lens) / len(images.packs)
    with tempfile.TemporaryDirectory() as folder:
        table = gpu.stored(steps, images.seq_len, Path(folder) / "rows.arrow")
        table = pa.concat_tables([table] * 2)  # the same rows again: they lie on the disk once
        copy = copied(patches)
        rates = {
            "gathered": gathered(table, options.rows, again=False),
            "gathered, memory used again": gathered(table, options.rows, again=True),
        }
        for n in (0, 1, 2, 4):
            name = f"loader, {n} threads" if n else "loader, filled when asked"
            rates[name] = handed_out(loader_of(table, options.rows, most, n), 12)
        waits = {
            n: waited(lambda n=n: loader_of(table, options.rows, most, n), options.step_ms / 1e3)
            for n in ((1, 2, 4) if options.waits else ())
        }
        num_batches = len(table) // options.rows
    text = heading(options, patches.nbytes, per_row) + "\n"
    text += rate_table(rates, copy, patches[0].nbytes, options.rows, per_row)
    text += "\n" + wait_table(waits, num_batches) if waits else ""
    print(text)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "feeding.md").write_text(text)


def loader_of(table: pa.Table, rows: int, most: int, num_workers: int) -> PackedLoader:
    """Return a loader of the rows for one rank."""
    return PackedLoader(
        table, rows, rank=0, world_size=1, num_workers=num_workers, max_segments=most
    )


def copied(patches: NDArray[np.uint8]) -> tuple[float, float]:
    """Return seconds and processor seconds of a plain copy into memory that is used again."""
    target = patches.copy()
    return cost_of(lambda: np.copyto(target, patches), 5)


def gathered(table: pa.Table, rows: int, *, again: bool) -> tuple[float, float]:
    """Return seconds and processor seconds of the rows of a batch, in new memory or in the same."""
    packs, memory = StoredPacks(table), {}

    def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        kind = shape, dtype.str
        if not again or kind not in memory:
            memory[kind] = np.empty(shape, dtype)
        return memory[kind]

    numbers = np.arange(rows)
    packs.rows(Key(0, 0), numbers, empty)
    return cost_of(lambda: packs.rows(Key(0, 0), numbers, empty), 5)


def handed_out(loader: PackedLoader, batches: int) -> tuple[float, float]:
    """Return seconds and processor seconds that a loader takes for a batch."""
    passes = loader.passes()
    for _ in range(len(loader)):  # the pages of the file are in memory then
        next(passes)
    found = cost_of(functools.partial(deque, islice(passes, batches), maxlen=0), 1)
    passes.close()
    return found[0] / batches, found[1] / batches


def cost_of(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the median seconds and processor seconds of a call."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter(), time.process_time()
        call()
        found.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return tuple(map(statistics.median, zip(*found, strict=True)))  # type: ignore[return-value]


def waited(make: Callable[[], PackedLoader], step: float) -> dict[str, tuple[float, float, float]]:
    """Return, of loops and of passes, ms that first batches are waited for, others, and the share.

    The first pass is left out: it begins with nothing filled either way.
    """
    found = {}
    for name in ("a loop an epoch", "`passes`"):
        loader = make()
        per_pass = len(loader)
        batches = loader.passes() if name == "`passes`" else looped(loader)
        waits = []
        for _ in range(4 * per_pass):
            began = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - began)
            time.sleep(step)
        batches.close()
        later = np.array(waits).reshape(-1, per_pass)[1:]
        share = later.sum() / (later.sum() + step * later.size)
        firsts, others = np.median(later[:, 0]), np.median(later[:, 1:])
        found[name] = (1e3 * float(firsts), 1e3 * float(others), float(share))
    return found


def looped(loader: PackedLoader) -> Iterator[Any]:
    """Yield the batches of one loop after the other."""
    while True:
        yield from loader


def rate_table(
    rates: dict[str, tuple[float, float]],
    copy: tuple[float, float],
    row_bytes: int,
    rows: int,
    per_row: float,
) -> str:
    """Return a table of rows a second, and what a training of S needs."""
    head = "rows/s | GB/s | of a copy | ms of a processor a batch | of a copy's"
    lines = [f"| | {head} |", "| --- " + "| ---: " * 5 + "|"]
    for name, (seconds, processor) in ({"a plain copy": copy} | rates).items():
        lines.append(
            f"| {name} | {rows / seconds:,.0f} | {rows * row_bytes / seconds / 1e9:.2f} "
            f"| {copy[0] / seconds:.2f} | {1e3 * processor:.1f} | {processor / copy[1]:.2f} |"
        )
    needed = WANTED / per_row
    busy = needed * max(processor for _, processor in rates.values()) / rows
    return (
        "\n".join(lines) + f"\n\n{WANTED:,} images a second are {needed:,.0f} rows, "
        f"{needed * row_bytes / 1e9:.2f} GB/s: the work of {busy:.2f} processors as these are, "
        f"by the dearest line; {busy / CORES:.1%} of {CORES}.\n"
    )


def wait_table(waits: dict[int, dict[str, tuple[float, float, float]]], batches: int) -> str:
    """Return a table of waits."""
    lines = [
        f"| passes of {batches} batches | first batch, ms | others, ms | share of the time |",
        "| --- " + "| ---: " * 3 + "|",
    ]
    for number, found in waits.items():
        for name, (first, others, share) in found.items():
            lines.append(f"| {number} threads, {name} | {first:.1f} | {others:.1f} | {share:.1%} |")
    return "\n".join(lines) + "\n"


def heading(options: argparse.Namespace, num_bytes: int, per_row: float) -> str:
    """Return what ran where."""
    return (
        f"# Feeding a training of ViT-S\n\n`python benchmarks/feeding.py`, "
        f"{datetime.date.today()}: {os.cpu_count()} cores ({platform.machine()}), load "
        f"{os.getloadavg()[0]:.0f}, torch {torch.__version__}. Batches of {options.rows} rows, "
        f"{num_bytes / 1e6:.0f} MB, {per_row:.1f} images a row. Medians; read processor time where "
        "the load is high.\n"
    )


if __name__ == "__main__":
    main()
