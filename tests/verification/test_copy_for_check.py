"""`verify` of a folder in a store: as of a copy of it, whatever it holds."""

from __future__ import annotations

import json
import os
import shutil
from itertools import count
from types import SimpleNamespace

import datasets
import fsspec
import pictures
import pytest
import windowed
from crashing import contents

import packpipe
from packpipe import verify

NUMBERS = count()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a packed folder."""
    root = tmp_path_factory.mktemp("brought")
    windowed.write(root / "train")
    assert not windowed.built(windowed.build_of(root / "train", root / "rows"))
    return contents(root / "rows")


def in_store(files):
    url = f"memory://brought-{os.getpid()}-{next(NUMBERS)}"
    for name, content in files.items():
        fsspec.filesystem("memory").pipe_file(f"{url}/{name}", content)
    return url


def problems_of(files):
    return {problem.where: problem.what for problem in verify(in_store(files))}


def test_nothing_is_wrong_with_what_pack_wrote_and_all_that_is_damaged_is_named(files):
    assert problems_of(files) == {}
    one, two, three, *_ = sorted(name for name in files if name.startswith("data-"))
    damaged = dict(files)
    damaged[one] = files[one][:-9]
    damaged[two] = files[two][:99] + b"?" + files[two][100:]
    del damaged[three]
    damaged["data-stray.arrow"] = damaged["x.partial"] = b"?" * 9
    damaged["../outside.arrow"] = b""
    found = problems_of(damaged)
    assert found[one] == f"holds {len(files[one]) - 9} bytes, expected {len(files[one])}"
    assert found[two].startswith("xxh3_128 is ")
    assert found[three] == "is missing"
    assert found["data-stray.arrow"] == found["x.partial"] == "is not in the manifest"


def test_without_room_for_a_copy_nothing_is_copied_and_what_is_needed_is_said(
    files, tmp_path, monkeypatch
):
    url = in_store(files)
    assert verify(url, cache=tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    expected = rf"free space of {tmp_path} is '0.1 kB', expected .* kB for a copy of {url}; free"
    with pytest.raises(OSError, match=expected):
        verify(url, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_both_folders_of_pairs_are_verified(tmp_path):
    images = [pictures.encoded_image(8, 8, number, "PNG") for number in range(6)]
    source = pictures.dataset_of(images).add_column("caption", [[1, 2, 3]] * 6)
    source = source.cast_column("caption", datasets.List(datasets.Value("int32")))
    options = {"patch_size": 4, "num_workers": 0, "progress": False, "max_text": 4}
    packpipe.pack_pairs(source, 8, 8, token_columns="caption", output=tmp_path / "pairs", **options)
    pairs = contents(tmp_path / "pairs")
    assert verify(tmp_path / "pairs") == []
    assert problems_of(pairs) == {}
    name = next(name for name in pairs if name.startswith("texts/data-"))
    assert problems_of({**pairs, name: pairs[name][:-1]}).keys() == {name}


def test_what_is_no_packed_folder_and_what_is_broken_is_said(files):
    url = in_store({"data-0.arrow": b""})
    expected = f"folder is '{url}', expected a folder that packpipe.pack wrote; pass what pack was"
    with pytest.raises(ValueError, match=expected):
        verify(url)
    assert problems_of({"manifest.json": b"{"}).keys() == {"manifest.json"}
    manifest = json.loads(files["manifest.json"])
    manifest["files"]["../data.arrow"] = {"rows": 1, "bytes": 1, "xxh3_128": "0"}
    changed = {**files, "manifest.json": json.dumps(manifest).encode()}
    assert problems_of(changed)
