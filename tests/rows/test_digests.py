from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from packpipe.rows import digests


def test_labels_are_digested_as_batches_show_them():
    of = digests.labels_digest
    one = of(pa.array([3, 1, 2], pa.int64()))
    assert len(one) == 32
    assert of(pa.array([3, 1, 2], pa.int8())) == one
    assert of(pa.array([9, 3, 1, 2], pa.int64()).slice(1)) == one
    assert of(pa.array([3, 2, 1], pa.int64())) != one
    assert of(None) is None
    # No batch can hold texts.
    assert of(pa.array(["a"])) == of(pa.array(["b"])) == "string"


class Entries:
    """Entries of bytes, which note how many of them were asked for."""

    def __init__(self, entries, at_once=1):
        self.entries, self.at_once, self.asked = entries, at_once, 0

    def read(self, start, stop, most):
        for place in range(start, stop, self.at_once):
            some = b"".join(self.entries[place : min(stop, place + self.at_once)])
            self.asked += 1
            yield some[:most] if self.at_once == 1 else some

    def digest(self):
        return digests.sample_digest(len(self.entries), self.read)


entries = st.lists(st.binary(max_size=9), max_size=300)


@given(entries, st.data())
def test_of_small_data_every_byte_is_in_the_digest(entries, data):
    wanted = Entries(entries).digest()
    # However the bytes are handed over.
    assert Entries(entries, at_once=data.draw(st.integers(2, 9))).digest() == wanted
    assume(any(entries))
    place = data.draw(st.sampled_from([n for n, entry in enumerate(entries) if entry]))
    byte = data.draw(st.integers(0, len(entries[place]) - 1))
    entry = bytearray(entries[place])
    entry[byte] ^= data.draw(st.integers(1, 255))
    assert Entries([*entries[:place], bytes(entry), *entries[place + 1 :]]).digest() != wanted


def test_of_large_data_some_bytes_are_read_everywhere(monkeypatch):
    monkeypatch.setattr(digests, "_SAMPLE_BYTES", 6400)
    entries = [bytes([number % 251]) * 50 for number in range(10_000)]
    found = Entries(entries)
    wanted = found.digest()
    assert found.asked == 128  # two entries of each of 64 stretches
    for stretch in range(64):
        first = stretch * len(entries) // 64
        for place, is_read in ((first, True), (first + 1, True), (first + 9, False)):
            other = [*entries[:place], b"\xff" * 50, *entries[place + 1 :]]
            assert (Entries(other).digest() != wanted) == is_read


def test_of_one_large_entry_the_beginning_is_read(monkeypatch):
    monkeypatch.setattr(digests, "_SAMPLE_BYTES", 640)
    large = bytes(100_000)
    one = Entries([large]).digest()
    assert Entries([large[:-1] + b"1"]).digest() == one
    assert Entries([b"1" + large[1:]]).digest() != one
    assert Entries([]).digest() != one


def test_arrays_are_bytes_too():
    values = np.arange(60, dtype=np.int32).reshape(3, 4, 5)
    found = digests.sample_digest(3, lambda start, stop, _: [values[start:stop]])
    wanted = digests.sample_digest(3, lambda start, stop, _: [values[start:stop].tobytes()])
    assert found == wanted


@pytest.fixture
def folder(tmp_path):
    """Two files with a manifest."""
    records = {}
    for name, data in (("a", b"123"), ("b", b"4567")):
        (tmp_path / name).write_bytes(data)
        records[name] = {"bytes": len(data), "xxh3_128": f"of {name}"}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": records}))
    return tmp_path


def test_files_are_known_by_their_checksums_wherever_they_lie(folder, tmp_path_factory):
    paths = [str(folder / name) for name in "ab"]
    wanted = digests.files_digest(paths)
    assert digests.files_digest(paths[::-1]) != wanted
    assert digests.files_digest(paths[:1]) != wanted
    copy = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert digests.files_digest([str(copy / name) for name in "ab"]) == wanted
    # What `datasets` keeps beside the data is in no manifest.
    (folder / "indices.arrow").write_bytes(b"1")
    assert digests.files_digest([*paths, str(folder / "indices.arrow")]) == wanted


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}'])
def test_files_without_a_manifest_are_not_known(folder, manifest):
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    assert digests.files_digest([str(folder / name) for name in "ab"]) is None
    assert digests.files_digest([]) is None


def test_a_file_of_another_size_is_not_that_of_the_manifest(folder):
    (folder / "a").write_bytes(b"12")
    assert digests.files_digest([str(folder / "a")]) is None
