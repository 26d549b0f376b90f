"""Chunked contrastive losses equal the full ones, absent pairs or not, on any number of ranks."""

import json
import re

import contrasting
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from two_ranks import run_on_two_ranks

from packpipe.training.contrastive import sigmoid_contrastive, softmax_contrastive

kinds = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])


def full(kind, images, texts, scale, bias, present):
    """The loss of the present pairs by their whole matrix, pair by pair."""
    images, texts = images[present], texts[present]
    number = max(1, len(images))
    if not len(images):
        return images.sum() * 0
    logits = scale * images @ texts.T
    if kind == "sigmoid":
        total = 0
        for i in range(number):
            for j in range(number):
                z = 1 if i == j else -1
                total = total + torch.log1p(torch.exp(-z * (logits[i, j] + bias)))
        return total / number
    rows = logits.logsumexp(1) - logits.diagonal()
    columns = logits.logsumexp(0) - logits.diagonal()
    return (rows.sum() + columns.sum()) / 2 / number


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@given(
    number=st.integers(1, 20),
    chunk=st.integers(1, 25),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
)
def test_chunks_give_the_full_loss_and_its_gradients(
    kind, dtype, tolerance, number, chunk, seed, share
):
    images, texts, scale, bias = contrasting.inputs(number, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(number, generator=generator) <= share
    wanted = full(kind, images, texts, scale, bias, present)
    found = contrasting.loss_of(kind, images, texts, scale, bias, present, chunk)
    assert (found - wanted).abs() <= tolerance * max(1, wanted.abs().item())
    pairs = zip(
        gradients(found, images, texts, scale, bias),
        gradients(wanted, images, texts, scale, bias),
        strict=True,
    )
    for one, other in pairs:
        assert (one - other).abs().max() <= tolerance * max(1, other.abs().max().item())


@kinds
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_what_stands_in_absent_pairs_does_not_count(kind, fill):
    images, texts, scale, bias = contrasting.inputs(7, 0, torch.float64)
    present = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    results = []
    for value in (0.0, fill):
        held = [
            side.detach().masked_fill(~present[:, None], value).requires_grad_()
            for side in (images, texts)
        ]
        loss = contrasting.loss_of(kind, *held, scale, bias, present, 3)
        results.append([loss.detach(), *gradients(loss, *held, scale, bias)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[1][0].isfinite()
    assert (results[1][1][~present] == 0).all()


class Largest(TorchDispatchMode):
    """Keeps the largest number of elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@kinds
def test_memory_is_linear_in_the_chunk(kind):
    number, saved = 256, []
    images, texts, scale, bias = contrasting.inputs(number, 0, torch.float32)
    present = torch.ones(number, dtype=torch.bool)
    found = {}
    for chunk in (8, 64, 256):
        saved.clear()
        with (
            Largest() as largest,
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
            ),
        ):
            contrasting.loss_of(kind, images, texts, scale, bias, present, chunk).backward()
        assert max(saved) <= max(chunk * number, images.numel())
        found[chunk] = largest.elements
    assert found == {8: max(8 * number, images.numel()), 64: 64 * number, 256: number**2}


@pytest.mark.slow
@kinds
def test_two_ranks_together_have_the_loss_of_all_pairs(kind, tmp_path):
    run_on_two_ranks(contrasting.__file__, kind, tmp_path)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    loss, found = contrasting.whole(kind)
    assert sum(rank["loss"] for rank in ranks) / 2 == pytest.approx(loss, abs=1e-10)
    assert len(found) == 4
    for rank in ranks:
        for one, other in zip(rank["gradients"], found, strict=True):
            assert np.array(one) == pytest.approx(np.array(other), abs=1e-10)
    classes, gradient, examples = contrasting.classified(0, 1)
    assert sum(rank["classified"] for rank in ranks) / 2 == pytest.approx(classes)
    for rank in ranks:
        assert np.array(rank["classified gradient"]) == pytest.approx(gradient.numpy(), abs=1e-12)
    assert [rank["examples"] for rank in ranks] == [[1, 2], [4, 1]]
    assert examples == [8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 4)}, "images.ndim is 3, expected 2 (pairs, channels); flat"),
        ({"texts": torch.zeros(4, 3)}, "texts.shape is (4, 3), expected (3, 3), as images has it"),
        (
            {"present": torch.ones(2).bool()},
            "present.shape is (2,), expected (3,), as images has it; give one row a pair",
        ),
        ({"chunk": 0}, "chunk is 0, expected an integer in 1..2147483648; 1024 is usual"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"images": torch.eye(3), "texts": torch.eye(3), "scale": torch.ones(()), **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        softmax_contrastive(**arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        sigmoid_contrastive(**arguments, bias=torch.zeros(()))
