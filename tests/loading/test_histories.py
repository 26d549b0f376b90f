"""Loaders in any history: stopped, resumed, peeked at, set to other epochs, at other worlds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import datasets
import loading
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import packpipe
from packpipe import EpochPacks, PackedLoader, PackedStream

NUM = 90
GLOBAL_BATCH = 4
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
LOADING = {**loading.OPTIONS, "fit_last": None, "drop_rate": 0.4, "epochs": None}
ACTS = (*["take"] * 3, "end", "iter", "leave", "peek", "set_epoch", "save", "load", "restart")


def texts() -> datasets.Dataset:
    rows = [[number] * (number * 7 % 23 + 1) for number in range(NUM)]
    return datasets.Dataset.from_dict({"input_ids": rows})


@pytest.fixture(scope="module")
def makers(tmp_path_factory) -> dict[str, Callable[[], Any]]:
    """What makes packs anew, as a new process would, by their kind."""
    folder, images = tmp_path_factory.mktemp("histories"), loading.source(NUM)
    packpipe.pack(images, 24, output=folder / "images", progress=False, num_workers=0, **LOADING)
    packpipe.pack(texts(), 24, output=folder / "texts", progress=False)

    def stream() -> PackedStream:
        dataset = images.to_iterable_dataset(num_shards=3)
        return PackedStream(dataset, 24, open_packs=4, **{**LOADING, "window": 20})

    return {
        "images": lambda: datasets.load_from_disk(folder / "images"),
        "texts": lambda: datasets.load_from_disk(folder / "texts"),
        "epochs": lambda: EpochPacks(images, 24, num_workers=1, **loading.OPTIONS),
        "stream": stream,
    }


@pytest.fixture(scope="module")
def whole(makers) -> Callable[..., list[str]]:
    """The steps of an epoch of one rank that nothing interrupts."""

    @cache
    def steps(kind: str, options: tuple[tuple[str, Any], ...], epoch: int) -> list[str]:
        loader = PackedLoader(makers[kind](), GLOBAL_BATCH, epoch=epoch, **dict(options))
        return [loading.digest(batch) for batch in loader]

    return steps


@dataclass
class Place:
    """Where a loader should be: what its documentation promises, in plain numbers."""

    epoch: int = 0
    start: int = 0  # steps of the epoch before the pass under way
    taken: int = 0  # steps by now
    finished: bool = False

    def set_epoch(self, epoch: int) -> bool:
        """Go to an epoch; return whether a loop under way has ended by that."""
        moves = epoch != self.epoch or (self.finished and self.taken > self.start)
        if moves:
            self.epoch, self.start, self.taken = epoch, 0, 0
        self.finished = False
        return moves

    def begin(self) -> None:
        if self.finished:
            self.set_epoch(self.epoch + 1)
        self.taken = self.start

    def resumed(self) -> Place:
        return Place(self.epoch, self.taken, self.taken, self.finished)


@dataclass
class Ranks:
    """The loaders of all ranks, and the loop that each is in."""

    kind: str
    options: dict[str, Any]
    make: Callable[[], Any]
    whole: Callable[..., list[str]]
    place: Place = field(default_factory=Place)
    loaders: list[PackedLoader] = field(default_factory=list)
    loop: list[Any] | None = None
    begun: bool = False

    def start(self, world_size: int, **workers: Any) -> None:
        packs = self.make()  # ranks may share them: tests of one process do
        self.leave()
        self.loaders = [
            PackedLoader(
                packs,
                GLOBAL_BATCH // world_size,
                rank=rank,
                world_size=world_size,
                **self.options,
                **workers,
            )
            for rank in range(world_size)
        ]

    @property
    def steps(self) -> list[str]:
        """The steps of the epoch."""
        return self.whole(self.kind, tuple(sorted(self.options.items())), self.place.epoch)

    def iterate(self) -> None:
        self.leave()
        self.loop, self.begun = [iter(loader) for loader in self.loaders], False

    def leave(self) -> None:
        for batches in self.loop or []:
            batches.close()
        self.loop = None

    def take(self) -> bool:
        """Take a step of the loop, and check it; return whether there was one."""
        if self.loop is None:
            self.iterate()
        if not self.begun:
            self.place.begin()
            self.begun = True
        parts = [next(batches, None) for batches in self.loop]
        if self.place.taken == len(self.steps):
            assert parts == [None] * len(parts)
            self.place.finished = True
            self.loop = None
            return False
        assert loading.digest_of(parts) == self.steps[self.place.taken]
        self.place.taken += 1
        # Nobody knows which batch of a stream is the last.
        self.place.finished = self.kind != "stream" and self.place.taken == len(self.steps)
        return True

    def end_loop(self, is_over: bool) -> None:
        """Check that the loop has ended: with an error, unless it has had its last batch."""
        loop, self.loop = self.loop, None
        for batches in loop or [] if self.begun else []:
            if is_over:
                assert next(batches, None) is None
            else:
                with pytest.raises(RuntimeError, match=r"^loop over the loader is 'one that"):
                    next(batches)

    def state(self) -> dict[str, Any]:
        states = [json.loads(json.dumps(loader.state_dict())) for loader in self.loaders]
        assert all(state == states[0] for state in states)
        assert states[0]["epoch"] == self.place.epoch
        assert states[0]["packs"] == self.place.taken * GLOBAL_BATCH
        assert states[0]["finished"] == self.place.finished
        return states[0]

    def load(self, state: dict[str, Any], place: Place) -> None:
        is_over = self.place.finished
        for loader in self.loaders:
            loader.load_state_dict(state)
        self.place = place.resumed()
        self.end_loop(is_over)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@given(st.data())
@settings(max_examples=settings.default.max_examples // 4)
def test_in_any_history_every_batch_is_that_of_an_uninterrupted_run(makers, whole, data):
    draw = data.draw
    kind = draw(st.sampled_from(list(makers)))
    options = {"tail": draw(st.sampled_from(["drop", "pad"])), "seed": draw(st.integers(0, 1))}
    if kind != "stream":
        options["balance"] = draw(st.booleans())
    ranks = Ranks(kind, options, makers[kind], whole)

    def start() -> None:
        workers = {"num_workers": draw(st.integers(0, 2))}
        if NIGHTLY and kind != "stream" and draw(st.integers(0, 19)) == 0:
            workers["workers"] = "processes"
        ranks.start(draw(st.sampled_from([1, 2, 4])), **workers)

    start()
    saved: list[tuple[dict[str, Any], Place]] = [(ranks.state(), ranks.place.resumed())]
    for act in draw(st.lists(st.sampled_from(ACTS), min_size=4, max_size=14)):
        place = ranks.place
        event(f"{kind}: {act}")
        if act == "take":
            for _ in range(draw(st.integers(1, 5))):
                if not ranks.take():
                    break
        elif act == "end":
            while ranks.take():
                pass
        elif act == "iter":
            ranks.iterate()
        elif act == "leave":
            ranks.leave()
        elif act == "peek":
            loop, begun, is_over = ranks.loop, ranks.begun, place.finished
            ranks.loop = None
            ranks.take()
            peek, ranks.loop, ranks.begun = ranks.loop, loop, begun
            ranks.end_loop(is_over)
            ranks.loop, ranks.begun = peek, True
        elif act == "set_epoch":
            epoch, is_over = draw(st.integers(0, 2)), place.finished
            for loader in ranks.loaders:
                loader.set_epoch(epoch)
            if place.set_epoch(epoch):
                ranks.end_loop(is_over)
        elif act == "save":
            saved.append((ranks.state(), place.resumed()))
        elif act == "load":
            ranks.load(*draw(st.sampled_from(saved)))
        else:
            state, place = ranks.state(), place.resumed()
            start()
            ranks.load(state, place)
            assert ranks.state() == state
        ranks.state()
    while ranks.take():
        pass
    ranks.take()
    ranks.leave()
