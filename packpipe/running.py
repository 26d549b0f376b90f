"""`packpipe train`: a dataset to a trained model, on one device or torchrun's ranks (floor 3)."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset

from packpipe import checks
from packpipe.distributions import Constant, Uniform
from packpipe.epochs import EpochPacks
from packpipe.loader import PackedLoader
from packpipe.model_config import NaViTConfig
from packpipe.navit import NaViT
from packpipe.plots import plot_training
from packpipe.resolution import Side, Square
from packpipe.source import label_column_of
from packpipe.training import TrainConfig, read_log, train

LAYOUTS = ("packed", "padded", "bucketed", "square")
TRIM = 64


@dataclass(frozen=True)
class Layout:
    """How images become rows: NaViT's way, or one of those it is compared with.

    Attributes:
        name: ``"packed"``; ``"padded"``, one image a row as long as the largest; ``"bucketed"``,
            the same with rows of like length in a batch, cut to it; ``"square"``, a plain ViT's.
        seq_len: tokens a row, of packed.
        sides: images have as many pixels as squares of a side drawn between these; square takes
            the second.
        drop_rate: share of tokens dropped, of packed.
    """

    name: str
    seq_len: int
    sides: tuple[int, int]
    drop_rate: float

    def packs(self, dataset: Dataset, patch_size: int, num_workers: int) -> EpochPacks:
        """Return the packs of a dataset."""
        checks.choice("layout", self.name, LAYOUTS, "choose a layout")
        low, high = self.sides
        drawn = Side(Uniform(low, high) if low < high else Constant(high))
        options: dict[str, Any] = {"resolution": drawn, "drop_rate": self.drop_rate}
        seq_len = self.seq_len
        if self.name != "packed":
            options = {"resolution": drawn, "max_segments": 1}
            seq_len = max(1, high // patch_size) ** 2
        if self.name == "square":
            options["resolution"] = Square(Constant(high))
        return EpochPacks(
            dataset, seq_len, patch_size=patch_size, num_workers=max(1, num_workers), **options
        )


def run_training(
    dataset: Dataset,
    output: Path,
    *,
    layout: Layout,
    model: str,
    shape: dict[str, Any],
    batch_size: int,
    training: dict[str, Any],
    num_workers: int,
    seed: int,
    tensorboard: bool,
) -> None:
    """Train and leave checkpoints, log.jsonl and training.png in output.

    Raises:
        TypeError, ValueError: an option is wrong.
    """
    device = _device()
    is_first = int(os.environ.get("RANK", 0)) == 0
    dataset, num_classes = _labelled(dataset)
    if layout.name in ("padded", "bucketed") and shape["attention"] == "auto":
        shape = {**shape, "attention": "reference"}  # padding costs what it costs elsewhere
    config = NaViTConfig.preset(model, num_classes=num_classes, **shape)
    options = TrainConfig(**training, trim=TRIM if layout.name == "bucketed" else None)
    packs = layout.packs(dataset, config.patch_size, num_workers)
    torch.manual_seed(seed)
    navit = NaViT(config).to(device)
    loader = PackedLoader(
        packs,
        batch_size,
        seed=seed,
        balance=layout.name == "bucketed",
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    writer = _tensorboard(output) if tensorboard and is_first else None
    for record in train(navit, loader, options, folder=output):
        if is_first:
            sys.stdout.write(
                f"step {record.step}  loss {record.loss:.4f}  accuracy {record.accuracy:.3f}  "
                f"{record.images_per_s:,.0f} images/s  fill {record.fill:.3f}  "
                f"waited {record.data_wait:.0%}\n"
            )
            sys.stdout.flush()
        if writer:
            for name, value in asdict(record).items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, record.step)
    if writer:
        writer.close()
    if is_first:
        plot_training(read_log(output)).savefig(output / "training.png", dpi=100)
        sys.stdout.write(f"checkpoints, log and plot are in {output}\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device() -> torch.device:
    """Return this rank's device, its process group made if torchrun started it."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _tensorboard(output: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ValueError(
            "tensorboard is not installed; pip install 'packpipe[tensorboard]'"
        ) from None
    return SummaryWriter(str(output / "tensorboard"))


def _labelled(dataset: Dataset) -> tuple[Dataset, int]:
    """Return a dataset whose labels are numbers, and how many there are."""
    column = label_column_of(dataset.features, "auto")
    if column is None:
        expected, remedy = "a label column among them", "name it label"
        raise ValueError(checks.sentence("columns", dataset.column_names, expected, remedy))
    if not isinstance(dataset.features[column], ClassLabel):
        dataset = dataset.class_encode_column(column)
    return dataset, int(dataset.features[column].num_classes)
