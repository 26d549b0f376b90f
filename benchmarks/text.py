"""Packing token sequences: packpipe, TRL and grain on the same sequences, each in its own process.

    pip install -e '.[test,benchmarks]'
    python benchmarks/text.py                              # 1 million sequences: some 15 minutes
    python benchmarks/text.py --texts FOLDER/texts.parquet  # documents, bytes as tokens, too

axolotl's multipack sampler runs where it can be imported (``pip install --no-deps axolotl``); it
gives the rows' members alone, so that it is compared with packpipe's plan.

Every arm reads one Arrow file, mapped into memory, and writes packed rows to another, after a
warm-up on 2,000 sequences. Memory is the most that is not a mapped file (RssAnon). Grain packs
a part, for it makes one sequence at a time. Writes benchmarks/results/text.md.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import json
import os
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

import packpipe
from packpipe.planning.token_config import TokenConfig
from packpipe.planning.token_plan import plan_tokens
from packpipe.rows.copy import copy_tokens
from packpipe.sources.token_source import token_column

RESULTS = Path(__file__).parent / "results"
SEQ_LEN = 4096
GRAIN_SEQUENCES = 10_000
# Name: (layout, overflow) of packpipe, or a strategy of TRL.
ARMS: dict[str, tuple[str, ...]] = {
    "packpipe, ragged rows": ("packpipe", "ragged", "truncate"),
    "packpipe, ragged rows, split": ("packpipe", "ragged", "split"),
    "packpipe, fixed rows": ("packpipe", "fixed", "split"),
    "trl, bfd": ("trl", "bfd"),
    "trl, bfd_split": ("trl", "bfd_split"),
    "trl, wrapped": ("trl", "wrapped"),
    "grain, first fit": ("grain",),
}
# What packpipe does: module and function that does it.
PHASES = {
    "lengths and plan": ("token_job.py", "plan_sequences"),
    "tokens moved, out of the mapped source": ("fill_tokens.py", "fill_tokens"),
    "rows written, with their checksum": ("files.py", "write"),
}


def main() -> None:
    """Run every arm on each source, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="of packpipe; the others run once")
    parser.add_argument("--texts", type=Path, help="a Parquet file with a column text")
    parser.add_argument("--folder", help="where files go; of memory, the disk does not count")
    parser.add_argument("--arm", help="internal: run one arm on --source")
    parser.add_argument("--source", type=Path)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.arm:
        print(json.dumps(measured(ARMS[options.arm], options.source)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = heading() + movement(options.sequences)
        source = Path(folder) / "sequences.arrow"
        written(source, drawn_lengths(options.sequences))
        name = f"{options.sequences:,} sequences, log-normal of median 400, seq_len {SEQ_LEN}"
        text += table(name, source, options.rounds)
        text += plans(drawn_lengths(options.sequences)) + phases(source)
        if options.texts:
            documents = Path(folder) / "documents.arrow"
            encoded = [
                np.frombuffer(one.encode(), np.uint8)
                for one in pq.read_table(options.texts).column("text").to_pylist()
            ]
            written(documents, np.array([len(one) for one in encoded]), encoded)
            title = f"{len(encoded):,} documents of real text, a token a byte, seq_len {SEQ_LEN}"
            text += table(title, documents, options.rounds)
            text += plans(np.array([len(one) for one in encoded]))
            text += cuts(np.array([len(one) for one in encoded]))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "text.md").write_text(text)
    print(text)


def drawn_lengths(sequences: int) -> Any:
    """Return int64[sequences], log-normal of median 400 and deviation 1, within a pack."""
    drawn = np.exp(np.log(400) + np.random.default_rng(0).standard_normal(sequences))
    return np.clip(drawn.astype(np.int64), 1, SEQ_LEN)


def written(path: Path, lens: Any, values: list[Any] | None = None) -> None:
    """Write sequences as `datasets` keeps them: an Arrow stream in batches of 1,000."""
    rng = np.random.default_rng(1)
    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(lens), 1000):
            some = lens[start : start + 1000]
            tokens = (
                rng.integers(0, 32_000, int(some.sum()), np.int32)
                if values is None
                else np.concatenate(values[start : start + 1000]).astype(np.int32)
            )
            offsets = pa.array(np.concatenate([[0], np.cumsum(some)]).astype(np.int32))
            lists = pa.ListArray.from_arrays(offsets, pa.array(tokens))
            writer.write_batch(pa.record_batch([lists], schema=schema))


