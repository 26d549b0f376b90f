"""Packed folders in a store: the same rows, batches and states as here; nothing wrong, ever."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
import windowed
from crashing import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from windowed import Failing, Memory, Watched

import packpipe
from packpipe import PackedLoader, open_packed, read_rows, summarize
from packpipe.building import opened, stored_segments
from packpipe.storage import reading

NUMBERS = count()
ROWS_BY_ROW = "row by row"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of images in eight files of two record batches or one, of four windows."""
    root = tmp_path_factory.mktemp("opened")
    windowed.write(root / "train")
    assert not windowed.built(windowed.build_of(root / "train", root / "rows"))
    return root / "rows"


@pytest.fixture(scope="module")
def small(folder):
    """The files of a folder of the same images, of which each window is one of two files."""
    memory = Memory()
    build = windowed.build_of(folder.parent / "train", "memory://unused", window_rows=30)
    job = replace(build.job, storage=memory, file_bytes=2**20)
    assert not windowed.built(replace(build, job=job))
    return memory.files


def in_fsspec(files):
    """Put files into fsspec's memory; return the URL of their folder."""
    url = f"memory://opened-{os.getpid()}-{next(NUMBERS)}/rows"
    for name, content in files.items():
        fsspec.filesystem("memory").pipe_file(f"{url}/{name}", content)
    return url


