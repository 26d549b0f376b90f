"""Checks that all packed rows must pass; `ImageChecks` and `TokenChecks` add their own."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from packpipe.philox import Key
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.token_plan import TokenPlan
from packpipe.rows.from_arrow import table_segments
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows
from packpipe.verification.problems import Broken, FoundRows, Problem

# What may be wrong, and bool[rows], which rows it is wrong with: none if all is well.
Check: TypeAlias = tuple[str, NDArray[np.bool_]]


class Again(NamedTuple):
    """A plan made again, the rows it gives, and those of the manifest's counts that it tells."""

    plan: EpochPlan | TokenPlan
    rows: Rows
    counts: dict[str, int]


class RowChecks(Protocol):
    """The checks of one kind of rows: `ImageChecks` or `TokenChecks`.

    Attributes:
        manifest: the manifest of the folder.
        config: the options in it.
        key: (seed, epoch) that the rows were made with.
    """

    manifest: dict[str, Any]
    config: Any
    key: Key

    def counted(self) -> set[str]:
        """Return the names of the manifest's counts that rows of any kind do not have."""

    def columns(self) -> list[str]:
        """Return the columns that stored rows must have."""

    def schema_of(self, rows: pa.Table) -> pa.Schema:
        """Return the schema rows must have, given the types of their source's own columns.

        Raises:
            ValueError: a column does not hold lists; names it.
        """

    def broken_segments(self, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with segments."""

    def broken_tokens(self, rows: pa.Table, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with tokens whose segments are sound."""

    def no_rows(self) -> Rows:
        """Return rows with packpipe's own columns of segments, and no row."""

    def views(self) -> int:
        """Return how many segments each example has in the rows."""

    def stages(self) -> set[str]:
        """Return the stages that an example may be rejected at."""

    def plan_again(self, held: Rows, rejects: list[Reject], beside: Any) -> Again | None:
        """Return the plan of all rows, made again; None if not all it depends on is known.

        Args:
            held: the rows, in which each example is once.
            rejects: of the folder.
            beside: what the plan needs of the other folder of `pack_pairs`; None without it.

        Raises:
            ValueError: there is no such plan.
        """

    def source_columns(self) -> list[str]:
        """Return the columns of the source that rows were made from."""

    def source_problems(
        self,
        dataset: Dataset,
        sample: int | None,
        found: FoundRows,
        rejects: list[Reject] | None,
    ) -> Generator[Problem, None, dict[str, int]]:
        """Yield how rows and rejects, if these could be read, differ from their source.

        Returns:
            Those of the manifest's counts that only the source tells.
        """

    def beside_from(self, dataset: Dataset) -> Any:
        """Return what the plan needs of the other folder of `pack_pairs`, if the source tells."""

    def values(self) -> list[str]:
        """Return the columns of the source that go with each segment, which may hold nulls."""

    def token_names(self) -> list[str]:
        """Return the columns of tokens, whose lists are of other lengths than those of segments."""

    def counts(self, held: Rows) -> dict[str, int]:
        """Return the manifest's counts that only rows of this kind have."""

    def total_problems(self, held: Rows, rejects: list[Reject]) -> Iterator[Problem]:
        """Yield what is wrong with all rows together, and with what was rejected from them."""


def broken_rows(checks: RowChecks, rows: pa.Table) -> Iterator[Broken]:
    """Yield what is wrong with which rows of a table; nothing if all is well.

    Tokens are checked only if all segments of the table are sound, since they are compared with
    what the segments say.
    """
    amiss = _amiss(checks, rows)
    if amiss is not None:
        yield amiss
        return
    segments, sound = table_segments(rows), True
    for what, bad in (*_overfull(checks, segments), *checks.broken_segments(segments)):
        if bad.any():
            sound = False
            yield Broken(what, np.flatnonzero(bad), True)
    for what, bad in checks.broken_tokens(rows, segments) if sound else ():
        if bad.any():
            yield Broken(what, np.flatnonzero(bad), True)


def _amiss(checks: RowChecks, rows: pa.Table) -> Broken | None:
    """Return the reason why the rows cannot be read at all; None if they can."""
    every = np.arange(rows.num_rows)
    try:
        expected = checks.schema_of(rows)
    except ValueError as error:
        return Broken(str(error), every, False)
    for field in expected:
        there = field.name in rows.column_names
        found = rows.schema.field(field.name).type if there else "missing"
        if found != field.type:
            what = f"column {field.name!r} is {found}, expected {field.type}"
            return Broken(what, every, False)
        column = rows.column(field.name)
        # Values of the source may be null. Lists may not, nor may packpipe's own numbers.
        if column.null_count or (field.name not in checks.values() and has_nulls(column)):
            return Broken(f"column {field.name!r} holds nulls", every, False)
    tokens = checks.token_names()
    of_segments = [
        field.name
        for field in expected
        if pa.types.is_list(field.type) and field.name not in tokens
    ]
    # All segment columns are read with the offsets of seq_lens (`table_segments`).
    lengths = np.stack([lengths_of(rows, name) for name in of_segments])
    uneven = np.flatnonzero((lengths != lengths[0]).any(axis=0))
    if len(uneven):
        return Broken("the segment columns hold lists of different lengths", uneven, False)
    return None


def _overfull(checks: RowChecks, segments: Rows) -> Iterator[Check]:
    """Yield which rows hold too many tokens or segments."""
    seq_len, most = checks.config.seq_len, checks.config.max_segments
    held = np.bincount(row_of(segments), segments.seq_lens, len(segments))
    yield f"seq_lens add up to more than seq_len, {seq_len}", held > seq_len
    if most is not None:
        yield f"more than max_segments, {most}, segments", segments.num_segments > most


def row_of(rows: Rows) -> NDArray[np.int64]:
    """Return int64[segments], the row of each."""
    return np.repeat(np.arange(len(rows)), rows.num_segments)


def rows_with(rows: Rows, bad: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return bool[rows], those that hold a segment of bad: bool[segments]."""
    found = np.zeros(len(rows), np.bool_)
    found[row_of(rows)[bad]] = True
    return found


def lengths_of(rows: pa.Table, name: str) -> NDArray[np.int64]:
    """Return int64[rows], how many values each row's list holds."""
    return np.asarray(pc.list_value_length(rows.column(name)))


def has_nulls(column: pa.ChunkedArray | pa.Array) -> bool:
    """Return whether a column, or a list in it, holds a null."""
    if column.null_count:
        return True
    if isinstance(column, pa.ChunkedArray):
        return any(has_nulls(chunk) for chunk in column.chunks)
    # Arrow counts the nulls of a list column apart from those of the values in its lists.
    return (
        hasattr(column, "flatten")
        and pa.types.is_nested(column.type)
        and has_nulls(column.flatten())
    )


def same_values(found: pa.Array, expected: pa.Array) -> NDArray[np.bool_]:
    """Return bool[values], which are the same; null is the same as null, and NaN as NaN."""
    if pa.types.is_fixed_size_list(found.type):  # of labels that are lists of numbers
        each = same_values(found.flatten(), expected.flatten())
        return np.asarray(each.reshape(-1, found.type.list_size).all(axis=1))
    if pa.types.is_floating(found.type):
        numbers = (array.to_numpy(zero_copy_only=False) for array in (found, expected))
        # Nulls are NaN there.
        same_nulls = np.asarray(pc.equal(found.is_null(), expected.is_null()))
        return np.asarray(same_numbers(*numbers) & same_nulls)
    if found.equals(expected):
        return np.ones(len(found), np.bool_)
    # For Arrow null = null is null.
    same = pc.fill_null(pc.equal(found, expected), False)
    return np.asarray(pc.or_(same, pc.and_(found.is_null(), expected.is_null())))


def same_numbers(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.bool_]:
    """Return bool[...], which numbers are the same; NaN is the same as NaN, 0.0 is not as -0.0."""
    same: NDArray[np.bool_] = found == expected
    if np.issubdtype(found.dtype, np.floating):
        same &= np.signbit(found) == np.signbit(expected)
        same |= np.isnan(found) & np.isnan(expected)
    return same


def value_type_of(rows: pa.Table, name: str) -> pa.DataType:
    """Return the type of the values in a column's lists.

    Raises:
        ValueError: the column does not hold lists; names it.
    """
    kind = rows.schema.field(name).type
    if not hasattr(kind, "value_type"):
        raise ValueError(f"column {name!r} is {kind}, expected lists")
    return kind.value_type
