"""The record of a folder of images: all that its bytes depend on. Its digest tells builds apart."""

from __future__ import annotations

from typing import Any

from packpipe.building.images import IMAGE_SECONDS, Images
from packpipe.images.pillow_settings import changed_settings
from packpipe.images.rules import pixel_rules
from packpipe.images.versions import decoder_versions
from packpipe.rows import schema


def record_of_images(images: Images) -> dict[str, Any]:
    """Return everything the bytes of the folder depend on."""
    pixel_rules(images.config)  # raises if they need a package that is not installed
    # Not num_workers, which changes no row; nor the limits on rejects, which every call checks for
    # itself.
    columns, changed = images.columns, changed_settings()
    seconds = float(images.image_seconds)
    return {
        "schema_version": schema.VERSION,
        **decoder_versions(images.config),
        "source_fingerprint": images.dataset._fingerprint,
        # A dataset's fingerprint knows the paths of files, not what they hold.
        "source_files": images.source.files_digest(),
        "image_column": columns.image,
        "label_column": columns.label,
        **({} if columns.weight is None else {"weight_column": columns.weight}),
        **_mask_record(images),
        "size_columns": None if columns.sizes is None else list(columns.sizes),
        "image_root": columns.root,
        "config": images.config.to_dict(),
        **images.key._asdict(),
        "materialized": images.materialize,
        # Rows have always held pixels, which goes without saying.
        **({"store": images.store} if images.encodes else {}),
        # It decides which images are too slow to be in a row. The usual one goes without saying, as
        # it always has; and nothing is decoded for rows without pixels.
        **({"image_seconds": seconds} if images.materialize and seconds != IMAGE_SECONDS else {}),
        # By which headers are read: a damaged file may have a place in the plan, and none in a row.
        **({"pillow_settings": changed} if changed else {}),
        **({} if images.texts is None else {"beside": images.texts.record}),
    }


def _mask_record(images: Images) -> dict[str, Any]:
    """Return what targets depend on; nothing without masks."""
    if images.masks is None:
        return {}
    source: Any = images.masks.read
    return {
        "mask_column": images.columns.mask,
        "targets": images.masks.rules._asdict(),
        "mask_files": source.files_digest(),
    }
