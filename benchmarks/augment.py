"""What augmentation costs: flips, colours and mixtures beside a training step on a CPU.

    pip install -e '.[torch]'
    python benchmarks/augment.py

ViT-Ti/16 in float32 on one thread, random pixels, images of the sizes of r ~ U(64, 224) packed into
rows of 1024. The step is forward, backward and AdamW. *Moved* is what the loader does to the rows
of a step: draws, flips (and turns), matrices, and which tokens of neighbours meet; *pixels* is what
the model does to their pixels: colours and mixtures. All take turns; medians of the rounds and
ratios to the step's. Whole steps with and without them are as uncertain as the steps' own times.
Writes augment.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from packpipe import Augment, NaViT, NaViTConfig, PackConfig, PackedBatch, Side, Uniform, plan_epoch
from packpipe.augmenting.rows import augmented
from packpipe.loading.colouring import drawn_pixels, segment_numbers
from packpipe.philox import Key
from packpipe.rows.fill_images import planned_images
from packpipe.rows.rows import Rows
from packpipe.training.losses import segment_cross_entropy

RESULTS = Path(__file__).parent / "results"
CONFIG = PackConfig(seq_len=1024, resolution=Side(Uniform(64, 224)), max_segments=64)
AUGMENTS = {
    "inception: flips": Augment.preset("inception"),
    "three: flips, colours": Augment.preset("three"),
    "turns and boxes, too": replace(Augment.preset("three"), turns=True, erase=0.5),
    "mixup and CutMix alone": Augment(flip=0, mixup=0.8, cutmix=1),
    "three, mixup, CutMix": replace(Augment.preset("three"), mixup=0.8, cutmix=1),
}


def main() -> None:
    """Measure, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=4, help="a step")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = random_rows(options.rows)
    model = NaViT(NaViTConfig.preset("Ti/16", num_classes=10)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batch: PackedBatch) -> None:
        labels = torch.where(batch.present, 3, -100)
        segment_cross_entropy(model(batch), labels, partners=batch.partners).backward()
        optimizer.step()
        optimizer.zero_grad()

    parts: dict[str, Callable[[], Any]] = {"a step": lambda: step(PackedBatch.from_rows(plain))}
    moved = {name: copied(plain) for name in AUGMENTS}

    def move(name: str) -> None:
        # In place, so that the next round moves what this one left.
        moved[name] = augmented(moved[name], AUGMENTS[name], Key(0, 0))

    for name, augment in AUGMENTS.items():
        batch = PackedBatch.from_rows(augmented(copied(plain), augment, Key(0, 0)))
        parts[f"{name}: moved"] = lambda name=name: move(name)
        if batch.colours is not None or batch.mix_offset is not None:
            parts[f"{name}: pixels"] = lambda batch=batch: show(batch)
            parts[f"{name}: a step"] = lambda batch=batch: step(batch)
    figures = medians(parts, options.rounds)
    text = heading(options, plain) + table(figures)
    print(text)
    options.results.mkdir(exist_ok=True, parents=True)
    (options.results / "augment.md").write_text(text)


def random_rows(number: int) -> Rows:
    """Rows of random pixels, as many as a step has."""
    rng = np.random.default_rng(0)
    plan = plan_epoch(rng.integers(64, 600, (400, 2)), CONFIG)
    rows = planned_images(plan, np.arange(number), None)
    shape = (number, CONFIG.seq_len)
    ids, coords = np.zeros(shape, np.int32), np.zeros((*shape, 2), np.int16)
    starts = rows.first_places(CONFIG.seq_len)
    for segment, (start, length) in enumerate(zip(starts, rows.seq_lens, strict=True)):
        own = slice(start, start + length)
        ids.reshape(-1)[own] = rows.numbers[segment] + 1
        grid = np.indices(tuple(rows.grid_hw[segment])).reshape(2, -1).T
        coords.reshape(-1, 2)[own] = grid
    patches = rng.integers(0, 256, (*shape, CONFIG.patch_bytes), np.uint8) * (ids > 0)[..., None]
    tokens = {"patches": patches.astype(np.uint8), "segment_ids": ids, "coords": coords}
    labels = pa.array(rng.integers(0, 10, len(rows.seq_lens)))
    return replace(rows, segments={**rows.segments, "labels": labels}, tokens=tokens)


def copied(rows: Rows) -> Rows:
    """Return the rows in memory of their own."""
    return replace(rows, tokens={name: values.copy() for name, values in rows.tokens.items()})


def show(batch: PackedBatch) -> None:
    """Do what `NaViT.read` does more for a batch with colours or mixtures."""
    segments = segment_numbers(batch.segment_ids, batch.seq_lens.shape[1])
    real = batch.segment_ids.flatten().nonzero()[:, 0]
    pixels = batch.patches.flatten(0, 1)[real].float()
    offsets = None if batch.mix_offset is None else batch.mix_offset.flatten()[real]
    drawn_pixels(pixels, segments[real], offsets, batch)


def medians(parts: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median processor seconds of each part; all take turns, the first round warms."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, part in parts.items():
            began = time.process_time()
            part()
            times[name].append(time.process_time() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def heading(options: argparse.Namespace, rows: Rows) -> str:
    """Return what was measured, and where."""
    return (
        f"# Augmentation on a CPU\n\n{datetime.date.today()}, {platform.processor() or 'CPU'}, one "
        f"thread, torch {torch.__version__}; `python benchmarks/augment.py`: Ti/16, "
        f"{options.rows} rows of {CONFIG.seq_len}, {len(rows.seq_lens)} images, medians of "
        f"{options.rounds} rounds.\n\n"
    )


def table(figures: dict[str, float]) -> str:
    """Return the figures and their ratios to a plain step."""
    whole = figures["a step"]
    lines = ["| | ms | of a step |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {1000 * seconds:,.1f} | {seconds / whole:.4f} |"
        for name, seconds in figures.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
