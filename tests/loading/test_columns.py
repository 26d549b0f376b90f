"""Batches of NumPy arrays: those of tensors, in their order, and without torch."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import loading
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import packpipe
from packpipe import EpochPacks, PackedLoader, PackedStream
from packpipe.loading.batch import PackedBatch, TokenBatch
from packpipe.loading.columns import batch_columns

NUM = 36
LISTS = {"source", "holed"}  # of `texts`; integers become a list where there is a null among them
ALONE = {**loading.OPTIONS, "fit_last": None, "drop_rate": 0.4, "epochs": None}


def texts() -> datasets.Dataset:
    """Sequences with columns of every kind, unsigned ones and some with nulls among them."""
    lens = [number * 7 % 23 + 1 for number in range(NUM)]
    columns = {
        "input_ids": pa.array(
            [[number] * n for number, n in enumerate(lens)], pa.list_(pa.uint16())
        ),
        "labels": pa.array([list(range(n)) for n in lens], pa.list_(pa.int64())),
        "weights": pa.array([[0.5] * n for n in lens], pa.list_(pa.float32())),
        "score": pa.array([None if number % 5 == 0 else 0.1 * number for number in range(NUM)]),
        "kind": pa.array(range(NUM), "uint8"),
        "holed": pa.array([None if number % 7 == 0 else number for number in range(NUM)]),
        "known": pa.array([number % 3 == 0 for number in range(NUM)]),
        "source": pa.array([f"text {number}" for number in range(NUM)]),
    }
    return datasets.Dataset(pa.table(columns))


@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> dict[str, Callable[[], Any]]:
    """What makes packs, by their kind."""
    folder, images = tmp_path_factory.mktemp("columns"), loading.source(NUM)
    options = {"seq_len": 24, "progress": False}
    image_options = {**options, "num_workers": 0, **ALONE}
    kept = {
        "images": packpipe.pack(images, output=folder / "images", **image_options),
        "computed": packpipe.pack(images, materialize=False, **image_options),
        "texts": packpipe.pack(texts(), output=folder / "texts", **options),
        "epochs": EpochPacks(images, 24, num_workers=1, **loading.OPTIONS),
    }

    kept["picked texts"] = kept["texts"].shuffle(seed=3).select(range(12))

    def stream() -> PackedStream:
        dataset = images.to_iterable_dataset(num_shards=3)
        return PackedStream(dataset, 24, open_packs=4, **{**ALONE, "window": 20})

    return {**{kind: partial(kept.get, kind) for kind in kept}, "stream": stream}


def assert_same(columns: Any, batch: Any) -> None:
    """Fail unless a batch of NumPy arrays has the columns of one of tensors, byte for byte."""
    assert type(columns) is dict
    assert isinstance(batch, PackedBatch | TokenBatch)
    assert list(columns) == list(batch)
    for name, values in batch.items():
        found = columns[name]
        if isinstance(values, torch.Tensor):
            wanted = values.numpy()
            assert type(found) is np.ndarray
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
            assert found.tobytes() == wanted.tobytes(), name
        else:
            assert found == values, name


KINDS = ["images", "computed", "texts", "picked texts", "epochs", "stream"]


@st.composite
def passes(draw) -> dict[str, Any]:
    """The options of a loader, of one of several ranks."""
    kind = draw(st.sampled_from(KINDS))
    world_size = draw(st.integers(1, 3))
    options = {
        "batch_size": draw(st.integers(1, 2)),
        "world_size": world_size,
        "rank": draw(st.integers(0, world_size - 1)),
        "seed": draw(st.integers(0, 2)),
        "epoch": draw(st.integers(0, 3)),
        "tail": draw(st.sampled_from(["drop", "pad"])),
        "balance": kind != "stream" and draw(st.booleans()),
        "max_segments": draw(st.sampled_from([None, 30])),
    }
    if "images" in kind or "texts" in kind:
        options["shuffle"] = draw(st.booleans())
    return {"kind": kind, "options": options}


@given(passes(), st.integers(0, 4), st.booleans(), st.sampled_from([0, 2]))
def test_batches_are_those_of_tensors_and_each_continues_the_other(
    packs, case, stop, from_tensors, num_workers
):
    make, options = packs[case["kind"]], case["options"]

    def loader(as_numpy: bool) -> PackedLoader:
        return PackedLoader(make(), **options, as_numpy=as_numpy, num_workers=num_workers)

    arrays, tensors = loader(True), loader(False)
    begun = list(islice(zip(iter(arrays), iter(tensors), strict=True), stop))
    for columns, batch in begun:
        assert_same(columns, batch)
    state = arrays.state_dict()
    assert state == tensors.state_dict()
    for loader_of in (arrays, tensors):  # the pass under way, and the epoch after it
        loader_of.load_state_dict(json.loads(json.dumps(state)))
    other = loader(not from_tensors)
    other.load_state_dict(json.loads(json.dumps(state)))
    steps = 0
    for _ in range(2):
        for columns, batch, again in zip(arrays, tensors, other, strict=True):
            assert_same(columns, batch)
            same = (columns, again) if from_tensors else (again, batch)
            assert_same(*same)
            steps += 1
    assert steps >= 1
    assert arrays.state_dict() == tensors.state_dict() == other.state_dict()
    event(f"{case['kind']}, {'some' if begun else 'no'} steps before")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_all_batches_of_all_epochs_have_one_set_of_shapes(packs, kind, tail):
    loader = PackedLoader(packs[kind](), 3, tail=tail, as_numpy=True)
    shapes = {
        tuple((name, values.shape) for name, values in columns.items() if name not in LISTS)
        for _ in range(3)
        for columns in loader
    }
    assert len(shapes) == 1
    assert {shape[0] for _, shape in shapes.pop()} == {3}


@pytest.mark.parametrize("kind", ["images", "computed", "texts", "picked texts"])
def test_batches_are_in_memory_of_their_own(packs, kind):
    loader = PackedLoader(packs[kind](), 2, shuffle=False, as_numpy=True)
    first = next(iter(loader))
    wanted = {name: values.tobytes() for name, values in first.items() if name not in LISTS}
    for name in wanted:
        first[name][...] = 1
    again = next(iter(loader))
    assert {name: again[name].tobytes() for name in wanted} == wanted
    assert any(again[name].tobytes() != first[name].tobytes() for name in wanted)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_rows_by_number_are_the_batch_of_a_loader(packs, kind):
    packed = packs[kind]()
    loader = PackedLoader(packed, 3, shuffle=False, as_numpy=True)
    rows = packpipe.read_rows(packed, range(3))
    columns, wanted = batch_columns(rows, loader.packs.max_segments), next(iter(loader))
    assert list(columns) == list(wanted)
    for name, values in columns.items():
        np.testing.assert_array_equal(values, wanted[name])


REFUSED = [
    (
        {"workers": "processes"},
        "workers is 'processes', expected 'threads' with as_numpy; the other is for tensors",
    ),
    (
        {"pin_memory": True},
        "pin_memory is True, expected False with as_numpy; the other is for tensors",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_torch_does_is_refused(packs, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedLoader(packs["texts"](), 2, as_numpy=True, num_workers=1, **options)


def test_as_numpy_is_a_boolean(packs):
    with pytest.raises(TypeError, match=re.escape("as_numpy is 'yes', expected True or False")):
        PackedLoader(packs["texts"](), 2, as_numpy="yes")


def test_ragged_rows_are_refused_as_they_are_with_tensors():
    ragged = packpipe.pack(texts(), seq_len=24, layout="ragged", progress=False)
    message = "layout is 'ragged', expected rows of one length; pack with layout='fixed'"
    for as_numpy in (False, True):
        with pytest.raises(ValueError, match=re.escape(message)):
            PackedLoader(ragged, 2, as_numpy=as_numpy)


WITHOUT_TORCH = """
import without_torch
without_torch.hide()
import hashlib, sys
import datasets, packpipe

