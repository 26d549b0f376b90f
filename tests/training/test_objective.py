"""Numbers as labels: losses and figures against plain loops, training, validation."""

import functools
import math
import re

import learning
import numpy as np
import packed
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import mean_average_precision as naive_ap

from packpipe import Augment, PackConfig, PackedLoader
from packpipe.loading.stored import StoredPacks
from packpipe.model.predict import predict_packs
from packpipe.rows import schema
from packpipe.rows.labels import as_arrow
from packpipe.rows.to_arrow import rows_table
from packpipe.training.evaluation import check_measurable, measure
from packpipe.training.loop import train
from packpipe.training.losses import (
    LOSSES,
    counted,
    global_count,
    segment_absolute_error,
    segment_cross_entropy,
    segment_sigmoid_cross_entropy,
    segment_squared_error,
)
from packpipe.training.objective import agreement, check_batch, objective_of

K = 3


def sigmoid_of(logit, target):
    right = 1 / (1 + math.exp(-logit))
    return -target * math.log(right) - (1 - target) * math.log(1 - right)


def naive(name, outputs, labels):
    """The loss of an image, its figure's sum and how many that is of; None if it does not count."""
    known = [(o, t) for o, t in zip(outputs, labels, strict=True) if not math.isnan(t)]
    if not known or (name == "softmax" and len(known) < len(labels)):
        return None
    if name == "softmax":
        whole = sum(map(math.exp, outputs))
        loss = -sum(t * math.log(math.exp(o) / whole) for o, t in known)
        return loss, int(outputs.index(max(outputs)) == labels.index(max(labels))), 1
    if name == "sigmoid":
        right = sum((o > 0) == (t > 0.5) for o, t in known)
        return sum(sigmoid_of(o, t) for o, t in known), right, len(known)
    apart = [abs(o - t) for o, t in known]
    sizes = [one**2 if name == "mse" else one for one in apart]
    return sum(sizes) / len(known), sum(apart), len(known)


