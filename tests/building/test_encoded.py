"""`pack(store="encoded")`: rows of encoded images give the batches that rows of pixels give."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep

import crashing
import datasets
import fsspec
import numpy as np
import pictures
import PIL
import pyarrow as pa
import pytest
import strategies
import windowed
import xxhash
from crashing import build, contents, header_of, stopped_build
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

import packpipe
from packpipe.building import remote_encoded, stored_segments
from packpipe.building.shards import data_files
from packpipe.images import rules
from packpipe.images.content import content_of
from packpipe.loading.loader import PackedLoader
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key
from packpipe.rows import files, kept_images

NUM_IMAGES, SIZES = 37, pictures.SIZES  # of which one more cannot be decoded
OPTIONS = {"seq_len": 32, "num_workers": 0, "progress": False, "max_bad_fraction": 1.0}


@pytest.fixture(scope="module")
def source():
    """Images of PNG and JPEG, one of which has no more than a header that is sound."""
    images = [pictures.encoded_image(*SIZES[n % 9], n) for n in range(NUM_IMAGES - 1)]
    jpeg = pictures.encoded_image(48, 31, 50, "JPEG")
    return pictures.dataset_of([*images, jpeg, header_of(jpeg)])


@pytest.fixture(scope="module")
def both(source, tmp_path_factory):
    """Rows of pixels and of encoded images, two a record batch and four a file."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BATCH_BYTES", 5 * packpipe.PackConfig(seq_len=32).row_bytes)
        patch.setattr(files, "FILE_BYTES", 90_000)
        return tuple(
            packpipe.pack(source, output=folder / store, store=store, **OPTIONS)
            for store in ("pixels", "encoded")
        )


def folder_of(packed):
    return Path(packed.cache_files[0]["filename"]).parent


def again(packed):
    """The rows as another process opens them."""
    return datasets.load_from_disk(str(folder_of(packed)))


@pytest.fixture
def url(both):
    """The folder of encoded images in a store."""
    found = f"memory://encoded-{os.getpid()}/rows"
    for name, content in contents(folder_of(both[1])).items():
        fsspec.filesystem("memory").pipe_file(f"{found}/{name}", content)
    return found


def test_a_folder_is_opened_decoding_here_as_a_copy_of_a_store_and_row_by_row(both, url, tmp_path):
    pixels, encoded = both
    by_row = packpipe.open_packed(url, cache=tmp_path / "rows", cache_bytes=0)
    assert not list((tmp_path / "rows").rglob("data-*"))
    copy = packpipe.open_packed(url, cache=tmp_path / "copy")
    for rows in (packpipe.open_packed(folder_of(encoded)), copy, by_row):
        assert np.array_equal(np.ravel(rows[3]["patches"]), np.ravel(pixels[3]["patches"]))
        found = packpipe.read_rows(rows, [5, 0, 2]).patches
        np.testing.assert_array_equal(found, packpipe.read_rows(pixels, [5, 0, 2]).patches)
    assert packpipe.manifest(by_row) == packpipe.manifest(copy)
    assert batches(by_row, num_workers=2) == batches(copy) == batches(pixels)
    some = [rows.select([4, 1, 1, 3]) for rows in (by_row, copy)]
    assert batches(some[0]) == batches(some[1])
    states = [PackedLoader(rows, 2).state_dict() for rows in (by_row, copy)]
    assert states[0] == states[1]
    assert pickle.loads(pickle.dumps(by_row))[2].keys() == pixels[2].keys()  # noqa: S301
    assert "patches" not in by_row.select_columns(["labels"])[0]
    for name in ("packpipe_places", "packpipe_row", "encoded_xxh3", "grid_hw"):
        with pytest.raises(ValueError, match=f"columns is .*, expected '{name}' among them; keep"):
            packpipe.read_rows(by_row.remove_columns(name), 0)
    some = [rows.remove_columns("labels")[0] for rows in (by_row, copy)]
    assert some[0] == some[1]
    assert "encoded" in some[0]
    assert by_row.select_columns(["labels", "packpipe_row"])[0].keys() == {"labels"}


