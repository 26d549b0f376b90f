"""Models that answer for every cell: losses, figures, maps and a toy, against plain loops."""

import re
from dataclasses import replace

import learning
import numpy as np
import packed
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import packpipe
from packpipe import NaViTConfig, PackConfig, PackedLoader
from packpipe.images.masks import TargetRules
from packpipe.loading.batch import PackedBatch
from packpipe.model.maps import class_map, token_maps
from packpipe.rows import schema
from packpipe.rows.to_arrow import rows_table
from packpipe.training.evaluation import measure
from packpipe.training.loop import train
from packpipe.training.losses import LOSSES, global_count
from packpipe.training.objective import (
    Objective,
    check_batch,
    labels_in,
    mean_iou,
    overlaps,
)

K, CELLS = 3, 4
SHAPES = [(6, 8), (4, 4)]


def rows_of(case, dtype=np.uint8):
    """Rows whose cells (one a pixel) have the class of how red they are, and some have none."""
    rows = packed.rows_of(case)
    red = rows.patches.reshape(*rows.patches.shape[:2], CELLS, 3)[..., 0]
    targets = red.astype(dtype) // 86
    none = np.iinfo(dtype).max
    targets[:, ::5, 1] = none
    targets[rows.segment_ids == 0] = none
    return replace(rows, tokens={**rows.tokens, "targets": targets})


def model_of(dtype=torch.float32, **options):
    options = {"num_classes": K, "pooling": "none", "target_stride": 1, **options}
    return packed.model_of("auto", dtype, **options)


def batch_of(case, **options):
    return PackedBatch.from_rows(rows_of(case, **options), max_segments=case.max_segments)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@given(case=packed.row_sets(), weighted=st.booleans())
def test_the_loss_is_the_mean_over_cells_each_image_alone(dtype, case, weighted):
    batch, model = batch_of(case, dtype=dtype), model_of(torch.float64)
    if weighted:
        batch.weight = torch.rand(batch.seq_lens.shape, dtype=torch.float64)
    of_classes = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64) if weighted else None
    total = weight = 0.0
    with torch.no_grad():
        for row, number, one in packed.alone(batch):
            (outputs,) = model(one)
            place = int(batch.seq_lens[row, :number].sum())
            own = batch.targets[row, place : place + len(outputs)]
            for logits, target in zip(
                outputs.flatten(0, 1).log_softmax(-1), own.flatten().tolist(), strict=True
            ):
                if target < K:
                    share = float(batch.weight[row, number] * of_classes[target]) if weighted else 1
                    total, weight = total - share * logits[target].item(), weight + share
        outputs = model(batch)
    assert outputs.shape == (*batch.segment_ids.shape, CELLS, K)
    labels = labels_in(batch, model.config)
    objective = Objective(LOSSES["softmax"], 0.0, of_classes, dense=True)
    count = global_count(objective.counts(batch, labels))
    assert count.item() == pytest.approx(weight or 1.0)
    found = objective.of(outputs, batch, labels, count=count).item()
    assert found == pytest.approx(total / (weight or 1.0), rel=1e-6)


@given(seed=st.integers(0, 10**6))
def test_the_mean_iou_is_that_of_plain_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(2, 30, 5, generator=generator)
    labels = torch.randint(0, 4, (2, 30), generator=generator)  # one class is nowhere, or answered
    labels[torch.rand(2, 30, generator=generator) < 0.2] = -100
    outputs[..., 3] -= 3
    pairs = [
        (int(label), int(logits.argmax()))
        for logits, label in zip(outputs.flatten(0, 1), labels.flatten(), strict=True)
        if label != -100
    ]
    shares = []
    for one in range(5):
        both = sum(label == answer == one for label, answer in pairs)
        either = sum(one in pair for pair in pairs)
        if either:
            shares.append(both / either)
    assert mean_iou(overlaps(outputs, labels)) == pytest.approx(sum(shares) / len(shares))


def table(num_rows=8):
    rng = np.random.default_rng(1)
    lens = [[int(n) for n in rng.integers(1, 6, rng.integers(1, 4))] for _ in range(num_rows)]
    rows = rows_of(packed.RowSet(lens, seq_len=16, max_segments=4))
    del rows.segments["labels"]
    config = PackConfig(seq_len=16, patch_size=packed.PATCH_SIZE)
    return rows_table(rows, schema.row_schema(config, None, targets=TargetRules(1)))


def loader_of(**options):
    return PackedLoader(table(), 2, max_segments=4, **options)


@pytest.fixture(scope="module")
def trained():
    model = model_of()
    config = learning.config_of(
        loss="softmax", steps=120, val_every=60, learning_rate=1e-2, head_weight_decay=0.0
    )
    return list(train(model, loader_of(), config, validate=loader_of(tail="pad"))), model


