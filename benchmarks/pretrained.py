"""An encoder's vectors: packed rows beside what its own library does, at equal weights and images.

    pip install -e '.[torch]' transformers
    python benchmarks/pretrained.py --data FOLDER

SigLIP 2 NaFlex, four blocks of width 384, random weights, float32, one thread. *End to end* goes
from encoded pictures to vectors: transformers' image processor of Pillow and its model, which pads
to 256 patches, against `packpipe.predict`. *The model alone* takes patches that are there already,
of images at their own size (at most 256 patches) and of images enlarged to 256, where
there is no padding to save. CPU seconds, medians of the rounds; all arms take turns. FOLDER holds
pictures.parquet (column image). Writes pretrained.md.
"""

from __future__ import annotations

import argparse
import datetime
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from datasets import Image, load_dataset
from PIL import Image as Pillow
from torch import Tensor

from packpipe import (
    EpochPacks,
    NaViT,
    PackConfig,
    PackedBatch,
    PackedLoader,
    from_pretrained,
    predict,
)

RESULTS = Path(__file__).parent / "results"
LIMIT, BATCH = 256, 8
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
}
# What an arm does: its vectors, in the order of the images.
Arm = Callable[[], Tensor]


def main() -> None:
    """Measure, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    original = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SHAPE)).eval()
    processor = transformers.Siglip2ImageProcessorPil(max_num_patches=LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        original.save_pretrained(folder)
        processor.save_pretrained(folder)
        model, packing = from_pretrained(folder)
    path = str(options.data / "pictures.parquet")
    pictures = load_dataset("parquet", data_files=path, split="train").shuffle(seed=0)
    pictures = pictures.select(range(options.images)).select_columns("image")
    encoded = [one["bytes"] for one in pictures.cast_column("image", Image(decode=False))["image"]]
    text = heading(options)
    own = PackConfig(**packing.to_options() | {"resolution": "native"})
    arms = {
        "transformers: processor, model padded to 256": lambda: processed(
            original, processor, encoded
        ),
        "packpipe, enlarged to 256 as the processor does": lambda: predict(
            model, encoded, batch_size=2, **packing.to_options()
        ),
        "packpipe, own size, at most 256": lambda: predict(
            model, encoded, batch_size=2, **own.to_options()
        ),
    }
    text += table("end to end", arms, options, same=2)
    for name, config in (("own size, at most 256", own), ("enlarged to 256", packing)):
        packs = EpochPacks(pictures, label_column=None, num_workers=1, **config.to_options())
        loader = PackedLoader(packs, 2, rank=0, world_size=1, tail="pad", num_workers=0)
        text += table(
            f"the model alone, {name}", model_arms(original, model, list(loader)), options
        )
    print(text)
    options.results.mkdir(exist_ok=True, parents=True)
    (options.results / "pretrained.md").write_text(text)


def processed(original: torch.nn.Module, processor: object, encoded: list[bytes]) -> Tensor:
    """Return the vectors as transformers computes them from encoded pictures."""
    vectors = []
    for first in range(0, len(encoded), BATCH):
        images = [Pillow.open(io.BytesIO(one)).convert("RGB") for one in encoded[first:][:BATCH]]
        inputs = processor(images=images, return_tensors="pt")
        vectors.append(original(**inputs).pooler_output)
    return torch.cat(vectors)


def model_arms(
    original: torch.nn.Module, model: NaViT, batches: list[PackedBatch]
) -> dict[str, Arm]:
    """Return the ways to bring the images of some batches through the model; padded ones first."""
    images = {}
    for batch in batches:
        for row, lens in enumerate(batch.seq_lens.tolist()):
            place = 0
            for number, length in enumerate(filter(None, lens)):
                patches = batch.patches[row, place : place + length]
                index = int(batch.example_index[row, number])
                images[index] = patches, batch.grid_hw[row, number].tolist()
                place += length
    count = len(images)
    arrival = [list(range(count))[first : first + BATCH] for first in range(0, count, BATCH)]
    by_length = sorted(images, key=lambda index: len(images[index][0]))
    sorted_batches = [by_length[first : first + BATCH] for first in range(0, count, BATCH)]

    def padded(groups: list[list[int]], limit: int | None) -> Tensor:
        vectors = torch.empty(count, model.config.dim)
        for group in groups:
            most = limit or max(len(images[index][0]) for index in group)
            pixels = torch.zeros(len(group), most, model.config.patch_size**2 * 3)
            mask = torch.zeros(len(group), most, dtype=torch.int32)
            for place, index in enumerate(group):
                patches = images[index][0]
                pixels[place, : len(patches)] = patches / 127.5 - 1
                mask[place, : len(patches)] = 1
            shapes = torch.tensor([images[index][1] for index in group])
            found = original(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)
            vectors[group] = found.pooler_output
        return vectors

    def rows() -> Tensor:
        vectors = torch.empty(count, model.config.dim)
        for batch in batches:
            vectors[batch.example_index[batch.present]] = model(batch)[batch.present]
        return vectors

    return {
        "padded to 256, batches of 8": lambda: padded(arrival, LIMIT),
        "padded to the longest of 8": lambda: padded(arrival, None),
        "the same, sorted by length": lambda: padded(sorted_batches, None),
        "one image a call": lambda: padded([[index] for index in images], None),
        "packed rows of 1024": rows,
    }


def table(title: str, arms: dict[str, Arm], options: argparse.Namespace, same: int = 0) -> str:
    """Return the arms' times; the first ``same`` arms (0 for all) must give the same vectors."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    vectors = {}
    with torch.inference_mode():
        for name, arm in arms.items():  # warms up
            vectors[name] = arm()
        for _ in range(options.rounds):
            for name, arm in arms.items():
                began = time.process_time()
                arm()
                seconds[name].append(time.process_time() - began)
    first, *others = list(vectors.values())[: same or None]
    difference = max(float((one - first).abs().max()) for one in others)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    base = list(median.values())[1 if same else -1]
    lines = [f"| {title} | images/s | time ÷ packed |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {options.images / one:.1f} | {one / base:.2f} |"
        for name, one in median.items()
    ]
    which = f"The first {same}" if same else "All"
    lines.append(
        f"\n{which} give the same vectors to {difference:.1e} (largest {first.abs().max():.1f})."
    )
    return "\n" + "\n".join(lines) + "\n"


def heading(options: argparse.Namespace) -> str:
    """Return what ran where."""
    return (
        f"# Pretrained encoders\n\n`python benchmarks/pretrained.py`, {datetime.date.today()}: one "
        f"thread ({platform.machine()}), torch {torch.__version__}, transformers "
        f"{transformers.__version__}. SigLIP 2 NaFlex with {SHAPE['num_hidden_layers']} blocks of "
        f"width {SHAPE['hidden_size']}, random weights, float32; {options.images} pictures; CPU "
        f"seconds, medians of {options.rounds} rounds.\n"
    )


if __name__ == "__main__":
    main()
