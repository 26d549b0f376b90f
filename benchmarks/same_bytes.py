"""Does a change leave every byte as it was? What two checkouts make, compared file by file.

    python benchmarks/same_bytes.py --before CHECKOUT [--after CHECKOUT] [--work FOLDER]

`--before` is a checkout without the change, `--after` one with it: this one, if it is left out.
Each makes the same things, by public names alone: rows of images, tokens and pairs, plans, packs of
lengths, rows of `map`, every batch of loaders, states in the middle, a training with its
checkpoints, figures, and what `verify` says of sound and damaged folders. Then the checkout after
goes on from what the one before left: folders, plans, states, checkpoints. Prints a row a kind;
names each difference, and ends with status 1 if there is one.

Files are compared byte for byte. Of `log.jsonl` the figures that are timed are left out; of rows of
`map`, the name of their cache, which has a row of its own: it changes with the modules that classes
are in, and `map` then packs once more. Where the checkouts are of two versions, the records of
folders are compared without it, folders may be refused, and what is named by a digest of the
version is not compared.

Nothing is written into the checkouts. Takes two and a half minutes of one processor, a minute of
them to compile kernels, and 400 MB in the folder for temporary files; `--work` keeps what was made.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from PIL import ImageOps

import packpipe
from packpipe.samples import SETS, image_sizes, images_folder
from packpipe.training import TrainConfig, read_log, train

WHAT = {
    "samples": "bundled images and sizes",
    "images": "rows of images, in folders",
    "tokens": "rows of tokens, in folders",
    "pairs": "rows of images and of their texts, in folders",
    "cache": "the cache: kept sizes, rows without a folder of their own",
    "computed": "rows computed when read",
    "reports": "figures, rejects and problems of each folder",
    "damage": "problems of damaged folders",
    "plans": "plans of images",
    "token-plans": "plans of tokens",
    "lengths": "packs of lengths",
    "online": "packs of a stream of lengths, states",
    "map": "rows of map",
    "map-names": "what map finds its cache by",
    "batches": "batches, until a state is taken",
    "states": "states of loaders",
    "rest": "batches after that state",
    "training": "a training: checkpoints, log, logits, predictions",
    "training-goes-on": "the same, continued",
}
NAMED_BY_VERSION = ("cache", "map-names")
# What the checkout after makes anew from what the one before left.
GONE_ON_FROM = ("images", "tokens", "pairs", "cache", "plans", "online", "states", "rest")
GONE_ON_FROM += ("training", "training-goes-on")
DOCUMENTED = {
    "packpipe.samples": ("image_sizes", "images_folder"),
    "packpipe.training": ("Record", "TrainConfig", "read_log", "train"),
}
TIMED = ("images_per_s", "tokens_per_s", "data_wait", "flops_per_s", "mfu")
NOTES = "notes.json"
ZIP = b"PK"
TAKES = "takes it"
TAKEN = 2  # batches before a state is taken
SMALL: dict[str, Any] = {
    "seq_len": 64,
    "resolution": packpipe.Side(packpipe.Uniform(32, 128)),
    "max_segments": 16,
}


# What is packed.


def named(dataset: Dataset, name: str) -> Dataset:
    """Return a dataset with a fingerprint that does not depend on how it was made."""
    dataset._fingerprint = hashlib.sha256(name.encode()).hexdigest()[:16]
    return dataset


def picture_files(every: int = 1) -> list[Path]:
    """Return bundled images, in order of their names."""
    return sorted(path for path in images_folder().rglob("*.*") if path.suffix != ".jsonl")[::every]


def pictures(every: int = 1, *, damaged: bool = False) -> Dataset:
    """Return bundled images as bytes, with a class, a caption and a size.

    Args:
        every: one of so many.
        damaged: cut one in half, and put another file in place of two.
    """
    files = picture_files(every)
    data = [file.read_bytes() for file in files]
    if damaged:
        data[3] = data[3][: len(data[3]) // 2]
        data[5] = data[7] = b"not an image"
    draw = np.random.default_rng(1)
    sizes = [ImageOps.exif_transpose(Pillow.open(file)).size for file in files]
    columns = {
        "image": [{"bytes": one, "path": None} for one in data],
        "label": [file.parent.name for file in files],
        "input_ids": [draw.integers(1, 99, draw.integers(1, 30)).tolist() for _ in files],
        "height": [height for _, height in sizes],
        "width": [width for width, _ in sizes],
    }
    features = Features(
        image=Image(),
        label=ClassLabel(names=sorted(set(columns["label"]))),
        input_ids=List(Value("int32")),
        height=Value("int32"),
        width=Value("int32"),
    )
    return named(Dataset.from_dict(columns, features), f"pictures {every} {damaged}")


def by_path(folder: Path) -> Dataset:
    """Return some of them by their paths in a folder, which both checkouts read."""
    names = [f"{number:03d}{file.suffix}" for number, file in enumerate(picture_files(16))]
    if not folder.exists():
        folder.mkdir()
        for name, file in zip(names, picture_files(16), strict=True):
            shutil.copyfile(file, folder / name)
    columns = {"image": [{"bytes": None, "path": name} for name in names]}
    return named(Dataset.from_dict(columns, Features(image=Image())), "by path")


def sequences() -> Dataset:
    """Return token sequences with labels, and columns of one value each."""
    draw = np.random.default_rng(2)
    lens = draw.integers(1, 80, 150).tolist()
    columns = {
        "input_ids": [draw.integers(1, 30_000, length).tolist() for length in lens],
        "labels": [draw.integers(-5, 99, length).tolist() for length in lens],
        "source": [f"text {number % 7}" for number in range(150)],
        "weight": draw.random(150).tolist(),
    }
    features = Features(
        input_ids=List(Value("uint16")),
        labels=List(Value("int64")),
        source=Value("string"),
        weight=Value("float32"),
    )
    return named(Dataset.from_dict(columns, features), "sequences")


class Task(NamedTuple):
    """Something to pack: a dataset, and the arguments of `pack` or `pack_pairs`."""

    dataset: Dataset
    options: dict[str, Any]
    pairs: bool = False

    def made(self, output: str | None) -> dict[str, Dataset]:
        """Return the rows by folder: packed now, or as they were packed before."""
        arguments = {"output": output, "progress": False, **self.options}
        if not self.pairs:
            return {str(output): packpipe.pack(self.dataset, **arguments)}
        names = [f"{output}/images", f"{output}/texts"]
        return dict(zip(names, packpipe.pack_pairs(self.dataset, **arguments), strict=True))

    def checkable(self, folder: str) -> Dataset:
        """Return what a folder can be compared with: rows of texts know nothing of images."""
        texts = self.pairs and folder.endswith("texts")
        return self.dataset.select_columns("input_ids") if texts else self.dataset


def of(dataset: Dataset, *, pairs: bool = False, **options: Any) -> Task:
    """Return a task of these arguments."""
    return Task(dataset, options, pairs)


def tasks(shared: Path) -> dict[str, Task]:
    """Return what is packed into folders, by their names."""
    few, broken, text = pictures(4), pictures(4, damaged=True), sequences()
    images = few.select_columns(["image", "label"])
    drawn = packpipe.Side(packpipe.TruncatedNormal(96, 32, 32, 160))
    by_size = packpipe.ByResolution(4, 0.1, 64, 0.6)
    growing = packpipe.OverTraining(0.2, 0.8, midpoint=0.5, width=-0.2)
    beta = packpipe.Beta(mean=0.5, maximum=0.7)
    squares = packpipe.Square(packpipe.Choice((16, 32, 48)))
    of_sizes = {"size_columns": ("height", "width"), "strategy": "ffd", "window": 20}
    pixels = {"background": (9, 99, 199), "reducing_gap": None, "downscale_filter": "lanczos"}
    here = {**SMALL, "num_workers": 0}
    found = {
        "images/defaults": of(pictures()),
        "images/native": of(images, seq_len=512, max_tokens=100, num_workers=0),
        "images/budget": of(images, seq_len=128, resolution="budget", max_tokens=64, num_workers=2),
        "images/dropping": of(images, **here, drop_rate=0.5, seed=1),
        "images/damaged": of(pictures(16), **here, drop_rate=0.5, seed=1),
        "images/fitted": of(
            images, **here, drop_rate=beta, fit_last="drop_rate", seed=2**63, epoch=3
        ),
        "images/sides": of(
            few, seq_len=128, resolution=drawn, drop_rate=by_size, fit_last="resolution", **of_sizes
        ),
        "images/training": of(images, **here, drop_rate=growing, epochs=4, epoch=2),
        "images/squares": of(
            images, seq_len=64, patch_size=8, resolution=squares, label_column=None, **pixels
        ),
        "images/computed": of(images, **SMALL, materialize=False, seed=4),
        "images/paths": of(by_path(shared), **here, image_root=shared, seed=5),
        "images/rejects": of(broken, **SMALL, max_bad_fraction=0.5, num_workers=2),
        "images/rejects-here": of(broken, **here, max_bad_fraction=0.5),
        "pairs/short": of(few, pairs=True, **SMALL, text_seq_len=64, max_text=29),
        "pairs/cut": of(
            few,
            pairs=True,
            **here,
            text_seq_len=48,
            max_text=12,
            overflow="truncate",
            pad_token_id=7,
            drop_rate=0.3,
        ),
        "tokens/error": of(text, seq_len=128, max_segments=3, strategy="balanced"),
        "tokens/copied-labels": of(
            text.remove_columns("labels").cast_column("input_ids", List(Value("int32"))),
            seq_len=96,
            mask_first_label=True,
        ),
    }
    for layout in ("fixed", "ragged"):
        for overflow in ("split", "truncate", "drop"):
            masked = {"mask_first_label": overflow == "split", "pad_token_id": 3}
            found[f"tokens/{layout}-{overflow}"] = of(
                text, seq_len=48, layout=layout, overflow=overflow, **masked, seed=8, window=100
            )
    return found


# What a checkout makes.


def place_for(path: str) -> Path:
    """Return a path whose folder is there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def note(path: str, value: Any) -> None:
    """Write a value as JSON."""
    text = json.dumps(value, indent=1, sort_keys=True)
    place_for(path).write_text(text + "\n", encoding="utf-8")


