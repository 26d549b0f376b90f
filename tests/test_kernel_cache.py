"""Compiled kernels are kept on disk: never stale, and safe after a fork."""

import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import packpipe
from packpipe import packing, philox, resolution, rules

KERNEL_FILES = [Path(module.__file__) for module in (rules, philox, resolution)]


COMMAND = """
import numpy as np
import copied
print(copied.next_fit(np.array([5, 5, 5], np.int32), 10, 9).tolist())
print(sum(copied.next_fit.stats.cache_hits.values()))
"""


def offsets_and_cache_hits(folder):
    run = subprocess.run(
        [sys.executable, "-c", COMMAND], cwd=folder, capture_output=True, text=True, check=True
    )
    return run.stdout.split("\n")[:2]


def test_an_edited_kernel_is_compiled_again(tmp_path):
    copied = tmp_path / "copied.py"
    source = KERNEL_FILES[0].read_text()
    copied.write_text(source)
    assert offsets_and_cache_hits(tmp_path) == ["[0, 2, 3]", "0"]
    assert offsets_and_cache_hits(tmp_path) == ["[0, 2, 3]", "1"]
    assert source.count("lengths[i] > room") == 1
    copied.write_text(source.replace("lengths[i] > room", "lengths[i] >= room"))
    assert offsets_and_cache_hits(tmp_path) == ["[0, 1, 2, 3]", "0"]


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_a_kernel_calls_kernels_of_its_own_file_only(path):
    # The cache looks at the date of a kernel's own file alone.
    imported = re.findall(r"^from packpipe(?:\.\w+)? import (.+)$", path.read_text(), re.MULTILINE)
    names = {name.strip() for line in imported for name in line.split(",")}
    assert names <= {"checks"}
    assert "njit" not in Path(packing.__file__).with_name("checks.py").read_text()


def _packed(lengths):
    return packpipe.pack_lengths(lengths, 100).order.tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads
def test_kernels_work_in_a_forked_process():
    lengths = np.random.default_rng(0).integers(1, 101, 500)
    wanted = _packed(lengths)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_packed, (lengths,)) == wanted
