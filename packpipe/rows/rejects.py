"""Rejects, and how many are tolerated before a build stops."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from packpipe import checks

log = logging.getLogger(__name__)

ON_ERROR = ("quarantine", "raise")
# Stage of rejects that the caller asked for (overflow="drop"); they do not count as bad.
ASKED = "overflow"
_NAMED = 5


class TooManyRejects(ValueError):
    """More examples were rejected than the caller allows; ``rejects`` holds them all."""

    def __init__(self, message: str, rejects: list[Reject]) -> None:
        super().__init__(message)
        self.rejects = rejects


@dataclass(frozen=True)
class Tolerance:
    """How many rejects a build may have.

    Attributes:
        num_examples: examples in the source.
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
        bad = sorted(reject for reject in rejects if reject.stage != ASKED)
        if bad and self.max_bad_fraction == 0 and self.max_consecutive_bad == 1:
            raise TooManyRejects(bad_example(bad[0]), bad)
        # A share of the whole source, also while it is being read: rejects only become more, so an
        # early error would come at the end, too.
        share = len(bad) / max(1, self.num_examples)
        if share > self.max_bad_fraction:
            found = f"{len(bad)} of {self.num_examples} examples ({share:.2%})"
            limit = f"at most {self.max_bad_fraction:.2%} (max_bad_fraction)"
            raise TooManyRejects(_message(found, limit, bad), bad)
        # A small share of a large source can still be one damaged part of it.
        in_a_row, previous = 0, -2
        for reject in bad:
            in_a_row = in_a_row + 1 if reject.example_index == previous + 1 else 1
            previous = reject.example_index
            if in_a_row >= self.max_consecutive_bad:
                found = f"{in_a_row} examples in a row up to example {previous}"
                limit = f"fewer than {self.max_consecutive_bad} (max_consecutive_bad)"
                raise TooManyRejects(_message(found, limit, bad), bad)


def tolerance_of(
    num_examples: int, on_error: str, max_bad_fraction: float, max_consecutive_bad: int
) -> Tolerance:
    """Return the limits: as given, or no reject at all with ``on_error="raise"``."""
    checks.choice("on_error", on_error, ON_ERROR, "choose what a bad image does")
    allowed = Tolerance(num_examples, max_bad_fraction, max_consecutive_bad)
    return allowed if on_error == "quarantine" else Tolerance(num_examples, 0.0, 1)


class Undecodable:
    """Counts examples that could not be decoded when read, each once; threads may share it."""

    def __init__(self) -> None:
        # By example: a loader meets the same image again in every epoch.
        self._rejects: dict[int, Reject] = {}
        self._lock = Lock()

    def add(self, rejects: list[Reject], tolerance: Tolerance) -> None:
        """Log and count the rejects that are new.

        Raises:
            TooManyRejects: there are more than are tolerated.
        """
        if not rejects:
            return
        with self._lock:
            for reject in rejects:
                if reject.example_index not in self._rejects:
                    log.warning("example %d left out: %s", reject.example_index, reject.exception)
                    self._rejects[reject.example_index] = reject
            found = list(self._rejects.values())
        tolerance.check(found)

    def __reduce__(self) -> tuple[type[Undecodable], tuple[()]]:
        return Undecodable, ()  # a lock cannot be pickled; a worker process counts its own


def bad_example(reject: Reject) -> str:
    """Return the error sentence of one reject."""
    what = f"example {reject.example_index} {bad_because(reject)}"
    return f"{what}; repair it, or let bad examples be left out"


def bad_because(reject: Reject) -> str:
    """Return the middle of an error sentence: what is bad about an example."""
    expected = "a usable sequence" if reject.stage == "tokens" else "a usable image and label"
    return f"is bad ({reject.reason}: {reject.exception}), expected {expected}"


def _message(found: str, limit: str, bad: list[Reject]) -> str:
    first = "; ".join(
        f"example {r.example_index} ({r.reason}: {r.exception})" for r in bad[:_NAMED]
    )
    return f"rejected is {found}, expected {limit}; repair the source or raise it. First: {first}"


class Reject(NamedTuple):
    """A source example that is in no pack, and why."""

    example_index: int
    stage: str
    reason: str
    exception: str
