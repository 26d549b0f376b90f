"""Reads the manifest of a folder, and checks it and the sidecars that `datasets` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short
from typing import Any

import datasets
from datasets import Dataset, DatasetInfo, Features

from packpipe.building.build import INFO, STATE, state_of
from packpipe.building.files_build import JOB
from packpipe.building.shards import (
    MANIFEST,
    NOTES,
    REJECTS,
    data_files,
    digest_of,
    read_manifest,
    record_of,
)
from packpipe.philox import checked_key
from packpipe.rows import files
from packpipe.verification.image_checks import ImageChecks
from packpipe.verification.problems import FoundRows, Problem, same_json
from packpipe.verification.row_checks import RowChecks
from packpipe.verification.token_checks import TokenChecks

_KEYS = ("config", "seed", "epoch", "complete", "files")
_COMPLETE = ("counts", "fill")
_TYPES: dict[str, tuple[type, ...]] = {
    "files": (dict,),
    "counts": (dict,),
    "fill": (float, int),
    "complete": (bool,),
    "undecoded": (list,),
    "config": (dict,),
    "seed": (int,),
    "epoch": (int,),
    "packpipe": (str,),
    "pillow": (str,),
    "codecs": (dict,),
    "source_fingerprint": (str,),
    "source_files": (str, type(None)),
    "materialized": (bool,),
    "store": (str,),
    "image_column": (str,),
    "label_column": (str, type(None)),
    "size_columns": (list, type(None)),
    "image_root": (str, type(None)),
    "token_columns": (list,),
    "value_columns": (list,),
    "bool_columns": (list,),
    "mask_column": (str,),
    "longest": (int,),
    "windows": (dict,),
}
_NAMES = ("size_columns", "token_columns", "value_columns", "bool_columns")


def checks_of(folder: Path) -> RowChecks | str:
    """Return the checks of the rows of a folder, or what is wrong with its manifest."""
    try:
        manifest = read_manifest(folder)
        kind = TokenChecks if TokenChecks.VERSION_KEY in manifest else ImageChecks
        missing = [key for key in (kind.VERSION_KEY, *_KEYS, *kind.KEYS) if key not in manifest]
        if not missing and manifest["complete"]:
            missing = [key for key in _COMPLETE if key not in manifest]
        if missing:
            return f"lacks {', '.join(missing)}"
        version = manifest[kind.VERSION_KEY]
        if type(version) is not int or version != kind.VERSION:  # True is an int, too
            return f"{kind.VERSION_KEY} is {version!r}, expected {kind.VERSION}"
        for key, expected in _TYPES.items():
            value = manifest.get(key)
            # JSON has true and false, which are integers in Python.
            wrong = not isinstance(value, expected) or (
                isinstance(value, bool) and bool not in expected
            )
            if key in manifest and wrong:
                return f"{key} is {value!r}, expected {expected[0].__name__}"
            if key in _NAMES and value and not all(isinstance(name, str) for name in value):
                return f"{key} is {value!r}, expected names"
            # One column may hold both sides of square images.
            names = value if key in _NAMES and key != "size_columns" and value else []
            if len(set(names)) < len(names):
                return f"{key} is {value!r}, expected each name once"
        checked_key(manifest["seed"], manifest["epoch"])
        if manifest.get("token_columns") == []:
            return "token_columns is [], expected one name at least"
        root = manifest.get("image_root")
        if root is not None and not Path(root).is_absolute():
            return f"image_root is {root!r}, expected an absolute path"
        sizes = manifest.get("size_columns")
        if sizes is not None and len(sizes) != 2:
            return f"size_columns is {sizes!r}, expected two names"
        if manifest["complete"] and "plan" in manifest:
            return "has a plan, which a complete folder has not"
        if manifest["complete"] and REJECTS not in manifest["files"]:
            return f"files lacks {REJECTS}"
        if manifest["complete"] and not data_files(manifest):
            return "files lacks rows, of which there is one file at least"
        read = manifest.get("counts", {}).get("read", 0)
        if type(read) is not int or read < 0:
            return f"counts.read is {read!r}, expected a whole number"
        # A manifest may come from anywhere: its names must not lead out of the folder.
        for name, record in manifest["files"].items():
            if Path(name).name != name or not _is_record(record, manifest["complete"]):
                return f"files[{name!r}] is {record!r}, expected rows, bytes and checksum"
        return kind(manifest)
    except FileNotFoundError:
        return "is missing: the folder is none that pack wrote"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"cannot be read: {type(error).__name__}: {error}"


def _is_record(record: dict[str, Any], complete: bool) -> bool:
    """Return whether this is what a manifest has of a file."""
    kinds = {"rows": int, "bytes": int, files.CHECKSUM: str}
    # While a build goes on, a file has its rejects beside it, for example.
    names = record.keys() if complete else record.keys() - set(NOTES)
    return names == kinds.keys() and all(type(record[name]) is kinds[name] for name in kinds)


def sidecar_problems(folder: Path, manifest: dict[str, Any], found: FoundRows) -> Iterator[Problem]:
    """Yield how the files that `datasets` opens the folder by differ from those of a build."""
    try:
        opened = datasets.load_from_disk(str(folder))
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        info = DatasetInfo.from_directory(str(folder))
    except Exception as error:  # noqa: BLE001 whatever a damaged sidecar makes it raise
        yield Problem(f"{STATE}, {INFO}", f"do not open: {error}")
        return
    if not isinstance(opened, Dataset):
        yield Problem(STATE, "opens no packed rows")
        return
    digest = digest_of(record_of(manifest))
    expected = state_of(data_files(manifest), digest)
    if state.get("_fingerprint") != expected["_fingerprint"]:
        what = f"has the digest {digest[:16]}, expected {state.get('_fingerprint')!r} of {STATE}"
        yield Problem(MANIFEST, what)
        del expected["_fingerprint"]
    for name, value in expected.items():
        if not same_json(state.get(name), value):
            what = f"{name} is {short(state.get(name))}, expected {short(value)}"
            yield Problem(STATE, what)
    yield from _feature_problems(info, found)


def job_problems(folder: Path, manifest: dict[str, Any]) -> Iterator[Problem]:
    """Yield how what a build by windows has said it packs differs from what the manifest says."""
    if not os.path.lexists(folder / JOB):  # a link that leads nowhere is there, too
        return
    try:
        found = json.loads((folder / JOB).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        yield Problem(JOB, f"cannot be read: {error}")
        return
    if not isinstance(found, dict):
        yield Problem(JOB, f"is {short(found)}, expected an object")
        return
    record = record_of(manifest)
    unlike = {
        name for name in found.keys() & record.keys() if not same_json(found[name], record[name])
    }
    if differing := sorted(unlike | (found.keys() ^ record.keys())):
        yield Problem(JOB, f"says other {', '.join(differing)} than {MANIFEST}")


def _feature_problems(info: DatasetInfo, found: FoundRows) -> Iterator[Problem]:
    """Yield which files are of other columns than the first, and whether the sidecar is."""
    first = next(iter(found.schemas.values()))
    for name, kinds in found.schemas.items():
        # With the names of classes, which are metadata.
        if not kinds.equals(first, check_metadata=True):
            yield Problem(name, "has other features than the first file")
    try:
        features = Features.from_arrow_schema(first)
    except Exception as error:  # noqa: BLE001 whatever damaged metadata makes it raise
        yield Problem(next(iter(found.schemas)), f"has no features: {error}")
        return
    if info.features != features:
        yield Problem(INFO, f"has the features {info.features}, expected those of the files")
    elif info != DatasetInfo(features=features):
        yield Problem(INFO, "says more than the features of the files")
