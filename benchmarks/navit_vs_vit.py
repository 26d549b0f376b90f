"""NaViT against the same trunk on squares: accuracy by compute, on real pictures.

    pip install -e '.[torch]'
    python benchmarks/navit_vs_vit.py --data FOLDER    # a GPU, 16 processors: half an hour
    python benchmarks/navit_vs_vit.py --data FOLDER --epochs 10 --captured --seconds 440
    python benchmarks/navit_vs_vit.py --data FOLDER --device cpu --tiny
    python benchmarks/navit_vs_vit.py --data FOLDER --device cpu --tiny --epochs 1 --few 300

FOLDER holds pictures.parquet (columns image, label, split, source). Same trunk, optimiser, rate,
images a step, no augmentation but NaViT's own: r ~ U(64, 224), dropping that falls slowly from 0.8
to 0.2. The square model sees 224 × 224. Lengths of training are shares of the square model's
FLOPs; each is a run with its own schedule. Controls: every image at one area, so that its size
tells nothing; pictures of one source alone. Writes navit_vs_vit.md and
navit_vs_vit.json (navit_vs_vit_tiny of --tiny).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from packpipe import Constant, EpochPacks, OverTraining, PackedLoader, Side, Square, Uniform, pack
from packpipe.model.config import NaViTConfig
from packpipe.model.flops import TRAINING, forward_flops
from packpipe.model.navit import NaViT
from packpipe.model.predict import predict_packs
from packpipe.philox import Key
from packpipe.rows.rows import Rows
from packpipe.training.evaluation import accuracy, calibration_error
from packpipe.training.loop import TrainConfig, train

RESULTS = Path(__file__).parent / "results"
SIDE = 224
IMAGES_A_STEP = 128
ONE_SOURCE = "openclipart-png"
COMPARED = ("accuracy", "PFLOPs", "seconds")
# A square model, and what is compared with it.
PAIRS = {"square": ("NaViT", "NaViT, one area"), "square, one source": ("NaViT, one source",)}


@dataclass(frozen=True)
class Scale:
    """How large the experiment is."""

    model: dict[str, Any]
    epochs: int  # of the square model
    side: int
    patch: int
    learning_rate: float


FULL = Scale(
    {"dim": 192, "depth": 12, "heads": 3}, epochs=30, side=224, patch=16, learning_rate=1e-3
)
TINY = Scale({"dim": 64, "depth": 3, "heads": 2}, epochs=6, side=96, patch=16, learning_rate=2e-3)


@dataclass(frozen=True)
class Run:
    """A training: which images, how they are seen, for which share of the square model's FLOPs."""

    name: str
    resolution: str
    share: float
    source: str = ""


RUNS = [
    Run("square", "square", 1.0),
    Run("NaViT", "drawn", 0.25),
    Run("NaViT", "drawn", 0.5),
    Run("NaViT, one area", "one area", 0.25),
    Run("square", "square", 0.25),
    Run("square, one source", "square", 1.0, ONE_SOURCE),
    Run("NaViT, one source", "drawn", 0.25, ONE_SOURCE),
    Run("NaViT", "drawn", 1.0),
]


