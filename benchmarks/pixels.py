"""Pixels: from encoded images to packed rows on disk, side by side with the obvious ways.

    pip install -c tests/constraints.txt -e '.[benchmarks]'
    pip install --no-deps vit-pytorch
    python benchmarks/pixels.py --data FOLDER [--only build,curve] [--quick --out ELSEWHERE]

FOLDER holds jpegs.parquet and pictures.parquet (columns image, label; upright images). Writes
pixels.md and pixels.png to benchmarks/results; with --only, just those parts of them. Rows go to
the folder for temporary files, which needs room for --big-gb and some GB more.

Everything is warm and in the page cache; medians; the things compared take turns, since machines
are shared. packpipe's options are its defaults, reducing_gap=1.0 among them, and bare Pillow makes
the same pixels, bit for bit, and throws them away. A dataset is repeated until a build on one
worker takes some seconds, so that starting processes does not count for much; image sizes are kept
by packpipe after its first look at them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.metadata import distributions, version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pixel_peers
import pyarrow as pa
from datasets import Dataset
from PIL import Image, features
from pixel_peers import PATCH, PATCH_BYTES, SEQ_LEN, Job, Way, resized
from tables import table

import packpipe
from packpipe.images.decode import decode, probe
from packpipe.images.fill import ImageTask, fill_row
from packpipe.images.rules import PixelRules, pixel_rules

ROOT = Path(__file__).parent.parent
PARTS = (
    *("engines", "workers", "live", "decoders", "shares", "apart", "floor", "build", "moved"),
    *("curve", "memory", "compression"),
)
TARGETS = {"cap 128²": 64, "cap 224²": 196, "native": None}
CURVE = {64: 16, 96: 36, 128: 64, 224: 196, 320: 400, 416: 676, 512: None}
ONE_WORKER = "`packpipe.pack`, 1 worker"
CURVE_WAYS = (
    *("bare Pillow", ONE_WORKER, "`packpipe.pack`, 2 workers", "timm NaFlex", "`datasets.map`"),
)
ROWS_A_READ = 8
# What the loops do not look at.
BARE = {"profiles": "ignore", "damaged_scans": "keep", "jpeg_edges": "padded"}
Row = list[str]


class Made(NamedTuple):
    """What a way made: tokens, and rows and bytes if it wrote any."""

    tokens: int
    rows: int
    num_bytes: int


def take_turns(
    ways: dict[str, Way], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, float], dict[str, Made]]:
    """Return the median time of each, all taking turns, and what each made in a round before."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    made = {}
    for turn in range(rounds + 1):
        for name, work in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                started = clock()
                result = work(Path(folder))
                taken = clock() - started
                if turn:
                    times[name].append(taken)
                else:
                    made[name] = _made(result, Path(folder))
                del result
    return {name: statistics.median(taken) for name, taken in times.items()}, made


def _made(result: Any, folder: Path) -> Made:
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not isinstance(result, Dataset):
        return Made(int(result or 0), 0, num_bytes)
    tokens = sum(
        np.count_nonzero(chunk.flatten()) for chunk in result.data.column("segment_ids").chunks
    )
    return Made(int(tokens), len(result), num_bytes)


def measured(
    job: Job, rounds: int, names: tuple[str, ...] = ()
) -> tuple[dict[str, float], dict[str, Made]]:
    """Return the time of every way or of those named, and what each made: the planned tokens."""
    with ExitStack() as stack:
        times, made = take_turns(pixel_peers.ways(job, stack, names), rounds)
    planned_tokens = sum(rows * columns for rows, columns in job.grid_hw)
    for way, (tokens, _, _) in made.items():
        # timm sizes images by itself, a little larger.
        if not planned_tokens <= tokens <= planned_tokens * (1.1 if "timm" in way else 1):
            raise AssertionError(f"{way}: {planned_tokens} tokens planned, {tokens} made")
    return times, made


def planned(dataset: Dataset, max_tokens: int | None) -> Job:
    """Return the images of a dataset, and the sizes that packpipe plans for them."""
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    plan = packpipe.EpochPacks(dataset, SEQ_LEN, **limit).plan(0, 0)
    if len(plan.grid_hw) != len(dataset):
        raise ValueError("an image is broken")
    column = dataset.select_columns(["image"]).with_format("arrow")[:].column(0)
    encoded = [image["bytes"] for image in column.to_pylist()]
    return Job(
        dataset, encoded, [(rows, columns) for rows, columns in plan.grid_hw.tolist()], max_tokens
    )


