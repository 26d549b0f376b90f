"""Files that a kill leaves whole, or not there at all."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packpipe.durable import (
    append_line,
    first_alone,
    lines_of,
    made_once,
    remove_abandoned,
    write_shared,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from packpipe.durable import write_shared

def write(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

write_shared(Path(sys.argv[1]), write)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path):
    path = tmp_path / "a[b].npz"  # no pattern, though it looks like one
    path.write_bytes(b"before")
    run = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"before"
    (left,) = set(names(tmp_path)) - {path.name}
    assert left.endswith(".partial")
    (tmp_path / "a[b].npz.mine.partial").write_bytes(b"")
    write_shared(path, lambda file: file.write(b"after") and None)
    assert path.read_bytes() == b"after"
    assert names(tmp_path) == [path.name, "a[b].npz.mine.partial"]


def test_several_may_write_a_file_at_once_and_none_removes_what_another_writes(tmp_path):
    path, together, written = tmp_path / "plan", Barrier(3), set()

    def save(content: bytes) -> None:
        def write(file) -> None:
            file.write(content)
            if content in written:  # its first file was removed before it was locked
                return
            written.add(content)
            together.wait(300)
            remove_abandoned(tmp_path, "plan.*.partial")
            together.wait(300)

        write_shared(path, write)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(save, [b"a" * 9, b"b" * 9, b"c" * 9]))
    assert path.read_bytes() in (b"a" * 9, b"b" * 9, b"c" * 9)
    assert names(tmp_path) == ["plan"]


def test_what_another_machine_took_for_abandoned_is_written_again(tmp_path):
    times = []

    def write(file) -> None:
        file.write(b"whole")
        if not times:
            os.unlink(file.name)
        times.append(file.name)

    write_shared(tmp_path / "plan", write)
    assert len(times) == 2
    assert (tmp_path / "plan").read_bytes() == b"whole"
    assert names(tmp_path) == ["plan"]


def test_a_file_whose_folder_is_gone_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_shared(tmp_path / "none" / "plan", lambda _: None)


@settings(max_examples=15)  # each line waits for the disk
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=9)), max_size=5),
    st.data(),
)
def test_lines_are_read_as_far_as_they_were_written(tmp_path_factory, values, data):
    path = tmp_path_factory.mktemp("lines") / "journal.jsonl"
    assert lines_of(path) == []
    for value in values:
        append_line(path, value)
    assert lines_of(path) == values
    whole = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    assert lines_of(path) == values[: whole[:cut].count(b"\n")]
    path.write_bytes(whole[:cut] + b"\0" * 5 + b"\n")  # what a power failure may leave
    assert lines_of(path) == values[: whole[:cut].count(b"\n")]


FIRST = """
import sys
from pathlib import Path
from packpipe.durable import first_alone
with first_alone(Path(sys.argv[1])) as is_first:
    print(is_first, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["leaves", "killed"])
def test_others_go_on_when_the_first_has_left_or_is_killed(tmp_path, end, monkeypatch):
    path = tmp_path / "new" / "alone.lock"
    flock, asked = fcntl.flock, Barrier(4)
    left = Event()

    def noted(file, how):
        if how == fcntl.LOCK_SH:
            asked.wait(300)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", noted)

    def go_through(_):
        with first_alone(path) as is_first:
            return is_first, left.is_set()

    command = [sys.executable, "-c", FIRST, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first, ThreadPoolExecutor(3) as threads:
        assert first.stdout.readline() == "True\n"
        found = threads.map(go_through, range(3))
        asked.wait(300)  # all three have found that they are not the first
        left.set()
        if end == "killed":
            first.kill()
        first.communicate()
        assert list(found) == [(False, True)] * 3
    assert path.exists() == (end == "killed")
    assert go_through(None) == (True, True), "alone once more"
    assert not path.exists()


def test_who_has_a_file_that_the_first_has_removed_is_not_first_too(tmp_path, monkeypatch):
    path, flock, found = tmp_path / "lock", fcntl.flock, []

    def meanwhile(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        with first_alone(path) as is_first:  # between the opening of the file and its lock
            found.append(is_first)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    with first_alone(path) as late, first_alone(path) as third:
        assert [*found, late, third] == [True, False, True]
    assert not path.exists()


def test_a_process_that_is_forked_meanwhile_keeps_nobody_waiting(tmp_path):
    with first_alone(tmp_path / "lock"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600])
        child.start()
        again = (tmp_path / "lock").open("ab")
    try:
        with again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        child.kill()
        child.join()


def test_where_nothing_can_be_locked_each_is_the_first(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with first_alone(tmp_path / "lock") as one, first_alone(tmp_path / "lock") as other:
        assert (one, other) == (True, True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with first_alone(tmp_path / "file" / "lock") as is_first:  # no folder can be there
        assert is_first


def test_of_several_that_want_a_file_one_makes_it_and_all_read_it(tmp_path):
    path, made = tmp_path / "value.txt", []

    def make(file):
        made.append(1)
        file.write(b"17")

    def read():
        return path.read_bytes() if path.is_file() else None

    with ThreadPoolExecutor(6) as executor:
        found = list(executor.map(lambda _: made_once(path, read, make), range(6)))
    assert found == [b"17"] * 6
    assert made == [1]
    assert names(tmp_path) == ["value.txt"]


def test_if_the_one_that_makes_a_file_fails_one_of_the_others_makes_it(tmp_path):
    path, made, asked = tmp_path / "value.txt", [], Barrier(6)

    def make(file):
        made.append(1)
        time.sleep(0.2)  # for the others to come; if they come later, less is tested
        if len(made) == 1:
            raise OSError("the source is away")
        file.write(b"17")

    def read():
        return path.read_bytes() if path.is_file() else None

    def one(_):
        asked.wait()
        try:
            return made_once(path, read, make)
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(6) as executor:
        found = list(executor.map(one, range(6)))
    assert sorted(map(str, found)) == [str(b"17")] * 5 + ["the source is away"]
    assert made == [1, 1]
    assert names(tmp_path) == ["value.txt"]


def test_a_file_that_is_gone_as_soon_as_it_is_made_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"value is missing or damaged as soon as it was"):
        made_once(tmp_path / "value", lambda: None, lambda file: file.write(b"17"))
