"""Settings of the whole run: where caches go, and how many examples Hypothesis draws.

Everything a test run leaves behind stays in the checkout. This must run before `datasets` is
imported, since it reads HF_HOME once.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".pytest_tmp_home"

# No run finds the sizes that another has measured.
if "PYTEST_XDIST_WORKER" not in os.environ:
    shutil.rmtree(HOME / "huggingface", ignore_errors=True)
os.environ.setdefault("HF_HOME", str(HOME / "huggingface"))
# Small tensors: threads of several test processes would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime keeps files in ~/.cache otherwise
os.environ.setdefault("MPLCONFIGDIR", str(HOME / "matplotlib"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HOME / "inductor"))

# A shell ignores Ctrl-C for what it starts in the background, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Worker processes that are killed leave temporary folders; their sockets need short names.
TEMPORARY = HOME / "t"
if len(str(TEMPORARY)) < 75:  # a socket may have 107, of which its own name takes 31
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(TEMPORARY)
    tempfile.tempdir = None  # asked for again

set_hypothesis_home_dir(ROOT / ".hypothesis")
# The same examples every time, so that no run is red by chance; "nightly" looks for new ones.
for name, max_examples in (("dev", 20), ("ci", 200), ("nightly", 2000)):
    settings.register_profile(
        name,
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=name != "nightly",
    )
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels before several test processes do so at once."""
    config.addinivalue_line("markers", "slow: takes long, and so begins early")
    if getattr(config.option, "numprocesses", None):
        kernels = Path(__file__).with_name("kernels.py")
        subprocess.run([sys.executable, str(kernels)], cwd=ROOT, check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, so that none is left to one process at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