def keep(path: str, *listed: Any, **arrays: Any) -> None:
    """Write arrays to a file, whose bytes depend on nothing else."""
    np.savez(
        place_for(path), *listed, **{name: np.asarray(array) for name, array in arrays.items()}
    )


def make_samples() -> None:
    """Note the bundled images, and keep the bundled sizes."""
    digests = {
        str(path.relative_to(images_folder())): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in images_folder().rglob("*.*")
    }
    note("samples/images.json", digests)
    keep("samples/sizes.npz", **{name: image_sizes(name) for name in SETS})


def make_reports(rows: dict[str, Dataset], source: dict[str, Dataset]) -> None:
    """Note the figures of each folder, its rejects and what `verify` finds in it."""
    for folder, packed in rows.items():
        summary = packpipe.summarize(folder)
        sample = 20 if folder == "images/defaults" else None
        found = {
            "figures": summary.to_dict(),
            "printed": str(summary),
            "rejects": packpipe.rejects(packed).to_list(),
            "features": str(packed.features),
            "problems": list(map(str, packpipe.verify(folder, sample=sample))),
            "against its source": list(
                map(str, packpipe.verify(folder, source[folder], sample=sample))
            ),
        }
        note(f"reports/{folder}.json", found)


def make_computed(packed: Dataset) -> None:
    """Keep rows that are computed when read, as NumPy and as `datasets` reads them."""
    rows = packpipe.read_rows(packed)
    # Rows had their segments in an object of their own before.
    columns = rows.segments if isinstance(rows.segments, dict) else vars(rows.segments)
    found = {"offsets": getattr(rows, "offsets", columns.get("offsets")), **columns}
    segments = {f"segments.{name}": found[name] for name in sorted(found)}
    read = {f"read.{name}": value for name, value in packed[1].items()}
    names = ("patches", "segment_ids", "coords")
    keep("computed/rows.npz", **{name: getattr(rows, name) for name in names}, **segments, **read)


