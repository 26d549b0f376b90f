"""The files of a pretrained model: where they lie, and what they hold.

Settings are JSON, weights are safetensors, in one file or in several with an index. Nothing of the
library that wrote them is imported, and no file is executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from packpipe import checks

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Of an image processor alone, and of one inside the settings of a processor of texts, too.
_PROCESSOR, _PROCESSORS = "preprocessor_config.json", "processor_config.json"
_AGAIN = "it is cut or damaged, so download or write it again"
_WANTED = [CONFIG, WEIGHTS, INDEX, "model-*.safetensors", _PROCESSOR, _PROCESSORS]


def folder_of(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model: source itself or, if it is no folder, the Hub's files.

    Of a name, such as "google/siglip2-base-patch16-naflex", files of settings and weights alone are
    downloaded, and those that were before are used where there is no network.

    Args:
        source: a folder, or the name of a model of the Hugging Face Hub.
        revision: branch, tag or commit of the Hub; None for the newest.

    Raises:
        FileNotFoundError: it is no folder, and cannot be downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:  # no network, no such model, no name of a model
        expected = f"a folder, or a model that can be downloaded ({first_line(error)})"
        remedy = "download it where there is a network, and pass the folder"
        raise FileNotFoundError(checks.sentence("source", str(source), expected, remedy)) from error


def settings_of(folder: Path) -> dict[str, Any]:
    """Return what config.json says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON.
    """
    if not (folder / CONFIG).exists():
        expected = f"a folder with {CONFIG} and {WEIGHTS}"
        raise FileNotFoundError(
            checks.sentence(
                "source",
                str(folder),
                expected,
                "pass the folder of a model; load_model reads a training's",
            )
        )
    return _json(folder / CONFIG)


def processing_of(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder's image processor, but for those that are null.

    Without a file of them there are none.

    Raises:
        ValueError: the file is no JSON, or holds something else.
    """
    found: dict[str, Any] = {}
    if (folder / _PROCESSOR).exists():
        found = _json(folder / _PROCESSOR)
    elif (folder / _PROCESSORS).exists():
        found = _json(folder / _PROCESSORS).get("image_processor", {})
        if not isinstance(found, dict):
            name, expected = f"image_processor in {folder / _PROCESSORS}", "settings by their names"
            raise ValueError(checks.sentence(name, found, expected, "correct it"))
    return {name: value for name, value in found.items() if value is not None}


class Weights:
    """The tensors of a folder, each read when it is taken, in float32, and taken once.

    What is never taken is known by its name, see `left`, and is not read.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        names = [WEIGHTS]
        if (folder / INDEX).exists():
            names = _shards(folder / INDEX)
        self.folder = folder
        # By name: the file, and what it calls the tensor.
        self._files: dict[str, tuple[Any, str]] = {}
        for name in names:
            if not (folder / name).exists():
                expected, remedy = f"a folder with {name}", "convert its weights to safetensors"
                raise FileNotFoundError(checks.sentence("source", str(folder), expected, remedy))
            try:
                file: Any = safe_open(folder / name, "pt")
            except SafetensorError as error:
                expected = f"a whole file of safetensors ({first_line(error)})"
                raise ValueError(
                    checks.sentence("weights", str(folder / name), expected, _AGAIN)
                ) from error
            self._files |= {key: (file, key) for key in list(file.keys())}

    def rename(self, parts: dict[str, str]) -> None:
        """Rename tensors: in each name the first text of a pair becomes the second.

        Raises:
            ValueError: two would have one name.
        """
        renamed = dict[str, tuple[Any, str]]()
        for name, found in self._files.items():
            for before, after in parts.items():
                name = name.replace(before, after)
            if name in renamed:
                what, expected = f"{self.folder}: {found[1]}", f"the only tensor that is {name}"
                remedy = f"{renamed[name][1]} is, too: remove one of them"
                raise ValueError(checks.sentence(what, name, expected, remedy))
            renamed[name] = found
        self._files = renamed

    def take(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self._files:
            what, expected = f"{self.folder}: {name}", "a tensor of the weights"
            remedy = "the weights are of another model than config.json says"
            raise ValueError(checks.sentence(what, None, expected, remedy))
        # Taken once, so that what is left at the end is what nothing has used.
        file, stored = self._files.pop(name)
        tensor: Tensor = file.get_tensor(stored).float()
        return tensor

    def pairs(self, names: dict[str, str], ours: str = "", theirs: str = "") -> dict[str, Tensor]:
        """Return the weights and biases of some layers, by our names.

        Args:
            names: ours: theirs.
            ours: stands before each of our names.
            theirs: stands before each of theirs.

        Raises:
            ValueError: there is none of a name.
        """
        return {
            f"{ours}{own}.{kind}": self.take(f"{theirs}{name}.{kind}")
            for own, name in names.items()
            for kind in ("weight", "bias")
        }

    def left(self) -> list[str]:
        """Return the names of the tensors that were not taken."""
        return sorted(self._files)


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index is of.

    Raises:
        ValueError: it is damaged, or a name is not of a file beside it.
    """
    found = _json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        expected = "files by the names of tensors"
        raise ValueError(checks.sentence(f"weight_map in {index}", found, expected, _AGAIN))
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name:
            expected = "the name of a file beside it"
            raise ValueError(checks.sentence(f"a file in {index}", name, expected, _AGAIN))
    return sorted(set(found.values()))


def _json(path: Path) -> dict[str, Any]:
    """Return what a file of JSON says.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        what = type(found).__name__
    except ValueError as error:  # no UTF-8, too
        what = str(error)
    raise ValueError(checks.sentence("settings", str(path), f"a JSON object ({what})", _AGAIN))


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
