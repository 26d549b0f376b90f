"""Checkpoints: no damage is silent, the newest whole one counts; killed, or on a full disk."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from dataclasses import replace

import learning
import numpy as np
import pytest
import torch
from processes import files_of_at_most
from safetensors import SafetensorError

from packpipe.model.navit import NaViT
from packpipe.training import checkpoints as module
from packpipe.training.checkpoints import (
    checkpoints,
    load_checkpoint,
    model_of,
    save_checkpoint,
)
from packpipe.training.loop import read_log, train
from packpipe.training.optimizer import optimizer_of

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
FLIPS = 400 if NIGHTLY else 25
STRIDE = 1 if NIGHTLY else 3  # of all moments of a save, every so many
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "checksums.xxh128")
OLDER, NEWEST = "step-00000010", "step-00000012"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints of steps 10 and 12, and a log of 12 records."""
    folder = tmp_path_factory.mktemp("trained")
    list(train(learning.model_of(), learning.loader_of(), learning.config_of(), folder=folder))
    assert [path.name for path in checkpoints(folder)] == [OLDER, NEWEST]
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "copy")


def new_parts():
    """What a checkpoint is loaded into, and saved from."""
    model = learning.model_of()
    return model, optimizer_of(model, learning.config_of()), learning.loader_of()


@pytest.fixture(scope="module")
def parts():
    return new_parts()


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    assert len(one) == len(other) > 0
    return all(torch.equal(value, other[name]) for name, value in one.items())


def weights_in(checkpoint, folder, parts):
    """The weights of a checkpoint, loaded when it is alone."""
    shutil.copytree(checkpoint, folder / checkpoint.name)
    load_checkpoint(folder, *parts)
    return weights_of(parts[0])


def damages_of(content, seed):
    """What accidents make of a file: cut to some lengths, one bit flipped at some places."""
    size, draw = len(content), np.random.default_rng(seed)
    lengths = {0, 1, 8, size // 2, size - 1}
    if NIGHTLY:
        lengths |= set(draw.integers(0, size, 400).tolist()) if size > 2000 else set(range(size))
    for length in sorted(lengths):
        yield content[:length]
    for bit in draw.choice(8 * size, min(FLIPS, 8 * size), replace=False).tolist():
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


@pytest.mark.parametrize("name", FILES)
def test_no_cut_and_no_flipped_bit_is_silent(name, folder, parts, tmp_path, caplog):
    (tmp_path / "older").mkdir()
    older = weights_in(folder / OLDER, tmp_path / "older", parts)
    path = folder / NEWEST / name
    content, tried = path.read_bytes(), 0
    for damaged in damages_of(content, seed=FILES.index(name)):
        assert damaged != content
        path.write_bytes(damaged)
        caplog.clear()
        assert load_checkpoint(folder, *parts) == 10
        assert same(weights_of(parts[0]), older)
        (said,) = caplog.messages
        assert f"{NEWEST} is damaged" in said
        assert said.endswith(f"; going on from {OLDER}")
        # Of the checksums a line that is damaged reads as one of a file that is.
        assert name in said
        tried += 1
    assert tried >= FLIPS + 5
    path.write_bytes(content)
    caplog.clear()
    assert load_checkpoint(folder, *parts) == 12
    assert caplog.messages == []
    assert not same(weights_of(parts[0]), older)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_unreadable_is_damage(name, folder, parts, caplog):
    path = folder / NEWEST / name
    path.unlink()
    assert load_checkpoint(folder, *parts) == 10
    assert re.fullmatch(f"{NEWEST} is damaged.*{re.escape(name)}.*from {OLDER}", caplog.messages[0])
    path.mkdir()
    assert load_checkpoint(folder, *parts) == 10
    shutil.rmtree(folder / NEWEST)
    (folder / NEWEST).mkdir()
    assert load_checkpoint(folder, *parts) == 10


def test_a_model_is_of_the_newest_whole_checkpoint(folder, parts, tmp_path, caplog):
    (tmp_path / "older").mkdir()
    older = weights_in(folder / OLDER, tmp_path / "older", parts)
    os.truncate(folder / NEWEST / "model.safetensors", 100)
    assert same(weights_of(model_of(folder)), older)
    assert "model.safetensors does not match checksums.xxh128" in caplog.text


def test_without_a_whole_checkpoint_nothing_is_loaded(folder, parts):
    os.truncate(folder / OLDER / "state.json", 5)
    (folder / NEWEST / "optimizer.safetensors").unlink()
    before = weights_of(parts[0])
    message = (
        rf"whole checkpoints in \S+copy is 0, expected 1 or more; {NEWEST} is damaged \(.*optimizer"
        rf".*\), {OLDER} is damaged \(state.json does not match checksums.xxh128\): restore one"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, *parts)
    with pytest.raises(ValueError, match=message):
        model_of(folder)
    assert same(weights_of(parts[0]), before)


def make_old(checkpoint):
    """Make a checkpoint what packpipe wrote before there were checksums."""
    (checkpoint / "checksums.xxh128").unlink(missing_ok=True)
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "version": 1}, indent=1) + "\n")