def changed(column: str, change: Callable[[list[Any]], None]) -> Callable[[pa.Table], pa.Table]:
    """Return what changes a column in its first row whose values are not all the same, if any."""

    def apply(table: pa.Table) -> pa.Table:
        values = table.column(column).to_pylist()
        for row in [row for row in values if any(value != row[0] for value in row)][:1]:
            change(row)
        kind = table.schema.field(column)
        place = table.schema.get_field_index(column)
        return table.set_column(place, kind, pa.array(values, kind.type))

    return apply


def flip(row: list[Any]) -> None:
    """Change the first value of a row a little."""
    row[0] = row[0] + 1 if row[0] < 100 else row[0] - 1


def swap(row: list[Any]) -> None:
    """Swap it and the first one that differs."""
    at = next(place for place, value in enumerate(row) if value != row[0])
    row[0], row[at] = row[at], row[0]


def double(row: list[Any]) -> None:
    """Put it in place of the first one that differs."""
    row[next(place for place, value in enumerate(row) if value != row[0])] = row[0]


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the rows of a folder; its manifest has the new checksum."""
    path, record_of = folder / "data-00000.arrow", folder / "manifest.json"
    table = change(pa.ipc.open_stream(path.read_bytes()).read_all())
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    manifest = json.loads(record_of.read_text())
    checksum = xxhash.xxh3_128(path.read_bytes()).hexdigest()
    manifest["files"][path.name].update(bytes=path.stat().st_size, xxh3_128=checksum)
    record_of.write_text(json.dumps(manifest))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest of a folder."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def damages(columns: list[str]) -> dict[str, Callable[[Path], Any]]:
    """Return ways to damage a folder of rows with some columns, by their names."""
    numbers = ["segment_ids", "seq_lens", "example_index", "patches", "coords", "labels"]
    numbers += ["input_ids", "fragment", "position_ids"]
    swapped = ["grid_hw", "image_hw", "source"]

    def in_rows(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
        return lambda folder: rewrite(folder, change)

    found: dict[str, Callable[[Path], Any]] = {
        f"{column} {how.__name__}": in_rows(changed(column, how))
        for column in columns
        for how in (flip, swap, double)
        if column in numbers or (column in swapped and how is not flip)
    }
    cut = Path("data-00000.arrow")
    return {
        **found,
        "a row lost": in_rows(lambda table: table.slice(1)),
        "a row twice": in_rows(lambda table: pa.concat_tables([table, table.slice(0, 1)])),
        "a column lost": in_rows(lambda table: table.drop_columns(["seq_lens"])),
        "file cut": lambda folder: os.truncate(folder / cut, 1000),
        "file lost": lambda folder: (folder / cut).unlink(),
        "byte changed": lambda folder: (folder / cut).write_bytes(
            (folder / cut).read_bytes()[:-1] + b"x"
        ),
        "another file": lambda folder: (folder / "data-00007.arrow").touch(),
        "rejects lost": lambda folder: (folder / "rejects.arrow").unlink(),
        "state lost": lambda folder: (folder / "state.json").unlink(),
        "manifest lost": lambda folder: (folder / "manifest.json").unlink(),
        "incomplete": lambda folder: edit(folder, lambda found: found.update(complete=False)),
        "counts": lambda folder: edit(folder, lambda found: found["counts"].update(packed=1)),
        "fill": lambda folder: edit(folder, lambda found: found.update(fill=0.5)),
        "key lost": lambda folder: edit(folder, lambda found: found.pop("seed")),
        "seed": lambda folder: edit(folder, lambda found: found.update(seed=77)),
        "config": lambda folder: edit(folder, lambda found: found["config"].update(seq_len=7)),
    }


def make_damage(rows: dict[str, Dataset], source: dict[str, Dataset]) -> None:
    """Note what `verify` says of damaged folders."""
    for folder in ("images/damaged", "tokens/fixed-split", "tokens/ragged-truncate"):
        found = {}
        for name, damage in damages(rows[folder].column_names).items():
            copy = Path(shutil.copytree(folder, "copy"))
            try:
                damage(copy)
                found[name] = list(map(str, packpipe.verify(copy, source[folder], sample=None)))
            except Exception as error:  # noqa: BLE001 that it is the same one is enough
                found[name] = [f"raises {type(error).__name__}: {error}"]
            shutil.rmtree(copy)
        note(f"damage/{folder}.json", found)


def make_plans(left: Path | None = None) -> None:
    """Keep plans of images, and note their figures.

    Args:
        left: where plans lie that are to be loaded and kept again.
    """
    sizes = image_sizes("pictures")[:400]
    side = packpipe.Side(packpipe.Uniform(64, 256))
    growing = packpipe.OverTraining(0.2, 0.8, midpoint=2 / 3, width=-0.2)
    configs: dict[str, dict[str, Any]] = {
        "native": {"max_tokens": 500, "max_upscale": 1.0},
        "budget": {"resolution": "budget", "max_tokens": 128, "strategy": "bfd"},
        "sides": {"resolution": side, "drop_rate": 0.5, "fit_last": "drop_rate"},
        "area": {"resolution": packpipe.Area(packpipe.Uniform(4096, 65536)), "window": 100},
        "tokens": {"resolution": packpipe.Budget(packpipe.Constant(64)), "max_segments": 5},
        "square": {"resolution": packpipe.Square(64), "strategy": "spfhp"},
        "growing": {"resolution": side, "drop_rate": growing, "epochs": 2},
        "fitted": {"resolution": side, "fit_last": "resolution", "fit_limit": 0.5},
        "two limits": {"max_tokens": 500, "also": (np.arange(400) % 20, 64)},
    }
    figures = {}
    for name, options in configs.items():
        path = f"plans/{name}.plan"
        if left is None:
            also = options.pop("also", None)
            config = packpipe.PackConfig(seq_len=512, **options)
            plan = packpipe.plan_epoch(
                sizes, config, seed=11, epoch=1, index=np.arange(400)[::-1], also=also
            )
        else:
            plan = packpipe.EpochPlan.load(left / path)
        plan.save(place_for(path))
        figures[name] = {
            "fingerprint": plan.fingerprint,
            "figures": plan.quality.rows(),
            "printed": repr(plan),
            "explained": [str(plan.explain(number)) for number in (0, 17, 399)],
            "packs": [plan.pack_of(number) for number in (0, 17, 399)],
            "work": plan.packs.attention_work.tolist(),
            "config": plan.config.to_dict(),
        }
    note("plans/figures.json", figures)


def make_token_plans() -> None:
    """Keep plans of token sequences."""
    lengths = np.random.default_rng(5).integers(1, 400, 500)
    for overflow in ("split", "truncate", "drop"):
        config = packpipe.TokenConfig(seq_len=128, overflow=overflow, window=300)
        plan = packpipe.plan_tokens(lengths, config, seed=2, epoch=1)
        names = ("index", "starts", "seq_lens", "fragments", "order", "offsets", "dropped")
        keep(f"token-plans/{overflow}.npz", **{name: getattr(plan, name) for name in names})
        note(f"token-plans/{overflow}.json", {"printed": repr(plan), "rows": plan.quality.rows()})


def make_lengths() -> None:
    """Keep packs of lengths by every rule, plans on histograms and orders of steps."""
    lengths = np.random.default_rng(3).integers(1, 65, 600)
    calls: dict[str, dict[str, Any]] = {
        **{name: {"strategy": name} for name in ("ffd", "bfd", "spfhp", "balanced")},
        **{name: {"strategy": name} for name in ("next_fit", "first_fit", "best_fit", "nnlshp")},
        "optimal": {"strategy": "optimal", "budget_s": math.inf},
        "segments": {"strategy": "balanced", "max_segments": 3},
        "multiples": {"segment_multiple": 8, "pack_multiple": 16, "ranks": 7},
        "arrived": {"strategy": "best_fit", "max_segments": 4, "segment_multiple": 4, "ranks": 8},
        "also": {"also": (lengths[::-1] % 10, 20), "strategy": "bfd"},
    }
    printed = {}
    for name, options in calls.items():
        packs = packpipe.pack_lengths(lengths, 64, **options)
        steps = packpipe.balance_steps(packs.attention_work, 4, window=32, seed=1, epoch=2)
        found = {"order": packs.order, "offsets": packs.offsets, "steps": steps.order}
        if packs.plan is not None:
            found["redrawn"] = packs.redraw(seed=5, epoch=1).order
        keep(f"lengths/{name}.npz", **found)
        printed[name] = [str(packs), repr(packs), repr(steps)]
    shards = np.split(lengths, 3)
    counts = [packpipe.count_lengths(shard, 64) for shard in shards]
    plan = packpipe.plan_histogram(sum(counts), 64, strategy="balanced", ranks=4)
    order, offsets = plan.expand(lengths, seed=9, epoch=1)
    before = [sum(counts[:number], np.zeros_like(counts[0])) for number in range(3)]
    numbers = {
        f"numbers.{number}": plan.pack_numbers(shard, before=before[number])
        for number, shard in enumerate(shards)
    }
    held = {f"held.{name}": getattr(plan.patterns, name) for name in ("repeats", "entries")}
    keep("lengths/histogram.npz", order=order, offsets=offsets, **numbers, **held)
    printed["histogram"] = [str(plan), repr(plan)]
    printed["suggested"] = [str(packpipe.suggest_seq_len(lengths, strategy="bfd"))]
    note("lengths/printed.json", printed)


def make_online(left: Path | None = None) -> None:
    """Keep the packs of a stream of lengths, and its state in the middle.

    Args:
        left: where a state lies to go on from.
    """
    lengths = np.random.default_rng(4).integers(1, 65, 900)
    for strategy in ("best_fit", "first_fit"):
        name = f"online/{strategy}"
        packer = packpipe.OnlinePacker(64, strategy=strategy, open_packs=5, max_segments=6)
        if left is None:
            keep(f"{name}.npz", *packer.push(lengths[:100]), *packer.push(lengths[100:500]))
            note(f"{name}.json", packer.state_dict())
        else:
            packer.load_state_dict(json.loads((left / f"{name}.json").read_text()))
            for kept in (f"{name}.npz", f"{name}.json"):
                shutil.copyfile(left / kept, place_for(kept))
        keep(f"{name}-rest.npz", *packer.push(lengths[500:]), *packer.flush())


def make_mapped() -> None:
    """Keep the rows of `map`, and what their cache would be found by."""
    packers = {
        "images": (pictures(4), packpipe.Packer(**SMALL, drop_rate=0.5, seed=3, epoch=1)),
        "native": (pictures(8), packpipe.Packer(seq_len=512, max_tokens=100)),
        "dropped": (pictures(4, damaged=True), packpipe.Packer(**SMALL, on_error="drop")),
        "tokens": (sequences(), packpipe.Packer(seq_len=48, overflow="split")),
    }
    for name, (dataset, packer) in packers.items():
        if name != "tokens":
            dataset = dataset.select_columns(["image", "label"])
        rows = dataset.map(
            packer,
            batched=True,
            batch_size=20,
            with_indices=name != "native",
            remove_columns=dataset.column_names,
        )
        table = rows.data.table.combine_chunks()
        described = json.loads(table.schema.metadata[b"huggingface"])
        described.pop("fingerprint")  # kept by itself
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
        with pa.ipc.new_stream(place_for(f"map/{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
        note(f"map-names/{name}.json", rows._fingerprint)


def loaders(rows: dict[str, Dataset]) -> dict[str, Callable[[], packpipe.PackedLoader]]:
    """Return what makes loaders, by their names.

    Args:
        rows: what was packed, by its folder.
    """
    images, loader = pictures(4).select_columns(["image", "label"]), packpipe.PackedLoader
    growing = packpipe.OverTraining(0.2, 0.8, midpoint=0.5, width=-0.2)
    epochs = packpipe.EpochPacks(images, **SMALL, drop_rate=0.4)
    fitted = packpipe.EpochPacks(images, **SMALL, drop_rate=growing, epochs=3, fit_last="drop_rate")
    stored, text = rows["images/dropping"], rows["tokens/fixed-split"]

    def stream(**options: Any) -> packpipe.PackedStream:
        source = images.to_iterable_dataset(num_shards=4 if options else 1)
        return packpipe.PackedStream(source, **SMALL, window=12, open_packs=4, **options)

    return {
        "shuffled": lambda: loader(stored, 2, seed=3),
        "as-they-lie": lambda: loader(stored, 2, shuffle=False),
        "balanced": lambda: loader(stored, 2, balance=True, seed=1),
        "padded": lambda: loader(stored, 3, tail="pad", max_segments=20),
        "selected": lambda: loader(stored.select([7, 2, 5, 1, 0, 3]), 1),
        "rank-0": lambda: loader(stored, 1, rank=0, world_size=2, tail="pad", balance=True),
        "rank-1": lambda: loader(stored, 1, rank=1, world_size=2, tail="pad", balance=True),
        "threads": lambda: loader(stored, 2, num_workers=2, seed=2, epoch=4),
        "processes": lambda: loader(rows["images/fitted"], 2, num_workers=1, workers="processes"),
        "computed": lambda: loader(rows["images/computed"], 2, seed=1),
        "rejects": lambda: loader(rows["images/rejects"], 2, seed=1),
        "epochs": lambda: loader(epochs, 2, seed=5, epoch=1),
        "epochs-rank-1": lambda: loader(fitted, 1, rank=1, world_size=2, balance=True, tail="pad"),
        "epochs-threads": lambda: loader(epochs, 2, num_workers=2),
        "stream": lambda: loader(stream(), 2, tail="pad"),
        "stream-rank-0": lambda: loader(stream(drop_rate=0.3), 1, rank=0, world_size=2),
        "stream-rank-1": lambda: loader(stream(drop_rate=0.3), 1, rank=1, world_size=2),
        "tokens": lambda: loader(text, 4, seed=6),
        "tokens-rank-1": lambda: loader(text, 2, rank=1, world_size=2, balance=True, tail="pad"),
        "tokens-values": lambda: loader(rows["tokens/error"], 4, tail="pad"),
        "pairs-images": lambda: loader(rows["pairs/short/images"], 2, seed=7),
        "pairs-texts": lambda: loader(rows["pairs/short/texts"], 2, seed=7),
    }


def arrays_of(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of a batch by name: some of its fields hold a list of them, or a batch."""
    if isinstance(value, dict):
        yield from chain(*(arrays_of(one, f"{name}.{key}") for key, one in value.items()))
    elif isinstance(value, list | tuple) and any(np.ndim(one) for one in value):
        yield from chain(*(arrays_of(one, f"{name}.{number}") for number, one in enumerate(value)))
    elif is_dataclass(value):
        yield from arrays_of(vars(value), name)
    elif value is not None:
        yield name, value


