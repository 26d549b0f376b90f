"""The prepared run for a card walks every path that a CPU has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import loading

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_run_walks_every_path_of_a_cpu(tmp_path):
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
