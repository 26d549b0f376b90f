"""Shards: the folder of a build that is stopped anywhere, continued, shared and short of room."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import crashing
import datasets
import numpy as np
import pictures
import pytest
from crashing import (
    JOURNAL,
    MANIFEST,
    Stopped,
    assert_committed_files_are_whole,
    build,
    committed,
    contents,
    header_of,
    raising_at,
    stamps,
    stopped_build,
    watching,
)
from hypothesis import given
from hypothesis import strategies as st
from processes import is_stopped, wait_until

import packpipe
from packpipe import Beta, Side, Uniform, durable
from packpipe.building import shards
from packpipe.rows.rejects import TooManyRejects

DATA = [f"data-{number:05d}.arrow" for number in range(3)]
# The manifest is written first of all, and last; the journal grows by a line for every shard.
SIDECARS = ("dataset_info.json", "state.json", "rejects.arrow")
WRITTEN = {"manifest.json": 2, **dict.fromkeys((*DATA, *SIDECARS), 1)}
# What a build does, and how often.
DONE = {
    "acquire .lock": 1,
    **{
        f"{what} {name}.partial": times
        for name, times in WRITTEN.items()
        for what in ("open", "fsync", "replace")
    },
    "open journal.jsonl": len(DATA),
    "fsync journal.jsonl": len(DATA),
    "fsync out": sum(WRITTEN.values()) + len(DATA) + 1,  # also when the journal is gone
    "unlink journal.jsonl": 1,
    "unlink .lock": 1,
}
STEPS = [
    (f"{when} {what}", nth)
    for what, times in DONE.items()
    for nth in range(times)
    for when in ("before", "after")
]
STEPS = [(step, nth) for step, nth in STEPS if ".lock" not in step]
STEPS += [("after mkdir out", 0), *(("after write rows", nth) for nth in (0, 20, 60, 100, 150))]


@pytest.fixture(scope="module")
def source():
    return crashing.source(30)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What an undisturbed build leaves."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    build(source, folder)
    found = contents(folder)
    assert set(found) == set(WRITTEN)
    return found


@pytest.fixture
def half(source, tmp_path):
    """A folder in which two of three shards are committed."""
    folder = tmp_path / "out"
    stopped_build(source, folder, f"before open {DATA[2]}.partial")
    stopped_build(source, folder, f"before fsync {DATA[2]}.partial")
    assert set(committed(folder)) == set(DATA[:2])
    return folder


@pytest.mark.usefixtures("whole")  # Which has measured the images and kept their sizes.
def test_all_that_a_build_does_is_among_the_steps(source, tmp_path):
    seen = Counter()
    with watching(lambda step: seen.update([step])):
        build(source, tmp_path / "out")
    assert {step.split(maxsplit=1)[1] for step in seen} == {*DONE, "mkdir out", "write rows"}
    assert all(seen[f"before {what}"] == times for what, times in DONE.items())
    assert seen["after write rows"] > 150


@pytest.mark.parametrize(("step", "nth"), STEPS)
def test_a_build_that_is_stopped_continues_to_the_same_bytes(source, whole, tmp_path, step, nth):
    folder = tmp_path / "out"
    stopped_build(source, folder, step, nth)
    assert_committed_files_are_whole(folder)
    before = stamps(folder)
    build(source, folder)
    assert contents(folder) == whole
    assert before.items() <= stamps(folder).items(), "what was committed was written again"


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_a_committed_file_that_is_gone_or_cut_is_written_again(source, whole, half, harm):
    harm(half / DATA[0])
    build(source, half)
    assert contents(half) == whole


BARE = [
    "after mkdir out",
    "before acquire .lock",
    "before open manifest.json.partial",
    *(
        f"{step} manifest.json.partial"
        for step in ("after open", "before fsync", "after fsync", "before replace")
    ),
    "after replace manifest.json.partial",
    "after fsync out",
    "before write rows",
    *(
        f"{when} {what} {DATA[0]}.partial"
        for what in ("open", "fsync")
        for when in ("before", "after")
    ),
    f"before replace {DATA[0]}.partial",
    f"after replace {DATA[0]}.partial",
]


@pytest.mark.parametrize("step", BARE)
def test_a_build_that_is_stopped_before_its_first_shard_is_noted_leaves_nothing(
    source, tmp_path, step
):
    stopped_build(source, tmp_path / "new", step.replace(" out", " new"))
    assert list(tmp_path.iterdir()) == []
    there = tmp_path / "out"
    there.mkdir()
    stopped_build(source, there, step)
    assert list(there.iterdir()) == []


def test_a_lock_that_was_left_in_a_complete_folder_is_removed(source, whole, tmp_path):
    build(source, tmp_path)
    (tmp_path / ".lock").write_bytes(b"")  # killed before it was removed
    build(source, tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.slow
@given(stops=st.lists(st.integers(0, 399), min_size=1, max_size=4))
def test_a_build_that_is_stopped_again_and_again_ends_in_the_same_bytes(
    source, whole, tmp_path_factory, stops
):
    folder = tmp_path_factory.mktemp("again") / "out"
    for stop in stops:
        count = iter(range(stop))

        def step(name: str, count=count) -> None:
            if ".lock" not in name and next(count, None) is None:
                raise Stopped

        before = stamps(folder)
        with suppress(Stopped), watching(step):
            build(source, folder)
        assert_committed_files_are_whole(folder)
        assert before.items() <= stamps(folder).items()
    build(source, folder)
    assert contents(folder) == whole


def assert_visible_files_are_whole(folder, whole):
    assert_committed_files_are_whole(folder)
    for path in folder.glob("*"):
        if path.suffix in (".arrow", ".json") and path.name != "manifest.json":
            assert path.read_bytes() == whole[path.name], path.name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_whatever_has_its_name_is_whole_at_every_step(source, whole, tmp_path, num_workers):
    folder = tmp_path / "out"
    steps = []

    def step(name: str) -> None:
        steps.append(name)
        assert_visible_files_are_whole(folder, whole)

    with watching(step):
        build(source, folder, num_workers=num_workers)
    assert len(steps) > 400
    assert contents(folder) == whole


def test_datasets_opens_the_folder_once_all_rows_are_there_and_not_before(source, tmp_path):
    folder = tmp_path / "out"
    opened = set()

    def step(name: str) -> None:
        if name.startswith("after replace"):
            missing = not set(DATA) <= set(committed(folder))
            try:
                rows = len(datasets.load_from_disk(str(folder)))
            except FileNotFoundError:
                rows = None
            opened.add((missing, rows))

    with watching(step):
        packed = build(source, folder)
    assert opened == {(True, None), (False, None), (False, len(packed))}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_is_on_the_disk_before_it_is_named_and_its_name_before_it_is_noted(
    source, tmp_path, name
):
    steps = []
    with watching(steps.append):
        build(source, tmp_path / "out")
    at = steps.index(f"after replace {name}.partial")
    assert f"after fsync {name}.partial" in steps[:at]
    assert f"before open {name}.partial" not in steps[at : steps.index("after fsync out", at)]
    if name != "manifest.json":
        where = "journal.jsonl" if name in DATA else "manifest.json.partial"
        noted = steps.index(f"before open {where}", at)
        assert "after fsync out" in steps[at:noted]
    if name in DATA:
        synced = steps.index("after fsync journal.jsonl", noted)
        assert not any(
            "before open" in step and ".json" in step for step in steps[noted + 1 : synced]
        )


LEFT = [
    "manifest.json.partial",
    "state.json.partial",
    "data-00001.arrow.partial",
    "data-00099.arrow.partial",
    "data-00099.arrow",
    "data-100000.arrow",
    "data-00002.arrow",
    "rejects.arrow",
    "state.json",
    "dataset_info.json",
    ".lock",
]


@pytest.mark.parametrize("name", LEFT)
def test_what_a_killed_build_leaves_is_written_again_or_removed(source, whole, half, name):
    (half / name).write_bytes(b"half of")
    before = stamps(half)
    build(source, half)
    assert contents(half) == whole
    assert before.items() <= stamps(half).items()


@pytest.mark.parametrize("tail", [b"", b"{", b"\0\0\n", b"[1]\n", b'{"data-00002.arrow": '])
@pytest.mark.parametrize("cut", [0, 1, 100, -1, None])
def test_a_journal_counts_as_far_as_it_is_whole(source, whole, half, cut, tail):
    journal = half / JOURNAL
    stopped_build(source, half, f"before replace {DATA[2]}.partial")
    (half / DATA[0]).unlink()  # so that there is something to note again
    stopped_build(source, half, f"before open {DATA[2]}.partial")
    assert journal.read_bytes().count(b"\n") == 1
    journal.write_bytes(journal.read_bytes()[:cut] + tail)
    build(source, half)
    assert contents(half) == whole


def test_a_build_begun_when_manifests_were_written_at_every_commit_ends_in_the_same_bytes(
    source, whole, half
):
    manifest = json.loads((half / MANIFEST).read_text())
    del manifest["plan"]
    (half / MANIFEST).write_text(json.dumps({**manifest, "files": committed(half)}))
    (half / JOURNAL).unlink(missing_ok=True)
    build(source, half)
    assert contents(half) == whole


def test_a_build_does_not_continue_with_shards_of_another_plan(tmp_path, monkeypatch):
    paths = [tmp_path / f"{number}.png" for number in range(12)]
    for number, path in enumerate(paths):
        path.write_bytes(pictures.encoded_image(8, 8, number))
    dataset = datasets.Dataset.from_dict({"image": list(map(str, paths))})
    dataset = dataset.cast_column("image", datasets.Image())
    read = os.open

    def refused(name, *arguments, **options):
        if name == str(paths[5]):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
        return read(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        folder = tmp_path / "out"
        stopped_build(dataset, folder, f"before open {DATA[2]}.partial")
        build(dataset, tmp_path / "without")
    assert DATA[0] in committed(folder)
    packed = build(dataset, folder)
    whole = build(dataset, tmp_path / "whole")
    assert sorted(chain(*packed["example_index"])) == list(range(12))
    assert packed["example_index"][:] == whole["example_index"][:]
    assert contents(folder) == contents(tmp_path / "whole") != contents(tmp_path / "without")


def test_rows_that_are_computed_when_read_are_cut_by_what_is_stored(source, whole, tmp_path):
    lazy = build(source, tmp_path / "lazy", materialize=False)
    assert len(list((tmp_path / "lazy").glob("data-*"))) == 1 < len(DATA)
    rows = build(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    planned, packed = packpipe.read_rows(lazy), packpipe.read_rows(rows)
    assert planned.example_index.tolist() == packed.example_index.tolist()
    assert np.array_equal(planned.patches, packed.patches)


@pytest.mark.parametrize("number", [1, 12, 10**5, 10**5 + 1])
def test_names_of_shards_sort_into_their_order(number):
    names = shards.shard_names(number)
    assert len(names) == len(set(names)) == number
    assert names == sorted(names)
    assert names[0] == f"data-{0:0{max(5, len(str(number - 1)))}d}.arrow"


def test_shards_are_read_in_the_order_of_the_manifest(source, tmp_path):
    packed = build(source, tmp_path)
    before = packed["example_index"][:]
    # As names were of builds of more than 99,999 shards: the last one sorts before the others.
    for name in ("manifest.json", "state.json"):
        text = (tmp_path / name).read_text().replace(DATA[2], "data-000000.arrow")
        (tmp_path / name).write_text(text)
    (tmp_path / DATA[2]).rename(tmp_path / "data-000000.arrow")
    assert build(source, tmp_path)["example_index"][:] == before
    assert datasets.load_from_disk(tmp_path)["example_index"][:] == before


@pytest.mark.parametrize("name", [".lock", "manifest.json.partial"])
def test_what_a_build_killed_at_once_leaves_is_in_nobodys_way(source, whole, tmp_path, name):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_bytes(b"")
    build(source, folder)
    assert contents(folder) == whole


def test_a_data_file_that_was_never_noted_is_written_again_for_another_configuration(
    source, tmp_path
):
    other = build(source, tmp_path / "other", seed=1)
    assert len(other) > 0
    folder = tmp_path / "out"
    kept = {}

    def step(name: str) -> None:
        if name == f"after replace {DATA[0]}.partial":
            kept.update(contents(folder))  # what a kill leaves
            raise Stopped

    with suppress(Stopped), watching(step):
        build(source, folder)
    folder.mkdir()
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    assert {DATA[0], "manifest.json", ".lock"} <= set(kept)
    build(source, folder, seed=1)
    assert contents(folder) == contents(tmp_path / "other")


def test_another_configuration_is_refused_where_shards_are_committed(source, half):
    before = contents(half)
    message = f"output is {str(half)!r}, expected rows made with the same strategy, epoch; choose"
    with pytest.raises(FileExistsError, match=re.escape(message)):
        build(source, half, epoch=1, strategy="ffd")
    assert contents(half) == before


def test_what_somebody_else_put_into_a_half_filled_folder_stays(source, whole, half):
    (half / "notes.txt").write_text("mine")
    build(source, half)
    assert contents(half) == {**whole, "notes.txt": b"mine"}


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    """The source on the disk, for other processes."""
    folder = tmp_path_factory.mktemp("saved") / "source"
    source.save_to_disk(folder)
    return folder


@contextmanager
def under_way(saved, folder, step):
    """A build in another process that is held up at a step until the block is left."""
    run = crashing.Run(saved, folder, signal_at=(step, signal.SIGSTOP))
    pid = run.process.pid
    try:
        wait_until(lambda: is_stopped(pid))
        yield run
        os.kill(pid, signal.SIGCONT)
        assert run.result()[0] == 0
    finally:
        run.kill(group=True)
        run.process.wait()


@pytest.mark.parametrize(("step", "options"), [(20, {}), (20, {"seed": 1}), (250, {})])
def test_a_second_build_is_refused_while_another_process_is_at_it(
    saved, whole, tmp_path, step, options
):
    folder = tmp_path / "out"
    message = (
        f"output is '{folder} (being written by another process)', expected a folder of its own; "
        "wait for it, or write into another"
    )
    with under_way(saved, folder, step):
        assert bool(committed(folder)) == (step > 200)
        before = contents(folder)
        with pytest.raises(FileExistsError, match=f"^{re.escape(message)}$"):
            build(datasets.load_from_disk(saved), folder, **options)
        assert contents(folder) == before
    assert set(contents(folder)) == set(whole)
    assert contents(folder).items() >= {name: whole[name] for name in DATA}.items()


def test_a_build_in_the_cache_waits_for_another_process_that_is_at_it(
    saved, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset = datasets.load_from_disk(saved)
    folder = Path(build(dataset, None).cache_files[0]["filename"]).parent
    assert folder.is_relative_to(tmp_path / "cache")
    alone = contents(folder)
    shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING, logger="packpipe"), ThreadPoolExecutor(1) as threads:
        with under_way(saved, folder, 250):
            first = stamps(folder)
            waiting = threads.submit(build, dataset, None)
            wait_until(lambda: f"waiting for the process that is writing {folder}" in caplog.text)
            assert not waiting.done()
            assert stamps(folder) == first
        packed = waiting.result(300)
    assert contents(folder) == alone
    assert {Path(file["filename"]).parent for file in packed.cache_files} == {folder}
    assert len(first) > 0
    assert first.items() <= stamps(folder).items()


def test_a_build_that_waits_is_made_when_the_one_it_waits_for_fails(tmp_path, caplog):
    folder = tmp_path / "out"
    inside, fail = Event(), Event()

    def first():
        with shards.alone_in(folder, wait=True):
            inside.set()
            fail.wait(300)
        with suppress(OSError):  # the other one may be in already
            folder.rmdir()  # as a build does that has committed nothing

    def second():
        with shards.alone_in(folder, wait=True):
            return folder.is_dir()

    with ThreadPoolExecutor(2) as threads:
        failing = threads.submit(first)
        assert inside.wait(300)
        waiting = threads.submit(second)
        wait_until(lambda: "waiting for the process that is writing" in caplog.text)
        fail.set()
        failing.result(300)
        assert waiting.result(300)


def test_rejects_of_committed_shards_are_there_once_and_held_against_every_call(
    source, whole, half
):
    noted = [reject[0] for file in committed(half).values() for reject in file["rejects"]]
    assert noted == [13]
    before = stamps(half)
    with pytest.raises(TooManyRejects, match=re.escape("rejected is 3 of 30 exam")) as caught:
        build(source, half, max_bad_fraction=0.05)
    assert [reject.example_index for reject in caught.value.rejects] == [4, 13, 22]
    with pytest.raises(TooManyRejects, match=re.escape("example 13 is bad (undecodable: ")):
        build(source, half, on_error="raise")
    assert stamps(half) == before
    packed = build(source, half)
    assert packpipe.rejects(packed)["example_index"][:] == [4, 13, 22]
    assert contents(half) == whole


def test_rejects_are_held_against_a_call_that_finds_every_shard_committed(source, tmp_path):
    stopped_build(source, tmp_path / "out", "before open dataset_info.json.partial")
    assert set(committed(tmp_path / "out")) == set(DATA)
    with pytest.raises(TooManyRejects):
        build(source, tmp_path / "out", max_bad_fraction=0.05)


@pytest.mark.parametrize(("shard", "left"), [(0, []), (2, DATA[:2])])
def test_too_many_rejects_leave_what_was_committed_before_them(tmp_path, shard, left):
    images = [pictures.encoded_image(8, 8, number) for number in range(12)]
    whole = build(pictures.dataset_of(images), tmp_path / "whole")
    victim = whole[4 * shard]["example_index"][0]
    images[victim] = header_of(pictures.encoded_image(8, 8, 0, "JPEG"))
    with pytest.raises(TooManyRejects, match=re.escape(f"example {victim} is bad (undecodable: ")):
        build(pictures.dataset_of(images), tmp_path / "out", on_error="raise")
    assert list(committed(tmp_path / "out")) == left
    assert set(contents(tmp_path / "out")) == ({*left, MANIFEST, JOURNAL} if left else set())
    assert (tmp_path / "out").exists() == bool(left)


def test_a_half_filled_folder_is_not_continued_with_other_files_behind_the_same_paths(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(12)]
    for number, path in enumerate(paths):
        path.write_bytes(pictures.encoded_image(8, 8, number))
    source = datasets.Dataset.from_dict({"image": list(map(str, paths))})
    source = source.cast_column("image", datasets.Image())
    folder = tmp_path / "out"
    stopped_build(source, folder, f"before open {DATA[1]}.partial")
    stopped_build(source, folder, f"before open {DATA[2]}.partial")
    before = contents(folder)
    assert DATA[0] in committed(folder)
    image, time_ns = paths[5].read_bytes(), paths[5].stat().st_mtime_ns
    paths[5].write_bytes(pictures.encoded_image(8, 8, 99))
    os.utime(paths[5], ns=(time_ns, time_ns + 10**9))  # clocks of file systems may tick slowly
    message = f"output is {str(folder)!r}, expected rows made with the same source_files; choose"
    with pytest.raises(FileExistsError, match=re.escape(message)):
        build(source, folder)
    assert contents(folder) == before
    build(source, tmp_path / "other")
    paths[5].write_bytes(image)
    os.utime(paths[5], ns=(time_ns, time_ns + 2 * 10**9))
    with pytest.raises(FileExistsError, match="source_files"):  # bytes are not compared, times are
        build(source, folder)


FOREIGN = ['{"name": "an app"}', "[1]", "{}", "no JSON", ""]


@pytest.mark.parametrize("text", FOREIGN)
def test_the_manifest_of_something_else_is_refused(source, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(FileExistsError, match=re.escape(f"output is {str(tmp_path)!r}, expected")):
        build(source, tmp_path)
    assert contents(tmp_path) == {"manifest.json": text.encode()}


def free_bytes(monkeypatch, number):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=number))


def test_a_build_that_cannot_fit_is_refused_before_a_row_is_made(source, tmp_path, monkeypatch):
    free_bytes(monkeypatch, 1234)
    folder, steps = tmp_path / "out", []
    message = (
        f"[Errno 28] free space of {folder} is 1.2 kB, expected 5.2 kB for 30 images in 12 rows; "
        "packed uint8 patches are many times a JPEG: free some, choose another output, or pass "
        "store='encoded', which stores images as they are, or materialize=False, which stores the "
        "plan alone"
    )
    with watching(steps.append), pytest.raises(OSError, match=f"^{re.escape(message)}$") as caught:
        build(source, folder)
    assert caught.value.errno == errno.ENOSPC
    assert not any("rows" in step or "data-" in step for step in steps)
    assert list(tmp_path.iterdir()) == []
    packed = build(source, folder, materialize=False)
    assert len(packed) == 12


def test_what_is_committed_needs_no_room_any_more(source, whole, tmp_path, half, monkeypatch):
    free_bytes(monkeypatch, 2000)
    with pytest.raises(OSError, match=r"is 2\.0 kB, expected 5\.2 kB for 30 images in 12 rows;"):
        build(source, tmp_path / "new")
    build(source, half)
    assert contents(half) == whole


def test_a_half_filled_folder_without_room_for_the_rest_stays(source, whole, half, monkeypatch):
    before = stamps(half)
    free_bytes(monkeypatch, 1000)
    with pytest.raises(OSError, match=r"is 1\.0 kB, expected 1\.8 kB for 30 images in 12 rows;"):
        build(source, half)
    assert stamps(half) == before
    monkeypatch.undo()
    build(source, half)
    assert contents(half) == whole


@pytest.mark.parametrize(
    "options",
    [
        {"seq_len": 1024},
        {"seq_len": 128, "label_column": None},
        {"seq_len": 256, "patch_size": 8, "label_column": "n"},
        {"seq_len": 32, "patch_size": 32, "max_segments": 2},
        {
            "seq_len": 256,
            "resolution": Side(Uniform(16, 64)),
            "drop_rate": Beta(mean=0.5, maximum=0.7),
        },
    ],
    ids=str,
)
def test_the_room_that_is_asked_for_is_the_room_that_is_taken(tmp_path, monkeypatch, options):
    sides = np.random.default_rng(0).integers(8, 150, (100, 2)).tolist()
    images = [pictures.encoded_image(*side, number) for number, side in enumerate(sides)]
    asked = []
    monkeypatch.setattr(
        "packpipe.building.build.check_space", lambda _, size, __: asked.append(size)
    )
    source = pictures.dataset_of(images)
    packpipe.pack(source, output=tmp_path, progress=False, num_workers=0, **options)
    taken = sum(path.stat().st_size for path in tmp_path.glob("data-*"))
    assert asked == [pytest.approx(taken, rel=0.02)]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0 kB"), (1234, "1.2 kB"), (10**6, "1.0 MB"), (25 * 10**8, "2.5 GB")],
)
def test_sizes_are_for_readers(number, text):
    assert shards.format_bytes(number) == text


FULL = [
    (when, name)
    for when in ("before open", "after open", "before fsync")
    for name in (*DATA, *SIDECARS)
]


@pytest.mark.parametrize(("when", "name"), FULL)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_is_named_with_what_stays(
    source, whole, tmp_path, monkeypatch, when, name, number
):
    folder = tmp_path / "out"
    free_bytes(monkeypatch, 87_654)
    error = OSError(number, os.strerror(number))
    with (
        watching(raising_at(f"{when} {name}.partial", 0, error)),
        pytest.raises(OSError, match="free") as caught,
    ):
        build(source, folder)
    monkeypatch.undo()
    before = stamps(folder)
    assert str(caught.value) == (
        f"[Errno {number}] free space of {folder} is 87.7 kB, expected room for the next file "
        f"({os.strerror(number)}); free some and call again: {len(before)} files are committed and "
        "stay"
    )
    assert caught.value.errno == number
    assert list(before) == DATA[: DATA.index(name) if name in DATA else 3]
    assert_committed_files_are_whole(folder)
    assert folder.exists() == bool(before)
    build(source, folder)
    assert contents(folder) == whole
    assert before.items() <= stamps(folder).items()


@pytest.mark.parametrize(("nth", "number"), [(75, 1), (125, 2)])
def test_rows_that_could_not_be_written_leave_their_room(source, tmp_path, nth, number):
    message = f"free some and call again: {number} files are committed and stay"
    step = raising_at("before write rows", nth, OSError(errno.ENOSPC, "full"))
    with watching(step), pytest.raises(OSError, match=message):
        build(source, tmp_path)
    assert set(contents(tmp_path)) == {*DATA[:number], MANIFEST, JOURNAL}


@pytest.mark.parametrize("step", ["before open manifest.json.partial", "after open manifest.json"])
def test_a_disk_without_any_room_is_named_and_nothing_is_left(source, tmp_path, step):
    error = OSError(errno.ENOSPC, "No space left on device")
    with (
        watching(raising_at(f"{step.removesuffix('.partial')}.partial", 0, error)),
        pytest.raises(OSError, match="expected room for the next file") as caught,
    ):
        build(source, tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_the_disk_is_raised_as_it_is(source, tmp_path):
    error = OSError(errno.EIO, "Input/output error")
    step = f"before fsync {DATA[1]}.partial"
    with watching(raising_at(step, 0, error)), pytest.raises(OSError, match="Input") as caught:
        build(source, tmp_path / "out")
    assert str(caught.value) == "[Errno 5] Input/output error"
    assert list(committed(tmp_path / "out")) == DATA[:1]


def test_a_journal_of_another_plan_is_gone_before_the_manifest_names_a_new_one(
    tmp_path, monkeypatch
):
    def write(shard, number):
        durable.partial_of(shard.path(number)).write_bytes(b"rows")
        shard.commit(number, {"rows": 1, "bytes": 4}, [], Counter())

    before = shards.Shards(tmp_path, {"seed": 0}, "one plan", [1, 1])
    write(before, 0)
    assert shards.Shards(tmp_path, {"seed": 0}, "one plan", [1, 1]).missing == [1]
    again = shards.Shards(tmp_path, {"seed": 0}, "one plan", [1, 1])
    write(again, 1)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # as soon as the manifest names the other plan
        patch.setattr(shards.Shards, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            shards.Shards(tmp_path, {"seed": 0}, "another plan", [1, 1])
    assert not (tmp_path / "journal.jsonl").exists()
    assert shards.Shards(tmp_path, {"seed": 0}, "another plan", [1, 1]).missing == [0, 1]
