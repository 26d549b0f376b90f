"""Floors are walls: a fresh interpreter for each floor says what importing it loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import packpipe

PACKAGE = Path(packpipe.__file__).parent

FLOORS = {
    "0": {
        "modules": "checks philox lengths limits quality bounds rules expansion arrival patterns "
        "cutting_stock least_squares strategies histogram two_limits picture packing online "
        "balance seq_lens distributions dropping resolution config decisions fit "
        "explanation epoch_plan plan steps samples token_config token_plan gathering",
        "forbidden": "PIL pyarrow datasets torch ray matplotlib",
        "above": ["1", "2 datasets", "2 torch", "3"],
    },
    "1": {
        "modules": "headers modes images patches orders decoder decoders rows ahead schema table "
        "shards stored quarantine problems invariants row_picture token_columns token_rows "
        "token_invariants",
        "forbidden": "datasets torch ray matplotlib",
        "above": ["2 datasets", "2 torch", "3"],
    },
    "2 datasets": {
        "modules": "features source sizes epochs streams lazy build image_build token_source "
        "token_build dataset packer pairs image_verification token_verification verification "
        "summary",
        "forbidden": "torch matplotlib",
        "above": ["2 torch", "3"],
    },
    "2 torch": {
        "modules": "ranks batch token_batch exports filling loader positions attention pooling "
        "model_config navit flops prediction evaluation losses contrastive checkpoints training",
        "forbidden": "datasets matplotlib",
        "above": ["2 datasets", "3"],
    },
    "3": {
        "modules": "plots opening telling demo running bench report command_options "
        "packing_commands training_commands cli",
        "forbidden": "",
        "above": [],
    },
}
LAZY = {"torch", "datasets", "ray", "matplotlib", "PIL", "numba", "numpy", "pyarrow", "scipy"}

# Prints, after each import, the top-level packages and packpipe modules loaded so far.
SCRIPT = """
import importlib, json, sys
found = {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    found[name] = [n for n in sys.modules if "." not in n or n.startswith("packpipe.")]
print(json.dumps(found))
"""


def on_disk() -> set[str]:
    return {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}


def modules_of(floor: str) -> list[str]:
    return [name for name in FLOORS[floor]["modules"].split() if name in on_disk()]


def loaded_after(names: list[str]) -> dict[str, list[str]]:
    """What a fresh interpreter has loaded after importing each name in turn."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(names)],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def forbidden_on(floor: str, loaded: list[str]) -> set[str]:
    """Those of the loaded that a floor must not load."""
    above = {f"packpipe.{name}" for other in FLOORS[floor]["above"] for name in modules_of(other)}
    return (above | set(FLOORS[floor]["forbidden"].split())) & set(loaded)


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """What is loaded after each import, its floor's earlier modules imported before it."""
    runs = [["packpipe"], *([f"packpipe.{m}" for m in modules_of(floor)] for floor in FLOORS)]
    with ThreadPoolExecutor(2) as executor:
        found = list(executor.map(loaded_after, runs))
    return {name: modules for run in found for name, modules in run.items()}


def test_every_module_has_a_floor_and_only_one():
    listed = [name for floor in FLOORS.values() for name in floor["modules"].split()]
    assert on_disk() <= set(listed)
    assert len(listed) == len(set(listed))
    assert len(on_disk()) >= 20


@pytest.mark.parametrize(
    ("floor", "name"), [(floor, name) for floor in FLOORS for name in modules_of(floor)]
)
def test_a_module_loads_nothing_of_the_floors_above(floor, name, loaded):
    found = loaded[f"packpipe.{name}"]
    assert f"packpipe.{name}" in found
    assert forbidden_on(floor, found) == set()


def test_importing_packpipe_loads_no_third_party_package(loaded):
    found = set(loaded["packpipe"])
    assert "packpipe" in found
    assert found & LAZY == set()
    assert {name for name in found if name.startswith("packpipe.")} == set()


@pytest.mark.parametrize(
    ("name", "floor", "caught"),
    [
        ("dataset", "0", {"datasets", "pyarrow", "PIL", "packpipe.dataset", "packpipe.rows"}),
        ("dataset", "1", {"datasets", "packpipe.dataset", "packpipe.source"}),
        ("dataset", "2 torch", {"datasets", "packpipe.dataset"}),
        ("batch", "2 datasets", {"torch", "packpipe.batch"}),
        ("rows", "0", {"PIL", "pyarrow", "packpipe.rows", "packpipe.images"}),
    ],
)
def test_the_knock_is_heard_where_a_wall_is_broken(name, floor, caught, loaded):
    assert caught <= forbidden_on(floor, loaded[f"packpipe.{name}"])


def test_a_module_on_the_wrong_floor_is_caught_by_a_fresh_interpreter():
    found = loaded_after(["packpipe.packing", "packpipe.images"])
    assert forbidden_on("0", found["packpipe.packing"]) == set()
    assert {"PIL", "packpipe.images"} <= forbidden_on("0", found["packpipe.images"])
