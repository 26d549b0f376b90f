"""Plans, loaders and header probes: what an epoch costs, side by side with the obvious ways.

    pip install -c tests/constraints.txt -e '.[torch]'
    python benchmarks/epochs.py --data FOLDER

FOLDER holds pictures.parquet and jpegs.parquet (columns image, label); whatever else has an image
column will do. Writes benchmarks/results/epochs.md. One process, everything warm and in the page
cache, medians of five; the things compared take turns, since machines are shared.

With --stores it packs jpegs.parquet as pixels and as encoded images instead, reads both, and writes
benchmarks/results/stores.md: one run, in processor seconds.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import os
import platform
import pstats
import statistics
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import torch
from tables import table

import packpipe
from packpipe import Beta, PackConfig, PackedLoader, Side, Uniform, plan_epoch, samples
from packpipe.images.decode import decode
from packpipe.images.patches import patchify
from packpipe.images.rules import pixel_rules
from packpipe.rows.fill_images import planned_images
from packpipe.sources.image_source import ImageSource
from packpipe.sources.survey import probe_sizes

ROOT = Path(__file__).parent.parent
ROUNDINGS = ("nearest", "floor", "ceil")
BATCH = 8
PROFILED = 250_000


def seconds(*works: Callable[[], object], rounds: int = 5) -> list[float]:
    """Return the median time of each, all taking turns, after a round that does not count."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, taken in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken[1:]) for taken in times]


def shapes(num_images: int) -> np.ndarray:
    """Return int32[num_images, 2]: sizes of real pictures, drawn with replacement."""
    sizes = samples.image_sizes("pictures")
    return sizes[np.random.default_rng(0).integers(0, len(sizes), num_images)]


def navit(seq_len: int = 256, patch_size: int = 16, **changes: object) -> PackConfig:
    """Return NaViT's setting: r ~ U(64, 256), half of the tokens dropped."""
    options = {
        "resolution": Side(Uniform(64, 256)),
        "drop_rate": Beta(mean=0.5, maximum=0.7),
        **changes,
    }
    return PackConfig(seq_len=seq_len, patch_size=patch_size, **options)


def published() -> Iterator[list[str]]:
    """Images per sequence and padding in NaViT's setting."""
    image_hw = shapes(200_000)
    for seq_len, patch_size, paper in ((256, 16, "4.87"), (64, 32, "5.41"), (1024, 16, "")):
        for rounding in ROUNDINGS:
            for drop_rate in (Beta(mean=0.5, maximum=0.7), 0.5):
                law = Side(Uniform(64, 256), rounding)
                options = {"resolution": law, "drop_rate": drop_rate}
                ways = ({}, {"strategy": "bfd", "max_segments": seq_len}, {"fit_last": "drop_rate"})
                plans = [
                    plan_epoch(image_hw, navit(seq_len, patch_size, **options, **way))
                    for way in ways
                ]
                drop = "beta" if isinstance(drop_rate, Beta) else "constant"
                yield [
                    f"L={seq_len}, patch {patch_size}, {rounding}, {drop}",
                    paper,
                    *(f"{plan.quality.packing_factor:.2f}" for plan in plans[:2]),
                    *(f"{plan.quality.padding:.3%}" for plan in plans),
                ]


CONFIGS = {
    "native size": PackConfig(),
    "NaViT: r ~ U(64, 256), beta drop": navit(1024),
    "the same, fit last": navit(1024, fit_last="drop_rate"),
}


def plans(sizes: list[int]) -> Iterator[list[str]]:
    """Time and memory of a plan."""
    for num_images in sizes:
        image_hw = shapes(num_images)
        for name, config in CONFIGS.items():
            rounds = 5 if num_images <= 2_000_000 else 3

            def work(image_hw: np.ndarray = image_hw, config: PackConfig = config) -> object:
                return plan_epoch(image_hw, config)

            (taken,) = seconds(work, rounds=rounds)
            tracemalloc.start()
            plan = work()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            yield [
                f"{num_images:,}, {name}",
                f"{taken:.2f}",
                f"{taken / num_images * 1e9:.0f}",
                f"{peak / num_images:.0f}",
                f"{plan.quality.padding:.3%}",
            ]
            del plan


