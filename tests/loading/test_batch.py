"""PackedBatch: static shapes, the way back to the source, and its messages."""

import re

import numpy as np
import packed
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packpipe.loading.batch import PackedBatch


@given(packed.row_sets())
def test_shapes_depend_on_the_limits_alone(case):
    batch = packed.batch_of(case)
    rows, seq_len, max_segments = len(case.lens), case.seq_len, case.max_segments
    assert batch.patches.shape == (rows, seq_len, packed.PATCH_BYTES)
    assert batch.segment_ids.shape == (rows, seq_len)
    assert batch.coords.shape == (rows, seq_len, 2)
    assert batch.seq_lens.shape == batch.example_index.shape == (rows, max_segments)
    assert batch.labels.shape == (rows, max_segments)
    assert batch.grid_hw.shape == (rows, max_segments, 2)
    kinds = [batch.patches, batch.segment_ids, batch.coords, batch.seq_lens, batch.labels]
    wanted = [torch.uint8, torch.int32, torch.int16, torch.int32, torch.int64]
    assert [tensor.dtype for tensor in kinds] == wanted


@given(packed.row_sets())
def test_every_segment_stands_in_its_row_and_order(case):
    batch = packed.batch_of(case)
    for row, lens in enumerate(case.lens):
        assert batch.seq_lens[row, : len(lens)].tolist() == lens
        assert batch.seq_lens[row, len(lens) :].eq(0).all()
        assert batch.labels[row, len(lens) :].eq(-100).all()
        assert batch.example_index[row, len(lens) :].eq(-1).all()
        assert batch.present[row].sum() == len(lens)


def test_by_example_restores_the_source_order():
    case = packed.RowSet(lens=[[3, 2], [4], [1, 1, 1]], seq_len=6, max_segments=4)
    batch = packed.batch_of(case, example_index=[5, 0, 3, 1, 4, 2])
    index, values = batch.by_example(batch.labels * 10)
    restored = torch.empty(6, dtype=torch.int64)
    restored[index] = values
    segments = packed.rows_of(case, example_index=[5, 0, 3, 1, 4, 2])
    wanted = np.empty(6, np.int64)
    wanted[segments.example_index] = np.asarray(segments.labels) * 10
    assert restored.tolist() == wanted.tolist()


def test_rows_without_labels_give_a_batch_without_labels():
    case = packed.RowSet(lens=[[2]], seq_len=4, max_segments=2)
    assert packed.batch_of(case, labels=None).labels is None


@pytest.mark.parametrize("writeable", [False, True])
def test_a_batch_owns_its_memory(writeable):
    case = packed.RowSet(lens=[[2]], seq_len=4, max_segments=2)
    rows = packed.rows_of(case)
    rows.patches.flags.writeable = writeable
    batch = PackedBatch.from_rows(rows, max_segments=2)
    batch.patches.zero_()
    assert rows.patches.any()


def test_to_moves_every_tensor():
    case = packed.RowSet(lens=[[2]], seq_len=4, max_segments=2)
    moved = packed.batch_of(case).to("meta")
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}