def make_batches(name: str, loader: packpipe.PackedLoader, left: Path | None = None) -> None:
    """Keep every batch of two epochs, and the state after the first few.

    Args:
        name: of the loader.
        loader: which is new.
        left: where states lie to go on from.
    """
    first = 0
    if left is not None:
        loader.load_state_dict(json.loads((left / f"states/{name}.json").read_text()))
        note(f"states/{name}.json", loader.state_dict())
        first = TAKEN
    for number, batch in enumerate(chain(loader, loader), first):
        folder = "batches" if number < TAKEN else "rest"
        keep(f"{folder}/{name}/{number:03d}.npz", **dict(arrays_of(batch, "batch")))
        if number == TAKEN - 1:
            note(f"states/{name}.json", loader.state_dict())


def trained(folder: str, dataset: Dataset, steps: int, seed: int) -> packpipe.NaViT:
    """Return a tiny model trained so far, from where the folder's checkpoint stands."""
    torch.manual_seed(seed)
    shape = packpipe.NaViTConfig(num_classes=10, dim=32, depth=2, heads=2)
    model = packpipe.NaViT(shape)
    loader = packpipe.PackedLoader(packpipe.EpochPacks(dataset, **SMALL, drop_rate=0.5), 2)
    config = TrainConfig(steps=steps, learning_rate=1e-3, save_every=1, log_every=1)
    for _ in train(model, loader, config, folder=folder):
        pass
    return model


