"""Batches in page-locked memory are gathered there, and are those of ordinary memory.

The memory is a stand-in here, since torch has such only beside a GPU; on_gpu.py has it.
"""

from dataclasses import replace

import learning
import numpy as np
import pyarrow as pa
import pytest
import torch

from packpipe import PackedLoader
from packpipe.loading import page_locked
from packpipe.loading.page_locked import PageLocked
from packpipe.loading.stored import StoredPacks

GATHERED = {"patches", "segment_ids", "coords"}


@pytest.fixture
def memory(monkeypatch):
    """Where memory begins that was asked for, and that which tensors were copied to."""
    own, copies = set(), []

    def asked(num_bytes):
        own.add((found := torch.full((num_bytes,), 7, dtype=torch.uint8)).data_ptr())
        return found

    def pin_memory(tensor):
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(page_locked, "_memory", asked)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return own, copies


def loaded(*, pinned, **options):
    loader = learning.loader_of(**options)
    loader.pin_memory = pinned
    batches = list(loader)
    return batches, loader.state_dict()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2}, {"augment": learning.AUGMENT}, {"batch_size": 4, "tail": "pad"}],
    ids=["as they lie", "threads", "augmented", "padded"],
)
def test_rows_go_from_the_file_to_page_locked_memory(options, memory):
    own, copies = memory
    plain, state = loaded(pinned=False, **options)
    assert not own
    assert not copies
    locked, same_state = loaded(pinned=True, **options)
    assert same_state == state
    assert len(locked) == len(plain) > 1
    for batch, wanted in zip(locked, plain, strict=True):
        copied = {id(tensor) for tensor in copies}
        assert batch.keys() == wanted.keys() > GATHERED
        where = {name: tensor.data_ptr() in own for name, tensor in batch.items()}
        is_filled = bool(batch.present.any(1).all())  # rows that others are spread among are copied
        assert all(there == (name in GATHERED and is_filled) for name, there in where.items())
        for name, tensor in batch.items():
            assert torch.equal(tensor.nan_to_num(), wanted[name].nan_to_num()), name
            assert where[name] or id(tensor) in copied


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.float64, np.bool_])
def test_its_arrays_are_as_those_of_numpy(dtype, memory):
    own, copies = memory
    locked = PageLocked()
    for shape in ((3, 4, 2), (0, 5), ()):
        array = locked.empty(shape, dtype)
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert array.flags.c_contiguous
        array[...] = 1
    array = locked.empty((3, 4), dtype)
    array[...] = np.arange(12).reshape(3, 4) % 2
    whole, part = torch.from_numpy(array), torch.from_numpy(array[:2])
    found = locked.batch({"whole": whole, "part": part, "turned": whole.T, "names": ["a"]})
    assert found["names"] == ["a"]
    assert found["whole"].data_ptr() in own
    assert torch.equal(found["whole"], whole)
    # A tensor of torch's own, which knows when its memory may be used again.
    assert found["whole"].untyped_storage().nbytes() == array.nbytes
    assert found["whole"] is not whole
    assert len(copies) == 2
    assert torch.equal(found["part"], part)
    assert torch.equal(found["turned"], whole.T)


class Masked(StoredPacks):
    """Rows whose labels do not count; its `rows` knows nothing of memory that it is given."""

    def rows(self, key, packs):
        rows = super().rows(key, packs)
        masked = pa.array([-100] * len(rows.segments["labels"]))
        return replace(rows, segments={**rows.segments, "labels": masked})


class Wrapped:
    """Passes on all that it has not itself."""

    def __init__(self, packs):
        self.packs = packs

    def __getattr__(self, name):
        return getattr(self.packs, name)

    def rows(self, key, packs):
        return self.packs.rows(key, packs)


@pytest.mark.parametrize("wrapped", [False, True], ids=["a subclass", "a wrapper"])
def test_packs_of_a_class_of_the_callers_own_are_asked_for_their_own_rows(wrapped, memory):
    own, copies = memory
    packs = Masked(learning.table())
    loader = PackedLoader(Wrapped(packs) if wrapped else packs, 2, seed=3, max_segments=4)
    plain = list(loader)
    loader = PackedLoader(loader.packs, 2, seed=3, max_segments=4)
    loader.pin_memory = True
    assert len(plain) > 1
    for batch, wanted in zip(loader, plain, strict=True):
        assert set(batch.labels.unique().tolist()) == {-100}
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
    assert not own
    assert copies
