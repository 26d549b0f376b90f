"""Training frameworks take a `PackedLoader` as it is: no rank's part is dealt out once more."""

from __future__ import annotations

import functools
import itertools
import json

import consumers
import frameworks
import loading
import pytest
from two_ranks import run_on_two_ranks

from packpipe import PackedLoader

pytest.importorskip("accelerate")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("transformers")

# The frameworks' own: of deprecated calls, of few workers and of the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


def taken_by(rank: int, world_size: int, folder, kind: str = "stored") -> list[list[int]]:
    loader = PackedLoader(
        loading.packs_of(kind, folder, epochs=2),
        2,
        rank=rank,
        world_size=world_size,
        tail="pad",
    )
    return [batch.by_example(batch.seq_lens)[0].tolist() for _ in range(2) for batch in loader]


def test_accelerate_leaves_the_loader_as_it_is(tmp_path):
    found = frameworks.with_accelerate(tmp_path)
    assert found == taken_by(0, 1, tmp_path, "planned")
    assert len(found) > 20


@pytest.mark.parametrize("prepared", ["prepare", "prepare_data_loader"])
def test_accelerate_saves_a_loader_that_it_is_told_of(tmp_path, prepared):
    """By ``register_for_checkpointing`` or ``prepare_data_loader``; ``prepare`` tells nothing."""
    from accelerate import Accelerator

    packs = loading.packs_of("planned", tmp_path)

    def begin() -> tuple[Accelerator, PackedLoader]:
        accelerator, loader = Accelerator(cpu=True), PackedLoader(packs, 2, num_workers=1)
        assert getattr(accelerator, prepared)(loader) is loader
        if prepared == "prepare":
            accelerator.register_for_checkpointing(loader)
        return accelerator, loader

    accelerator, loader = begin()
    whole = []
    for step, batch in enumerate(itertools.chain(loader, loader)):
        if step == len(loader) + 3:  # within the second epoch
            accelerator.save_state(str(tmp_path / "state"))
            stop = len(whole)
        whole.append(loading.digest(batch))
    accelerator, loader = begin()
    accelerator.load_state(str(tmp_path / "state"))
    assert loader.epoch == 1
    # The batch that the loop was given before it saved counts as taken.
    assert [loading.digest(batch) for batch in loader] == whole[stop + 1 :]
    assert len(whole) > stop + 5


@pytest.mark.parametrize("kind", ["stored", "planned"])
def test_lightning_goes_through_one_epoch_after_the_other(tmp_path, kind):
    found = frameworks.with_lightning(tmp_path, kind)
    assert found == taken_by(0, 1, tmp_path, kind)
    assert len(found) > 20


# Not at the very end of an epoch that is planned anew: there Lightning restores its own count of
# batches into the next epoch, whose length is another.
@pytest.mark.parametrize(
    ("kind", "more"),
    [("stored", -1), ("stored", 0), ("stored", 3), ("planned", -1), ("planned", 3)],
)
def test_lightning_resumes_from_its_checkpoint(tmp_path, kind, more):
    whole = taken_by(0, 1, tmp_path, kind)
    first = PackedLoader(loading.packs_of(kind, tmp_path, epochs=2), 2, tail="pad")
    stop = len(first) + more  # at, before and after the end of the first epoch
    before = frameworks.with_lightning(tmp_path, kind, stop=stop)
    after = frameworks.with_lightning(tmp_path, kind, resume=True)
    assert len(before) == stop
    assert before + after == whole


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["accelerate", "lightning"])
def test_two_ranks_take_each_its_own_half(framework, tmp_path):
    kind = "planned" if framework == "accelerate" else "stored"
    loading.packs_of(kind, tmp_path, epochs=2)  # one process at a time writes a folder
    run = functools.partial(run_on_two_ranks, frameworks.__file__, framework)
    if framework == "accelerate":
        # Under DDP, with four micro-batches a rank, all of different numbers of labels.
        assert max(consumers.ddp(tmp_path, run).differences) < 1e-6
    else:
        run(tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found == taken_by(rank, 2, tmp_path, kind)
        assert len(found) > 10