def make_training(rows: dict[str, Dataset], left: Path | None = None) -> None:
    """Train a model for a few steps, and then for a few more; keep what it says of images.

    Args:
        rows: what was packed, by its folder.
        left: where a checkpoint of the first few lies; what it holds is trained no further then.
    """
    dataset = pictures(4).select_columns(["image", "label"])
    first, second = "training", "training-goes-on"
    if left is not None:
        shutil.copytree(left / first / "run", Path(first, "run"))
    for number, (name, steps) in enumerate({first: 3, second: 5}.items()):
        if name == second:
            shutil.copytree(Path(first, "run"), Path(second, "run"))
        # Another seed where a checkpoint is to be read: its weights must not come from the seed.
        model = trained(f"{name}/run", dataset, steps, seed=number + 10 * (left is not None))
        batch = packpipe.PackedBatch.from_rows(packpipe.read_rows(rows["images/dropping"]))
        model.eval()
        with torch.inference_mode():
            logits = model(batch)
        files = picture_files(40)
        predictions = model.predict(files, seq_len=128, resolution="budget", max_tokens=64)
        example, values = batch.by_example(logits)
        keep(f"{name}/logits.npz", logits=logits, example=example, values=values, of=predictions)
        log = [
            {key: value for key, value in line.items() if key not in TIMED}
            for line in read_log(f"{name}/run")
        ]
        note(f"{name}/log-read.json", log)


