"""Mean average precision against a plain loop over thresholds."""

import math

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packpipe.training.average_precision import mean_average_precision


@given(number=st.integers(1, 30), seed=st.integers(0, 10**6), levels=st.sampled_from([2, 5, 10**6]))
def test_it_is_that_of_a_loop_over_thresholds(number, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (number, 4), generator=generator).float()  # some are equal
    labels = (torch.rand(number, 4, generator=generator) < 0.4).float()
    labels[torch.rand(number, 4, generator=generator) < 0.2] = math.nan
    wanted = naive.mean_average_precision(scores.tolist(), labels.tolist())
    found = mean_average_precision(scores, labels)
    assert found == (None if wanted is None else pytest.approx(wanted, abs=1e-12))


def test_known_values():
    # Positives at ranks 1 and 3: (1 + 2/3) ÷ 2.
    scores, labels = torch.tensor([[0.9], [0.5], [0.2]]), torch.tensor([[1.0], [0.0], [1.0]])
    assert mean_average_precision(scores, labels) == pytest.approx(5 / 6)
    assert mean_average_precision(torch.zeros(4, 1), torch.eye(4)[:, :1]) == 0.25
    assert mean_average_precision(scores, torch.zeros(3, 1)) is None
    assert math.isnan(mean_average_precision(scores * math.nan, labels))
