"""The log of a training: appended to, never rewritten in place; damage costs the damaged lines."""

import json
import math
import multiprocessing
import os
import signal
import sys

import learning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import files_of_at_most

from packpipe.cli.training_run import _line
from packpipe.plots import plot_training
from packpipe.training.log import append_record, begin_log, read_log
from packpipe.training.loop import Record, train


def record_of(step, **options):
    figures = {"accuracy": 0.5, "learning_rate": 1e-3, "images_per_s": 10.0, "tokens_per_s": 99.0}
    figures |= {"loss": 1 / step, "fill": 0.9, "data_wait": 0.1, "flops_per_s": 1e9, "mfu": None}
    return Record(step=step, **{**figures, **options})


def lines_of(steps):
    return b"".join(json.dumps(vars(record_of(step))).encode() + b"\n" for step in steps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("log")


def begun(folder, stop=0, **options):
    """The first records of a training."""
    config = learning.config_of(**options)
    run = train(learning.model_of(), learning.loader_of(), config, folder=folder)
    return [next(run) for _ in range(stop)], run


def test_records_are_appended_behind_those_before(tmp_path):
    path = tmp_path / "log.jsonl"
    begun(tmp_path, 5)
    before = path.read_bytes().splitlines(keepends=True)
    assert len(before) == 5
    # The last is of a step behind the last checkpoint, and is repeated.
    assert [record.step for record in begun(tmp_path, 3)[0]] == [5, 6, 7]
    assert path.read_bytes().startswith(b"".join(before[:4]))
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_log_that_needs_no_change_is_not_touched(tmp_path):
    list(begun(tmp_path)[1])
    path = tmp_path / "log.jsonl"
    before, stamp = path.read_bytes(), path.stat()
    assert before.count(b"\n") == learning.STEPS
    assert list(begun(tmp_path)[1]) == []
    assert path.read_bytes() == before
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)