def make(shared: Path) -> None:
    """Make everything, in the current folder."""
    wanted = tasks(shared)
    rows: dict[str, Dataset] = {}
    source: dict[str, Dataset] = {}
    for name, task in wanted.items():
        made = task.made(name)
        rows.update(made)
        source.update({folder: task.checkable(folder) for folder in made})
    Task(pictures(8), dict(SMALL)).made(None)
    make_samples()
    make_reports(rows, source)
    make_computed(rows["images/computed"])
    make_damage(rows, source)
    make_plans()
    make_token_plans()
    make_lengths()
    make_online()
    make_mapped()
    for name, loader_of in loaders(rows).items():
        make_batches(name, loader_of())
    make_training(rows)
    names = {"packpipe": packpipe.__all__, **DOCUMENTED}
    note(NOTES, {"version": packpipe.__version__, "names": names})


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return which files are in a folder, and when each was written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def opened(name: str, task: Task) -> tuple[str, dict[str, Dataset]]:
    """Return whether `pack` returns a folder that is there, and its rows in any case."""
    before = stamps(Path(name))
    try:
        rows, outcome = task.made(name), TAKES
    except FileExistsError as error:
        outcome = f"refused: {error}"
        parts = [f"{name}/images", f"{name}/texts"] if task.pairs else [name]
        rows = {part: datasets.load_from_disk(part) for part in parts}
        if not task.options.get("materialize", True):  # only pack knows how to compute them
            rows = dict(zip(parts, task.made(None).values(), strict=True))
    return outcome if stamps(Path(name)) == before else "written again", rows


