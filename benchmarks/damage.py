"""How many damaged JPEG files are found, and what looking costs: a part of results/pixels.md.

Each file of a Parquet file's image column is damaged in three ways, at places drawn from its scans:
one bit flipped, one byte replaced, cut and closed with an end marker. What decodes to the same
pixels does not count as damaged. ``python benchmarks/damage.py --data FOLDER`` reads
FOLDER/jpegs.parquet and prints the tables.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from contextlib import nullcontext
from io import BytesIO
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from packpipe.images.bad_images import BadImage
from packpipe.images.decode import decode, probe
from packpipe.images.rules import PixelRules
from packpipe.images.scans import scans_of

RULES = PixelRules((255, 255, 255), 10**9, 1.0, "bicubic", "bicubic", "ignore", "reject")
BASELINE = 0xC0
CHOICES = ("keep", "reject", "strict")
WAYS = ("one bit flipped", "one byte replaced", "cut and closed")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    options = parser.parse_args()
    column = pq.read_table(options.data / "jpegs.parquet", columns=["image"]).column("image")
    files = [value.as_py()["bytes"] for value in column]
    print_found(files)
    print_cost(files, options.rounds)


def print_found(files: list[bytes]) -> None:
    """Damage every file in three ways, and count what is found."""
    rng = np.random.default_rng(0)
    print("| files | damage | damaged | refused by Pillow | found | found with `strict` |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for kind in ("baseline", "progressive"):
        some = [
            file for file in files if (scans_of(file).frame == BASELINE) == (kind == "baseline")
        ]
        called = sum(outcome(file, "reject") != "row" for file in some)
        strictly = sum(outcome(file, "strict") != "row" for file in some)
        print(f"| {kind} | none | 0 of {len(some)} | 0 | {called} | {strictly} |")
        for way in WAYS:
            found: Counter[str] = Counter()
            for file in some:
                broken = damaged(file, way, rng)
                if same_pixels(file, broken):
                    continue
                found["damaged"] += 1
                found[outcome(broken, "reject")] += 1
                found["strict"] += outcome(broken, "strict") == "damaged scan"
            number = found["damaged"]
            refused = number - found["row"] - found["damaged scan"]
            shares = [f"{100 * found[one] / number:.0f} %" for one in ("damaged scan", "strict")]
            shares = [f"{100 * refused / number:.0f} %", *shares]
            print(
                f"| {kind} | {way} | {number} of {len(some)} | {' | '.join(shares)} |", flush=True
            )


def damaged(file: bytes, way: str, rng: np.random.Generator) -> bytes:
    """Return a file with one place of its scans damaged."""
    first = first_scan(file)
    place = int(rng.integers(first, scans_of(file).end))
    if way == "cut and closed":
        return file[:place] + b"\xff\xd9"
    byte = file[place] ^ 1 << int(rng.integers(8)) if "bit" in way else int(rng.integers(256))
    return file[:place] + bytes([byte]) + file[place + 1 :]


def first_scan(file: bytes) -> int:
    """Return where the first scan starts: segment by segment, since thumbnails have scans, too."""
    at = 2
    while True:
        code, at = file[at + 1], at + 2 + int.from_bytes(file[at + 2 : at + 4], "big")
        if code == 0xDA:
            return at


def same_pixels(file: bytes, broken: bytes) -> bool:
    """Return whether Pillow makes the same picture of two files."""
    try:
        return Image.open(BytesIO(file)).tobytes() == Image.open(BytesIO(broken)).tobytes()
    except (OSError, SyntaxError):
        return False


def outcome(file: bytes, damaged_scans: str) -> str:
    """Return the reason of a file's reject, or "row"."""
    try:
        at_128(file, damaged_scans)
    except BadImage as error:
        return error.reason
    return "row"


def at_128(file: bytes, damaged_scans: str) -> NDArray[np.uint8]:
    """Decode a file to a size within 128 x 128."""
    height, width = image_hw = probe(file, max_pixels=RULES.max_pixels).image_hw
    scale = min(1.0, 128 / max(height, width))
    target = max(1, round(height * scale)), max(1, round(width * scale))
    rules = RULES._replace(damaged_scans=damaged_scans)
    return decode(file, image_hw=image_hw, target_hw=target, rules=rules).pixels


def print_cost(files: list[bytes], rounds: int) -> None:
    """Time every file in all ways by turns; its shortest time in each way counts."""
    ways = {"not looked at": "keep", "keep": "keep", "reject": "reject", "strict": "strict"}
    shortest = {way: np.full(len(files), np.inf) for way in ways}
    for number, file in enumerate(files):
        for _, way in product(range(rounds), ways):
            start = time.process_time()
            with (
                patch("packpipe.images.decode._watched", blind)
                if way not in CHOICES
                else nullcontext()
            ):
                at_128(file, ways[way])
            spent = time.process_time() - start
            shortest[way][number] = min(shortest[way][number], spent)
    base = shortest["not looked at"].sum()
    print("\n| `damaged_scans` | ms of processor time an image, within 128² | ratio |")
    print("| --- | ---: | ---: |")
    for way, spent in shortest.items():
        print(f"| {way} | {1000 * spent.mean():.3f} | {spent.sum() / base:.3f} |")


def blind(_: Image.Image) -> None:
    """Take the place of what watches a file."""


if __name__ == "__main__":
    main()
