from __future__ import annotations

import gc
import json
import multiprocessing
import pickle
import re
import signal
import time
from copy import copy, deepcopy
from itertools import chain, islice
from pathlib import Path
from typing import Any

import loading
import numpy as np
import pytest
import torch
from forked import Forked
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import children, wait_until

from packpipe import PackedBatch, PackedLoader, read_rows
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key

KINDS = ["stored", "computed", "planned"]


@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("packs")
    return {kind: loading.packs_of(kind, folder) for kind in KINDS}


def ranks_of(packs: Any, world_size: int, global_batch: int = 8, **options) -> list[PackedLoader]:
    return [
        PackedLoader(packs, global_batch // world_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def uninterrupted(packs: Any, num_epochs: int, **options) -> list[list[str]]:
    loader = PackedLoader(packs, 8, **options)
    return [[loading.digest(batch) for batch in loader] for _ in range(num_epochs)]


@pytest.mark.parametrize(("kind", "num_workers"), [("stored", 0), ("stored", 2), ("planned", 2)])
def test_passes_are_one_loop_after_the_other_and_resume_anywhere(packs, kind, num_workers):
    wanted = uninterrupted(packs[kind], 3)
    flat = [(digest, epoch) for epoch, digests in enumerate(wanted) for digest in digests]
    loader = PackedLoader(packs[kind], 8, num_workers=num_workers, prefetch=3)
    states, found = [], []
    for batch, key in islice(loader.passes(), len(flat)):
        found.append((loading.digest(batch), key.epoch))
        states.append(deepcopy(loader.state_dict()))
    assert found == flat
    assert len(wanted[0]) > 2
    # Also at the last batches of an epoch, when those of the next one are filled already.
    for place in (0, len(wanted[0]) - 2, len(wanted[0]) - 1, len(wanted[0])):
        loader = PackedLoader(packs[kind], 8, num_workers=num_workers)
        loader.load_state_dict(states[place])
        rest = [loading.digest(batch) for batch, _ in islice(loader.passes(), 3)]
        assert rest == [digest for digest, _ in flat[place + 1 : place + 4]]


class Asked:
    """Packs that note of which epochs rows are asked for; from some epoch on there are none."""

    max_segments = 6

    def __init__(self, packs: Any, last: int = 2**32) -> None:
        self.packs, self.last, self.epochs = packs, last, []

    def num_packs(self, key: Key) -> int:
        return self.packs.num_packs(key) if key.epoch <= self.last else 1

    def fingerprint(self, key: Key) -> str:
        return self.packs.fingerprint(key)

    def rows(self, key: Key, numbers: Any) -> Any:
        self.epochs.append(key.epoch)
        return self.packs.rows(key, numbers)


def test_the_next_pass_is_filled_while_one_ends_but_not_in_a_loop_of_one_pass(packs):
    stored = StoredPacks(packs["stored"])
    asked = Asked(stored)
    steps = stored.num_packs(Key(0, 0)) // 8
    passes = PackedLoader(asked, 8, num_workers=1, prefetch=2).passes()
    for _ in range(steps):
        next(passes)
    wait_until(lambda: asked.epochs.count(1) == 2)
    assert asked.epochs.count(0) == steps
    passes.close()
    once = Asked(stored)
    assert len(list(PackedLoader(once, 8, num_workers=1))) == steps
    assert set(once.epochs) == {0}


def test_what_is_wrong_with_the_next_pass_is_raised_when_this_one_is_over(packs):
    asked = Asked(StoredPacks(packs["stored"]), last=0)
    passes = PackedLoader(asked, 8, num_workers=1).passes()
    for _ in range(StoredPacks(packs["stored"]).num_packs(Key(0, 0)) // 8):
        next(passes)
    with pytest.raises(ValueError, match="num_packs is 1, expected 8"):
        next(passes)


def test_the_longest_image_is_known_before_any_batch(packs):
    loaders = {kind: PackedLoader(packs[kind], 4, tail="pad") for kind in KINDS}
    found = {
        kind: max(int(batch.seq_lens.max()) for batch in loader) for kind, loader in loaders.items()
    }
    assert loaders["stored"].longest == found["stored"] > 1
    # Of what is planned anew each epoch the options say it, not the epoch.
    assert found["planned"] <= loaders["planned"].longest == 24


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_every_pack_once_and_the_next_takes_another_order(packs, kind):
    loader = PackedLoader(packs[kind], 4, tail="pad")
    epochs = [[batch.by_example(batch.seq_lens) for batch in loader] for _ in range(3)]
    orders = [torch.cat([index for index, _ in batches]).tolist() for batches in epochs]
    assert all(sorted(order) == list(range(270)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert loader.epoch == 2
    # Several images share a row, and no row is longer than it may be.
    batch = next(iter(loader))
    assert batch.present.sum(dim=1).max() > 1
    assert batch.patches.shape == (4, 24, 192)
    assert batch.seq_lens.shape[1] == loader.packs.max_segments


def test_what_is_printed_of_a_loader_and_a_batch_is_a_line(packs):
    for kind in packs:
        loader = PackedLoader(packs[kind], 2, seed=3)
        said = repr(loader)
        assert said.startswith("PackedLoader(")
        assert said.endswith(", batch_size=2, seed=3, epoch=0)")
        assert "tokens" in said or "rows" in said
        assert len(said) < 200
        batch = repr(next(iter(loader)))
        assert len(batch) < 400
        assert "seq_lens=int32[2, " in batch
        assert "\n" not in said + batch


def test_stored_rows_come_as_they_are_read(packs):
    dataset = packs["stored"]
    loader = PackedLoader(dataset, 3, shuffle=False)
    for step, batch in enumerate(loader):
        rows = read_rows(dataset, range(3 * step, 3 * step + 3))
        wanted = PackedBatch.from_rows(rows, max_segments=loader.packs.max_segments)
        assert loading.digest(batch) == loading.digest(wanted)
    assert step == len(dataset) // 3 - 1 > 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_workers", "workers"),
    [
        *[(num_workers, "threads") for num_workers in (1, 2, 4)],
        *[(num_workers, "processes") for num_workers in (1, 3)],
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
def test_workers_change_no_byte(packs, kind, num_workers, workers):
    options = {"tail": "pad", "balance": True}
    alone = uninterrupted(packs[kind], 2, **options)
    assert len({*alone[0], *alone[1]}) == len(alone[0]) + len(alone[1]) > 6
    some = {"num_workers": num_workers, "workers": workers, "prefetch": 1}
    assert uninterrupted(packs[kind], 2, **options, **some) == alone


PROCESSES = {"num_workers": 2, "workers": "processes", "prefetch": 1}


@pytest.mark.parametrize(
    ("kind", "persistent"), [*((kind, True) for kind in KINDS), ("planned", False)]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_processes_stay_from_pass_to_pass_unless_they_shall_not(packs, kind, persistent):
    before = children()
    alone = uninterrupted(packs[kind], 4, tail="pad")
    loader = PackedLoader(packs[kind], 8, tail="pad", persistent=persistent, **PROCESSES)
    used = []

    def steps(loader: PackedLoader, most: int | None = None) -> list[str]:
        batches = islice(loader, most)
        found = [loading.digest(next(batches))]
        used.append(frozenset(children()) - frozenset(before))
        return [*found, *map(loading.digest, batches)]

    assert steps(loader) == alone[0]
    assert steps(loader, 2) == alone[1][:2]
    assert steps(loader) == alone[1]
    loader.set_epoch(3)
    assert steps(loader, 1) == alone[3][:1]
    state = loader.state_dict()
    loader.set_epoch(2)
    assert steps(loader) == alone[2]
    loader.load_state_dict(state)
    assert steps(loader) == alone[3][1:]
    assert {len(pids) for pids in used} == {2}
    assert len(set(used)) == (1 if persistent else len(used))
    assert set(children()) - set(before) == (used[0] if persistent else set())
    del loader
    wait_until(lambda: children() == before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_loop_ends_the_one_that_the_same_processes_fill(packs):
    (alone,) = uninterrupted(packs["planned"], 1, tail="pad")
    loader = PackedLoader(packs["planned"], 8, tail="pad", **PROCESSES)
    first, second = iter(loader), iter(loader)
    assert loading.digest(next(first)) == loading.digest(next(second)) == alone[0]
    with pytest.raises(RuntimeError, match=r"^loop over the loader is 'one that another loop"):
        next(first)
    assert [loading.digest(batch) for batch in second] == alone[1:]


@pytest.mark.parametrize("name", ["workers", "prefetch", "persistent"])
def test_who_fills_batches_is_not_changed_later(name, packs):
    loader = PackedLoader(packs["planned"], 8, workers="threads", prefetch=3, persistent=False)
    with pytest.raises(AttributeError):
        setattr(loader, name, 1)
    assert (loader.workers, loader.prefetch, loader.persistent) == ("threads", 3, False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_copy_and_a_forked_process_have_workers_of_their_own(packs):
    alone = uninterrupted(packs["planned"], 2, tail="pad")
    loader = PackedLoader(packs["planned"], 8, tail="pad", **PROCESSES)
    shallow, this_pass = copy(loader), iter(loader)
    found = [loading.digest(next(this_pass))]
    own = set(children())
    assert [loading.digest(batch) for batch in shallow] == alone[0]
    assert [*found, *(loading.digest(batch) for batch in this_pass)] == alone[0]
    state = loader.state_dict()
    for other in (deepcopy(loader), pickle.loads(pickle.dumps(loader))):  # noqa: S301
        assert other.state_dict() == state
        assert [loading.digest(batch) for batch in other] == alone[1]

    def goes_on(found: Any) -> None:
        found.put([loading.digest(batch) for batch in loader])

    def forgets() -> None:
        loader.__dict__.clear()  # as if it were collected
        gc.collect()

    context = multiprocessing.get_context("fork")
    found = context.Queue()
    child = context.Process(target=goes_on, args=[found])
    child.start()
    assert found.get(timeout=300) == alone[1]
    child.join()
    child = context.Process(target=forgets)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert own <= set(children())
    assert [loading.digest(batch) for batch in loader] == alone[1]
    assert own <= set(children())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_the_ranks_batches_end_to_end_are_the_same_at_any_world_size(packs, kind, world_size, tail):
    for balance in (False, True):
        (alone,) = uninterrupted(packs[kind], 1, tail=tail, balance=balance)
        ranks = ranks_of(packs[kind], world_size, tail=tail, balance=balance)
        assert {len(loader) for loader in ranks} == {len(alone)}
        assert loading.steps_of(ranks) == alone


@pytest.mark.slow
@given(st.data())
@settings(max_examples=settings.default.max_examples // 2)
def test_resumed_anywhere_the_batches_are_those_of_an_uninterrupted_run(packs, data):
    kind = data.draw(st.sampled_from(KINDS))
    options = {
        "tail": data.draw(st.sampled_from(["drop", "pad"])),
        "balance": data.draw(st.booleans()),
        "seed": data.draw(st.integers(0, 3)),
    }
    whole = list(chain(*uninterrupted(packs[kind], 2, **options)))
    stop = data.draw(st.integers(0, len(whole)))
    before, after = data.draw(st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 2))
    num_workers = data.draw(st.integers(0, 4))

    stopped = ranks_of(packs[kind], before, **options, num_workers=num_workers)
    found = []
    iterators = [chain(loader, loader) for loader in stopped]
    for _ in range(stop):
        parts = [next(iterator) for iterator in iterators]
        found.append(loading.digest_of(parts))
    states = [json.loads(json.dumps(loader.state_dict())) for loader in stopped]
    assert all(state == states[0] for state in states)

    resumed = ranks_of(packs[kind], after, **options, num_workers=num_workers)
    for loader in resumed:
        loader.load_state_dict(states[0])
    for epoch in range(resumed[0].epoch, 2):
        for loader in resumed:
            loader.set_epoch(epoch)
        found += loading.steps_of(resumed)
    assert found == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_stopped_after_every_step_it_continues_with_the_next(packs, kind, num_workers):
    (whole,) = uninterrupted(packs[kind], 1, tail="pad")
    loader = PackedLoader(packs[kind], 8, tail="pad", num_workers=num_workers)
    states = [loader.state_dict(), *(loader.state_dict() for _ in loader)]
    assert len(states) == len(whole) + 1
    for stop, state in enumerate(states[:-1]):
        resumed = PackedLoader(packs[kind], 8, tail="pad", num_workers=num_workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert [loading.digest(batch) for batch in resumed] == whole[stop:]
    assert states[-1]["finished"]
    resumed.load_state_dict(states[-1])
    assert resumed.epoch == 0
    assert [loading.digest(b) for b in resumed] == uninterrupted(packs[kind], 2, tail="pad")[1]


def lines_of(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_lines(log: Path, number: int, child: Forked) -> None:
    """Wait until a child, which has not ended, has written so many lines."""
    wait_until(lambda: lines_of(log) >= number or child.poll() is not None)
    assert child.poll() is None, child.complaint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "runs", "options"),
    [
        ("stored", [1, 8, 4], {"num_workers": 2, "balance": True, "tail": "pad"}),
        ("planned", [4, 1, 2], {"num_workers": 1, "workers": "processes", "tail": "drop"}),
    ],
)
def test_killed_again_and_again_the_batches_are_those_of_an_uninterrupted_run(
    tmp_path, packs, kind, runs, options
):
    loading.packs_of(kind, tmp_path)
    log = tmp_path / "log"
    rng = np.random.default_rng(len(kind))
    whole = list(chain(*uninterrupted(packs[kind], 2, **{**options, "num_workers": 0})))
    for number, world_size in enumerate(runs):
        last = number == len(runs) - 1
        lines = lines_of(log)
        left = len(whole) - lines
        wanted = None if last else lines + int(rng.integers(1, left // 2))
        arguments = {
            "kind": kind,
            "folder": str(tmp_path),
            "log": str(log),
            "world_size": world_size,
            "options": options,
            "epochs": 2,
            "pause": 0 if last else 0.1,
            "most": None if last else wanted + 2,
        }
        child = Forked(loading.__file__, json.dumps(arguments))
        try:
            if not last:
                wait_for_lines(log, wanted, child)
                time.sleep(float(rng.uniform(0, 0.04)))
                child.kill()
            assert child.wait() == (0 if last else -signal.SIGKILL), child.complaint
        finally:
            child.kill()
    found = [json.loads(line)["digest"] for line in log.read_text().splitlines()]
    assert found == whole


def test_a_pass_that_is_broken_off_begins_again_and_a_finished_one_is_followed_by_the_next(packs):
    first, second = uninterrupted(packs["planned"], 2)
    loader = PackedLoader(packs["planned"], 8)
    assert loading.digest(next(iter(loader))) == first[0]
    assert loader.state_dict()["packs"] == 8
    assert [loading.digest(batch) for batch in loader] == first
    assert loader.epoch == 0
    # What a loop does that counts to the length, and never asks for one more.
    loader.set_epoch(1)
    assert [loading.digest(b) for _, b in zip(range(len(loader)), loader, strict=False)] == second
    assert loader.epoch == 1


def test_a_loader_that_was_resumed_and_looked_into_continues_where_it_was_resumed(packs):
    (whole,) = uninterrupted(packs["planned"], 1)
    loader = PackedLoader(packs["planned"], 8)
    next(iter(loader))
    state = loader.state_dict()
    resumed = PackedLoader(packs["planned"], 8)
    resumed.load_state_dict(state)
    next(iter(resumed))
    resumed.set_epoch(0)  # the epoch it is in: the place is kept
    assert [loading.digest(batch) for batch in resumed] == whole[1:]


STALE = (
    "loop over the loader is 'one that another loop, set_epoch or load_state_dict has ended', "
    "expected the last one that was begun; make a second PackedLoader to look at batches meanwhile"
)


@pytest.mark.parametrize("kind", ["stored", "planned"])
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}])
@pytest.mark.parametrize("how", ["a peek", "set_epoch", "load_state_dict"])
def test_a_state_belongs_to_one_loop_and_an_older_one_ends_with_an_error(packs, kind, options, how):
    loader = PackedLoader(packs[kind], 2, **options)
    batches = iter(loader)
    next(batches)
    before = loader.state_dict()
    next(batches)
    if how == "a peek":
        next(iter(loader))
    elif how == "set_epoch":
        loader.set_epoch(3)
    else:
        loader.load_state_dict(before)
    state = loader.state_dict()
    with pytest.raises(RuntimeError, match=f"^{re.escape(STALE)}$"):
        next(batches)
    assert loader.state_dict() == state
    resumed = PackedLoader(packs[kind], 2, **options)
    resumed.load_state_dict(state)
    if how == "a peek":  # resumed after the batch that was peeked at
        loader.load_state_dict(state)
    assert [loading.digest(batch) for batch in loader] == [
        loading.digest(batch) for batch in resumed
    ]


def test_a_loop_that_has_had_its_last_batch_just_ends_whatever_came_after_it(packs):
    loader = PackedLoader(packs["stored"], 8)
    batches = iter(loader)
    for _ in range(len(loader)):
        next(batches)
    loader.set_epoch(1)
    assert next(batches, None) is None


def test_the_epoch_it_is_in_may_be_set_within_a_loop(packs):
    (whole,) = uninterrupted(packs["stored"], 1)
    loader = PackedLoader(packs["stored"], 8)
    found = []
    for batch in loader:
        found.append(loading.digest(batch))
        loader.set_epoch(0)
    assert found == whole


def test_set_epoch_goes_to_the_beginning_of_any_other_epoch(packs):
    first, second, third = uninterrupted(packs["stored"], 3)
    loader = PackedLoader(packs["stored"], 8)
    for epoch, wanted in ((2, third), (0, first), (0, first), (1, second)):
        loader.set_epoch(epoch)
        assert loader.epoch == epoch
        assert [loading.digest(batch) for batch in loader] == wanted
    with pytest.raises(ValueError, match=r"^epoch is -1, expected an integer in 0\.\."):
        loader.set_epoch(-1)


def test_after_the_trainings_last_epoch_the_state_can_still_be_saved(packs):
    loader = PackedLoader(packs["planned"], 8)
    loader.set_epoch(49)
    assert len(list(loader)) > 0
    assert loader.state_dict()["epoch"] == 49
    with pytest.raises(ValueError, match=r"^epoch is 50, expected below 50 \(epochs\)"):
        next(iter(loader))


@pytest.mark.parametrize("kind", ["stored", "planned"])
def test_every_rank_has_as_many_steps_and_drop_leaves_out_less_than_one(packs, kind):
    num_packs = PackedLoader(packs[kind], 1).packs.num_packs(Key(0, 0))
    for global_batch in (4, 8, num_packs):
        for world_size in (w for w in (1, 2, 4) if global_batch % w == 0):
            for tail in ("drop", "pad"):
                ranks = ranks_of(packs[kind], world_size, global_batch, tail=tail)
                steps = {len(list(loader)) for loader in ranks}
                wanted = num_packs // global_batch
                if tail == "pad" and num_packs % global_batch:
                    wanted += 1
                assert steps == {wanted}


def test_padding_rows_hold_nothing_and_are_spread_over_the_ranks(packs):
    dataset = packs["stored"].select(range(5))
    ranks = ranks_of(dataset, 4, 16, tail="pad")
    batches = [batch for loader in ranks for batch in loader]
    assert len(batches) == 4
    rows = torch.stack([batch.present.any(dim=1).sum() for batch in batches])
    assert sorted(rows.tolist()) == [1, 1, 1, 2]
    for batch in batches:
        empty = ~batch.present.any(dim=1)
        assert empty.any()
        assert (batch.segment_ids[empty] == 0).all()
        assert (batch.patches[empty] == 0).all()
        assert (batch.labels[empty] == -100).all()
    # More ranks than packs: some have rows without images, and still as many steps.
    ranks = ranks_of(dataset, 8, 8, tail="pad")
    assert sorted(int(batch.present.any()) for r in ranks for batch in r) == [0] * 3 + [1] * 5


def test_balanced_steps_wait_less(packs):
    def waiting(balance):
        loads = [
            [int((batch.seq_lens.long() ** 2).sum()) for batch in loader]
            for loader in ranks_of(packs["planned"], 4, 4, balance=balance)
        ]
        return np.max(loads, axis=0).sum() / np.mean(loads, axis=0).sum()

    assert waiting(balance=True) < waiting(balance=False)


def test_the_rank_is_asked_of_torch_distributed_when_it_is_needed(packs, monkeypatch):
    loader = PackedLoader(packs["stored"], 2)
    assert (loader.rank, loader.world_size, loader.global_batch) == (0, 1, 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    gathered = lambda everyone, own: everyone.__setitem__(slice(None), [own] * 3)  # noqa: E731
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    assert (loader.rank, loader.world_size, loader.global_batch) == (2, 3, 6)
    wanted = PackedLoader(packs["stored"], 2, rank=2, world_size=3)
    assert [loading.digest(b) for b in loader] == [loading.digest(b) for b in wanted]


class Failing:
    """Packs of which one cannot be read."""

    max_segments = 2

    def __init__(self, dataset):
        self._packs = StoredPacks(dataset)

    def num_packs(self, key):
        return self._packs.num_packs(key)

    def fingerprint(self, key):
        return self._packs.fingerprint(key)

    def work(self, key):
        return self._packs.work(key)

    def rows(self, key, packs):
        if 3 in packs:
            raise ValueError("example 17 is bad")
        return self._packs.rows(key, packs)


@pytest.mark.parametrize("place", [{}, {"rank": 1, "world_size": 3}])
def test_without_a_process_group_ranks_compare_nothing(packs, place, monkeypatch):
    monkeypatch.setattr(StoredPacks, "fingerprint", None)
    loader = PackedLoader(packs["stored"], 2, tail="pad", **place)
    assert len(list(loader)) > 5


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"num_workers": 2, "workers": "processes"}]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_what_goes_wrong_in_a_worker_is_raised_at_its_batch(packs, options):
    loader = PackedLoader(Failing(packs["stored"]), 1, max_segments=6, **options)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    with pytest.raises(ValueError, match="example 17 is bad"):
        next(batches)
    assert loader.state_dict()["packs"] == 3


def test_an_abandoned_pass_leaves_no_thread_behind(packs):
    import threading

    loader = PackedLoader(packs["stored"], 1, num_workers=4)
    batches = iter(loader)
    next(batches)
    names = [thread.name for thread in threading.enumerate()]
    assert any(name.startswith("packpipe") for name in names)
    batches.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("packpipe") for name in names)


WHOLE = "an integer in "


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"batch_size": 0},
            ValueError,
            f"batch_size is 0, expected {WHOLE}1..{2**31}; pass packs a step, of one rank",
        ),
        (
            {"batch_size": 2.0},
            TypeError,
            f"batch_size is 2.0, expected {WHOLE}1..{2**31}; pass packs a step, of one rank",
        ),
        (
            {"rank": 1},
            ValueError,
            "(rank, world_size) is (1, None), expected both or neither; pass both",
        ),
        (
            {"rank": 2, "world_size": 2},
            ValueError,
            f"rank is 2, expected {WHOLE}0..1; ranks count from 0",
        ),
        (
            {"tail": "wrap"},
            ValueError,
            (
                "tail is 'wrap', expected one of 'drop', 'pad', 'error'; "
                "choose what an unfilled step becomes"
            ),
        ),
        (
            {"workers": "ray"},
            ValueError,
            "workers is 'ray', expected one of 'threads', 'processes'; choose who fills batches",
        ),
        (
            {"num_workers": -1},
            ValueError,
            f"num_workers is -1, expected {WHOLE}0..1024; 0 reads when asked",
        ),
        (
            {"persistent": 1},
            TypeError,
            "persistent is 1, expected True or False; pass a bool",
        ),
        ({"prefetch": 0}, ValueError, f"prefetch is 0, expected {WHOLE}1..1024; 2 is usual"),
        (
            {"max_segments": 0},
            ValueError,
            (f"max_segments is 0, expected {WHOLE}1..{2**31 - 1}; None takes what the packs allow"),
        ),
        (
            {"seed": -1},
            ValueError,
            f"seed is -1, expected {WHOLE}0..{2**64 - 1}; pass a non-negative integer below 2**64",
        ),
    ],
)
def test_bad_arguments_are_named(packs, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        PackedLoader(packs["stored"], **{"batch_size": 2, **options})


def test_planned_packs_have_an_order_of_their_own(packs):
    message = (
        "shuffle is False, expected True for packs that have an order of their own; "
        "leave it out, or pass rows that pack has stored"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PackedLoader(packs["planned"], 2, shuffle=False)


def test_packs_that_fill_no_step_are_refused_if_told_so(packs):
    num_packs = len(packs["stored"])
    loader = PackedLoader(packs["stored"], num_packs - 1, tail="error")
    message = (
        f"num_packs is {num_packs}, expected a multiple of {num_packs - 1} "
        "(batch_size times world_size); choose another batch size, or tail='drop' or 'pad'"
    )
    for use in (len, lambda found: next(iter(found))):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            use(loader)


OTHER = "make the loader with the options of the state"
STATE = "pass what state_dict returned"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"version": 2}, {}, f"state['version'] is 2, expected 1; {STATE}"),
        ({"unit": "images"}, {}, f"state['unit'] is 'images', expected 'packs'; {STATE}"),
        (
            {},
            {"seed": 7},
            "state['seed'] is 0, expected 7; use the seed of the state",
        ),
        (
            {},
            {"batch_size": 4},
            (
                "state['global_batch'] is 8, expected 4; choose batch_size so that "
                "batch_size times world_size is the state's"
            ),
        ),
        ({}, {"tail": "pad"}, f"state['tail'] is 'drop', expected 'pad'; {OTHER}"),
        ({}, {"balance": True}, f"state['balance'] is False, expected True; {OTHER}"),
        (
            {"packs": 9},
            {},
            (
                "state['packs'] is 9, expected a multiple of 8 (batch_size times world_size); "
                f"{STATE}"
            ),
        ),
    ],
)
def test_a_state_that_cannot_be_continued_exactly_is_refused(packs, change, options, message):
    loader = PackedLoader(packs["planned"], 8)
    batches = iter(loader)
    next(batches), next(batches)
    other = PackedLoader(packs["planned"], **{"batch_size": 8, **options})
    before = other.state_dict()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        other.load_state_dict({**loader.state_dict(), **change})
    assert other.state_dict() == before