def attempt(make: Callable[..., None], *arguments: Any) -> str:
    """Return whether something can be made from what was left, or why not."""
    try:
        make(*arguments)
    except Exception as error:  # noqa: BLE001 whatever it is, the rest is to be compared
        return f"raises {type(error).__name__}: {error}"
    return TAKES


def resume(shared: Path, left: Path) -> None:
    """Go on, in the current folder, from what another checkout left."""
    rows: dict[str, Dataset] = {}
    outcomes = {}
    for name, task in tasks(shared).items():
        shutil.copytree(left / name, name)
        outcomes[name], found = opened(name, task)
        rows.update(found)
    cache = Path(datasets.config.HF_DATASETS_CACHE, "packpipe")
    shutil.copytree(left / "cache" / "datasets" / "packpipe", cache, dirs_exist_ok=True)
    before = stamps(cache)
    Task(pictures(8), dict(SMALL)).made(None)
    outcomes["cache"] = TAKES if stamps(cache) == before else "written again"
    outcomes["plans"] = attempt(make_plans, left)
    outcomes["online"] = attempt(make_online, left)
    outcomes["training"] = attempt(make_training, rows, left)
    for name, loader_of in loaders(rows).items():
        outcomes[f"states/{name}"] = attempt(make_batches, name, loader_of(), left)
    notes = json.loads((left / NOTES).read_text())
    there = {
        f"{module}.{name}": hasattr(importlib.import_module(module), name)
        for module, names in notes["names"].items()
        for name in names
    }
    note(NOTES, {"version": packpipe.__version__, "there": there, "outcomes": outcomes})


# How two folders compare.


@dataclass
class Kind:
    """What was found of the files of one kind.

    Attributes:
        what: they are.
        files: that both have.
        bytes: in them.
        but: names of files that are not the same bytes and yet no difference, by the reason.
        differing: a sentence for each that is one.
    """

    what: str
    files: int = 0
    bytes: int = 0
    but: dict[str, list[str]] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)

    def allow(self, name: str, why: str) -> None:
        """Note a file that is not the same bytes, for a reason."""
        self.but.setdefault(why, []).append(name)

    def line(self) -> str:
        """Return it as a row of the table."""
        reasons = [f"{len(names)} {why}" for why, names in self.but.items()]
        differing = [f"{len(self.differing)} differ"] * bool(self.differing)
        how = "; ".join(["no" if differing else "yes", *differing, *reasons])
        return f"| {self.what} | {self.files:,} | {self.bytes:,} | {how} |"


def files_in(folder: Path) -> dict[str, Path]:
    """Return the files of a folder, by their paths in it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path for path in found}


def without_times(data: bytes) -> Any:
    """Return the records of a log without the figures that are timed."""
    lines = [json.loads(line) for line in data.splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def without_version(name: str, data: bytes) -> Any:
    """Return a folder's record without its version, and a state without the digest of it."""
    if name == "state.json":
        return {key: value for key, value in json.loads(data).items() if key != "_fingerprint"}
    return re.sub(rb'"packpipe": "[^"]*"', b'"packpipe": ""', data)


def where_apart(one: bytes, other: bytes) -> str:
    """Return where two files differ first: which arrays, or which byte."""
    if one.startswith(ZIP) and other.startswith(ZIP):
        first, second = (np.load(io.BytesIO(data)) for data in (one, other))
        arrays = sorted(
            array
            for array in {*first.files, *second.files}
            if array not in first
            or array not in second
            or first[array].dtype != second[array].dtype
            or first[array].shape != second[array].shape
            or first[array].tobytes() != second[array].tobytes()
        )
        return f"arrays {', '.join(arrays)}"
    length = min(len(one), len(other))
    apart = np.flatnonzero(
        np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length)
    )
    at = int(apart[0]) if apart.size else length
    start = max(0, at - 30)
    return f"byte {at}: {one[start : at + 50]!r} before, {other[start : at + 50]!r} after"


