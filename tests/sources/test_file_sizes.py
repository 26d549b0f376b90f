"""Sizes of images in files: read once, kept in one mapped file, read again if anything differs."""

from __future__ import annotations

import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from packpipe.images.bad_images import SizeChanged
from packpipe.rows.rejects import Tolerance, TooManyRejects
from packpipe.sources import file_sizes as module
from packpipe.sources.file_sizes import FileSizes, file_sizes
from packpipe.sources.image_columns import ImageColumns
from packpipe.sources.image_files import ImageFiles

NUM_ROWS = 23
COLUMNS = ImageColumns("image", "label", None, None, "weight")
BAD = {3: "unreadable", 4: "missing", 10: "bad label", 17: "bad weight"}


def source(heights=range(5, 28)) -> Dataset:
    """Images of other sizes each, four of which are bad, with columns of sizes."""
    images = [pictures.encoded_image(h, 4 + h % 3, h) for h in heights]
    labels, weights = [row % 2 for row in range(NUM_ROWS)], [1.0] * NUM_ROWS
    images[3], images[4], labels[10], weights[17] = b"no image", None, None, -1.0
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=["a", "b"]),
            "weight": Value("float32"),
            "h": Value("int32"),
            "w": Value("int32"),
        }
    )
    columns = {
        "image": [image and {"bytes": image, "path": None} for image in images],
        "label": labels,
        "weight": weights,
        "h": list(heights),
        "w": [4 + h % 3 for h in heights],
    }
    return Dataset.from_dict(columns, features=features)


def written(folder, per_block: int, dataset: Dataset | None = None) -> ImageFiles:
    dataset = source() if dataset is None else dataset
    folder.mkdir(exist_ok=True)
    rows = dataset.data.table.cast(dataset.features.arrow_schema)
    for first in (0, 10):
        path = folder / f"part-{first:02}.parquet"
        pq.write_table(rows.slice(first, 10 + first * 2), path, row_group_size=per_block)
    return ImageFiles(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return written(tmp_path_factory.mktemp("files"), 4)


def sizes_in(folder, files, columns=COLUMNS, share=1.0, workers=2) -> FileSizes:
    with ThreadPoolExecutor(workers) as executor:
        return file_sizes(
            files,
            columns,
            folder,
            max_pixels=10**6,
            tolerance=Tolerance(len(files), share, 5),
            executor=executor,
        )


def refuse(*_, **__):
    raise AssertionError("a block is read again")


@given(per_block=st.integers(1, 12), from_columns=st.booleans(), workers=st.integers(1, 3))
@settings(max_examples=4)
def test_every_image_has_its_size_and_every_reject_none(
    tmp_path_factory, per_block, from_columns, workers
):
    folder = tmp_path_factory.mktemp("sizes")
    columns = COLUMNS._replace(sizes=("h", "w")) if from_columns else COLUMNS
    found = sizes_in(folder / "kept", written(folder / "files", per_block), columns, 1.0, workers)
    # What columns say is taken at its word: such an image is a reject when it is decoded.
    bad = {row: why for row, why in BAD.items() if row > 4 or not from_columns}
    wanted = [[0, 0] if h - 5 in bad else [h, 4 + h % 3] for h in range(5, 28)]
    assert found.image_hw.tolist() == wanted
    assert found.image_hw.dtype == np.int32
    assert {one.example_index: one.reason for one in found.rejects} == bad


def test_they_are_read_once_and_mapped_after(files, tmp_path, monkeypatch):
    first = sizes_in(tmp_path, files)
    monkeypatch.setattr(module, "block_sizes", refuse)
    again = sizes_in(tmp_path, files)
    assert isinstance(again.image_hw, np.memmap)
    assert again.image_hw.tolist() == first.image_hw.tolist()
    assert (again.digest, again.rejects, again.path) == (first.digest, first.rejects, first.path)
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]
    assert np.load(first.path).shape == (NUM_ROWS, 2)


def test_another_process_maps_the_file_and_is_sent_no_sizes(files, tmp_path):
    found = sizes_in(tmp_path, files)
    assert len(found.image_hw) == NUM_ROWS
    sent = pickle.dumps(found)
    assert b"numpy" not in sent
    assert pickle.loads(sent).image_hw.tolist() == found.image_hw.tolist()  # noqa: S301


def test_of_several_at_once_one_reads_each_block_and_the_others_wait(files, tmp_path, monkeypatch):
    read, real = [], module.block_sizes

    def counting(reader, block, *args):
        read.append(block)
        return real(reader, block, *args)

    monkeypatch.setattr(module, "block_sizes", counting)
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda _: sizes_in(tmp_path, files), range(4)))
    assert len({one.digest for one in found}) == 1
    assert len(read) == len(set(read)) == len(files.block_rows) == 7


@pytest.mark.parametrize("change", ["files", "label", "classes", "limit"])
def test_what_they_depend_on_is_in_the_name_of_their_file(files, tmp_path, change):
    kept, columns = sizes_in(tmp_path, files), COLUMNS
    if change == "files":
        files = written(tmp_path / "files", 4, source(range(6, 29)))
    elif change == "label":
        columns = columns._replace(label=None)
    elif change == "classes":
        other = source().cast_column("label", ClassLabel(names=["a", "b", "c"]))
        files = written(tmp_path / "files", 4, other)
    with ThreadPoolExecutor(1) as executor:
        found = file_sizes(
            files,
            columns,
            tmp_path,
            max_pixels=100 if change == "limit" else 10**6,
            tolerance=Tolerance(NUM_ROWS, 1.0, 100),
            executor=executor,
        )
    assert found.path != kept.path
    assert kept.path.is_file()
    if change == "limit":
        assert {one.reason for one in found.rejects} > {"too many pixels"}
        assert (found.image_hw.prod(1) <= 100).all()


