"""Compiled kernels are kept on disk: never stale, and safe after a fork."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import loading
import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import packpipe
from packpipe import philox
from packpipe.augmenting import turning
from packpipe.images import resize
from packpipe.packing import cutting_stock, decreasing, in_order, online, placement, two_limits
from packpipe.planning import resolution
from packpipe.rows import copy as gathering

KERNEL_MODULES = [
    in_order,
    decreasing,
    placement,
    gathering,
    online,
    two_limits,
    cutting_stock,
    philox,
    resolution,
    turning,
    resize,
]

COMMAND = """
import numpy as np
import copied
numbers = np.empty(3, np.int32)
print(copied.next_fit(np.array([5, 5, 5], np.int32), 10, 9, numbers), numbers.tolist())
print(sum(copied.next_fit.stats.cache_hits.values()))
"""


def offsets_and_cache_hits(folder):
    run = subprocess.run(
        [sys.executable, "-c", COMMAND], cwd=folder, capture_output=True, text=True, check=True
    )
    return run.stdout.split("\n")[:2]


def test_an_edited_kernel_is_compiled_again(tmp_path):
    copied = tmp_path / "copied.py"
    source = Path(in_order.__file__).read_text()
    copied.write_text(source)
    assert offsets_and_cache_hits(tmp_path) == ["2 [0, 0, 1]", "0"]
    assert offsets_and_cache_hits(tmp_path) == ["2 [0, 0, 1]", "1"]
    assert source.count("lengths[i] > room") == 1
    copied.write_text(source.replace("lengths[i] > room", "lengths[i] >= room"))
    assert offsets_and_cache_hits(tmp_path) == ["3 [0, 1, 2]", "0"]


@pytest.mark.parametrize("module", KERNEL_MODULES, ids=lambda module: module.__name__)
def test_a_kernel_calls_kernels_of_its_own_file_only(module):
    # The cache looks at the date of a kernel's own file alone.
    kernels = [
        found.py_func
        for found in vars(module).values()
        if isinstance(found, Dispatcher) and found.py_func.__module__ == module.__name__
    ]
    assert kernels
    for kernel in kernels:
        called = [kernel.__globals__.get(name) for name in kernel.__code__.co_names]
        assert not [
            other for other in called if getattr(other, "__name__", "").startswith("packpipe")
        ]
        elsewhere = {other.py_func.__module__ for other in called if isinstance(other, Dispatcher)}
        assert elsewhere <= {module.__name__}


CALLED = """
import importlib, kernels, sys
from numba.core.dispatcher import Dispatcher
kernels.compile_all()
for name in sys.argv[1:]:
    found = vars(importlib.import_module(name)).values()
    own = [one for one in found if isinstance(one, Dispatcher) and one.__module__ == name]
    within = {name for kernel in own for name in kernel.__code__.co_names}
    for kernel in own:
        if kernel.__name__ not in within:  # else it is compiled with the kernel that calls it
            print(kernel.__name__, len(kernel.signatures))
"""


def test_test_processes_find_every_kernel_compiled():
    modules = [module.__name__ for module in KERNEL_MODULES]
    run = subprocess.run(
        [sys.executable, "-c", CALLED, *modules],
        env=loading.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    signatures = [line.split() for line in run.stdout.splitlines()]
    assert len(signatures) >= 20
    assert [name for name, number in signatures if number == "0"] == []


def test_every_module_with_kernels_is_looked_at():
    package = Path(packpipe.__file__).parent
    found = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in package.rglob("*.py")
        if "from numba import" in path.read_text()
    }
    assert found == {module.__name__ for module in KERNEL_MODULES}


def _packed(lengths):
    return packpipe.pack_lengths(lengths, 100).order.tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads
def test_kernels_work_in_a_forked_process():
    lengths = np.random.default_rng(0).integers(1, 101, 500)
    wanted = _packed(lengths)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_packed, (lengths,)) == wanted
