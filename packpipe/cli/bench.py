"""`compare_layouts`: packed against padded rows, in training on one's own images.

Both train the same model from the same weights, step by step in turn, so that whatever else the
machine does falls on both. Medians of the steps after the first ones.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from datasets import Dataset

from packpipe import checks
from packpipe.cli.layouts import Layout
from packpipe.cli.training_run import Training, device_of_this_rank
from packpipe.loading.loader import PackedLoader
from packpipe.model.flops import matrix_rate
from packpipe.model.navit import NaViT
from packpipe.training.loop import Record, train

WARM_UP = 2


@dataclass(frozen=True)
class LayoutFigures:
    """What steps of one layout were like.

    Attributes:
        layout: its name.
        fill: real tokens ÷ slots.
        images_per_s, tokens_per_s: medians over steps; tokens are real ones.
        mfu: useful FLOPs a second ÷ this device's measured rate of matrix products.
        data_wait: share of the time in which the loader was waited for.
    """

    layout: str
    fill: float
    images_per_s: float
    tokens_per_s: float
    mfu: float
    data_wait: float


@dataclass(frozen=True)
class Comparison:
    """The figures of each layout; prints as a table.

    Attributes:
        device: what it ran on.
        matrix_rate: FLOP/s of a large matrix product there.
        layouts: packed, then padded.
    """

    device: str
    matrix_rate: float
    layouts: tuple[LayoutFigures, ...]

    @property
    def speedup(self) -> float:
        """Images a second of packed ÷ those of padded."""
        packed, padded = self.layouts
        return packed.images_per_s / padded.images_per_s

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {**asdict(self), "speedup": self.speedup}

    def __str__(self) -> str:
        lines = [
            f"training on {self.device}, matrix products at {self.matrix_rate / 1e12:.3g} TFLOP/s",
            "layout   fill  images/s  tokens/s  useful MFU  waited for data",
        ]
        for one in self.layouts:
            lines.append(
                f"{one.layout:<7} {one.fill:>5.1%} {one.images_per_s:>9,.1f} "
                f"{one.tokens_per_s:>9,.0f} {one.mfu:>11.1%} {one.data_wait:>16.0%}"
            )
        lines.append(f"packed gives {self.speedup:.2f} times the images a second of padded")
        return "\n".join(lines)


def compare_layouts(
    dataset: Dataset,
    *,
    model: str,
    seq_len: int,
    sides: tuple[int, int],
    batch_size: int,
    steps: int,
    num_workers: int,
    max_bad_fraction: float = 0.01,
) -> Comparison:
    """Return how fast a model trains on packed and on padded rows of a dataset.

    Padded rows hold one image each and are as long as the largest image; a step has as many slots
    of them as of packed ones.

    Args:
        dataset: labelled images.
        model: a preset's name.
        seq_len: tokens of a packed row.
        sides: images have as many pixels as squares of a side drawn between these.
        batch_size: packed rows a step.
        steps: measured, of each.
        num_workers: threads that decode ahead.
        max_bad_fraction: a larger share of images that cannot be read is an error.

    Raises:
        TypeError, ValueError: an option is wrong.
    """
    if "RANK" in os.environ:
        expected, remedy = "no rank: one device is measured", "run it without torchrun"
        raise ValueError(checks.sentence("RANK", os.environ["RANK"], expected, remedy))
    device = device_of_this_rank()
    runs, dtype = [], torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in ("packed", "padded"):
        layout = Layout(name, seq_len, sides, 0.0, max_bad_fraction)
        training = Training(
            dataset,
            layout=layout,
            model=model,
            shape={"attention": "auto"},
            batch_size=batch_size,
            options={"steps": WARM_UP + steps, "warm_up": 0, "cool_down": 0},
            num_workers=num_workers,
        )
        torch.manual_seed(0)
        navit = NaViT(training.config).to(device)
        rows = max(1, batch_size * seq_len // training.packs.config.seq_len)
        loader = PackedLoader(training.packs, rows, num_workers=num_workers)
        runs.append((name, train(navit, loader, training.train_config)))
    found: dict[str, list[Record]] = {name: [] for name, _ in runs}
    for _ in range(WARM_UP + steps):
        for name, run in runs:
            found[name].append(next(run))
    rate = matrix_rate(device, dtype)
    layouts = [_figures(name, records[WARM_UP:], rate) for name, records in found.items()]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return Comparison(name, rate, tuple(layouts))


def _figures(layout: str, records: list[Record], rate: float) -> LayoutFigures:
    return LayoutFigures(
        layout=layout,
        fill=median(record.fill for record in records),
        images_per_s=median(record.images_per_s for record in records),
        tokens_per_s=median(record.tokens_per_s for record in records),
        mfu=median(record.flops_per_s for record in records) / rate,
        data_wait=median(record.data_wait for record in records),
    )