def test_a_state_of_other_packs_is_refused(packs, tmp_path):
    state = PackedLoader(packs["stored"], 8).state_dict()
    others = [
        packs["stored"].select(range(20)),
        packs["stored"].shuffle(seed=1),
        StoredPacks(packs["stored"], shuffle=False),
        packs["planned"],
    ]
    for other in others:
        loader = PackedLoader(other, 8)
        found = loader.state_dict()["fingerprint"]
        message = (
            f"state['fingerprint'] is {state['fingerprint']!r}, expected {found!r}; the packs are "
            "others: use the data, options and seed of the state"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            loader.load_state_dict(state)
    # The same rows, built again elsewhere, are the same packs.
    PackedLoader(loading.packs_of("stored", tmp_path), 8).load_state_dict(state)


@pytest.mark.parametrize("packs_taken", [-8, 10**6])
def test_a_state_beyond_the_epoch_is_refused(packs, packs_taken):
    loader = PackedLoader(packs["stored"], 8)
    most = len(loader) * 8
    message = f"state['packs'] is {packs_taken}, expected {WHOLE}0..{most}; {STATE}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loader.load_state_dict({**loader.state_dict(), "packs": packs_taken})


def test_a_state_is_a_dict(packs):
    with pytest.raises(TypeError, match=f"^state is 'list', expected a dict; {STATE}$"):
        PackedLoader(packs["stored"], 8).load_state_dict([])


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**64 - 1))
@example(seed=2**64 - 1, epoch=2**64 - 1)
@settings(max_examples=10)
def test_any_seed_and_epoch_can_be_loaded(packs, seed, epoch):
    loader = PackedLoader(packs["stored"], 4, seed=seed)
    loader.set_epoch(epoch)
    taken = torch.cat([batch.by_example(batch.seq_lens)[0] for batch in loader]).tolist()
    assert len(taken) == len(set(taken)) > 60


