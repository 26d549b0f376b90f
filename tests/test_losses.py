"""The loss counts every image once, whichever row it is in."""

import pytest
import torch

from packpipe.losses import segment_cross_entropy


def test_the_mean_is_over_segments_not_over_rows():
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3], [0, -100, -100]])
    each = [
        -logits[row, number].log_softmax(-1)[labels[row, number]]
        for row, number in [(0, 0), (0, 1), (0, 2), (1, 0)]
    ]
    assert segment_cross_entropy(logits, labels).item() == pytest.approx(sum(each).item() / 4)


def test_absent_segments_get_no_gradient():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    segment_cross_entropy(logits, torch.tensor([[2, -100, -100]])).backward()
    assert logits.grad[0, 0].abs().sum() > 0
    assert (logits.grad[0, 1:] == 0).all()


def test_no_labels_at_all_give_zero():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = segment_cross_entropy(logits, torch.full((1, 2), -100))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
