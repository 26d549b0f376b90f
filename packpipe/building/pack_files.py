"""`pack` of `ImageFiles`: its arguments checked, its windows built on an executor."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from datasets import Dataset

from packpipe import checks
from packpipe.building.build import cache_folder_of, stored_rows
from packpipe.building.files_build import FilesBuild
from packpipe.building.image_record import record_of_images
from packpipe.building.images import IMAGE_SECONDS, Images, checked_resources
from packpipe.building.shards import digest_of
from packpipe.building.window_job import WindowJob
from packpipe.philox import checked_key
from packpipe.planning.block_windows import (
    block_windows,
    check_constant_drops,
    checked_window_rows,
    runs_of,
)
from packpipe.planning.image_config import config_from
from packpipe.rows import files
from packpipe.rows.encoded import PIXELS, checked_store
from packpipe.rows.encoded_rows import decoding
from packpipe.rows.rejects import Tolerance
from packpipe.sources.columns import AskedColumns
from packpipe.sources.file_columns import file_columns
from packpipe.sources.image_files import ImageFiles
from packpipe.storage.storage import LocalFolder, storage_at


def pack_files(build: FilesBuild, *, executor: Any = None, progress: bool = True) -> Dataset | None:
    """Build what is missing; return the rows, None if they lie on other machines.

    Args:
        build: of `files_build`.
        executor: builds windows, as `checked_executor` takes it.
        progress: whether to show a progress bar.
    """
    run_on = checked_executor(executor)
    if not build.claim():
        build.finish(build.run(run_on, progress=progress))
    storage = build.job.storage
    if not isinstance(storage, LocalFolder):
        return None
    found: Dataset = decoding(stored_rows(Path(storage.url)))
    return found


def files_build(
    source: ImageFiles,
    seq_len: int,
    options: dict[str, Any],
    tolerance: Tolerance,
    *,
    output: str | Path | None,
    output_options: dict[str, Any] | None = None,
    window_rows: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    materialize: bool = True,
    store: str = PIXELS,
    num_workers: int = 1,
    image_seconds: float = IMAGE_SECONDS,
    **asked_columns: Any,
) -> FilesBuild:
    """Return the build that `pack` is asked for, its arguments checked; nothing is written yet.

    Args:
        source: the images.
        seq_len: tokens a row holds.
        options: of `PackConfig`.
        tolerance: how many rejects there may be.
        output: a folder or a URL; None is a folder of the `datasets` cache.
        output_options: for fsspec; None are those of the source, if it has the same scheme.
        window_rows: about how many rows are planned together; None is `WINDOW_ROWS`.
        seed: which permutation.
        epoch: which of the seed's permutations.
        materialize: must be True.
        store: what rows hold of their images.
        num_workers: processes that decode, of each window that is being built.
        image_seconds: processor time that an image may take.
        **asked_columns: the fields of `AskedColumns`.
    """
    asked, key = AskedColumns(**asked_columns), checked_key(seed, epoch)
    resources = checked_resources(num_workers, image_seconds)
    if not checks.boolean("materialize", materialize):
        expected, remedy = "True for ImageFiles", "pass a Dataset to compute rows when read"
        raise ValueError(checks.sentence("materialize", materialize, expected, remedy))
    if asked.hold_tokens(source.features):
        expected, remedy = "a column of images", "pass a Dataset to pack tokens"
        raise ValueError(checks.sentence("columns", list(source.features), expected, remedy))
    config = config_from(seq_len, options)
    check_constant_drops(config)
    window_rows = checked_window_rows(window_rows)
    windows = block_windows(source.block_rows, window_rows, key)
    # A source without rows has the columns, and its digest is that of the files.
    none = source.reader.dataset(())
    columns = file_columns(source, asked)
    images = Images(none, columns, config, key, True, *resources, store=checked_store(store))
    of_images = record_of_images(images)
    blocks = {"rows": window_rows, "blocks": runs_of(source.block_rows)}
    record = {**of_images, "windows": blocks}
    digest = digest_of(record)
    where = cache_folder_of(digest) if output is None else output
    if output_options is None and _scheme(where) == _scheme(source.files[0]):
        output_options = source.storage_options
    job = WindowJob(
        reader=source.reader,
        images=images,
        storage=storage_at(where, output_options),
        record=of_images,
        digest=digest,
        tolerance=tolerance,
        file_bytes=files.FILE_BYTES,
        batch_bytes=files.BATCH_BYTES,
    )
    return FilesBuild(source, windows, job, record)


def checked_executor(executor: Any) -> Executor | None:
    """Return what runs windows: an Executor as it is, that of a Dask client, or None.

    Raises:
        TypeError: it is none of them.
    """
    if hasattr(executor, "get_executor"):
        # Dask would give the result of an earlier call of the same arguments, whose files may be
        # gone.
        executor = executor.get_executor(pure=False)
    if executor is None or isinstance(executor, Executor):
        return executor
    expected = "a concurrent.futures.Executor, a Dask client or None"
    remedy = "pass an instance, such as packpipe.RayExecutor()"
    raise TypeError(checks.sentence("executor", executor, expected, remedy))


def _scheme(where: str | Path) -> str:
    """Return the scheme of a URL, which its credentials are for; nothing of a path."""
    text = os.fspath(where)
    return text.partition(":")[0] if checks.has_scheme(text) else ""
