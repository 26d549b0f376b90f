"""`PackedLoader`: batches of packs, the same at any number of workers or ranks.

The order of an epoch's packs is arithmetic (`steps`), so the loader's whole state is a few
integers: how many packs the global batches so far have taken, and a fingerprint that tells whether
they were packs of this plan. Workers only fill what is asked of them, and batches are handed out
in order.

The loader is no ``torch.utils.data.DataLoader``, so that Lightning and accelerate, which give each
rank another part of one of those, leave it as it is: it already takes this rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from packpipe import checks
from packpipe.loading.ranks import rank_of_world
from packpipe.loading.steps import NO_PACK, TAILS, even_places, num_steps, step_packs
from packpipe.loading.stored import StoredPacks
from packpipe.loading.workers import Batch, Fill, Part, in_processes, in_threads

WORKERS = ("threads", "processes")
_VERSION = 1


class PackedLoader:
    """Batches of packs for one rank: ``for batch in PackedLoader(packed, 8)``.

    Each pass goes through one epoch; the pass after it through the next one. A pass that is broken
    off begins again from the start of its epoch: call `set_epoch` to go on to another. The batches
    depend on the packs, seed, epoch and the global batch, batch_size · world_size; never on
    workers, and laid end to end over the ranks they are the same for any world size.

    ``state_dict`` after a batch and ``load_state_dict`` in a new process continue with the batch
    after it. Every rank has the same state.

    Args:
        packs: what `pack` or ``map(Packer(...))`` returned; or an `EpochPacks`, which plans the
            source images anew each epoch; or a `PackedStream`.
        batch_size: packs a step of this rank.
        rank: of world_size; None asks torch.distributed, and without it is 0 of 1.
        world_size: likewise.
        seed: of all draws.
        epoch: the first one.
        shuffle: False takes stored rows as they lie, every epoch.
        balance: put packs of like attention work into the same step, so that no rank waits long.
        tail: what packs that do not fill a last step become: ``"drop"`` leaves them out, ``"pad"``
            adds rows without segments, ``"error"`` refuses. All ranks have equally many steps.
        num_workers: how many fill batches ahead; 0 fills each when it is asked for.
        workers: ``"threads"`` (decoding and copying let go of the interpreter) or ``"processes"``.
        prefetch: batches a worker is ahead.
        pin_memory: return batches in page-locked memory, if there is a GPU to copy them to.
        max_segments: S of the batches; None takes what the packs allow.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        packs: Any,
        batch_size: int,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        balance: bool = False,
        tail: str = "drop",
        num_workers: int = 0,
        workers: str = "threads",
        prefetch: int = 2,
        pin_memory: bool = False,
        max_segments: int | None = None,
    ) -> None:
        checks.boolean("shuffle", shuffle)
        if not (hasattr(packs, "fingerprint") and hasattr(packs, "rows")):
            packs = StoredPacks(packs, shuffle=shuffle)
        elif not shuffle:
            remedy = "leave it out, or pass rows that pack has stored"
            expected = "True for packs that have an order of their own"
            raise ValueError(checks.sentence("shuffle", shuffle, expected, remedy))
        self.packs: Any = packs
        self._is_stream = hasattr(packs, "stream_packs")
        remedy = "pass packs a step, of one rank"
        self.batch_size = checks.whole_number("batch_size", batch_size, 1, 2**31, remedy)
        if (rank is None) != (world_size is None):
            found = (rank, world_size)
            name, expected = "(rank, world_size)", "both or neither"
            raise ValueError(checks.sentence(name, found, expected, "pass both"))
        if world_size is not None:
            world_size = checks.whole_number("world_size", world_size, 1, 2**31, "pass the ranks")
            remedy = "ranks count from 0"
            rank = checks.whole_number("rank", rank, 0, world_size - 1, remedy)
        self._place = None if rank is None or world_size is None else (rank, world_size)
        self.seed, self._epoch = checks.seed_and_epoch(seed, epoch)
        self.balance = checks.boolean("balance", balance)
        self.tail = checks.choice("tail", tail, TAILS, "choose what an unfilled step becomes")
        remedy = "0 reads when asked"
        self.num_workers = checks.whole_number("num_workers", num_workers, 0, 1024, remedy)
        self.workers = checks.choice("workers", workers, WORKERS, "choose who fills batches")
        self.prefetch = checks.whole_number("prefetch", prefetch, 1, 1024, "2 is usual")
        self.pin_memory = checks.boolean("pin_memory", pin_memory) and torch.cuda.is_available()
        if max_segments is not None:
            remedy = "None takes what the packs allow"
            max_segments = checks.whole_number("max_segments", max_segments, 1, 2**31 - 1, remedy)
        self._max_segments = max_segments
        if self._is_stream and (self.balance or (num_workers and workers == "processes")):
            remedy = "all of it has to be known for that; use threads, or EpochPacks"
            raise ValueError(
                checks.sentence("packs", "a stream", "no balance and no processes", remedy)
            )
        self._start = 0  # packs taken before a pass begins
        self._taken = 0  # packs taken by now
        self._finished = False  # whether the pass has come to its end
        self._reading: Any = None
        self._stream: dict[str, Any] | None = None  # where a stream is to be read from

    @property
    def epoch(self) -> int:
        """The epoch of the pass under way, or of the one that has just ended."""
        return self._epoch

    @property
    def sampler(self) -> PackedLoader:
        """The loader itself: Lightning calls ``sampler.set_epoch``."""
        return self

    @property
    def rank(self) -> int:
        """This process among the ranks."""
        return self._rank_of()[0]

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self._rank_of()[1]

    @property
    def global_batch(self) -> int:
        """Packs a step of all ranks together."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps of the pass under way, from the epoch's beginning to its end.

        Epochs that are planned anew differ by a few; `set_epoch` tells which is meant.

        Raises:
            TypeError: the packs are a stream, whose length nobody knows.
        """
        if self._is_stream:
            raise TypeError("a PackedStream has no length; iterate until it ends")
        packs = self.packs.num_packs(self.seed, self._epoch)
        return num_steps(packs, self.global_batch, self.tail)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass one through this epoch.

        From its beginning, unless a state was loaded that stands within it: then from there.
        """
        _, epoch = checks.seed_and_epoch(0, epoch)
        has_passed = self._finished and self._taken > self._start
        if epoch != self._epoch or has_passed:
            self._epoch, self._start, self._taken = epoch, 0, 0
            self._stream = self._reading = None
        self._finished = False

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of an epoch, from its beginning or where a loaded state stopped.

        `PackedBatch`; of rows of tokens `TokenBatch`.
        """
        if self._finished:
            self.set_epoch(self._epoch + 1)
        self._taken = self._start
        # A loop that knows the length does not ask for more than that, so the last batch ends
        # the pass, not the question for one more; only of a stream nobody knows which is the last.
        end = None if self._is_stream else len(self) * self.global_batch
        for batch in self._batches():
            self._taken += self.global_batch
            self._finished = self._taken == end
            if self._reading is not None:
                self._reading.forget(self._taken)
            yield batch
        self._finished = True

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, as plain integers and strings: JSON can hold it."""
        state = {
            "version": _VERSION,
            "unit": "packs",
            "epoch": self._epoch,
            "packs": self._taken,
            "finished": self._finished,
            **self._must_agree(self._epoch),
        }
        if self._is_stream:
            reading = self._reading
            state["stream"] = self._stream if reading is None else reading.state(self._taken)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that was handed out when `state_dict` was called.

        The number of ranks may be another one, if batch_size · world_size is the same.

        Raises:
            TypeError: the state is no dict.
            ValueError: the batches would not be those of an uninterrupted run; says why. The loader
                stays as it is then.
        """
        remedy = "pass what state_dict returned"
        if not isinstance(state, dict):
            raise TypeError(checks.sentence("state", type(state).__name__, "a dict", remedy))
        known = {"version": _VERSION, "unit": "packs"}
        for name, expected in known.items():
            if state.get(name) != expected:
                raise ValueError(
                    checks.sentence(f"state[{name!r}]", state.get(name), repr(expected), remedy)
                )
        _, epoch = checks.seed_and_epoch(0, state.get("epoch"))
        if state.get("seed") != self.seed:
            name, expected = "state['seed']", f"{self.seed} (seed)"
            raise ValueError(
                checks.sentence(name, state.get("seed"), expected, "make the loader with it")
            )
        remedies = {
            "global_batch": "choose batch_size so that batch_size times world_size is the state's",
            "fingerprint": "the packs are others: use the data, options and seed of the state",
        }
        for name, expected in self._must_agree(epoch).items():
            if state.get(name) != expected:
                remedy = remedies.get(name, "make the loader with the options of the state")
                raise ValueError(
                    checks.sentence(f"state[{name!r}]", state.get(name), repr(expected), remedy)
                )
        most = checks.MAX_WORD
        stream = state.get("stream")
        if self._is_stream:
            self.packs.check_resumable()
            self.packs.check_state(stream, state.get("packs"))
        else:
            num_packs = self.packs.num_packs(self.seed, epoch)
            most = num_steps(num_packs, self.global_batch, self.tail) * self.global_batch
        taken = checks.whole_number("state['packs']", state.get("packs"), 0, most, remedy)
        if taken % self.global_batch:
            expected = f"a multiple of {self.global_batch} (batch_size times world_size)"
            raise ValueError(checks.sentence("state['packs']", taken, expected, remedy))
        self._epoch, self._start, self._taken = epoch, taken, taken
        self._finished = bool(state.get("finished"))
        self._stream, self._reading = stream, None

    def _must_agree(self, epoch: int) -> dict[str, Any]:
        """Return what decides the batches, besides the place."""
        return {
            "seed": self.seed,
            "global_batch": self.global_batch,
            "balance": self.balance,
            "tail": self.tail,
            "fingerprint": self.packs.fingerprint(self.seed, epoch),
        }

    def _rank_of(self) -> tuple[int, int]:
        if self._place is not None:
            return self._place
        # Asked when it is needed: frameworks start their processes after the loader is made.
        return rank_of_world()

    def _batches(self) -> Iterator[Batch]:
        """Return this rank's batches of the epoch, from the start on."""
        fill = Fill(
            self.packs,
            (self.seed, self._epoch),
            self.batch_size,
            self._max_segments or self.packs.max_segments,
            self.pin_memory,
        )
        parts = self._stream_parts() if self._is_stream else self._parts()
        if not self.num_workers:
            return map(fill, parts)
        fill_ahead = in_threads if self.workers == "threads" else in_processes
        return fill_ahead(fill, parts, self.num_workers, self.prefetch)

    def _parts(self) -> Iterator[Part]:
        """Yield which packs this rank takes at each step."""
        seed, epoch, first = self.seed, self._epoch, self._start // self.global_batch
        steps = step_packs(
            self.packs.num_packs(seed, epoch),
            self.packs.work(seed, epoch) if self.balance else None,
            self.global_batch,
            self.tail,
            seed=seed,
            epoch=epoch,
        )
        start = self.rank * self.batch_size
        for packs in steps[first:, start : start + self.batch_size]:
            there = np.flatnonzero(packs != NO_PACK)
            yield packs[there], there

    def _stream_parts(self) -> Iterator[Part]:
        """Yield the packs this rank takes at each step, as they come."""
        self._reading = self.packs.stream_packs(self.seed, self._epoch, self._stream, self._start)
        packs = iter(self._reading)
        size, start = self.global_batch, self.rank * self.batch_size
        while some := list(islice(packs, size)):
            if len(some) < size and self.tail == "drop":
                return
            num_steps(len(some), size, self.tail)
            places = even_places(len(some), size) if len(some) < size else np.arange(size)
            own = np.flatnonzero((places >= start) & (places < start + self.batch_size))
            yield [some[place] for place in own], places[own] - start
