"""Rejects, and how many are tolerated before a build stops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from packpipe import checks

log = logging.getLogger(__name__)

ON_ERROR = ("quarantine", "raise")
# Stage of rejects that the caller asked for (overflow="drop"); they do not count as bad.
ASKED = "overflow"
# Stage and reason of sequences without a token, which texts have many of; nor do they count as bad.
EMPTY = ("tokens", "empty")
# Rejects that an error names.
NAMED = 5
# Bad examples that a stream may begin with before their share is judged: enough that a share below
# half the limit stops it by bad luck in less than one of a thousand runs.
_AT_FIRST = 30


class TooManyRejects(ValueError):
    """More examples were rejected than the caller allows; ``rejects`` holds them all."""

    def __init__(self, message: str, rejects: list[Reject]) -> None:
        super().__init__(message)
        self.rejects = rejects

    def __reduce__(self) -> tuple[type[TooManyRejects], tuple[str, list[Reject]]]:
        # An exception is pickled with its message alone, and could not be made again: a pool of
        # processes would wait for it for ever.
        return TooManyRejects, (str(self), self.rejects)


class Tally(NamedTuple):
    """What was read of a stream so far.

    Attributes:
        num_examples: how many examples.
        num_bad: how many of them were bad.
        in_a_row: how many bad ones the last example ends a run of; 0 if it was good.
    """

    num_examples: int = 0
    num_bad: int = 0
    in_a_row: int = 0

    def plus(self, *, bad: bool) -> Tally:
        """Return the tally after one more example."""
        row = self.in_a_row + 1 if bad else 0
        return Tally(self.num_examples + 1, self.num_bad + bad, row)


@dataclass(frozen=True)
class Tolerance:
    """How many rejects a build, or a stream, may have.

    Attributes:
        num_examples: examples in the source; 0 for a stream, which has as many as were read so far.
        max_bad_fraction: most rejects ÷ examples, 0..1.
        max_consecutive_bad: this many neighbours in the source stop the build.
    """

    num_examples: int
    max_bad_fraction: float
    max_consecutive_bad: int

    def __post_init__(self) -> None:
        share = self.max_bad_fraction
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise TypeError(checks.sentence("max_bad_fraction", share, "0..1", "it is a share"))
        if not 0 <= share <= 1:
            raise ValueError(checks.sentence("max_bad_fraction", share, "0..1", "it is a share"))
        remedy = "1 stops at the first bad example"
        checks.whole_number("max_consecutive_bad", self.max_consecutive_bad, 1, 2**63, remedy)

    def check(self, rejects: list[Reject]) -> None:
        """Raise if there are too many rejects; their order makes no difference.

        Raises:
            TooManyRejects: names how many, the limit, and the first ones.
        """
        bad = one_each([reject for reject in rejects if reject.is_bad])
        self._check_first(bad)
        first = _named("First", bad[:NAMED])
        # A share of the whole source, also while it is being read: rejects only become more, so an
        # early error would come at the end, too.
        self._check_share(len(bad), self.num_examples, bad, first)
        # A small share of a large source can still be one damaged part of it.
        in_a_row, previous = 0, -2
        for reject in bad:
            in_a_row = in_a_row + 1 if reject.example_index == previous + 1 else 1
            previous = reject.example_index
            self._check_run(in_a_row, previous, bad, first)

    def check_so_far(self, tally: Tally, latest: Sequence[Reject], *, ended: bool = False) -> None:
        """Raise if a stream has too many bad examples among those that were read so far.

        Asked after every bad example, and at the stream's end. Of few examples one is a large
        share; so the share counts once there are more than 30 bad ones, or the stream has ended.

        Args:
            tally: what was read.
            latest: some of the bad ones, in order; the last is the last there was.
            ended: whether this was all of the stream.

        Raises:
            TooManyRejects: names how many, the limit, and the latest ones.
        """
        bad = list(latest)
        self._check_first(bad)
        last = _named("Last", bad[-NAMED:])
        if ended or tally.num_bad > _AT_FIRST or self.max_bad_fraction == 0:
            self._check_share(tally.num_bad, tally.num_examples, bad, last)
        if tally.in_a_row:
            # The last one read ended the run; a resumed stream may not have met it itself.
            number = bad[-1].example_index if bad else tally.num_examples - 1
            self._check_run(tally.in_a_row, number, bad, last)

    def _check_first(self, bad: list[Reject]) -> None:
        if bad and self.max_bad_fraction == 0 and self.max_consecutive_bad == 1:
            raise TooManyRejects(bad_example(bad[0]), bad)

    def _check_share(self, num_bad: int, num_examples: int, bad: list[Reject], named: str) -> None:
        share = num_bad / max(1, num_examples)
        if share > self.max_bad_fraction:
            found = f"{num_bad} of {num_examples} examples ({share:.2%})"
            limit = f"at most {self.max_bad_fraction:.2%} (max_bad_fraction)"
            raise TooManyRejects(_message(found, limit, named), bad)

    def _check_run(self, in_a_row: int, last: int, bad: list[Reject], named: str) -> None:
        if in_a_row >= self.max_consecutive_bad:
            found = f"{in_a_row} examples in a row up to example {last}"
            limit = f"fewer than {self.max_consecutive_bad} (max_consecutive_bad)"
            raise TooManyRejects(_message(found, limit, named), bad)


def tolerance_of(
    num_examples: int, on_error: str, max_bad_fraction: float, max_consecutive_bad: int
) -> Tolerance:
    """Return the limits: as given, or no reject at all with ``on_error="raise"``."""
    checks.choice("on_error", on_error, ON_ERROR, "choose what a bad image does")
    allowed = Tolerance(num_examples, max_bad_fraction, max_consecutive_bad)
    return allowed if on_error == "quarantine" else Tolerance(num_examples, 0.0, 1)


class ReadFailures:
    """Counts examples that could not be decoded when read, each once; threads may share it."""

    def __init__(self) -> None:
        # By example: a loader meets the same image again in every epoch.
        self._rejects: dict[int, Reject] = {}
        self._lock = Lock()

    def add(
        self,
        rejects: list[Reject],
        tolerance: Tolerance,
        file_of: Callable[[int], str | None] = lambda _: None,
    ) -> None:
        """Log and count the rejects that are new.

        Args:
            rejects: some that were met.
            tolerance: how many there may be.
            file_of: returns the path of an example's file, which is logged; None if it has none.

        Raises:
            TooManyRejects: there are more than are tolerated.
        """
        if not rejects:
            return
        with self._lock:
            for reject in rejects:
                if reject.example_index not in self._rejects:
                    file = file_of(reject.example_index)
                    where = "" if file is None else f" ({checks.plain(file)})"
                    text = "example %d left out: %s%s"
                    log.warning(text, reject.example_index, reject.exception, where)
                    self._rejects[reject.example_index] = reject
            found = list(self._rejects.values())
        tolerance.check(found)

    @property
    def rejects(self) -> list[Reject]:
        """The rejects so far, by example."""
        with self._lock:
            return [self._rejects[example] for example in sorted(self._rejects)]

    def __reduce__(self) -> tuple[type[ReadFailures], tuple[()]]:
        return ReadFailures, ()  # a lock cannot be pickled; a worker process counts its own


class StreamReadFailures:
    """Counts images of a stream that this process could not decode; threads may share it.

    Every rank decodes its own packs, so the share is that of the images decoded here, over all
    passes since the process began. It is in no state: those are the same on all ranks.
    """

    def __init__(self) -> None:
        self._num_decoded = self._num_bad = 0
        # Numbers of the bad ones; each epoch numbers its examples anew.
        self._bad: set[int] = set()
        self._epoch = -1
        self._lock = Lock()

    def add(self, epoch: int, num_decoded: int, rejects: list[Reject], allowed: Tolerance) -> None:
        """Count the images of some rows, and log those that could not be decoded.

        Raises:
            TooManyRejects: there are more than are tolerated.
        """
        with self._lock:
            self._num_decoded += num_decoded
            if epoch != self._epoch:
                self._epoch, self._bad = epoch, set()
            for reject in rejects:
                log.warning("example %d left out: %s", reject.example_index, reject.exception)
                self._num_bad += 1
                self._bad.add(reject.example_index)
                # Packs mix neighbours with others, so a run may grow at both ends, and join two.
                first = last = reject.example_index
                # No further than a run that stops the stream.
                most = allowed.max_consecutive_bad
                while first - 1 in self._bad and last - first < most:
                    first -= 1
                while last + 1 in self._bad and last - first < most:
                    last += 1
                tally = Tally(self._num_decoded, self._num_bad, last - first + 1)
                allowed.check_so_far(tally, [reject])

    def __reduce__(self) -> tuple[type[StreamReadFailures], tuple[()]]:
        return StreamReadFailures, ()  # a lock cannot be pickled; a worker process counts its own


class Flagged:
    """Logs examples that are in their rows though something is amiss with them.

    The first of a kind as a warning, the others for those who ask: as ``INFO``.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def add(self, flags: dict[int, str]) -> None:
        """Log some examples, each with a word that says what is amiss."""
        for example, what in flags.items():
            level = logging.INFO if what in self._known else logging.WARNING
            self._known.add(what)
            log.log(level, "example %d kept: %s (others are logged as INFO)", example, what)


