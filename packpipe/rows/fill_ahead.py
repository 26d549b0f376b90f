"""Fills the next batches in worker processes while earlier ones are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.images.fill import Outcome
from packpipe.images.image_data import ImageData
from packpipe.images.pool import Decoders, RowTask
from packpipe.images.rules import pixel_rules
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.rows.fill_images import (
    Filled,
    Masks,
    fill_rows,
    filled_rows,
    planned_images,
    planned_tokens,
    row_tasks,
)
from packpipe.rows.rows import Rows

# Batches in memory: one that is written, one that is filled, and one that is next, so that the
# processes always have work.
_BATCHES = 3
# Tokens of a task: enough that sending it costs little, few enough that all processes finish a
# batch at about the same time.
_TASK_TOKENS = 8192


def filled_ahead(
    plan: EpochPlan,
    batches: Sequence[range],
    labels: pa.Array | None,
    read_image: Callable[[int], ImageData],
    *,
    weight: NDArray[np.float32] | None = None,
    masks: Masks | None = None,
    num_workers: int,
    seconds: float,
) -> Generator[Filled, None, None]:
    """Yield the rows of each batch of packs, and the images that could not be decoded.

    With processes, the next batches are filled while the caller uses one. The patches of a batch
    are overwritten after the caller asks for the next one.

    Args:
        plan: the plan.
        batches: the numbers of its packs, batch by batch.
        labels: one value an image of the plan, or None.
        read_image: returns the image of a source row.
        weight: one an image of the plan, or None.
        masks: those of the images, or None.
        num_workers: processes that decode; 0 decodes in this process.
        seconds: processor time that an image may take in a worker process.

    Raises:
        ValueError: an image's size is not the planned one; names the example and both sizes.
    """
    config, key = plan.config, plan.key
    if num_workers == 0 or not batches:
        for packs in batches:
            planned = planned_images(plan, packs, labels, weight)
            yield fill_rows(planned, read_image, config, key, masks=masks)
        return
    most = max(map(len, batches))
    shape = (config.seq_len, config.patch_bytes)
    rules = pixel_rules(config)
    targets = None if masks is None else masks.rules
    memory = _BATCHES * most
    with Decoders(num_workers, memory, shape, rules, seconds, targets=targets) as decoders:
        waiting: deque[_Batch] = deque()
        for number, packs in enumerate(batches):
            planned = planned_images(plan, packs, labels, weight)
            tokens = planned_tokens(planned, config, key)
            # Three parts of the shared memory, used in turn. This batch overwrites the one three
            # before it, which the caller no longer uses: it has asked for another one since.
            first = number % _BATCHES * most
            rows = [
                RowTask(row, images)
                for row, images in enumerate(row_tasks(planned, tokens, read_image, masks), first)
            ]
            step = max(1, _TASK_TOKENS // config.seq_len)
            tasks = [
                decoders.submit(rows[start : start + step]) for start in range(0, len(rows), step)
            ]
            own = slice(first, first + len(packs))
            cells = None if decoders.targets is None else decoders.targets[own]
            waiting.append(_Batch(planned, tokens, decoders.rows[own], tasks, cells))
            if len(waiting) == _BATCHES:
                yield waiting.popleft().filled()
        while waiting:
            yield waiting.popleft().filled()


class _Batch(NamedTuple):
    """A batch that processes are filling: its plan, its memory and one future a task."""

    planned: Rows
    tokens: NDArray[np.int32]
    patches: NDArray[np.uint8]
    tasks: list[Future[list[list[Outcome]]]]
    targets: NDArray[np.integer] | None

    def filled(self) -> Filled:
        outcomes = [row for task in self.tasks for row in task.result()]
        return filled_rows(self.planned, self.tokens, self.patches, outcomes, self.targets)
