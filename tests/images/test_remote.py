"""Images behind a scheme: what reads them, and whose fault it is when nothing does."""

from __future__ import annotations

import gzip
import re
import socket
import sys
import zipfile

import fsspec
import pytest
from test_kinds import traced

from packpipe.images import remote
from packpipe.images.bad_images import BadImage
from packpipe.images.remote import fetched, is_remote


class Failing(fsspec.AbstractFileSystem):
    """A storage that answers with an error."""

    protocol = "packpipe-failing"
    error: BaseException = OSError()

    def _open(self, *_: object, **__: object) -> None:
        raise self.error


@pytest.fixture
def failing():
    fsspec.register_implementation(Failing.protocol, Failing, clobber=True)
    return Failing


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("s3://bucket/a.png", True),
        ("zip://a.png::b.zip", True),
        ("memory://a.png", True),
        ("https://host/a.png", True),
        ("hf://datasets/somebody/photos/a.png", True),
        ("file:///a.png", True),
        ("a.png", False),
        ("folder/a:b.png", False),
        ("photo:1.png", False),
        ("there://a.png", False),  # a folder named "there:"
        ("./s3://a.png", False),
        (b"s3://bucket/a.png", False),
    ],
)
def test_a_scheme_is_one_that_fsspec_knows(path, wanted):
    assert is_remote(path) is wanted


def test_what_has_no_scheme_is_left_as_it_is(tmp_path):
    for image in (b"bytes", "a.png", str(tmp_path / "s3:")):
        assert fetched(image) is image


def test_a_scheme_without_its_opener_is_an_error_that_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    message = (
        "path is 's3://bucket/a.png', expected a scheme that fsspec can open; "
        "Install s3fs to access S3"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fetched("s3://bucket/a.png")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "reset"),
        TimeoutError("late"),
        socket.gaierror(-2, "Name or service not known"),
        OSError(28, "no space"),
    ],
)
def test_a_storage_that_does_not_answer_is_no_fault_of_the_image(failing, monkeypatch, error):
    monkeypatch.setattr(failing, "error", error)
    with pytest.raises(OSError, match=re.escape(str(error))) as found:
        fetched("packpipe-failing://a.png")
    assert not isinstance(found.value, BadImage)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("a.png"), "missing"),
        (PermissionError("a.png"), "unreadable"),
        (ValueError("damaged"), "unreadable"),
    ],
)
def test_an_error_of_one_file_is_a_reject(failing, monkeypatch, error, reason):
    monkeypatch.setattr(failing, "error", error)
    with pytest.raises(BadImage, match=re.escape(str(error))) as found:
        fetched("packpipe-failing://a.png")
    assert found.value.reason == reason


def test_a_host_of_the_web_that_does_not_answer_is_a_reject():
    # Port 9 discards, where it is open at all.
    with pytest.raises(BadImage, match=r"'http://.*/a\.png' cannot be reached:") as found:
        fetched("http://127.0.0.1:9/a.png")
    assert found.value.reason == "unreadable"


def test_a_host_of_the_web_that_stops_answering_is_a_reject(failing, monkeypatch):
    monkeypatch.setattr(remote, "_WEB", ("packpipe-failing://",))
    monkeypatch.setattr(failing, "error", ConnectionResetError(104, "reset"))
    with pytest.raises(BadImage, match=r"a\.png' cannot be reached: .*reset") as found:
        fetched("packpipe-failing://a.png")
    assert found.value.reason == "unreadable"


def test_what_another_process_holds_in_memory_is_missing_and_said():
    message = (
        "no file 'memory://packpipe-none.png' in this process; "
        "memory:// holds the files of one process alone"
    )
    with pytest.raises(BadImage, match=re.escape(message)) as found:
        fetched("memory://packpipe-none.png")
    assert found.value.reason == "missing"


@pytest.mark.parametrize("says", [10**6, 9000])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_member_of_an_archive_that_inflates_to_too_much_is_a_reject(
    tmp_path, monkeypatch, method, says
):
    monkeypatch.setattr(remote, "MOST_BYTES", 10_000)
    monkeypatch.setattr(remote, "_PIECE", 4096)
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", method) as file:
        file.writestr("small.png", bytes(10_000))
        file.writestr("large.png", bytes(10**6))
    assert fetched(f"zip://small.png::{archive}") == bytes(10_000)
    # The archive's list, at its end, has sizes of its own.
    head, size, tail = archive.read_bytes().rpartition((10**6).to_bytes(4, "little"))
    archive.write_bytes(head + says.to_bytes(len(size), "little") + tail)
    message = "it has 1000000 bytes or more, expected at most 10000"
    if says == 9000:
        message = "Bad CRC-32 for file 'large.png'"
    with traced() as peak, pytest.raises(BadImage, match=f"^{message}$") as found:
        fetched(f"zip://large.png::{archive}")
    assert found.value.reason == "unreadable"
    assert method == zipfile.ZIP_BZIP2 or peak() < 100_000


def test_a_compressed_file_that_inflates_to_too_much_is_a_reject(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MOST_BYTES", 10_000)
    monkeypatch.setattr(remote, "_PIECE", 4096)
    for size in (10_000, 10**6):
        (tmp_path / f"{size}.gz").write_bytes(gzip.compress(bytes(size)))
    assert fetched(f"gzip://10000::{tmp_path}/10000.gz") == bytes(10_000)
    with traced() as peak, pytest.raises(BadImage, match=r"^it has 12288 bytes or more") as found:
        fetched(f"gzip://1000000::{tmp_path}/1000000.gz")
    assert found.value.reason == "unreadable"
    assert peak() < 200_000


def test_a_file_that_memory_cannot_hold_is_a_reject(failing, monkeypatch):
    monkeypatch.setattr(failing, "error", MemoryError())
    with pytest.raises(BadImage, match=r"^more than this process can allocate$") as found:
        fetched("packpipe-failing://a.png")
    assert found.value.reason == "too much memory"
