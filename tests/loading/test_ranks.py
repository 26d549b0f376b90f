"""A process group that has ended is gone, whatever torch imported while it was there."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial

import loading
import pytest
import torch
import two_ranks
from hypothesis import given
from hypothesis import strategies as st

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
@pytest.mark.parametrize("what", ["sigmoid", "train"])
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


def told(call, number):
    """What `call(rank)` returns or raises on each of some ranks, which gather from each other."""
    passed: list = []
    results: list = []

    def gather(everyone, own):
        passed.append(own)
        everyone[:] = passed[:number] if len(passed) > number else [own] * number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: number)
        patch.setattr(torch.distributed, "all_gather_object", gather)
        for rank in [*range(number)] * 2:  # the second time all of them have passed theirs
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            try:
                results.append(call(rank))
            except (ValueError, OSError) as error:
                results.append(error)
    assert len(passed) == 2 * number
    return results[number:]


def said(message, name):
    """The value of a name on each rank, as a message tells it."""
    (part,) = re.findall(rf"(?:^| and ){name} is (.*?)(?: and [abc] is |, expected )", message)
    found = {}
    for value, numbers in re.findall(r"(\w+) \(rank (.*?)\)", part):
        for run in numbers.split(", "):
            first, _, last = run.partition("..")
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), value)
    return found


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), min_size=2, max_size=9))
def test_ranks_that_differ_are_all_told_the_value_of_each(everyone):
    errors = told(lambda rank: ranks.agree(everyone[rank]), len(everyone))
    different = {name for name in "abc" if len({str(one.get(name)) for one in everyone}) > 1}
    if not different:
        assert errors == [None] * len(everyone)
        return
    assert {type(error) for error in errors} == {ValueError}
    (message,) = {str(error) for error in errors}
    for name in different:
        wanted = {rank: str(one.get(name, "missing")) for rank, one in enumerate(everyone)}
        assert said(message, name) == wanted
    assert not any(f"{name} is" in message for name in set("abc") - different)


def test_neighbours_among_many_ranks_are_named_in_short():
    seeds = [1, 1, 1, 2, 1, 2, 2]
    (message,) = {str(error) for error in told(lambda rank: ranks.agree({"seed": seeds[rank]}), 7)}
    assert message == (
        "seed is 1 (rank 0..2, 4), 2 (rank 3, 5..6), expected the same on every rank; "
        "give all ranks the same data, options and checkpoint"
    )


def test_what_fails_on_one_rank_fails_on_all():
    def fails_on(failing, rank):
        def act():
            if rank in failing:
                raise OSError("no space")
            return rank

        return ranks.together(act)

    assert told(partial(fails_on, []), 3) == [0, 1, 2]
    errors = told(partial(fails_on, [1]), 3)
    message = (
        "error is None (rank 0, 2), 'OSError: no space' (rank 1), expected None on every rank; "
        "mend what failed, since ranks go on together or not at all"
    )
    assert [(type(error), str(error)) for error in errors] == [(ValueError, message)] * 3
    assert isinstance(errors[1].__context__, OSError)
    assert [repr(error) for error in told(partial(fails_on, [0, 1, 2]), 3)] == [
        "OSError('no space')"
    ] * 3


def test_alone_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_gather_object", None)
    ranks.agree({"seed": 1})
    assert ranks.together(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 // 0)