def test_a_checkpoint_without_checksums_is_loaded_and_said_to_be_unchecked(folder, parts, caplog):
    wanted = weights_of(model_of(folder))
    make_old(folder / NEWEST)
    assert load_checkpoint(folder, *parts) == 12
    assert same(weights_of(parts[0]), wanted)
    (said,) = caplog.messages
    assert said == f"{NEWEST} was written without checksums; it is loaded unchecked"


def test_a_checkpoint_from_before_there_were_switches_has_their_defaults(folder, parts):
    wanted = weights_of(model_of(folder))
    make_old(folder / NEWEST)
    path = folder / NEWEST / "state.json"
    state = json.loads(path.read_text())
    for name in ("bias", "qk_norm", "activation", "norm_eps", "norm_out"):
        del state["model"][name]
    path.write_text(json.dumps(state))
    assert same(weights_of(model_of(folder)), wanted)
    assert load_checkpoint(folder, *parts) == 12
    other = NaViT(replace(parts[0].config, activation="quick_gelu"))
    message = "activation is 'quick_gelu', expected 'gelu'; give the model of the checkpoint, or"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, other, *parts[1:])


@pytest.mark.parametrize("name", FILES[:3])
def test_a_checkpoint_without_checksums_that_cannot_be_read_is_damage(name, folder, parts, caplog):
    make_old(folder / NEWEST)
    os.truncate(folder / NEWEST / name, (folder / NEWEST / name).stat().st_size - 20)
    assert load_checkpoint(folder, *parts) == 10
    assert f"{NEWEST} is damaged ({name}: " in caplog.messages[0]


def test_a_checkpoint_of_another_version_is_no_damage(folder, parts):
    make_old(folder / NEWEST)
    path = folder / NEWEST / "state.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 4'))
    message = (
        f"{NEWEST}/state.json version is 4, expected 1, 2 or 3; use the packpipe that wrote it"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, *parts)


def test_a_checkpoint_under_another_name_is_refused(folder, parts):
    (folder / NEWEST).rename(folder / "step-00000099")
    message = "step-00000099/state.json step is 12, expected 99, as in its name; give the folder"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, *parts)