def compared(kind: str, before: Path, after: Path, *, one_version: bool) -> Kind:
    """Compare the files of one kind."""
    found = Kind(WHAT[kind])
    inside = Path(kind, "datasets", "packpipe") if kind == "cache" else Path(kind)
    ones, others = files_in(before / inside), files_in(after / inside)
    for name in sorted({*ones, *others}):
        if name not in ones or name not in others:
            found.differing.append(f"{kind}/{name}: only {'before' if name in ones else 'after'}")
            continue
        one, other = ones[name].read_bytes(), others[name].read_bytes()
        found.files += 1
        found.bytes += len(one)
        if one == other:
            continue
        last = Path(name).name
        if last == "log.jsonl":
            same, why = without_times(one) == without_times(other), "but for what is timed"
        elif not one_version and last in ("manifest.json", "state.json"):
            same = without_version(last, one) == without_version(last, other)
            why = "but for the version"
        else:
            same, why = False, ""
        if same:
            found.allow(last, why)
        else:
            found.differing.append(f"{kind}/{name}: {where_apart(one, other)}")
    if not found.files:
        found.differing.append(f"{kind}: there are no files")
    return found


def outcomes_of(resumed: Path, *, one_version: bool) -> list[Kind]:
    """Return what became of what the checkout before left, and of its names."""
    notes = json.loads((resumed / NOTES).read_text())
    taken = Kind("folders and the like that it takes, none written again", len(notes["outcomes"]))
    for name, outcome in notes["outcomes"].items():
        for_version = "the same packpipe" in outcome or name == "cache"
        if outcome != TAKES and for_version and not one_version:
            taken.allow(name, "not taken, for another version")
        elif outcome != TAKES:
            taken.differing.append(f"{name}: {outcome}")
    names = Kind("public names that are still there", len(notes["there"]))
    names.differing = [
        f"{name} cannot be imported" for name, is_ in notes["there"].items() if not is_
    ]
    return [taken, names]


# The parent.


def run(work: Path, name: str, checkout: Path, left: str = "") -> Path:
    """Have a checkout make everything, or go on from what another one left."""
    folder = work / name
    folder.mkdir()
    command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).resolve())]
    command += ["--make", str(work / "shared"), *(["--resume-from", str(work / left)] * bool(left))]
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "NUMBA_CACHE_DIR": str(work / "kernels"),
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    print(f"{name}: {checkout}", flush=True)
    said = work / f"{name}.log"
    with said.open("w") as file:
        status = subprocess.run(  # noqa: S603
            command, env=environment, cwd=folder, stdout=file, stderr=file, check=False
        ).returncode
    if status:
        last = "\n".join(said.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{name} ended with {status}:\n{last}")
    return folder


def child(shared: Path, left: Path | None) -> None:
    """Make everything with the package of the checkout that was asked for, or go on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if left is None:
        make(shared)
    else:
        resume(shared, left)
    # An editable install elsewhere lends its own modules to a checkout that lacks them.
    checkout = Path(os.environ["PYTHONPATH"])
    loaded = {
        name: Path(str(module.__file__)) for name, module in sys.modules.items() if is_own(name)
    }
    strange = [f"{name} is {file}" for name, file in loaded.items() if checkout not in file.parents]
    if strange:
        raise SystemExit(f"{', '.join(strange)}; expected modules of {checkout}")


def is_own(name: str) -> bool:
    """Return whether a module is packpipe's."""
    return name.split(".")[0] == "packpipe"


def comparison(before_checkout: Path, after_checkout: Path, work: Path) -> bool:
    """Print what differs between two checkouts; return whether anything does."""
    before = run(work, "before", before_checkout)
    after = run(work, "after", after_checkout)
    resumed = run(work, "resumed", after_checkout, "before")
    versions = [json.loads((folder / NOTES).read_text())["version"] for folder in (before, after)]
    one_version = versions[0] == versions[1]
    kinds = [kind for kind in WHAT if one_version or kind not in NAMED_BY_VERSION]
    again = [kind for kind in GONE_ON_FROM if kind in kinds]
    made = [compared(kind, before, after, one_version=one_version) for kind in kinds]
    went_on = [compared(kind, before, resumed, one_version=one_version) for kind in again]
    went_on += outcomes_of(resumed, one_version=one_version)
    head = "| files | bytes | equal |\n| --- | ---: | ---: | --- |"
    for title, found in (("made by both", made), ("left before, and gone on from after", went_on)):
        print(f"\n| {title} {head}", *(kind.line() for kind in found), sep="\n")
    print(f"\nversions {' and '.join(versions)}")
    for kind in (kind for kind in NAMED_BY_VERSION if kind not in kinds):
        print(f"not compared, since it is named by a digest of the version: {WHAT[kind]}")
    found = made + went_on
    for why in dict.fromkeys(why for kind in found for why in kind.but):
        names = {name for kind in found for name in kind.but.get(why, [])}
        print(f"{why}: {', '.join(sorted(names))}")
    differing = [line for kind in found for line in kind.differing]
    print(f"different: {len(differing)}", *(f"  {line}" for line in differing), sep="\n")
    return bool(differing)


def main() -> None:
    """Compare two checkouts; or, as one of the processes it starts, make what is compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout without the change")
    parser.add_argument("--after", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--work", type=Path, help="an absent or empty folder, kept")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume-from", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        child(options.make, options.resume_from)
        return
    if options.before is None:
        parser.error("--before is missing, expected a checkout to compare with")
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        if comparison(options.before.resolve(), options.after.resolve(), work.resolve()):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
