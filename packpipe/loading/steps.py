"""Steps: which packs every global batch of an epoch takes.

An order of packs is cut into global batches of batch_size · world_size packs. Rank r takes the
r-th part of each. So the parts of all ranks, one after the other, are the same global batch at any
world size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.packing.equal_steps import balance_steps
from packpipe.philox import Key

TAILS = ("drop", "pad", "error")
NO_PACK = -1


def num_steps(num_packs: int, global_batch: int, tail: str) -> int:
    """Return the number of steps of an epoch.

    Raises:
        ValueError: the packs do not fill the last step, with ``tail="error"``; or, with "drop", not
            even one.
    """
    if tail == "error" and num_packs % global_batch:
        remedy = "choose another batch size, or tail='drop' or 'pad'"
        expected = f"a multiple of {global_batch} (batch_size times world_size)"
        raise ValueError(checks.sentence("num_packs", num_packs, expected, remedy))
    # Epochs without a step end at once: a training for some number of steps would never end.
    if tail == "drop" and 0 < num_packs < global_batch:
        expected = f"{global_batch} (batch_size times world_size) or more"
        remedy = "choose a smaller batch, or tail='pad'"
        raise ValueError(checks.sentence("num_packs", num_packs, expected, remedy))
    return -(-num_packs // global_batch) if tail == "pad" else num_packs // global_batch


def step_packs(
    num_packs: int,
    work: NDArray[np.int64] | None,
    global_batch: int,
    tail: str,
    key: Key,
) -> NDArray[np.int64]:
    """Return int64[steps, global_batch], places in the order of packs; -1 is no pack.

    Args:
        num_packs: packs of the epoch.
        work: int64[packs], to put packs of like work into the same step (`balance_steps`); None
            leaves them in order.
        global_batch: packs of a step, over all ranks.
        tail: what happens to packs that do not fill a step: ``"drop"`` leaves them out, ``"pad"``
            spreads them over a last step that has places without a pack.
        key: (seed, epoch) of the shuffled steps, with work.
    """
    steps = num_steps(num_packs, global_batch, tail)
    order = np.arange(num_packs)
    if work is not None:
        # Without shuffle, packs change places within windows only: their order may follow the
        # training's progress.
        order = balance_steps(work, global_batch, shuffle=False, **key._asdict()).order
    rest = num_packs % global_batch
    if tail == "pad" and rest:
        # Spread over the step, so that the ranks' shares differ by one pack at most.
        last = np.full(global_batch, NO_PACK)
        last[even_places(rest, global_batch)] = order[num_packs - rest :]
        order = np.concatenate([order[: num_packs - rest], last])
    return order[: steps * global_batch].reshape(steps, global_batch)


def even_places(num_packs: int, global_batch: int) -> NDArray[np.int64]:
    """Return int64[num_packs], places of packs that are spread evenly over the ranks of a step."""
    return np.arange(num_packs) * global_batch // num_packs
