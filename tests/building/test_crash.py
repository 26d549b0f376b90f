"""Law 7: a build killed at any instant and started again ends in the bytes of one never killed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from typing import NamedTuple

import crashing
import datasets
import numpy as np
import pytest
from crashing import Run, assert_committed_files_are_whole, build, committed, contents, stamps
from processes import of_session, wait_until

MOMENTS = 15
# So that each of the four comes at moments all over the build.
WAYS = [(0, False), (2, False), (0, True), (2, True)]


class Undisturbed(NamedTuple):
    contents: dict[str, bytes]
    steps: int
    seconds: float


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "source"
    crashing.source(30).save_to_disk(folder)
    return folder


@pytest.fixture
def saved(original, tmp_path):
    """A copy of a source whose sizes nobody has kept yet."""
    return shutil.copytree(original, tmp_path / "source")


@pytest.fixture(scope="module")
def undisturbed(original, tmp_path_factory):
    """A build in another process that nobody kills."""
    folders = tmp_path_factory.mktemp("undisturbed")
    folder = folders / "out"
    run = Run(shutil.copytree(original, folders / "source"), folder, num_workers=2)
    run.wait_until_ready()
    started = time.perf_counter()
    status, (steps,) = run.result()
    seconds = time.perf_counter() - started
    assert status == 0
    assert len(committed(folder)) == 4
    return Undisturbed(contents(folder), int(steps), seconds)


def assert_continues(saved, folder, undisturbed):
    """What a killed build has left is whole, is kept, and is made what it was to be."""
    assert_committed_files_are_whole(folder)
    before = stamps(folder)
    build(datasets.load_from_disk(saved), folder)
    assert contents(folder) == undisturbed.contents
    assert before.items() <= stamps(folder).items()
    assert len(list(saved.glob("packpipe-sizes-*"))) == 1, "a probe that was killed left something"


def assert_no_process_is_left(run):
    wait_until(lambda: of_session(run.process.pid) == [])


@pytest.mark.parametrize(
    ("moment", "num_workers", "group"),
    [(moment, *WAYS[moment % len(WAYS)]) for moment in range(MOMENTS)],
)
def test_a_build_that_is_killed_at_a_step_continues_to_the_same_bytes(
    saved, undisturbed, tmp_path, moment, num_workers, group
):
    folder, at = tmp_path / "out", undisturbed.steps * moment // MOMENTS
    signal_at = (at, signal.SIGKILL)
    run = Run(saved, folder, num_workers=num_workers, signal_at=signal_at, group=group)
    assert run.result()[0] == -signal.SIGKILL
    assert_no_process_is_left(run)
    assert (folder / ".lock").exists() == (at > 5), "it had no time to tidy up"
    assert_continues(saved, folder, undisturbed)


@pytest.mark.parametrize("seed", range(4))
def test_a_build_that_is_killed_some_time_continues_to_the_same_bytes(
    saved, undisturbed, tmp_path, seed
):
    draw = np.random.default_rng(seed)
    run = Run(saved, tmp_path / "out", num_workers=2)
    run.wait_until_ready()
    time.sleep(draw.uniform(0, undisturbed.seconds))
    run.kill(group=draw.random() < 0.5)
    run.result()
    assert_no_process_is_left(run)
    assert_continues(saved, tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_a_build_that_is_killed_again_and_again_continues_to_the_same_bytes(
    saved, undisturbed, tmp_path
):
    folder, lens, ways = tmp_path / "out", [], itertools.cycle(WAYS)

    def kill_at(share):
        num_workers, group = next(ways)
        signal_at = (int(undisturbed.steps * share), signal.SIGKILL)
        run = Run(saved, folder, num_workers=num_workers, signal_at=signal_at, group=group)
        assert run.result()[0] == -signal.SIGKILL
        assert_no_process_is_left(run)
        assert_committed_files_are_whole(folder)
        lens.append(len(committed(folder)))

    kill_at(0.1)
    kill_at(0.3)
    # Threads take their steps in no fixed order, so a file may be committed a little later.
    while lens[-1] == 0:
        assert len(lens) < 9
        kill_at(0.5)
    kill_at(0.2)
    assert lens == sorted(lens)
    assert lens[-1] < 4
    assert_continues(saved, folder, undisturbed)


DISK = 'mount -t tmpfs -o size=200k tmpfs "$0" && exec "$@"'


@pytest.fixture
def small_disk(tmp_path):
    """A command before others that gives them a small disk at tmp_path / "disk"."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["unshare", "-rm", "sh", "-c", DISK, str(folder)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    return command


def filled_up(saved, disk, command=()):
    arguments = {"source": str(saved), "disk": str(disk), "by_another": bool(command)}
    process = crashing.started(arguments, command)
    said, complaint = crashing.said_by(process)
    assert process.returncode == 0, complaint
    return json.loads(said)


def assert_filled_up_and_continued(found, folder, number, undisturbed):
    start = f"[Errno {number}] free space of {folder} is "
    end = (
        f"expected room for the next file ({os.strerror(number)}); free some and call again: "
        "2 files are committed and stay"
    )
    assert found["filled"].startswith(start)
    assert found["filled"].endswith(end)
    assert found["stays"] == ["data-00000.arrow", "data-00001.arrow"]
    assert found["again"].startswith(f"[Errno {number}] ")
    assert found["with room"] == ""
    assert found["kept"]
    contents = {name: bytes.fromhex(content) for name, content in found["contents"].items()}
    assert contents == undisturbed.contents


def test_a_build_on_a_disk_that_fills_continues_when_there_is_room(
    saved, undisturbed, tmp_path, small_disk
):
    found = filled_up(saved, tmp_path / "disk", small_disk)
    assert_filled_up_and_continued(found, tmp_path / "disk/out", errno.ENOSPC, undisturbed)


def test_a_build_whose_files_may_not_grow_continues_when_they_may(saved, undisturbed, tmp_path):
    found = filled_up(saved, tmp_path)
    assert_filled_up_and_continued(found, tmp_path / "out", errno.EFBIG, undisturbed)
