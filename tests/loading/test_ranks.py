"""A process group that has ended is gone, whatever torch imported while it was there."""

from __future__ import annotations

import subprocess
import sys

import loading
import pytest
import two_ranks

from packpipe.loading import ranks

# With the collector off, so that nothing is gone by chance.
SCRIPT = """
import gc, os, sys
import two_ranks
from packpipe.loading import ranks
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
gc.disable()

def contrast():
    import contrasting
    contrasting.pairs(sys.argv[1], *ranks.rank_of_world())

def train():
    import learning, packpipe.training.loop
    model, loader, config = learning.model_of(), learning.loader_of(), learning.config_of(steps=2)
    assert [record.step for record in packpipe.training.loop.train(model, loader, config)][-1] == 2

with two_ranks.one_of_two_ranks():
    assert ranks.has_group()
    train() if sys.argv[1] == "train" else contrast()
assert not ranks.has_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["softmax", "sigmoid", "train"])
def test_nothing_of_a_group_is_left_when_it_has_ended(what):
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, what],
        env={**loading.environment(), **two_ranks.ENVIRONMENT},
        check=True,
        timeout=600,
    )


def test_alone_this_is_rank_0_of_1():
    assert not ranks.has_group()
    assert ranks.rank_of_world() == (0, 1)
    ranks.end_process_group()  # there is none to end