def bad_example(reject: Reject) -> str:
    """Return the error sentence of one reject."""
    what = f"example {reject.example_index} {bad_because(reject)}"
    return f"{what}; repair it, or let bad examples be left out"


def bad_because(reject: Reject) -> str:
    """Return the middle of an error sentence: what is bad about an example."""
    expected = "a usable sequence" if reject.stage == "tokens" else "a usable image and label"
    return f"is bad ({reject.reason}: {reject.exception}), expected {expected}"


def _message(found: str, limit: str, named: str) -> str:
    return f"rejected is {found}, expected {limit}; repair the source or raise it{named}"


def _named(which: str, rejects: list[Reject]) -> str:
    # A stream that was resumed may have met none of them itself.
    some = (f"example {r.example_index} ({r.reason}: {r.exception})" for r in rejects)
    return f". {which}: {'; '.join(some)}" if rejects else ""


class Reject(NamedTuple):
    """A source example that is in no pack, and why.

    Of several views of an image that cannot be decoded each is one, with its ``view``, until they
    are counted (`one_each`).
    """

    example_index: int
    stage: str
    reason: str
    exception: str
    view: int = 0

    @property
    def is_bad(self) -> bool:
        """Whether it counts as bad input: not if it is empty, or was dropped as asked."""
        return self.stage != ASKED and (self.stage, self.reason) != EMPTY


def one_each(rejects: Sequence[Reject]) -> list[Reject]:
    """Return one reject of each example, by example: of several views the first."""
    found: dict[int, Reject] = {}
    for reject in sorted(rejects, key=lambda one: (one.example_index, one.view)):
        found.setdefault(reject.example_index, reject._replace(view=0))
    return list(found.values())