@contextmanager
def store(memory, step=lambda _: None):
    """Let every URL of a block lead to a store in memory, whose steps are watched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened, "storage_at", lambda *_: Watched(memory, step))
        patch.setattr(reading, "WAITS", (0.0, 0.0, 0.0))
        yield


def columns_of(batch):
    return {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, values in columns_of(one).items():
        assert values.dtype == other[name].dtype, name
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def assert_same_loading(datasets_, batch_size, **options):
    """All give the same batches, and the same states after each."""
    loaders = [PackedLoader(one, batch_size, as_numpy=True, **options) for one in datasets_]
    steps = 0
    for batches in zip(*loaders, strict=True):
        states = [loader.state_dict() for loader in loaders]
        for batch, state in zip(batches, states, strict=True):
            assert_same(batches[0], batch)
            assert state == states[0]
        steps += 1
    assert steps > 0


@pytest.fixture(scope="module")
def three(folder, tmp_path_factory):
    """The rows of one folder: here, as a copy of what lies in a store, and read row by row."""
    url, root = in_fsspec(contents(folder)), tmp_path_factory.mktemp("caches")
    copy = open_packed(url, cache=root / "copies")
    by_row = open_packed(url, cache=root / "rows", cache_bytes=0)
    assert "patches" in copy.column_names
    assert "patches" not in by_row.column_names
    return [open_packed(folder), copy, by_row]


@settings(max_examples=8)
@given(
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    balance=st.booleans(),
    num_workers=st.sampled_from([0, 2]),
    chosen=st.none() | st.lists(st.integers(0, 23), min_size=5, max_size=30),
)
def test_batches_and_states_are_those_of_the_folder_here(three, chosen, **options):
    some = three if chosen is None else [rows.select(chosen) for rows in three]
    assert_same_loading(some, **options)


def test_a_state_goes_on_wherever_the_rows_lie(three):
    here, copy, by_row = (PackedLoader(rows, 3, seed=5, as_numpy=True) for rows in three)
    batches = iter(here)
    next(batches)
    state = json.loads(json.dumps(here.state_dict()))
    for loader in (copy, by_row):
        loader.load_state_dict(state)
    for expected, *found in zip(batches, copy, by_row, strict=True):
        for batch in found:
            assert_same(expected, batch)


def test_manifest_rejects_figures_and_single_rows_are_those_of_the_folder_here(three, folder):
    here, copy, by_row = three
    for rows in (copy, by_row):
        assert packpipe.manifest(rows) == packpipe.manifest(here)
        assert packpipe.rejects(rows)[:] == packpipe.rejects(here)[:]
    assert len(packpipe.rejects(here)) > 0
    url = in_fsspec(contents(folder))
    assert str(summarize(url)) == str(summarize(folder))
    assert summarize(url).folder == url
    for number in (0, 5, 23):
        one, other = here[number], by_row[number]
        for name in here.column_names:
            assert np.array_equal(np.ravel(one[name]), np.ravel(other[name])), name
    assert by_row.select_columns(["labels"])[3] == {"labels": here[3]["labels"]}


def test_rows_in_a_store_are_sent_to_another_process_without_their_tokens(three):
    by_row = three[2]
    sent = pickle.dumps(PackedLoader(by_row, 3, as_numpy=True))
    assert len(sent) < 20_000
    again = pickle.loads(sent)  # noqa: S301
    for one, other in zip(PackedLoader(by_row, 3, as_numpy=True), again, strict=True):
        assert_same(one, other)


def written(folder):
    """What lies in the folder of rows, and its URL in a store."""
    return [open_packed(folder), open_packed(in_fsspec(contents(folder)), cache_bytes=0)]


def test_rows_of_tokens_with_bits_texts_and_numbers_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rng = np.random.default_rng(3)
    lens = rng.integers(1, 9, 40).tolist()
    source = datasets.Dataset.from_dict(
        {
            "input_ids": [rng.integers(0, 99, number).tolist() for number in lens],
            "is_word": [rng.integers(0, 2, number).astype(bool).tolist() for number in lens],
            "text": [f"text {number}" for number in lens],
            "score": rng.random(40).tolist(),
        }
    )
    for layout in ("fixed", "ragged"):
        output = tmp_path / layout
        packpipe.pack(source, 11, output=output, layout=layout, progress=False)
        here, by_row = written(output)
        url = in_fsspec(contents(output))
        assert str(summarize(url)) == str(summarize(output))
        if layout == "fixed":
            assert by_row.features.keys() & {"input_ids", "is_word"} == set()
            assert_same_loading([here, by_row], 4)
            one, other = (read_rows(rows, [5, 2, 3, 4]) for rows in (here, by_row))
            assert one.is_word.any()
            np.testing.assert_array_equal(one.is_word, other.is_word)
            assert one.text.to_pylist() == other.text.to_pylist()


def test_weights_targets_boxes_views_and_lists_of_labels_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rng = np.random.default_rng(4)
    features = datasets.Features(
        image=datasets.Image(),
        mask=datasets.Array2D((16, 24), "uint16"),
        label=datasets.List(datasets.Value("float32"), length=2),
        weight=datasets.Value("float32"),
    )
    number = 12
    source = datasets.Dataset.from_dict(
        {
            "image": [rng.integers(0, 256, (16, 24, 3)).astype(np.uint8) for _ in range(number)],
            "mask": list(rng.integers(0, 500, (number, 16, 24)).astype(np.uint16)),
            "label": rng.random((number, 2)).tolist(),
            "weight": rng.random(number).tolist(),
        },
        features=features,
    )
    packpipe.pack(
        source,
        20,
        patch_size=8,
        mask_column="mask",
        target_stride=4,
        weight_column="weight",
        crop=packpipe.Crop(),
        views=2,
        prefix_tokens=5,
        output=tmp_path / "rows",
        num_workers=0,
        progress=False,
    )
    here, by_row = written(tmp_path / "rows")
    assert {"box", "view", "weight", "labels"} <= set(by_row.column_names)
    assert "targets" not in by_row.column_names
    assert_same_loading([here, by_row], 2)


def read(memory, cache, step=lambda _: None, **asked):
    """Some rows of what lies in a store, opened anew: their columns as bytes."""
    with store(memory, step):
        rows = open_packed("memory://unused", cache=cache, **asked)
        found = read_rows(rows, [7, 1, 2])
        return [found.patches.tobytes(), found.coords.tobytes(), found.seq_lens.tobytes()]


KINDS = {"copy": {}, ROWS_BY_ROW: {"cache_bytes": 0}}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_a_store_may_fail_at_every_step_in_turn(small, tmp_path, kind):
    memory, steps = Memory(files=small), Failing(())
    expected = read(memory, tmp_path / "first", steps, **kind)
    assert steps.steps >= 8
    # Every second step comes before something is asked, and the others after it.
    for at in range(0, steps.steps, 2):
        failing = Failing({at})
        cache = tmp_path / str(at)
        assert read(memory, cache, failing, **kind) == expected
        assert failing.steps > steps.steps
        shutil.rmtree(cache)


def test_a_file_that_never_comes_is_named_after_four_requests(folder, tmp_path, kind):
    memory, asked = Memory(files=contents(folder)), []
    name = sorted(name for name in memory.files if name.startswith("data-"))[3]

    def step(what):
        if what.startswith(f"before get_range {name}"):
            asked.append(what)
            raise windowed.Failed("no answer")

    expected = (
        rf"store://rows/{name} is 'Failed: no answer', expected an answer to one of 4 requests; "
        "call again when the store answers"
    )
    with pytest.raises(ConnectionError, match=expected):
        read(memory, tmp_path, step, **kind)
    assert len(asked) == 4
    assert not list(tmp_path.rglob(f"*{name}"))
    # What has come stays, and is not asked for again.
    there = {path.name for path in tmp_path.rglob("data-*.arrow")}
    again = []
    read(memory, tmp_path, again.append, **kind)
    assert not there & {what.removeprefix("before get_range ") for what in again}


@settings(max_examples=12)
@given(data=st.data())
def test_a_copy_of_other_bytes_is_refused_and_not_kept(small, tmp_path_factory, data):
    memory = Memory(files=dict(small))
    name = data.draw(st.sampled_from([name for name in small if name.endswith(".arrow")]))
    content = bytearray(memory.files[name])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        error = (
            f"store://rows/{name} is 'OSError: [0-9]+ bytes came of bytes 0..{len(small[name]) - 1}"
        )
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        error = f"xxh3_128 of store://rows/{name} is '.*', expected '.*', as in its manifest; copy"
    memory.files[name] = bytes(content)
    cache = tmp_path_factory.mktemp("cache")
    with pytest.raises(ConnectionError, match=error):
        read(memory, cache)
    assert not list(cache.rglob(name))
    assert not list(cache.rglob("*.partial"))
    shutil.rmtree(cache)


@settings(max_examples=12)
@given(data=st.data())
def test_rows_of_a_file_that_was_cut_or_replaced_are_refused(small, tmp_path_factory, data):
    memory, cache = Memory(files=dict(small)), tmp_path_factory.mktemp("cache")
    name, other = sorted(name for name in small if name.startswith("data-"))
    content = small[name]
    if data.draw(st.booleans()):  # before the segments have come, or after
        read(memory, cache, cache_bytes=0)
    broken = {
        "cut": content[: data.draw(st.integers(0, len(content) // 2))],
        "zeros": bytes(len(content)),
        "another": small[other][: len(content)].ljust(len(content), b"\0"),
    }
    memory.files[name] = broken[data.draw(st.sampled_from(sorted(broken)))]
    with store(memory), pytest.raises(ConnectionError, match=f"store://rows/{name} is '.*', expe"):
        read_one_by_one(cache)
    shutil.rmtree(cache)


def read_one_by_one(cache):
    rows = open_packed("memory://unused", cache=cache, cache_bytes=0)
    for row in range(len(rows)):
        read_rows(rows, row)


def with_column(content, name, change):
    """A file of rows in which the numbers of a column are others, and all else is the same."""
    sink, stream = pa.BufferOutputStream(), pa.ipc.open_stream(content)
    with pa.ipc.new_stream(sink, stream.schema) as writer:
        for batch in stream:
            place, kind = batch.schema.get_field_index(name), batch.schema.field(name).type
            column = batch.column(place)
            pairs = name == "grid_hw"
            flat = column.flatten().flatten() if pairs else column.flatten()
            values = pa.array(change(flat.to_numpy()))
            if pairs:
                values = pa.FixedSizeListArray.from_arrays(values, type=kind.value_type)
            if pa.types.is_list(kind):
                made = pa.ListArray.from_arrays(column.offsets, values, type=kind)
            else:
                made = pa.FixedSizeListArray.from_arrays(values, type=kind)
            writer.write_batch(batch.set_column(place, batch.schema.field(name), made))
    found = sink.getvalue().to_pybytes()
    assert len(found) == len(content)
    return found


def test_rows_of_a_file_that_was_replaced_are_refused_until_the_folder_is_opened_again(
    small, tmp_path, monkeypatch
):
    memory = Memory(files=dict(small))
    expected = (
        "version of store://rows/data-.* is '.*', expected '.*'; it was replaced since: open the "
        "folder again"
    )
    with store(memory):
        rows, later = (
            open_packed("memory://unused", cache=tmp_path, cache_bytes=0) for _ in range(2)
        )
        old = read_rows(later, [7, 1, 2])
        for name in [name for name in small if name.startswith("data-")]:
            memory.files[name] = with_column(small[name], "patches", np.invert)
        with pytest.raises(ConnectionError, match=expected):
            read_rows(rows, [7, 1, 2])
        with pytest.raises(ConnectionError, match=expected):
            rows[7]
        # Asked for a moment ago; the next time is when it has been a minute.
        read_rows(later, [7, 1, 2])
        monkeypatch.setattr(stored_segments, "_CHECKED_FOR", 0.0)
        with pytest.raises(ConnectionError, match=expected):
            read_rows(later, [7, 1, 2])
    new = read(memory, tmp_path, cache_bytes=0)
    assert new[0] != old.patches.tobytes()
    assert new[1:] == [old.coords.tobytes(), old.seq_lens.tobytes()]


CHANGES = {
    "seq_lens": (lambda lens: lens + 99, "seq_lens of more than the 6 tokens of a row, or of none"),
    "grid_hw": (np.zeros_like, "another than row 0 of the folder"),
    "example_index": (None, "lists in 'example_index' of other lengths than seq_lens"),
}


@pytest.mark.parametrize("column", CHANGES)
def test_segments_that_do_not_fit_together_are_refused_and_not_kept(small, tmp_path, column):
    memory, (change, what) = Memory(files=dict(small)), CHANGES[column]
    name = min(name for name in small if name.startswith("data-"))
    if change is not None:
        memory.files[name] = with_column(small[name], column, change)
    else:  # the offsets of its lists: one begins a segment earlier
        stored = pa.ipc.open_stream(small[name]).read_next_batch().column(column)
        offsets = stored.offsets.to_numpy().copy()
        held = offsets.tobytes()
        offsets[1] += 1
        at = small[name].rindex(held)
        memory.files[name] = small[name][:at] + offsets.tobytes() + small[name][at + len(held) :]
    with (
        store(memory),
        pytest.raises(ConnectionError, match=f"store://rows/{name} is .*{what}.*, expected"),
    ):
        read_one_by_one(tmp_path)
    memory.files[name] = small[name]
    assert read(memory, tmp_path, cache_bytes=0) == read(memory, tmp_path / "copy")


def test_rows_in_a_store_keep_their_tokens_whatever_other_columns_they_have(three):
    here, _, by_row = three
    texts = [[f"text {one}" for one in labels] for labels in here["labels"]]
    fewer = by_row.remove_columns(["labels"])
    transform = by_row.format["format_kwargs"]["transform"]
    others = fewer.add_column("labels", texts).with_transform(transform)
    for rows in (fewer, by_row.rename_column("labels", "mine"), others):
        assert "packpipe_row" not in rows[5]
        assert np.array_equal(np.ravel(rows[5]["patches"]), np.ravel(here[5]["patches"]))
        np.testing.assert_array_equal(read_rows(rows, 5).patches, read_rows(here, 5).patches)
    assert list(others[5]["labels"]) == texts[5]


def test_rows_in_a_store_that_nothing_reads_are_refused_by_name(three, folder, tmp_path):
    by_row = three[2]
    another = open_packed(in_fsspec(contents(folder)), cache=tmp_path, cache_bytes=0)
    lost = [by_row.with_format("numpy"), datasets.concatenate_datasets([by_row, another])]
    for rows in lost:
        with pytest.raises(ValueError, match=r"rows is 'without .*', expected as open_packed"):
            PackedLoader(rows, 3)
    with pytest.raises(ValueError, match=r"columns is \[.*\], expected 'packpipe_row' among them"):
        read_rows(by_row.remove_columns(["packpipe_row"]), 0)


def refused(memory, tmp_path, match, **asked):
    with store(memory), pytest.raises(ValueError, match=match):
        open_packed("memory://unused", cache=tmp_path, **asked)


def test_what_is_no_complete_packed_folder_is_refused_by_name(small, tmp_path):
    expected = "folder is 'memory://unused', expected a folder that packpipe.pack wrote; pass what"
    refused(Memory(), tmp_path, expected)
    refused(Memory(files={"manifest.json": b"{"}), tmp_path, expected)
    refused(Memory(files={"manifest.json": b'{"files": []}'}), tmp_path, expected)
    manifest = json.loads(small["manifest.json"])

    def with_manifest(**others):
        changed = json.dumps({**manifest, **others}).encode()
        return Memory(files={**small, "manifest.json": changed})

    expected = "folder is 'memory://unused', expected a complete build; call pack again"
    refused(with_manifest(complete=False), tmp_path, expected)
    outside = {**manifest["files"], "../../data.arrow": manifest["files"]["rejects.arrow"]}
    expected = r"manifest.json is '../../data.arrow', expected a name without a folder"
    refused(with_manifest(files=outside), tmp_path, expected)
    expected = "memory://unused, packed with materialize=False', expected rows with their tokens"
    refused(with_manifest(materialized=False), tmp_path, expected)
    pairs = {f"{part}/manifest.json": small["manifest.json"] for part in ("images", "texts")}
    expected = "folder is 'memory://unused, of pairs', expected .*; open memory://unused/images and"
    refused(Memory(files=pairs), tmp_path, expected)
    refused(Memory(files=small), tmp_path, "cache_bytes is -1, expected an integer", cache_bytes=-1)
    with pytest.raises(ValueError, match=r"cache is 's3://x', expected a path without a scheme"):
        open_packed("memory://unused", cache="s3://x")
    with pytest.raises(ValueError, match=r"folder is '.*', expected a folder that packpipe.pack"):
        open_packed(tmp_path)
    with pytest.raises(TypeError, match=r"'str', expected .*; open the folder with packpipe.open"):
        PackedLoader("s3://bucket/rows", 8)


def test_wrong_arguments_are_refused_by_name_wherever_the_folder_lies(folder, tmp_path):
    (tmp_path / "file").touch()
    for where in (folder, "memory://unused"):
        with pytest.raises(ValueError, match=r"cache_bytes is -3, expected an integer"):
            open_packed(where, cache_bytes=-3)
        with pytest.raises(TypeError, match=r"cache_bytes is '10GB', expected an integer"):
            open_packed(where, cache_bytes="10GB")
        with pytest.raises(
            ValueError, match=r"cache is 's3://x', expected a path without a scheme"
        ):
            open_packed(where, cache="s3://x")
        with pytest.raises(
            ValueError, match=r"cache is '.*/file', expected a folder, or none; pass"
        ):
            open_packed(where, cache=tmp_path / "file")
        with pytest.raises(
            TypeError, match=r"storage_options is 'key', expected a dict; pass what"
        ):
            open_packed(where, storage_options="key")
    with pytest.raises(
        TypeError, match=r"folder is None, expected a path or a URL; pass what pack"
    ):
        open_packed(None)
    for part in ("images", "texts"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "manifest.json").touch()
    with pytest.raises(ValueError, match=rf"of pairs', expected .*; open {tmp_path}/images and"):
        open_packed(tmp_path)


def test_what_cannot_be_opened_is_asked_for_once(tmp_path):
    expected = "nothing://rows/manifest.json is .*nothing.*, expected a file that can be opened"
    with pytest.raises(ValueError, match=expected):
        open_packed("nothing://rows", cache=tmp_path)
    asked = []

    def step(what):
        asked.append(what)
        raise PermissionError("no")

    with store(Memory(), step), pytest.raises(PermissionError, match=r"manifest\.json is 'Permi"):
        open_packed("memory://unused", cache=tmp_path)
    assert asked == ["before get manifest.json"]
