"""Steps by their numbers: what a DataLoader of a loader's dataset and batch sampler yields."""

from __future__ import annotations

import loading
import pytest
import torch
from torch.utils.data import DataLoader

from packpipe import PackedLoader, PackedStream

accelerate = pytest.importorskip("accelerate")

# The framework's own: of deprecated calls and of the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


def loader_of(kind: str, folder, **options) -> PackedLoader:
    if kind == "stream":
        stream = loading.source(90).to_iterable_dataset()
        packs = PackedStream(stream, 24, patch_size=8, window=20)
    else:
        packs = loading.packs_of(kind, folder)
    return PackedLoader(packs, 3, tail="pad", **options)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}])
@pytest.mark.parametrize("kind", ["stored", "planned", "stream"])
def test_what_is_left_is_the_end_of_the_epoch(tmp_path, kind, workers):
    loader = loader_of(kind, tmp_path)
    epochs = [[loading.digest(batch) for batch in loader] for _ in range(2)]
    loader = loader_of(kind, tmp_path, **workers)
    for epoch, skipped in [(0, 0), (0, 4), (1, 2), (0, len(epochs[0]) - 1)]:
        loader.set_epoch(epoch)
        state = torch.get_rng_state()
        rest = accelerate.skip_first_batches(loader, skipped)
        assert [loading.digest(batch) for batch in rest] == epochs[epoch][skipped:]
        assert torch.equal(torch.get_rng_state(), state)  # as without a DataLoader
        assert loader.epoch == epoch
        assert loader.state_dict()["packs"] == 3 * len(epochs[epoch])
    assert len(epochs[0]) > 6
    assert epochs[0] != epochs[1] or kind == "stream"  # whose order is the dataset's


@pytest.mark.parametrize("kind", ["stored", "stream"])
def test_steps_count_from_the_epoch_s_beginning_whatever_state_was_loaded(tmp_path, kind):
    loader = loader_of(kind, tmp_path)
    whole, states = [], []
    for batch in loader:
        whole.append(loading.digest(batch))
        states.append(loader.state_dict())
    again = loader_of(kind, tmp_path)
    again.load_state_dict(states[4])
    rest = accelerate.skip_first_batches(again, 2)
    assert [loading.digest(batch) for batch in rest] == whole[2:]


def test_the_state_counts_the_steps_left_out(tmp_path):
    loader = loader_of("stored", tmp_path)
    rest = iter(accelerate.skip_first_batches(loader, 3))
    taken = [loading.digest(next(rest)) for _ in range(2)]
    again = loader_of("stored", tmp_path)
    again.load_state_dict(loader.state_dict())
    taken += [loading.digest(batch) for batch in again]
    assert taken == [loading.digest(batch) for batch in loader_of("stored", tmp_path)][3:]
    assert len(taken) > 4


def test_ranks_leave_out_the_same_steps(tmp_path):
    packs = loading.packs_of("stored", tmp_path)
    whole = [loading.digest(batch) for batch in PackedLoader(packs, 4)]
    loaders = [PackedLoader(packs, 2, rank=rank, world_size=2) for rank in range(2)]
    rest = [accelerate.skip_first_batches(loader, 3) for loader in loaders]
    assert list(map(loading.digest_of, zip(*rest, strict=True))) == whole[3:]
    assert [len(loader.dataset) for loader in loaders] == 2 * [4 * len(whole)]
    assert len(whole) > 6


def test_the_loader_goes_on_with_the_next_epoch(tmp_path):
    epochs = loader_of("stored", tmp_path)
    epochs = [[loading.digest(batch) for batch in epochs] for _ in range(2)]
    loader = loader_of("stored", tmp_path)
    list(accelerate.skip_first_batches(loader, 3))
    assert [loading.digest(batch) for batch in loader] == epochs[1]


def test_a_dataloader_takes_steps_in_any_order(tmp_path):
    loader = loader_of("stored", tmp_path)
    whole = [loading.digest(batch) for batch in loader]
    loader.set_epoch(0)
    chosen = [5, 1, 2, 3, 0]
    found = DataLoader(loader.dataset, batch_sampler=chosen, collate_fn=loader.collate_fn)
    assert [loading.digest(batch) for batch in found] == [whole[step] for step in chosen]


def test_lengths(tmp_path):
    loader = loader_of("stored", tmp_path)
    assert len(loader.batch_sampler) == len(loader) == len(list(loader.batch_sampler))
    assert len(loader.dataset) == 3 * len(loader)
    assert loader.batch_sampler.batch_size == 3
    assert len(accelerate.skip_first_batches(loader, 4)) == len(loader) - 4
    stream = loader_of("stream", tmp_path)
    for sized in (stream, stream.batch_sampler, stream.dataset):
        with pytest.raises(TypeError, match="a PackedStream has no length"):
            len(sized)