def table(name: str, source: Path, rounds: int) -> str:
    """Return the table of all arms on a source."""
    records = {}
    for arm, (library, *_) in ARMS.items():
        command = [sys.executable, "-W", "ignore", __file__, "--arm", arm, "--source", str(source)]
        runs = []
        for _ in range(rounds if library == "packpipe" else 1):
            done = subprocess.run(  # noqa: S603 (this script)
                command, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                break
            runs.append(json.loads(done.stdout.strip().split("\n")[-1]))
        if runs:
            seconds = statistics.median(run["seconds"] for run in runs)
            records[arm] = {**runs[0], "seconds": seconds}
            print(arm, records[arm], flush=True)
    reference = records.get("trl, bfd", {"seconds": float("nan"), "tokens_in": 1})
    rate = reference["tokens_in"] / reference["seconds"]
    lines = [
        f"\n## {name}\n",
        "| arm | seconds | M tokens/s | of trl's bfd | fill | tokens lost | memory ÷ output |",
        "| --- " + "| ---: " * 6 + "|",
    ]
    for arm, one in records.items():
        own = one["tokens_in"] / one["seconds"]
        lines.append(
            f"| {arm} | {one['seconds']:.2f} | {own / 1e6:,.1f} | {own / rate:.1f} "
            f"| {one['fill']:.3%} | {one['tokens_in'] - one['tokens_out']:,} "
            f"| {one['memory'] / one['output']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plans(lens: Any) -> str:
    """Return how long it takes to say which sequences share a row, and how full rows are."""

    def ours() -> tuple[int, int]:
        plan = plan_tokens(lens, TokenConfig(seq_len=SEQ_LEN, overflow="drop"))
        return len(plan), int(plan.seq_lens.sum(dtype=np.int64))

    def multipack() -> tuple[int, int]:
        from axolotl.utils.samplers.multipack import MultipackBatchSampler

        fitting = lens[lens <= SEQ_LEN]
        sampler = MultipackBatchSampler(
            range(len(fitting)), 1, SEQ_LEN, fitting, SEQ_LEN, drop_last=False, num_processes=1
        )
        rows = [row for batch in sampler.generate_batches(set_stats=True) for row in batch]
        return len(rows), int(sampler.total_tokens_used)

    lines = ["\n| plan alone | seconds | fill |", "| --- | ---: | ---: |"]
    for name, run in (("packpipe", ours), ("axolotl, multipack", multipack)):
        try:
            run()
        except ImportError:
            lines.append(f"| {name} | not installed | |")
            continue
        began = time.perf_counter()
        rows, tokens = run()
        seconds = time.perf_counter() - began
        lines.append(f"| {name} | {seconds:.3f} | {tokens / (rows * SEQ_LEN):.3%} |")
    return "\n".join(lines) + "\n"


def phases(source: Path) -> str:
    """Return where packpipe's time goes, on ragged rows."""
    dataset, arm = Dataset.from_file(str(source)), ARMS["packpipe, ragged rows"]
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        run_packpipe(dataset.select(range(min(2000, len(dataset)))), arm, Path(folder) / "warm")
        profile = cProfile.Profile()
        began = time.perf_counter()
        profile.runcall(run_packpipe, dataset, arm, Path(folder) / "rows")
        whole = time.perf_counter() - began
    spent = {
        name: sum(
            figures[3]
            for (path, _, function), figures in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
            if function == called and path.endswith(module)
        )
        for name, (module, called) in PHASES.items()
    }
    each = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items())
    return f"\nOf {whole:.2f} s for ragged rows (profiled): {each}.\n"


def measured(arm: tuple[str, ...], source: Path) -> dict[str, Any]:
    """Return the figures of one arm."""
    whole = Dataset.from_file(str(source))
    warm = whole.select(range(min(2000, len(whole))))
    if arm[0] == "grain":
        whole = whole.select(range(min(GRAIN_SEQUENCES, len(whole))))
    lens = sum(
        len(chunk.values) if whole._indices is None else 0
        for chunk in whole.data.column("input_ids").chunks
    )
    tokens_in = lens or sum(map(len, whole["input_ids"]))
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        run = {"packpipe": run_packpipe, "trl": run_trl, "grain": run_grain}[arm[0]]
        run(warm, arm, Path(folder) / "warm")
        with Watch() as watch:
            began = time.perf_counter()
            rows, tokens_out, output = run(whole, arm, Path(folder) / "rows")
            seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "fill": tokens_out / (rows * SEQ_LEN),
            "output": output or tokens_out * 4,
            "memory": watch.most,
        }


def run_packpipe(dataset: Dataset, arm: tuple[str, ...], folder: Path) -> tuple[int, int, int]:
    """Pack with packpipe; return rows, tokens and bytes."""
    packed = packpipe.pack(
        dataset, SEQ_LEN, layout=arm[1], overflow=arm[2], output=folder, progress=False
    )
    counts = packpipe.manifest(packed)["counts"]
    return len(packed), counts["tokens"], size_of(folder)


