"""The prepared run for a card walks every path that a CPU has."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import loading
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_lab")


def test_the_run_walks_every_path_of_a_cpu(tmp_path, lab):
    script = BENCHMARKS / "gpu_lab.py"
    options = ["--device", "cpu", "--tiny", "--seconds", "100000", "--out", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *options],
        env={**loading.environment(), "OMP_NUM_THREADS": "1"},  # threads would wait for each other
        check=True,
        timeout=600,
        stdout=subprocess.DEVNULL,
    )
    records = [json.loads(line) for line in (tmp_path / "gpu_lab.jsonl").read_text().splitlines()]
    assert not [record for record in records if "failed" in record or "left_out" in record]
    parts = {record["part"] for record in records}
    assert parts >= {"heading", "ceilings", "matmuls", "attention", "norms", "train", "whole"}
    assert all(record["rows_s"] > 0 for record in records if record["part"] == "loader")
    assert parts >= {"clip", "autotune", "loader"}
    steps = [record for record in records if "ms" in record]
    assert {record["changes"] for record in steps} == {"now", "bound", "bound+bf16", "bf16"}
    assert {record["graph"] for record in steps} == {False, True}
    assert all(0 < loss < 10 for record in steps for loss in record["losses"])
    (attention,) = (record for record in records if record["part"] == "attention")
    assert 0 < attention["out_error"] < 0.02
    assert 0 < attention["grad_error"] < 0.02
    lines = (tmp_path / "gpu_lab.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + len(lab.EXPECTED)
    assert lines[-1] == "The own kernel was not measured."


def step(size, rows, changes, ms, mfu, *, graph=True, mode=None, clip=False):
    return {
        "part": "train",
        "size": size,
        "rows": rows,
        "changes": changes,
        "graph": graph,
        "mode": mode,
        "clip": clip,
        "ms": ms,
        "mfu": mfu,
    }


def own(name, ms):
    return {"part": "attention", "name": name, "forward_ms": ms / 4, "backward_ms": 3 * ms / 4}


def test_what_is_measured_stands_beside_what_was_expected(lab):
    records = [
        {"part": "heading"},
        step("B", 32, "bf16+own", 1.0, 0.9, clip=True),
        step("B", 32, "bf16+own", 40.04, 0.5501),
        step("B", 32, "bf16+own", 2.0, 0.8, graph=False),
        step("B", 32, "now", 55.0, 0.4, graph=False),
        step("B", 32, "bf16+own", 36.0, 0.61, mode=lab.AUTOTUNE),
        own("flash", 0.2),
        own("own, 64", 0.7),
        own("own, 128", 0.5),
    ]
    text = lab.expectations(records)
    row = next(line for line in text.splitlines() if line.startswith("| B/16"))
    assert row == (
        "| B/16, 32 rows | 55.4, 0.395 (55.0, 0.400) | 44.5, 0.49 (not measured) "
        "| 38.4, 0.57 (40.0, 0.550) | 36.5, 0.6 (36.0, 0.610) |"
    )
    assert text.endswith("0.50 ms (own, 128); it replaces flash attention and FlexAttention.\n")
    for ms, follows in ((0.6, "it is chosen, since"), (0.9, "flash attention stays, told the")):
        assert follows in lab.verdict([own("own", ms)])


def test_a_part_that_takes_longer_than_its_time_is_ended_and_the_next_goes_on(
    lab, tmp_path, monkeypatch
):
    monkeypatch.setitem(lab.PARTS, "norms", 0.1)
    run = lab.Lab(torch.device("cpu"), tiny=False, seconds=1e6, path=tmp_path / "lab.jsonl")

    def endless():
        while True:
            pass

    run.attempt("norms", endless)
    run.attempt("norms", lambda: run.attempt("own", endless))  # a piece takes the part's time
    run.attempt("clip", lambda: run.say(part="clip"))
    run.seconds = 0
    run.attempt("clip", endless)
    found = [(one["part"], *[name for name in one if name != "part"]) for one in run.records]
    failed = [("norms", "failed"), ("own", "failed"), ("norms", "failed")]
    assert found == [*failed, ("clip",), ("clip", "left_out")]
    assert "TimeoutError: longer than 0 s" in run.records[0]["failed"]
