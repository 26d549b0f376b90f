"""The memory of calls that need not read the data does not grow with it."""

from __future__ import annotations

import os

import memory
import pytest

pytestmark = pytest.mark.skipif(
    not os.access(memory.CLEAR, os.W_OK), reason="the kernel does not measure"
)
DATA = len(memory.ROWS) * memory.SIDE**2 * 3
LOOKS_AT_A_SAMPLE = "contents"  # where the kernel maps the pages around it, too


@pytest.mark.slow
def test_calls_that_need_not_read_the_data_take_little_memory(tmp_path):
    for name, number in (("small", 1), ("large", len(memory.ROWS))):
        (tmp_path / name).mkdir()
        memory.make(tmp_path / name, number)
    calls, everything, copied = memory.measured(tmp_path / "small", tmp_path / "large")
    # It measures what is read, and what is allocated.
    assert everything > 0.9 * DATA > 3 * memory.MOST
    assert copied == "does not fit"
    resident = {name: found for name, found in calls.items() if LOOKS_AT_A_SAMPLE not in name}
    assert len(resident) > 80
    assert {name: found for name, found in resident.items() if found > memory.MOST} == {}