def profile(num_images: int) -> str:
    """Return where the time of a plan goes, by function."""
    config = CONFIGS["NaViT: r ~ U(64, 256), beta drop"]
    image_hw = shapes(num_images)
    plan_epoch(image_hw, config)
    profiler = cProfile.Profile()
    profiler.runcall(plan_epoch, image_hw, config)
    stats = pstats.Stats(profiler)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:10]
    lines = ["| function | calls | ms |", "| --- | ---: | ---: |"]
    for (file, _, name), (_, calls, own, _, _) in rows:
        where = f"{Path(file).stem}.{name}" if file != "~" else name.strip("<>")
        lines.append(f"| `{where}` | {calls} | {own * 1000:.0f} |")
    return "\n".join(lines) + "\n"


def table_to_batch(packed: datasets.Dataset) -> Iterator[list[str]]:
    """Bytes of patches a second from a table in the page cache to batches."""
    steps = len(packed) // BATCH
    num_bytes = steps * BATCH * packed.features["patches"].length
    rows = packpipe.read_rows(packed, range(BATCH))
    everything = packpipe.read_rows(packed).patches[: steps * BATCH]
    batch, whole = np.empty_like(rows.patches), np.empty_like(everything)

    def copyto() -> None:
        for step in range(steps):
            some = slice(step * BATCH, (step + 1) * BATCH)
            np.copyto(whole[some], everything[some])

    def copyto_again() -> None:
        for step in range(steps):
            np.copyto(batch, everything[step * BATCH : (step + 1) * BATCH])

    def loader(**options: object) -> Callable[[], None]:
        made = PackedLoader(packed, BATCH, **options)

        def load() -> None:
            made.set_epoch(0)
            if {found.patches.dtype for found in made} != {torch.uint8}:
                raise TypeError("a batch was widened")

        return load

    # Its default collation takes tensors of one shape only: the segment columns stay behind.
    formatted = packed.select_columns(["patches", "segment_ids", "coords"]).with_format("torch")

    def with_format() -> None:
        for step in range(few):
            formatted[step * BATCH : (step + 1) * BATCH]

    def with_dataloader() -> None:
        for number, _ in enumerate(torch.utils.data.DataLoader(formatted, batch_size=BATCH), 1):
            if number == few:
                break

    few = max(1, steps // 20)
    fast = {
        "`numpy.copyto`": copyto,
        "the same, into one batch again and again": copyto_again,
        "`PackedLoader`, in place": loader(),
        "`PackedLoader`, rows as they lie": loader(shuffle=False),
        "`PackedLoader`, 1 thread": loader(num_workers=1),
        "`PackedLoader`, 2 threads": loader(num_workers=2),
        "`PackedLoader`, 2 processes": loader(num_workers=2, workers="processes"),
    }
    slow = {
        "`with_format('torch')`, slices": with_format,
        "`with_format('torch')`, `DataLoader`": with_dataloader,
    }
    times = dict(zip(fast, seconds(*fast.values()), strict=True))
    times |= {
        name: taken * steps / few
        for name, taken in zip(slow, seconds(*slow.values(), rounds=3), strict=True)
    }
    copied, padded = times["`numpy.copyto`"], times[list(slow)[-1]]
    for name, taken in times.items():
        rate = f"{num_bytes / taken / 1e9:.2f}"
        yield [name, rate, f"{copied / taken:.3f}", f"{padded / taken:.0f}"]


def live(name: str, dataset: datasets.Dataset) -> Iterator[list[str]]:
    """Images a second from encoded images to batches, beside the pixel code alone."""
    for law, config in {
        "native size": {},
        "r ~ U(64, 256), beta drop": navit(1024).__dict__,
    }.items():
        options = {key: config[key] for key in ("resolution", "drop_rate") if key in config}
        packs = packpipe.EpochPacks(dataset, 1024, **options)
        plan = packs.plan(0, 0)
        planned = planned_images(plan, np.arange(len(plan)), None)
        read = ImageSource(dataset.select_columns(["image"]).with_format("arrow"))
        encoded = [bytes(read(i)) for i in planned.example_index.tolist()]
        out = np.empty((2 * 32767, packs.config.patch_bytes), np.uint8)

        def one(at: int, segments=planned, encoded=encoded, out=out, packs=packs) -> None:  # type: ignore[no-untyped-def]
            rows, columns = segments.grid_hw[at].tolist()
            height, width = segments.image_hw[at].tolist()
            pixels = decode(
                encoded[at],
                image_hw=(height, width),
                target_hw=(rows * 16, columns * 16),
                rules=pixel_rules(packs.config),
            ).pixels
            patchify(pixels, out[: rows * columns])

        def bare(encoded=encoded, one=one) -> None:  # type: ignore[no-untyped-def]
            for at in range(len(encoded)):
                one(at)

        def bare_twice(encoded=encoded, one=one) -> None:  # type: ignore[no-untyped-def]
            with ThreadPoolExecutor(2) as executor:
                list(executor.map(one, range(len(encoded)), chunksize=32))

        def loader(packs=packs, **options: object) -> Callable[[], None]:  # type: ignore[no-untyped-def]
            made = PackedLoader(packs, 4, tail="pad", **options)

            def load() -> None:
                made.set_epoch(0)
                for _ in made:
                    pass

            return load

        works = {
            "decode and patchify alone": bare,
            "the same, 2 threads": bare_twice,
            "`PackedLoader`, in place": loader(),
            "`PackedLoader`, 1 thread": loader(num_workers=1),
            "`PackedLoader`, 2 threads": loader(num_workers=2),
            "`PackedLoader`, 2 processes": loader(num_workers=2, workers="processes"),
        }
        times = dict(zip(works, seconds(*works.values(), rounds=3), strict=True))
        alone = times["decode and patchify alone"]
        for way, taken in times.items():
            yield [
                f"{name}, {law}: {way}",
                f"{len(encoded) / taken:,.0f}",
                f"{alone / taken:.2f}",
            ]


def probing(name: str, dataset: datasets.Dataset) -> Iterator[list[str]]:
    """Headers a second, and what the kept sizes save."""
    read = ImageSource(dataset.select_columns(["image"]).with_format("arrow"))

    def probe(threads: int) -> Callable[[], None]:
        def work() -> None:
            with ThreadPoolExecutor(threads) as executor:
                probe_sizes(read, len(dataset), max_pixels=10**8, executor=executor)

        return work

    def kept() -> None:
        packpipe.EpochPacks(dataset, 1024)

    packpipe.EpochPacks(dataset, 1024)
    for way, taken in zip(
        ("1 thread", "2 threads", "4 threads", "kept sizes"),
        seconds(probe(1), probe(2), probe(4), kept),
        strict=True,
    ):
        yield [f"{name}, {way}", f"{len(dataset) / taken:,.0f}", f"{taken * 1000:.1f}"]


def stores(dataset: datasets.Dataset) -> Iterator[list[str]]:
    """Rows of pixels and of encoded images: bytes, and images a second of processor time.

    Raises:
        ValueError: their batches are not the same.
    """
    source = sum(
        map(len, (row["bytes"] for row in dataset.with_format("arrow")[:]["image"].to_pylist()))
    )
    yield ["the source's images", f"{source / 1e6:,.1f}", "1.00", "", "", ""]
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        packpipe.pack(dataset.select(range(20)), output=Path(folder) / "warm", num_workers=0)
        for store in ("pixels", "encoded"):
            where, started = Path(folder) / store, time.process_time()
            # In this process, whose time is counted.
            packpipe.pack(dataset, 1024, output=where, store=store, num_workers=0, progress=False)
            built = time.process_time() - started
            size = sum(path.stat().st_size for path in where.glob("data-*.arrow"))
            started, digest = time.process_time(), 0
            loader = PackedLoader(datasets.load_from_disk(str(where)), BATCH, as_numpy=True)
            found = []
            for batch in loader:
                found.append(batch)
            loaded = time.process_time() - started
            for batch in found:
                for name in sorted(batch):
                    digest = zlib.crc32(np.ascontiguousarray(batch[name]), digest)
            digests.add(digest)
            images = sum(int((batch["seq_lens"] > 0).sum()) for batch in found)
            yield [
                f"`store={store!r}`",
                f"{size / 1e6:,.1f}",
                f"{size / source:.2f}",
                f"{len(dataset) / built:,.0f}",
                f"{images / loaded:,.0f}",
                f"{len(found)} batches, {images} images",
            ]
    if len(digests) > 1:
        raise ValueError("the batches of the two are not the same")


def write_stores(data: Path) -> None:
    """Print and write the table of stores."""
    with tempfile.TemporaryDirectory() as folder:
        files = str(data / "jpegs.parquet")
        dataset = datasets.load_dataset(
            "parquet", data_files=files, split="train", cache_dir=folder
        )
        found = table(
            stores(dataset),
            [
                "rows of 1,024 tokens",
                "MB",
                "times the source",
                "built, images/s",
                "read, images/s",
                "read",
            ],
        )
    text = (
        f"# Rows of pixels and of encoded images\n\n{datetime.date.today()}, {platform.machine()}, "
        f"CPython {platform.python_version()}, pillow {version('pillow')}, libjpeg-turbo as pillow "
        f"has it. Written by `python benchmarks/epochs.py --data FOLDER --stores`: {len(dataset)} "
        "photographs at their own size, one run on a machine that others use, so images a second "
        "of processor time, of one process. The batches of both are the same, byte for byte.\n\n"
    )
    (ROOT / "benchmarks/results/stores.md").write_text(text + found, encoding="utf-8")


def main() -> None:
    """Print and write every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 16_000_000])
    parser.add_argument("--rows", type=int, default=300, help="rows of the packed table")
    parser.add_argument("--stores", action="store_true", help="rows of encoded images alone")
    options = parser.parse_args()
    if options.stores:
        write_stores(options.data)
        return
    torch.set_num_threads(os.cpu_count() or 1)
    datasets.disable_progress_bars()
    machine = (
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, CPython {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}, numba {version('numba')}, datasets {datasets.__version__}, "
        f"pyarrow {version('pyarrow')}, pillow {version('pillow')}. "
        "Written by `python benchmarks/epochs.py`; the machine is shared, so read the ratios.\n"
    )
    parts = ["# What an epoch costs\n", machine]

    def add(title: str, text: str, note: str = "") -> None:
        parts.extend([f"## {title}\n", *([note + "\n"] if note else []), text])

    add(
        "NaViT's setting: images a sequence",
        table(
            published(),
            [
                "rounding of axes, drop rate",
                "paper",
                "images a pack",
                "best fit",
                "padding",
                "best fit, no segment limit",
                "fit last",
            ],
        ),
        "r ~ U(64, 256), mean drop 0.5, shapes of 200,000 pictures. The paper is NaViT, Table 2, "
        "where the rounding is not stated.",
    )
    add(
        "Plans",
        table(
            plans(options.sizes), ["images", "s", "ns an image", "peak bytes an image", "padding"]
        ),
    )
    add(
        "Profile of a plan",
        profile(PROFILED),
        f"{PROFILED:,} images, r ~ U(64, 256), beta drop: few enough to be planned on one thread.",
    )
    print(parts[-1])
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        sets = {
            name: datasets.load_dataset(
                "parquet",
                data_files=str(options.data / f"{name}.parquet"),
                split="train",
                cache_dir=folder,
            )
            for name in ("pictures", "jpegs")
        }
        packed = packpipe.pack(sets["pictures"], 1024, output=Path(folder) / "packed")
        packed = packed.select(range(min(options.rows, len(packed))))
        add(
            "From a packed table to batches",
            table(
                table_to_batch(packed),
                ["way", "GB/s of patches", "of `numpy.copyto`", "times the `DataLoader`"],
            ),
            f"{len(packed)} rows of 1024 tokens, batches of {BATCH}, all their columns. A batch is "
            "new memory, as `numpy.copyto` into the memory of all batches is; that of one batch, "
            "written again and again, stays in the processor's cache.",
        )
        some = {"pictures": sets["pictures"].select(range(1500)), "jpegs": sets["jpegs"]}
        add(
            "From encoded images to batches",
            table(
                (row for name, some_of in some.items() for row in live(name, some_of)),
                ["way", "images/s", "of the pixel code alone"],
            ),
        )
        add(
            "Sizes",
            table(
                (row for name, all_of in sets.items() for row in probing(name, all_of)),
                ["way", "images/s", "ms"],
            ),
        )
    (ROOT / "benchmarks/results/epochs.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
