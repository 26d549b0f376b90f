"""Time and fill of the packer, beside other packers, in one run.

    pip install -c tests/constraints.txt -e '.[benchmarks]'
    pip install --no-deps vit-pytorch axolotl     # their other needs clash or are heavy
    python benchmarks/packing.py [--examples 16000000] [--billion 1000000000]

Writes benchmarks/results/packing.md, and packing.png of its tables (that alone with --draw). One
process, one thread, everything warm; medians of up to five calls, of one where a call takes more
than four seconds. All packers get the same lengths, each in the form it wants, made outside the
time. Ratios say more than milliseconds: machines are shared.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peers
from numpy.typing import NDArray
from tables import table

from packpipe import OnlinePacker, count_lengths, pack_lengths, plan_histogram
from packpipe.packing.histogram import HistogramPlan

ROOT = Path(__file__).parent.parent
Lengths = NDArray[np.int32]
Curves = dict[str, list[tuple[float, float]]]


TRIED = """
* One list of runs, rewritten for every length, planned the chat-like lengths in 180 ms; blocks of
  runs that are skipped when none has room, in 13 ms; the same without merging runs of equal room,
  in 2.5 ms, and then the patterns come for free. Blocks of 32, 64 and 128 runs at seq_len 4096:
  4.9, 5.6 and 6.2 ms, all in one session.
* Counting with four histograms side by side was no faster than with one (14 against 13 ms);
  `numpy.bincount` took 72 ms.
* Writing (order, offsets) pack by pack took 45 to 106 ms, pattern by pattern in tiles of packs 28
  to 63 ms.
* Pack numbers from a state machine for each length took 67 to 137 ms, from a table of places 97
  to 137 ms; the table serves shards, too.
* Kernels that allocate their own tables took 8 s to compile in all; with tables from NumPy, 4 to
  5 s.
* Column generation without smoothed prices: 1.2 s for Wikipedia without a limit, no convergence
  in 5 s at depth 3 and 4.
