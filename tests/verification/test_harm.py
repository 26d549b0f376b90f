"""Every kind of harm to every column and field of a folder is found, or listed with its reason.

Checksums, counts and fill are made to agree with the harm, as a faulty merge of folders would. The
``nightly`` profile of Hypothesis does all harm to all folders; otherwise every third column and
field of some gets its first harm.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import crashing
import harming
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, List, Value
from harming import INFO, MANIFEST, Harm
from hypothesis import settings
from PIL import Image as PillowImage

import packpipe
from packpipe import Crop, OverTraining, Side, Uniform
from packpipe.planning.image_config import PackConfig
from packpipe.planning.token_config import TokenConfig

ALL = settings().max_examples > 1000

# Nothing in a folder, or in its source, follows from these but the digest in state.json. Nor from
# image_root here, where images are bytes and no path is followed.
NAMED_ONLY = (
    *("packpipe", "pillow", "codecs", "source_fingerprint", "source_files", "mask_files"),
    "image_root",
)
# What is the same afterwards: the rows in their order; a manifest as an earlier version wrote it;
# columns of sizes that are not named.
HARMLESS = {
    ("rows", "a row moved to the next file"),
    (f"{MANIFEST} undecoded", "is gone"),
    (f"{MANIFEST} size_columns", "is gone"),
    (f"{MANIFEST} targets.dtype", "is gone"),  # it has a default
}


# What a folder does not say twice: the source is needed to find harm to it.
WITH_SOURCE = {
    *(f"column {name}" for name in ("patches", "encoded", "targets", "labels", "image_hw")),
    *(f"column {name}" for name in ("input_ids", "weight")),
    "column example_index",  # of images that give as many tokens
    *(f"column {name}" for name in ("name", "kind", "stage", "reason", "exception")),
    *(f"{MANIFEST} {name}" for name in ("counts", "undecoded")),
    "rejects",
}


def noise(height: int, width: int, seed: int, mode: str = "RGB", **save: Any) -> bytes:
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    buffer = BytesIO()
    PillowImage.fromarray(pixels).save(buffer, **{"format": "PNG", **save})
    return buffer.getvalue()


@cache
def images() -> Dataset:
    """Images of all kinds that options and counts speak of."""
    smooth = PillowImage.linear_gradient("L").resize((60, 64)).convert("RGB")
    jpeg = BytesIO()
    smooth.save(jpeg, "JPEG")
    sizes = [(8, 8), (16, 9), (9, 22), (30, 30), (7, 5), (12, 40), (5, 5), (21, 13), (26, 8)]
    encoded = [noise(*size, seed) for seed, size in enumerate(sizes)]
    encoded += [
        noise(17, 15, 50, "RGBA"),
        jpeg.getvalue(),
        noise(14, 14, 51, format="JPEG", exif=b"Exif\0\0broken"),
        crashing.header_of(noise(16, 16, 52, format="JPEG")),
        crashing.header_of(noise(12, 16, 53, format="JPEG")),
        b"no image",
        noise(70, 70, 54),  # more than max_pixels
        noise(9, 9, 55),  # has no label
        noise(10, 19, 56),
    ]
    labels = [row % 3 for row in range(len(encoded))]
    labels[-2] = None
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "owl"])})
    rows = {"image": [{"bytes": one, "path": None} for one in encoded], "label": labels}
    heights = [
        PillowImage.open(BytesIO(one)).size[::-1] if one != b"no image" else (0, 0)
        for one in encoded
    ]
    rows |= {"height": [size[0] for size in heights], "width": [size[1] for size in heights]}
    rows["input_ids"] = [[row, *range(row % 4)] for row in range(len(encoded))]
    rows["input_ids"][1] = []
    features |= {
        "height": Value("int32"),
        "width": Value("int32"),
        "input_ids": List(Value("int32")),
    }
    return Dataset.from_dict(rows, features=Features(features))


@cache
def masked() -> Dataset:
    """Images with masks, lists of scores and weights, some of which are bad."""
    sizes = [(8, 8), (16, 9), (9, 22), (30, 30), (7, 5), (12, 40), (5, 5), (21, 13), (26, 8)]
    masks: list[bytes | None] = [noise(*size, 70 + n, "L") for n, size in enumerate(sizes)]
    masks[2], masks[6] = None, masks[0]  # missing, and of another size
    scores = [[n / 8, 1.0 - n % 2] for n in range(len(sizes))]
    rows = {
        "image": [{"bytes": noise(*size, n), "path": None} for n, size in enumerate(sizes)],
        "mask": [None if one is None else {"bytes": one, "path": None} for one in masks],
        "scores": scores,
        "weight": [-1.0 if n == 4 else 1 + n for n in range(len(sizes))],
    }
    features = Features({"image": Image(), "mask": Image(), "scores": List(Value("float32"))})
    features["weight"] = Value("float32")
    return Dataset.from_dict(rows, features=features)


@cache
def texts() -> Dataset:
    lengths = (3, 8, 1, 21, 5, 0, 2, 7, 4, 16, 6)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 1000, length).tolist() for length in lengths]
    columns = {
        "input_ids": tokens,
        "weight": [[value % 2 == 0 for value in row] for row in tokens],
        "name": [None if row == 2 else f"n{row}" for row in range(len(lengths))],
        "kind": [row % 2 for row in range(len(lengths))],
    }
    features = {
        "input_ids": List(Value("int32")),
        "weight": List(Value("bool")),
        "name": Value("string"),
        "kind": ClassLabel(names=["a", "b"]),
    }
    return Dataset.from_dict(columns, features=Features(features))


EVERY_OPTION: dict[str, Any] = {
    "seq_len": 20,
    "patch_size": 4,
    "crop": Crop(Uniform(0.4, 1.0)),
    "resolution": Side(Uniform(5, 18)),
    "max_tokens": 12,
    "max_upscale": 1.5,
    "drop_rate": OverTraining(0.1, 0.6, midpoint=0.5, width=0.2),
    "epochs": 4,
    "fit_last": "resolution",
    "fit_limit": 0.6,
    "max_segments": 3,
    "strategy": "bfd",
    "window": 9,
    "background": (9, 80, 200),
    "reducing_gap": 1.5,
    "downscale_filter": "lanczos",
    "upscale_filter": "bilinear",
    "max_pixels": 4200,
    "profiles": "ignore",
    "seed": 3,
    "epoch": 1,
}
_PLAIN = {"seq_len": 12, "patch_size": 4}
_TOKENS = {"seq_len": 8, "overflow": "split"}


class Kind(NamedTuple):
    """A folder to harm: its source, the options, and the token columns' padding that is not 0."""

    source: Any
    options: dict[str, Any]
    padding: dict[str, int]
    stages: list[tuple[str, str, str]]