for folder in sys.argv[1:]:
    packed = datasets.load_from_disk(folder)
    loader = packpipe.PackedLoader(packed, 2, num_workers=1, epoch=1, as_numpy=True)
    digest = hashlib.sha256()
    for columns in loader:
        for name, values in columns.items():
            digest.update(name.encode())
            digest.update(values.tobytes() if hasattr(values, "tobytes") else repr(values).encode())
    print(digest.hexdigest())
try:
    packpipe.OnnxModel("missing.onnx")  # all that it imports is there
except FileNotFoundError as error:
    print(error)
try:
    packpipe.PackedLoader(packed, 2)
except ModuleNotFoundError as error:
    print(error.name, error)
assert not [name for name in sys.modules if name.split(".")[0] == "torch"]
"""


def test_a_process_without_torch_reads_the_same_and_says_what_it_lacks(packs):
    made = [packs[kind]() for kind in ("images", "texts")]
    folders = [Path(packed.cache_files[0]["filename"]).parent for packed in made]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCH, *folders],
        env=loading.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    *digests, no_file, said = run.stdout.splitlines()
    for packed, found in zip(made, digests, strict=True):
        digest = hashlib.sha256()
        for batch in PackedLoader(packed, 2, epoch=1):
            for name, values in batch.items():
                digest.update(name.encode())
                is_tensor = isinstance(values, torch.Tensor)
                digest.update(values.numpy().tobytes() if is_tensor else repr(values).encode())
        assert found == digest.hexdigest()
    assert no_file == "missing.onnx is no file; write one with packpipe export"
    assert said == (
        "torch torch is 'missing', expected installed for batches of tensors; "
        "pip install 'packpipe[torch]', or pass as_numpy=True"
    )
