"""Archives as sources: images in folders of classes, or beside files of classes."""

import io
import tarfile
import zipfile

import pytest
from PIL import Image

from packpipe.cli import archives
from packpipe.cli.archives import unpacked
from packpipe.cli.open_source import open_source, splits_in


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def png(width):
    out = io.BytesIO()
    Image.new("RGB", (width, 8)).save(out, "PNG")
    return out.getvalue()


IN_FOLDERS = {
    "photos/ox/1.png": png(1),
    "photos/ox/2.png": png(2),
    "photos/yak/3.png": png(3),
    "photos/.DS_Store": b"x",
}


def tar_of(path, files):
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["some.tar", "some.tgz", "some.tar.gz", "some.zip"])
def test_folders_of_an_archive_are_classes(name, tmp_path):
    path = tmp_path / name
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for member, content in IN_FOLDERS.items():
                file.writestr(member, content)
    else:
        tar_of(path, IN_FOLDERS.items())
    found = open_source(str(path), "train")
    assert found.features["label"].names == ["ox", "yak"]
    assert found["label"][:] == [0, 0, 1]
    assert [image.size[0] for image in found["image"]] == [1, 2, 3]
    assert unpacked(path).name == "some"


def test_files_of_classes_beside_images_are_their_labels(tmp_path):
    files = {"000.png": png(1), "000.cls": b"7\n", "001.png": png(2), "001.cls": b"12"}
    files |= {"002.png": png(3), "000.json": b"{}"}
    found = open_source(str(tar_of(tmp_path / "shard.tar", files.items())), "train")
    names = found.features["label"].names
    assert names == ["12", "7"]
    assert [None if label is None else names[label] for label in found["label"]] == [
        "7",
        "12",
        None,
    ]


def test_an_archive_is_unpacked_once_and_again_when_it_is_another(tmp_path, monkeypatch):
    path = tar_of(tmp_path / "some.tar", IN_FOLDERS.items())
    first = open_source(str(path), "train")
    with monkeypatch.context() as no:
        no.setattr(archives.shutil, "unpack_archive", lambda *_, **__: 1 / 0)
        assert open_source(str(path), "train")._fingerprint == first._fingerprint
    tar_of(path, [*IN_FOLDERS.items(), ("photos/yak/4.png", png(4))])
    assert len(open_source(str(path), "train")) == 4


def test_splits_of_an_archive_are_found(tmp_path):
    files = {f"{split}/{name}/1.png": png(1) for split in ("train", "val") for name in "ab"}
    path = str(tar_of(tmp_path / "some.tar", files.items()))
    assert splits_in(path) == ["train", "validation"]
    assert len(open_source(path, "validation")) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.png", b"1"), ("a.png", b"2")], "a.png in some.tar is 'there 2 times', expected one"),
        ([("../../out.png", b"1")], "expected a whole archive; "),
    ],
)
def test_what_would_be_lost_or_lead_out_is_refused(files, message, cache, tmp_path):
    path = tar_of(tmp_path / "some.tar", files)
    with pytest.raises(ValueError, match=message):
        open_source(str(path), "train")
    assert not list(cache.rglob("*.png"))
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ["some.tar", "some.tar.gz", "some.zip"])
def test_a_damaged_archive_leaves_nothing(name, cache, tmp_path):
    (tmp_path / name).write_bytes(b"no archive at all" * 100)
    with pytest.raises(ValueError, match=r"archive is '.*', expected a whole archive; "):
        open_source(str(tmp_path / name), "train")
    assert [path for path in cache.rglob("*") if path.is_file()] == []