def main() -> None:
    """Train what the time allows, print a table, draw it and write both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model and few epochs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="start no run that would not end by then"
    )
    parser.add_argument("--captured", action="store_true", help="a step as one graph, on a GPU")
    parser.add_argument("--few", type=int, help="pictures, the first of a random order")
    parser.add_argument("--num-workers", type=int, default=8)
    parser.add_argument("--epochs", type=int, help="of the square model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    started = time.perf_counter()
    scale = TINY if options.tiny else FULL
    epochs = options.epochs or scale.epochs
    pictures = datasets.load_dataset(
        "parquet", data_files=str(options.data / "pictures.parquet"), split="train"
    )
    if options.few:
        pictures = pictures.shuffle(seed=0).select(range(options.few))
    pictures = decoded_once(pictures, options.num_workers)
    print(
        f"{len(pictures)} pictures decoded after {time.perf_counter() - started:.0f} s", flush=True
    )
    device = torch.device(options.device)
    records: list[dict[str, Any]] = []
    torch._dynamo.config.recompile_limit = 64  # all trials of a seed, each of its own shape
    trials: dict[Run, Trial] = {}
    took = dict.fromkeys(RUNS, 0.0)  # as far as is known: the first seed is tried
    # Seed by seed, so that all controls are there when the time is over.
    for seed, run in product(range(options.seeds), RUNS):
        began = time.perf_counter()
        if began - started + took[run] > options.seconds:
            print(f"no time for {run.name}, {run.share}, seed {seed}", flush=True)
            continue
        if run not in trials:
            chosen = where(pictures, "source", run.source) if run.source else pictures
            trials[run] = Trial(
                chosen, run, scale, epochs, device, options.num_workers, options.captured
            )
        records.append(trials[run].result(seed))
        took[run] = time.perf_counter() - began
        print(records[-1], flush=True)
        write(records, options, scale, epochs, device)
    print(written(options, ".md").read_text())


def decoded_once(pictures: datasets.Dataset, num_workers: int) -> datasets.Dataset:
    """Return the pictures as BMP, which costs nothing to decode: the codec is not compared."""
    raw = pictures.cast_column("image", datasets.Image(decode=False))

    def bmp(encoded: dict[str, Any]) -> dict[str, Any]:
        out = BytesIO()
        with Image.open(BytesIO(encoded["bytes"])) as image:
            image.convert("RGB").save(out, "BMP")
        return {"bytes": out.getvalue(), "path": None}

    with ThreadPoolExecutor(num_workers) as executor:
        images = list(executor.map(bmp, raw["image"]))
    columns = {name: pictures[name][:] for name in ("label", "split", "source")}
    features = {name: pictures.features[name] for name in ("label", "split", "source")}
    return datasets.Dataset.from_dict(
        {"image": images, **columns},
        features=datasets.Features({"image": datasets.Image(), **features}),
    )


def where(pictures: datasets.Dataset, column: str, value: str) -> datasets.Dataset:
    """Return the pictures that have a value in a column."""
    return pictures.filter(lambda one: one == value, input_columns=column)


@dataclass(frozen=True)
class AllEpochs:
    """The epochs of a training as one, whose batches worker processes fill without a break.

    Attributes:
        packs: what each epoch is planned from.
        firsts: int64[epochs + 1], the first pack of each epoch; batches do not cross them.
    """

    packs: EpochPacks
    firsts: NDArray[np.int64]

    @property
    def max_segments(self) -> int:
        """Most segments a pack may hold."""
        return self.packs.max_segments

    def num_packs(self, key: Key) -> int:
        """Return the packs of all epochs."""
        del key
        return int(self.firsts[-1])

    def fingerprint(self, key: Key) -> str:
        """Return the fingerprint of the first epoch's plan."""
        return self.packs.fingerprint(key)

    def work(self, key: Key) -> NDArray[np.int64]:
        """Return the attention work of the packs of all epochs."""
        epochs = range(len(self.firsts) - 1)
        return np.concatenate([self.packs.work(Key(key.seed, epoch)) for epoch in epochs])

    def rows(self, key: Key, packs: NDArray[np.int64]) -> Rows:
        """Return some packs, all of one epoch."""
        within = int(np.searchsorted(self.firsts, packs[0], side="right")) - 1
        return self.packs.rows(Key(key.seed, within), packs - self.firsts[within])


