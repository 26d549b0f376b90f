"""Archives as sources: images in folders of classes, or beside files of classes."""

import gzip
import io
import re
import shutil
import tarfile
import zipfile
from types import SimpleNamespace

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
        no.setattr(archives, "_unpack", lambda *_: 1 / 0)
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
        (
            [("cat/a.png", b"1"), ("./cat//a.png", b"2")],
            "cat/a.png in some.tar is 'there 2 times', expected one",
        ),
        (
            [("a", b"1"), ("a/b.png", b"2")],
            "a in some.tar is 'a file and a folder', expected one file of each name; ",
        ),
        ([("../../out.png", b"1")], "a name in some.tar is '../../out.png', expected a path insi"),
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


def zip_of(path, files):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files:
            file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../b.png", "/a.png", "C:/a.png", "a\\b.png", "a/.."]
)
def test_a_zip_that_leads_out_is_refused_by_name(name, tmp_path):
    path = zip_of(tmp_path / "some.zip", [("b/1.png", b"1"), (name, b"1")])
    with pytest.raises(ValueError, match=re.escape(f"a name in some.zip is {name!r}, expected a")):
        unpacked(path)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_dots_in_names_lead_nowhere(make, tmp_path):
    names = {"cat/a..png", "dog/v1..2/b.png", "dog/...png", "./dog/c.png", "..d/e.png"}
    path = make(
        tmp_path / f"some{'.zip' if make is zip_of else '.tar'}", [(n, b"1") for n in names]
    )
    there = {one.relative_to(unpacked(path)).as_posix() for one in unpacked(path).rglob("*.png")}
    assert there == {name.removeprefix("./") for name in names}


@pytest.mark.parametrize("name", ["some.tar", "some.tgz"])
def test_a_tar_is_whole_or_refused(name, tmp_path):
    members = [(f"{n}.png", bytes([n]) * 600) for n in range(1, 4)]  # of three blocks each
    whole = tar_of(tmp_path / "whole.tar", members).read_bytes()
    flipped = bytearray(whole)
    flipped[3 * 512 + 3] ^= 255  # in the header of the second
    damaged = [bytes(flipped), whole + whole, whole[: 9 * 512 + 512]]
    damaged += [whole[:end] for end in (9 * 512, 6 * 512, 6 * 512 + 200, 8 * 512)]
    write = gzip.compress if name == "some.tgz" else bytes
    for content in damaged:
        (tmp_path / name).write_bytes(write(content))
        with pytest.raises(ValueError, match=f"{name}', expected a whole archive; "):
            unpacked(tmp_path / name)
    (tmp_path / name).write_bytes(write(whole + bytes(512)))
    assert len(list(unpacked(tmp_path / name).iterdir())) == 3


def test_a_compressed_tar_is_read_to_its_checksum(tmp_path):
    path = tar_of(tmp_path / "some.tgz", [("1.png", b"1" * 600)])
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    with pytest.raises(ValueError, match=r"some.tgz', expected a whole archive; .*CRC"):
        unpacked(path)


def test_an_archive_larger_than_the_disk_is_refused(cache, tmp_path, monkeypatch):
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("1.png", bytes(3_000_000))
    free = SimpleNamespace(free=2_000_000)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: free)
    message = r"some.zip, 3.0 MB unpacked', expected 2.0 MB at most, the free space of its cache; "
    with pytest.raises(ValueError, match=message):
        unpacked(path)
    assert not list(cache.rglob("*.png"))


@pytest.mark.parametrize(
    ("name", "folder"), [(".a9.tar", "a9"), ("A.TAR", "A"), ("X.ZIP", "X"), (".tar", "tar")]
)
def test_suffixes_have_any_case_and_folders_a_name(name, folder, tmp_path):
    make = zip_of if name.endswith("ZIP") else tar_of
    path = make(tmp_path / name, [("ox/1.png", png(1)), ("yak/2.png", png(2))])
    assert archives.is_archive(path)
    assert unpacked(path).name == folder
    assert open_source(str(path), "train")["label"][:] == [0, 1]


def test_of_two_that_unpack_at_once_one_is_taken(tmp_path, monkeypatch):
    path = zip_of(tmp_path / "some.zip", [("a/1.png", b"1")])
    unpack = archives._unpack

    def with_another(archive, unfinished):
        unpack(archive, unfinished)
        shutil.copytree(unfinished, unfinished.parents[1] / unfinished.name)

    monkeypatch.setattr(archives, "_unpack", with_another)
    assert [one.name for one in unpacked(path).rglob("*.png")] == ["1.png"]


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")
def test_a_python_without_filters_unpacks_files_and_refuses_links(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)  # as before Python 3.11.4
    path = tar_of(tmp_path / "some.tar", IN_FOLDERS.items())
    assert open_source(str(path), "train")["label"][:] == [0, 0, 1]
    with tarfile.open(tmp_path / "linked.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    message = "a.png in a tar is 'a link or a device', expected a file or a folder; unpack it, or"
    with pytest.raises(ValueError, match=message):
        unpacked(tmp_path / "linked.tar")
