"""Fills the next batches in worker processes while earlier ones are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.images.decode import pixel_rules
from packpipe.images.fill import Failure
from packpipe.images.opening import ImageData
from packpipe.images.pool import Decoders, RowOrders
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.rows.fill_images import (
    fill_rows,
    filled_rows,
    planned_segments,
    planned_tokens,
    row_orders,
)
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows, Segments

# Batches in memory: one that is written, one that is filled, and one that waits, so that no
# process is ever idle.
_BATCHES = 3
# Tokens of a task: so many that passing it on costs nothing, so few that all processes end
# together.
_TASK_TOKENS = 8192


def filled_ahead(
    plan: EpochPlan,
    batches: Sequence[range],
    labels: pa.Array | None,
    read_image: Callable[[int], ImageData],
    *,
    num_workers: int,
    seconds: float,
) -> Generator[tuple[Rows, list[Reject]], None, None]:
    """Yield the rows of each batch of packs, and the images that could not be decoded.

    With processes the next batches are filled meanwhile, and the patches of one are overwritten
    once another is asked for.

    Args:
        plan: the plan.
        batches: which of its packs.
        labels: one value a source row, or None.
        read_image: source row to the image.
        num_workers: processes that decode; 0 decodes here.
        seconds: processor time that an image may take in a process.

    Raises:
        ValueError: an image's size is not the planned one; names the example and both sizes.
    """
    config, key = plan.config, {"seed": plan.seed, "epoch": plan.epoch}
    if num_workers == 0 or not batches:
        for packs in batches:
            yield fill_rows(planned_segments(plan, packs, labels), read_image, config, **key)
        return
    most = max(map(len, batches))
    shape = (config.seq_len, config.patch_bytes)
    rules = pixel_rules(config)
    with Decoders(num_workers, _BATCHES * most, shape, rules, seconds) as decoders:
        waiting: deque[_Batch] = deque()
        for number, packs in enumerate(batches):
            segments = planned_segments(plan, packs, labels)
            tokens = planned_tokens(segments, **key)
            first = number % _BATCHES * most
            orders = [
                RowOrders(row, some)
                for row, some in enumerate(row_orders(segments, tokens, read_image), first)
            ]
            step = max(1, _TASK_TOKENS // config.seq_len)
            tasks = [
                decoders.submit(orders[start : start + step])
                for start in range(0, len(orders), step)
            ]
            patches = decoders.rows[first : first + len(packs)]
            waiting.append(_Batch(segments, tokens, patches, tasks))
            if len(waiting) == _BATCHES:
                yield waiting.popleft().filled()
        while waiting:
            yield waiting.popleft().filled()


class _Batch(NamedTuple):
    """Rows that are being filled."""

    segments: Segments
    tokens: NDArray[np.int32]
    patches: NDArray[np.uint8]
    tasks: list[Future[list[list[Failure | None]]]]

    def filled(self) -> tuple[Rows, list[Reject]]:
        outcomes = [row for task in self.tasks for row in task.result()]
        return filled_rows(self.segments, self.tokens, self.patches, outcomes)
