"""Colours: photographs with their profiles against a reference of its own, and what it costs.

    python benchmarks/colours.py --data FOLDER [--rounds 5] [--note TEXT] [--out ELSEWHERE]

FOLDER holds jpegs.parquet (columns image, label). Ends pixels.md in benchmarks/results with a
section of its own; pixels.py writes that file anew, so it goes before.

The reference knows nothing of ImageCms: NumPy reads each profile's matrix and curves, and converts
all pixels of the photograph decoded in full, in floating point (tests/naive_profiles.py); at a cap,
Pillow's bicubic filter resizes them then, in one step. Speed is processor time of decoding alone,
with `profiles="srgb"` and with `"ignore"`, which is how every image was decoded before there was
the option. The two take turns image by image.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, features

from packpipe import PackConfig, plan_epoch
from packpipe.images.decode import decode, probe
from packpipe.images.rules import pixel_rules

ROOT = Path(__file__).parent.parent
sys.path[:0] = [f"{ROOT / 'tests'}"]
import naive_profiles  # noqa: E402 found in tests

CAPS = {"cap 128²": 64, "cap 224²": 196, "native": None}
SECTION = "## Colours"
NOTE = """*Difference*: mean over an image's values, in levels of 255, from the reference, which is
not rounded: rounding alone is 0.25 where an image is resized. There it also converts before it
resizes, packpipe after. *Before*: colours as they are."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="what to say of the machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    column = pq.read_table(options.data / "jpegs.parquet", columns=["image"]).column("image")
    images = [one["bytes"].as_py() for one in column]
    sizes = [probe(image, max_pixels=10**8).image_hw for image in images]
    profiled = np.array(["icc_profile" in Image.open(BytesIO(one)).info for one in images])
    text = [
        SECTION,
        "",
        made_by(options) + f" {len(images)} photographs, {profiled.sum()} with a profile, all of a "
        "matrix and curves.",
        "",
        NOTE,
        "",
        *differences(images, sizes),
        "",
        TIMES,
        "",
        *costs(images, sizes, profiled, options.rounds),
        "",
    ]
    path = options.out / "pixels.md"
    before = path.read_text(encoding="utf-8").partition(SECTION)[0] if path.exists() else ""
    path.write_text(before.rstrip() + "\n\n" + "\n".join(text), encoding="utf-8")
    print("\n".join(text))


TIMES = """*Time ÷ before*: processor time of decoding with profiles, by that without; the sum of
each image's median."""


def made_by(options: argparse.Namespace) -> str:
    """Return how, when and with what the figures were made."""
    command = f"python benchmarks/colours.py --data FOLDER --rounds {options.rounds}"
    versions = f"pillow {Image.__version__}, littlecms2 {features.version('littlecms2')}"
    python = f"CPython {platform.python_version()}"
    return f"{datetime.date.today()}, `{command}`, {options.note} {python}, {versions}."


def targets_of(sizes: list[tuple[int, int]], most: int | None) -> list[tuple[int, int]]:
    """Return each image's target size at most so many tokens."""
    plan = plan_epoch(sizes, PackConfig(seq_len=1024, max_tokens=most))
    return [(rows * 16, columns * 16) for rows, columns in plan.grid_hw.tolist()]


def reference(encoded: bytes, target_hw: tuple[int, int] | None) -> np.ndarray:
    """Return float[height, width, 3] in sRGB, of the image in full or resized."""
    image = Image.open(BytesIO(encoded))
    profile = image.info.get("icc_profile")
    pixels = np.asarray(image.convert("RGB"))
    levels = pixels.astype(float) if profile is None else naive_profiles.srgb_by(pixels, profile)
    if target_hw is None:
        return levels
    bands = [Image.fromarray(band.astype(np.float32)) for band in np.moveaxis(levels, -1, 0)]
    size = target_hw[::-1]
    resized = [np.asarray(band.resize(size, Image.Resampling.BICUBIC)) for band in bands]
    return np.clip(np.stack(resized, axis=-1), 0, 255)


def differences(images: list[bytes], sizes: list[tuple[int, int]]) -> list[str]:
    """Return a table of how far pixels are from the reference."""
    lines = [
        "| pixels | profiles | mean of all | worst image | images above 0.5 | above 1 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    targets = {"at their own size": None, "cap 224², in one step": 196}
    for name, most in targets.items():
        known = sizes if most is None else targets_of(sizes, most)
        found: dict[str, list[float]] = {"srgb": [], "ignore": []}
        for encoded, image_hw, target_hw in zip(images, sizes, known, strict=True):
            wanted = reference(encoded, None if most is None else target_hw)
            for profiles, values in found.items():
                rules = pixel_rules(PackConfig(reducing_gap=None, profiles=profiles))
                pixels = decode(encoded, image_hw=image_hw, target_hw=target_hw, rules=rules).pixels
                values.append(float(np.abs(pixels - wanted).mean()))
        for profiles, values in found.items():
            apart = np.array(values)
            which = "converted" if profiles == "srgb" else "before"
            lines.append(
                f"| {name} | {which} | {apart.mean():.3f} | {apart.max():.2f} "
                f"| {(apart > 0.5).sum()} | {(apart > 1).sum()} |"
            )
    return lines


def costs(
    images: list[bytes], sizes: list[tuple[int, int]], profiled: np.ndarray, rounds: int
) -> list[str]:
    """Return a table of how much longer decoding takes."""
    lines = ["| target | all | with a profile | without |", "| --- | ---: | ---: | ---: |"]
    for name, most in CAPS.items():
        ways = [pixel_rules(PackConfig(profiles=one)) for one in ("srgb", "ignore")]
        targets = targets_of(sizes, most)
        taken = np.zeros((rounds, len(images), 2))
        for turn in range(rounds + 1):  # the first one warms up
            for number, (encoded, image_hw, target_hw) in enumerate(
                zip(images, sizes, targets, strict=True)
            ):
                for way in (0, 1) if (turn + number) % 2 else (1, 0):
                    start = time.process_time()
                    decode(encoded, image_hw=image_hw, target_hw=target_hw, rules=ways[way])
                    if turn:
                        taken[turn - 1, number, way] = time.process_time() - start
        # The median of an image's times: a busy machine makes some of them longer.
        each = np.median(taken, axis=0)
        ratios = [
            each[some, 0].sum() / each[some, 1].sum() for some in (slice(None), profiled, ~profiled)
        ]
        lines.append(f"| {name} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    return lines


if __name__ == "__main__":
    main()