_LOST = [
    ("decode", "undecodable", "OSError: cannot load this image"),
    ("probe", "unreadable", "UnidentifiedImageError: no known image format"),
    ("label", "bad label", "label is None, expected 0..2"),
]
_TEXTS_LOST = [("tokens", "empty", "input_ids holds nothing")]
_DROPPED = ("overflow", "too long", "9 tokens, expected at most 8 (seq_len)")
KINDS = {
    "images": Kind(images, EVERY_OPTION, {}, _LOST),
    "plans of images": Kind(images, {**_PLAIN, "materialize": False}, {}, _LOST[1:]),
    "encoded images": Kind(images, {**_PLAIN, "store": "encoded", "profiles": "ignore"}, {}, _LOST),
    "images by windows": Kind(images, {**_PLAIN, "window_rows": 5}, {}, _LOST),
    "images with columns of sizes": Kind(
        images,
        {**_PLAIN, "size_columns": ("height", "width"), "label_column": None},
        {},
        [_LOST[0], ("size", "bad size", "(0, 0)")],
    ),
    "images with all that they are compared with": Kind(
        masked,
        {
            **_PLAIN,
            "seq_len": 24,
            "image_column": "image",
            "label_column": "scores",
            "mask_column": "mask",
            "target_stride": 2,
            "weight_column": "weight",
            "resolution": Side(Uniform(6, 14)),
            "views": 2,
            "prefix_tokens": 2,
        },
        {"targets": 255},
        [
            ("decode", "mask missing", "the mask is null"),
            ("label", "bad weight", "weight is -1.0, expected a finite number, 0 or more"),
        ],
    ),
    "tokens": Kind(
        texts,
        {
            **_TOKENS,
            "mask_first_label": True,
            "pad_token_id": 9,
            "max_segments": 2,
            "window": 6,
        },
        {"input_ids": 9, "labels": -100},
        _TEXTS_LOST,
    ),
    "ragged tokens": Kind(
        texts, {**_TOKENS, "overflow": "truncate", "layout": "ragged"}, {}, _TEXTS_LOST
    ),
    "tokens dropped": Kind(texts, {**_TOKENS, "overflow": "drop"}, {}, [*_TEXTS_LOST, _DROPPED]),
    "pairs": Kind(
        images,
        {**_PLAIN, "text_seq_len": 8, "max_text": 3, "overflow": "truncate"},
        {},
        [*_LOST, *_TEXTS_LOST],
    ),
}
# Without the nightly profile: which harm; "" is every third of it.
IN_SHORT = {
    "images": "",
    "encoded images": f"column encoded|{MANIFEST} store",
    "images by windows": f"{MANIFEST} windows|{harming.JOB} w|rows|column exception",
    "tokens": "",
}


