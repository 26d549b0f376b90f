"""The records of a training for TensorBoard, or for Weights & Biases, as they come.

Each is a block that gives a function of a record, since the loop is the caller's own::

    with to_tensorboard("run/tensorboard") as track:
        for record in train(model, loader, config, folder="run"):
            track(record)

Of several ranks one alone does so. A training that goes on from a checkpoint repeats the steps
since then: TensorBoard shows the later records of them, W&B keeps the earlier ones, and says so.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from packpipe.durable import write_bytes
from packpipe.training.figures import Record

Track: TypeAlias = Callable[[Record], None]
_WANDB_ID = "wandb-id"


@contextmanager
def to_tensorboard(folder: Path | str) -> Iterator[Track]:
    """Give a function that writes a record into a folder, for ``tensorboard --logdir``.

    Raises:
        ValueError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        message = "tensorboard is not installed; pip install 'packpipe[tensorboard]'"
        raise ValueError(message) from error
    writers: list[Any] = []

    def track(record: Record) -> None:
        if not writers:  # what was written of this step and later ones is shown no more
            writers.append(SummaryWriter(str(folder), purge_step=record.step))
        for name, value in _figures(record).items():
            writers[0].add_scalar(name, value, record.step)

    try:
        yield track
    finally:
        for writer in writers:
            writer.close()


@contextmanager
def to_wandb(folder: Path | str, project: str, **options: Any) -> Iterator[Track]:
    """Give a function that logs a record to a run of Weights & Biases.

    Args:
        folder: keeps the run's id, so that a training that goes on goes on in it.
        project: its project.
        **options: of ``wandb.init``, such as ``config={"steps": 1000}``.

    Raises:
        ValueError: wandb is not installed.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError("wandb is not installed; pip install wandb") from error
    path = Path(folder) / _WANDB_ID
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, uuid.uuid4().hex.encode())
    own: dict[str, Any] = {
        "project": project,
        "id": path.read_text(),
        "resume": "allow",
        "dir": str(folder),
        "allow_val_change": True,  # a training may go on with other options
    }
    # As a block it ends the run, as failed after an error.
    with wandb.init(**{**own, **options}) as run:

        def track(record: Record) -> None:
            run.log(_figures(record), step=record.step)

        yield track


def _figures(record: Record) -> dict[str, float]:
    """Return what was measured, by name."""
    return {
        name: value
        for name, value in asdict(record).items()
        if name != "step" and value is not None
    }
