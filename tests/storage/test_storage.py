"""A folder that many write: files are whole or absent, on a file system and in a store."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from packpipe.durable import partial_of
from packpipe.storage.storage import LocalFolder, RemoteFolder, storage_at

NUMBERS = count()


@pytest.fixture(params=["folder", "file://", "memory://"])
def storage(request, tmp_path):
    roots = {
        "folder": str(tmp_path / "out"),
        "file://": f"file://{tmp_path}/out",
        "memory://": f"memory://out-{os.getpid()}-{next(NUMBERS)}",
    }
    return storage_at(roots[request.param])


def test_what_was_put_is_listed_and_read_until_it_is_removed(storage):
    assert storage.listed() == storage.listed("_commits") == {}
    assert storage.folders() == set()
    assert storage.get("a") is None
    storage.put("a", b"one")
    storage.put("_commits/3.json", b"{}")
    storage.put("a", b"other")
    assert storage.listed() == {"a": 5}
    assert storage.folders() == {"_commits"}
    assert storage.listed("_commits") == {"3.json": 2}
    assert (storage.get("a"), storage.get("_commits/3.json")) == (b"other", b"{}")
    storage.remove("a")
    storage.remove("a")
    assert storage.get("a") is None
    assert storage.listed() == {}


def test_a_file_that_is_replaced_has_another_version_and_others_keep_theirs(storage):
    assert storage.version("a") is None
    storage.put("a", b"one")
    storage.put("b", b"one")
    first = [storage.version(name) for name in ("a", "b")]
    storage.put("a", b"other")
    assert storage.version("a") not in first
    assert storage.version("a") == storage.version("a")
    assert storage.version("b") == first[1]


def test_of_many_who_put_one_file_if_absent_one_does_and_all_get_it(storage):
    contents = [bytes([number]) * 1000 for number in range(16)]
    with ThreadPoolExecutor(8) as executor:
        found = set(executor.map(lambda own: storage.put_if_absent("job.json", own), contents))
    assert len(found) == 1
    assert storage.get("job.json") in found
    assert storage.listed() == {"job.json": 1000}


def test_of_many_one_puts_a_file_where_files_have_one_name_alone(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    storage = storage_at(tmp_path)
    assert storage.put_if_absent("job.json", b"one") == b"one"
    assert storage.put_if_absent("job.json", b"other") == b"one"
    assert storage.listed() == {"job.json": 3}


def test_a_file_is_there_when_it_was_put_and_never_before(storage):
    with storage.scratch("data") as path:
        partial_of(path).write_bytes(b"half")
        assert storage.get("data.arrow") is None
        with partial_of(path).open("ab") as file:
            file.write(b" and half")
        storage.put_file("data.arrow", path)
    assert storage.get("data.arrow") == b"half and half"
    assert storage.listed() == {"data.arrow": 13}


def write_half(storage):
    with storage.scratch("data.arrow") as path:
        partial_of(path).write_bytes(b"half")
        raise RuntimeError("disk")


def test_a_block_that_fails_leaves_the_file_that_was_there_and_no_other(storage):
    storage.put("data.arrow", b"before")
    with pytest.raises(RuntimeError, match="disk"):
        write_half(storage)
    assert storage.get("data.arrow") == b"before"
    assert storage.listed() == {"data.arrow": 6}


def test_two_write_the_same_file_at_once_and_the_later_one_stays(storage):
    with storage.scratch("a") as one, storage.scratch("a") as other:
        assert one != other
        partial_of(one).write_bytes(b"one")
        partial_of(other).write_bytes(b"other")
        storage.put_file("a", other)
        storage.put_file("a", one)
    assert storage.get("a") == b"one"
    assert storage.listed() == {"a": 3}


def test_a_local_file_is_synced_before_its_name_is(tmp_path, monkeypatch):
    seen = []
    real = os.fsync

    def fsync(descriptor):
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split(".")[0])
        seen.append((tmp_path / "a").exists())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    storage_at(tmp_path).put("a", b"one")
    assert seen == ["a", False, tmp_path.name, True]


def test_a_store_that_fails_for_another_reason_says_so(monkeypatch):
    storage = storage_at("memory://fails")
    filesystem = type(storage._filesystem)

    def fails(self, path, value, mode="overwrite", **options):  # noqa: ARG001
        raise PermissionError("no")

    monkeypatch.setattr(filesystem, "pipe_file", fails)
    with pytest.raises(PermissionError, match="no"):
        storage.put_if_absent("job.json", b"{}")


def test_a_url_is_a_store_and_a_path_a_folder(tmp_path):
    assert storage_at("s3://bucket/rows/") == RemoteFolder("s3://bucket/rows", {})
    assert storage_at(tmp_path) == LocalFolder(str(tmp_path))
    assert storage_at(f"file://{tmp_path}") == LocalFolder(str(tmp_path))
    assert (
        storage_at(f"file:{tmp_path}")
        == storage_at(f"local://{tmp_path}")
        == LocalFolder(str(tmp_path))
    )
    expected = "output is 's3:/bucket', expected two slashes after its scheme; pass a text, for a"
    with pytest.raises(ValueError, match=expected):
        storage_at(Path("s3://bucket"))
    assert "secret" not in repr(storage_at("s3://bucket", {"key": "secret"}))
