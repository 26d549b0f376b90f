"""`compare_layouts`: training on packed rows against training on padded ones, on your own images.

Both layouts train the same model from the same weights, one step of each in turn, so that other
load on the machine slows both alike. A step of either takes about as long whatever images are in
it, so its median time and the epoch's plan, which says how many steps there are, give the time of
an epoch of these images without running one. The first steps are left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import typer
from datasets import ClassLabel, Dataset
from datasets.utils import tqdm

from packpipe import checks
from packpipe.cli.layouts import Layout
from packpipe.cli.trained_images import TrainedImages
from packpipe.cli.training_run import Training, device_of_this_rank
from packpipe.loading.loader import PackedLoader
from packpipe.model.config import NaViTConfig
from packpipe.model.flops import matrix_rate
from packpipe.model.navit import NaViT
from packpipe.packing.quality import Quality
from packpipe.sources.image_columns import label_column_of
from packpipe.training.figures import Record
from packpipe.training.loop import train

# Steps before the measured ones: the first waits for a batch, and compiles the model on a GPU.
_WARM_UP = {"cuda": 2, "cpu": 1}
_BATCH_SIZE = {"cuda": 8, "cpu": 1}
# Steps that are measured, and for how many seconds new ones begin: together with imports and sizes
# less than 20 seconds on two processors. Two at least are measured.
_STEPS, _SECONDS = 10, 6.0
_UNITS = ((1, "s"), (60, "min"), (3600, "h"))  # of `duration`, with their seconds


@dataclass(frozen=True)
class LayoutFigures:
    """Figures of one layout: of the whole epoch, at the median speed of the measured steps.

    Attributes:
        layout: its name.
        fill: real tokens ÷ slots.
        images_per_s, tokens_per_s: tokens are real ones.
        mfu: useful FLOPs a second ÷ this device's measured rate of matrix products.
        data_wait: share of the time spent waiting for the loader.
        epoch_s: seconds that an epoch takes.
    """

    layout: str
    fill: float
    images_per_s: float
    tokens_per_s: float
    mfu: float
    data_wait: float
    epoch_s: float


@dataclass(frozen=True)
class Comparison:
    """The figures of both layouts; prints as a table, and what it means in a sentence.

    Attributes:
        device: its name.
        matrix_rate: FLOP/s of a large matrix product on it.
        num_images: images an epoch.
        layouts: packed, then padded.
    """

    device: str
    matrix_rate: float
    num_images: int
    layouts: tuple[LayoutFigures, LayoutFigures]

    @property
    def speedup(self) -> float:
        """Images a second with packed rows ÷ images a second with padded ones."""
        packed, padded = self.layouts
        return packed.images_per_s / padded.images_per_s

    @property
    def sentence(self) -> str:
        """What the figures mean for an epoch of these images."""
        packed, padded = self.layouts
        return (
            f"An epoch of these {self.num_images:,} images takes {duration(packed.epoch_s)} packed "
            f"and {duration(padded.epoch_s)} padded: packed gives {self.speedup:.2f} times the "
            f"images a second of padded, where {1 - padded.fill:.0%} of the tokens are padding "
            f"(packed: {1 - packed.fill:.0%})."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {**asdict(self), "speedup": self.speedup, "sentence": self.sentence}

    def __str__(self) -> str:
        lines = [
            f"training on {self.device}, matrix products at {self.matrix_rate / 1e12:.3g} TFLOP/s",
            "layout  padding  images/s  tokens/s  useful MFU  waited for data",
        ]
        for one in self.layouts:
            lines.append(
                f"{one.layout:<6} {1 - one.fill:>8.1%} {one.images_per_s:>9,.1f} "
                f"{one.tokens_per_s:>9,.0f} {one.mfu:>11.1%} {one.data_wait:>16.0%}"
            )
        return "\n".join([*lines, self.sentence])


def duration(seconds: float) -> str:
    """Return a time as people say it, in two figures or whole numbers.

    >>> duration(0.042), duration(9.4), duration(75), duration(4000), duration(200_000)
    ('0.042 s', '9.4 s', '75 s', '67 min', '56 h')
    """
    fits = (one for one in _UNITS if seconds / one[0] < 120)
    size, unit = next(fits, (86400, "days"))
    value = seconds / size
    return f"{value:.2g} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def compare_layouts(
    dataset: Dataset,
    *,
    model: str,
    seq_len: int,
    sides: tuple[int, int],
    batch_size: int | None,
    steps: int | None,
    num_workers: int,
    max_bad_fraction: float = 0.01,
) -> Comparison:
    """Return how fast a model trains on packed and on padded rows of a dataset.

    Padded rows hold one image each and are as long as the largest image. A step has about as many
    slots in either layout.

    Args:
        dataset: images, with labels or without.
        model: a preset's name.
        seq_len: tokens of a packed row.
        sides: (low, high); an image gets as many pixels as a square of a side drawn between them.
        batch_size: packed rows a step; None is 8 on a GPU, 1 on a CPU.
        steps: how many are measured of each layout; None measures 10, or as many as begin within 6
            seconds, but two at least.
        num_workers: threads that decode ahead.
        max_bad_fraction: a larger share of images that cannot be read is an error.

    Raises:
        TypeError, ValueError: an option is wrong, or torchrun started this process.
    """
    if "RANK" in os.environ:
        expected, remedy = "no rank: one device is measured", "run it without torchrun"
        raise ValueError(checks.sentence("RANK", os.environ["RANK"], expected, remedy))
    device = device_of_this_rank()
    # Which classes images have changes no time, so without labels all are of one.
    if label_column_of(dataset.features, "auto") is None:
        one = ClassLabel(names=["image"])
        dataset = dataset.add_column("label", [0] * len(dataset), feature=one)
    # The precision that training takes here, so that mfu divides by the rate of the same dtype.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    warm_up, slots = _WARM_UP[device.type], (batch_size or _BATCH_SIZE[device.type]) * seq_len
    most = warm_up + (steps or _STEPS)
    epochs: dict[str, tuple[Quality, int]] = {}
    runs: dict[str, Iterator[Record]] = {}
    for name in ("packed", "padded"):
        shape = NaViTConfig.preset(model, num_classes=None)
        layout = Layout(
            name, seq_len, sides, 0.0, max_bad_fraction, prefix_tokens=shape.prefix_tokens
        )
        data = TrainedImages(dataset, layout, shape.patch_size, num_workers)
        training = Training(
            data,
            model=model,
            shape={"attention": "auto"},
            batch_size=1,  # the loader below has its own
            options={"steps": most, "warm_up": 0, "cool_down": 0, "log_every": 1},
            num_workers=num_workers,
        )
        torch.manual_seed(0)  # for each layout: both start from the same weights
        navit = NaViT(training.config).to(device)
        # As many slots in either layout; padded rows have a seq_len of their own.
        rows = max(1, slots // data.seq_len)
        loader = PackedLoader(data.packs, rows, tail="pad", num_workers=num_workers)
        # `train` is a generator: nothing runs before the loop below asks for a step.
        runs[name] = train(navit, loader, training.train_config)
        epochs[name] = data.packs.plan(0, 0).quality, rows
    count = f"at most {_STEPS}" if steps is None else f"{steps:,}"
    turns = f"training {model} on packed and on padded rows by turns, {count} steps of each"
    typer.echo(f"{turns}, after {warm_up} not counted ...", err=True)
    found: dict[str, list[tuple[float, Record]]] = {name: [] for name in runs}
    first = time.perf_counter()
    # disable=None: where stderr is no terminal, nothing is shown.
    for step in tqdm(range(most), unit="step", leave=False, disable=None):
        is_late = time.perf_counter() - first > _SECONDS
        if steps is None and is_late and step >= warm_up + 2:
            break
        # One step of each by turns, so that whatever slows the machine slows both.
        for name, run in runs.items():
            # Not by the record, whose time begins with the record before it: a step of the other
            # layout lies in between.
            began = time.perf_counter()
            record = next(run)
            if device.type == "cuda":  # where the backward pass is not done yet
                torch.cuda.synchronize(device)
            found[name].append((time.perf_counter() - began, record))
    rate = matrix_rate(device, dtype)
    packed, padded = (
        _figures(name, taken[warm_up:], *epochs[name], rate) for name, taken in found.items()
    )
    called = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return Comparison(called, rate, epochs["packed"][0].num_examples, (packed, padded))


def _figures(
    layout: str, taken: list[tuple[float, Record]], epoch: Quality, rows: int, rate: float
) -> LayoutFigures:
    """Return the figures of an epoch, from seconds and records of steps of so many rows each."""
    epoch_s = epoch.num_packs / rows * median(seconds for seconds, _ in taken)
    tokens_per_s = epoch.num_tokens / epoch_s
    slots = rows * epoch.seq_len
    return LayoutFigures(
        layout=layout,
        fill=epoch.fill,
        images_per_s=epoch.num_examples / epoch_s,
        tokens_per_s=tokens_per_s,
        mfu=median(one.flops_per_s / one.tokens_per_s for _, one in taken) * tokens_per_s / rate,
        # A record's own seconds are its tokens ÷ tokens_per_s.
        data_wait=median(
            one.data_wait * one.fill * slots / one.tokens_per_s / seconds for seconds, one in taken
        ),
        epoch_s=epoch_s,
    )