def test_it_learns_how_red_cells_are(trained):
    records, _ = trained
    measured = [r for r in records if r.val_iou is not None]
    assert [r.step for r in measured] == [60, 120]
    assert measured[-1].val_iou > 0.7
    assert measured[-1].val_ece is None
    assert records[-1].loss < records[0].loss / 2


def test_validation_is_that_of_all_cells(trained):
    _, model = trained
    found = measure(model, loader_of(tail="pad"), LOSSES["softmax"])
    table_of, right, number, losses, images = torch.zeros(K, K), 0, 0, 0.0, 0
    with torch.no_grad():
        for batch in loader_of(tail="pad"):
            images += int(batch.present.sum())
            for logits, target in zip(
                model(batch).flatten(0, 2), batch.targets.flatten().tolist(), strict=True
            ):
                if target < K:
                    answer = int(logits.argmax())
                    table_of[target, answer] += 1
                    right, number = right + (answer == target), number + 1
                    losses -= logits.double().log_softmax(-1)[target].item()
    assert found.num_images == images
    assert found.accuracy == pytest.approx(right / number)
    assert found.loss == pytest.approx(losses / number, rel=1e-4)
    assert found.iou == pytest.approx(mean_iou(table_of))


def test_predictions_become_masks_of_the_planned_size(trained):
    _, model = trained
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in SHAPES]
    maps = packpipe.predict(model, images, seq_len=32)
    assert [one.shape for one in maps] == [(3, 4, CELLS, K), (2, 2, CELLS, K)]
    masks = [class_map(one, packed.PATCH_SIZE) for one in maps]
    assert [tuple(mask.shape) for mask in masks] == SHAPES
    pairs = zip(masks, images, strict=True)
    right = np.concatenate([(mask.numpy() == image[..., 0] // 86).ravel() for mask, image in pairs])
    assert right.mean() > 0.45  # a third by chance; it was trained on few cells


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), side=st.sampled_from([1, 2, 4]))
def test_a_class_map_has_every_cell_at_its_place(rows, columns, side):
    logits = torch.randn(rows, columns, side**2, K)
    found = class_map(logits if side > 1 else logits[:, :, 0], 4)
    for y in range(rows * 4):
        for x in range(columns * 4):
            cell = (y % 4) * side // 4 * side + (x % 4) * side // 4
            assert found[y, x] == logits[y // 4, x // 4, cell].argmax()


def test_cells_of_another_number_are_refused():
    batch = batch_of(packed.RowSet([[4]], seq_len=4, max_segments=1))
    config = model_of(target_stride=2).config
    message = "batch.targets.shape[-1] is 4, expected 1, as the model has cells a token; give"
    with pytest.raises(ValueError, match=re.escape(message)):
        labels_in(batch, config)
    batch.targets = None
    message = "batch.targets is None, expected targets, for a model without pooling; pack"
    with pytest.raises(ValueError, match=message):
        labels_in(batch, config)
    with pytest.raises(ValueError, match=r"^cells of a token is 3, expected a square whose side"):
        class_map(torch.zeros(1, 1, 3, K), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_stride": 3},
            "target_stride is 3, expected a divisor of 16 (patch_size); pa",
        ),
        (
            {"pooling": "mean"},
            "target_stride is 4, expected None, unless there are logits",
        ),
        (
            {"num_classes": None},
            "target_stride is 4, expected None, unless there are logits",
        ),
    ],
)
def test_strides_that_do_not_fit_are_refused(options, message):
    options = {"num_classes": 3, "pooling": "none", "target_stride": 4, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        NaViTConfig(**options)


def test_every_token_has_its_cells_in_its_map():
    batch = batch_of(packed.RowSet([[6, 1], [4]], seq_len=8, max_segments=2))
    model = model_of()
    with torch.no_grad():
        outputs = model(batch)
    for number, (_, one) in enumerate(token_maps(batch, outputs)):
        assert one.shape[2:] == (CELLS, K)
        assert one.shape[:2] == (packed.grid_of([6, 1, 4][number]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_are_looked_at_as_they_are_and_once(dtype, monkeypatch):
    batch, config = batch_of(packed.RowSet([[4]], 4, 1), dtype=dtype), model_of().config
    none = int(np.iinfo(dtype).max)

    def widened(_):
        raise AssertionError("8 bytes a cell")

    for cell in (0, K - 1, none, K, none - 1):
        targets = np.full(batch.targets.shape, cell, dtype)
        targets[0, 0, 1] = none
        batch.targets = torch.from_numpy(targets)
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "long", widened)
            if cell in (K, none - 1):
                with pytest.raises(
                    ValueError, match=rf"^a label is {cell}, expected 0\.\.2, or -10"
                ):
                    check_batch(batch, config, LOSSES["softmax"])
            else:
                check_batch(batch, config, LOSSES["softmax"])
        # Of what is compared nothing is looked at again.
        classes = labels_in(batch, config)
        assert set(classes.unique().tolist()) == {-100, cell if cell != none else -100}
