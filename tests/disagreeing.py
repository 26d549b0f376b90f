"""Two ranks that disagree, each time in one thing: what each of them is told.

Run as one of two ranks. Since a start takes long, they also train as one, and on broken images, and
plan images whose sizes nobody knows yet.
"""

import fcntl
import json
import shutil
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import broken
import datasets
import learning
import pictures
import pyarrow as pa
import torch
from processes import wait_until
from two_ranks import one_of_two_ranks

from packpipe import Augment, EpochPacks, PackedLoader, PackedStream
from packpipe.loading.ranks import rank_of_world
from packpipe.loading.stored import StoredPacks
from packpipe.rows.rejects import TooManyRejects
from packpipe.sources import survey
from packpipe.training.loop import train

BROKEN_STEPS = 22
SIZES = [(16 * (1 + number), 48) for number in range(8)]
PLANNED_SEQ_LEN = 24
EACH = [{}, {}]  # what rank 0 and rank 1 are given


def go_through(rank, /, *, each=EACH, states=EACH, **options):
    """Go through a pass, each rank with options of its own and from a state of its own."""
    every = {"batch_size": 1, "max_segments": 4, **options}
    loader = PackedLoader(learning.table(), **{**every, **each[rank]})
    if states[rank]:
        loader.load_state_dict({**loader.state_dict(), **states[rank]})
    list(loader)


def go_on_to_other_epochs(rank):
    loader = learning.loader_of(1)
    list(loader)
    loader.set_epoch(1 + rank)
    list(loader)


def go_through_a_stream(rank):
    """Go through a stream, rank 0 from the state after two steps."""
    images = [pictures.encoded_image(64, 64, number) for number in range(8)]
    stream = pictures.dataset_of(images).to_iterable_dataset()
    packs = PackedStream(stream, 16, window=2)
    loader = PackedLoader(packs, 1)
    if rank == 0:
        alone = PackedLoader(packs, 2, rank=0, world_size=1)
        batches = iter(alone)
        next(batches), next(batches)
        loader.load_state_dict(alone.state_dict())
    list(loader)


def go_through_images(rank, folder):
    """Go through packs of one image each, of which rank 1 lacks the last file."""
    paths = [folder / f"{number}.png" for number in range(30)]
    for number, path in enumerate(paths[: 30 - rank]):
        path.write_bytes(pictures.encoded_image(64, 64, number))
    packs = EpochPacks(by_path(paths), 16, num_workers=1, max_bad_fraction=0.1)
    list(PackedLoader(packs, 1))


def by_path(paths):
    dataset = datasets.Dataset.from_dict({"image": list(map(str, paths))})
    return dataset.cast_column("image", datasets.Image())


def plan_images_of_unknown_sizes(rank, folder):
    """Return the plan's fingerprint, and how many headers this rank has read for it.

    The rank that reads them waits until the other one waits for it.
    """
    paths = [folder / f"{number}.png" for number in range(len(SIZES))]
    if rank == 0:
        folder.mkdir()
        for path, size in zip(paths, SIZES, strict=True):
            path.write_bytes(pictures.encoded_image(*size))
    torch.distributed.barrier()
    probe, flock, probed = survey.probe, fcntl.flock, []

    def counted(image, **options):
        wait_until((folder / "waits").exists)
        probed.append(image)
        return probe(image, **options)

    def noted(file, how):
        if how == fcntl.LOCK_SH:
            (folder / "waits").touch()
        flock(file, how)

    survey.probe, fcntl.flock = counted, noted
    try:
        packs = EpochPacks(by_path(paths), PLANNED_SEQ_LEN, num_workers=1)
    finally:
        survey.probe, fcntl.flock = probe, flock
    assert len(list(PackedLoader(packs, 1))) > 1
    return {"fingerprint": packs.plan(0, 0).fingerprint, "probed": len(probed)}


class Unplanned:
    """Packs whose plan cannot be made on rank 1."""

    max_segments = 4

    def __init__(self, rank):
        self.rank = rank

    def num_packs(self, key):
        del key
        return 4

    def fingerprint(self, key):
        if self.rank:
            raise OSError(f"the sizes of epoch {key.epoch} are gone")
        return "a plan"

    def rows(self, key, packs):
        raise AssertionError(f"{packs} of {key} are read, though the ranks do not agree")


def train_on(
    rank, folder, *, checkpoint=None, rows=(10, 10), each=EACH, batch_size=1, val_rows=(0, 0)
):
    """Train, each rank in its own folder, from a checkpoint or the beginning."""
    if checkpoint:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    loader = PackedLoader(learning.table(rows[rank]), batch_size, seed=3, max_segments=4)
    config = learning.config_of(**{"steps": 4, **each[rank]})
    validate = learning.validation_of(val_rows[rank], batch_size=1) if val_rows[rank] else None
    list(train(learning.model_of(), loader, config, folder=folder, validate=validate))


def train_from_a_damaged_checkpoint(rank, folder, checkpoint):
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    if rank:
        (path,) = folder.glob("*/state.json")
        path.write_text(path.read_text()[:20])
    train_on(rank, folder)


def train_where_nothing_can_be_saved(rank, folder):
    # A file in the place of the folder that a kill leaves, which is removed as a folder.
    (folder / "step-00000001.partial").touch()
    train_on(rank, folder)


def train_where_no_log_can_be(rank, folder):
    (folder / "log.jsonl").mkdir()
    train_on(rank, folder)


