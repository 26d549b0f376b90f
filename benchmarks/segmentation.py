"""A segmentation toy: shapes on noise, learned from class maps to 0.9 mean IoU on a CPU.

Images of 40 to 72 pixels a side hold up to three discs, squares and triangles of any size, each
kind in colours around one of its own that overlap with the others'. `EpochPacks` packs them anew
every epoch with their class maps, flipped; a NaViT of four blocks without pooling answers for every
cell of 2 x 2 pixels. Validated on 60 other images, in their own sizes.

``python benchmarks/segmentation.py`` writes results/segmentation.md.
"""

from __future__ import annotations

import argparse
import datetime
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PillowImage

from packpipe import Augment, EpochPacks, NaViT, NaViTConfig, PackedLoader
from packpipe.training.loop import TrainConfig, train

PATCH_SIZE, STRIDE, SEQ_LEN, BATCH_SIZE = 8, 2, 256, 2
COLOURS = np.array([[200, 90, 90], [90, 200, 90], [90, 90, 200]])
NAMES = ("background", "disc", "square", "triangle")


def picture_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of an image, and the class of each."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 73, 2)
    classes = np.zeros((height, width), np.uint8)
    pixels = np.full((height, width, 3), 120.0) + rng.normal(0, 20, 3)
    y, x = np.mgrid[:height, :width]
    for _ in range(rng.integers(1, 4)):
        kind, radius = int(rng.integers(3)), rng.uniform(8, 18)
        down, across = y - rng.uniform(8, height - 8), x - rng.uniform(8, width - 8)
        inside = (
            np.hypot(down, across) < radius,
            np.maximum(abs(down), abs(across)) < radius,
            (down < radius) & (down > 2 * abs(across) - radius),
        )[kind]
        classes[inside] = kind + 1
        pixels[inside] = COLOURS[kind] + rng.normal(0, 25, 3)
    pixels += rng.normal(0, 15, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8), classes


def png_of(values: np.ndarray) -> dict[str, bytes | None]:
    """Return an image as `datasets` stores it."""
    buffer = BytesIO()
    PillowImage.fromarray(values).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def dataset_of(seeds: range) -> Dataset:
    """Return images and class maps drawn by their seeds."""
    pairs = [picture_of(seed) for seed in seeds]
    columns = {
        "image": [png_of(pixels) for pixels, _ in pairs],
        "mask": [png_of(classes) for _, classes in pairs],
    }
    return Dataset.from_dict(columns, features=Features({"image": Image(), "mask": Image()}))


def packs_of(dataset: Dataset) -> EpochPacks:
    """Return the images as packs with targets."""
    return EpochPacks(
        dataset,
        SEQ_LEN,
        mask_column="mask",
        target_stride=STRIDE,
        patch_size=PATCH_SIZE,
    )


def main() -> None:
    """Train, and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = NaViT(
        NaViTConfig(
            num_classes=len(NAMES),
            patch_size=PATCH_SIZE,
            dim=64,
            depth=4,
            heads=4,
            pooling="none",
            target_stride=STRIDE,
        )
    )
    loader = PackedLoader(
        packs_of(dataset_of(range(options.images))),
        BATCH_SIZE,
        augment=Augment(flip=0.5, vertical_flip=0.5),
    )
    validate = PackedLoader(packs_of(dataset_of(range(10**6, 10**6 + 60))), BATCH_SIZE, tail="pad")
    config = TrainConfig(
        steps=options.steps,
        learning_rate=2e-3,
        loss="softmax",
        head_weight_decay=0.03,
        val_every=50,
        log_every=50,
    )
    parameters = sum(weight.numel() for weight in model.parameters())
    began, spent = time.perf_counter(), time.process_time()
    lines = []
    for record in train(model, loader, config, validate=validate):
        if record.val_iou is not None:
            real, processor = time.perf_counter() - began, time.process_time() - spent
            figures = f"{record.val_loss:.3f} | {record.val_accuracy:.3f} | {record.val_iou:.3f}"
            lines.append(f"| {record.step} | {figures} | {real:.0f} | {processor:.0f} |")
            print(lines[-1], flush=True)
    head = f"""# Segmentation of drawn shapes

{datetime.date.today()}, CPU, {options.threads} thread(s), torch {torch.__version__};
`python benchmarks/segmentation.py`: {options.images} images, {BATCH_SIZE} rows of {SEQ_LEN} tokens
a step, patches of {PATCH_SIZE} pixels, targets of {STRIDE} x {STRIDE}, {parameters:,} weights.
Figures of 60 other images; seconds on the clock, which stretch on a machine that others use, and
seconds of processor time, both since the first step, validations included.

| step | loss | accuracy | mean IoU | s | processor s |
| ---: | ---: | ---: | ---: | ---: | ---: |
"""
    options.results.mkdir(exist_ok=True)
    text = head + "\n".join(lines) + "\n"
    (options.results / "segmentation.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
