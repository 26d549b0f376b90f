"""Time the packer on 16 million lengths beside a copy and a sort of the same array.

    python benchmarks/packing.py [--examples 16000000] [--repeats 5]

One process, one thread, kernels compiled before anything is timed; medians, all on the same
array. "plan" is first-fit-decreasing on the histogram; "all" is `pack_lengths` whole: checks,
histogram, plan, bound, and every example written to its place.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from packpipe import rules, samples
from packpipe.packing import block_size_of, pack_lengths
from packpipe.resolution import patch_grids


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of some calls, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def lengths_by_name(examples: int) -> dict[str, tuple[NDArray[np.int32], int]]:
    """Return (lengths, seq_len) of real, NaViT-like, chat-like and uniform lengths."""
    rng = np.random.default_rng(0)
    grids = patch_grids(samples.image_sizes("pictures"), 16, 1024, "native")
    real = grids.astype(np.int32).prod(axis=1, dtype=np.int32)
    navit = (rng.uniform(64, 384, examples) / 16) ** 2 * rng.beta(7 / 6, 7 / 6, examples)
    chat = rng.lognormal(np.log(400), 1.0, examples)
    return {
        "pictures, drawn again": (rng.choice(real, examples), 1024),
        "NaViT-like, U(64, 384), half dropped": (_lengths(navit, 1024), 1024),
        "chat-like, median 400": (_lengths(chat, 4096), 4096),
        "uniform 1..1024": (rng.integers(1, 1025, examples, dtype=np.int32), 1024),
    }


def _lengths(values: NDArray[np.float64], seq_len: int) -> NDArray[np.int32]:
    return np.clip(values, 1, seq_len).astype(np.int32)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=16_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{options.examples:,} lengths (int32), median of {options.repeats}; "
          f"{platform.machine()}, numpy {np.__version__}\n")  # fmt: skip
    columns = ["copyto ms", "sort ms", "plan ms", "all ms", "all ÷ copy", "all ÷ sort"]
    print("| lengths | " + " | ".join([*columns, "padding %", "gap, packs"]) + " |")
    print("| --- " + "| ---: " * (len(columns) + 2) + "|")
    for name, (lengths, seq_len) in lengths_by_name(options.examples).items():
        target = np.empty_like(lengths)
        counts = np.bincount(lengths, minlength=seq_len + 1).astype(np.int64)
        works: list[Callable[[], object]] = [
            lambda a=lengths, b=target: np.copyto(b, a),
            lambda a=lengths: np.sort(a),
            lambda c=counts, n=seq_len: rules.first_fit_decreasing(c, n, n, block_size_of(n)),
            lambda a=lengths, n=seq_len: pack_lengths(a, n),
        ]
        copy, sort, plan, everything = (median_seconds(work, options.repeats) for work in works)
        packs = pack_lengths(lengths, seq_len)
        milliseconds = [f"{1000 * t:.1f}" for t in (copy, sort, plan, everything)]
        ratios = [f"{everything / copy:.1f}", f"{everything / sort:.2f}"]
        quality = [f"{100 * packs.padding:.3f}", f"{packs.gap:,} of {len(packs):,}"]
        print(f"| {name} | " + " | ".join([*milliseconds, *ratios, *quality]) + " |")


if __name__ == "__main__":
    main()
