"""Settings of the whole run: where caches go, and how many examples Hypothesis draws.

Everything a test run leaves behind stays in the checkout. This must run before `datasets` is
imported, since it reads HF_HOME once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

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
os.environ.setdefault("MPLCONFIGDIR", str(HOME / "matplotlib"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HOME / "inductor"))

# Worker processes that are killed leave temporary folders; their sockets need short names.
TEMPORARY = HOME / "t"
if len(str(TEMPORARY)) < 60:
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(TEMPORARY)
    tempfile.tempdir = None  # asked for again

set_hypothesis_home_dir(ROOT / ".hypothesis")
for name, max_examples in (("dev", 50), ("ci", 200), ("nightly", 2000)):
    settings.register_profile(name, max_examples=max_examples, deadline=None, database=None)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)
