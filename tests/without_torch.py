"""Makes a process one in which torch is not installed, for scripts that call `hide` first."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


class _Installed(PathFinder):
    """Finds what is installed, torch excepted."""

    @classmethod
    def find_spec(cls, name: str, *args: Any) -> ModuleSpec | None:
        is_torch = name.partition(".")[0] in {"torch", "torchvision"}
        return None if is_torch else super().find_spec(name, *args)


def hide() -> None:
    """Have torch not be found from now on."""
    assert "torch" not in sys.modules
    sys.meta_path[sys.meta_path.index(PathFinder)] = _Installed