def build(kind: str, folder: Path, **others: Any) -> None:
    source, options, _, _ = KINDS[kind]
    options = {**options, "max_bad_fraction": 1.0, "num_workers": 0, "progress": False, **others}
    with pytest.MonkeyPatch.context() as patch:  # small files: of three rows, in two batches
        row = options["seq_len"] * (4**2 * 3 if source is not texts else 20)
        patch.setattr("packpipe.rows.files.FILE_BYTES", 3 * row)
        patch.setattr("packpipe.rows.files.BATCH_BYTES", 2 * row)
        write = packpipe.pack if "max_text" not in options else packpipe.pack_pairs
        given = files_of(source(), folder) if "window_rows" in options else source()
        write(given, output=folder, **options)
    # Files written as harmed ones are: harm that changes no value gives the same bytes then.
    for part in parts(folder):
        for name in (*harming.data(part), harming.REJECTS):
            harming.write(part / name, harming.read(part / name))
        harming.agree(part)


def files_of(source: Dataset, folder: Path) -> packpipe.ImageFiles:
    """Parquet files of two row groups beside a folder: windows are of some of these blocks."""
    table = source.data.table.cast(source.features.arrow_schema)
    files = folder.with_name(f"{folder.name} files")
    files.mkdir(exist_ok=True)
    for first in range(0, len(table), 6):
        pq.write_table(table.slice(first, 6), files / f"{first:03}.parquet", row_group_size=3)
    return packpipe.ImageFiles(files)


def parts(folder: Path) -> list[Path]:
    """The folders of rows in what was built."""
    return [folder] if (folder / MANIFEST).exists() else [folder / "images", folder / "texts"]


def harm_of(kind: str, folder: Path) -> Iterator[Harm]:
    """All harm, without that whose digest agrees."""
    for part in parts(folder):
        of_texts = part.name == "texts"
        padding, stages = KINDS[kind].padding, _TEXTS_LOST if of_texts else KINDS[kind].stages
        every = [harming.json_harm(harming.load(part / name), name) for name in harming.jsons(part)]
        every += [harming.column_harm(part), harming.row_harm(part, padding)]
        every += [harming.reject_harm(part, stages, padding), harming.image_harm(part)]
        yield from (one.within(part.relative_to(folder)) for some in every for one in some)


def signed_harm_of(folder: Path) -> Iterator[Harm]:
    """All harm to the manifest, whose digest is made to agree."""
    for part in parts(folder):
        for one in harming.json_harm(harming.load(part / MANIFEST), MANIFEST, signed=True):
            yield one.within(part.relative_to(folder))


def some_of(kind: str, harm: Iterator[Harm]) -> list[Harm]:
    """All harm, or the first to some columns, fields and kinds of moves."""
    if ALL:
        return list(harm)
    found: dict[str, Harm] = {}
    for one in harm:
        moved = "".join(char for char in one.how if char.isalpha() or char == " ")
        whole = one.what in ("rows", "rejects", "column encoded")
        if re.match(IN_SHORT[kind], one.what):
            found.setdefault(moved if whole else one.what, one)
    return list(found.values())[:: 1 if IN_SHORT[kind] else 3]