def cut(content):
    return content[:-30]


def nothing(_):
    return b""


def another(content):
    end = content.index(b'{"known"')
    said = {**json.loads(content[end:]), "known": "0" * 64}
    return content[:end] + json.dumps(said).encode()


@pytest.mark.parametrize("damage", [cut, nothing, another])
def test_a_file_that_is_not_as_written_is_read_anew(files, tmp_path, damage, caplog):
    first = sizes_in(tmp_path, files)
    content = first.path.read_bytes()
    first.path.write_bytes(damage(content))
    assert sizes_in(tmp_path, files).rejects == first.rejects
    assert "is broken" in caplog.text
    assert first.path.read_bytes() == content


def test_too_many_rejects_are_an_error_while_reading_and_of_what_is_kept(files, tmp_path):
    said = re.escape("4 of 23 examples (17.39%), expected at most 16.00%")
    with pytest.raises(TooManyRejects, match=said):
        sizes_in(tmp_path, files, share=0.16)
    assert list(tmp_path.iterdir()) == []
    sizes_in(tmp_path, files)
    with pytest.raises(TooManyRejects, match=said):
        sizes_in(tmp_path, files, share=0.16)


def test_a_size_that_turns_out_to_be_wrong_is_forgotten(files, tmp_path):
    found = sizes_in(tmp_path, files)
    with pytest.raises(ValueError, match="a word"), found.forgotten_if_wrong():
        raise ValueError("a word")
    assert found.path.is_file()
    with pytest.raises(SizeChanged), found.forgotten_if_wrong():
        raise SizeChanged("3 is (4, 5), expected (5, 4)")
    assert not found.path.is_file()


def test_a_source_without_rows_has_none(tmp_path):
    rows = source().data.table.cast(source().features.arrow_schema).slice(0, 0)
    pq.write_table(rows, tmp_path / "none.parquet")
    found = sizes_in(tmp_path, ImageFiles(tmp_path / "none.parquet"))
    assert found.image_hw.shape == (0, 2)
    assert found.rejects == []


def labelled(path, labels) -> ImageFiles:
    """Images and labels in a file, written so that its end says nothing of the labels' order."""
    rows = source().data.table.slice(5, 4).drop_columns(["label"])
    rows = rows.append_column("label", pa.array(labels, pa.int64()))
    pq.write_table(rows, path, compression="none", use_dictionary=False)
    os.utime(path, (10**9, 10**9 + labels[1]))
    return ImageFiles(path)


def test_labels_that_changed_places_are_read_again_and_have_another_digest(tmp_path):
    path = tmp_path / "one.parquet"
    columns = COLUMNS._replace(weight=None)
    files = labelled(path, [0, 0, 1, 1])
    first = sizes_in(tmp_path, files, columns)
    again = labelled(path, [0, 1, 0, 1])
    assert again.fingerprint == files.fingerprint
    other = sizes_in(tmp_path, again, columns)
    assert other.digest == first.digest
    assert other.values != first.values
    assert other.rejects == []
    assert sizes_in(tmp_path, labelled(path, [0, 0, 1, 1]), columns).values == first.values


def test_of_images_that_could_not_be_read_by_their_paths_every_opening_warns(tmp_path, caplog):
    picture = tmp_path / "picture.png"
    picture.write_bytes(pictures.encoded_image(4, 4))
    paths = [str(picture), str(tmp_path / "away.png")]
    images = [{"bytes": None, "path": path} for path in paths] + [{"bytes": b"no", "path": None}]
    features = Features({"image": Image()})
    rows = Dataset.from_dict({"image": images}, features=features).data.table
    pq.write_table(rows.cast(features.arrow_schema), tmp_path / "one.parquet")
    files, columns = ImageFiles(tmp_path / "one.parquet"), ImageColumns("image", None, None, None)
    for _ in range(2):
        caplog.clear()
        found = sizes_in(tmp_path / "kept", files, columns)
        assert [one.reason for one in found.rejects] == ["missing", "unreadable"]
        (said,) = caplog.messages
        assert said.startswith("1 images that rows name by paths could not be read")
        assert f"as long as {found.path} is kept: remove it" in said
    (tmp_path / "away.png").write_bytes(picture.read_bytes())
    found.path.unlink()
    assert [one.reason for one in sizes_in(tmp_path / "kept", files, columns).rejects] == [
        "unreadable"
    ]


def test_a_bar_counts_the_images_that_are_read(files, tmp_path, monkeypatch):
    seen = []

    def bar(**options):  # that of `datasets` shows nothing where another test has turned it off
        seen.append(tqdm(**{**options, "disable": False}))
        return seen[0]

    monkeypatch.setattr(module.datasets.utils, "tqdm", bar)
    sizes_in(tmp_path, files)
    assert [(one.n, one.total) for one in seen] == [(NUM_ROWS, NUM_ROWS)]