class Unforeseen(StoredPacks):
    """Rows whose labels are not known before they are read, of which some fail on rank 1."""

    labels = property()  # as if there were none

    def __init__(self, fails):
        super().__init__(learning.table())
        self.fails, self.read = fails, 0

    def rows(self, key, packs):
        rows = super().rows(key, packs)
        self.read += 1
        if self.fails == "label" and self.read == 7:  # of 5 an epoch: in the middle of the second
            wrong = pa.array([99] * len(rows.segments["labels"]))
            return replace(rows, segments={**rows.segments, "labels": wrong})
        if self.fails == "image" and self.read == 5:  # the last before the ranks begin the next
            raise TooManyRejects("rejected is 2 of 9 examples (22.22%), expected at most 1.00%", [])
        return rows


class Ending(PackedLoader):
    """A loader whose passes end in another way than they are to."""

    def _batches(self, **options):
        yield from islice(super()._batches(**options), 4 if self.how == "early" else None)
        if self.how == "error":
            raise OSError("the last file is gone")


def train_to_another_end(rank, how):
    """Train for two passes of five steps; those of rank 1 end otherwise."""
    loader = Ending(learning.table(), 1, seed=3, max_segments=4)
    loader.how = how if rank else None
    steps = []
    try:
        for record in train(learning.model_of(), loader, learning.config_of(steps=9)):
            steps.append(record.step)
    except ValueError as error:
        raise ValueError(f"after {len(steps)} steps: {error}") from error


def train_on_unforeseen(rank, fails, **options):
    """Train, with workers that fill batches ahead; rank 0 has nothing wrong."""
    packs = Unforeseen(fails if rank else None)
    loader = PackedLoader(packs, 1, seed=3, max_segments=4, num_workers=options.pop("workers", 0))
    steps = []
    try:
        config = learning.config_of(steps=9, **options)
        for record in train(learning.model_of(), loader, config):
            steps.append(record.step)
    except ValueError as error:
        raise ValueError(f"after {len(steps)} steps: {error}") from error


def disagreements(rank, checkpoint):
    """What the ranks do, by name; each is given a folder of this rank's own."""
    own = checkpoint if rank == 0 else None
    return {
        "a missing file": lambda folder: go_through_images(rank, folder),
        "bad images": lambda _: EpochPacks(pictures.dataset_of([b"", b""]), 16, num_workers=1),
        "seed": lambda _: go_through(rank, each=[{"seed": 3}, {"seed": 4}]),
        "batch size": lambda _: go_through(rank, each=[{}, {"batch_size": 2}]),
        "several": lambda _: go_through(rank, each=[{"epoch": 2}, {"balance": True}]),
        "tail": lambda _: go_through(rank, each=[{"tail": "pad"}, {"tail": "error"}]),
        "segments": lambda _: go_through(rank, each=[{}, {"max_segments": 5}]),
        "augment": lambda _: go_through(rank, each=[{}, {"augment": Augment()}]),
        "state": lambda _: go_through(rank, states=[{"packs": 4}, {}]),
        "a stream": lambda _: go_through_a_stream(rank),
        "one rank twice": lambda _: go_through(rank, rank=0, world_size=2),
        "a later epoch": lambda _: go_on_to_other_epochs(rank),
        "no plan": lambda _: list(PackedLoader(Unplanned(rank), 1)),
        "a refused state": lambda folder: train_on(
            rank, folder, checkpoint=checkpoint, rows=(10, 9)
        ),
        "a lacking checkpoint": lambda folder: train_on(rank, folder, checkpoint=own),
        "a damaged checkpoint": lambda folder: train_from_a_damaged_checkpoint(
            rank, folder, checkpoint
        ),
        "validation": lambda folder: train_on(rank, folder, val_rows=(7, 0)),
        "validation images": lambda folder: train_on(rank, folder, val_rows=(7, 6)),
        "steps": lambda folder: train_on(rank, folder, each=[{}, {"steps": 5}]),
        "too many frozen blocks": lambda folder: train_on(rank, folder, each=[{}, {"freeze": 3}]),
        "schedules": lambda folder: train_on(
            rank, folder, each=[{"schedule": lambda _: 1e-3}, {"schedule": lambda _: 2e-3}]
        ),
        "no checkpoint written": lambda folder: train_where_nothing_can_be_saved(rank, folder),
        "no log": lambda folder: train_where_no_log_can_be(rank, folder),
        "a label of a stream": lambda _: train_on_unforeseen(rank, "label"),
        "an image": lambda _: train_on_unforeseen(rank, "image", accumulate=2, workers=1),
        "an error at the end of a pass": lambda _: train_to_another_end(rank, "error"),
        "a pass that ends early": lambda _: train_to_another_end(rank, "early"),
        "too large a batch": lambda folder: train_on(rank, folder, batch_size=11),
        "nothing": lambda folder: train_on(rank, folder, checkpoint=checkpoint),
        "ranks that are told": lambda _: go_through(rank, rank=rank, world_size=2),
        "one alone": lambda _: rank or go_through(rank, rank=0, world_size=1),
    }


def main(folder):
    """Write what this rank is told."""
    rank, _ = rank_of_world()
    checkpoint = folder / "checkpoint"
    train_on(rank, checkpoint, each=[{"steps": 2}] * 2)
    told = {}
    for name, do in disagreements(rank, checkpoint).items():
        own = folder / name / str(rank)
        own.mkdir(parents=True)
        try:
            do(own)
            told[name] = None
        except ValueError as error:
            told[name] = str(error)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    planned = plan_images_of_unknown_sizes(rank, folder / "cold")
    (folder / f"planned-{rank}.json").write_text(json.dumps(planned))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    with one_of_two_ranks():
        learning.main(where, 1)
        learning.main(where / "validated", 1, val_every=5, freeze=1)
        broken.main(where, BROKEN_STEPS)
        main(where)