def test_checkpoints_are_in_the_order_of_their_steps(parts, tmp_path):
    for step in (99_999_998, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, *parts, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    for name in ("step-200000000.partial", "step-200000000.damaged", "step-last", "step-2 (copy)"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-200000000").write_text("a file")
    assert load_checkpoint(tmp_path, *parts) == 100_000_000


def test_training_goes_on_from_the_checkpoint_before_to_the_same_bits(trained, folder):
    with (folder / NEWEST / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    damaged = (folder / NEWEST / "model.safetensors").read_bytes()
    (folder / "step-00000011.partial").mkdir()
    run = train(learning.model_of(), learning.loader_of(), learning.config_of(), folder=folder)
    assert next(run).step == 11
    # It is set aside, so that it neither counts as one of the last two nor is lost.
    aside = folder / f"{NEWEST}.damaged"
    assert sorted(path.name for path in folder.glob("step-*")) == [OLDER, aside.name]
    assert [record.step for record in run] == [12]
    assert (aside / "model.safetensors").read_bytes() == damaged
    assert contents(folder / NEWEST) == contents(trained / NEWEST)
    assert [line["loss"] for line in read_log(folder)] == [
        line["loss"] for line in read_log(trained)
    ]


def test_a_training_that_is_complete_still_clears_what_a_kill_left(folder):
    (folder / "step-00000010.old.partial").mkdir()
    before = contents(folder)
    run = train(learning.model_of(), learning.loader_of(), learning.config_of(), folder=folder)
    assert list(run) == []
    assert not (folder / "step-00000010.old.partial").exists()
    assert contents(folder) == before


def test_all_files_are_synced_before_they_get_their_name(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, type(tmp_path).rename

    def synced(number):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def renamed(path, target):
        done.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(type(tmp_path), "rename", renamed)
    config = learning.config_of(steps=1)
    list(train(learning.model_of(), learning.loader_of(), config, folder=tmp_path / "out"))
    assert done[0] == "log.jsonl"
    assert sorted(done[1:5]) == sorted(FILES)
    assert done[5:] == ["step-00000001.partial", "renamed", "out"]


def killed_at(number, folder, parts, step):
    """Save a checkpoint in a process that kills itself before one of its calls to the system.

    Returns:
        Whether it was killed; otherwise it made fewer calls.
    """

    def save():
        calls = []

        def count(event, _):
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"):
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(event)

        sys.addaudithook(count)
        save_checkpoint(folder, *parts, step)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("step", [14, 12], ids=["a new step", "the last step again"])
def test_killed_at_any_moment_of_saving_a_whole_checkpoint_is_left(step, folder, parts, tmp_path):
    load_checkpoint(folder, *parts)
    before = {path.name: contents(path) for path in checkpoints(folder)}
    newest = []
    while True:
        work = shutil.copytree(folder, tmp_path / "work")
        if not killed_at(STRIDE * len(newest), work, parts, step):
            break
        newest.append(load_checkpoint(work, *new_parts()))
        for path in checkpoints(work):
            assert path.name not in before or contents(path) == before[path.name]
        # Started again it saves, and nothing is left of the one that was killed.
        save_checkpoint(work, *parts, step)
        assert load_checkpoint(work, *new_parts()) == step
        names = [path.name for path in (*checkpoints(work), work / "log.jsonl")]
        assert sorted(path.name for path in work.iterdir()) == sorted(names)
        shutil.rmtree(work)
    assert STRIDE * len(newest) > 20
    assert set(newest) == ({12, 14} if step == 14 else {10, 12})


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_full_disk_is_an_error_and_leaves_what_was_there(share, folder, parts):
    load_checkpoint(folder, *parts)
    before = contents(folder)
    largest = max(len(before[f"{NEWEST}/{name}"]) for name in FILES)
    with files_of_at_most(int(share * largest)), pytest.raises((OSError, SafetensorError)):
        save_checkpoint(folder, *parts, 14)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.glob("step-*")) == [OLDER, NEWEST]
    save_checkpoint(folder, *parts, 14)
    assert load_checkpoint(folder, *parts) == 14


def test_an_error_of_the_machine_is_no_damage(folder, parts, monkeypatch):
    def exhausted(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    before = contents(folder)
    monkeypatch.setattr(module, "checksum_of", exhausted)
    with pytest.raises(OSError, match="Too many open files"):
        load_checkpoint(folder, *parts)
    assert contents(folder) == before
