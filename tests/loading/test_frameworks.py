"""Training frameworks take a `PackedLoader` as it is: no rank's part is dealt out once more."""

from __future__ import annotations

import json

import frameworks
import loading
import pytest
from two_ranks import run_on_two_ranks

from packpipe import PackedLoader

pytest.importorskip("accelerate")
pytest.importorskip("pytorch_lightning")

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
    run_on_two_ranks(frameworks.__file__, framework, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found == taken_by(rank, 2, tmp_path, kind)
        assert len(found) > 10
