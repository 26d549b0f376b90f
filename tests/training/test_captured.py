"""A step that reads its batches from tensors of its own is the step itself, graph or no graph."""

import logging
import re
from contextlib import contextmanager

import learning
import pytest
import torch

from packpipe.training.captured import EAGER, CapturedStep
from packpipe.training.loop import train

CPU = torch.device("cpu")


def trained(**options):
    model = learning.model_of()
    options = {"steps": 5, "log_every": 2, "ema": 0.9, "clip": 0.1, **options}
    records = list(train(model, learning.loader_of(), learning.config_of(**options)))
    return [(r.step, r.loss, r.accuracy, r.fill) for r in records], model.state_dict()


def test_a_training_with_such_steps_is_bit_for_bit_the_same():
    plain, captured = (trained(captured=some, accumulate=2) for some in (False, True))
    assert plain[0] == captured[0]
    assert len(plain[0]) == 3
    assert all(torch.equal(value, captured[1][name]) for name, value in plain[1].items())


class Recorded:
    """A graph as CUDA records one: replayed, it does what its step did, from the same tensors."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for call in self.calls:
            call()


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins of CUDA's graphs, and the step that they record."""
    made = []

    @contextmanager
    def graph(one):
        made.append(one)
        yield

    @contextmanager
    def stream(_):
        yield

    class Stream:
        def wait_stream(self, _):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return made


def test_the_graph_is_made_once_and_replayed_for_every_later_batch(graphs):
    total, seen, out = torch.zeros(2), [], torch.zeros(2)

    def step(batches):
        ((batch, nothing),) = batches
        assert nothing is None
        seen.append(batch.data_ptr())

        def kernel():
            total.add_(batch)
            out.copy_(total)

        # A capture records kernels, and runs none.
        (graphs[-1].calls.append if graphs else lambda call: call())(kernel)
        return out

    captured = CapturedStep(step, CPU, captures=True)
    for number in range(1, 9):
        found = captured([(torch.tensor([1.0, number]), None)])
        assert found.tolist() == [number, number * (number + 1) / 2]
    assert len(graphs) == 1
    assert len(seen) == EAGER + 1
    assert len(set(seen)) == 1


def test_batches_of_another_form_are_stepped_on_as_they_are():
    seen = []
    step = CapturedStep(seen.append, CPU)
    first, longer = torch.zeros(2), torch.zeros(3)
    for batch in (first, longer, {"a": first}, first.int(), first):
        step(batch)
    assert seen[1] is longer
    assert seen[2]["a"] is first
    assert seen[3].dtype == torch.int32
    assert seen[0] is not first
    assert seen[0].data_ptr() == seen[4].data_ptr()


def test_a_step_that_cannot_be_captured_goes_on_without_a_graph(graphs, caplog):
    refused = []

    def step(batch):
        if graphs and not refused:
            refused.append(batch)
            raise RuntimeError("operation not permitted when stream is capturing")
        return batch.clone()

    captured = CapturedStep(step, CPU, captures=True)
    with caplog.at_level(logging.WARNING):
        found = [captured(torch.full((1,), number)).item() for number in range(EAGER + 3)]
    assert found == list(range(EAGER + 3))
    assert len(graphs) == len(refused) == 1
    assert "the step is not captured as a graph, and goes on without: operation not" in caplog.text


def test_what_cannot_be_captured_is_refused():
    message = "captured is True, expected False under torchrun, or with trim; leave it out"
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(captured=True, trim=8)
    with pytest.raises(TypeError, match="captured is 'yes', expected"):
        learning.config_of(captured="yes")
