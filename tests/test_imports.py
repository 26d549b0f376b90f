"""What importing loads: nothing before it is needed; and which wing may import which.

The contracts of import-linter (pyproject.toml) read the code; the first three tests ask a fresh
interpreter what has really been loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import packpipe

ROOT = Path(__file__).parent.parent
THIRD_PARTY = {
    "torch",
    "datasets",
    "ray",
    "matplotlib",
    "PIL",
    "numba",
    "numpy",
    "pyarrow",
    "scipy",
}


@cache
def loaded_by(code: str) -> set[str]:
    """The modules of packpipe and the top-level packages that a fresh interpreter has loaded."""
    ask = "; import json, sys; print(json.dumps([n for n in sys.modules]))"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + ask],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = json.loads(run.stdout.splitlines()[-1])
    return {name for name in names if "." not in name or name.startswith("packpipe.")}


def test_importing_packpipe_loads_no_third_party_package():
    found = loaded_by("import packpipe")
    assert found & THIRD_PARTY == set()
    assert {name for name in found if name.startswith("packpipe.")} == {"packpipe._version"}


# Imported once for what they import, and once more where the system lacks what only POSIX has.
LACKING = """
import importlib, importlib.util, pkgutil, sys
from pathlib import Path

def load():
    import packpipe
    left_out = {"packpipe.__main__"}
    if importlib.util.find_spec("triton") is None:
        left_out.add("packpipe.model.fused")
    for found in pkgutil.walk_packages(packpipe.__path__, "packpipe."):
        if found.name not in left_out:
            importlib.import_module(found.name)
    for name in packpipe.__all__:
        getattr(packpipe, name)
    return packpipe

load()
for name in [name for name in sys.modules if name.partition(".")[0] == "packpipe"]:
    del sys.modules[name]
sys.path.insert(0, "tests")
import other_systems
other_systems.take_away()
load().durable.sync(Path(".")) # a folder, which such a system does not open
"""


def test_nothing_at_import_needs_what_other_systems_lack():
    found = loaded_by(LACKING + "load")
    assert {"packpipe.images.pool", "packpipe.images.worker", "packpipe.loading.workers"} <= found


def test_packing_lengths_loads_no_arrow():
    found = loaded_by("import packpipe; packpipe.pack_lengths")
    assert {"numba", "packpipe.packing.packs"} <= found
    assert found & {"pyarrow", "PIL", "datasets", "torch", "matplotlib"} == set()


# A KeyError, were nothing there to hold a group, would end the process.
HOLDER = "sys.modules['torch.distributed.nn.functional']"
TRAINING = f"import packpipe, sys; packpipe.PackedLoader; {HOLDER}; packpipe.NaViT"


def test_the_loader_leaves_nothing_to_hold_a_group_that_a_script_makes_later():
    assert "torch" in loaded_by(TRAINING)


def test_packing_and_reading_load_no_torch():
    names = ("PackedStream", "EpochPacks", "pack", "read_rows", "verify")
    found = loaded_by("import packpipe; " + "; ".join(f"packpipe.{name}" for name in names))
    assert {"datasets", "packpipe.loading.streams"} <= found
    assert found & {"torch", "matplotlib"} == set()


def test_the_model_loads_no_datasets():
    found = loaded_by(TRAINING)
    assert {"torch", "packpipe.model.navit", "packpipe.loading.loader"} <= found
    assert found & {"datasets", "matplotlib"} == set()


def contracts(folder: Path) -> tuple[int, str]:
    """The status and the report of import-linter, for the package that lies in a folder."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        (None, "", None),
        ("packing/limits", "from packpipe.building.pack import pack", "wings"),
        ("model/flops", "from packpipe.verification import verify", "wings"),
        ("planning/decisions", "import pyarrow", "packing and planning need no Arrow"),
        ("rows/rows", "import torch", "rows and images need no datasets and no torch"),
    ],
)
def test_a_wrong_import_breaks_its_contract(module, line, broken, tmp_path):
    package = shutil.copytree(
        Path(packpipe.__file__).parent,
        tmp_path / "packpipe",
        ignore=shutil.ignore_patterns("data", "__pycache__"),
    )
    if module is not None:
        path = package / f"{module}.py"
        code = path.read_text(encoding="utf-8")
        path.write_text(code + f"\n{line}\n", encoding="utf-8")
    status, said = contracts(tmp_path)
    assert (status == 0) == (broken is None), said
    if broken is not None:
        assert any(text.startswith(broken) and "BROKEN" in text for text in said.splitlines()), said
        assert f"packpipe.{module.replace('/', '.')} -> {line.split()[1]}" in said