def run_trl(dataset: Dataset, arm: tuple[str, ...], folder: Path) -> tuple[int, int, int]:
    """Pack with TRL; return rows, tokens and bytes."""
    from trl import pack_dataset

    folder.mkdir()
    keep = {"cache_file_name": str(folder / "rows.arrow"), "load_from_cache_file": False}
    packed = pack_dataset(dataset.with_format(None), SEQ_LEN, arm[1], map_kwargs=keep)
    column = packed.with_format("arrow").data.column("input_ids")
    tokens = sum(len(chunk.flatten()) for chunk in column.chunks)
    return len(packed), tokens, size_of(folder)


def run_grain(dataset: Dataset, arm: tuple[str, ...], folder: Path) -> tuple[int, int, int]:
    """Pack with grain; return rows, tokens and no bytes, since nothing is stored."""
    import grain

    del arm, folder
    plain = dataset.with_format("numpy")

    class Source:
        def __len__(self) -> int:
            return len(plain)

        def __getitem__(self, row: int) -> dict[str, Any]:
            return {"inputs": plain[row]["input_ids"]}

    packer = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source(Source()).to_iter_dataset(),
        length_struct={"inputs": SEQ_LEN},
        num_packing_bins=64,
    )
    rows = tokens = 0
    for row in packer:
        rows, tokens = rows + 1, tokens + int((row["inputs_segment_ids"] > 0).sum())
    return rows, tokens, 0


def movement(sequences: int) -> str:
    """Return how fast tokens are moved, against a plain copy of as many bytes."""
    lens = drawn_lengths(min(sequences, 250_000))
    values = np.random.default_rng(1).integers(0, 32_000, int(lens.sum()), np.int32)
    offsets = np.concatenate([[0], np.cumsum(lens)])
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
    column = token_column(pa.chunked_array([lists]))
    plan = plan_tokens(lens, TokenConfig(seq_len=SEQ_LEN))
    starts = column.starts[plan.index[plan.order]]
    pieces = plan.seq_lens[plan.order]
    places = np.cumsum(pieces, dtype=np.int64) - pieces
    out = np.zeros(len(values), np.int32)

    def gathered() -> None:
        copy_tokens(column.values, starts, pieces, places, out)

    def copied() -> None:
        np.copyto(out, values)

    def by_all() -> None:
        copy_tokens(column.values, starts, pieces, places, out, executor=executor)

    with ThreadPoolExecutor() as executor:
        runs = {"a": gathered, "b": copied, "c": by_all}
        rates = {name: rate_of(run, out.nbytes) for name, run in runs.items()}
    return (
        f"Moving {out.nbytes / 1e9:.2f} GB of tokens into rows runs at {rates['a'] / 1e9:.1f} "
        f"GB/s on one processor, {rates['c'] / 1e9:.1f} on all; a plain copy of the same bytes at "
        f"{rates['b'] / 1e9:.1f}: {rates['a'] / rates['b']:.2f} and "
        f"{rates['c'] / rates['b']:.2f} of it.\n"
    )


def rate_of(run: Callable[[], None], num_bytes: int) -> float:
    """Return bytes a second, the median of seven runs after a warm one."""
    times = []
    for _ in range(8):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return num_bytes / statistics.median(times[1:])


def cuts(lens: Any) -> str:
    """Return how many documents are cut, by best fit and by laying them end to end."""
    plan = plan_tokens(lens, TokenConfig(seq_len=SEQ_LEN, overflow="split"))
    ends = np.cumsum(lens)
    across = int(((ends - 1) // SEQ_LEN != (ends - lens) // SEQ_LEN).sum())
    return (
        f"\nCut documents: {plan.num_cut} of {len(lens):,} by best fit (those longer than a row), "
        f"{across:,} laid end to end, in {len(plan):,} and {-(-int(ends[-1]) // SEQ_LEN):,} rows.\n"
    )


class Watch:
    """Samples how much memory this process has that is no mapped file."""

    def __enter__(self) -> Watch:
        self.most, self._done = 0, threading.Event()
        before = anonymous()
        self._thread = threading.Thread(target=self._sample, args=(before,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self, before: int) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, anonymous() - before)


def anonymous() -> int:
    """Return the bytes of this process that are in memory and no mapped file."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def heading() -> str:
    """Return what ran where."""
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("packpipe", "trl", "datasets", "pyarrow", "grain")
    )
    return (
        f"# Packing token sequences\n\n`python benchmarks/text.py {' '.join(sys.argv[1:])}`, "
        f"{datetime.date.today()}: {os.cpu_count()} processors ({platform.machine()}), Python "
        f"{platform.python_version()}, {versions}. A rate counts the source's tokens; medians of "
        "packpipe's runs, one run of the others.\n\n"
    )


if __name__ == "__main__":
    main()
