"""Makes the `Job` of images: headers are read, rows are planned, then images are decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from packpipe.building.image_record import record_of_images
from packpipe.building.images import Images
from packpipe.building.job import FilledRows, Job, PlannedRows
from packpipe.building.row_sizes import row_sizes
from packpipe.images.image_data import ImageData
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.plan import plan_epoch
from packpipe.rows.encoded_rows import decoding
from packpipe.rows.fill_ahead import filled_ahead
from packpipe.rows.fill_images import Masks, planned_images
from packpipe.rows.kept_images import KeptImages
from packpipe.rows.rejects import Reject
from packpipe.rows.to_arrow import rows_table
from packpipe.sources.labels import bad_values
from packpipe.sources.lazy_rows import LazyRows
from packpipe.sources.sizes import forgetting_wrong_sizes, sizes_of
from packpipe.sources.survey import Sizes, survey


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
    found = survey(sizes, bad_values(images.labels, images.weights))
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
    each = f" of {config.num_views} views" if config.num_views > 1 else ""
    of_rows = row_sizes(images, plan, found.index)
    return PlannedRows(
        plan=plan,
        rejects=rejects,
        unit="image",
        what=f"{len(index):,} images{each} in {len(plan):,} rows",
        cut_size=of_rows.cut_size,
        row_size=of_rows.row_size,
        segment_size=of_rows.segment_size,
        varying_sizes=of_rows.varying_sizes,
        fill_size=of_rows.fill_size,
        fill=partial(_fill, images, plan, labels, weight, read, masks),
        counts=partial(_counts, images, plan, found.broken_exif),
        facts=partial(_facts, plan),
    )


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