def repeated(dataset: Dataset, max_tokens: int | None, least_s: float) -> Job:
    """Return the images of a dataset, so often that a build on one worker takes least_s."""
    repeats = 1
    while True:
        job = planned(datasets.concatenate_datasets([dataset] * repeats), max_tokens)
        taken = measured(job, 1, (ONE_WORKER,))[0][ONE_WORKER]
        if taken >= least_s:
            # One copy of every image, whatever the number of repeats.
            return job._replace(encoded=job.encoded[: len(dataset)] * repeats)
        repeats = max(repeats + 1, math.ceil(1.1 * repeats * least_s / taken))


def floor(sets: dict[str, Dataset], rounds: int) -> Iterator[Row]:
    """Images a second of bare Pillow, step by step."""
    steps = {
        "open": lambda encoded, _: Image.open(BytesIO(encoded)),
        "decode in full": lambda encoded, _: Image.open(BytesIO(encoded)).load(),
        "and resize": partial(resized, reducing_gap=None),
        "draft and decode": _drafted,
    }
    for name, dataset in sets.items():
        for target, max_tokens in TARGETS.items():
            job = planned(dataset, max_tokens)
            with ExitStack() as stack:
                ways: dict[str, Way] = {step: partial(_each, job, w) for step, w in steps.items()}
                ways |= pixel_peers.ways(job, stack, ("bare Pillow", "bare Pillow, 2 processes"))
                times, _ = take_turns(ways, rounds)
            rates = [len(job.encoded) / taken for taken in times.values()]
            row = [f"{name}, {target}", *(f"{rate:,.0f}" for rate in rates)]
            yield [*row, f"{rates[-1] / rates[-2]:.2f}"]


def _each(job: Job, work: Callable[[bytes, tuple[int, int]], object], _: Path) -> None:
    for encoded, (rows, columns) in zip(job.encoded, job.grid_hw, strict=True):
        work(encoded, (columns * PATCH, rows * PATCH))


