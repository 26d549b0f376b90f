"""Copies of packed folders: each file comes once, whole; those in use stay, old ones make room."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from windowed import Failed, Memory, Watched

from packpipe.building import copies
from packpipe.building.copies import Cache, bring, is_whole
from packpipe.storage import reading


def folder_of(number, sizes=(10, 20, 30)):
    """A store with files of some sizes, and what its manifest says of them."""
    files = {f"data-{at}.arrow": bytes([number, at]) * (size // 2) for at, size in enumerate(sizes)}
    records = {
        name: {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
        for name, content in files.items()
    }
    return Memory(files=files), records, json.dumps([number, records]).encode()


def copied(cache, number, *, hold=True):
    """Copy a folder of 60 bytes, if there is room; return where it is, or None."""
    memory, records, manifest = folder_of(number)
    path = cache.claim(manifest)
    if not cache.has_room(path, 60):
        return None
    bring(memory, records, path)
    assert {name: (path / name).read_bytes() for name in records} == memory.files
    if not hold:
        let_go(path)
    # The times of files tell what was opened first.
    os.utime(path / ".used", (time.time(), number))
    return path


def let_go(path):
    """Let go of a copy, as a process does that ends."""
    os.close(copies._HELD.pop(path / ".used"))


def test_the_copy_that_was_opened_longest_ago_makes_room(tmp_path):
    cache = Cache(tmp_path, 150)
    one, two = (copied(cache, number, hold=False) for number in (1, 2))
    os.utime(one / ".used", (9, 9))  # opened again since
    three = copied(cache, 3)
    assert not two.exists()
    assert is_whole(folder_of(1)[1], one)
    assert is_whole(folder_of(3)[1], three)


def test_a_copy_that_is_held_is_never_removed_and_what_finds_no_room_is_not_copied(tmp_path):
    cache = Cache(tmp_path, 119)
    one = copied(cache, 1)
    assert copied(cache, 2) is None
    assert is_whole(folder_of(1)[1], one)
    let_go(cache.claim(folder_of(2)[2]))
    # Nothing is removed for what could not fit in any case.
    let_go(one)
    large = cache.claim(b"large")
    assert not cache.has_room(large, 120)
    assert one.exists()
    let_go(large)
    assert copied(cache, 3) is not None
    assert not one.exists()


def test_nothing_is_removed_for_what_finds_no_room_all_the_same(tmp_path):
    cache = Cache(tmp_path, 130)
    one, two = copied(cache, 1), copied(cache, 2, hold=False)
    assert not cache.has_room(cache.claim(b"third"), 100)  # with 60 bytes that are held
    assert is_whole(folder_of(2)[1], two)
    assert one.exists()


def test_all_that_lies_in_a_copy_counts(tmp_path):
    cache = Cache(tmp_path, 200)
    one = copied(cache, 1)
    for name in ("segments-data-0.arrow", "images/data-0.arrow"):
        (one / name).parent.mkdir(exist_ok=True)
        (one / name).write_bytes(b"0" * 50)
    assert copied(cache, 2) is None
    assert copied(Cache(tmp_path, 400), 2) is not None


def hold(cache, manifest, is_held):
    cache.claim(manifest)
    is_held.set()
    time.sleep(600)


def test_what_several_processes_hold_stays_until_the_last_of_them_was_killed(tmp_path):
    cache, context = Cache(tmp_path, 100), multiprocessing.get_context("fork")
    one = copied(cache, 1, hold=False)
    holders = []
    for _ in range(2):
        is_held = context.Event()
        child = context.Process(target=hold, args=[cache, folder_of(1)[2], is_held])
        child.start()
        holders.append(child)
        assert is_held.wait(100)
    for child in holders:
        assert copied(cache, 2) is None
        assert is_whole(folder_of(1)[1], one)
        child.kill()
        child.join()
    assert copied(cache, 2) is not None
    assert not one.exists()


def test_without_locks_a_folder_is_held_and_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    cache = Cache(tmp_path, 100)
    one = copied(cache, 1, hold=False)
    assert copied(cache, 2) is None
    assert is_whole(folder_of(1)[1], one)


@settings(max_examples=10)
@given(
    limit=st.integers(0, 400),
    opened=st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=8),
)
def test_copies_never_take_more_than_the_limit(tmp_path_factory, limit, opened):
    cache = Cache(tmp_path_factory.mktemp("cache"), limit)
    held = set()
    for number, holds in opened:
        path = copied(cache, number, hold=holds or number in held)
        if path is not None and holds:
            held.add(number)
        taken = sum(os.path.getsize(found) for found in cache.folder.rglob("data-*"))
        assert taken <= limit
        for other in held:
            assert is_whole(folder_of(other)[1], cache.claim(folder_of(other)[2]))
        assert path is not None or 60 * (len(held) + 1) > limit
    for path in list(copies._HELD):
        if path.is_relative_to(cache.folder):
            let_go(path.parent)


def test_a_copy_that_comes_while_it_is_removed_is_made_anew(tmp_path, monkeypatch):
    cache, (memory, records, manifest) = Cache(tmp_path, 150), folder_of(1)
    old = copied(cache, 1, hold=False)
    real, removed = copies._lock, []

    def lock(descriptor, *, is_user):
        if is_user and not removed:
            with copies._alone(old) as free:  # between its opening and its lock
                removed.append(free)
                copies._remove(old)
        return real(descriptor, is_user=is_user)

    monkeypatch.setattr(copies, "_lock", lock)
    path = cache.claim(manifest)
    assert removed == [True]
    assert path == old
    assert not is_whole(records, path)
    bring(memory, records, path)
    assert is_whole(records, path)


def test_of_several_who_want_a_folder_one_brings_each_file_once(tmp_path):
    memory, records, manifest = folder_of(1)
    asked = []
    watched = Watched(memory, asked.append)

    def open_it(_):
        path = Cache(tmp_path, 100).claim(manifest)
        assert Cache(tmp_path, 100).has_room(path, 60)
        bring(watched, records, path)
        return is_whole(records, path)

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(open_it, range(4)))
    assert sorted(what for what in asked if what.startswith("before")) == [
        f"before get_range {name}" for name in sorted(records)
    ]


def test_a_process_that_is_stopped_leaves_whole_files_alone_and_the_next_one_goes_on(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(reading, "WAITS", ())
    monkeypatch.setattr(reading, "_PIECE", 4)
    memory, records, manifest = folder_of(1)
    path = Cache(tmp_path).claim(manifest)
    pieces = []

    def step(what):
        if what == "before get_range data-1.arrow":
            pieces.append(what)
            if len(pieces) == 3:
                raise Failed("stopped")

    with pytest.raises(ConnectionError, match=r"data-1.arrow is 'Failed: stopped', expected an"):
        bring(Watched(memory, step), records, path)
    assert {found.name for found in path.glob("data-*")} <= {"data-0.arrow", "data-2.arrow"}
    # What a kill leaves under a temporary name, whatever it holds.
    (path / "data-1.arrow.partial").write_bytes(memory.files["data-1.arrow"])
    missing = records.keys() - {found.name for found in path.glob("data-*.arrow")}
    assert "data-1.arrow" in missing
    asked = []
    bring(Watched(memory, asked.append), records, path)
    assert {what.split()[-1] for what in asked} == missing
    assert is_whole(records, path)
    assert not list(path.glob("*.partial"))


def test_without_a_limit_half_of_the_disk_is_for_copies(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    assert copied(cache, 1) is not None
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda _: SimpleNamespace(free=140))
    assert cache.limit == (60 + 140) // 2
    path = cache.claim(b"another")
    (path / "segments").write_bytes(b"0" * 8)
    assert cache.limit == (60 + 8 + 140) // 2
    assert not cache.has_room(path, 45)
    assert cache.has_room(path, 44)


def test_what_a_check_that_was_killed_has_left_makes_room_and_that_of_one_that_runs_stays(tmp_path):
    cache = Cache(tmp_path, 100)
    with cache.for_check() as path:
        (path / "data-0.arrow").write_bytes(b"0" * 60)
        shutil.copytree(path, left := tmp_path / "check-left")
        assert copied(cache, 1) is None  # 60 bytes of each of the two, and only one may go
        assert path.exists()
    assert not path.exists()
    assert copied(cache, 1) is not None
    assert not left.exists()
