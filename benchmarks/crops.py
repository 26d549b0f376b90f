"""What crops cost: planning a million of them, and decoding boxes. Prints results/crops.md.

Decoding is timed on photographs, each in all ways by turns; of its times in a way the median
counts. Boxes are resized to as many pixels as whole images are: both within the cap. What a smaller
decode changes is measured against crop-then-resize in full.
``python benchmarks/crops.py --data FOLDER`` reads FOLDER/jpegs.parquet.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from packpipe import Crop, PackConfig, Uniform, plan_epoch
from packpipe.images.decode import decode
from packpipe.images.rules import pixel_rules
from packpipe.philox import Key
from packpipe.planning.crops import crop_boxes
from packpipe.planning.decisions import decide

MILLION = 10**6
CAPS = (128, 224)
CROPS = {
    "whole image": None,
    "area 0.35 to 1": Crop(Uniform(0.35, 1.0)),
    "area 0.08 to 1": Crop(),
    "area 0.25": Crop(0.25),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    column = pq.read_table(options.data / "jpegs.parquet", columns=["image"]).column("image")
    files = [value.as_py()["bytes"] for value in column]
    sizes = pq.read_table(options.data / "jpegs.parquet", columns=["height", "width"])
    image_hw = np.stack([sizes["height"].to_numpy(), sizes["width"].to_numpy()], axis=1)
    photographs = [number for number, file in enumerate(files) if file[:2] == b"\xff\xd8"]
    files, image_hw = [files[number] for number in photographs], image_hw[photographs]
    print_planning(image_hw, options.rounds)
    print_decoding(files, image_hw, options.rounds)
    print_difference(files, image_hw)


def print_planning(image_hw: NDArray[Any], rounds: int) -> None:
    """Time the boxes of a million images, and plans with and without them."""
    many = np.tile(image_hw, (-(-MILLION // len(image_hw)), 1))[:MILLION].astype(np.int32)
    index = np.arange(MILLION)

    def boxes() -> None:
        for start in range(0, MILLION, 2**15):  # as a plan asks for them
            some = slice(start, start + 2**15)
            crop_boxes(Crop(), many[some], Key(0, 0), index=index[some])

    print(f"## A million images, median of {rounds}\n\n| | s | s of processors |")
    print("| --- | ---: | ---: |")
    for name, run in (
        ("boxes alone", boxes),
        ("`plan_epoch`, whole images", lambda: plan_epoch(many, config_of(None, 128))),
        ("`plan_epoch`, `crop=Crop()`", lambda: plan_epoch(many, config_of(Crop(), 128))),
    ):
        run()
        spent = [timed(run) for _ in range(rounds)]
        real, processors = (statistics.median(times) for times in zip(*spent, strict=True))
        print(f"| {name} | {real:.2f} | {processors:.2f} |", flush=True)


def timed(run: Any) -> tuple[float, float]:
    """Return seconds and seconds of processors."""
    start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def config_of(crop: Crop | None, cap: int) -> PackConfig:
    """Return options by which what is left of an image has the pixels of a square of the cap."""
    return PackConfig(crop=crop, resolution="budget", max_tokens=(cap // 16) ** 2)


def print_decoding(files: list[bytes], image_hw: NDArray[Any], rounds: int) -> None:
    """Time the decoding of boxes of all files, and of whole ones, by turns."""
    print(f"\n## {len(files)} photographs, ms of processor time an image, median of {rounds}\n")
    print("| cap | " + " | ".join(CROPS) + " |\n| --- |" + " ---: |" * len(CROPS))
    for cap in CAPS:
        spent = np.empty((rounds, len(CROPS), len(files)))
        for turn in spent:
            ways = [decoded(files, image_hw, config_of(crop, cap)) for crop in CROPS.values()]
            for file in range(len(files)):
                for way, pixels in enumerate(ways):
                    start = time.process_time()
                    next(pixels)
                    turn[way, file] = time.process_time() - start
        means = 1000 * np.median(spent, axis=0).mean(axis=1)
        cells = [f"{mean:.2f} ({mean / means[0]:.2f})" for mean in means]
        print(f"| {cap}² | {' | '.join(cells)} |", flush=True)


def decoded(files: list[bytes], image_hw: NDArray[Any], config: PackConfig) -> Any:
    """Yield the pixels of each file."""
    found = decide(image_hw, config, Key(0, 0), index=np.arange(len(files)))
    rules, targets = pixel_rules(config), (found.grid_hw.astype(int) * 16).tolist()
    boxes = [None] * len(files) if found.box is None else [tuple(b) for b in found.box.tolist()]
    for file, size, target, box in zip(files, image_hw.tolist(), targets, boxes, strict=True):
        yield decode(
            file, image_hw=tuple(size), target_hw=tuple(target), rules=rules, box=box
        ).pixels.astype(np.int16)


def print_difference(files: list[bytes], image_hw: NDArray[Any]) -> None:
    """Compare boxes of JPEG files decoded small with those cut out in full."""
    print("\n## `reducing_gap=1.0` against crop-then-resize in full, levels of 255\n")
    print("| cap | mean | the largest mean of a photograph |\n| --- | ---: | ---: |")
    for cap in CAPS:
        small = config_of(Crop(), cap)
        full = PackConfig(**{**vars(small), "reducing_gap": None})
        pairs = zip(*(decoded(files, image_hw, one) for one in (small, full)), strict=True)
        apart = [float(np.abs(a - b).mean()) for a, b in pairs]
        print(f"| {cap}² | {statistics.mean(apart):.2f} | {max(apart):.2f} |", flush=True)


if __name__ == "__main__":
    main()