def _then_torch(encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    import torch

    planes = torch.from_numpy(_at_scale(encoded, size)).permute(2, 0, 1)[None]
    how = {"size": size[::-1], "mode": "bicubic", "antialias": True}
    return torch.nn.functional.interpolate(planes, **how)[0].permute(1, 2, 0).numpy()


def _then_opencv(encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    import cv2

    return cv2.resize(_at_scale(encoded, size), size, interpolation=cv2.INTER_AREA)


def _then_pillow(encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(_at_scale(encoded, size)).resize(size, pixel_peers.BICUBIC))


def _at_scale(encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    import imagecodecs
    import simplejpeg

    if encoded[:2] != b"\xff\xd8":
        return np.ascontiguousarray(imagecodecs.webp_decode(encoded)[..., :3])
    return simplejpeg.decode_jpeg(encoded, "RGB", min_width=size[0], min_height=size[1])


def _by_vips(encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    import pyvips

    width, height = size
    return pyvips.Image.thumbnail_buffer(encoded, width, height=height, size="force").numpy()


def _by_dali(job: Job, _: Path) -> None:
    """Decode and resize in batches of 32 on one thread of NVIDIA DALI, without a GPU."""
    from nvidia.dali import fn, pipeline_def, types

    files = [np.frombuffer(encoded, np.uint8) for encoded in job.encoded]
    sides = [np.float32([rows * PATCH, columns * PATCH]) for rows, columns in job.grid_hw]

    def batches(source: list[np.ndarray]) -> Callable[[int], list[np.ndarray]]:
        def batch(number: int) -> list[np.ndarray]:
            places = range(32 * number, 32 * number + 32)
            return [source[place % len(source)] for place in places]

        return batch

    @pipeline_def(batch_size=32, num_threads=1, device_id=None)
    def pipeline() -> Any:
        encoded = fn.external_source(batches(files), ndim=1)
        size = fn.external_source(batches(sides), ndim=1)
        pixels = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        return fn.resize(pixels, size=size, interp_type=types.INTERP_CUBIC, antialias=True)

    made = pipeline()
    made.build()
    for _ in range(0, len(files), 32):
        made.run()


def loops(job: Job) -> dict[str, Way]:
    """Return the loops that a user would write."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    works = {
        "loop, Pillow": resized,
        "loop, simplejpeg + Pillow": _then_pillow,
        "loop, simplejpeg + torch": _then_torch,
        "loop, simplejpeg + OpenCV": _then_opencv,
    }
    return {way: partial(_each, job, work) for way, work in works.items()}


def others(job: Job) -> dict[str, Way]:
    """Return what libraries do that decode and resize in one go, of those that are installed."""
    ways: dict[str, Way] = {}
    if find_spec("pyvips"):
        os.environ["VIPS_CONCURRENCY"] = "1"  # read when it is loaded
        ways["loop, pyvips"] = partial(_each, job, _by_vips)
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        ways["NVIDIA DALI, CPU"] = partial(_by_dali, job)
    return ways


def engines(sets: dict[str, Dataset], rounds: int) -> Iterator[Row]:
    """Processor time an image of both engines, beside loops that throw their pixels away."""
    for name, dataset in sets.items():
        for target, max_tokens in TARGETS.items():
            job = planned(dataset, max_tokens)
            peers = loops(job) | others(job)
            ways = dict(peers)
            for engine in ("pillow", "turbo"):
                ways[f"rows in memory, {engine}"] = partial(_rows, job, engine)
                ways[f"`pack`, no worker, {engine}"] = partial(
                    pixel_peers.pack, job, 0, pixels=engine
                )
            ways["rows in memory, turbo, looking no further"] = partial(_rows, job, "turbo", **BARE)
            times, _ = take_turns(ways, rounds, time.process_time)
            best = min(times[way] for way in peers)
            for way, taken in times.items():
                row = [f"{name}, {target}: {way}", f"{1e3 * taken / len(job.encoded):.2f}"]
                yield [*row, f"{times['loop, Pillow'] / taken:.2f}", f"{best / taken:.2f}"]


def workers(sets: dict[str, Dataset], rounds: int) -> Iterator[Row]:
    """Images a second to rows on disk with one worker and with two, beside the fastest loop.

    A build of 6 copies of a dataset takes longer than one of 2 by what 4 copies take; what is left
    of the latter is its start.
    """
    for name, dataset in sets.items():
        for target, max_tokens in TARGETS.items():
            small, large = (
                planned(datasets.concatenate_datasets([dataset] * copies), max_tokens)
                for copies in (2, 6)
            )
            peers = loops(small)
            ways: dict[str, Way] = dict(peers)
            for engine, number in itertools.product(("pillow", "turbo"), (1, 2)):
                for job in (small, large):
                    way = f"{engine}, {number}, {len(job.encoded)}"
                    ways[way] = partial(pixel_peers.pack, job, number, pixels=engine)
            times, _ = take_turns(ways, rounds)
            loop = {way: times[way] / len(small.encoded) for way in peers}
            best = min(loop, key=loop.__getitem__)
            for way in (best, "loop, Pillow"):
                rates = loop["loop, Pillow"] / loop[way], loop[best] / loop[way]
                row = [f"{1e3 * loop[way]:.2f}", *(f"{rate:.2f}" for rate in rates)]
                yield [f"{name}, {target}: {way}", *row, "-", "-"]
            for engine in ("pillow", "turbo"):
                alone = 0.0
                for number in (1, 2):
                    begun, ended = (
                        times[f"{engine}, {number}, {len(job.encoded)}"] for job in (small, large)
                    )
                    taken = (ended - begun) / (len(large.encoded) - len(small.encoded))
                    alone = alone or taken
                    rates = loop["loop, Pillow"] / taken, loop[best] / taken, alone / taken
                    row = [f"{1e3 * taken:.2f}", *(f"{rate:.2f}" for rate in rates)]
                    start = f"{begun - taken * len(small.encoded):.1f}"
                    yield [f"{name}, {target}: `pack`, {engine}, workers: {number}", *row, start]


def live(dataset: Dataset, rounds: int) -> Iterator[Row]:
    """Images a second of epochs whose images are decoded as their batches are asked for."""
    for target, max_tokens in TARGETS.items():
        limit = {} if max_tokens is None else {"max_tokens": max_tokens}
        ways: dict[str, Way] = {}
        for engine in ("pillow", "turbo"):
            packs = packpipe.EpochPacks(dataset, SEQ_LEN, pixels=engine, **limit)
            for kind in ("threads", "processes"):
                options = {"num_workers": 2, "workers": kind, "tail": "pad"}
                loader = packpipe.PackedLoader(packs, 8, **options)
                ways[f"{engine}, {kind}"] = partial(_epoch, loader)
        times, _ = take_turns(ways, rounds)
        yield [target, *(f"{len(dataset) / taken:,.0f}" for taken in times.values())]


def _epoch(loader: Any, _: Path) -> int:
    return sum(int((batch.segment_ids > 0).sum()) for batch in loader)


def decoders(dataset: Dataset, rounds: int) -> Iterator[Row]:
    """Processor time of decoding pictures, as WebP and as PNG, and whether pixels are equal."""
    import cv2
    import imagecodecs

    cv2.setNumThreads(1)

    def by_opencv(encoded: bytes) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)

    def by_pillow(encoded: bytes) -> np.ndarray:
        return np.asarray(Image.open(BytesIO(encoded)).convert("RGB"))

    def as_png(encoded: bytes) -> bytes:
        file = BytesIO()
        Image.open(BytesIO(encoded)).convert("RGB").save(file, "PNG")
        return file.getvalue()

    webp = planned(dataset, None).encoded
    forms = {
        "WebP": (webp, imagecodecs.webp_decode),
        "PNG": ([as_png(file) for file in webp], imagecodecs.spng_decode),
    }
    for name, (files, by_imagecodecs) in forms.items():
        works = {"P": by_pillow, "O": by_opencv, "I": by_imagecodecs}

        def each(work: Callable[[bytes], np.ndarray], _: Path, files: list[bytes] = files) -> None:
            for file in files:
                work(file)

        ways: dict[str, Way] = {way: partial(each, work) for way, work in works.items()}
        times, _ = take_turns(ways, rounds, time.process_time)
        row = [f"{1e3 * taken / len(files):.3f}" for taken in times.values()]
        equal = (
            sum(np.array_equal(work(file), by_pillow(file)) for file in files)
            for work in (by_opencv, by_imagecodecs)
        )
        gain = f"{times['P'] / times['I']:.2f}"
        yield [name, *row, gain, *(f"{number} of {len(files)}" for number in equal)]


def shares(dataset: Dataset, rounds: int) -> Iterator[Row]:
    """What the process that writes takes of an image, beside its worker; starting left out."""
    for target, max_tokens in TARGETS.items():
        jobs = [
            planned(datasets.concatenate_datasets([dataset] * times), max_tokens)
            for times in (1, 3)
        ]
        taken = []
        for turn in range(rounds + 1):
            small, large = (_taken(job) for job in jobs)
            if turn:
                taken.append(large - small)
        parent, worker = np.median(taken, axis=0) / (2 * len(dataset))
        most = [min(workers, worker / parent) for workers in (2, 8, 16)]
        times = [f"{1e3 * share:.2f}" for share in (parent, worker)]
        yield [target, *times, *(f"{gain:.1f}" for gain in most)]


def _taken(job: Job) -> np.ndarray:
    """Return the processor time of a build with turbo on one worker: parent, worker."""

    def now() -> np.ndarray:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return np.array([usage.ru_utime + usage.ru_stime for usage in both])

    with tempfile.TemporaryDirectory() as folder:
        begun = now()
        pixel_peers.pack(job, 1, Path(folder), pixels="turbo")
        return now() - begun


def apart(dataset: Dataset) -> Iterator[Row]:
    """How far each engine is from Pillow's resize of a full decode, in levels, by reducing_gap."""
    for target, max_tokens in TARGETS.items():
        job = planned(dataset, max_tokens)
        for engine in ("pillow", "turbo"):
            for gap in (None, 2.0, 1.5, 1.0):
                rules = pixel_rules(packpipe.PackConfig(pixels=engine, reducing_gap=gap))
                rules = rules._replace(profiles="ignore", jpeg_edges="padded")
                means = np.array(
                    [
                        _apart(encoded, grid_hw, rules)
                        for encoded, grid_hw in zip(job.encoded, job.grid_hw, strict=True)
                    ]
                )
                at = np.percentile(means, (50, 90, 99))
                levels = [means.mean(), *at, means.max()]
                yield [f"{target}: {engine}, gap {gap}", *(f"{level:.2f}" for level in levels)]


def _apart(encoded: bytes, grid_hw: tuple[int, int], rules: PixelRules) -> float:
    height, width = (side * PATCH for side in grid_hw)
    image_hw = probe(encoded, max_pixels=rules.max_pixels).image_hw
    found = decode(encoded, image_hw=image_hw, target_hw=(height, width), rules=rules).pixels
    expected = np.asarray(resized(encoded, (width, height), None), np.int16)
    return float(np.abs(found - expected).mean())


def _rows(job: Job, engine: str, _: Path, **options: Any) -> None:
    rules = pixel_rules(packpipe.PackConfig(pixels=engine, **options))
    out = np.empty((SEQ_LEN, PATCH_BYTES), np.uint8)
    for encoded, grid_hw in zip(job.encoded, job.grid_hw, strict=True):
        image_hw = probe(encoded, max_pixels=rules.max_pixels).image_hw
        task = ImageTask(0, encoded, image_hw, grid_hw, None)
        fill_row([task], out[: task.num_tokens], rules)


def _drafted(encoded: bytes, size: tuple[int, int]) -> None:
    image = Image.open(BytesIO(encoded))
    image.draft(None, size)
    image.load()


Rates = dict[int | None, dict[str, float]]  # by most tokens of an image, then by way


def build(sets: dict[str, Dataset], rounds: int, least_s: float, rates: Rates) -> Iterator[Row]:
    """Images a second of every way, beside the floor; what each made."""
    for name, dataset in sets.items():
        for target, max_tokens in TARGETS.items():
            job = repeated(dataset, max_tokens, least_s)
            images = len(job.encoded)
            times, made = measured(job, rounds)
            if name == "jpegs":
                rates[max_tokens] = {way: images / taken for way, taken in times.items()}
            for way, taken in times.items():
                tokens, rows, num_bytes = made[way]
                yield [
                    f"{name}, {target}: {way}",
                    f"{images / taken:,.0f}",
                    f"{times['bare Pillow'] / taken:.2f}",
                    f"{times['bare Pillow, 2 processes'] / taken:.2f}",
                    f"{tokens / taken / 1000:,.0f}",
                    f"{tokens / images:.1f}",
                    f"{1 - tokens / (rows * SEQ_LEN):.1%}" if rows else "-",
                    f"{rows:,} rows, {num_bytes / 1e6:,.0f} MB" if rows else "-",
                ]


def _simplejpeg(encoded: bytes, size: tuple[int, int]) -> Image.Image:
    import simplejpeg

    height, width = simplejpeg.decode_jpeg_header(encoded)[:2]
    least = {"min_width": size[0], "min_height": size[1], "min_factor": 1}
    pixels = simplejpeg.decode_jpeg(encoded, "RGB", **least)
    # It decodes at eighths, and an edge that is not whole is rounded up.
    eighths = next(
        n for n in range(1, 9) if pixels.shape[:2] == (-(-height * n // 8), -(-width * n // 8))
    )
    box = (0, 0, width * eighths / 8, height * eighths / 8)
    return Image.fromarray(pixels).resize(size, pixel_peers.BICUBIC, box, 1.0)


HAMMING, BILINEAR = Image.Resampling.HAMMING, Image.Resampling.BILINEAR
MOVED = {
    "decode in full, bicubic": partial(resized, reducing_gap=None),
    **{f"gap {gap}": partial(resized, reducing_gap=gap) for gap in (3, 2, 1.5, 1)},
    "in full, hamming": partial(resized, reducing_gap=None, resample=HAMMING),
    "gap 1, hamming": partial(resized, resample=HAMMING),
    "in full, bilinear": partial(resized, reducing_gap=None, resample=BILINEAR),
    "gap 1, bilinear": partial(resized, resample=BILINEAR),
    "simplejpeg, gap 1": _simplejpeg,
}
Means = dict[str, dict[str, np.ndarray]]


def moved(dataset: Dataset, rounds: int, means: Means) -> Iterator[Row]:
    """Images a second of other ways to decode and resize, and how far each moves the pixels."""
    for target, max_tokens in TARGETS.items():
        job = planned(dataset, max_tokens)
        works = {way: partial(_each, job, work) for way, work in MOVED.items()}
        times, _ = take_turns(works, rounds)
        first, *_ = times.values()
        means[target] = {}
        for way, work in MOVED.items():
            counts, means[target][way] = _differences(job, work)
            levels = np.arange(256)
            reached = np.cumsum(counts) / counts.sum()
            yield [
                f"{target}: {way}",
                f"{len(job.encoded) / times[way]:,.0f}",
                f"{first / times[way]:.2f}",
                f"{np.average(levels, weights=counts):.2f}",
                f"{means[target][way].max():.2f}",
                str(np.searchsorted(reached, 0.99)),
                str(np.flatnonzero(counts).max()),
            ]


def _differences(job: Job, work: Callable[..., Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Return int64[256], values by difference from full decoding; and the mean of each image."""
    counts = np.zeros((len(job.encoded), 256), np.int64)
    for at, (encoded, (rows, columns)) in enumerate(zip(job.encoded, job.grid_hw, strict=True)):
        size = (columns * PATCH, rows * PATCH)
        found, expected = (
            np.asarray(image, np.int16)
            for image in (work(encoded, size), resized(encoded, size, None))
        )
        counts[at] = np.bincount(np.abs(found - expected).reshape(-1), minlength=256)
    return counts.sum(axis=0), counts @ np.arange(256) / counts.sum(axis=1)


def curve(dataset: Dataset, rounds: int, least_s: float, rates: Rates) -> Iterator[Row]:
    """Images a second against the target size, where `build` has not measured it."""
    for side, max_tokens in CURVE.items():
        if max_tokens not in rates:
            job = repeated(dataset, max_tokens, least_s)
            times, _ = measured(job, rounds, CURVE_WAYS)
            rates[max_tokens] = {way: len(job.encoded) / taken for way, taken in times.items()}
        yield [f"{side}²", *(f"{rates[max_tokens][way]:,.0f}" for way in CURVE_WAYS)]


def memory(load: Callable[[], Dataset], big_gb: float) -> Iterator[Row]:
    """Peak memory of builds of many rows, each in a process of its own."""
    for engine, num_workers in itertools.product(("pillow", "turbo"), (0, 1, 2)):
        given = load, big_gb, num_workers, engine
        images, num_bytes, taken, before, held = _elsewhere(_write_many, *given)
        sizes = (before, held, held - before)
        row = [engine, str(num_workers), f"{images:,}", f"{num_bytes / 1e9:.2f}", f"{taken:.1f}"]
        yield row + [f"{size / 1e6:,.0f}" for size in sizes]


def _elsewhere(work: Callable[..., Any], *given: Any) -> Any:
    """Return what a call returns in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(work, *given).result()


def _write_many(
    load: Callable[[], Dataset], big_gb: float, num_workers: int, engine: str
) -> tuple[Any, ...]:
    datasets.disable_progress_bars()
    dataset = load()
    rows = len(packpipe.EpochPacks(dataset, SEQ_LEN).plan(0, 0))
    repeats = math.ceil(big_gb * 1e9 / (rows * SEQ_LEN * PATCH_BYTES))
    many = datasets.concatenate_datasets([dataset] * repeats)
    before, finished = _held(), threading.Event()
    looks = [before]

    def watch() -> None:
        while not finished.wait(0.05):
            looks.append(_held())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        job = Job(many, [], [], None)
        packed = pixel_peers.pack(job, num_workers, Path(folder), pixels=engine)
        taken = time.perf_counter() - started
        finished.set()
        watching.join()
        return len(many), _made(packed, Path(folder)).num_bytes, taken, before, max(looks)


def _held() -> int:
    """Return bytes without a file that this process and those below it hold, each once."""
    import psutil

    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            found = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        lines = [line.split() for line in found.splitlines()]
        total += sum(int(line[1]) for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:"))
    return total * 1024


CODECS = {"uncompressed": None, "lz4": "lz4", "zstd": "zstd"}


def compression(sets: dict[str, Dataset], rounds: int) -> Iterator[Row]:
    """Rows whose Arrow buffers are compressed, beside those that are mapped into memory."""
    out = np.empty((ROWS_A_READ, SEQ_LEN * PATCH_BYTES), np.uint8)
    for name, dataset in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            packed = pixel_peers.pack(Job(dataset, [], [], None), 1, Path(folder))
            paths = {codec: Path(folder) / codec for codec in CODECS}
            for codec, path in paths.items():
                _compress([file["filename"] for file in packed.cache_files], codec, path)
            works: dict[str, Way] = {
                codec: partial(_read, path, out) for codec, path in paths.items()
            }
            times, _ = take_turns(works, rounds)
            sizes = {codec: path.stat().st_size for codec, path in paths.items()}
            for codec, size in sizes.items():
                yield [
                    f"{name}, {codec}",
                    f"{size / 1e6:,.0f}",
                    f"{size / sizes['uncompressed']:.2f}",
                    f"{len(packed) * out.shape[1] / times[codec] / 1e9:.2f}",
                    f"{_elsewhere(_memory_of, paths[codec]) / 1e6:,.0f}",
                ]


def _compress(sources: list[str], codec: str, path: Path) -> None:
    options = pa.ipc.IpcWriteOptions(compression=CODECS[codec])
    streams = [pa.ipc.open_stream(pa.memory_map(source)) for source in sources]
    with pa.ipc.new_stream(str(path), streams[0].schema, options=options) as writer:
        for stream in streams:
            for batch in stream:
                writer.write_batch(batch)


def _read(path: Path, out: np.ndarray, _: Path) -> None:
    packed = Dataset.from_file(str(path))
    for start in range(0, len(packed), ROWS_A_READ):
        rows = packpipe.read_rows(packed, slice(start, start + ROWS_A_READ)).patches
        np.copyto(out[: len(rows)], rows.reshape(len(rows), -1))


def _memory_of(path: Path) -> int:
    before = _held()
    packed = Dataset.from_file(str(path))
    return _held() - before if len(packed) else 0


def draw(path: Path, means: Means, rates: Rates) -> None:
    """Draw how far pixels move, and the curve of rates."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    if means:
        bins = np.linspace(0, max(found["gap 1"].max() for found in means.values()) + 0.01, 61)
        for target, style in (("cap 128²", "-"), ("cap 224²", "--")):
            for gap, colour in (("gap 1", "C3"), ("gap 1.5", "C1"), ("gap 2", "C0")):
                look = {"histtype": "step", "ls": style, "color": colour, "log": True}
                left.hist(means[target][gap], bins, label=f"{target}, {gap}", **look)
        left.set(
            title="Mean difference of a JPEG from decoding in full",
            xlabel="levels of 255",
            ylabel="images",
        )
        left.legend(fontsize=8)
    if rates.keys() >= set(CURVE.values()):
        for way in CURVE_WAYS:
            found = [rates[max_tokens][way] for max_tokens in CURVE.values()]
            wide = 2.5 if "packpipe" in way else 1.2
            right.loglog(list(CURVE), found, "o-", lw=wide, label=way.replace("`", ""))
        right.set_xticks(list(CURVE), [f"{side}²" for side in CURVE])
        right.minorticks_off()
        right.set(
            title="JPEGs a second against the target size",
            xlabel="most pixels of an image; 512² is native size at seq_len=1024",
            ylabel="images/s",
        )
        right.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def _versions() -> str:
    names = ["packpipe", "numpy", "pillow", "pyarrow", "datasets", "torch", "torchvision", "timm"]
    names += ["vit-pytorch", "simplejpeg", "imagecodecs", "numba"]
    names += ["opencv-python-headless", "pyvips", "nvidia-dali-cuda120"]
    found = [f"{name} {version(name)}" for name in names if any(distributions(name=name))]
    found += [f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "webp")]
    return ", ".join([f"CPython {platform.python_version()}", *found])


def _load(data: Path, cache: str, name: str, images: int | None) -> Dataset:
    files = str(data / f"{name}.parquet")
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    return dataset if images is None else dataset.select(range(min(images, len(dataset))))


def main() -> None:
    """Run the parts asked for, print the tables, and write them and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, with commas")
    parser.add_argument("--pictures", type=int, default=2000, help="pictures used, of 7,868")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least-s", type=float, default=4.0, help="of a build on one worker")
    parser.add_argument("--big-gb", type=float, default=8.0, help="rows of the memory part")
    parser.add_argument("--quick", action="store_true", help="does it run? a few images, one round")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(PARTS):
        parser.error(f"--only is {unknown}, expected some of {','.join(PARTS)}")
    photos = None
    if options.quick:
        photos, options.pictures, options.rounds = 40, 60, 1
        options.least_s, options.big_gb = 0.0, 0.1
    rounds, least_s = options.rounds, options.least_s
    datasets.disable_progress_bars()
    cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    about = (
        f"{datetime.date.today()}, `python benchmarks/pixels.py --data FOLDER --only "
        f"{options.only} --pictures {options.pictures} --rounds {rounds} --least-s {least_s:g} "
        f"--big-gb {options.big_gb:g}{' --quick' * options.quick}`, {os.cpu_count()} cores "
        f"({cpu}), shared with others: ratios say more than times. {_versions()}.\n"
    )
    parts = ["# Pixels\n", about]
    if {"moved", "curve"} & set(only):
        parts.append("![Differences and rates](pixels.png)\n")
    means: Means = {}
    rates: Rates = {}
    options.out.mkdir(parents=True, exist_ok=True)

    def add(part: str, title: str, note: str, rows: Iterator[Row], columns: str) -> None:
        if part in only:
            print(f"## {title}\n\n{note}\n", flush=True)
            parts.extend([f"## {title}\n", note + "\n", table(rows, columns.split(" | "))])
            (options.out / "pixels.md").write_text("\n".join(parts), encoding="utf-8")

    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        load = partial(_load, options.data, cache)
        sets = {"jpegs": load("jpegs", photos), "pictures": load("pictures", options.pictures)}
        add(
            "engines",
            "Engines",
            "ms of processor time an image, one process, ways taking turns. A *loop* throws its "
            "pixels away, and looks neither at colour profiles, damage nor the padding of edges; "
            "those with simplejpeg decode pictures with imagecodecs. *rows in memory* are headers, "
            "decoding and patches, *looking no further* than the loops do; `pack` plans and writes "
            "rows to the disk besides.",
            engines(sets, rounds),
            "way | ms an image | × Pillow's loop | × the best loop",
        )
        add(
            "workers",
            "Rows on disk",
            f"ms an image, by the clock. `pack` plans, decodes, and writes rows of {SEQ_LEN} "
            "tokens to the disk with their checksums; what starting takes, worker processes among "
            "it, is apart. A *loop*, in one process, throws its pixels away, and looks neither at "
            "colour profiles, damage nor the padding of edges.",
            workers(sets, rounds),
            "way | ms an image | × Pillow's loop | × the best loop | × one worker | start, s",
        )
        add(
            "live",
            "Live epochs",
            "JPEGs, images/s of `PackedLoader(EpochPacks(...), 8, num_workers=2)`, batches of "
            "tensors that nothing computes on, after an epoch before.",
            live(sets["jpegs"], rounds),
            "target | pillow, threads | pillow, processes | turbo, threads | turbo, processes",
        )
        add(
            "decoders",
            "PNG and WebP",
            f"{len(sets['pictures'])} pictures, as WebP and saved as PNG; ms of processor time an "
            "image, to an array of RGB.",
            decoders(sets["pictures"], rounds),
            "format | Pillow | OpenCV | imagecodecs | Pillow ÷ imagecodecs | "
            "OpenCV's pixels equal | imagecodecs' equal",
        )
        add(
            "shares",
            "More workers",
            "JPEGs, turbo, one worker: ms of processor time an image of the process that plans, "
            "sends and writes, and of its worker. With as many cores as processes, builds are at "
            "most so many times as fast as with one worker, since one process writes: the second "
            "divided by the first.",
            shares(sets["jpegs"], rounds),
            "target | process that writes | worker | 2 workers | 8 | 16",
        )
        add(
            "apart",
            "Differences of the engines",
            f"{len(sets['jpegs'])} JPEGs: mean difference of each from Pillow's bicubic resize of "
            "a full decode, in levels of 255; colours and edges as they are.",
            apart(sets["jpegs"]),
            "way | mean | half of them | 90 % | 99 % | worst image",
        )
        add(
            "floor",
            "Bare Pillow, step by step",
            "Images/s in one process, and at last in two. *draft*: JPEG decoded at 1/2, 1/4 or 1/8 "
            "while at least as large as planned. *floor*: that, then what is left of the resize.",
            floor(sets, rounds),
            "images | open | decode in full | and resize | draft and decode | "
            "and resize: the floor | floor, 2 processes | ×",
        )
        add(
            "build",
            "From encoded images to tokens",
            f"Rows of {SEQ_LEN} tokens. `pack` and `map` write rows to the disk; `pack` also syncs "
            "them and writes their checksums. Workers of `pack`, started anew each time, decode "
            "beside the process that writes; timm's workers and the floor's processes are there "
            "before. timm makes batches of 32 images, each padded to the cap and float32, here "
            "without its enlarging small images to the cap, and without the step that normalises "
            "on a GPU; it rounds sizes up. vit-pytorch is stopped where its model would begin. "
            "`map`, vit-pytorch and timm decode in full; `map` packs first-fit in batches of "
            f"{pixel_peers.MAP_BATCH}.",
            build(sets, rounds, least_s, rates),
            "way | images/s | of the floor | of the floor, 2 processes | 1000 tokens/s | "
            "tokens an image | padding | written",
        )
        add(
            "moved",
            "Where the floor could lie",
            f"{len(sets['jpegs'])} JPEGs, one process; differences in levels of 255, against "
            "decoding in full and one bicubic resize. *gap*: `reducing_gap`.",
            moved(sets["jpegs"], rounds, means),
            "way | images/s | × full | mean difference | of the worst image | 99th percentile | "
            "largest",
        )
        add(
            "curve",
            "Images a second against the target size",
            "JPEGs. 512² is native size, since an image has at most 1024 tokens; it, 128² and 224² "
            "are those of the builds above, where they were made.",
            curve(sets["jpegs"], rounds, least_s, rates),
            " | ".join(["cap", *CURVE_WAYS]),
        )
        add(
            "memory",
            "Memory of a large build",
            "JPEGs at native size, again and again, in a process of its own. MB of memory without "
            "a file, anonymous and shared (Pss_Anon + Pss_Shmem), of the process and those below "
            "it, shared pages counted once; looked at every 50 ms.",
            memory(partial(load, "jpegs", photos), options.big_gb),
            "engine | workers | images | GB written | s | before | peak | more than before",
        )
        add(
            "compression",
            "Compressed rows",
            f"Native size. *read*: `Dataset.from_file`, then its rows, {ROWS_A_READ} at a time "
            "copied into one batch. *memory*: without a file, taken by `Dataset.from_file` alone.",
            compression(sets, rounds),
            "rows | MB on disk | share | read, GB/s of patches | memory, MB",
        )
    if means or rates:
        draw(options.out / "pixels.png", means, rates)


if __name__ == "__main__":
    main()
