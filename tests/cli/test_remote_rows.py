"""Commands on packed rows in a store: what they do with a folder here."""

from __future__ import annotations

import json
import os

import datasets
import fsspec
import numpy as np
import pytest
from commands import run, told
from crashing import contents
from PIL import Image

import packpipe
from packpipe.cli.open_source import open_source
from packpipe.training.log import read_log


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(18):
        path = folder / ("ant", "bee", "cat")[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        size = (*draw.integers(8, 40, 2).tolist(), 3)
        Image.fromarray(draw.integers(0, 256, size).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def rows(images, tmp_path_factory):
    """A folder of packed rows."""
    folder = tmp_path_factory.mktemp("packed") / "rows"
    packing = ["--patch-size", 8, "--seq-len", 16, "--sides", 16, 24, "--num-workers", 0]
    told("pack", images, folder, *packing, "--profiles", "ignore")
    return folder


@pytest.fixture(scope="module")
def url(rows):
    found = f"memory://commands-{os.getpid()}/rows"
    for name, content in contents(rows).items():
        fsspec.filesystem("memory").pipe_file(f"{found}/{name}", content)
    return found


def test_stats_verify_and_show_say_and_draw_the_same(rows, url, tmp_path):
    assert told("stats", url).splitlines()[1:] == told("stats", rows).splitlines()[1:]
    here, there = (json.loads(told("verify", where, "--json")) for where in (rows, url))
    assert there == {**here, "folder": url}
    assert here["ok"]
    assert here["counts"]["packed"] == 18
    pictures = []
    for number, where in enumerate((rows, url)):
        for more in ([], [2], ["3", "--augment", "three", "--epochs", "1"]):
            path = tmp_path / f"{number}.png"
            told("show", where, *more, "-o", path)
            pictures.append(path.read_bytes())
    assert pictures[:3] == pictures[3:]


def test_train_learns_the_same_row_by_row_and_eval_measures_the_same_of_a_copy(rows, url, tmp_path):
    asked = ["--model", "Ti/8", "--steps", 1, "--batch-size", 2, "--precision", "float32"]
    asked += ["--num-workers", 1, "--val", 0.3, "--val-every", 1, "--log-every", 1]
    losses = []
    for number, (where, more) in enumerate(((rows, ()), (url, ("--cache-bytes", 0)))):
        told("train", where, tmp_path / str(number), *asked, *more)
        losses.append([(one["loss"], one["val_loss"]) for one in read_log(tmp_path / str(number))])
        options = json.loads((tmp_path / str(number) / "model.json").read_text())
        assert options == json.loads((tmp_path / "0" / "model.json").read_text())
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1
    found = [json.loads(told("eval", tmp_path / "0", where, "--json")) for where in (rows, url)]
    assert found[0]["budgets"] == found[1]["budgets"]
    files = [tmp_path / "here.parquet", tmp_path / "there.parquet"]
    told("embed", tmp_path / "0", rows, files[0], "--part-size", 7)
    told("embed", tmp_path / "0", url, files[1], "--part-size", 7, "--cache-bytes", 0)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_takes_no_packed_rows_says_so_of_those_in_a_store(url, tmp_path):
    expected = f"SOURCE is '{url}, packed rows', expected images or sequences, not packed yet"
    for command in (("pack", url, tmp_path / "out"), ("zero-shot", "model", url), ("bench", url)):
        said = run(*command)
        assert said.exit_code == 2
        assert expected in " ".join(said.stderr.split())
    said = run("train", url, "memory://run")
    assert "OUTPUT is 'memory:/run', expected a path without a scheme" in said.stderr
    said = run("verify", "memory://nothing")
    assert "folder is 'memory://nothing', expected a folder that packpipe.pack" in said.stderr


@pytest.fixture
def online(monkeypatch):
    """Whether something may be asked for of the Hub; here it is not asked."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_names_with_dots_or_without_an_ending_are_what_the_store_says(images, rows, url, tmp_path):
    store = fsspec.filesystem("memory")
    dotted, file = f"{url}-v1.0", f"memory://commands-{os.getpid()}/download"
    store.copy(url, dotted, recursive=True)
    assert len(open_source(dotted, "train", rows=True)) == len(packpipe.open_packed(rows))
    dataset = open_source(str(images), "train")
    dataset.to_parquet(tmp_path / "images.parquet")
    for name in (file, f"{file}.v2"):
        store.pipe_file(name, (tmp_path / "images.parquet").read_bytes())
        assert open_source(name, "train")["label"] == dataset["label"]


@pytest.mark.usefixtures("online")
def test_a_table_of_packed_rows_in_a_store_is_trained_on(rows, tmp_path):
    table = f"memory://commands-{os.getpid()}/rows.parquet"
    packpipe.open_packed(rows).to_parquet(tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    fsspec.filesystem("memory").pipe_file(table, content)
    asked = ["--model", "Ti/8", "--steps", 1, "--batch-size", 2, "--dry-run", "--json"]
    assert json.loads(told("train", table, tmp_path / "run", *asked))["images"] == 18


@pytest.mark.usefixtures("online")
def test_a_folder_of_parquet_files_in_a_store_is_a_source(images, tmp_path):
    dataset = open_source(str(images), "train")
    for part in range(2):
        dataset.shard(2, part, contiguous=True).to_parquet(tmp_path / f"{part}.parquet")
    folder = f"memory://parquet-{os.getpid()}/train"
    for name, content in contents(tmp_path).items():
        fsspec.filesystem("memory").pipe_file(f"{folder}/{name}", content)
    found = open_source(folder, "train")
    assert found["label"] == dataset["label"]
    assert packpipe.ImageFiles(folder).block_rows.sum() == len(found) == 18
