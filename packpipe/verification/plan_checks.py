"""Makes the plan of a folder again, and compares its rows with it, one by one.

A plan is a pure function of sizes or lengths, options, seed and epoch. A folder says all of them,
so its plan can be made without the source: a million images take about a second. What no
checksum knows is found thus: rows or files that changed places, a row in two pieces, an example
that was moved from its row to the rejects.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packpipe.building.shards import MANIFEST
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows
from packpipe.verification.problems import FoundRows, Problem
from packpipe.verification.row_checks import Again, RowChecks, row_of

_NAMED = 3  # examples of a row


def plan_problems(
    checks: RowChecks, found: FoundRows, held: Rows, rejects: list[Reject], beside: Any
) -> Generator[Problem, None, Again | None]:
    """Yield which rows are not those of the plan, made again; return that plan.

    Args:
        checks: of the rows.
        found: the rows.
        held: their segments.
        rejects: of the folder.
        beside: what the plan needs of the other folder of `pack_pairs`; None without it.
    """
    try:
        again = checks.plan_again(held, rejects, beside)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        yield Problem(MANIFEST, f"gives no plan: {error}")
        return None
    if again is None:
        return None
    if len(held) != len(again.rows):
        what = f"gives a plan of {len(again.rows)} rows, expected the {len(held)} of the files"
        yield Problem(MANIFEST, what)
    differing = np.flatnonzero(differing_rows(held, again.rows))
    for where, some in found.named(differing):
        ours, theirs = _examples(held, some[0]), _examples(again.rows, some[0])
        first = "" if len(some) == 1 else "the first "
        what = f"not what the plan puts there ({first}examples {ours}, expected {theirs})"
        yield Problem(where, what)
    return again


def differing_rows(found: Rows, expected: Rows) -> NDArray[np.bool_]:
    """Return bool[rows], which rows of both differ in a column of segments."""
    number = min(len(found), len(expected))
    same = found.num_segments[:number] == expected.num_segments[:number]
    # The segments of rows that hold as many of them, in both.
    ours, theirs = (
        np.repeat(np.r_[same, np.zeros(len(rows) - number, np.bool_)], rows.num_segments)
        for rows in (found, expected)
    )
    rows = row_of(found)[ours]
    differing: NDArray[np.bool_] = ~same
    for name, column in expected.segments.items():
        unlike = found.segments[name][ours] != column[theirs]
        # Sizes and grids are pairs.
        unlike = unlike.any(axis=1) if unlike.ndim > 1 else unlike
        differing[rows[unlike]] = True
    return differing


def _examples(rows: Rows, row: int) -> str:
    """Return text that names the examples of a row, the first of them if there are many."""
    examples = rows.example_index[rows.offsets[row] : rows.offsets[row + 1]].tolist()
    more = ", ..." if len(examples) > _NAMED else ""
    return f"[{', '.join(map(str, examples[:_NAMED]))}{more}]"
