"""`compare_layouts`: training on packed rows against training on padded ones, on your own images.

Both layouts train the same model from the same weights, one step of each in turn, so that other
load on the machine slows both alike. Figures are medians; the first steps are left out.
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
from packpipe.cli.trained_images import TrainedImages
from packpipe.cli.training_run import Training, device_of_this_rank
from packpipe.loading.loader import PackedLoader
from packpipe.model.config import NaViTConfig
from packpipe.model.flops import matrix_rate
from packpipe.model.navit import NaViT
from packpipe.training.loop import Record, train

# Steps before the measured ones: the first compiles the model on a GPU, and waits for a batch.
WARM_UP = 2


@dataclass(frozen=True)
class LayoutFigures:
    """Figures of the measured steps of one layout.

    Attributes:
        layout: its name.
        fill: real tokens ÷ slots.
        images_per_s, tokens_per_s: medians over steps; tokens are real ones.
        mfu: useful FLOPs a second ÷ this device's measured rate of matrix products.
        data_wait: share of the time spent waiting for the loader.
    """

    layout: str
    fill: float
    images_per_s: float
    tokens_per_s: float
    mfu: float
    data_wait: float


@dataclass(frozen=True)
class Comparison:
    """The figures of both layouts; prints as a table.

    Attributes:
        device: its name.
        matrix_rate: FLOP/s of a large matrix product on it.
        layouts: packed, then padded.
    """

    device: str
    matrix_rate: float
    layouts: tuple[LayoutFigures, ...]

    @property
    def speedup(self) -> float:
        """Images a second with packed rows ÷ images a second with padded ones."""
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

    Padded rows hold one image each and are as long as the largest image. A step has about as many
    slots in either layout.

    Args:
        dataset: labelled images.
        model: a preset's name.
        seq_len: tokens of a packed row.
        sides: (low, high); an image gets as many pixels as a square of a side drawn between them.
        batch_size: packed rows a step.
        steps: how many are measured of each layout.
        num_workers: threads that decode ahead.
        max_bad_fraction: a larger share of images that cannot be read is an error.

    Raises:
        TypeError, ValueError: an option is wrong, or torchrun started this process.
    """
    if "RANK" in os.environ:
        expected, remedy = "no rank: one device is measured", "run it without torchrun"
        raise ValueError(checks.sentence("RANK", os.environ["RANK"], expected, remedy))
    device = device_of_this_rank()
    # The precision that training takes here, so that mfu divides by the rate of the same dtype.
    runs, dtype = [], torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in ("packed", "padded"):
        layout = Layout(name, seq_len, sides, 0.0, max_bad_fraction)
        patch_size = NaViTConfig.preset(model, num_classes=None).patch_size
        data = TrainedImages(dataset, layout, patch_size, num_workers)
        training = Training(
            data,
            model=model,
            shape={"attention": "auto"},
            batch_size=batch_size,
            options={"steps": WARM_UP + steps, "warm_up": 0, "cool_down": 0},
            num_workers=num_workers,
        )
        torch.manual_seed(0)  # for each layout: both start from the same weights
        navit = NaViT(training.config).to(device)
        # As many slots as in batch_size packed rows; padded rows have a seq_len of their own.
        rows = max(1, batch_size * seq_len // data.seq_len)
        loader = PackedLoader(data.packs, rows, num_workers=num_workers)
        # `train` is a generator: nothing runs before the loop below asks for a step.
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
