"""Makes the `Job` of images: headers are read, rows are planned, then images are decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from numpy.typing import NDArray

from packpipe import checks
from packpipe.building.job import FilledRows, Job, PlannedRows
from packpipe.images.decode import pixel_rules
from packpipe.images.image_data import ImageData
from packpipe.images.pillow_settings import changed_settings, check_limit, check_settings
from packpipe.images.versions import decoder_versions
from packpipe.philox import Key
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch
from packpipe.rows import schema
from packpipe.rows.encoded import ENCODED, PIXELS
from packpipe.rows.encoded_rows import decoding
from packpipe.rows.fill_ahead import filled_ahead
from packpipe.rows.fill_images import Masks, planned_images
from packpipe.rows.kept_images import KeptImages
from packpipe.rows.rejects import Reject
from packpipe.rows.to_arrow import rows_table
from packpipe.sources.features import packed_features
from packpipe.sources.image_columns import ImageColumns, target_rules_of
from packpipe.sources.image_source import ImageSource
from packpipe.sources.kinds import pixel_type
from packpipe.sources.labels import Labels, Weights, labels_of, weights_of
from packpipe.sources.lazy_rows import LazyRows
from packpipe.sources.sizes import forgetting_wrong_sizes, sizes_of
from packpipe.sources.survey import Sizes, survey

# Processor time that decoding an image may take, if the caller does not say.
IMAGE_SECONDS = 60.0


def checked_resources(num_workers: Any, image_seconds: Any) -> tuple[int, float]:
    """Return how many processes decode, and the processor time of an image, checked."""
    remedy = "0 decodes in this process"
    number = checks.whole_number("num_workers", num_workers, 0, 1024, remedy)
    return number, checks.positive_number("image_seconds", image_seconds, "60 is usual")


@dataclass(frozen=True, eq=False)
class PairedTexts:
    """The texts that `pack_pairs` packs beside the images, in rows of their own.

    Attributes:
        lens: int64[source rows], tokens of each text.
        seq_len: most text tokens of a pack.
        rejects: examples without a text that can be packed.
        record: everything that the fields above depend on.
    """

    lens: NDArray[np.int64]
    seq_len: int
    rejects: list[Reject]
    record: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Images:
    """The images to pack, and the options to pack them with.

    Attributes:
        dataset: the source.
        columns: its columns of images, labels and sizes, and the folder of its paths.
        config, key: what the plan is made from.
        materialize: whether pixels are stored; else they are computed when rows are read.
        num_workers: processes that decode; 0 decodes in this one. The rows do not depend on it.
        image_seconds: processor time that decoding an image may take in such a process.
        texts: the texts packed beside the images; None without texts.
        store: what rows hold of their images, ``"pixels"`` or ``"encoded"``.
    """

    dataset: Dataset
    columns: ImageColumns
    config: PackConfig
    key: Key
    materialize: bool = True
    num_workers: int = 0
    image_seconds: float = IMAGE_SECONDS
    texts: PairedTexts | None = None
    store: str = PIXELS

    def __post_init__(self) -> None:
        if self.encodes:
            self._check_encodes()

    def _check_encodes(self) -> None:
        """Raise if rows cannot hold these images as they are encoded."""
        pixels = pixel_type(self.dataset.features[self.columns.image])
        refused = {
            "materialize=False, which stores no images": not self.materialize,
            "mask_column, whose targets are made with the pixels": self.columns.mask is not None,
            f"arrays of {pixels} pixels, which are not encoded": pixels is not None,
        }
        for what, is_so in refused.items():
            if is_so:
                raise ValueError(checks.sentence("store", self.store, repr(PIXELS), f"of {what}"))

    @property
    def encodes(self) -> bool:
        """Whether rows hold the encoded images, decoded once while they are packed."""
        return self.store == ENCODED

    @property
    def stores_pixels(self) -> bool:
        """Whether rows hold the pixels of their images."""
        return self.materialize and not self.encodes

    @cached_property
    def source(self) -> ImageSource:
        """The images by row number."""
        rows = self.dataset.select_columns([self.columns.image]).with_format("arrow")
        return ImageSource(rows, self.columns.root)

    @cached_property
    def labels(self) -> Labels | None:
        """The labels by row number, or None."""
        return labels_of(self.dataset, self.columns.label)

    @cached_property
    def weights(self) -> Weights | None:
        """What each row counts in the loss, or None."""
        return weights_of(self.dataset, self.columns.weight)

    @cached_property
    def masks(self) -> Masks | None:
        """The masks by row number, and how they become targets; None without any."""
        columns = self.columns
        rules = target_rules_of(
            self.dataset.features, columns.mask, columns.target_stride, self.config.patch_size
        )
        if rules is None:
            return None
        if not self.materialize:
            expected, remedy = "True with mask_column", "EpochPacks makes rows when they are read"
            raise ValueError(checks.sentence("materialize", False, expected, remedy))
        rows = self.dataset.select_columns([self.columns.mask]).with_format("arrow")
        return Masks(ImageSource(rows, self.columns.root), rules)

    def check_pillow(self) -> None:
        """Raise if Pillow, as it is set here, would take other images than a build does."""
        check_limit(self.config.max_pixels)
        # Worker processes do not inherit what a script has set in Pillow.
        if self.materialize and self.num_workers == 0:
            check_settings()

    @property
    def label(self) -> Any:
        """Feature of the stored labels, or None."""
        return None if self.labels is None else self.labels.feature

    @property
    def features(self) -> Features:
        """Features of the stored rows."""
        weighted = self.columns.weight is not None
        targets = None if self.masks is None else self.masks.rules
        return packed_features(
            self.config,
            self.label,
            tokens=self.stores_pixels,
            encoded=self.encodes,
            weighted=weighted,
            targets=targets,
        )


def image_job(images: Images) -> Job:
    """Return the job of packing images; its plan reads every header that is not known yet."""

    # Both `pack_pairs` and `Build` ask for the plan, which reads the headers.
    @cache
    def plan() -> PlannedRows:
        config = images.config
        images.check_pillow()
        with ThreadPoolExecutor(max(1, images.num_workers)) as executor:
            sizes = sizes_of(
                images.dataset,
                images.source,
                images.columns.sizes,
                max_pixels=config.max_pixels,
                executor=executor,
            )
        return plan_images(images, sizes)

    def opened(rows: Dataset, on_error: str) -> Dataset:
        if images.materialize:
            return decoding(rows)
        weighted = images.columns.weight is not None
        lazily = LazyRows(
            images.source, images.config, images.key, images.label, on_error, weighted
        )
        return rows.with_transform(lazily)

    return Job(
        record=cache(partial(record_of_images, images)),
        features=images.features,
        num_examples=len(images.dataset),
        plan=plan,
        opened=opened,
    )


def plan_images(
    images: Images,
    sizes: Sizes,
    numbers: NDArray[np.int64] | None = None,
    first_pack: int = 0,
) -> PlannedRows:
    """Return the planned rows of images, not filled yet.

    Args:
        images: the images to pack.
        sizes: the sizes of all its images.
        numbers: int64[examples], the ``example_index`` of each, by which its random choices are
            drawn, for a dataset that is a part of another one; None numbers from 0.
        first_pack: number of the first pack, by which the order of packs is drawn.
    """
    config, texts = images.config, images.texts
    values = [values for values in (images.labels, images.weights) if values is not None]
    found = survey(sizes, [reject for value in values for reject in value.rejects])
    also = None
    if texts is not None:
        found = found.without(texts.rejects)
        also = texts.lens[found.index], texts.seq_len
    read: Callable[[int], ImageData] = images.source
    masks = images.masks
    index, rejects = found.index, found.rejects
    if numbers is not None:
        index = numbers[index]
        rejects = [r._replace(example_index=int(numbers[r.example_index])) for r in rejects]
        read = _by_number(images.source, index, found.index)
        if masks is not None:
            masks = masks._replace(read=_by_number(masks.read, index, found.index))
    plan = plan_epoch(
        found.image_hw,
        config,
        **images.key._asdict(),
        index=index,
        also=also,
        first_pack=first_pack,
    )
    labels = None if images.labels is None else images.labels.values.take(pa.array(found.index))
    weight = None if images.weights is None else images.weights.values[found.index]
    # Beside the patches, 8 bytes a token: an int32 of segment_ids and two int16 of coords.
    pixels = config.row_bytes + config.seq_len * 8 if images.stores_pixels else 0
    if masks is not None:
        pixels += masks.padding(1, config).nbytes
    more = schema.sometimes_of(config, weighted=weight is not None)
    row_size = pixels + (5 + len(more)) * 4  # and one offset of each of five to eight lists
    # Length, grid, size, index, (a guess) label; box, and view and weight.
    segment_size = 4 + 4 + 8 + 8 + 8 + 16 * ("box" in more) + 4 * len({*more} - {"box"})
    image_bytes = np.zeros(len(plan), np.int64)
    if images.encodes:
        segment_size += 16  # where the image ends, and its checksum
        image_bytes = _image_bytes(plan, images.source.num_bytes()[found.index])
    stored = row_size + segment_size * (len(plan.order) // max(1, len(plan)))
    each = f" of {config.num_views} views" if config.num_views > 1 else ""
    return PlannedRows(
        plan=plan,
        rejects=rejects,
        unit="image",
        what=f"{len(index):,} images{each} in {len(plan):,} rows",
        cut_size=config.row_bytes if images.stores_pixels else stored,
        row_size=row_size,
        segment_size=segment_size,
        varying_sizes=image_bytes,
        fill_size=config.row_bytes if images.encodes else 0,
        fill=partial(_fill, images, plan, labels, weight, read, masks),
        counts=partial(_counts, images, plan, found.broken_exif),
        facts=partial(_facts, plan),
    )


def _image_bytes(plan: EpochPlan, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return int64[packs], about how many bytes of encoded images each holds.

    Args:
        plan: the plan.
        sizes: int64[images of the plan], bytes of each; below 0 if nobody knows them.
    """
    # Of files on other machines: two bits a pixel are those of a good JPEG.
    guessed = plan.image_hw.astype(np.int64).prod(axis=1) // 4
    known = np.where(sizes < 0, guessed, sizes)[plan.order // plan.config.num_views]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(known)])
    return np.diff(ends[plan.offsets])


def _by_number(
    source: Callable[[int], ImageData], numbers: NDArray[np.int64], rows: NDArray[np.int64]
) -> Callable[[int], ImageData]:
    """Return a function that reads an image by its number instead of its row."""
    row_of = dict(zip(numbers.tolist(), rows.tolist(), strict=True))
    return lambda number: source(row_of[number])


def _fill(
    images: Images,
    plan: EpochPlan,
    labels: pa.Array | None,
    weight: NDArray[np.float32] | None,
    read: Callable[[int], ImageData],
    masks: Masks | None,
    packs: list[range],
) -> Generator[FilledRows, None, None]:
    """Yield the rows of each range of packs."""
    stored = images.features.arrow_schema
    if not images.materialize:
        for some in packs:
            planned = planned_images(plan, some, labels, weight)
            table = rows_table(planned, stored)
            yield FilledRows(table, [], len(planned.seq_lens), Counter())
        return
    kept = KeptImages(read, _views(plan, packs))
    filled = filled_ahead(
        plan,
        packs,
        labels,
        kept if images.encodes else read,
        weight=weight,
        masks=masks,
        num_workers=images.num_workers,
        seconds=images.image_seconds,
    )
    # Closed also when the build stops in between, which ends the worker processes.
    with forgetting_wrong_sizes(images.source, images.config.max_pixels), closing(filled):
        for rows, failed, flags in filled:
            num_images = len(rows.seq_lens) + len(failed)
            found = Counter(flags.values())
            held = kept.beside(rows, failed) if images.encodes else rows
            yield FilledRows(rows_table(held, stored), failed, num_images, found)


def _views(plan: EpochPlan, packs: list[range]) -> Iterator[int]:
    """Yield which view each segment of ranges of packs is, in their order."""
    for some in packs:
        members = plan.order[plan.offsets[some.start] : plan.offsets[some.stop]]
        yield from (members % plan.config.num_views).tolist()


def _counts(
    images: Images,
    plan: EpochPlan,
    broken_exif: int,
    rejects: list[Reject],
    flags: Counter[str] | None,
) -> dict[str, int]:
    """Return the manifest's counts; an image that failed when decoded gave no tokens."""
    views = plan.config.num_views
    lost = [(one.example_index, one.view) for one in rejects if one.stage == "decode"]
    first = {example: at * views for at, example in enumerate(plan.index.tolist())} if lost else {}
    segments = [first[example] + view for example, view in lost]
    # Profiles are read with the pixels; rows without them, or with colours as they are, count none.
    found = flags if images.materialize and images.config.profiles != "ignore" else None
    return {
        "shrunk": plan.num_shrunk,
        "broken_exif": broken_exif,
        **({} if found is None else {"broken_profile": found["broken profile"]}),
        "packs": len(plan),
        "bound": plan.quality.bound,
        "tokens": plan.quality.num_tokens - int(plan.seq_lens[segments].sum()),
        **({} if views == 1 else {"segments": len(plan.order) - len(lost)}),
    }


def _facts(plan: EpochPlan, rejects: list[Reject]) -> dict[str, Any]:
    """Return (example, height, width) of the images that the plan holds and no row does.

    With them a folder says the sizes of all that was planned, so its plan can be made again.
    """
    lost = np.isin(plan.index, [one.example_index for one in rejects if one.stage == "decode"])
    return {"undecoded": np.column_stack([plan.index, plan.image_hw])[lost].tolist()}


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
