"""Opens the dataset that a packed folder was made of, as ``packpipe pack`` opened it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from packpipe import checks
from packpipe.cli.open_source import open_source
from packpipe.cli.path_tables import with_labels

if TYPE_CHECKING:
    from datasets import Dataset


def source_to_pack(source: str, split: str, columns: dict[str, str], *, tokens: bool) -> Dataset:
    """Return what ``pack`` packs: as `open_source` does, and labels that are found are no texts.

    Texts become classes, named and sorted by their value. A column of labels that is named is
    stored as it is.

    Args:
        source: the dataset, as `open_source` takes it.
        split: its split.
        columns: the names ``image_column`` and ``label_column``, or ``"auto"``.
        tokens: whether columns of tokens are asked for, whatever images lie beside them.
    """
    from packpipe.sources.columns import AskedColumns
    from packpipe.sources.image_columns import label_column_of

    named: dict[str, Any] = columns
    found = open_source(source, split, **named)
    if tokens or columns["label_column"] != "auto" or AskedColumns().hold_tokens(found.features):
        return found
    return _with_classes(found, label_column_of(found.features, "auto"))


def packed_source(
    manifest: dict[str, Any],
    source: str,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
) -> Dataset:
    """Return what a folder was packed of, as far as the options of a command name it.

    Args:
        manifest: of the folder; an empty one if it is broken.
        source: the dataset, as `open_source` takes it.
        split: its split; None is ``"train"``.
        image_column: its column of images, or of their paths; None finds it.
        label_column: that of labels; None finds it, ``"none"`` is none.
    """
    columns: dict[str, Any]
    columns = {"image_column": image_column or "auto", "label_column": label_column or "auto"}
    found = open_source(source, split or "train", **columns)
    # Texts that were stored are of a column that was named: by the caller, or to pack by windows.
    as_named = _is_source(manifest, found) or "windows" in manifest
    if label_column is not None or as_named:
        return found
    return _with_classes(found, manifest.get("label_column"))


def check_source(manifest: dict[str, Any], dataset: Dataset) -> None:
    """Raise ValueError if a folder was not packed of this dataset, whose files would be others."""
    remedy = "pass it as it was packed, --split and columns too; or leave --source out"
    read = manifest["counts"]["read"]
    if len(dataset) != read:
        what, expected = f"{len(dataset)} examples", f"the {read} that were packed"
        raise ValueError(checks.sentence("--source", what, expected, remedy))
    if not _is_source(manifest, dataset):
        expected = f"{manifest['source_fingerprint']!r}, that of what was packed"
        what = "fingerprint of --source"
        raise ValueError(checks.sentence(what, dataset._fingerprint, expected, remedy))


def check_names_source(source: str | None, **options: str | None) -> None:
    """Raise ValueError if an option says what SOURCE is, and there is none."""
    for name, value in options.items():
        if source is None and value is not None:
            expected, remedy = "left out without --source", "pass what was packed as --source"
            option = f"--{name.replace('_', '-')}"
            raise ValueError(checks.sentence(option, value, expected, remedy))


def _is_source(manifest: dict[str, Any], dataset: Dataset) -> bool:
    return bool(manifest.get("source_fingerprint") == dataset._fingerprint)


def _with_classes(dataset: Dataset, label: str | None) -> Dataset:
    """Return a dataset whose labels, if they are texts, are classes; label names their column."""
    import datasets

    from packpipe.sources.kinds import is_text

    if label is None or not is_text(dataset.features.get(label)):
        return dataset
    found = with_labels(dataset, label, stripped=False, texts=False)
    # The same in every process, so that a build that was stopped goes on.
    digest = hashlib.sha256(f"{dataset._fingerprint} {label}".encode()).hexdigest()
    return datasets.Dataset(found.data, found.info, fingerprint=digest[:16])