def test_a_full_disk_leaves_all_records(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(lines_of(range(1, 500)))
    before = path.read_bytes()
    # The records that stay are more than there is room for.
    with files_of_at_most(len(before) // 5), pytest.raises(OSError, match="File too large"):
        begin_log(tmp_path, 250)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    begin_log(tmp_path, 499)
    # There is room for a part of the next one.
    with files_of_at_most(len(before) + 20), pytest.raises(OSError, match="File too large"):
        append_record(tmp_path, vars(record_of(500)))
    assert path.read_bytes()[: len(before)] == before
    assert [line["step"] for line in read_log(tmp_path)] == list(range(1, 500))
    begin_log(tmp_path, 499)
    append_record(tmp_path, vars(record_of(500)))
    assert path.read_bytes() == lines_of(range(1, 501))


def killed_at(number, folder, step):
    """Begin a log in a process that kills itself before one of its calls to the system."""

    def begin():
        calls = []

        def count(event, _):
            if event in ("open", "os.mkdir", "os.rename", "os.remove"):
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(event)

        sys.addaudithook(count)
        begin_log(folder, step)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_killed_at_any_moment_the_log_is_what_it_was_or_what_it_is_to_be(tmp_path):
    path, before, after = tmp_path / "log.jsonl", lines_of(range(1, 500)), lines_of(range(1, 251))
    found = []
    path.write_bytes(before)
    while killed_at(len(found), tmp_path, 250):
        found.append(path.read_bytes())
        path.write_bytes(before)
    assert len(found) >= 4
    assert set(found) == {before, after}
    begin_log(tmp_path, 250)
    assert path.read_bytes() == after
    assert list(tmp_path.iterdir()) == [path]


@given(data=st.data())
def test_damage_costs_the_damaged_lines_and_never_blocks(folder, data):
    wanted = lines_of(range(1, 9)).splitlines(keepends=True)
    lines = list(wanted)
    junk = st.one_of(st.binary(max_size=20), st.sampled_from([b"\0" * 50, b"[1]", b"{}", b"7"]))
    kind = st.sampled_from(["cut", "flip", "junk"])
    for at in data.draw(st.sets(st.integers(0, 7), min_size=1, max_size=3)):
        line = wanted[at][:-1]
        if (how := data.draw(kind)) == "cut":
            lines[at] = line[: data.draw(st.integers(0, len(line) - 1))] + b"\n"
        elif how == "flip":
            # Not of the line break. Of its figures a flip may make others.
            bit = data.draw(st.integers(0, 7))
            lines[at] = bytes([line[0] ^ 1 << bit]) + line[1:] + b"\n"
        else:
            lines[at] = data.draw(junk) + b"\n"
    torn = data.draw(st.binary(max_size=10)).replace(b"\n", b"")
    (folder / "log.jsonl").write_bytes(b"".join(lines) + torn)
    sound = [json.loads(line) for line, own in zip(lines, wanted, strict=True) if line == own]
    assert 5 <= len(sound) < 8
    assert read_log(folder) == sound
    begin_log(folder, 6)
    assert read_log(folder) == [record for record in sound if record["step"] <= 6]
    append_record(folder, vars(record_of(7)))
    assert read_log(folder)[-1] == vars(record_of(7))
    # What cannot be read stays, for whoever wants to look at it.
    kept = [line for at, line in enumerate(lines) if line != wanted[at] or at < 6]
    assert (folder / "log.jsonl").read_bytes() == b"".join(kept) + lines_of([7])


def test_a_damaged_middle_line_is_named(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    path.write_bytes(lines_of([1]) + b'{"step": 2, "lo\n' + lines_of([3]) + b'{"step"')
    assert [line["step"] for line in read_log(tmp_path)] == [1, 3]
    (said,) = caplog.messages
    assert said == f"{path}: cannot read line 2; left out"


def test_training_goes_on_over_a_damaged_log(tmp_path):
    begun(tmp_path, 7)
    path = tmp_path / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff" + lines[2][1:]
    path.write_bytes(b"".join(lines)[:-9])
    list(begun(tmp_path)[1])
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, *range(4, learning.STEPS + 1)]
    assert path.read_bytes().startswith(b"".join(lines[:6]))


def test_a_record_that_lacks_its_line_break_alone_is_kept(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(lines_of([1, 2])[:-1])
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    begin_log(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_bytes() == lines_of([1, 2])


def strict(text):
    """JSON as the standard has it."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_are_no_numbers_are_null(value, tmp_path):
    record = record_of(1, loss=value)
    append_record(tmp_path, vars(record))
    assert strict((tmp_path / "log.jsonl").read_text())["loss"] is None
    assert strict(_line(record, as_json=True))["loss"] is None
    assert read_log(tmp_path) == [{**vars(record), "loss": None}]
    # Older logs have them as they are.
    (tmp_path / "log.jsonl").write_text(json.dumps(vars(record)) + "\n")
    assert read_log(tmp_path) == [{**vars(record), "loss": None}]


def test_a_training_that_diverges_is_logged_and_drawn(tmp_path):
    model = learning.model_of()
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    records = list(train(model, learning.loader_of(), learning.config_of(), folder=tmp_path))
    assert all(math.isnan(record.loss) for record in records)
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert strict(line)["loss"] is None
    log = read_log(tmp_path)
    assert [record["step"] for record in log] == list(range(1, learning.STEPS + 1))
    plot_training(log).savefig(tmp_path / "training.png")
    drawn = plot_training([vars(record_of(1)), {"step": 2, "loss": None}, vars(record_of(3))])
    found = drawn.axes[0].lines[0].get_ydata()
    assert np.isnan(found).tolist() == [False, True, False]


def test_validation_is_drawn_beside_training():
    records = [vars(record_of(1)), {**vars(record_of(2)), "val_loss": 0.5, "val_accuracy": 0.25}]
    axes = plot_training(records).axes
    for number, value in ((0, 0.5), (1, 0.25)):
        assert axes[number].lines[-1].get_xydata().tolist() == [[2, value]]
        assert [text.get_text() for text in axes[number].get_legend().texts][-1] == "validation"
    assert len(axes[2].lines) == 1
    assert axes[2].get_legend() is None
