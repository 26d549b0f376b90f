"""Checks rows of token sequences, with the plan that they follow, and compares the source."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from packpipe.building.token_job import VERSION, too_long
from packpipe.philox import Key
from packpipe.planning.token_config import TokenConfig
from packpipe.planning.token_plan import TokenPlan, accompanying, plan_tokens
from packpipe.rows.fill_tokens import fill_tokens, padding_of, planned_pieces, token_places
from packpipe.rows.from_arrow import table_segments
from packpipe.rows.rejects import ASKED, Reject
from packpipe.rows.rows import NO_LABEL, Rows
from packpipe.rows.schema import token_schema
from packpipe.sources.kinds import holds_numbers
from packpipe.sources.token_columns import TokenColumns, bools_of, value_type
from packpipe.sources.token_source import TokenSource, token_source
from packpipe.verification.problems import FoundRows, Problem, named
from packpipe.verification.reject_checks import reject_problems
from packpipe.verification.row_checks import (
    Again,
    Check,
    lengths_of,
    row_of,
    rows_with,
    value_type_of,
)
from packpipe.verification.token_comparison import differing_pieces, flat_tokens, lost_tokens

# Stages at which the image of a pair is rejected.
_OF_IMAGES = ("probe", "size", "label")


class TokenChecks:
    """The checks of rows of token sequences, fixed or ragged."""

    KEYS = ("token_columns", "value_columns")
    COUNTS: tuple[str, ...] = ("cut", "truncated_tokens", "pieces")
    VERSION_KEY, VERSION = "token_schema_version", VERSION

    def __init__(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.config = TokenConfig(**manifest["config"])
        self.key = Key(manifest["seed"], manifest["epoch"])
        names = [*manifest["token_columns"], *manifest["value_columns"]]
        if len(set(names)) < len(names):
            raise ValueError(f"token_columns and value_columns are {names}, expected each once")
        self.bools = set(manifest.get("bool_columns", []))
        mask = manifest.get("mask_column")
        self.source_names = TokenColumns(manifest["token_columns"], manifest["value_columns"], mask)
        if mask is not None:
            self.COUNTS = (*self.COUNTS, "masked_tokens")

    @property
    def longest(self) -> int:
        """Tokens that texts of `pack_pairs` are truncated to; 0 for all other rows."""
        found: int = self.manifest.get("longest", 0)
        return found

    @property
    def beside_images(self) -> bool:
        """Whether rows hold the texts of images, and follow their plan."""
        return "beside" in self.manifest

    def values(self) -> list[str]:
        """Return the columns of the source that go with each segment, which may hold nulls."""
        found: list[str] = self.manifest["value_columns"]
        return found

    def token_names(self) -> list[str]:
        """Return the columns of tokens."""
        names = list(self.manifest["token_columns"])
        if self.config.mask_first_label and "labels" not in names:
            names.append("labels")
        return names

    def counted(self) -> set[str]:
        """Return the names of the manifest's counts that rows of any kind do not have."""
        return set(self.COUNTS)

    def beside_from(self, dataset: Dataset) -> None:
        """Return None: texts are planned from the images beside them, which are stored."""

    def columns(self) -> list[str]:
        """Return the columns that stored rows must have."""
        tokens = dict.fromkeys(self.token_names(), pa.int32())
        values = dict.fromkeys(self.values(), pa.int32())
        return list(token_schema(self.config, tokens, values).names)

    def schema_of(self, rows: pa.Table) -> pa.Schema:
        """Return the schema rows must have, given the types of the source's own columns."""
        tokens = {name: value_type_of(rows, name) for name in self.token_names()}
        for name, kind in tokens.items():
            if name in self.bools:
                tokens[name] = pa.bool_()
            elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise ValueError(f"column {name!r} holds {kind}, expected numbers")
        values = {name: value_type_of(rows, name) for name in self.values()}
        return token_schema(self.config, tokens, values)

    def broken_segments(self, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with segments."""
        yield "an example below 0", rows_with(segments, segments.example_index < 0)
        bad = (segments.seq_lens < 1) | (segments.fragment < 0)
        yield "a segment with no token, or a fragment below 0", rows_with(segments, bad)

    def broken_tokens(self, rows: pa.Table, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with tokens whose segments are sound."""
        config, names = self.config, self.token_names()
        lens = np.bincount(row_of(segments), segments.seq_lens, len(segments)).astype(np.int64)
        if config.layout == "fixed":
            # Without the source's columns only ids and positions are made: labels need input_ids.
            plain = replace(config, mask_first_label=False)
            padding = np.arange(config.seq_len) >= lens[:, None]
            for name, expected in fill_tokens(segments, {}, plain).items():
                differing = flat_tokens(rows, name) != expected
                yield f"{name} are not those of seq_lens", _any_by_row(differing, len(rows))
            for name in names:
                absent = padding_of(name, config)
                differing = (flat_tokens(rows, name) != absent) & padding.reshape(-1)
                yield f"{name} are not {absent} in padding", _any_by_row(differing, len(rows))
        else:
            uneven = [lengths_of(rows, name) != lens for name in names]
            yield "the tokens are not as many as seq_lens say", np.any(uneven, axis=0)
            if np.any(uneven):
                return
        if config.mask_first_label:
            firsts = flat_tokens(rows, "labels")[token_places(segments, config)]
            what = f"the first label of a segment is not {NO_LABEL}"
            yield what, rows_with(segments, firsts != NO_LABEL)

    def no_rows(self) -> Rows:
        """Return rows with packpipe's own columns of segments, and no row."""
        return table_segments(token_schema(self.config, {}, {}).empty_table())

    def views(self) -> int:
        """Return 1: a sequence has one segment, or pieces."""
        return 1

    def stages(self) -> set[str]:
        """Return the stages that an example may be rejected at."""
        of_images = _OF_IMAGES if self.beside_images else ()
        return {"tokens", *of_images, *([ASKED] if self.config.overflow == "drop" else [])}

    def counts(self, held: Rows) -> dict[str, int]:
        """Return the manifest's counts that only rows of tokens have."""
        found = {"pieces": len(held.example_index)}
        # How long a sequence was before it was truncated only the source tells.
        if self.config.overflow == "truncate" or self.beside_images:
            return found
        return {**found, **cut_counts(_whole_lens(held)[1], self.config, self.longest)}

    def total_problems(self, held: Rows, rejects: list[Reject]) -> Iterator[Problem]:  # noqa: ARG002
        """Yield which sequences miss a piece, have one twice, or were cut at another place."""
        seq_len, longest = self.config.seq_len, self.longest
        if self.config.overflow != "split" and (cut := held.fragment > 0).any():
            examples = np.unique(held.example_index[cut]).tolist()
            what = f"is cut into pieces, expected none with overflow {self.config.overflow!r}"
            yield Problem(named("example", examples), what)
        if longest and (over := held.seq_lens > longest).any():
            examples = held.example_index[over].tolist()
            yield Problem(named("example", examples), f"has over {longest} tokens (longest)")
        # By sequence, then by piece: the last key comes first.
        order = np.lexsort((held.fragment, held.example_index))
        example, fragment = held.example_index[order], held.fragment[order]
        # Cut to length, since np.r_ makes one entry where there is no piece at all.
        first = np.r_[True, example[1:] != example[:-1]][: len(example)]
        begins = np.maximum.accumulate(np.where(first, np.arange(len(example)), 0))
        # Every piece of a sequence but its last is as long as a row.
        followed = ~np.r_[first[1:], True][: len(example)]
        bad = fragment != np.arange(len(example)) - begins
        bad |= followed & (held.seq_lens[order] != seq_len)
        if bad.any():
            what = f"its pieces are not 0, 1, ... of {seq_len} tokens and a rest"
            yield Problem(named("example", np.unique(example[bad]).tolist()), what)

    def plan_again(self, held: Rows, rejects: list[Reject], beside: Any) -> Again | None:  # noqa: ARG002
        """Return the plan of all rows, made again; None if that of the images is not known.

        Args:
            held: the rows, in which each sequence is once, with all its pieces.
            rejects: of the folder.
            beside: the `EpochPlan` of the images that these texts belong to.
        """
        plan: TokenPlan
        if not self.beside_images:
            index, lens = _whole_lens(held)
            plan = plan_tokens(lens, self.config, **self.key._asdict(), index=index)
        elif beside is None:
            return None
        else:
            highest = max(held.example_index.max(initial=-1), beside.index.max(initial=-1))
            lens = np.zeros(highest + 1, np.int64)
            lens[held.example_index] = held.seq_lens
            plan = accompanying(beside, lens, self.longest, self.config)
        rows = planned_pieces(plan, range(len(plan)), {})
        return Again(plan, rows, {"bound": plan.quality.bound})

    def source_columns(self) -> list[str]:
        """Return the columns of the source that rows were made from."""
        return [*self.source_names.lists, *self.values()]

    def source_problems(
        self,
        dataset: Dataset,
        sample: int | None,  # noqa: ARG002
        found: FoundRows,
        rejects: list[Reject] | None,
    ) -> Generator[Problem, None, dict[str, int]]:
        """Compare every piece with its sequence, and the rejects; yield how they differ."""
        columns = self.source_names
        for name in columns.lists:
            if not holds_numbers(dataset.features[name]):
                what = f"has {name} of {dataset.features[name]}, expected lists of numbers"
                yield Problem("dataset", what)
                return {}
        source = token_source(dataset, columns)
        types = {name: value_type(dataset.features, name) for name in columns.tokens}
        # Before manifests named them, bools were stored as uint8.
        old = set(bools_of(dataset.features, columns.tokens)) - self.bools
        types |= dict.fromkeys(old, pa.uint8())
        for file, table, start, part, first in found.batches():
            # Lists of a broken row may be of other lengths than it says.
            sound = [n for n in range(len(part)) if first + n not in found.broken]
            rows = table.slice(start, len(part)).take(pa.array(sound, pa.int64()))
            for what, differing in differing_pieces(rows, source, types, self.config):
                numbers = np.array(sound, np.int64)[differing] + start
                yield Problem(f"{file}, {named('row', numbers.tolist())}", what)
        held = found.held()
        lost = list(lost_tokens(held, source.lens, self.config, self.longest))
        yield from lost
        if lost:
            return {}
        if rejects is not None:
            of_images = {one.example_index for one in rejects if one.stage in _OF_IMAGES}
            bad = source.rejects + self._too_long(source)
            yield from reject_problems(rejects, bad, of_images, self.manifest, dataset, {})
        packed = np.unique(held.example_index)
        packed = packed[(packed >= 0) & (packed < len(source.lens))]
        masked = {} if columns.mask is None else {"masked_tokens": source.num_masked}
        return masked | cut_counts(source.lens[packed], self.config, self.longest)

    def _too_long(self, source: TokenSource) -> list[Reject]:
        """Return the sequences of a source that were asked to be dropped."""
        if self.config.overflow != "drop":
            return []
        long = np.flatnonzero(source.lens > self.config.seq_len)
        bad = [reject.example_index for reject in source.rejects]
        return too_long(np.setdiff1d(long, bad), source.lens, self.config)


def cut_counts(lens: NDArray[np.int64], config: TokenConfig, longest: int) -> dict[str, int]:
    """Return the manifest's counts of what was cut.

    Args:
        lens: tokens of each packed sequence.
        config: the options.
        longest: tokens that texts of `pack_pairs` are truncated to; 0 for all other rows.
    """
    limit = longest or config.seq_len
    over = lens[lens > limit]
    truncated = bool(longest) or config.overflow == "truncate"
    lost = int((over - limit).sum()) if truncated else 0
    return {"cut": len(over), "truncated_tokens": lost}


def _whole_lens(held: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the examples in rows, ascending, and how many tokens all pieces of each hold."""
    examples, at = np.unique(held.example_index, return_inverse=True)
    # In floats, which are exact up to 2**53.
    return examples, np.bincount(at, held.seq_lens, len(examples)).astype(np.int64)


def _any_by_row(flat: NDArray[np.bool_], num_rows: int) -> NDArray[np.bool_]:
    return np.asarray(flat.reshape(num_rows, -1).any(axis=1))