"""


def seconds(work: Callable[[], object]) -> float:
    """Return the median time of up to five calls, after one that does not count."""
    times = []
    for _ in range(6):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
        if sum(times) > 4 and (times[0] > 4 or len(times) > 3):
            break
    return statistics.median(times[1:] or times)


def wikipedia_counts() -> NDArray[np.int64]:
    """Return the published histogram (Krell's packedBERT code)."""
    counts = np.zeros(513, np.int64)
    with (ROOT / "tests/data/wikipedia512.csv").open() as file:
        for row in csv.DictReader(file):
            counts[int(row["length"])] = int(row["count"])
    return counts


def lengths_by_name(examples: int, seed: int = 0) -> dict[str, tuple[Lengths, int]]:
    """Return (lengths, seq_len) of the five kinds of lengths."""
    rng = np.random.default_rng(seed)
    counts = wikipedia_counts()
    wikipedia = rng.choice(513, examples, p=counts / counts.sum())
    navit = (rng.uniform(64, 384, examples) / 16) ** 2 * rng.beta(7 / 6, 7 / 6, examples)
    chat = rng.lognormal(np.log(400), 1.0, examples)
    return {
        "Wikipedia, 512": (_lengths(wikipedia, 512), 512),
        "NaViT-like, 1024": (_lengths(navit, 1024), 1024),
        "chat-like, 4096": (_lengths(chat, 4096), 4096),
        "uniform, 1024": (rng.integers(1, 1025, examples, dtype=np.int32), 1024),
        "(L/3, L/2], 1024": (rng.integers(342, 513, examples, dtype=np.int32), 1024),
    }


def _lengths(values: NDArray[np.generic], seq_len: int) -> Lengths:
    return np.clip(values, 1, seq_len).astype(np.int32)


def pack_numbers(lengths: Lengths, seq_len: int) -> NDArray[np.integer]:
    """Return each example's pack, as a user would: count, plan, number."""
    return plan_histogram(count_lengths(lengths, seq_len), seq_len).pack_numbers(lengths)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most memory NumPy held at once during a call, its result included."""
    tracemalloc.start()
    kept = work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak


def published() -> Iterator[list[str]]:
    """Wikipedia by the published rules, and at the optimum."""
    counts = wikipedia_counts()
    for depth in (1, 2, 3, 4, 8, 12, None):
        row = [str(depth or "no limit")]
        for strategy in ("spfhp", "bfd", "balanced"):
            plan = plan_histogram(counts, 512, strategy=strategy, max_segments=depth)
            row += [f"{len(plan):,}", f"{plan.quality.fill:.3%}"]
        started = time.perf_counter()
        plan = plan_histogram(counts, 512, strategy="optimal", max_segments=depth)
        row += [f"{len(plan):,}", f"{plan.quality.bound:,}", str(plan.quality.gap)]
        yield [*row, f"{time.perf_counter() - started:.2f}"]
    started = time.perf_counter()
    plan = plan_histogram(counts, 512, strategy="nnlshp")
    took = f"NNLSHP took {time.perf_counter() - started:.0f} s"
    yield ["3, NNLSHP", f"{len(plan):,}", f"{plan.quality.fill:.3%}", *[""] * 7, took]


def speed(sizes: list[int]) -> Iterator[list[str]]:
    """Ours beside the compiled peers, on all kinds of lengths."""
    compiled = peers.compiled()
    for size in sizes:
        for name, (lengths, seq_len) in lengths_by_name(size).items():
            target = np.empty_like(lengths)
            copy = seconds(lambda a=lengths, b=target: np.copyto(b, a))
            counts = count_lengths(lengths, seq_len)
            plan = seconds(lambda c=counts, n=seq_len: plan_histogram(c, n))
            ordered = seconds(lambda a=lengths, n=seq_len: pack_lengths(a, n))
            numbered = seconds(lambda a=lengths, n=seq_len: pack_numbers(a, n))
            peaks = [
                peak_bytes(work) / size
                for work in (
                    lambda a=lengths, n=seq_len: pack_lengths(a, n),
                    lambda a=lengths, n=seq_len: pack_numbers(a, n),
                )
            ]
            packs = pack_lengths(lengths, seq_len)
            row = [f"{size:,}", name, *(f"{1000 * t:.2f}" for t in (plan, ordered, numbered))]
            row += [f"{ordered / copy:.0f}", f"{max(peaks):.1f}", f"{packs.quality.gap:,}"]
            best = np.inf
            for peer in compiled:
                if size <= peer.most:
                    given = peer.prepare(lengths, seq_len)
                    taken = seconds(lambda p=peer, g=given, n=seq_len: p.work(g, n))
                    row.append(f"{1000 * taken:,.1f}")
                    best = min(best, taken)
                else:
                    row.append("-")
            yield [*row, f"{best / ordered:.1f}", f"{best / numbered:.1f}"]


def others() -> Iterator[list[str]]:
    """The packers inside other libraries, at the sizes they reach, on NaViT-like lengths."""
    for peer in peers.others():
        for size in (10_000, 100_000, 1_000_000):
            if size > peer.most:
                continue
            lengths, seq_len = lengths_by_name(size)["NaViT-like, 1024"]
            packs = pack_lengths(lengths, seq_len)
            ours = seconds(lambda a=lengths, n=seq_len: pack_lengths(a, n))
            given = peer.prepare(lengths, seq_len)
            taken = seconds(lambda p=peer, g=given, n=seq_len: p.work(g, n))
            used = peer.count(peer.work(given, seq_len))
            padding = f"{1 - packs.quality.num_tokens / (used * seq_len):.3%}"
            row = [peer.name, f"{size:,}", f"{1000 * taken:,.0f}", f"{1000 * ours:.2f}"]
            yield [*row, f"{taken / ours:,.0f}", padding, f"{packs.quality.padding:.3%}"]


def by_seq_len() -> Iterator[list[str]]:
    """Time of the plan alone for one million lengths, against seq_len."""
    rng = np.random.default_rng(0)
    size = 1_000_000
    for seq_len in (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072):
        kinds = {
            "uniform": rng.integers(1, seq_len + 1, size),
            "log-normal, median L/10": _lengths(
                rng.lognormal(np.log(seq_len / 10), 1.0, size), seq_len
            ),
            "log-normal, median 400": _lengths(rng.lognormal(np.log(400), 1.0, size), seq_len),
        }
        row = [f"{seq_len:,}"]
        for lengths in kinds.values():
            counts = count_lengths(lengths, seq_len)
            times = [
                seconds(lambda c=counts, n=seq_len, s=s: plan_histogram(c, n, strategy=s))
                for s in ("ffd", "bfd")
            ]
            row += [f"{1000 * t:.1f}" for t in times]
        yield row


def trade_off() -> Iterator[list[str]]:
    """Fill ÷ fill at the bound, and the largest pack, for limits on segments."""
    for name, (lengths, seq_len) in lengths_by_name(1_000_000).items():
        counts = count_lengths(lengths, seq_len)
        for limit in (8, 12, 16, 32, 64, None):
            row = [name, str(limit or "no limit")]
            for strategy in ("ffd", "bfd", "spfhp", "balanced"):
                plan = plan_histogram(counts, seq_len, strategy=strategy, max_segments=limit)
                reached = plan.quality.bound / len(plan)
                row.append(f"{reached:.2%} ({plan.quality.most_segments})")
            yield row


def online() -> Iterator[list[str]]:
    """Fill of a stream against the packs kept open, and lengths a second."""
    size = 4_000_000
    for name, (lengths, seq_len) in lengths_by_name(size).items():
        row = [name]
        for open_packs in (1, 4, 16, 64, 256, 1024):
            packer = OnlinePacker(seq_len, open_packs=open_packs)
            rate = size / seconds(lambda p=packer, a=lengths: p.push(a))
            packer.flush()
            row.append(f"{packer.fill:.2%}, {rate / 1e6:.0f} M/s")
        for window in (1_000, 10_000, 100_000):
            some = lengths[:1_000_000]
            windows = [some[i : i + window] for i in range(0, len(some), window)]
            used = sum(len(pack_lengths(each, seq_len)) for each in windows)
            row.append(f"{some.sum(dtype=np.int64) / (used * seq_len):.2%}")
        yield row


FIRST_CALL = """
import time; started = time.perf_counter()
import numpy as np
lengths = np.random.default_rng(0).integers(1, 1025, 10_000)
began = time.perf_counter()
import packpipe
packpipe.pack_lengths(lengths, 1024)
print(time.perf_counter() - began)
"""


def first_calls() -> Iterator[list[str]]:
    """`import packpipe` and the first pack_lengths of a process, without and with a cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        for name in ("the first ever on a machine", *["a later process"] * 3):
            command = [sys.executable, "-c", FIRST_CALL]
            run = subprocess.run(  # noqa: S603
                command, env=environment, capture_output=True, text=True, check=True
            )
            yield [name, f"{float(run.stdout):.2f}"]


def billion(size: int, shard: int = 20_000_000) -> Iterator[list[str]]:
    """Plan and number lengths shard by shard; each is made when it is needed, never stored."""
    shards = range(0, size, shard)
    times = {"count": 0.0, "plan": 0.0, "number": 0.0}

    def make(start: int) -> Lengths:
        rng = np.random.default_rng(start)
        some = min(shard, size - start)
        sides = 4 + 20 * rng.random(some, dtype=np.float32)  # in patches
        values = sides**2 * rng.random(some, dtype=np.float32)
        return _lengths(values, 1024)

    counts = np.zeros(1025, np.int64)
    for start in shards:
        lengths = make(start)
        began = time.perf_counter()
        counts += count_lengths(lengths, 1024)
        times["count"] += time.perf_counter() - began
    began = time.perf_counter()
    plan: HistogramPlan = plan_histogram(counts, 1024)
    times["plan"] = time.perf_counter() - began
    before = np.zeros(1025, np.int64)
    loads = np.zeros(len(plan), np.int32)
    for start in shards:
        lengths = make(start)
        began = time.perf_counter()
        numbers = plan.pack_numbers(lengths, before=before)
        before += count_lengths(lengths, 1024)
        times["number"] += time.perf_counter() - began
        np.add.at(loads, numbers, lengths)
    if loads.max() > 1024 or int(loads.sum(dtype=np.int64)) != plan.quality.num_tokens:
        raise AssertionError("a pack is over its limit, or tokens are lost")
    peak = _peak_memory()
    row = [f"{size:,}", *(f"{t:.2f}" for t in times.values()), f"{len(plan):,}"]
    yield [*row, f"{plan.quality.fill:.4%}", str(plan.quality.gap), f"{peak / 2**30:.2f}"]


def _peak_memory() -> int:
    """Return the most memory this process has held, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def read_table(text: str, title: str) -> Iterator[dict[str, str]]:
    """Return the rows of a table of packing.md, by the names of its columns; "bfd" may be twice."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return (dict(zip(head, row, strict=True)) for row in rows)


def number(cell: str) -> float:
    """Return the number that a cell begins with: 99.12 of ``99.12% (8)``."""
    return float(cell.split("%")[0].replace(",", ""))


def draw(folder: Path) -> None:
    """Draw four tables of packing.md: lines differ in colour, style and marker."""
    from matplotlib.figure import Figure

    text = (folder / "packing.md").read_text()
    kinds = ("NaViT-like, 1024", "chat-like, 4096")
    times: Curves = {}
    for row in read_table(text, "Speed beside compiled packers"):
        for name in ("order", "numbers", "lightbinpack ffd", "lightbinpack obfd"):
            if row["kind"] == kinds[0] and row[name] != "-":
                ours = f"packpipe, {name}" if name in ("order", "numbers") else name
                times.setdefault(ours, []).append((number(row["lengths"]), number(row[name]) / 1e3))
    for row in read_table(text, "Speed beside packers in other libraries"):
        point = number(row["lengths"]), number(row["theirs"]) / 1e3
        times.setdefault(row["packer"], []).append(point)
    seq_lens: Curves = {}
    for row in read_table(text, "Time against seq_len"):
        for name in (found for found in row if found.endswith(", ffd")):
            point = number(row["seq_len"]), number(row[name]) / 1e3
            seq_lens.setdefault(name.removesuffix(", ffd"), []).append(point)
    limits: Curves = {}
    for row in read_table(text, "A limit on segments"):
        for strategy in ("ffd", "balanced") if row["kind"] in kinds else ():
            most = 128 if row["max_segments"] == "no limit" else number(row["max_segments"])
            name = f"{strategy}, {row['kind']}"
            limits.setdefault(name, []).append((most, number(row[strategy])))
    stream: Curves = {
        row["kind"]: [
            (number(name.split()[0]), 100 - number(row[name]))
            for name in row
            if name.endswith(" open")
        ]
        for row in read_table(text, "Streams")
    }
    figure = Figure(figsize=(13, 10), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_curves(axes[0, 0], times, "lengths", "seconds of one call, NaViT-like lengths")
    draw_curves(axes[0, 1], seq_lens, "seq_len", "seconds of a plan of 1 million lengths (ffd)")
    draw_curves(axes[1, 0], limits, "max_segments", "% of the fill at the bound")
    draw_curves(axes[1, 1], stream, "packs open", "padding of a stream, %")
    axes[0, 0].set_ylim(top=1e4)
    axes[1, 0].set(yscale="linear", xticks=(8, 12, 16, 32, 64, 128))
    axes[1, 0].set_xticklabels(["8", "12", "16", "32", "64", "no limit"], minor=False)
    axes[1, 0].minorticks_off()
    figure.savefig(folder / "packing.png", dpi=90)


def draw_curves(axes: Any, curves: Curves, across: str, title: str) -> None:
    """Draw curves that are told apart without colours, too; the legend has their order."""
    last = sorted(curves.items(), key=lambda one: -one[1][-1][1])
    for place, (name, points) in enumerate(last):
        ours = name.startswith("packpipe")
        marker, style = "osD^vPX*h"[place % 9], ("-", "--", "-.", ":")[place % 4]
        axes.plot(
            *zip(*points, strict=True),
            style,
            marker=marker,
            ms=7,
            lw=3 if ours else 1.3,
            color=f"C{place}",
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel=across)
    axes.set_title(title, fontsize=13)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, handlelength=4, ncols=2 if len(curves) > 5 else 1)


def main() -> None:
    """Run everything, print the tables, and write them and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=16_000_000)
    parser.add_argument("--billion", type=int, default=1_000_000_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--draw", action="store_true", help="packing.png anew, of packing.md")
    options = parser.parse_args()
    if options.draw:
        draw(options.out)
        return
    cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    packages = ["numpy", "numba", "scipy", "lightbinpack", "trl", "grain", "binpacking"]
    packages += ["vit-pytorch", "axolotl"]
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {version(name)}")
        except ImportError:
            versions.append(f"{name} not installed")
    about = (
        f"{datetime.datetime.now(datetime.UTC).date()}, `python benchmarks/packing.py "
        f"--examples {options.examples} --billion {options.billion}`: one process, one thread of a "
        f"machine with {os.cpu_count()} cores ({cpu}), shared with others: ratios say more than "
        f"times. CPython {platform.python_version()}, {', '.join(versions)}.\n"
    )
    parts = [
        "# Packing\n",
        about,
        "![Time, fill and padding](packing.png)\n",
    ]
    peer_names = [peer.name for peer in peers.compiled()]
    sizes = sorted({10_000, 1_000_000, options.examples})

    def add(title: str, note: str, rows: Iterator[list[str]], columns: list[str]) -> None:
        print(f"## {title}\n\n{note}\n", flush=True)
        parts.extend([f"## {title}\n", note + "\n", table(rows, columns)])

    add(
        "First call",
        "`import packpipe` and the first `pack_lengths`, numba's import included, in seconds.",
        first_calls(),
        ["process", "seconds"],
    )
    add(
        "One billion lengths, shard by shard",
        "Images of 64 to 384 pixels a side, a random share of their patches kept, seq_len 1024; "
        "shards of 20 million, made when needed and checked pack by pack; "
        "seconds of counting, planning and numbering; peak memory of the process in GiB, the "
        "check's own 0.4 included.",
        billion(options.billion),
        ["lengths", "count s", "plan s", "number s", "packs", "fill", "gap", "peak GiB"],
    )
    add(
        "The published Wikipedia table",
        "16,279,552 lengths, seq_len 512, by depth (max_segments). SPFHP and LPFHP (bfd) are the "
        "published packs at every depth; a time budget of 5 s for \"optimal\".",
        published(),
        ["depth", "SPFHP packs", "fill", "LPFHP packs", "fill", "balanced packs", "fill",
         "optimal packs", "proven bound", "gap", "optimal s"],
    )  # fmt: skip
    add(
        "Speed beside compiled packers",
        "Milliseconds. *plan*: `plan_histogram`; *order*: `pack_lengths` whole, from lengths to "
        "(order, offsets); *numbers*: count, plan, pack number of each example. *÷ copy*: order ÷ "
        "`numpy.copyto` of the lengths. *bytes*: most memory held an example beyond the input. "
        "Peers return lists of lists. *×*: the fastest peer ÷ ours.",
        speed(sizes),
        ["lengths", "kind", "plan", "order", "numbers", "÷ copy", "bytes", "gap, packs",
         *peer_names, "× order", "× numbers"],
    )  # fmt: skip
    add(
        "Speed beside packers in other libraries",
        "NaViT-like lengths, milliseconds; *×*: theirs ÷ ours (`pack_lengths` whole).",
        others(),
        ["packer", "lengths", "theirs", "ours", "×", "their padding", "our padding"],
    )
    add(
        "Time against seq_len",
        "Plan of one million lengths, milliseconds.",
        by_seq_len(),
        ["seq_len", "uniform, ffd", "bfd", "log-normal, median L/10, ffd", "bfd",
         "log-normal, median 400, ffd", "bfd"],
    )  # fmt: skip
    add(
        "A limit on segments",
        "One million lengths: fill as a share of the fill at the proven bound, and in brackets the "
        "most segments in a pack.",
        trade_off(),
        ["kind", "max_segments", "ffd", "bfd", "spfhp", "balanced"],
    )
    add(
        "Streams",
        "`OnlinePacker`, best fit, 4 million lengths, again and again: fill (flush included) and "
        "lengths a second by open packs; then ffd over windows of one million of them.",
        online(),
        ["kind", *(f"{n} open" for n in (1, 4, 16, 64, 256, 1024)), "window 1,000", "10,000",
         "100,000"],
    )  # fmt: skip
    parts.append("## What was tried\n" + TRIED)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "packing.md").write_text("\n".join(parts))
    draw(options.out)


if __name__ == "__main__":
    main()
