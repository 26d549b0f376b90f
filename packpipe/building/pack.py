"""`pack`: images or token sequences in, a dataset of packed rows out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from datasets import Dataset

from packpipe import checks
from packpipe.building.build import Build, read_rejects
from packpipe.building.image_job import image_job
from packpipe.building.images import IMAGE_SECONDS, Images, checked_resources
from packpipe.building.job import Job
from packpipe.building.pack_files import files_build, pack_files
from packpipe.building.shards import MANIFEST, REJECTS, read_manifest, tidy
from packpipe.building.token_job import Sequences, token_job
from packpipe.philox import checked_key
from packpipe.planning.image_config import config_from
from packpipe.planning.token_config import token_config_from
from packpipe.rows.encoded import PIXELS, checked_store
from packpipe.rows.rejects import Tolerance, tolerance_of
from packpipe.sources.columns import AskedColumns, Options, check_dataset
from packpipe.sources.image_files import ImageFiles


def pack(
    dataset: Dataset | ImageFiles,
    seq_len: int = 1024,
    *,
    image_column: str = "auto",
    label_column: str | None = "auto",
    weight_column: str | None = None,
    mask_column: str | None = None,
    target_stride: int | None = None,
    size_columns: tuple[str, str] | None = None,
    image_root: str | Path | None = None,
    token_columns: str | Sequence[str] = "auto",
    value_columns: str | Sequence[str] = "auto",
    seed: int = 0,
    epoch: int = 0,
    output: str | Path | None = None,
    materialize: bool = True,
    store: str = PIXELS,
    num_workers: int = 1,
    image_seconds: float = IMAGE_SECONDS,
    on_error: str = "quarantine",
    max_bad_fraction: float = 0.01,
    max_consecutive_bad: int = 100,
    progress: bool = True,
    window_rows: int | None = None,
    executor: Any = None,
    output_options: dict[str, Any] | None = None,
    **options: Unpack[Options],
) -> Dataset:
    """Pack images, or token sequences, into rows of exactly seq_len tokens: memory-mapped Arrow.

    Every example is in exactly one row, or in `rejects` with its reason. The rows depend on the
    sizes or lengths, the options, seed and epoch; never on num_workers. Called again with the same
    arguments it returns the rows it has already written. With ``views=n`` each of the n views of an
    image is in one row; an image is in `rejects` if one of them cannot be decoded.

    A dataset without an image column, or with token_columns named, holds token sequences: all its
    lists of numbers (``input_ids``, ``labels`` and so on) are packed alike, and its other columns
    become lists of one value a segment. Tokens at which ``attention_mask`` is 0 are padding of the
    source: they are left out of all lists and counted (``masked_tokens`` of the manifest), and what
    is left is the sequence; the mask itself is packed only if token_columns names it. A sequence
    without any token is in the rejects as "empty", but never bad.

    `ImageFiles` are packed by windows of whole blocks, each read once and packed by itself, on one
    machine or on many: see ``executor``. The rows depend on window_rows, too, and never on where
    they are made. A window that was written stays, whatever is stopped or killed; called again, by
    one driver or several at once, the job continues and ends in the same bytes. Labels are one
    value an image, rows have their pixels, and files that images lie in by path are taken to stay
    as they are.

    Args:
        dataset: a Dataset with an image column, whose encoded images are read undecoded; or with
            columns of tokens. It may have no transform, which would be ignored. Or `ImageFiles`.
        seq_len: tokens a row holds, 1..32767; for token sequences 1..2**24.
        image_column: name of the column of images; ``"auto"`` finds the only one, but for columns
            of bytes beside ``input_ids``, which may be anything.
        label_column: name of the column of labels; ``"auto"`` takes ``label``, ``labels`` or the
            only ClassLabel there is, which must hold what a loader's batches do: integers, floats,
            or lists of as many numbers each, of which missing ones (null, NaN) are left out of
            losses. One that is named may hold anything, for `read_rows`; None leaves labels out.
        weight_column: name of the column of what each image counts in the loss, numbers of 0 or
            more; None is 1 for all.
        mask_column: name of the column of class maps, of the size of their images: PNG of one
            channel or with a palette, or arrays [height, width] of uint8 or uint16; PNG with
            classes above 255 in a column of ``Image(mode="I;16")``. They are
            cropped, resized (`packpipe.images.masks` says which pixel is taken) and divided as
            their images are, into a column ``targets``; 255 (of 16 bits 65535) is no class.
            An image whose mask is missing, of another size or broken is in `rejects`.
        target_stride: a target is the class of so many pixels squared of the planned image, which
            divide patch_size; None is one a patch.
        size_columns: names of the columns of upright heights and widths in pixels; None reads
            every header once and keeps the sizes beside the data.
        image_root: the only folder that paths in the dataset may lead into, for datasets that you
            do not trust; relative paths start there, and one with a scheme is rejected. None
            follows every path: one with a scheme that fsspec knows (``zip://``, ``s3://``,
            ``hf://``, ``https://``) is read by it, in this process, where ``memory://`` is known
            too. Files on other machines are taken to stay as they are. Of local files only regular
            ones are read.
        token_columns: names of the columns of tokens, of one length an example; ``"auto"`` takes
            all lists of numbers of a dataset without images.
        value_columns: names of the columns that go with each sequence; ``"auto"`` takes all others,
            of which ``labels`` must hold integers.
        seed: which permutation of images and rows.
        epoch: which of the seed's permutations. With a drop rate that changes over the training,
            the rows are those of this one epoch, in the order of the training.
        output: local folder to write; None is a folder of the `datasets` cache. It is written
            shard by shard, each whole or not at all. A build that was stopped, in whatever way,
            continues when called again and ends in the same bytes. One process at a time may write
            a folder. For ImageFiles also a URL, such as ``"s3://bucket/rows"``, which is opened
            with output_options.
        materialize: False writes the plan only and computes the same rows, byte for byte, each
            time they are read, from the images in ``dataset``. An image whose header is sound but
            whose pixels are not is then found when read, not listed in `rejects`.
        store: what rows hold of their images: their ``"pixels"``, 13 times as large as the JPEGs of
            the photographs measured; or ``"encoded"``, the files as they are, one for each view,
            which are decoded again whenever rows are read, to the same bytes, by the workers of a
            loader. A file of 2 GiB or more is then a reject. Either way every image is decoded
            once while it is packed, so that no row holds one that is bad. Encoded rows are opened
            by `pack` or ``datasets.load_from_disk``, where `PackedLoader` and `read_rows` take
            them as any others; they are read beside their manifest, so not joined, saved again or
            loaded with ``keep_in_memory``. Not for arrays of pixels or with mask_column.
        num_workers: processes that decode; 0 decodes in this process, where a codec that hangs
            or crashes cannot be stopped.
        image_seconds: processor time that decoding an image may take in such a process; an image
            that takes longer is rejected. A process that does not run at all for ten minutes,
            stopped or waiting for a file system that hangs, is ended (on Linux); its image is
            tried once more, then rejected.
        on_error: ``"quarantine"`` lists a bad image in `rejects`; ``"raise"`` allows none.
        max_bad_fraction: a larger share of rejects stops the build.
        max_consecutive_bad: this many rejects in a row stop the build.
        progress: show a progress bar (where `datasets` shows its own).
        window_rows: of ImageFiles, about how many images are planned together; None is 16,384. A
            machine holds the encoded images of each window that it builds.
        executor: of ImageFiles, what builds the windows: any ``concurrent.futures.Executor``, such
            as `RayExecutor` or a pool of processes, or a Dask client. Its machines must see the
            files and the output, and have the same versions of packpipe, Pillow and its codecs.
            None builds them here, one after the other.
        output_options: of ImageFiles, for fsspec, if output is a URL: credentials, for example.
            None are their storage_options if they have the scheme of output, else none.
        **options: the options of `PackConfig`: ``patch_size``, ``crop``, ``resolution``,
            ``max_tokens``, ``max_upscale``, ``drop_rate``, ``epochs``, ``fit_last``,
            ``fit_limit``, ``max_segments``, ``strategy``, ``window``, ``background``,
            ``reducing_gap``, ``downscale_filter``, ``upscale_filter``, ``max_pixels``,
            ``profiles``, ``damaged_scans``, ``value_range``, ``views``, ``views_together``,
            ``jpeg_edges``, ``prefix_tokens``, ``pixels``.
            For token sequences, those of `TokenConfig`: ``overflow``, ``layout``,
            ``pad_token_id``, ``mask_first_label``, ``max_segments``, ``strategy``, ``window``.

    Returns:
        Dataset: one row a pack, with the columns of `packpipe.rows.schema`; with
        ``materialize=False`` only the segment columns are stored. The plan is not made again for
        an image that cannot be decoded: it leaves padding at the end of its row, and a row of such
        images is all padding. None if output is a URL: the rows lie elsewhere.

    Raises:
        TypeError: dataset is no Dataset and no ImageFiles, or an argument has the wrong type.
        ValueError: an argument or column is wrong; a bad image with ``on_error="raise"``; an
            image whose size changed while it was packed; with num_workers=0, a setting of Pillow
            by which cut images would become rows (``LOAD_TRUNCATED_IMAGES``, ``MAX_TEXT_CHUNK``).
        TooManyRejects: a ValueError; too many images are bad. Names the first ones.
        FileExistsError: output holds something else, or another process is writing it.
        OSError: the rows do not fit on the disk; raised before any is written, if the plan's
            estimate is above the free space. Committed shards stay. Or an error of the machine
            while images are read, which the next image would meet as well: out of descriptors, or
            the storage cannot be reached. An error of one path is a reject.

    Source: NaViT 2.2, A.3; Ding 3.
    """
    asked: dict[str, Any] = {
        "image_column": image_column,
        "label_column": label_column,
        "weight_column": weight_column,
        "mask_column": mask_column,
        "target_stride": target_stride,
        "size_columns": size_columns,
        "image_root": image_root,
        "token_columns": token_columns,
        "value_columns": value_columns,
        "seed": seed,
        "epoch": epoch,
        "materialize": materialize,
        "store": store,
        "num_workers": num_workers,
        "image_seconds": image_seconds,
    }
    limits = on_error, max_bad_fraction, max_consecutive_bad
    if isinstance(dataset, ImageFiles):
        build = files_build(
            dataset,
            seq_len,
            dict(options),
            tolerance_of(len(dataset), *limits),
            output=output,
            output_options=output_options,
            window_rows=window_rows,
            **asked,
        )
        found = pack_files(build, executor=executor, progress=progress)
        return cast(Dataset, found)  # None of a URL alone: every other caller has rows
    check_dataset(dataset)
    of_files = {"window_rows": window_rows, "executor": executor, "output_options": output_options}
    for name, value in of_files.items():
        if value is not None:
            expected, remedy = "None for a Dataset", "pass packpipe.ImageFiles"
            raise ValueError(checks.sentence(name, value, expected, remedy))
    folder = None if output is None else checks.local_path("output", output)
    tolerance = tolerance_of(len(dataset), *limits)
    job = job_of(dataset, seq_len, dict(options), **asked)
    return build_or_open(job, folder, tolerance, on_error=on_error, progress=progress)


def job_of(
    dataset: Dataset,
    seq_len: int,
    options: dict[str, Any],
    *,
    seed: int = 0,
    epoch: int = 0,
    materialize: bool = True,
    store: str = PIXELS,
    num_workers: int = 1,
    image_seconds: float = IMAGE_SECONDS,
    **asked_columns: Any,
) -> Job:
    """Return the job that `pack` is asked for, its arguments checked.

    Nothing is read yet, but for the attention mask of tokens.

    Args:
        dataset: of images or token sequences.
        seq_len: tokens a row holds.
        options: of `PackConfig` or `TokenConfig`.
        seed: which permutation.
        epoch: which of the seed's permutations.
        materialize: whether images are stored.
        store: as what they are.
        num_workers: processes that decode.
        image_seconds: processor time that an image may take.
        **asked_columns: the fields of `AskedColumns`.
    """
    columns, key = AskedColumns(**asked_columns), checked_key(seed, epoch)
    num_workers, image_seconds = checked_resources(num_workers, image_seconds)
    materialize, store = checks.boolean("materialize", materialize), checked_store(store)
    if columns.hold_tokens(dataset.features):
        if not materialize:
            remedy = "leave it out, since rows of tokens are as small as their source"
            raise ValueError(checks.sentence("materialize", False, "True for tokens", remedy))
        if store != PIXELS:
            expected, remedy = f"{PIXELS!r} for tokens", "leave it out, since they have no images"
            raise ValueError(checks.sentence("store", store, expected, remedy))
        token_config = token_config_from(seq_len, options)
        of_tokens = columns.of_tokens(dataset, token_config)
        return token_job(Sequences(dataset, of_tokens, token_config, key))
    config = config_from(seq_len, options)
    of_images = columns.of_images(dataset)
    resources = num_workers, image_seconds
    return image_job(Images(dataset, of_images, config, key, materialize, *resources, store=store))


def build_or_open(
    job: Job,
    output: Path | None,
    tolerance: Tolerance,
    *,
    on_error: str,
    progress: bool,
) -> Dataset:
    """Return the rows of a job: opened if its folder is complete, else written first."""
    build = Build(job)
    target = build.cache_folder() if output is None else output.absolute()
    if build.is_at(target):
        tidy(target)
        # An earlier call may have allowed more rejects than this one.
        tolerance.check(read_rejects(target))
    else:
        # Processes that share the cache wait for each other; two that were given the same output
        # folder are more likely a mistake.
        build.make(target, tolerance=tolerance, progress=progress, wait=output is None)
    return build.open(target, on_error)


def manifest(packed: Dataset) -> dict[str, Any]:
    """Return the manifest of a dataset that `pack` returned: configuration, counts, checksums."""
    return read_manifest(_folder_of(packed))


def rejects(packed: Dataset) -> Dataset:
    """Return the source examples that are in no row: example_index, stage, reason, exception."""
    return Dataset.from_file(str(_folder_of(packed) / REJECTS))


def _folder_of(packed: Dataset) -> Path:
    folders = sorted({Path(file["filename"]).parent for file in packed.cache_files})
    if len(folders) != 1 or not (folders[0] / MANIFEST).is_file():
        expected = "one folder that packpipe.pack wrote"
        remedy = "ask each dataset that pack returned, before it is joined or saved elsewhere"
        raise ValueError(
            checks.sentence(
                "folders of packed", [str(folder) for folder in folders], expected, remedy
            )
        )
    return folders[0]
