"""Files packed by windows: one folder, whoever builds it, whatever is stopped, killed or fails."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import pickle
import signal
from collections import Counter
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import crashing
import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import windowed
from crashing import contents
from forked import CONTEXT, Forked
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from windowed import (
    NUM_ROWS,
    TOLERANCE,
    Failed,
    Failing,
    Memory,
    Watched,
    build_of,
    built,
    watched,
)

import packpipe
from packpipe import ImageFiles
from packpipe.building import files_build as files_build_module
from packpipe.building import window_job
from packpipe.building.pack_files import checked_executor, files_build
from packpipe.durable import json_text
from packpipe.rows.rejects import Tolerance, TooManyRejects
from packpipe.sources import tar_blocks
from packpipe.storage.storage import LocalFolder

NUM_WINDOWS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    windowed.write(folder)
    return folder


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """What one process builds, one window after the other."""
    found = tmp_path_factory.mktemp("built") / "out"
    assert not built(build_of(source, found))
    return found


@pytest.fixture(scope="module")
def whole(folder):
    return contents(folder)


def test_a_source_is_packed_once_and_verify_finds_nothing_amiss(source, folder, whole):
    commits = [name for name in whole if name.startswith("_commits")]
    data = [name for name in whole if name.startswith("data-")]
    assert len(commits) == NUM_WINDOWS
    assert len(data) == 2 * NUM_WINDOWS
    assert len({name.split("-")[1] for name in data}) == NUM_WINDOWS
    assert packpipe.verify(folder) == []
    assert packpipe.verify(folder, crashing.source(NUM_ROWS)) == []
    with pytest.raises(
        TypeError, match=r"is 'ImageFiles', expected Dataset; .* datasets\.load_dataset"
    ):
        packpipe.verify(folder, ImageFiles(source))
    packed = datasets.load_from_disk(folder)
    rejected = packpipe.rejects(packed)["example_index"][:]
    assert len(rejected) == 7
    held = sorted(np.concatenate(packed["example_index"][:]).tolist() + rejected)
    assert held == list(range(NUM_ROWS))
    found = packpipe.summarize(folder)
    assert found.manifest["counts"]["packed"] == NUM_ROWS - 7
    assert sum(len(batch.seq_lens) for batch in packpipe.PackedLoader(packed, 2)) > 0


def test_rows_that_changed_places_or_windows_that_were_changed_are_found(folder, tmp_path):
    for name, content in contents(folder).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for change, what in (
        ({"rows": 20}, "not what the plan puts there"),
        ({"blocks": [[5, 11]]}, "windows are of 55 examples, expected 60"),
        ({"blocks": [[5, -12]]}, "pairs of (rows, times)"),
        ({"blocks": [[5, 11], [5, 1]]}, "expected {'blocks': [[5, 12]], 'rows': 15}"),
        ({"blocks": [[5.0, 12]]}, "windows is {'blocks': [[5.0, 12]], 'rows': 15}, expected"),
        ({"x": 1}, "'x': 1}, expected {'blocks': [[5, 12]], 'rows': 15}"),
        ({"rows": "20"}, "window_rows is '20'"),
        ({"blocks": None}, "gives no plan"),
    ):
        changed = {**manifest, "windows": {**manifest["windows"], **change}}
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        assert any(what in problem.what for problem in packpipe.verify(tmp_path)), change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    job = json.loads((tmp_path / "job.json").read_text())
    for said, what in (
        (json.dumps({**job, "seed": 0.0, "x": 1}), "says other seed, x than manifest.json"),
        (json.dumps({**job, "x": None}), "says other x than manifest.json"),
        ("[", "cannot be read: Expecting value: line 1 column 2 (char 1)"),
        ("5", "is 5, expected an object"),
    ):
        (tmp_path / "job.json").write_text(said)
        assert [*map(str, packpipe.verify(tmp_path))] == [f"job.json: {what}"]


def test_each_block_is_read_once(source, tmp_path, monkeypatch):
    read = Counter()
    real = pq.ParquetFile.read_row_group

    def counting(self, group, **options):
        found = real(self, group, **options)
        read[tuple(found["image"].to_pylist()[0]["bytes"])] += 1
        return found

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    built(build_of(source, tmp_path / "out"))
    assert len(read) == NUM_ROWS // 5
    assert set(read.values()) == {1}


@pytest.mark.parametrize("ending", ["tar", "arrow"])
def test_tar_and_arrow_files_give_the_rows_of_parquet_whoever_builds_and_are_read_once(
    ending, tmp_path, folder, monkeypatch
):
    monkeypatch.setattr(tar_blocks, "_BLOCK_ROWS", 5)
    windowed.write_as(ending, tmp_path)
    build, asked = build_of(tmp_path, tmp_path / "0", ending=ending), []

    def counting(self, path, start=None, end=None, **options):
        asked.append((path, start, end))
        return AbstractFileSystem.cat_file(self, path, start, end, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "cat_file", counting)
        built(build)
    files = ImageFiles(f"{tmp_path}/*.{ending}")
    blocks = [files.block(number) for number in range(len(files.block_rows))]
    assert [block.num_rows for block in blocks] == [5] * (NUM_ROWS // 5)
    schemas = {one for one in asked if one[1] == 0 and ending == "arrow"}
    assert sorted(one for one in asked if one not in schemas) == [
        (block.file, block.start, block.stop) for block in blocks
    ]
    assert all(end <= 2**14 + 8 for _, _, end in schemas)

    class Sending(ThreadPoolExecutor):
        """Gives its threads what a process would be sent."""

        def submit(self, function, *args):
            return super().submit(function, *pickle.loads(pickle.dumps(args)))  # noqa: S301

    with Sending(2) as executor:
        built(build_of(tmp_path, tmp_path / "1", ending=ending), executor)
    assert contents(tmp_path / "1") == contents(tmp_path / "0")
    known, rows = map(packpipe.read_rows, map(datasets.load_from_disk, (folder, tmp_path / "0")))
    for name, values in {**known.tokens, **known.segments}.items():
        assert np.array_equal(np.asarray(getattr(rows, name)), np.asarray(values)), name
    assert len(known.labels) == NUM_ROWS - 7


def test_two_parts_in_any_order_and_then_the_end_give_the_same_folder(source, tmp_path, whole):
    build = build_of(source, tmp_path / "out")
    assert not build.claim()
    build.run(None, part=(2, 2), progress=False)
    expected = r"windows without a commit is '2 of 4, the first is 0', expected none; pack their "
    expected += r"parts first: window W is of part W % N \+ 1 of N"
    with pytest.raises(ValueError, match=expected):
        build.finish()
    again = build_of(source, tmp_path / "out")
    assert not again.claim()
    again.run(None, part=(1, 2), progress=False)
    again.finish()
    assert contents(tmp_path / "out") == whole
    assert build_of(source, tmp_path / "out").claim()


def test_processes_give_the_same_folder_and_one_that_is_killed_stops_nothing(
    source, tmp_path, whole
):
    class Mortal(ProcessPoolExecutor):
        """Its third task dies when it has put the first file of its window."""

        def submit(self, function, job, window):
            if window.number == 2:
                return super().submit(windowed.build_and_die, job, window, 5)
            return super().submit(function, job, window)

    build = build_of(source, tmp_path / "out")
    with Mortal(1, mp_context=CONTEXT) as executor, pytest.raises(BrokenProcessPool):
        built(build, executor)
    left = contents(tmp_path / "out")
    assert {name for name in left if name.startswith("_commits")} == {
        f"_commits/{number:06}.json" for number in (0, 1)
    }
    assert any(name.startswith("data-000002") for name in left)
    assert "manifest.json" not in left
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in left}
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as executor:
        built(build, executor)
    assert contents(tmp_path / "out") == whole
    kept = [name for name in left if "000000" in name or "000001" in name]
    assert len(kept) > 4
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == before[name] for name in kept)


def forked(what, source, output, **asked):
    asked = {"what": what, "source": str(source), "output": str(output), **asked}
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    return Forked(windowed.__file__, json.dumps(asked), **ray)


def test_ray_gives_the_same_folder_and_its_errors_are_those_of_the_task(source, tmp_path, whole):
    pytest.importorskip("ray")
    run = forked("ray", source, tmp_path / "out")
    assert run.wait() == 0, run.complaint
    found = json.loads(run.said.splitlines()[-1])
    assert found["error"][0]
    assert "invalid literal for int() with base 10: 'three'" in found["error"][1]
    forms = [f"{what}, {form}" for what in ("encoded", "pixels") for form in ("pyarrow", "numpy")]
    assert found["data"] == dict.fromkeys(forms, True)
    assert found["cancelled"] == [True] * 4
    assert found["after"] == "cannot schedule new futures after shutdown"
    assert contents(tmp_path / "out") == whole


def test_an_object_store_holds_the_same_and_is_asked_for_no_copy_and_few_lists(
    source, folder, whole, tmp_path
):
    for name in ("moto", "flask", "s3fs"):
        pytest.importorskip(name)
    run = forked("s3", source, "", cache=str(tmp_path))
    assert run.wait() == 0, run.complaint
    left, refused, calls, held, loaded, images = map(json.loads, run.said.splitlines())
    assert "manifest.json" not in left
    assert any(name.startswith("data-") for name in left)
    assert "expected rows made with the same seed" in refused
    methods = Counter(method for method, _ in calls)
    assert set(methods) <= {
        *("put_object", "get_object", "head_object", "list_objects_v2", "delete_object"),
        *("delete_objects", "get_bucket_location", "head_bucket"),
    }
    assert methods["put_object"] >= len(whole)
    # Of two drivers: files, commits and rows at the beginning, strays at the end.
    assert sum(call == ["list_objects_v2", "rows/"] for call in calls) <= 8
    assert held == {name: content.hex() for name, content in whole.items()}
    assert_read_once(loaded, folder, whole)
    # Images by their paths in it, one of them in an archive: packed, by epochs and as a stream.
    assert images == [[2, 2]] * 3


def assert_read_once(loaded, folder, whole):
    """Opening asks for two files; then every byte of rows comes once, by range, of a copy."""
    asked = {name: [tuple(call) for call in calls] for name, calls in loaded["asked"].items()}
    names = [f"rows/{name}" for name in whole if name.startswith("data-")]
    assert [key for _, key, _ in asked["looked at"]] == ["rows/manifest.json", "rows/rejects.arrow"]
    ranges = {
        name: (("get_object", f"rows/{name}", f"bytes=0-{len(content) - 1}"))
        for name, content in whole.items()
        if name.endswith(".arrow")
    }
    assert sorted(asked["copied"][1:]) == sorted(ranges.values())
    assert asked["epoch of the copy"] == []
    assert [key for _, key, _ in asked["opened again"]] == ["rows/manifest.json"]
    # Row by row: heads and segments of all files, then three columns of each row, each byte once.
    # The version of each file is asked for when it is opened, when its segments have come, and with
    # its first rows.
    assert {key for _, key, _ in asked["opened"][2:]} == set(names)
    versions = {
        what: Counter(key for method, key, _ in asked[what] if method == "head_object")
        for what in asked
    }
    assert versions.pop("opened") == Counter(2 * names)
    assert versions.pop("epoch by row") == Counter(names)
    assert not any(versions.values())
    assert {method for calls in asked.values() for method, _, _ in calls} == {
        "get_object",
        "head_object",
    }
    num_rows = json.loads(whole["manifest.json"])["counts"]["packs"]
    spans = [
        (key, *map(int, span[6:].split("-"))) for _, key, span in asked["epoch by row"] if span
    ]
    assert len(spans) == 3 * num_rows
    tokens = sum(stop + 1 - start for _, start, stop in spans)
    assert tokens == num_rows * (6 * 4 * 4 * 3 + 6 * 4 + 6 * 4)
    ordered = sorted(spans)
    assert all(a[0] < b[0] or a[2] < b[1] for a, b in itertools.pairwise(ordered))
    assert loaded["same"]
    here = packpipe.PackedLoader(packpipe.open_packed(folder), 4, as_numpy=True)
    list(here)
    assert loaded["state"] == here.state_dict()


def test_a_driver_that_is_killed_anywhere_is_continued_to_the_same_bytes(source, tmp_path, whole):
    for number, kill_at in enumerate((18, 47, 60)):
        output = tmp_path / str(number)
        run = forked("die", source, output, kill_at=kill_at)
        assert run.wait() == -signal.SIGKILL, run.complaint + run.said
        assert "manifest.json" not in contents(output)
        built(build_of(source, output))
        assert contents(output) == whole, kill_at


@pytest.fixture(scope="module")
def steps(source):
    """How many steps a build of two windows takes, and the files it ends in."""
    memory, step = Memory(), Failing(())
    built(in_store(source, memory, step))
    assert step.steps > 50
    return step.steps, memory.files


def in_store(source, memory, step):
    build = build_of(source, "memory://unused", window_rows=30)
    return replace(build, job=replace(build.job, storage=Watched(memory, step)))


def test_a_store_may_fail_at_every_step_in_turn(source, steps):
    number, files = steps
    for at in range(number):
        memory = Memory()
        with pytest.raises(Failed):
            built(in_store(source, memory, Failing({at})))
        built(in_store(source, memory, Failing(())))
        assert memory.files == files, at


@settings(max_examples=5)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_store_may_fail_again_and_again(source, steps, failures):
    memory = Memory()
    for at in failures:
        try:
            built(in_store(source, memory, Failing({at})))
        except Failed:
            continue
    built(in_store(source, memory, Failing(())))
    assert memory.files == steps[1]


def test_fsspec_holds_them_too_and_pack_returns_nothing_that_lies_elsewhere(source, whole):
    url = f"memory://rows-{os.getpid()}"
    build = build_of(source, url)
    built(build)
    memory = fsspec.filesystem("memory")
    root = url.removeprefix("memory://")
    found = {path.removeprefix(f"/{root}/"): memory.cat_file(path) for path in memory.find(root)}
    assert found == whole


def test_drivers_of_one_job_at_once_do_no_harm(source, tmp_path, whole):
    builds = [build_of(source, tmp_path / "out") for _ in range(3)]
    with ThreadPoolExecutor(3) as executor:
        list(executor.map(built, builds))
    assert contents(tmp_path / "out") == whole


def test_a_window_whose_file_was_taken_away_by_who_finished_is_done(source, tmp_path, whole):
    other = build_of(source, tmp_path / "out")

    def step(what):
        if what.startswith("before put data-000002-00001-"):
            built(other)

    built(watched(build_of(source, tmp_path / "out"), step))
    assert contents(tmp_path / "out") == whole


def test_strays_are_removed_and_what_is_not_ours_stays(source, tmp_path, whole):
    output = tmp_path / "out"
    built(build_of(source, output))
    (output / "manifest.json").unlink()
    strays = ("data-000009-00000.arrow", "data-000000-00000.arrow.ab.partial")
    for name in (*strays, "_commits/000009.json", "_commits/000000.json.cd.partial", "NOTES"):
        (output / name).write_text(json.dumps({"job": "another"}))
    built(build_of(source, output))
    found = contents(output)
    assert found.pop("NOTES")
    assert found == whole


def file_of(folder, window):
    """Return the first file of a window."""
    return next(iter(sorted(folder.glob(f"data-{window:06}-*.arrow"))))


def test_a_commit_whose_file_is_gone_is_built_again(source, tmp_path, whole):
    output = tmp_path / "out"
    built(build_of(source, output))
    (output / "manifest.json").unlink()
    file_of(output, 1).write_bytes(b"cut")
    file_of(output, 3).unlink()
    known = build_of(source, output).committed()
    assert sorted(known) == [0, 2]
    built(build_of(source, output))
    assert contents(output) == whole


def test_a_commit_that_another_driver_has_just_built_again_stays(source, tmp_path):
    build = build_of(source, tmp_path / "out")
    built(build)
    file = file_of(tmp_path / "out", 1)
    content = file.read_bytes()
    file.unlink()

    def step(what):
        if what == "after listed ":
            file.write_bytes(content)

    assert sorted(watched(build, step).committed()) == [0, 1, 2, 3]
    assert len(os.listdir(tmp_path / "out" / "_commits")) == NUM_WINDOWS


def test_an_attempt_that_saw_other_bytes_changes_nothing_of_the_one_that_counts(
    source, tmp_path, whole
):
    for path in source.iterdir():
        rows = pq.read_table(path)
        same = pa.chunked_array(
            [pa.array([rows["image"][0].as_py()] * len(rows), rows["image"].type)]
        )
        column = rows.column_names.index("image")
        rows = rows.set_column(column, rows.schema.field("image"), same)
        (tmp_path / "train").mkdir(exist_ok=True)
        pq.write_table(rows, tmp_path / "train" / path.name, row_group_size=5)
    one, other = (
        build_of(source, tmp_path / "out"),
        build_of(tmp_path / "train", tmp_path / "other"),
    )
    counted = []

    def step(what):
        if what.startswith("before put data-000000-00000"):
            counted.append(window_job.build_window(one.job, one._window(0)))

    assert not one.claim()
    late = watched(one, step).job
    assert window_job.build_window(late, other._window(0)) == counted[0]
    assert len(counted) == 1
    built(one)
    assert contents(tmp_path / "out") == whole


def test_an_output_that_the_workers_do_not_share_is_named(source, tmp_path, whole):
    class Elsewhere(Executor):
        def submit(self, function, job, window):
            future = Future()
            own = replace(job, storage=LocalFolder(f"{job.storage.url}-elsewhere"))
            future.set_result(function(own, window))
            return future

    build = build_of(source, tmp_path / "out")
    expected = (
        rf"files missing in {tmp_path}/out is '8 of 8, the first is data-000000-00000-.*', "
        r"expected none; let all machines write to one output"
    )
    with pytest.raises(ValueError, match=expected):
        built(build, Elsewhere())
    assert sorted(contents(tmp_path / "out")) == ["job.json"]
    built(build)
    assert contents(tmp_path / "out") == whole


def test_a_folder_that_another_job_took_over_is_never_completed(source):
    memory = Memory()
    one, other = in_store(source, memory, Failing(())), build_of(source, "memory://unused", seed=1)
    assert not one.claim()
    known = one.run(None, progress=False)
    # What a store that ignores the condition does.
    memory.files["job.json"] = json_text(other.record).encode()
    with pytest.raises(FileExistsError, match="expected rows made with the same seed, windows"):
        one.finish(known)
    assert "manifest.json" not in memory.files


def test_a_commit_that_was_cut_is_built_again(source, tmp_path, whole):
    built(build_of(source, tmp_path / "out"))
    (tmp_path / "out" / "manifest.json").unlink()
    commit = tmp_path / "out" / "_commits" / "000001.json"
    commit.write_bytes(commit.read_bytes()[:50])
    build = build_of(source, tmp_path / "out")
    late = build._window(1)
    assert window_job.build_window(build.job, late)["window"] == 1
    assert contents(tmp_path / "out") == {k: v for k, v in whole.items() if k != "manifest.json"}
    commit.write_text("[]")
    built(build)
    assert contents(tmp_path / "out") == whole


def test_a_part_reads_its_own_commits_alone(source, tmp_path):
    output = tmp_path / "out"
    built(build_of(source, output))
    (output / "manifest.json").unlink()
    read = []
    build = watched(build_of(source, output), read.append)
    assert sorted(build.run(None, part=(2, 2), progress=False)) == [1, 3]
    asked = [what for what in read if what.startswith("before get _commits")]
    assert asked == ["before get _commits/000001.json", "before get _commits/000003.json"]


def test_a_complete_folder_that_is_opened_again_is_tidied_mended_and_judged(
    source, tmp_path, whole
):
    output = tmp_path / "out"
    built(build_of(source, output))
    (output / "data-000000-00000-late.arrow").write_bytes(b"late")
    assert build_of(source, output).claim()
    assert contents(output) == whole
    build = build_of(source, output)
    few = replace(build, job=replace(build.job, tolerance=Tolerance(NUM_ROWS, 0.1, 100)))
    with pytest.raises(TooManyRejects, match="rejected is 7 of 60 examples"):
        few.claim()
    file_of(output, 1).unlink()
    assert not built(build_of(source, output))
    assert contents(output) == whole
    (output / "manifest.json").write_text("{")
    assert not built(build_of(source, output))
    assert contents(output) == whole


def test_a_folder_of_folders_and_a_file_are_no_place_for_rows(source, tmp_path):
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"mine', expected an absent or empty folder"):
        build_of(source, tmp_path / "mine").claim()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output is '.*file', expected a folder, or none"):
        build_of(source, tmp_path / "file")
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/others-{os.getpid()}/photos/a.jpg", b"mine")
    with pytest.raises(FileExistsError, match="expected an absent or empty folder"):
        build_of(source, f"memory://others-{os.getpid()}").claim()


def test_a_full_disk_is_named_and_committed_windows_stay(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    build = build_of(source, tmp_path / "out")
    assert not build.claim()
    monkeypatch.setattr(window_job.files, "write_stream", full)
    expected = rf"free space of {tmp_path}/out is .* free some and call again: windows that are com"
    with pytest.raises(OSError, match=expected) as error:
        build.run(None, progress=False)
    assert error.value.errno == errno.ENOSPC


def test_a_number_of_numpy_is_a_size_of_windows(source, tmp_path):
    asked = build_of(source, tmp_path, window_rows=np.int64(15))
    assert asked.job.digest == build_of(source, tmp_path).job.digest


def test_options_of_a_store_go_to_one_of_the_same_scheme_or_are_named(source):
    for path in source.iterdir():
        fsspec.filesystem("memory").pipe_file(
            f"/train-{os.getpid()}/{path.name}", path.read_bytes()
        )
    files = ImageFiles(f"memory://train-{os.getpid()}", {"use_listings_cache": False})
    for output, asked, options in (
        ("memory://rows", None, files.storage_options),
        ("memory://rows", {}, {}),
        ("ftp://host/rows", None, {}),
        ("ftp://host/rows", {"timeout": 3}, {"timeout": 3}),
    ):
        build = files_build(files, 6, {}, TOLERANCE, output=output, output_options=asked)
        assert build.job.storage.options == options
    with pytest.raises(
        ValueError, match=r"output_options is \{'key': 3\}, expected None for a Data"
    ):
        packpipe.pack(crashing.source(9), 6, output_options={"key": 3})


def test_a_folder_without_a_commit_may_be_removed(source, tmp_path):
    assert not build_of(source, tmp_path / "out", seed=1).claim()
    expected = "same seed; no window is committed there: choose another output, or remove it"
    with pytest.raises(FileExistsError, match=expected):
        build_of(source, tmp_path / "out").claim()


@pytest.mark.parametrize(
    ("asked", "differing"),
    [({"seed": 1}, "seed"), ({"window_rows": 20}, "windows"), ({"label_column": None}, "label_c")],
)
def test_another_job_is_refused_by_name(source, folder, asked, differing):
    expected = rf"output is '{folder}', expected rows made with the same {differing}"
    with pytest.raises(FileExistsError, match=expected):
        build_of(source, folder, **asked).claim()


def test_a_folder_of_something_else_is_refused(source, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected an absent or empty folder"):
        build_of(source, tmp_path).claim()
    (tmp_path / "job.json").write_text("[1]")
    with pytest.raises(FileExistsError, match="expected rows made with the same schema_version"):
        build_of(source, tmp_path).claim()
    assert sorted(contents(tmp_path)) == ["job.json", "mine.txt"]


def test_too_many_rejects_stop_the_build_wherever_they_are_found(source, tmp_path):
    build = build_of(source, tmp_path / "out")
    few = replace(build, job=replace(build.job, tolerance=Tolerance(NUM_ROWS, 0.1, 100)))
    with pytest.raises(TooManyRejects, match=r"rejected is 7 of 60 examples \(11\.67%\)"):
        built(few)
    none = replace(build, job=replace(build.job, tolerance=Tolerance(NUM_ROWS, 0.0, 1)))
    with pytest.raises(TooManyRejects, match="is bad") as error:
        built(none)
    # Pools of processes send an error by pickling it.
    again = pickle.loads(pickle.dumps(error.value))  # noqa: S301
    assert (str(again), again.rejects) == (str(error.value), error.value.rejects)


def test_a_machine_with_other_versions_is_named(source, tmp_path, monkeypatch):
    build = build_of(source, tmp_path / "out")
    monkeypatch.setattr(window_job, "record_of_images", lambda _: {"packpipe": "0.0.9"})
    expected = (
        r"packpipe here is '0\.0\.9', expected '.*', as where the job began; install the same"
    )
    with pytest.raises(ValueError, match=expected):
        built(build)


def test_pack_takes_files_and_opens_what_is_complete(source, tmp_path, caplog):
    files = ImageFiles(f"{source}/*.parquet")
    options = {"patch_size": 4, "num_workers": 0, "progress": False, "max_bad_fraction": 1.0}
    with caplog.at_level(logging.WARNING):
        packed = packpipe.pack(files, 6, output=tmp_path / "out", window_rows=20, **options)
    assert "7 of 60 examples rejected" in caplog.text
    with ThreadPoolExecutor(2) as executor:
        again = packpipe.pack(
            files, 6, output=tmp_path / "out", window_rows=20, executor=executor, **options
        )
    assert again["example_index"][:] == packed["example_index"][:]
    strict = {**options, "max_bad_fraction": 0.1}
    with pytest.raises(TooManyRejects, match="rejected is 7 of 60 examples"):
        packpipe.pack(files, 6, output=tmp_path / "out", window_rows=20, **strict)
    assert packpipe.manifest(packed)["windows"] == {"rows": 20, "blocks": [[5, 12]]}
    assert packpipe.verify(tmp_path / "out") == []
    assert packed.features["labels"].feature.names == ["cat", "dog", "owl"]


def test_options_that_draw_sizes_in_columns_and_weights_go_by_windows_too(tmp_path):
    dataset = crashing.source(NUM_ROWS)
    sides = [(4, 4), (4, 8), (8, 4), (8, 8), (4, 12)]
    dataset = dataset.add_column("h", [sides[i % 5][0] for i in range(NUM_ROWS)])
    dataset = dataset.add_column("w", [sides[i % 5][1] for i in range(NUM_ROWS)])
    dataset = dataset.add_column("weight", [1.0 + i for i in range(NUM_ROWS)])
    rows = dataset.data.table.cast(dataset.features.arrow_schema)
    pq.write_table(rows, tmp_path / "one.parquet", row_group_size=7)
    packpipe.pack(
        ImageFiles(tmp_path / "one.parquet"),
        6,
        output=tmp_path / "out",
        window_rows=20,
        size_columns=("h", "w"),
        weight_column="weight",
        views=2,
        drop_rate=0.3,
        patch_size=4,
        num_workers=0,
        progress=False,
        max_bad_fraction=1.0,
    )
    assert packpipe.verify(tmp_path / "out", dataset) == []


def test_a_window_of_rejects_alone_and_a_source_without_rows_have_their_columns(tmp_path):
    dataset = crashing.source(NUM_ROWS)
    rows = dataset.data.table.cast(dataset.features.arrow_schema)
    options = {"patch_size": 4, "num_workers": 0, "progress": False, "max_bad_fraction": 1.0}
    for name, some, counts in (
        ("bad", rows.slice(4, 1), (1, 1)),
        ("none", rows.slice(0, 0), (0, 0)),
    ):
        pq.write_table(some, tmp_path / f"{name}.parquet")
        files = ImageFiles(tmp_path / f"{name}.parquet")
        packed = packpipe.pack(files, 6, output=tmp_path / name, **options)
        found = packpipe.manifest(packed)["counts"]
        assert (found["read"], found["rejected"]) == counts
        assert packpipe.verify(tmp_path / name) == []


def test_what_files_cannot_do_is_refused_at_the_front_door(source, tmp_path):
    files = ImageFiles(f"{source}/*.parquet")
    with pytest.raises(ValueError, match="materialize is False, expected True for ImageFiles"):
        packpipe.pack(files, 6, output=tmp_path / "out", materialize=False)
    over = packpipe.OverTraining(0.2, 0.8, 0.5, 0.1)
    with pytest.raises(
        ValueError, match=r"drop_rate is OverTraining.*, expected one that does not"
    ):
        packpipe.pack(files, 6, output=tmp_path / "out", drop_rate=over, epochs=2)
    with pytest.raises(TypeError, match=r"executor is 4, expected a concurrent\.futures\.Executor"):
        packpipe.pack(files, 6, output=tmp_path / "out", executor=4)
    with pytest.raises(ValueError, match="window_rows is 8, expected None for a Dataset"):
        packpipe.pack(crashing.source(9), 6, window_rows=8)
    with pytest.raises(ValueError, match=r"window_rows is 0, expected an integer in 1\.\."):
        files_build(files, 6, {}, TOLERANCE, output=tmp_path / "out", window_rows=0)
    tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}).data.table
    pq.write_table(tokens, tmp_path / "tokens.parquet")
    with pytest.raises(ValueError, match=r"columns is .*, expected a column of images"):
        packpipe.pack(ImageFiles(tmp_path / "tokens.parquet"), 6, output=tmp_path / "out")
    words = crashing.source(3).data.table.append_column("weight", pa.array(["a", "b", "c"]))
    pq.write_table(words, tmp_path / "words.parquet")
    expected = r"features\['weight'\] is .*; cast_column it .*\(columns of ImageFiles are changed "
    with pytest.raises(ValueError, match=expected):
        packpipe.pack(ImageFiles(tmp_path / "words.parquet"), 6, weight_column="weight")
    for kind in (pa.list_, pa.large_list):
        labels = pa.array([[1.0, 2.0]] * 3, kind(pa.float64()))
        lists = crashing.source(3).data.table.drop_columns(["label"]).append_column("label", labels)
        pq.write_table(lists, tmp_path / "lists.parquet")
        expected = r"features\['label'\] is .*, expected one value an image"
        with pytest.raises(ValueError, match=expected):
            packpipe.pack(ImageFiles(tmp_path / "lists.parquet"), 6, output=tmp_path / "out")
    assert not Path(tmp_path / "out").exists()


def test_an_executor_is_given_a_few_windows_at_once_and_the_rest_is_cancelled(
    source, tmp_path, whole, monkeypatch
):
    monkeypatch.setattr(files_build_module, "_WAITING", 2)
    given = []

    class Few(ThreadPoolExecutor):
        def submit(self, function, job, window):
            given.append(super().submit(function, job, window))
            assert sum(not future.done() for future in given) <= 2
            return given[-1]

    with Few(1) as executor:
        built(build_of(source, tmp_path / "out"), executor)
    assert len(given) == NUM_WINDOWS
    assert contents(tmp_path / "out") == whole

    class Broken(ThreadPoolExecutor):
        def submit(self, function, job, window):  # noqa: ARG002
            given.append(Future())
            if window.number == 0:
                given[-1].set_exception(Failed("lost"))
            return given[-1]

    given.clear()
    with Broken(1) as executor, pytest.raises(Failed, match="lost"):
        built(build_of(source, tmp_path / "other"), executor)
    assert [future.cancelled() for future in given] == [False, True, True]


def test_a_dask_client_gives_its_executor():
    class Client:
        def get_executor(self, **options):
            assert options == {"pure": False}
            return ThreadPoolExecutor(1)

    assert isinstance(checked_executor(Client()), ThreadPoolExecutor)
    assert checked_executor(None) is None
