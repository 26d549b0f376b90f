"""Does augmentation help: accuracy with and without it at equal compute, on real pictures.

    pip install -e '.[torch,plots]'
    python benchmarks/augment_helps.py --data FOLDER [--epochs 12] [--seeds 3]

FOLDER holds pictures.parquet (columns image, label, split, source). A small trunk on the CPU, every
image at one area, so that its size tells nothing of its class. All arms take the same steps of the
same number of images and, as a crop is enlarged to that area too, about the same tokens; the table
gives the FLOPs. Test images are whole and unchanged. Writes augment_helps.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from navit_vs_vit import IMAGES_A_STEP, TINY, decoded_once, where

from packpipe import Augment, Constant, Crop, EpochPacks, PackedLoader, Side, Uniform, pack
from packpipe.model.config import NaViTConfig
from packpipe.model.flops import TRAINING, forward_flops
from packpipe.model.navit import NaViT
from packpipe.model.predict import predict_packs
from packpipe.training.evaluation import accuracy, calibration_error
from packpipe.training.loop import TrainConfig, train

SIDE = 64  # of a square of as many pixels as every image has
RESULT = Path(__file__).parent / "results" / "augment_helps.md"


@dataclass(frozen=True)
class Arm:
    """A way to show images in training."""

    name: str
    crop: Crop | None = None
    augment: Augment | None = None


ARMS = [
    Arm("nothing"),
    Arm("flips", augment=Augment.preset("inception")),
    Arm("crops of 0.35 to 1, flips", Crop(Uniform(0.35, 1)), Augment.preset("inception")),
    Arm("crops of 0.35 to 1, flips, colours", Crop(Uniform(0.35, 1)), Augment.preset("three")),
]


def main() -> None:
    """Train every arm with every seed, seed by seed, and write the table after each run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    path = str(options.data / "pictures.parquet")
    pictures = decoded_once(datasets.load_dataset("parquet", data_files=path, split="train"), 2)
    training, test = (where(pictures, "split", which) for which in ("train", "test"))
    num_classes = pictures.features["label"].num_classes
    shape = NaViTConfig(num_classes=num_classes, patch_size=TINY.patch, max_side=256, **TINY.model)
    law = {
        "seq_len": 5 * (SIDE // TINY.patch) ** 2,
        "patch_size": TINY.patch,
        "resolution": Side(Constant(SIDE)),
        "label_column": "label",
    }
    shown = pack(test, progress=False, **law)
    records: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for arm in ARMS:
            packs = EpochPacks(training, crop=arm.crop, **law)
            found = trained(arm, packs, shape, seed, options.epochs)
            model = found.pop("model")
            answers = predict_packs(model, shown, batch_size=8)
            found |= {"accuracy": accuracy(answers), "error": calibration_error(answers)}
            records.append({"arm": arm.name, "seed": seed, **found})
            print(records[-1], flush=True)
            write(records, options)


def trained(
    arm: Arm, packs: EpochPacks, shape: NaViTConfig, seed: int, epochs: int
) -> dict[str, Any]:
    """Return a model trained on so many epochs, and what that took."""
    plans = [packs.plan(seed, epoch) for epoch in range(epochs)]
    images, rows = sum(len(plan.index) for plan in plans), sum(map(len, plans))
    batch_size = max(1, round(IMAGES_A_STEP * rows / images))
    flops = sum(
        TRAINING * forward_flops(shape, torch.from_numpy(plan.num_keep.copy())) for plan in plans
    )
    loader = PackedLoader(
        packs, batch_size, seed=seed, rank=0, world_size=1, num_workers=1, augment=arm.augment
    )
    steps = sum(len(plan) // batch_size for plan in plans)
    config = TrainConfig(
        steps=steps,
        learning_rate=TINY.learning_rate,
        loss="softmax",
        head_weight_decay=0.03,
        log_every=max(1, steps // 20),
    )
    torch.manual_seed(seed)
    model = NaViT(shape)
    began = time.perf_counter()
    losses = [record.loss for record in train(model, loader, config)]
    return {
        "model": model,
        "loss": losses[-1],
        "steps": steps,
        "images": images,
        "PFLOPs": flops / 1e15,
        "seconds": time.perf_counter() - began,
    }


def write(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what has been measured so far."""
    columns = "accuracy | of each seed | calibration error | last training loss | PFLOPs | seconds"
    lines = [
        "# Does augmentation help\n",
        (
            f"`python benchmarks/augment_helps.py --data FOLDER --epochs {options.epochs} --seeds "
            f"{options.seeds}`, {datetime.date.today()}: CPU, torch {torch.__version__}, Python "
            f"{platform.python_version()}. Trunk {TINY.model}, patches of {TINY.patch}, every "
            f"image at {SIDE}² pixels, {options.epochs} epochs of 6,295 pictures of 26 "
            "classes; 1,573 others, whole and unchanged, are the test. Mean ± half the range. "
            "Seconds are of a machine that did other work, too.\n"
        ),
        f"| shown in training | {columns} |",
        "| --- | ---: | --- " + "| ---: " * 4 + "|",
    ]
    for arm in ARMS:
        own = [record for record in records if record["arm"] == arm.name]
        if not own:
            continue
        found = [record["accuracy"] for record in own]
        mean = {
            name: statistics.mean(record[name] for record in own)
            for name in ("error", "loss", "PFLOPs", "seconds")
        }
        each = ", ".join(f"{one:.1%}" for one in found)
        lines.append(
            f"| {arm.name} | {statistics.mean(found):.1%} ± {(max(found) - min(found)) / 2:.1%} "
            f"| {each} | {mean['error']:.3f} | {mean['loss']:.2f} | {mean['PFLOPs']:.3g} "
            f"| {mean['seconds']:.0f} |"
        )
    options.results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
