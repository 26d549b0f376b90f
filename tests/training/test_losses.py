"""The loss counts every image once, whichever row it is in."""

import functools
import math
import re

import packed
import pytest
import torch

from packpipe.training.losses import (
    global_count,
    segment_cross_entropy,
    segment_sigmoid_cross_entropy,
    segment_squared_error,
)


def test_the_mean_is_over_segments_not_over_rows():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3], [0, -100, -100]])
    each = [
        -logits[row, number].log_softmax(-1)[labels[row, number]]
        for row, number in [(0, 0), (0, 1), (0, 2), (1, 0)]
    ]
    assert segment_cross_entropy(logits, labels).item() == pytest.approx(sum(each).item() / 4)


def test_absent_segments_get_no_gradient():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 4, requires_grad=True)
    segment_cross_entropy(logits, torch.tensor([[2, -100, -100]])).backward()
    assert logits.grad[0, 0].abs().sum() > 0
    assert (logits.grad[0, 1:] == 0).all()


def test_no_labels_at_all_give_zero():
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = segment_cross_entropy(logits, torch.full((1, 2), -100))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def random_batch(seed=0, rows=3, segments=4, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, segments, classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, classes, (rows, segments), generator=generator)
    present = torch.rand(rows, segments, generator=generator) < 0.7
    present[0, 0] = True
    return logits, torch.where(present, labels, -100), present


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_labels_are_shares_of_all_classes(smoothing):
    logits, labels, present = random_batch(seed=3)
    total = 0.0
    for logit, label in zip(logits[present].tolist(), labels[present].tolist(), strict=True):
        whole = sum(math.exp(one) for one in logit)
        for number, one in enumerate(logit):
            target = (1 - smoothing) * (number == label) + smoothing / len(logit)
            total -= target * math.log(math.exp(one) / whole)
    found = segment_cross_entropy(logits, labels, label_smoothing=smoothing)
    assert found.item() == pytest.approx(total / int(present.sum()))
    logits = logits.masked_fill(~present[..., None], math.nan).requires_grad_()
    segment_cross_entropy(logits, labels, label_smoothing=smoothing).backward()
    assert not logits.grad[~present].any()
    assert logits.grad[present].any()


@pytest.mark.parametrize("wrong", [-0.1, 1, math.nan])
def test_a_smoothing_that_is_no_share_is_refused(wrong):
    logits, labels, _ = random_batch()
    with pytest.raises(ValueError, match=f"^label_smoothing is {wrong}, expected "):
        segment_cross_entropy(logits, labels, label_smoothing=wrong)


