"""The prepared run for a card walks every path that a CPU has; its kernel is right, interpreted.

The kernel's own test needs Triton, whose interpreter (3.6) runs it without a card, and NumPy below
2.4, which that interpreter needs.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import loading
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# Beside the backend that is the oracle, with padding at the end of both rows.
KERNEL = """
import sys
import torch
from torch.nn import functional as F
sys.path.insert(0, sys.argv[1])
import segment_attention as own
import packed
from packpipe import attention

case = packed.RowSet([[100, 3, 60, 1], [90, 80]], seq_len=200, max_segments=4)
batch = packed.batch_of(case)
torch.manual_seed(0)
qkv = torch.randn(400, 3, 2, 32, requires_grad=True)
gains = [(torch.rand(32) + 0.5).requires_grad_() for _ in range(2)]
lens = batch.seq_lens.long()
lens = torch.cat([lens, 200 - lens.sum(1, keepdim=True)], 1)
real = torch.ones_like(lens, dtype=torch.bool)
real[:, -1] = False
blocks = own.blocks_of(lens.flatten(), real.flatten(), 400)
found, _ = own.attend(qkv, *gains, blocks)
q, k, v = qkv.unbind(1)
q, k = (F.rms_norm(x, (32,), g, 1e-6) for x, g in zip((q, k), gains))
wanted = attention.flatten(batch, "reference").attend(q, k, v)
real = (batch.segment_ids > 0).flatten()[:, None, None]
assert (found - wanted * real).abs().max() < 1e-5
dout = torch.randn_like(found)
for one, other in zip(
    torch.autograd.grad(found, (qkv, *gains), dout),
    torch.autograd.grad(wanted * real, (qkv, *gains), dout),
):
    assert (one - other).abs().max() < 1e-4 * other.abs().max()
"""


def test_the_run_walks_every_path_of_a_cpu(tmp_path):
    script = BENCHMARKS / "gpu_lab.py"
    options = ["--device", "cpu", "--tiny", "--seconds", "100000", "--out", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *options],
        env=loading.environment(),
        check=True,
        timeout=600,
        stdout=subprocess.DEVNULL,
    )
    records = [json.loads(line) for line in (tmp_path / "gpu_lab.jsonl").read_text().splitlines()]
    assert not [record for record in records if "failed" in record or "left_out" in record]
    parts = {record["part"] for record in records}
    assert parts >= {"heading", "ceilings", "matmuls", "attention", "norms", "train", "whole"}
    assert parts >= {"clip", "autotune"}
    steps = [record for record in records if "ms" in record]
    assert {record["changes"] for record in steps} == {"now", "bf16"}
    assert all(0 < loss < 10 for record in steps for loss in record["losses"])
    (attention,) = (record for record in records if record["part"] == "attention")
    assert 0 < attention["out_error"] < 0.02
    assert 0 < attention["grad_error"] < 0.02


@pytest.mark.skipif(
    not importlib.util.find_spec("triton") or np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="no Triton, or a NumPy that its interpreter cannot use",
)
def test_the_kernel_is_reference_attention():
    environment = {**loading.environment(), "TRITON_INTERPRET": "1"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERNEL, str(BENCHMARKS)],
        env=environment,
        check=True,
        timeout=600,
    )
