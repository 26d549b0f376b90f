"""`PackedLoader`: batches of packs, the same at any number of workers or ranks.

The order of an epoch's packs is arithmetic (`steps`), so the loader's whole state is a few
integers and digests: how many packs the global batches so far have taken, and what tells whether
they were packs of this plan and of these data. Workers fill the batches they are given, and batches
come in order.

The loader is not a ``torch.utils.data.DataLoader``: Lightning and accelerate would divide one of
those among the ranks, and the packs of this loader are divided already. It has the attributes of
one that frameworks ask for and that are true of it; ``num_workers`` is none of them, since a
DataLoader that accelerate makes of the loader would start processes around its own workers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from packpipe import checks
from packpipe.augmenting.augment import Augment
from packpipe.loading.columns import batch_columns
from packpipe.loading.contents import check_contents
from packpipe.loading.cursors import (
    Cursor,
    EpochCursor,
    PlannedPacks,
    Share,
    StreamCursor,
    StreamedPacks,
    checked_place,
)
from packpipe.loading.filling import WORKERS, Filling
from packpipe.loading.lanes import LaneCursor, WindowedPacks, check_lanes
from packpipe.loading.loader_checks import check_augment, check_without_torch, imported_torch
from packpipe.loading.numbered import NumberedBatches, NumberedSteps
from packpipe.loading.pairs import StoredPairs
from packpipe.loading.ranks import (
    agree,
    check_own_rank,
    import_before_groups,
    rank_of_world,
    together,
)
from packpipe.loading.states import FORM, check_agrees, check_form, former_options, packs_taken
from packpipe.loading.steps import TAILS
from packpipe.loading.stored import StoredPacks
from packpipe.loading.workers import Fill, Pass, as_it_is
from packpipe.philox import Key, checked_key

if TYPE_CHECKING:
    import torch
    from torch.utils.data import SequentialSampler

    from packpipe.loading.batch import Batch

# A script that imports torch after this module, and makes its group itself, is to end, too.
with suppress(ModuleNotFoundError):
    import torch
import_before_groups()


class PackedLoader:
    """Batches of packs for one rank: ``for batch in PackedLoader(packed, 8)``.

    Each `for` loop is one epoch, and the next loop the next epoch. Leaving a loop early restarts
    its epoch in the next one; `set_epoch` moves on to another. The batches
    depend on the packs, seed, epoch and the global batch, batch_size · world_size; never on
    workers, and laid end to end over the ranks they are the same for any world size.

    ``state_dict`` after a batch and ``load_state_dict`` in a new process continue with the batch
    after it. Every rank has the same state.

    The ranks of a process group begin every pass together: each is told if they do not agree in the
    packs, the options, the epoch or the state. What a `PackedStream` will read is not known by then
    and not compared. For a loop of one rank alone, make a loader with ``rank=0, world_size=1``.

    Args:
        packs: what `pack` or ``map(Packer(...))`` returned; or what `pack_pairs` did, the tuple of
            both tables; or an `EpochPacks` or `WindowPacks`, which plan the source images anew each
            epoch; or a `PackedStream`.
        batch_size: packs a step of this rank.
        rank: number of this rank; None asks torch.distributed, and without a process group is 0.
        world_size: how many ranks there are; given or left out together with rank.
        seed: seed of all random choices.
        epoch: the first epoch.
        shuffle: False takes stored rows in their stored order, every epoch.
        balance: put packs of like attention work into the same step, so that no rank waits long.
        tail: what happens to packs that do not fill the last step: ``"drop"`` leaves them out,
            ``"pad"`` adds rows without segments, ``"error"`` raises. All ranks have equally many
            steps.
        num_workers: workers that fill batches ahead; 0 fills each batch when it is asked for.
        workers: ``"threads"`` (decoding and copying release the interpreter lock) or
            ``"processes"``, of which one that does not run at all for ten minutes while its batch
            is waited for is an error (on Linux).
        prefetch: batches that each worker fills ahead.
        persistent: keep worker processes for the next pass, which need not start any. They hold
            the packs as these were when they started, and end with the loader. After a loop that
            was left early they hold the batches filled ahead until the next pass, which waits for
            those. False starts processes anew for every pass.
        pin_memory: return batches in page-locked memory, if there is a GPU to copy them to.
        max_segments: S of the batches; None takes what the packs allow.
        as_numpy: make each batch a dict of NumPy arrays, for JAX and others: the columns that a
            `PackedBatch`, `TokenBatch` or `PairBatch` has as tensors, with the same values. torch
            need not be installed then; processes and pinned memory, which are its part, are
            refused. Several processes of JAX pass
            ``rank=jax.process_index(), world_size=jax.process_count()``.
        augment: flips, turns, colours, drawn anew for every image of every epoch, whatever the
            workers and ranks; a state belongs to one augmentation. None leaves images as they are.
            With colours, batches have ``colours`` and perhaps ``solarize``, which `NaViT` applies;
            with mixup or CutMix, what `PackedBatch` says of it.

    Raises:
        TypeError, ValueError: an argument is wrong.
        ModuleNotFoundError: batches of tensors are asked for, and torch is not installed.
    """

    # What accelerate asks for. `prepare_data_loader` returns a loader that is prepared, and
    # `save_state` then keeps the state of one that is stateful.
    _is_accelerate_prepared = True
    use_stateful_dataloader = True
    # And what it makes a DataLoader with, to leave out batches: of batches that are made already.
    collate_fn = staticmethod(as_it_is)
    prefetch_factor = None

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
        persistent: bool = True,
        pin_memory: bool = False,
        max_segments: int | None = None,
        as_numpy: bool = False,
        augment: Augment | None = None,
    ) -> None:
        checks.boolean("shuffle", shuffle)
        # Told by their methods: packs may also come from a class of the caller's own.
        is_stream = hasattr(packs, "stream_packs")
        if not (hasattr(packs, "fingerprint") and hasattr(packs, "rows")):
            stored = StoredPairs if isinstance(packs, tuple) else StoredPacks
            packs = stored(packs, shuffle=shuffle)
        elif not shuffle:
            remedy = "leave it out, or pass rows that pack has stored"
            expected = "True for packs that have an order of their own"
            raise ValueError(checks.sentence("shuffle", shuffle, expected, remedy))
        self.packs: PlannedPacks | StreamedPacks | WindowedPacks = packs
        remedy = "pass packs a step, of one rank"
        self.batch_size = checks.whole_number("batch_size", batch_size, 1, 2**31, remedy)
        self._place = checked_place(rank, world_size)
        self.seed, self._epoch = checked_key(seed, epoch)
        self.balance = checks.boolean("balance", balance)
        self.tail = checks.choice("tail", tail, TAILS, "choose what an unfilled step becomes")
        remedy = "0 reads when asked"
        self._filling = Filling(
            checks.whole_number("num_workers", num_workers, 0, 1024, remedy),
            checks.choice("workers", workers, WORKERS, "choose who fills batches"),
            checks.whole_number("prefetch", prefetch, 1, 1024, "2 is usual"),
            checks.boolean("persistent", persistent),
        )
        self.pin_memory = checks.boolean("pin_memory", pin_memory)
        self.as_numpy = checks.boolean("as_numpy", as_numpy)
        if as_numpy:
            check_without_torch(workers, self.pin_memory)
        else:
            torch = imported_torch()
            self.pin_memory = pin_memory and torch.cuda.is_available()
        if max_segments is not None:
            remedy = "None takes what the packs allow"
            max_segments = checks.whole_number("max_segments", max_segments, 1, 2**31 - 1, remedy)
        self._max_segments = max_segments
        if augment is not None:
            check_augment(augment, packs)
        self.augment = augment
        self._has_one_order = not (shuffle or self.balance)
        # Balance sorts all packs of an epoch; images of a stream are read here, not by processes.
        if is_stream and (self.balance or (num_workers and workers == "processes")):
            remedy = "all of it has to be known for that; use threads, or EpochPacks"
            raise ValueError(
                checks.sentence("packs", "a stream", "no balance and no processes", remedy)
            )
        self._cursor = _cursor_of(packs, self.balance, self.tail)
        if self._place is not None and hasattr(packs, "lanes"):
            check_lanes(packs.lanes, self._share)
        self._start = 0  # packs taken before a pass begins
        self._taken = 0  # packs taken by now
        self._finished = False  # whether the pass has ended
        self._pass: object | None = None  # the loop that the above speak of

    def __repr__(self) -> str:
        where = f"seed={self.seed}, epoch={self._epoch}"
        return f"{type(self).__name__}({self.packs!r}, batch_size={self.batch_size}, {where})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts workers of its own, and takes none of this loader's.
        return {**vars(self), "_filling": copy.copy(self._filling)}

    @property
    def workers(self) -> str:
        """Who fills batches ahead."""
        return self._filling.workers

    @property
    def prefetch(self) -> int:
        """Batches that each worker fills ahead."""
        return self._filling.prefetch

    @property
    def persistent(self) -> bool:
        """Whether worker processes are kept for the next pass."""
        return self._filling.persistent

    @property
    def epoch(self) -> int:
        """The epoch of the pass under way, or of the one that has just ended."""
        return self._epoch

    @property
    def sampler(self) -> PackedLoader | SequentialSampler:
        """The loader itself, whose ``set_epoch`` Lightning calls.

        If all epochs have one order, a `SequentialSampler`: by that Lightning knows that they have.
        """
        if not self._has_one_order:
            return self
        from torch.utils.data import SequentialSampler

        return SequentialSampler(self.dataset)

    @property
    def batch_sampler(self) -> NumberedSteps:
        """The numbers of the epoch's steps."""
        return NumberedSteps(self)

    @property
    def dataset(self) -> NumberedBatches:
        """The batches by the numbers of `batch_sampler`; its length is the packs of all steps."""
        return NumberedBatches(self)

    @property
    def generator(self) -> torch.Generator:
        """One that nothing is drawn from, so that a DataLoader draws no seed from torch's own."""
        found: torch.Generator = imported_torch().Generator()
        return found

    @property
    def rank(self) -> int:
        """The number of this process among the ranks."""
        return self._share.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self._share.world_size

    @property
    def global_batch(self) -> int:
        """Packs of a step, over all ranks."""
        return self._share.global_batch

    @property
    def longest(self) -> int | None:
        """Most tokens of an image in any batch, which `NaViT` may be told; None if unknown."""
        found: int | None = getattr(self.packs, "longest", None)
        return found

    def __len__(self) -> int:
        """Steps of the pass under way, from the epoch's beginning to its end.

        Epochs that are planned anew may differ by a few steps; `set_epoch` chooses the epoch.

        Raises:
            TypeError: the packs are a stream, whose length is unknown.
        """
        steps = self._cursor.steps(self._key, self._share)
        if steps is None:
            raise TypeError("a PackedStream has no length; iterate until it ends")
        return steps

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass one through this epoch.

        It starts at the epoch's beginning, or where a state that was loaded stopped within it.
        """
        epoch = checked_key(self.seed, epoch).epoch
        has_passed = self._finished and self._taken > self._start
        if epoch != self._epoch or has_passed:
            self._epoch, self._start, self._taken = epoch, 0, 0
            self._cursor.load({})
            self._pass = None
        self._finished = False

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of an epoch, from its beginning or where a loaded state stopped.

        A batch is a `PackedBatch`; of rows of token sequences, a `TokenBatch`; of both tables of
        `pack_pairs`, a `PairBatch`; with ``as_numpy``, a dict of their columns.

        Raises:
            ValueError: (with the first batch, on every rank) the ranks of the process group would
                not take the same steps through the same packs.
            RuntimeError: (when asked for a batch) another loop over this loader has begun since, or
                its epoch or state was set: the state of the loader is no longer that of this loop.
        """
        if self._finished:
            self.set_epoch(self._epoch + 1)
        self._taken = self._start
        this_pass = self._pass = object()
        if self._share.world_size == rank_of_world()[1] > 1:
            agree(together(self._beginning))
        # A loop that counts steps never asks for one batch more, so the last batch must itself end
        # the pass. Which one is the last is unknown in a stream: there the end of the loop does it.
        steps = self._cursor.steps(self._key, self._share)
        global_batch = self.global_batch
        end = None if steps is None else steps * global_batch
        for batch in self._batches(is_counted=steps is not None):
            # Before the yield: a state that is saved inside the loop counts this batch.
            self._taken += global_batch
            self._finished = self._taken == end
            self._cursor.passed(self._taken)
            was_last = self._finished
            yield batch
            if self._pass is not this_pass:
                if was_last:
                    return
                raise RuntimeError(
                    checks.sentence(
                        "loop over the loader",
                        "one that another loop, set_epoch or load_state_dict has ended",
                        "the last one that was begun",
                        "make a second PackedLoader to look at batches meanwhile",
                    )
                )
        self._finished = True

    def passes(self) -> Iterator[tuple[Any, Key]]:
        """Yield the batches of epoch after epoch without end, each with its seed and epoch.

        They are those of one loop after the other. But threads fill the first batches of the next
        epoch while one ends, where the epochs are known: none but the first waits for a batch. To
        plan the next epoch takes a moment of its own, in the caller's thread: of a `WindowPacks` to
        count its packs, unless they were counted before.

        Raises:
            ValueError: an epoch has no batch.
            RuntimeError: as of a loop.
        """
        with closing(self.passes_and_ends()) as found:
            yield from (one for one in found if one is not None)

    def passes_and_ends(self) -> Generator[tuple[Any, Key] | None, None, None]:
        """Yield the same as `passes`, and None after the last batch of each epoch.

        Ranks that tell each other what they found before they go on never begin an epoch, about
        which they ask each other, while another one has failed at the end of the one before.
        """
        was_empty = False
        with self._filling.over_passes():
            while True:
                is_empty = True
                for batch in self:
                    is_empty = False
                    yield batch, self._key
                # One alone may be the rest of an epoch that was resumed at its end.
                if is_empty and was_empty:
                    expected = "one or more an epoch"
                    remedy = "look for what filters or rejects all images"
                    raise ValueError(checks.sentence("batches of the loader", 0, expected, remedy))
                was_empty = is_empty
                yield None

    def from_step(self, step: int) -> Iterator[Any]:
        """Return the batches of the epoch from a step on, 0 being its first."""
        if self._finished:
            self.set_epoch(self._epoch + 1)
        # A stream is read from its beginning: the place of a state may lie after this step.
        self._cursor.load({})
        self._start = step * self.global_batch
        return iter(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the loader as plain integers and strings, which JSON can hold.

        The first call of a loader looks at its data: at all labels and lengths, and at 16 MB of
        pixels, tokens or encoded images. Of rows that `pack` wrote it has the checksums, so that no
        other byte goes unnoticed; in other rows, and in images, a change beyond those 16 MB does
        that changes no length, number or label.
        """
        return {
            **FORM,
            "epoch": self._epoch,
            "packs": self._taken,
            "finished": self._finished,
            **self._must_agree(self._key),
            "contents": self._contents(),
            **self._cursor.state(self._taken),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was handed out when `state_dict` was called.

        The number of ranks may be different, if batch_size · world_size is the same.

        Raises:
            TypeError: the state is no dict.
            ValueError: the batches would not be those of an uninterrupted run; says why. The loader
                is not changed then.
        """
        check_form(state)
        key = checked_key(self.seed, state.get("epoch"))
        check_agrees(state, self._must_agree(key), partial(former_options, self.packs, key))
        check_contents(self._contents(), state.get("contents", {}))
        most = self._cursor.check(state, key, self._share)
        taken = packs_taken(state, most, self.global_batch)
        # Nothing is changed before this line, so that a refused state leaves the loader as it was.
        self._epoch, self._start, self._taken = key.epoch, taken, taken
        self._finished = bool(state.get("finished"))
        self._cursor.load(state)
        self._pass = None

    def _must_agree(self, key: Key) -> dict[str, Any]:
        """Return what a state must agree in: all that decides the batches, besides the place."""
        # Packs of a class of the caller's own may know nothing of transforms.
        transform = getattr(self.packs, "transform_name", None)
        # Not the rank, the world size and the workers: the global batches are the same with any.
        return {
            "seed": self.seed,
            "global_batch": self.global_batch,
            "balance": self.balance,
            "tail": self.tail,
            "fingerprint": self.packs.fingerprint(key),
            **({} if self.augment is None else {"augment": self.augment.to_dict()}),
            **({} if transform is None else {"transform": transform}),
        }

    def _contents(self) -> dict[str, Any]:
        """Return what the batches show besides what the plan decides, by name."""
        # Packs of a class of the caller's own may know nothing of it.
        contents = getattr(self.packs, "contents", dict)
        return {"max_segments": self._width, **contents()}

    @property
    def _batch_of(self) -> Callable[..., Any]:
        """What makes a batch of rows."""
        if self.as_numpy:
            return batch_columns
        from packpipe.loading.batch import batch_of

        return batch_of

    @property
    def _width(self) -> int:
        """S of the batches."""
        return self._max_segments or self.packs.max_segments

    def _beginning(self) -> dict[str, Any]:
        """Return what all ranks must begin a pass with.

        Raises:
            ValueError: this rank was given another rank's place.
        """
        check_own_rank(self.rank)
        return {
            "epoch": self._epoch,
            "packs taken": self._taken,
            **self._cursor.beginning(self._key),
            **self._must_agree(self._key),
            **self._contents(),
        }

    @property
    def _key(self) -> Key:
        return Key(self.seed, self._epoch)

    @property
    def _share(self) -> Share:
        # Asked each time: frameworks may start their process group after the loader is made.
        rank, world_size = rank_of_world() if self._place is None else self._place
        return Share(self.batch_size, rank, world_size)

    def _batches(self, *, is_counted: bool) -> Iterator[Batch]:
        """Return this rank's batches of the epoch, from the start on.

        Args:
            is_counted: whether the epoch's steps are known; a stream is known no further than it is
                read, so that nothing of its next epoch can be filled while one ends.
        """
        fill = Fill(
            self.packs,
            self._batch_of,
            self.batch_size,
            self._width,
            self.pin_memory,
            self.augment,
        )
        key, share = self._key, self._share

        def following() -> Pass:
            after = checked_key(key.seed, key.epoch + 1)
            return Pass((after, share, 0), self._cursor.parts(after, share, 0))

        own = Pass((key, share, self._start), self._cursor.parts(key, share, self._start))
        return self._filling.batches(fill, own, following if is_counted else None)


def _cursor_of(packs: Any, balance: bool, tail: str) -> Cursor:
    """Return what finds the place in packs of a kind, told by their methods."""
    if hasattr(packs, "stream_packs"):
        return StreamCursor(packs, tail)
    if hasattr(packs, "lanes"):
        return LaneCursor(packs, balance, tail)
    return EpochCursor(packs, balance, tail)