def place_of(one: Harm) -> str:
    """The column that is harmed, or the file and its first key."""
    name, _, field = one.what.partition(" ")
    return f"{name} {field.split('.')[0]}".strip()


class Tried(NamedTuple):
    """How much harm was done, what was found with the source alone, and what was not found."""

    number: int
    with_source: list[Harm]
    silent: list[Harm]


def tried(kind: str, folder: Path, harm: list[Harm], copy: Path) -> Tried:
    before, number = [harming.contents(part) for part in parts(folder)], 0
    with_source, silent = [], []
    for one in harm:
        harming.copied(folder, copy)
        one.do(copy)
        if [harming.contents(copy / part.relative_to(folder)) for part in parts(folder)] == before:
            continue
        number += 1
        if not packpipe.verify(copy):
            found = packpipe.verify(copy, KINDS[kind].source(), sample=None)
            (with_source if found else silent).append(one)
    return Tried(number, with_source, silent)


def opens_the_same(folder: Path, one: Harm, copy: Path) -> bool:
    """Whether the harm is to what `datasets` passes over in the sidecar that it reads."""
    if not one.what.startswith(INFO):
        return False
    one.do(harming.copied(folder, copy))
    infos = [
        [DatasetInfo.from_directory(str(some / part.relative_to(folder))) for part in parts(folder)]
        for some in (folder, copy)
    ]
    return infos[0] == infos[1]


def gives_the_same_rows(kind: str, folder: Path, one: Harm, tmp: Path) -> bool:
    """Whether rows packed with the options of a harmed manifest are those of the folder."""
    copy = harming.copied(folder, tmp / "harmed")
    one.do(copy)
    harmed = [config_of(copy / part.relative_to(folder)) for part in parts(folder)]
    if harmed == [config_of(part) for part in parts(folder)]:  # an option left out is its default
        return True
    if kind == "pairs":
        return False
    options = {field.name: getattr(harmed[0], field.name) for field in fields(harmed[0])}
    manifest = harming.load(copy / MANIFEST)
    build(kind, tmp / "again", **options, seed=manifest["seed"], epoch=manifest["epoch"])
    first, second = (
        (
            [table.to_pylist() for table in harming.data(some).values()],
            harming.read(some / harming.REJECTS).to_pylist(),
            harming.load(some / MANIFEST)["counts"],
        )
        for some in (folder, tmp / "again")
    )
    shutil.rmtree(tmp / "again")
    return first == second


def config_of(folder: Path) -> PackConfig | TokenConfig:
    manifest = harming.load(folder / MANIFEST)
    of_tokens = "token_columns" in manifest
    options = manifest["config"]
    return TokenConfig(**options) if of_tokens else PackConfig.from_dict(options)


@pytest.fixture(scope="module", params=KINDS if ALL else IN_SHORT)
def harmed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harmed") / "folder"
    build(request.param, folder)
    assert packpipe.verify(folder) == []
    assert packpipe.verify(folder, KINDS[request.param].source(), sample=None) == []
    return request.param, folder


def test_no_harm_is_silent(harmed, tmp_path):
    kind, folder = harmed
    found = tried(kind, folder, some_of(kind, harm_of(kind, folder)), tmp_path / "copy")
    left = [
        f"{one.what}: {one.how}"
        for one in found.silent
        if (one.what, one.how) not in HARMLESS
        and not opens_the_same(folder, one, tmp_path / "copy")
    ]
    assert left == []
    # What the folder alone does not tell is in these columns and counts.
    assert set(map(place_of, found.with_source)) <= WITH_SOURCE
    assert found.number > (4 if IN_SHORT.get(kind) and not ALL else 30)


def test_harm_whose_digest_agrees_is_silent_only_where_nothing_follows_from_it(harmed, tmp_path):
    kind, folder = harmed
    found = tried(kind, folder, some_of(kind, signed_harm_of(folder)), tmp_path / "copy")
    left = []
    for one in found.silent:
        field = place_of(one).removeprefix(f"{MANIFEST} ")
        same = field == "config" and gives_the_same_rows(kind, folder, one, tmp_path)
        if field not in NAMED_ONLY and not same and (one.what, one.how) not in HARMLESS:
            left.append(f"{one.what}: {one.how}")
    assert left == []
    assert found.number > (0 if IN_SHORT.get(kind) and not ALL else 10)
