"""A small training on random rows; run as a process of its own, alone or on several ranks."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import packed
import pyarrow as pa
import torch
from two_ranks import one_of_two_ranks

from packpipe import PackConfig, PackedLoader
from packpipe.loading.ranks import rank_of_world
from packpipe.rows import schema
from packpipe.training.loop import TrainConfig, train

STEPS = 12


def table(num_rows=10):
    """A packed table of random pixels whose label is how bright they are."""
    rng = np.random.default_rng(0)
    lens = [[int(n) for n in rng.integers(1, 6, rng.integers(1, 4))] for _ in range(num_rows)]
    case = packed.RowSet(lens, seq_len=16, max_segments=4)
    labels = pa.array(rng.integers(0, packed.NUM_CLASSES, sum(map(len, lens))))
    rows = packed.rows_of(case, labels=labels)
    config = PackConfig(seq_len=16, patch_size=packed.PATCH_SIZE)
    return schema.rows_table(rows, schema.row_schema(config, pa.int64()))


def loader_of(batch_size=2, num_rows=10, **options):
    return PackedLoader(table(num_rows), batch_size, seed=3, max_segments=4, **options)


def validation_of(num_rows=7, batch_size=2, **options):
    """A loader of other rows than those that are trained on."""
    options = {"tail": "pad", "seed": 5, **options}
    return PackedLoader(table(num_rows), batch_size, max_segments=4, **options)


def model_of(dtype=torch.float32):
    return packed.model_of("auto", dtype)


def config_of(**options):
    return TrainConfig(**{"steps": STEPS, "learning_rate": 1e-2, "save_every": 2, **options})


def main(folder, batch_size="2", most="0", val_every="0"):
    """Train, on this rank if there are several, and say when each step is done.

    After most steps, unless that is 0, it waits to be killed, which is never too late then. Unless
    val_every is 0, it validates.
    """
    model = model_of(torch.float64 if "RANK" in os.environ else torch.float32)
    losses, measured = [], []
    options = {"val_every": int(val_every) or None}
    validate = validation_of(batch_size=int(batch_size)) if int(val_every) else None
    run = train(
        model,
        loader_of(int(batch_size)),
        config_of(**options),
        folder=folder,
        validate=validate,
    )
    for record in run:
        losses.append(record.loss)
        measured += [record.val_loss, record.val_accuracy, record.val_ece]
        sys.stdout.write(f"{record.step}\n")
        sys.stdout.flush()
        if len(losses) == int(most):
            time.sleep(600)
    if "RANK" in os.environ:
        rank, _ = rank_of_world()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
        (Path(folder) / f"rank-{rank}.json").write_text(json.dumps([losses, weights, measured]))


if __name__ == "__main__":
    with one_of_two_ranks() if "RANK" in os.environ else nullcontext():
        main(*sys.argv[1:])