def mixed_batch(seed=5):
    """Of some images the labels of partners, and what is their own."""
    logits, labels, present = random_batch(seed, rows=4, segments=5)
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(0, 5, labels.shape, generator=generator)
    others[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    weights = torch.rand(labels.shape, generator=generator).masked_fill(others == -100, 1)
    return logits, labels, present, (others, weights)


MIXABLE = {
    "softmax": segment_cross_entropy,
    "smoothed": functools.partial(segment_cross_entropy, label_smoothing=0.2),
    "sigmoid": segment_sigmoid_cross_entropy,
}


@pytest.mark.parametrize("loss", MIXABLE.values(), ids=MIXABLE)
def test_of_mixed_images_both_labels_count_by_their_shares(loss):
    logits, labels, present, (others, weights) = mixed_batch()
    both = present & (others != -100)
    assert both.any()
    assert (present & ~both).any()
    assert (~present & (others != -100)).any()
    total = 0.0
    for row, number in present.nonzero().tolist():
        one = logits[None, None, row, number]
        share = float(weights[row, number]) if both[row, number] else 1.0
        total += share * loss(one, labels[None, None, row, number]).item()
        if share < 1:
            total += (1 - share) * loss(one, others[None, None, row, number]).item()
    found = loss(logits, labels, partners=(others, weights)).item()
    assert found == pytest.approx(total / int(present.sum()))
    seven = loss(logits, labels, partners=(others, weights), count=torch.tensor(7.0)).item()
    assert seven == pytest.approx(total / 7)


@pytest.mark.parametrize("loss", MIXABLE.values(), ids=MIXABLE)
def test_a_partner_of_no_share_and_no_partner_change_nothing(loss):
    logits, labels, present, (others, weights) = mixed_batch()
    plain = loss(logits, labels).item()
    ones = torch.ones_like(weights)
    assert loss(logits, labels, partners=(others, ones)).item() == pytest.approx(plain, rel=1e-14)
    nobody = torch.full_like(others, -100)
    assert loss(logits, labels, partners=(nobody, weights)).item() == pytest.approx(plain)
    logits = logits.masked_fill(~present[..., None], math.nan).requires_grad_()
    loss(logits, labels, partners=(others, weights)).backward()
    assert not logits.grad[~present].any()
    assert logits.grad[present].any()


def test_a_partner_s_label_that_is_no_class_is_refused():
    logits, labels = torch.zeros(1, 1, 3), torch.tensor([[1]])
    partners = torch.tensor([[3]]), torch.tensor([[0.5]])
    for loss in (segment_cross_entropy, segment_sigmoid_cross_entropy):
        with pytest.raises(ValueError, match=r"^a label is 3, expected 0\.\.2, or -100 for a"):
            loss(logits, labels, partners=partners)
    message = "^partners is 'given', expected None with numbers as labels; only classes have them$"
    with pytest.raises(ValueError, match=message):
        segment_sigmoid_cross_entropy(
            logits, torch.zeros(1, 1, 3), present=torch.ones(1, 1).bool(), partners=partners
        )


def naive_sigmoid(logits, targets):
    total = 0.0
    for logit, target in zip(logits.tolist(), targets.tolist(), strict=True):
        right = 1 / (1 + math.exp(-logit))
        total -= target * math.log(right) + (1 - target) * math.log(1 - right)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_sigmoid_loss_is_summed_over_classes_and_averaged_over_images(seed):
    logits, labels, present = random_batch(seed)
    each = []
    for row, number in present.nonzero().tolist():
        targets = torch.zeros(5)
        targets[labels[row, number]] = 1
        each.append(naive_sigmoid(logits[row, number], targets))
    assert len(each) < present.numel()
    expected = pytest.approx(sum(each) / len(each))
    assert segment_sigmoid_cross_entropy(logits, labels).item() == expected
    torch.manual_seed(seed)
    shares = torch.rand(3, 4, 5, dtype=torch.float64)
    each = [naive_sigmoid(logits[r, n], shares[r, n]) for r, n in present.nonzero().tolist()]
    found = segment_sigmoid_cross_entropy(logits, shares, present=present).item()
    assert found == pytest.approx(sum(each) / len(each))


@pytest.mark.parametrize("seed", range(5))
def test_the_squared_error_is_averaged_over_images(seed):
    outputs, _, present = random_batch(seed)
    torch.manual_seed(seed)
    targets = torch.rand(3, 4, 5, dtype=torch.float64)
    each = [
        sum(
            (a - b) ** 2
            for a, b in zip(outputs[r, n].tolist(), targets[r, n].tolist(), strict=True)
        )
        / 5
        for r, n in present.nonzero().tolist()
    ]
    found = segment_squared_error(outputs, targets, present=present).item()
    assert found == pytest.approx(sum(each) / len(each))


def softmax(values, labels, present, count):
    del present
    return segment_cross_entropy(values, labels, count=count)


def sigmoid(values, labels, present, count):
    del present
    return segment_sigmoid_cross_entropy(values, labels, count=count)


def classes(values, labels, present, count):
    del labels
    targets = (values.detach() > 0).double()
    return segment_sigmoid_cross_entropy(values, targets, present=present, count=count)


def squared(values, labels, present, count):
    del labels
    targets = torch.full_like(values, 2.0).masked_fill(~present[..., None], torch.nan)
    return segment_squared_error(values, targets, present=present, count=count)


every_loss = pytest.mark.parametrize("loss", [softmax, sigmoid, classes, squared])


@every_loss
def test_what_stands_in_absent_segments_does_not_count(loss):
    values, labels, present = random_batch()
    assert not present.all()
    results = []
    for fill in (0.0, torch.nan, torch.inf):
        outputs = values.masked_fill(~present[..., None], fill).requires_grad_()
        found = loss(outputs, labels, present, None)
        found.backward()
        results.append((found.detach(), outputs.grad))
        assert (outputs.grad[~present] == 0).all()
        assert (outputs.grad[present] != 0).any()
    assert all(torch.equal(found, results[0][0]) for found, _ in results)
    assert all(torch.equal(gradient, results[0][1]) for _, gradient in results)


@every_loss
def test_the_count_is_what_the_sum_is_divided_by(loss):
    values, labels, present = random_batch()
    own = loss(values, labels, present, None)
    assert loss(values, labels, present, torch.tensor(7.0)).item() == pytest.approx(
        own.item() * int(present.sum()) / 7
    )
    nothing = torch.zeros_like(present)
    assert loss(values, torch.full_like(labels, -100), nothing, None).item() == 0


@every_loss
def test_micro_batches_with_the_count_of_all_have_the_gradient_of_one_batch(loss):
    model = packed.model_of("auto", torch.float64)
    lens = [[4, 1, 1, 2], [9], [1, 4], [6]]
    batch = packed.batch_of(packed.RowSet(lens, seq_len=12, max_segments=4))

    def gradient_of(micro_batches, count):
        model.zero_grad()
        for part in micro_batches:
            loss(model(part), part.labels, part.present, count).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    rows = [type(batch)({n: v[row : row + 1] for n, v in batch.items()}) for row in range(4)]
    wanted = gradient_of([batch], None)
    found = gradient_of(rows, global_count(*(part.present for part in rows)))
    assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()
    # The mean of their means, which counts the lonely image of a row four times.
    mean = gradient_of(rows, None) / len(rows)
    assert (mean - wanted).abs().max() > 0.01 * wanted.abs().max()


@pytest.mark.parametrize("loss", [segment_cross_entropy, segment_sigmoid_cross_entropy])
@pytest.mark.parametrize("wrong", [-1, -99, 3, 109])
def test_a_label_that_is_no_class_is_refused(loss, wrong):
    logits = torch.zeros(1, 4, 3)
    assert loss(logits, torch.tensor([[0, 1, 2, -100]])).isfinite()
    message = (
        f"a label is {wrong}, expected 0..2, or -100 for a segment that does not count; give the "
        "model as many classes as the labels have"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loss(logits, torch.tensor([[0, -100, wrong, 1]]))


def test_labels_of_absent_segments_may_be_anything():
    present = torch.tensor([[True, False]])
    loss = segment_sigmoid_cross_entropy(
        torch.zeros(1, 2, 3), torch.tensor([[2, 77]]), present=present
    )
    assert loss.item() == pytest.approx(3 * math.log(2))


def test_one_process_counts_its_own():
    assert global_count(torch.tensor([[True, False], [True, True]])).item() == 3
    assert global_count(torch.tensor([False])).item() == 1
    of_micro_batches = torch.ones(2, 3).bool(), torch.zeros(1, 4).bool(), torch.ones(1).bool()
    assert global_count(*of_micro_batches).item() == 7


def test_targets_that_would_be_broadcast_are_refused():
    message = (
        "targets.shape is (1, 2, 1), expected (1, 2, 3) (outputs.shape); give one number a channel"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        segment_squared_error(
            torch.zeros(1, 2, 3), torch.zeros(1, 2, 1), present=torch.ones(1, 2).bool()
        )


def test_several_labels_an_image_may_be_integers_or_bools():
    logits, _, present = random_batch()
    several = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    wanted = segment_sigmoid_cross_entropy(logits, several.double(), present=present)
    for labels in (several, several.long(), several.byte()):
        assert segment_sigmoid_cross_entropy(logits, labels, present=present) == wanted