class Trial:
    """A model trained once a seed on one choice of images; compiled once."""

    def __init__(
        self,
        pictures: datasets.Dataset,
        run: Run,
        scale: Scale,
        epochs: int,
        device: torch.device,
        num_workers: int,
        captured: bool,
    ) -> None:
        self.run, self.scale, self.device, self.num_workers = run, scale, device, num_workers
        self.captured = captured
        training, test = (where(pictures, "split", which) for which in ("train", "test"))
        num_classes = pictures.features["label"].num_classes
        self.shape = NaViTConfig(
            num_classes=num_classes, patch_size=scale.patch, max_side=256, **scale.model
        )
        self.model = NaViT(self.shape).to(device)
        square = self.packs(training, "square", 1)
        budget = run.share * epochs * self.flops(square, [0])
        # The falling schedule depends on how many epochs there will be.
        count = epochs
        if run.resolution != "square":
            for _ in range(3):
                packs = self.packs(training, run.resolution, count)
                sampled = sorted({round(place * (count - 1) / 8) for place in range(9)})
                count = max(1, round(budget * len(sampled) / self.flops(packs, sampled)))
        else:
            count = max(1, round(run.share * epochs))
        self.epochs, self.training = count, self.packs(training, run.resolution, count)
        self.test = pack(
            test,
            label_column="label",
            num_workers=num_workers,
            progress=False,
            **self.options("square" if run.resolution == "square" else "one area"),
        )

    def options(self, resolution: str) -> dict[str, Any]:
        """Return how a model sees images."""
        side, patch = self.scale.side, self.scale.patch
        laws = {
            "square": Square(Constant(side)),
            "one area": Side(Constant(side)),
            "drawn": Side(Uniform(64 if side > 128 else 32, side)),
        }
        tokens = (side // patch) ** 2
        seq_len = 5 * tokens  # squares fill it exactly
        return {"seq_len": seq_len, "patch_size": patch, "resolution": laws[resolution]}

    def packs(self, pictures: datasets.Dataset, resolution: str, epochs: int) -> EpochPacks:
        """Return the images as a model is trained on them: planned anew each epoch."""
        dropping: dict[str, Any] = {}
        if resolution != "square":
            falling = OverTraining(0.2, 0.8, midpoint=2 / 3, width=-0.2)
            dropping = {"drop_rate": falling, "epochs": epochs}
        return EpochPacks(
            pictures,
            label_column="label",
            num_workers=self.num_workers,
            **self.options(resolution),
            **dropping,
        )

    def flops(self, packs: EpochPacks, epochs: Iterable[int]) -> int:
        """Return the FLOPs of training on some epochs."""
        lens = (packs.plan(0, epoch).num_keep.copy() for epoch in epochs)
        return sum(
            TRAINING * forward_flops(self.shape, torch.from_numpy(one.copy())) for one in lens
        )

    def result(self, seed: int) -> dict[str, Any]:
        """Return what one training gives."""
        torch.manual_seed(seed)
        self.model.load_state_dict(NaViT(self.shape).state_dict())
        counted = [self.training.plan(seed, epoch) for epoch in range(self.epochs)]
        images, packs = (sum(map(len, many)) for many in ([p.index for p in counted], counted))
        # Of few pictures, fewer a step: each epoch has one.
        rows = min(max(1, round(IMAGES_A_STEP * packs / images)), *map(len, counted))
        flops = sum(
            TRAINING * forward_flops(self.shape, torch.from_numpy(one.num_keep.copy()))
            for one in counted
        )
        sizes = [len(one) // rows * rows for one in counted]  # unfilled batches are left out
        firsts = np.cumsum([0, *sizes])
        loader = PackedLoader(
            AllEpochs(self.training, firsts),
            rows,
            rank=0,
            world_size=1,
            seed=seed,
            num_workers=self.num_workers,
            workers="processes",
            pin_memory=self.device.type == "cuda",
        )
        steps = int(firsts[-1]) // rows
        config = TrainConfig(
            steps=steps,
            learning_rate=self.scale.learning_rate,
            loss="softmax",
            head_weight_decay=0.03,
            captured=self.captured,
            log_every=max(1, steps // 20),
        )
        began = time.perf_counter()
        waits = [record.data_wait for record in train(self.model, loader, config)]
        seconds = time.perf_counter() - began
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            answers = predict_packs(self.model, self.test, batch_size=rows)
        return {
            "run": self.run.name,
            "share": self.run.share,
            "seed": seed,
            "accuracy": accuracy(answers),
            "calibration error": calibration_error(answers),
            "PFLOPs": flops / 1e15,
            "seconds": seconds,
            "data wait": statistics.mean(waits),
            "images seen": images,
            "steps": steps,
        }


def written(options: argparse.Namespace, suffix: str) -> Path:
    """Return where a result goes."""
    name = "navit_vs_vit_tiny" if options.tiny else "navit_vs_vit"
    return Path(options.results) / f"{name}{suffix}"


def write(
    records: list[dict[str, Any]],
    options: argparse.Namespace,
    scale: Scale,
    epochs: int,
    device: torch.device,
) -> None:
    """Write what has been measured so far, as JSON and as a table."""
    options.results.mkdir(parents=True, exist_ok=True)
    written(options, ".json").write_text(json.dumps(records, indent=1) + "\n")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    command = f"python benchmarks/navit_vs_vit.py --data FOLDER{' --tiny' if options.tiny else ''}"
    if device.type == "cpu":
        command += " --device cpu"
    given = {"epochs": options.epochs, "few": options.few}
    command += "".join(f" --{name} {value}" for name, value in given.items() if value)
    command += " --captured" if options.captured else ""
    columns = "share of FLOPs | PFLOPs | images seen | accuracy | calibration error | seconds"
    heading = (
        f"# NaViT against the same trunk on squares\n\n`{command}`, {datetime.date.today()}: "
        f"{name}, torch {torch.__version__}, Python {platform.python_version()}. Trunk "
        f"{scale.model}, patches of {scale.patch}, {epochs} epochs of the square model, "
        f"{options.seeds} seeds; mean ± half the range (runs). Seconds include waiting for images, "
        f"which {options.num_workers} processes resize anew each epoch.\n"
    )
    lines = [heading, f"| model | {columns} |", "| --- " + "| ---: " * 6 + "|"]
    for (run, share), group in grouped(records).items():
        values = {key: [one[key] for one in group] for key in group[0] if key not in ("run",)}
        mean = {key: statistics.mean(value) for key, value in values.items()}
        spread = (max(values["accuracy"]) - min(values["accuracy"])) / 2
        lines.append(
            f"| {run} | {share:.2f} | {mean['PFLOPs']:.3g} | {mean['images seen']:,.0f} "
            f"| {mean['accuracy']:.1%} ± {spread:.1%} ({len(group)}) "
            f"| {mean['calibration error']:.3f} | {mean['seconds']:.0f} |"
        )
    lines += ["", *verdicts(records)]
    written(options, ".md").write_text("\n".join(lines) + "\n")


def verdicts(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what each NaViT needs to be as good as the square model: FLOPs, and seconds."""
    means = {
        key: {name: statistics.mean(one[name] for one in group) for name in COMPARED}
        for key, group in grouped(records).items()
    }
    for square, others in PAIRS.items():
        wanted = means.get((square, 1.0))
        for other in others if wanted else ():
            good = [
                found
                for (name, _), found in sorted(means.items(), key=lambda one: one[0])
                if name == other and found["accuracy"] >= wanted["accuracy"]
            ]
            if not good:
                yield f"{other}: no length that was tried is as good as {square} of full length."
                continue
            flops, seconds = (good[0][name] / wanted[name] for name in ("PFLOPs", "seconds"))
            yield (
                f"{other}: as good as {square} of full length at {flops:.0%} of its FLOPs and "
                f"{seconds:.0%} of its seconds."
            )


def grouped(records: list[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Return the records by run and share."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["run"], record["share"]), []).append(record)
    return groups


if __name__ == "__main__":
    main()