def test_of_rows_in_a_store_each_image_is_asked_for_once_an_epoch_and_with_its_row(
    both, url, tmp_path, monkeypatch
):
    asked, real, checked = [], remote_encoded.bytes_of, []

    def counting(storage, name, start, stop):
        asked.append((name, start, stop))
        return real(storage, name, start, stop)

    monkeypatch.setattr(remote_encoded, "bytes_of", counting)
    rows = packpipe.open_packed(url, cache=tmp_path, cache_bytes=0)

    def checking(_, name, __):
        checked.append(name)
        sleep(0.02)  # as long as a store may take, in which other rows are read

    with monkeypatch.context() as patch:
        patch.setattr(stored_segments, "check_version", checking)
        packpipe.read_rows(rows)
    assert sorted(checked) == sorted(data_files(packpipe.manifest(rows)))
    asked.clear()
    assert batches(rows)
    assert len(asked) == len(set(asked)) == len(rows)
    images = [image for row in both[1].data.column("encoded").to_pylist() for image in row]
    assert sum(stop - start for _, start, stop in asked) == sum(map(len, images))
    ordered = sorted(asked)
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in itertools.pairwise(ordered))


def test_an_image_that_changed_in_a_store_is_named_and_segments_that_do_not_fit_are_refused(
    both, url, tmp_path, monkeypatch
):
    rows = packpipe.open_packed(url, cache=tmp_path / "a", cache_bytes=0)
    manifest, store = packpipe.manifest(rows), fsspec.filesystem("memory")
    start, second = (manifest["files"][name]["rows"] for name in data_files(manifest)[:2])
    assert second > 1
    assert len(packpipe.read_rows(rows, start))  # its file is that of the segments, for a minute
    image = both[1].data.column("encoded")[start + 1].as_py()[0]
    name = f"{url}/{data_files(manifest)[1]}"
    content = store.cat_file(name)
    place = content.index(image) + len(image) // 2
    store.pipe_file(name, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    example = int(both[1][start + 1]["example_index"][0])
    expected = rf"image of example {example} \(row 1 of {name}\) is 'damaged', "
    for read in (lambda: packpipe.read_rows(rows, [0, start + 1]), lambda: rows[start + 1]):
        with pytest.raises(ValueError, match=expected):
            read()
    monkeypatch.setattr(stored_segments, "_CHECKED_FOR", 0.0)
    with pytest.raises(ConnectionError, match="it was replaced since: open the folder again"):
        packpipe.read_rows(rows, start)
    batch = both[1].data.column("encoded").to_pylist()[start : start + 2]
    sizes = np.cumsum([0, *(len(image) for row in batch for image in row)])
    place = content.index(sizes.astype("<i8").tobytes()) + 8
    store.pipe_file(name, content[:place] + b"\xff" * 8 + content[place + 8 :])
    with pytest.raises(ConnectionError, match="images outside of their column', expected the rows"):
        packpipe.open_packed(url, cache=tmp_path / "b", cache_bytes=0)


def batches(packs, **options):
    """Every column of the batches of a pass."""
    loader = PackedLoader(packs, 2, as_numpy=True, tail="pad", **options)
    return [columns_of(batch) for batch in loader]


def columns_of(batch):
    return {
        name: (value.dtype, value.shape, value.tobytes()) if hasattr(value, "tobytes") else value
        for name, value in batch.items()
    }


def copied(folder, to):
    for name, content in contents(folder).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


def rewritten(folder, name, change):
    """Change the columns of a file, and let its record agree."""
    with pa.memory_map(str(folder / name)) as file:
        table = pa.ipc.open_stream(file).read_all()
    columns = table.to_pydict()
    change(columns)
    found = pa.table(columns, schema=table.schema)
    record = files.write_table(folder / name, table.schema, [found])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = record
    (folder / "manifest.json").write_text(json.dumps(manifest))


@st.composite
def cases(draw):
    """Images of all kinds, some of which are cut short, and options."""
    images = draw(st.lists(strategies.encoded_images(), min_size=2, max_size=9))
    encoded = [image.encoded for image in images]
    if draw(st.booleans()):
        encoded.append(header_of(pictures.encoded_image(20, 30, 1, "JPEG")))
    config = draw(strategies.configs(max_seq_len=40))
    options = {"views": 2} if config.fit_last is None and draw(st.booleans()) else {}
    return encoded, {**config.to_options(), **options}, draw(strategies.keys())


@settings(max_examples=12)
@given(cases())
def test_rows_of_encoded_images_give_the_batches_of_rows_of_pixels(case):
    images, options, (seed, epoch) = case
    source = pictures.dataset_of(images)
    options = {**OPTIONS, **options, "seed": seed, "epoch": epoch, "max_consecutive_bad": 99}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # A row a batch: views of an image are in batches of their own, and filled at once.
        patch.setattr(files, "BATCH_BYTES", 1)
        pixels, encoded = (
            packpipe.pack(source, output=Path(folder, store), store=store, **options)
            for store in ("pixels", "encoded")
        )
        assert len(pixels) == len(encoded) >= 1
        assert batches(again(encoded)) == batches(pixels)
        for row in range(len(pixels)):
            found, wanted = encoded[row], pixels[row]
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                # A row without a segment has no pairs either, and a list does not say so.
                assert np.array_equal(np.ravel(found[name]), np.ravel(value)), name
        assert packpipe.rejects(encoded)[:] == packpipe.rejects(pixels)[:]
        ours, theirs = packpipe.manifest(encoded), packpipe.manifest(pixels)
        assert (ours["counts"], ours["undecoded"]) == (theirs["counts"], theirs["undecoded"])
        assert packpipe.verify(Path(folder, "encoded"), source, sample=None) == []
        del pixels, encoded


def test_what_a_folder_holds_is_the_source_once(source, both):
    pixels, encoded = both
    manifest = packpipe.manifest(encoded)
    assert "store" not in packpipe.manifest(pixels)
    assert manifest["store"] == "encoded"
    stored = encoded.with_format("arrow")[:]
    lists = [row.as_py() for row in stored.column("encoded")]
    images = [image for row in lists for image in row]
    examples = np.concatenate(stored.column("example_index").to_pylist())
    known = source.with_format("arrow")[:].column("image").to_pylist()
    assert images == [known[example]["bytes"] for example in examples]
    assert sorted(examples) == list(range(NUM_IMAGES))
    size = sum(record["bytes"] for record in manifest["files"].values())
    assert sum(map(len, images)) < size < 1.2 * sum(map(len, images))
    # Files are cut by what they hold, batches by what it takes to fill them.
    assert len(data_files(manifest)) > 2
    of_data = [manifest["files"][name] for name in data_files(manifest)]
    assert max(record["bytes"] for record in of_data) < 100_000
    assert max(record["rows"] for record in of_data) > 2
    assert max(batch.num_rows for batch in encoded.data.to_batches()) == 2
    found = packpipe.summarize(folder_of(encoded))
    assert str(found) == str(packpipe.summarize(folder_of(pixels)))


@pytest.mark.parametrize("how", ["opened", "loaded", "selected", "shuffled", "numpy format"])
def test_rows_are_read_however_they_are_opened(both, how):
    pixels, encoded = both
    change = {
        "selected": lambda rows: rows.select([3, 0, 0, 2]),
        "shuffled": lambda rows: rows.shuffle(seed=3),
        "numpy format": lambda rows: rows.with_format("numpy"),
    }.get(how, lambda rows: rows)
    found = change(encoded if how == "opened" else again(encoded))
    wanted = pictures.row_bytes(packpipe.read_rows(change(pixels)))
    assert pictures.row_bytes(packpipe.read_rows(found)) == wanted
    assert batches(found, shuffle=False) == batches(change(pixels), shuffle=False)


def test_a_loader_resumes_and_its_state_knows_the_folder(both, source, tmp_path):
    pixels, encoded = both
    wanted = batches(pixels, seed=4)
    assert len(wanted) > 3
    loader = PackedLoader(again(encoded), 2, as_numpy=True, tail="pad", seed=4, num_workers=2)
    first = [columns_of(batch) for batch in islice(loader, 2)]
    state = json.loads(json.dumps(loader.state_dict()))
    state["packs"] = 4
    resumed = PackedLoader(again(encoded), 2, as_numpy=True, tail="pad", seed=4)
    resumed.load_state_dict(state)
    assert first + [columns_of(batch) for batch in resumed] == wanted
    assert state["fingerprint"] == StoredPacks(pixels).fingerprint(Key(0, 0))
    sent = pickle.loads(pickle.dumps(StoredPacks(again(encoded))))  # noqa: S301 to a process
    assert batches(sent, seed=4) == wanted
    images = [row["bytes"] for row in source.with_format("arrow")[:].column("image").to_pylist()]
    images[3] = pictures.encoded_image(8, 120, 99)
    other = pictures.dataset_of(images)
    other = packpipe.pack(other, output=tmp_path, store="encoded", **OPTIONS)
    with pytest.raises(ValueError, match=r"state\['contents'\]\['files'\] is .*; the files hold"):
        PackedLoader(other, 2, as_numpy=True, tail="pad", seed=4).load_state_dict(state)


@pytest.mark.parametrize("step", ["before open", "before replace", "after fsync"])
def test_a_build_that_was_stopped_ends_in_the_same_bytes(tmp_path, step):
    source = crashing.source(20)
    build(source, tmp_path / "whole", store="encoded")
    whole = contents(tmp_path / "whole")
    names = sorted(name for name in whole if name.startswith("data-"))
    assert len(names) > 2
    stopped_build(source, tmp_path / "out", f"{step} {names[1]}.partial", store="encoded")
    assert contents(tmp_path / "out") != whole
    build(source, tmp_path / "out", store="encoded")
    assert contents(tmp_path / "out") == whole
    with pytest.raises(FileExistsError, match="rows made with the same store; choose another"):
        build(source, tmp_path / "out")


def test_images_in_files_are_held_by_the_rows_whichever_process_decodes_them(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    images = [*pictures.encoded_images(), pictures.encoded_image(48, 31, 50, "JPEG")]
    for number, image in enumerate(images):
        (folder / f"{number}").write_bytes(image)
    names = [{"bytes": None, "path": f"{number}"} for number in range(len(images))]
    names.append({"bytes": None, "path": "missing"})
    source = Dataset.from_dict({"image": names}, features=Features({"image": Image()}))
    options = {**OPTIONS, "image_root": folder}
    pixels = packpipe.pack(source, output=tmp_path / "pixels", **options)
    options["store"] = "encoded"
    packpipe.pack(source, output=tmp_path / "here", **options)
    found = packpipe.pack(source, output=tmp_path / "there", **options | {"num_workers": 1})
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    (folder / "4").write_bytes(pictures.encoded_image(64, 64, 77))
    problems = packpipe.verify(tmp_path / "here", source, sample=None)
    assert [re.sub(r"\d[\d,]* bytes", "N bytes", one.what) for one in problems] == [
        f"its N bytes are not the {len((folder / '4').read_bytes()):,} of its image"
    ]
    for path in folder.iterdir():
        path.unlink()
    assert batches(again(found)) == batches(pixels)
    assert packpipe.rejects(found)["reason"][:] == ["missing"]


def test_every_view_holds_what_was_read_for_it_though_its_file_changes(tmp_path, monkeypatch):
    path, read = tmp_path / "0", []

    def of_a_changing_file(data):
        path.write_bytes(pictures.encoded_image(48, 31, len(read)))
        read.append(content_of(data))
        return read[-1]

    path.write_bytes(pictures.encoded_image(48, 31, 0))
    names = {"image": [{"bytes": None, "path": "0"}, {"bytes": None, "path": "missing"}]}
    source = Dataset.from_dict(names, features=Features({"image": Image()}))
    monkeypatch.setattr(kept_images, "content_of", of_a_changing_file)
    monkeypatch.setattr(files, "BATCH_BYTES", 1)  # a row a batch, and several at once
    options = {**OPTIONS, "seq_len": 6, "views": 3, "image_root": tmp_path}
    options |= {"num_workers": 1, "store": "encoded"}
    packed = packpipe.pack(source, output=tmp_path / "out", **options)
    stored = packed.with_format("arrow")[:].column("encoded").to_pylist()
    assert [image for row in stored for image in row] == read
    assert len(set(read)) == 3
    assert len(packed) > 1
    together = packpipe.read_rows(packed).patches
    for row in range(len(packed)):
        np.testing.assert_array_equal(packpipe.read_rows(packed, row).patches[0], together[row])


def test_rows_of_turbo_decode_to_the_batches_and_rejects_of_rows_of_pixels(tmp_path):
    images = [pictures.encoded_image(*SIZES[n % 9], n, "JPEG") for n in range(9)]
    images += [header_of(images[1]), pictures.encoded_image(48, 31, 1), images[8][:-40]]
    source = pictures.dataset_of(images)
    options = {**OPTIONS, "views": 2, "pixels": "turbo"}
    pixels = packpipe.pack(source, output=tmp_path / "pixels", **options)
    options |= {"store": "encoded", "num_workers": 1}
    encoded = packpipe.pack(source, output=tmp_path / "encoded", **options)
    assert batches(again(encoded)) == batches(pixels)
    rejects = packpipe.rejects(pixels)[:]
    assert packpipe.rejects(encoded)[:] == rejects
    assert {9, 11} == {*rejects["example_index"]}
    assert packpipe.manifest(encoded)["codecs"]["turbo_resize"] == "3"


@pytest.mark.parametrize("damage", ["gone", "empty", "text", "cut short", "header alone"])
def test_broken_files_are_the_same_rejects_in_both_stores(damage, tmp_path):
    jpeg = pictures.encoded_image(48, 31, 50, "JPEG")
    broken = {
        "empty": b"",
        "text": b"no image",
        "cut short": jpeg[: len(jpeg) // 2],
        "header alone": header_of(jpeg),
    }
    for name, content in {"0": jpeg, "1": broken.get(damage), "2": jpeg}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    names = {"image": [{"bytes": None, "path": name} for name in "012"]}
    source = Dataset.from_dict(names, features=Features({"image": Image()}))
    options = {**OPTIONS, "image_root": tmp_path}
    pixels, encoded = (
        packpipe.pack(source, output=tmp_path / store, store=store, **options)
        for store in ("pixels", "encoded")
    )
    rejects = packpipe.rejects(pixels)[:]
    assert rejects["example_index"] == [1]
    assert packpipe.rejects(encoded)[:] == rejects
    assert batches(again(encoded)) == batches(pixels)


def test_rows_judged_strictly_are_read_without_what_judged_them(tmp_path, monkeypatch):
    source = pictures.dataset_of([pictures.encoded_image(48, 31, n, "JPEG") for n in range(3)])
    options = {**OPTIONS, "damaged_scans": "strict"}
    pixels = packpipe.pack(source, output=tmp_path / "pixels", **options)
    encoded = packpipe.pack(source, output=tmp_path / "encoded", store="encoded", **options)
    monkeypatch.setattr(rules, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="damaged_scans is 'strict', expected simplejpeg to be in"):
        packpipe.pack(source, output=tmp_path / "new", **options)
    assert batches(again(encoded)) == batches(pixels)


def test_other_versions_of_what_decodes_are_told_of(both, tmp_path, caplog):
    folder = copied(folder_of(both[1]), tmp_path / "copy")
    state = PackedLoader(again(both[1]), 2, as_numpy=True).state_dict()
    assert caplog.text == ""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["pillow"] = "9.0.0"
    manifest["codecs"]["pillow-heif of old"] = "1"
    path.write_text(json.dumps(manifest))
    packed = datasets.load_from_disk(str(folder))
    packpipe.read_rows(packed, 0)
    packpipe.read_rows(packed, 1)
    (said,) = caplog.messages  # once
    assert (
        f"the images in {folder} are decoded here by pillow {PIL.__version__} instead of " in said
    )
    assert "9.0.0, pillow-heif of old missing instead of 1: pixels may differ" in said
    found = state["contents"]["decoders"]
    assert f"pillow {PIL.__version__}, " in found
    state["contents"]["decoders"] = "pillow 9.0.0"
    loader = PackedLoader(again(both[1]), 2, as_numpy=True)
    loader.load_state_dict(state)
    said = f"state['contents']['decoders'] is 'pillow 9.0.0', expected {found!r}; pixels may be oth"
    assert caplog.messages[-1].startswith(said)


def test_the_manifest_is_read_once_and_again_when_it_changes(both, tmp_path, monkeypatch):
    folder, read = copied(folder_of(both[1]), tmp_path / "copy"), []
    packed = datasets.load_from_disk(str(folder))
    expected = packpipe.read_rows(packed, 1).patches
    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", read.append)
        np.testing.assert_array_equal(packpipe.read_rows(packed, 1).patches, expected)
    assert read == []
    moved = folder.rename(tmp_path / "moved")
    np.testing.assert_array_equal(packpipe.read_rows(packed, 1).patches, expected)
    moved.rename(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="folders of encoded rows is"):
        packpipe.read_rows(packed, 1)


def test_windows_of_files_hold_encoded_images(tmp_path):
    windowed.write(tmp_path / "source")
    found = {}
    for store in ("pixels", "encoded"):
        windowed.built(windowed.build_of(tmp_path / "source", tmp_path / store, store=store))
        found[store] = datasets.load_from_disk(str(tmp_path / store))
    assert batches(found["encoded"]) == batches(found["pixels"])
    assert packpipe.verify(tmp_path / "encoded", crashing.source(windowed.NUM_ROWS)) == []
    counts = [packpipe.manifest(rows)["counts"] for rows in found.values()]
    assert counts[0] == counts[1]
    assert counts[0]["rejected"] > 0


def test_a_damaged_image_is_named_with_its_row_and_never_decoded(both, tmp_path):
    folder = copied(folder_of(both[1]), tmp_path / "copy")
    names = data_files(json.loads((folder / "manifest.json").read_text()))
    name, first = names[1], len(Dataset.from_file(str(folder / names[0])))
    table = Dataset.from_file(str(folder / name)).with_format("arrow")[:]
    image = table.column("encoded")[1].as_py()[0]
    example = table.column("example_index")[1].as_py()[0]
    content = bytearray((folder / name).read_bytes())
    at = content.index(image) + len(image) // 2
    content[at] ^= 16
    (folder / name).write_bytes(content)
    packed = datasets.load_from_disk(str(folder))
    said = (
        f"image of example {example} (row 1 of {folder / name}) is 'damaged', expected the bytes "
        "that were packed; verify the folder, and pack it again"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        list(PackedLoader(packed, 2, as_numpy=True, num_workers=1))
    assert len(packpipe.read_rows(packed, range(first + 1))) == first + 1
    assert [problem.where for problem in packpipe.verify(folder)] == [name]
    rewritten(folder, name, lambda _: None)  # its record agrees with the damage
    expected = (f"{name}, row 1", "an encoded image with another checksum")
    assert packpipe.verify(folder) == [expected]


def test_an_image_that_does_not_decode_here_is_named(both, source, tmp_path):
    folder = copied(folder_of(both[1]), tmp_path / "copy")
    other = header_of(pictures.encoded_image(*SIZES[2], 5, "JPEG"))
    places = []

    def change(columns):
        for row, examples in enumerate(columns["example_index"]):
            for number, example in enumerate(examples):
                if example == 2:
                    columns["encoded"][row][number] = other
                    columns["encoded_xxh3"][row][number] = xxhash.xxh3_64_intdigest(other)
                    places.append((name, row, number))

    for name in data_files(json.loads((folder / "manifest.json").read_text())):
        rewritten(folder, name, change)
    ((name, row, number),) = places
    place = re.escape(f"(row {row} of {folder / name})")
    said = rf"^image of example 2 {place} is 'undecodable here \(undecodable: OSError: .*\)', exp"
    said += "[^;]*; install the packages and versions that its manifest names$"
    with pytest.raises(ValueError, match=said):
        packpipe.read_rows(datasets.load_from_disk(str(folder)))
    assert packpipe.verify(folder) == []  # nothing but the source tells that it is another one
    (problem,) = packpipe.verify(folder, source, sample=None)
    assert problem.where == f"{name}, row {row}, segment {number + 1} (example 2)"
    assert re.fullmatch(rf"its {len(other)} bytes are not the [\d,]+ of its image", problem.what)
    rewritten(folder, name, lambda columns: columns["image_hw"][row][number].reverse())
    assert packpipe.verify(folder) != []


def test_what_has_no_encoded_rows_is_refused_by_name(both, source, tmp_path):
    arrays = Dataset.from_dict(
        {"image": [np.zeros((4, 4, 3), np.uint8)]},
        features=Features({"image": List(List(List(Value("uint8"))))}),
    )
    tokens = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    masked = source.add_column("mask", source.with_format("arrow")[:].column("image").to_pylist())
    masked = masked.cast_column("mask", Image())
    for dataset, options, said in (
        (source, {"store": "jpeg"}, "store is 'jpeg', expected one of 'pixels', 'encoded'; ch"),
        (source, {"materialize": False}, "of materialize=False, which stores no images"),
        (masked, {"image_column": "image", "mask_column": "mask"}, "of mask_column, whose targets"),
        (arrays, {}, "store is 'encoded', expected 'pixels'; of arrays of uint8 pixels, which are"),
        (tokens, {}, "store is 'encoded', expected 'pixels' for tokens; leave it out, since they"),
    ):
        asked = {"store": "encoded", **OPTIONS, **options}
        with pytest.raises(ValueError, match=re.escape(said)):
            packpipe.pack(dataset, output=tmp_path / "out", **asked)
    rows = again(both[1])
    for changed, said in (
        (rows.remove_columns("encoded_xxh3"), "without ['encoded_xxh3']"),
        (
            rows.select_columns(["seq_lens", "encoded"]),
            "without ['encoded_xxh3', 'example_index', ",
        ),
        (datasets.concatenate_datasets([again(both[0]), rows]), "joined with rows of pixels"),
    ):
        for read in (packpipe.read_rows, StoredPacks):
            with pytest.raises(ValueError, match=re.escape(said)):
                read(changed)
    with pytest.raises(ValueError, match="rows is 'a table of encoded images', expected rows with"):
        packpipe.read_rows(rows.with_format("arrow")[:])
    rows.save_to_disk(tmp_path / "saved")
    for lost in (
        datasets.load_from_disk(str(tmp_path / "saved")),
        datasets.load_from_disk(str(folder_of(rows)), keep_in_memory=True),
    ):
        said = "folders of encoded rows is .*, expected one that packpipe.pack wrote, with its man"
        with pytest.raises(ValueError, match=said):
            packpipe.read_rows(lost)
