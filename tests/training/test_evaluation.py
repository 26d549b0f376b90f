"""Accuracy, calibration and cascades, against plain loops."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packpipe.model.predict import Answers
from packpipe.training.evaluation import accuracy, calibration_error, cascade


def answers_of(number, seed, classes=4, tokens=10, scale=2.0, index=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (number,), generator=generator)
    labels[torch.rand(number, generator=generator) < 0.1] = -100
    labels[0] = 1
    return Answers(
        example_index=torch.arange(number) if index is None else index,
        outputs=torch.randn(number, classes, generator=generator) * scale,
        seq_lens=torch.randint(1, tokens, (number,), generator=generator),
        labels=labels,
    )


def counted(answers):
    return [n for n, label in enumerate(answers.labels.tolist()) if label != -100]


cases = given(number=st.integers(1, 60), seed=st.integers(0, 99))


@cases
def test_accuracy_is_the_share_of_right_answers(number, seed):
    answers = answers_of(number, seed)
    right = [max(range(4), key=answers.outputs[n].tolist().__getitem__) for n in counted(answers)]
    wanted = [int(answers.labels[n]) for n in counted(answers)]
    share = sum(a == b for a, b in zip(right, wanted, strict=True)) / len(wanted)
    assert accuracy(answers) == pytest.approx(share)


@cases
def test_the_calibration_error_is_that_of_bins_weighed_by_their_images(number, seed):
    answers = answers_of(number, seed)
    bins = [[] for _ in range(30)]
    for n in counted(answers):
        shares = answers.outputs[n].double().softmax(0)
        confidence = float(shares.max())
        right = int(shares.argmax()) == int(answers.labels[n])
        bins[min(29, int(confidence * 30))].append((confidence, right))
    total = len(counted(answers))
    error = 0
    for held in filter(None, bins):
        mean, share = (sum(column) / len(held) for column in zip(*held, strict=True))
        error += len(held) / total * abs(mean - share)
    assert calibration_error(answers) == pytest.approx(error)


def test_a_model_that_is_as_sure_as_it_is_right_is_calibrated():
    # Of ten images with 70 % confidence, seven are right.
    logits = torch.tensor([[0.7, 0.3]]).log().expand(10, 2)
    labels = torch.tensor([0] * 7 + [1] * 3)
    answers = Answers(torch.arange(10), logits, torch.ones(10).long(), labels)
    assert calibration_error(answers) == pytest.approx(0, abs=1e-6)
    sure = Answers(torch.arange(10), logits * 100, torch.ones(10).long(), labels)
    assert calibration_error(sure) == pytest.approx(0.3)


@cases
def test_a_cascade_asks_the_least_sure_again(number, seed):
    first, second = answers_of(number, seed), answers_of(number, seed, tokens=40, scale=5.0)
    second = Answers(first.example_index, second.outputs, second.seq_lens, first.labels)
    shares = [0, 0.25, 0.5, 1]
    points = cascade(first, second, shares)
    assert [point.share for point in points] == shares
    known = counted(first)
    sure = {n: float(first.outputs[n].double().softmax(0).max()) for n in known}
    for point in points:
        again = sorted(known, key=sure.__getitem__)[: round(point.share * len(known))]
        right = sum(
            int((second if n in again else first).outputs[n].argmax()) == int(first.labels[n])
            for n in known
        )
        assert point.accuracy == pytest.approx(right / len(known))
        cost = sum(int(first.seq_lens[n]) for n in known)
        cost += sum(int(second.seq_lens[n]) for n in again)
        assert point.tokens == pytest.approx(cost / len(known))
    assert points[0].accuracy == pytest.approx(accuracy(first))
    assert points[-1].accuracy == pytest.approx(accuracy(second))


def test_what_cannot_be_judged_is_refused():
    answers = answers_of(5, 0)
    bare = Answers(answers.example_index, answers.outputs, answers.seq_lens, None)
    message = "answers.labels is None, expected integer labels; pack with label_column"
    with pytest.raises(ValueError, match=re.escape(message)):
        accuracy(bare)
    other = answers_of(5, 0, index=torch.arange(5) + 1)
    message = "second.example_index is '5 other images', expected the 5 of first; answer the same"
    with pytest.raises(ValueError, match=re.escape(message)):
        cascade(answers, other, [0.5])
    with pytest.raises(ValueError, match=re.escape("share is 1.5, expected a number in [0, 1];")):
        cascade(answers, answers, [1.5])
    with pytest.raises(ValueError, match=re.escape("bins is 0, expected an integer in 1..100000")):
        calibration_error(answers, bins=0)
    answers.outputs[3, 1] = torch.nan
    with pytest.raises(ValueError, match=re.escape("logits[3] is 'NaN', expected numbers; look")):
        calibration_error(answers)


@pytest.mark.parametrize(
    "judge", [accuracy, calibration_error, lambda answers: cascade(answers, answers, [0.5])]
)
def test_answers_that_are_no_class_an_image_are_refused(judge):
    answers = answers_of(5, 0)
    shape = answers.outputs.shape
    for labels in (torch.rand(shape), torch.rand(5, 1)):
        message = "answers.labels is 'numbers', expected a class an image; use measure, which tak"
        with pytest.raises(ValueError, match=message):
            judge(replace(answers, labels=labels))
    message = "answers.outputs is 'maps', expected an output an image; use measure, which takes"
    with pytest.raises(ValueError, match=message):
        judge(replace(answers, outputs=[torch.rand(2, 3, 4)] * 5))
