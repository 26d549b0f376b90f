"""Datasets of small images for the tests, encoded for real."""

from io import BytesIO

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage

SIZES = [(40, 60), (16, 16), (90, 33), (8, 120), (64, 64), (1, 7), (50, 20), (33, 90), (70, 70)]


def encoded_image(height, width, seed=0, image_format="PNG", **save):
    """Return the bytes of an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = BytesIO()
    PillowImage.fromarray(pixels).save(buffer, image_format, **save)
    return buffer.getvalue()


def encoded_images():
    """Return one encoded image for each of SIZES."""
    return [encoded_image(height, width, seed) for seed, (height, width) in enumerate(SIZES)]


def dataset_of(images, labels=None, names=("cat", "dog", "owl")):
    """Return a Dataset of encoded images; labels 0, 1, 2, 0, ... unless given."""
    if labels is None:
        labels = [row % len(names) for row in range(len(images))]
    features = Features(
        {"image": Image(), "label": ClassLabel(names=list(names)), "n": Value("int32")}
    )
    columns = {
        "image": [{"bytes": image, "path": None} for image in images],
        "label": labels,
        "n": list(range(len(images))),
    }
    return Dataset.from_dict(columns, features=features)


def two_classes(folder, dark, light):
    """Write 8 images of each of two classes, of several sizes and of two mean levels."""
    draw = np.random.default_rng(0)
    for name, level in (("dark", dark), ("light", light)):
        (folder / name).mkdir()
        for number in range(8):
            size = (int(draw.integers(20, 90)), int(draw.integers(20, 90)), 3)
            pixels = np.clip(draw.normal(level, 20, size), 0, 255).astype(np.uint8)
            PillowImage.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def row_bytes(rows):
    """Return every byte of some Rows, column by column."""
    names = ("offsets", "seq_lens", "grid_hw", "image_hw", "example_index")
    arrays = [getattr(rows, name) for name in names]
    arrays += [rows.patches, rows.segment_ids, rows.coords]
    found = [(array.dtype, array.shape, np.ascontiguousarray(array).tobytes()) for array in arrays]
    labels = rows.segments.get("labels")
    return [*found, None if labels is None else labels.to_pylist()]