def batch_of(seed, rows=3, segments=4):
    """Outputs, labels with NaN among them, and weights."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(rows, segments, K, dtype=torch.float64, generator=generator)
    labels = torch.rand(rows, segments, K, dtype=torch.float64, generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = torch.nan
    labels[torch.rand(rows, segments, generator=generator) < 0.3] = torch.nan
    labels[0, 0] = torch.tensor([0.5, 0.25, 0.25])
    weights = torch.rand(rows, segments, dtype=torch.float64, generator=generator) * 3
    return outputs, labels, weights


every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@given(seed=st.integers(0, 10**6), weighted=st.booleans())
def test_a_loss_is_the_weighted_mean_over_the_images_that_count(name, seed, weighted):
    outputs, labels, weights = batch_of(seed)
    total = weight = agreed = compared = 0.0
    for row, segment in np.ndindex(*labels.shape[:2]):
        one = naive(name, outputs[row, segment].tolist(), labels[row, segment].tolist())
        if one is not None:
            share = float(weights[row, segment]) if weighted else 1.0
            total, weight = total + share * one[0], weight + share
            agreed, compared = agreed + one[1], compared + one[2]
    loss, given = LOSSES[name], {"weights": weights} if weighted else {}
    assert loss(outputs, labels, **given).item() == pytest.approx(total / weight)
    count = global_count(counted(loss, labels, **given))
    assert count.item() == pytest.approx(weight)
    assert loss(outputs, labels, count=count, **given).item() == pytest.approx(total / weight)
    found = [figure.item() for figure in agreement(loss, outputs, labels)]
    assert found == pytest.approx([agreed, compared])


@every_loss
def test_what_is_missing_has_no_effect_and_no_gradient(name):
    outputs, labels, _ = batch_of(7)
    missing = labels.isnan()
    if name == "softmax":
        missing = missing.any(-1, keepdim=True).expand_as(labels)
    assert missing.any()
    results = []
    for fill in (0.0, math.nan, math.inf):
        values = outputs.masked_fill(missing, fill).requires_grad_()
        loss = LOSSES[name](values, labels)
        loss.backward()
        assert (values.grad[missing] == 0).all()
        assert (values.grad[~missing] != 0).any()
        results.append((loss.detach(), values.grad))
    assert all(
        torch.equal(a, b) for one in results[1:] for a, b in zip(one, results[0], strict=True)
    )
    none = torch.full_like(labels, math.nan)
    assert LOSSES[name](outputs, none).item() == 0
    assert global_count(counted(LOSSES[name], none)).item() == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_smoothed_shares_are_shares_too(smoothing):
    outputs, labels, _ = batch_of(3)
    shares = labels / labels.sum(-1, keepdim=True)
    smooth = (1 - smoothing) * shares + smoothing / K
    found = segment_cross_entropy(outputs, shares, label_smoothing=smoothing)
    assert found.item() == pytest.approx(segment_cross_entropy(outputs, smooth).item())


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_one_of_the_labels_alone_is_a_class(name):
    outputs, _, _ = batch_of(5)
    classes = torch.randint(0, K, outputs.shape[:2], generator=torch.Generator().manual_seed(0))
    classes[0, 1] = -100
    alone = (classes[..., None] == torch.arange(K)).double()
    alone[0, 1] = torch.nan
    wanted = LOSSES[name](outputs, classes).item()
    assert LOSSES[name](outputs, alone).item() == pytest.approx(wanted)


def naive_classes(name, logits, label, smoothing=0.0):
    if name == "sigmoid":
        return sum(sigmoid_of(one, float(k == label)) for k, one in enumerate(logits))
    whole = sum(map(math.exp, logits))
    shares = [(1 - smoothing) * (k == label) + smoothing / K for k in range(K)]
    return -sum(s * math.log(math.exp(z) / whole) for s, z in zip(shares, logits, strict=True))


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@given(seed=st.integers(0, 10**6), mixed=st.booleans(), weighted=st.booleans())
def test_images_weigh_what_their_class_and_they_themselves_do(name, seed, mixed, weighted):
    generator = torch.Generator().manual_seed(seed)
    logits, _, weights = batch_of(seed)
    labels = torch.randint(0, K, logits.shape[:2], generator=generator)
    others = torch.randint(0, K, labels.shape, generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[0, 0] = 1
    others[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    shares = torch.rand(labels.shape, dtype=torch.float64, generator=generator)
    of_classes = [0.5, 2.0, 7.0]
    total = weight = 0.0
    for place in np.ndindex(*labels.shape):
        own, other = int(labels[place]), int(others[place])
        if own == -100:
            continue
        share = float(shares[place]) if mixed and other != -100 else 1.0
        both = [(own, share), *([(other, 1 - share)] if share < 1 else [])]
        for label, part in both:
            part *= of_classes[label] * (float(weights[place]) if weighted else 1.0)
            total += part * naive_classes(name, logits[place].tolist(), label)
            weight += part
    given = {"class_weights": torch.tensor(of_classes)}
    given |= {"partners": (others, shares)} if mixed else {}
    given |= {"weights": weights} if weighted else {}
    loss = LOSSES[name]
    assert loss(logits, labels, **given).item() == pytest.approx(total / weight)
    count = global_count(counted(loss, labels, **given))
    assert count.item() == pytest.approx(weight)
    assert loss(logits, labels, count=count, **given).item() == pytest.approx(total / weight)


def test_wrong_labels_are_refused():
    outputs, labels = torch.zeros(1, 2, K), torch.full((1, 2, K), 0.5)
    labels[0, 1, 2] = 1.5
    for loss in (segment_cross_entropy, segment_sigmoid_cross_entropy):
        with pytest.raises(
            ValueError, match=r"^a label is 1.5, expected in \[0, 1\], or NaN; choose"
        ):
            loss(outputs, labels)
        message = "labels.shape is (1, 2, 1), expected (1, 2, 3) (outputs.shape); give one number a"
        with pytest.raises(ValueError, match=re.escape(message)):
            loss(outputs, labels[..., :1])
        message = (
            "class_weights is 'given', expected None with numbers as labels; only classes have"
        )
        with pytest.raises(ValueError, match=message):
            loss(outputs, labels, class_weights=torch.ones(K))
    for loss in (segment_squared_error, segment_absolute_error):
        with pytest.raises(ValueError, match=r"^targets.shape is \(1, 2\), expected \(1, 2, 3\)"):
            loss(outputs, torch.zeros(1, 2, dtype=torch.int64))


def table(num_rows=10):
    """Packed rows whose labels are the mean red, green and blue of an image, some of them NaN."""
    rng = np.random.default_rng(1)
    lens = [[int(n) for n in rng.integers(1, 6, rng.integers(1, 4))] for _ in range(num_rows)]
    rows = packed.rows_of(packed.RowSet(lens, seq_len=16, max_segments=4))
    means = []
    for row, number in ((r, n) for r, some in enumerate(lens) for n in range(len(some))):
        patches = rows.patches[row][rows.segment_ids[row] == number + 1]
        means.append(patches.reshape(-1, 3).mean(0) / 255)
    labels = np.array(means, np.float32)
    labels[3::7, 1] = np.nan
    rows.segments["labels"] = as_arrow(labels)
    config = PackConfig(seq_len=16, patch_size=packed.PATCH_SIZE)
    return rows_table(rows, schema.row_schema(config, pa.list_(pa.float32(), 3)))


def loader_of(**options):
    return PackedLoader(table(), 2, max_segments=4, seed=3, **options)


def model_of(**options):
    return packed.model_of("auto", torch.float32, num_classes=K, **options)


@functools.cache
def trained(name):
    model, validate = model_of(), loader_of(tail="pad")
    config = learning.config_of(loss=name, steps=24, val_every=12)
    return list(train(model, loader_of(), config, validate=validate)), model


@every_loss
def test_models_learn_numbers(name):
    records, _ = trained(name)
    first, last = (sum(r.loss for r in some) / 5 for some in (records[:5], records[-5:]))
    assert last < first
    measured = [r for r in records if r.val_loss is not None]
    assert [r.step for r in measured] == [12, 24]
    is_regression = name in ("mse", "l1")
    for figures in ((records[-1].accuracy, records[-1].error),
                    (measured[-1].val_accuracy, measured[-1].val_error)):  # fmt: skip
        assert [one is None for one in figures] == [is_regression, not is_regression]
    assert measured[-1].val_ece is None
    assert [r.val_mean_ap is None for r in measured] == [name != "sigmoid"] * 2


@every_loss
def test_validation_is_that_of_the_answers_each_alone(name):
    _, model = trained(name)
    loader = loader_of(tail="pad")
    found = measure(model, loader, LOSSES[name])
    answers = predict_packs(model, loader.packs)
    each = [
        one
        for outputs, labels in zip(answers.outputs.tolist(), answers.labels.tolist(), strict=True)
        if (one := naive(name, outputs, labels)) is not None
    ]
    losses, agreed, compared = map(sum, zip(*each, strict=True))
    assert found.num_images == len(each)
    assert found.loss == pytest.approx(losses / len(each), abs=1e-6)
    figure = found.error if name in ("mse", "l1") else found.accuracy
    assert figure == pytest.approx(agreed / compared, abs=1e-6)
    ranked = naive_ap(answers.outputs.tolist(), answers.labels.tolist())
    assert found.mean_ap == (pytest.approx(ranked, abs=1e-9) if name == "sigmoid" else None)


def test_images_are_ranked_among_those_of_all_ranks(monkeypatch):
    _, model = trained("sigmoid")
    loader = loader_of(tail="pad", rank=0, world_size=1)
    answers = predict_packs(model, loader.packs)
    known = ~answers.labels.isnan().all(-1)
    outputs, labels = answers.outputs[known], answers.labels[known]

    def gather(everyone, own):
        """As if another rank had the same images with other labels."""
        other = own if isinstance(own, dict) else [(a, 1 - b) for a, b in own]
        everyone[:] = [own, other]

    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    found = measure(model, loader, LOSSES["sigmoid"]).mean_ap
    both = torch.cat([outputs, outputs]), torch.cat([labels, 1 - labels])
    assert found == pytest.approx(naive_ap(*(one.tolist() for one in both)), abs=1e-9)
    assert found != naive_ap(outputs.tolist(), labels.tolist())


class Unread(StoredPacks):
    """Packs whose labels are known, and whose rows nobody may ask for."""

    def rows(self, key, packs):
        raise AssertionError(f"{packs} of {key} are read")


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("softmax", [0.0, 1.5, 0.0], "a label is 1.5, expected in [0, 1], or NaN; choose"),
        ("sigmoid", [0.0, -0.5, 0.0], "a label is -0.5, expected in [0, 1], or NaN; choose"),
        ("mse", [0.5, 0.5], "num_classes is 3, expected 2, as labels have numbers; make"),
        ("softmax", 7, "a label is 7, expected 0..2, or -100 for a segment that does"),
    ],
)
def test_a_label_that_packs_know_is_refused_before_anything_is_read(name, label, message):
    rows = table(2)
    lens = [len(some) for some in rows["seq_lens"].to_pylist()]
    labels = pa.array([label] * sum(lens))
    kind = pa.list_(pa.float32(), len(label)) if isinstance(label, list) else pa.int64()
    nested = pa.ListArray.from_arrays(np.cumsum([0, *lens], dtype=np.int32), labels.cast(kind))
    rows = rows.set_column(rows.column_names.index("labels"), "labels", nested)
    loader = PackedLoader(Unread(rows), 2, max_segments=4)
    with pytest.raises(ValueError, match=re.escape(message)):
        objective_of(learning.config_of(loss=name), loader.packs, model_of().config, None)
    with pytest.raises(ValueError, match=re.escape(message)):
        next(train(model_of(), loader, learning.config_of(loss=name)))


def test_a_label_of_a_stream_is_looked_at_in_its_batch_before_it_is_moved():
    batch, shape = next(iter(loader_of())), model_of().config
    check_batch(batch, shape, LOSSES["sigmoid"])
    batch.labels[0, 0, 1] = 1.5
    check_batch(batch, shape, LOSSES["mse"])
    for name in ("softmax", "sigmoid"):
        with pytest.raises(ValueError, match=r"^a label is 1.5, expected in \[0, 1\], or NaN; ch"):
            check_batch(batch, shape, LOSSES[name])


@pytest.mark.parametrize("name", ["mse", "l1"])
def test_a_regression_on_classes_is_refused(name):
    config, shape = learning.config_of(loss=name), model_of().config
    message = (
        f"loss is '{name}', expected 'softmax' or 'sigmoid' with integers as labels, which are "
        "classes; if they are numbers, cast_column them to Value('float32')"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        objective_of(config, learning.loader_of().packs, shape, None)
    with pytest.raises(ValueError, match=re.escape(message)):  # of a stream
        check_batch(next(iter(learning.loader_of())), shape, LOSSES[name])
    loader = PackedLoader(learning.table(), 2, max_segments=4, tail="pad")
    with pytest.raises(ValueError, match=re.escape(message)):
        check_measurable(model_of(), loader, LOSSES[name])
    dense = model_of(pooling="none").config
    message = f"loss is '{name}', expected 'softmax' or 'sigmoid' without pooling, as masks are of"
    with pytest.raises(ValueError, match=message):
        objective_of(config, object(), dense, None)


def test_a_model_of_another_number_of_outputs_is_refused():
    model = packed.model_of("auto", torch.float32, num_classes=5)
    with pytest.raises(ValueError, match=r"^num_classes is 5, expected 3, as labels have numbers;"):
        measure(model, loader_of(tail="pad"), LOSSES["mse"])


def test_numbers_of_mixed_images_are_mixed():
    plain = list(loader_of())
    mixed = list(loader_of(augment=Augment(flip=0, mixup=1.0)))
    changed = 0
    for before, after in zip(plain, mixed, strict=True):
        assert after.partners is None
        weights = after.mix_weight
        for row, segment in after.present.nonzero().tolist():
            place = row, segment
            partner = row, segment ^ 1
            own = before.labels[place]
            # What an image has of its own is 1 but for tokens that meet, by mixup's weight.
            tokens = after.segment_ids[row] == segment + 1
            meet = (after.mix_offset[row][tokens] != 0).float().mean()
            share = 1 - (1 - weights[place]) * meet
            wanted = own
            if share < 1:
                wanted = share * own + (1 - share) * before.labels[partner]
                changed += 1
            assert torch.allclose(after.labels[place], wanted, equal_nan=True, atol=1e-6)
    assert changed > 10
