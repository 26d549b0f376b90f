"""A folder of images, as a command opens it: no image is lost, and nothing is left out unsaid."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import datasets
import pictures
import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

import packpipe
from packpipe.cli.image_folder import splits_of
from packpipe.cli.main import app
from packpipe.cli.open_source import open_source

PNG = pictures.encoded_image(8, 12)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tree(folder: Path, *names: str, **texts: str) -> Path:
    """A folder of images of these names, and of texts."""
    photos = folder / "photos"
    for name in names:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(PNG)
    for name, text in texts.items():
        (photos / name.replace("__", "/").replace("_", ".")).write_text(text)
    return photos


def paths_of(rows: Dataset) -> list[str]:
    return [one["path"] for one in rows.with_format("arrow")[:]["image"].to_pylist()]


def labels_of(rows: Dataset) -> list[str] | None:
    if "label" not in rows.features:
        return None
    return list(
        map(rows.features["label"].int2str, rows.with_format("arrow")[:]["label"].to_pylist())
    )


def test_class_folders_named_like_splits_lose_no_image(tmp_path):
    names = [f"{name}/{number}.png" for name in ("train", "test", "car") for number in range(5)]
    photos = tree(tmp_path, *names)
    result = CliRunner().invoke(app, ["pack", str(photos), str(tmp_path / "rows")])
    assert (result.exit_code, result.stderr) == (0, "")
    assert packpipe.summarize(tmp_path / "rows").manifest["counts"]["packed"] == 15
    rows = open_source(str(photos), "train")
    assert labels_of(rows) == ["car"] * 5 + ["test"] * 5 + ["train"] * 5


@pytest.mark.parametrize(
    "suffix", ["avif", "qoi", "heic", "heif", "hif", "jxl", "dds", "PNG", "JPEG", "webp", "jp2"]
)
def test_an_image_of_any_format_is_an_example(tmp_path, suffix):
    photos = tree(tmp_path, "a.png", f"b.{suffix}")
    assert paths_of(open_source(str(photos), "train")) == [str(p) for p in sorted(photos.iterdir())]


@pytest.mark.parametrize(
    "name",
    ["my_test_shot.png", "test.png", "val-1.png", "a[1].png", "*.png", "é ü.png", "a/b/c.png"],
)
def test_no_name_of_a_file_hides_it(tmp_path, capsys, name):
    photos = tree(tmp_path, "a.png", name)
    assert sorted(paths_of(open_source(str(photos), "train"))) == sorted(
        str(photos / one) for one in ("a.png", name)
    )
    assert capsys.readouterr().err == ""


TREES = {
    "flat": ["b.png", "a.png", "c.jpg"],
    "classes": ["dog/1.png", "cat/2.png", "cat/1.png"],
    "classes in a folder": ["all/dog/1.png", "all/cat/2.png"],
    "one class": ["cat/1.png", "cat/2.png"],
    "classes of several depths": ["dog/1.png", "cat/small/2.png"],
    "splits of classes": ["train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png"],
    "one split of classes": ["train/cat/1.png", "train/dog/1.png"],
    "splits by year": ["train2017/cat/1.png", "train2017/dog/2.png", "val2017/cat/1.png"],
    "hidden": ["cat/1.png", "dog/1.png", ".cat/1.png", "cat/.1.png", "__cat__/1.png"],
}


@pytest.mark.parametrize("name", TREES)
def test_rows_and_labels_are_those_of_imagefolder_where_it_loses_none(tmp_path, name):
    photos = tree(tmp_path, *TREES[name])
    wanted = datasets.load_dataset("imagefolder", data_dir=str(photos))
    visible = [
        one for one in TREES[name] if not any(p.startswith((".", "__")) for p in one.split("/"))
    ]
    assert sum(map(len, wanted.values())) == len(visible)
    for split, rows in wanted.items():
        found = open_source(str(photos), split)
        assert paths_of(found) == paths_of(rows)
        assert labels_of(found) == labels_of(rows)
        assert found.features == rows.features


def test_splits_of_other_names_are_asked_for_by_name(tmp_path):
    photos = tree(tmp_path, "test/cat/1.png", "test/dog/1.png")
    assert len(open_source(str(photos), "test")) == 2
    with pytest.raises(ValueError, match="split is 'train', expected one of test; pass --split"):
        open_source(str(photos), "train")


# `datasets` leaves the file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata_csv", "file_name,score\ncat/1.png,3\ncat/2.heic,4\n"),
        (
            "metadata_jsonl",
            '{"file_name": "cat/1.png", "score": 3}\n{"file_name": "cat/2.heic", "score": 4}\n',
        ),
    ],
)
def test_metadata_says_which_images_there_are(tmp_path, capsys, name, text):
    photos = tree(tmp_path, "cat/1.png", "cat/2.heic", "test/3.png", **{name: text})
    rows = open_source(str(photos), "train")
    assert paths_of(rows) == [str(photos / "cat/1.png"), str(photos / "cat/2.heic")]
    assert rows["score"][:] == [3, 4]
    assert capsys.readouterr().err == "photos: 2 of 3 files are in split train; not test/3.png\n"
    gc.collect()


def test_what_is_left_out_is_said(tmp_path, capsys):
    names = ["train/cat/1.png", "train/dog/1.png", *(f"test/cat/{n}.png" for n in range(4))]
    photos = tree(tmp_path, *names, notes_txt="", IMG0001="")
    assert len(open_source(str(photos), "train")) == 2
    said = "photos: 2 of 8 files are in split train; not test/cat/0.png, test/cat/1.png, "
    assert capsys.readouterr().err == f"{said}test/cat/2.png, ...\n"
    photos = tree(tmp_path / "tables", "figure.png")
    Dataset.from_dict({"input_ids": [[1], [2]]}).to_parquet(photos / "rows.parquet")
    assert open_source(str(photos), "train").column_names == ["input_ids"]
    assert capsys.readouterr().err == "photos: 0 of 1 files are in split train; not figure.png\n"


def test_texts_beside_images_do_not_make_it_a_folder_of_texts(tmp_path, capsys):
    photos = tree(tmp_path, "1.png", "2.png", **{"1_txt": "a", "2_txt": "b", "1_json": "{}"})
    assert len(open_source(str(photos), "train")) == 2
    assert "2 of 5 files are in split train; not 1.json, 1.txt, 2.txt" in capsys.readouterr().err
    photos = tree(tmp_path / "texts", "logo.png", a_jsonl='{"n": 1}\n', b_jsonl='{"n": 2}\n')
    assert open_source(str(photos), "train").column_names == ["n"]


def test_a_source_may_be_a_file_behind_a_scheme(tmp_path):
    Dataset.from_dict({"input_ids": [[1], [2]]}).to_parquet(tmp_path / "rows.parquet")
    assert len(open_source(f"file://{tmp_path}/rows.parquet", "train")) == 2
    with pytest.raises(
        ValueError, match=r"SOURCE is 'memory://packpipe/none\.parquet', expected a d"
    ):
        open_source("memory://packpipe/none.parquet", "train")


def test_links_are_followed_and_a_circle_of_them_ends(tmp_path):
    photos = tree(tmp_path, "cat/1.png")
    (photos / "cat" / "around").symlink_to(photos)
    (photos / "dog").symlink_to(photos / "cat")
    (photos / "none.png").symlink_to(photos / "nothing.png")
    found = {os.path.relpath(path, photos) for path in paths_of(open_source(str(photos), "train"))}
    assert found == {"cat/1.png", "dog/1.png", "none.png"}


def test_the_same_files_are_the_same_dataset(tmp_path):
    photos = tree(tmp_path, "cat/1.png", "dog/1.png")
    first = open_source(str(photos), "train")._fingerprint
    assert open_source(str(photos), "train")._fingerprint == first
    (photos / "cat" / "1.png").rename(photos / "dog" / "2.png")
    assert open_source(str(photos), "train")._fingerprint != first


PARTS = st.sampled_from(["cat", "dog", "train", "test", "val", "my-test", "a"])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=4), min_size=1, max_size=8))
@example([["train", "a"], ["test", "a"], ["cat", "a"]])
@example([["train", "cat", "a"], ["test", "cat", "a"], ["a"]])
def test_every_image_is_in_one_split_or_beside_the_folders_of_splits(names):
    paths = sorted({"/".join(["/photos", *name]) + ".png" for name in names})
    found = splits_of(Path("/photos"), paths)
    placed = [path for some in found.values() for path in some]
    assert len(placed) == len(set(placed)) > 0
    assert set(placed) <= set(paths)
    for some in found.values():
        assert some == sorted(some)
    folders = {part for name in names for part in name[:-1]}
    if not folders & {"train", "test", "val", "my-test"}:
        assert found == {"train": paths}
    for path in set(paths) - set(placed):  # only what lies beside the folders of splits
        assert not any(path.startswith(os.path.dirname(other) + "/") for other in placed)