def test_too_many_segments_are_refused():
    case = packed.RowSet(lens=[[1], [1, 1, 1]], seq_len=4, max_segments=3)
    message = (
        "num_segments[1] is 3, expected at most 2 (max_segments); "
        "pass the max_segments the rows were packed with"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedBatch.from_rows(packed.rows_of(case), max_segments=2)


def test_labels_that_are_no_numbers_are_refused():
    case = packed.RowSet(lens=[[1, 2]], seq_len=4, max_segments=3)
    message = (
        "labels.type is 'string', expected integers, floats or lists of numbers; "
        "class_encode_column it before packing, or pack with label_column=None"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        packed.batch_of(case, labels=pa.array(["cat", "dog"]))


def test_max_segments_must_be_a_number():
    case = packed.RowSet(lens=[[1, 2]], seq_len=4, max_segments=3)
    with pytest.raises(
        TypeError, match=re.escape("max_segments is '4', expected an integer in 1..")
    ):
        PackedBatch.from_rows(packed.rows_of(case), max_segments="4")


def arrays_of(rows):
    return rows.patches, rows.segment_ids, rows.coords


def tensors_of(batch):
    return batch.patches, batch.segment_ids, batch.coords


@given(packed.row_sets())
def test_memory_that_the_rows_own_is_shared_if_asked_for(case):
    rows = packed.rows_of(case)
    batch = PackedBatch.from_rows(rows, max_segments=case.max_segments, copy=False)
    for array, tensor in zip(arrays_of(rows), tensors_of(batch), strict=True):
        assert np.shares_memory(array, tensor.numpy())
    batch.patches.fill_(7)
    assert (rows.patches == 7).all()


@pytest.mark.parametrize("copy", [False, True])
def test_memory_that_must_not_be_written_to_is_copied(copy):
    case = packed.RowSet(lens=[[2], [1, 2]], seq_len=4, max_segments=2)
    rows = packed.rows_of(case)
    for array in arrays_of(rows):
        array.flags.writeable = False
    batch = PackedBatch.from_rows(rows, max_segments=2, copy=copy)
    for array, tensor in zip(arrays_of(rows), tensors_of(batch), strict=True):
        assert (tensor.numpy() == array).all()
        assert not np.shares_memory(array, tensor.numpy())
        tensor.fill_(1)
    assert rows.segment_ids.max() == 2


@pytest.mark.parametrize("labels", ["random", None])
def test_pin_memory_pins_every_tensor(labels, monkeypatch):
    case = packed.RowSet(lens=[[2], [1, 2]], seq_len=4, max_segments=2)
    batch = packed.batch_of(case, labels=labels)
    pinned = []

    def pin_memory(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    found = batch.pin_memory()
    assert type(found) is PackedBatch
    tensors = {name: tensor for name, tensor in vars(found).items() if tensor is not None}
    assert {id(tensor) for tensor in tensors.values()} == {id(tensor) for tensor in pinned}
    for name, tensor in vars(batch).items():
        same = name not in tensors if tensor is None else torch.equal(tensor, tensors[name])
        assert same, name
    assert (found.labels is None) == (labels is None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU copies from pinned memory")
def test_pinned_batches_are_in_page_locked_memory():
    case = packed.RowSet(lens=[[2], [1, 2]], seq_len=4, max_segments=2)
    batch = packed.batch_of(case).pin_memory()
    assert all(tensor.is_pinned() for tensor in batch.values())
    moved = batch.to("cuda", non_blocking=True)
    assert all(tensor.is_cuda for tensor in moved.values())
    assert torch.equal(moved.patches.cpu(), batch.patches)


def test_a_batch_that_was_moved_is_the_same_batch():
    case = packed.RowSet(lens=[[2], [1, 2]], seq_len=4, max_segments=2)
    for labels in ("random", None):
        batch = packed.batch_of(case, labels=labels)
        moved = batch.to("cpu", non_blocking=True)
        for name, tensor in vars(batch).items():
            other = getattr(moved, name)
            assert (other is None) if tensor is None else torch.equal(tensor, other), name
    assert "labels" in vars(moved)


@given(case=packed.row_sets(), multiple=st.integers(1, 40))
def test_trimming_takes_padding_alone(case, multiple):
    batch = packed.batch_of(case)
    trimmed = batch.trim(multiple)
    length = trimmed.segment_ids.shape[1]
    longest = int(batch.seq_lens.sum(1).max())
    assert length == min(case.seq_len, max(1, -(-longest // multiple)) * multiple)
    assert (batch.segment_ids[:, length:] == 0).all()
    for name in ("patches", "segment_ids", "coords"):
        assert torch.equal(getattr(trimmed, name), getattr(batch, name)[:, :length])
    assert trimmed.seq_lens is batch.seq_lens
