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

from packpipe import Augment, PackConfig, PackedLoader
from packpipe.loading.ranks import rank_of_world
from packpipe.rows import schema
from packpipe.rows.to_arrow import rows_table
from packpipe.training.loop import TrainConfig, train
from packpipe.training.losses import LOSSES

STEPS = 12
# What a training may be asked for at once, all of which has to go on as it was.
EVERYTHING = {"accumulate": 2, "ema": 0.5, "drop_path": 0.4, "layer_decay": 0.8}
AUGMENT = Augment(flip=0.5, brightness=0.4, mixup=1, cutmix=1)


def table(num_rows=10):
    """A packed table of random pixels whose label is how bright they are."""
    rng = np.random.default_rng(0)
    lens = [[int(n) for n in rng.integers(1, 6, rng.integers(1, 4))] for _ in range(num_rows)]
    case = packed.RowSet(lens, seq_len=16, max_segments=4)
    labels = pa.array(rng.integers(0, packed.NUM_CLASSES, sum(map(len, lens))))
    rows = packed.rows_of(case, labels=labels)
    config = PackConfig(seq_len=16, patch_size=packed.PATCH_SIZE)
    return rows_table(rows, schema.row_schema(config, pa.int64()))


def loader_of(batch_size=2, num_rows=10, **options):
    return PackedLoader(table(num_rows), batch_size, seed=3, max_segments=4, **options)


def validation_of(num_rows=7, batch_size=2, **options):
    """A loader of other rows than those that are trained on."""
    options = {"tail": "pad", "seed": 5, **options}
    return PackedLoader(table(num_rows), batch_size, max_segments=4, **options)


def model_of(dtype=torch.float32):
    return packed.model_of("auto", dtype)


def config_of(**options):
    return TrainConfig(
        **{"steps": STEPS, "learning_rate": 1e-2, "save_every": 2, "log_every": 1, **options}
    )


def plainly_trained(batches, config, dtype=torch.float32, paths_of=None):
    """The losses and the model of a training in a plain loop, a list of batches a step."""
    model, losses = model_of(dtype), []
    groups = plain_groups(model, config)
    optimizer = torch.optim.AdamW(groups, fused=True)
    for step, taken in enumerate(batches):
        learned = [group["params"][0] for group in groups]
        for parameter in learned:
            parameter.grad = None
        for own, group in zip(optimizer.param_groups, groups, strict=True):
            own["lr"] = config.rate(step) * group["scale"]
        images = sum(int(batch.present.sum()) for batch in taken)
        loss = sum(
            LOSSES[config.loss](
                model(batch) if paths_of is None else model(batch, paths_of(batch)),
                batch.labels,
                partners=batch.partners,
                count=torch.tensor(images),
            )
            for batch in taken
        )
        loss.backward()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(learned, config.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


def plain_groups(model, config):
    """A group for every parameter that is trained, by its name."""
    groups = []
    for name, parameter in model.named_parameters():
        layer = {"embed": 0, "position": 0}.get(name.split(".")[0], model.config.depth + 1)
        if name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        if config.freeze and layer <= config.freeze:
            continue
        is_matrix = parameter.ndim == 2 and name.split(".")[-1] == "weight"
        decay = config.weight_decay if is_matrix else 0.0
        groups.append(
            {
                "params": [parameter],
                "weight_decay": config.head_weight_decay if name == "head.weight" else decay,
                "scale": config.layer_decay ** (model.config.depth + 1 - layer),
            }
        )
    return groups


def largest_difference(one, other):
    """Of the weights of two models."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def main(folder, batch_size="2", most="0", val_every="0", freeze=0):
    """Train, on this rank if there are several, and say when each step is done.

    After most steps, unless that is 0, it waits to be killed, which is never too late then. Unless
    val_every is 0, it validates, augments and does everything else, too.
    """
    model = model_of(torch.float64 if "RANK" in os.environ else torch.float32)
    losses, measured = [], []
    options, augment, validate = {}, None, None
    if int(val_every):
        options, augment = {"val_every": int(val_every), **EVERYTHING, "freeze": freeze}, AUGMENT
        validate = validation_of(batch_size=int(batch_size))
    run = train(
        model,
        loader_of(int(batch_size), augment=augment),
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