@pytest.mark.parametrize("kind", ["stored", "planned"])
def test_the_length_is_that_of_the_pass_under_way_to_its_end(packs, kind):
    loader = PackedLoader(packs[kind], 8)
    last = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        for step, _ in enumerate(loader):
            if step == len(loader) - 1:
                last.append((loader.epoch, step))
        assert step == len(loader) - 1
    assert [epoch for epoch, _ in last] == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_over_epochs_goes_on_after_a_state_of_any_batch(packs, kind):
    def trained(loader, epochs):
        for epoch in epochs:
            loader.set_epoch(epoch)
            for batch in loader:
                yield loading.digest(batch), epoch, loader.state_dict()

    whole = list(trained(PackedLoader(packs[kind], 8), range(3)))
    for place, (_, epoch, state) in enumerate(whole):
        loader = PackedLoader(packs[kind], 8)
        loader.load_state_dict(state)
        found = [taken for taken, *_ in trained(loader, range(epoch, 3))]
        assert found == [taken for taken, *_ in whole[place + 1 :]]


def test_an_epoch_can_be_repeated(packs):
    loader = PackedLoader(packs["planned"], 8, epoch=3)
    assert loader.epoch == 3
    first = [loading.digest(batch) for batch in loader]
    loader.set_epoch(3)
    assert [loading.digest(batch) for batch in loader] == first


def test_packs_that_fill_not_even_one_step_are_an_error_and_not_silence(packs):
    num_packs = len(packs["stored"])
    loader = PackedLoader(packs["stored"], 4096)
    message = (
        f"num_packs is {num_packs}, expected 4096 (batch_size times world_size) or more; "
        "choose a smaller batch, or tail='pad'"
    )
    for use in (len, lambda found: next(iter(found))):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            use(loader)
    assert len(PackedLoader(packs["stored"], 4096, tail="pad")) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_loading_leaves_torchs_own_random_numbers_alone(packs):
    options = [{}, {"num_workers": 1}, {"num_workers": 1, "workers": "processes"}]
    torch.manual_seed(0)
    wanted = torch.rand(3).tolist()
    for option in options:
        torch.manual_seed(0)
        next(iter(PackedLoader(packs["stored"], 8, **option)))
        assert torch.rand(3).tolist() == wanted
