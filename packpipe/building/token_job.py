"""Makes the `Job` of token sequences: rows are planned by lengths, then tokens are copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
from datasets import Dataset, Features
from numpy.typing import NDArray

from packpipe._version import __version__
from packpipe.building.job import FilledRows, Job, PlannedRows
from packpipe.philox import Key
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.token_config import TokenConfig
from packpipe.planning.token_plan import TokenPlan, accompanying, plan_tokens
from packpipe.rows.fill_tokens import Buffers, packed_table
from packpipe.rows.rejects import ASKED, Reject
from packpipe.sources.features import token_features
from packpipe.sources.token_columns import TokenColumns, bools_of
from packpipe.sources.token_source import TokenSource, token_source, usable

# Of the columns of token rows; the manifest names it.
VERSION = 1
_WORTH_THREADS = 2**22  # tokens; below, a pool of 2 threads is no faster than one thread


@dataclass(frozen=True, eq=False)
class Sequences:
    """The token sequences to pack, and the options to pack them with.

    Attributes:
        dataset: the source.
        columns: its columns of tokens, and those with one value a sequence.
        config, key: what the plan is made from.
        images: with `pack_pairs`, the plan of the images that these texts belong to; else None.
        longest: with images, the tokens that texts are truncated to.
        rejects: with images, the examples that are in no pack of their plan.
    """

    dataset: Dataset
    columns: TokenColumns
    config: TokenConfig
    key: Key
    images: EpochPlan | None = None
    longest: int = 0
    rejects: tuple[Reject, ...] = ()

    @cached_property
    def source(self) -> TokenSource:
        """The sequences by row number."""
        return token_source(self.dataset, self.columns)

    @property
    def features(self) -> Features:
        """Features of the stored rows."""
        return token_features(self.dataset.features, self.columns, self.config)

    @property
    def row_bytes(self) -> int:
        """Bytes of a full row's tokens."""
        schema = self.features.arrow_schema
        # Token columns, packpipe's own included, stand before the segment columns in the schema.
        names = schema.names[: schema.get_field_index("seq_lens")]
        bits = sum(schema.field(name).type.value_type.bit_width for name in names)
        return self.config.seq_len * int(bits) // 8


def token_job(sequences: Sequences) -> Job:
    """Return the job of packing token sequences."""
    return Job(
        record=cache(partial(token_record, sequences)),
        features=sequences.features,
        num_examples=len(sequences.dataset),
        plan=cache(partial(plan_sequences, sequences)),
        opened=lambda rows, _: rows,
    )


def plan_sequences(sequences: Sequences, numbers: NDArray[np.int64] | None = None) -> PlannedRows:
    """Return the planned rows of token sequences, not filled yet.

    Args:
        sequences: the sequences to pack.
        numbers: int64[examples], the ``example_index`` of each, for a dataset that is a part of
            another one; None numbers from 0.
    """
    config, source = sequences.config, sequences.source
    if sequences.images is None:
        bad = source.rejects
        index = usable(len(source.lens), bad)
        plan = plan_tokens(source.lens[index], config, **sequences.key._asdict(), index=index)
    else:
        bad = list(sequences.rejects)
        plan = accompanying(sequences.images, source.lens, sequences.longest, config)
    bad = bad + too_long(plan.dropped, source.lens, config)
    if numbers is not None:
        bad = [reject._replace(example_index=int(numbers[reject.example_index])) for reject in bad]
    pieces = "pieces of sequences" if plan.num_cut else "sequences"
    return PlannedRows(
        plan=plan,
        rejects=bad,
        unit="sequence",
        what=f"{len(plan.index):,} {pieces} in {len(plan):,} rows",
        cut_size=sequences.row_bytes,
        row_size=sequences.row_bytes,
        # Length, fragment, index, and a guess at the source's other values.
        segment_size=4 + 4 + 8 + 8 * len(source.values),
        varying_sizes=_text_sizes(plan, source),
        fill=partial(_fill, sequences, plan, numbers),
        counts=partial(_counts, plan, sequences),
    )


def _fill(
    sequences: Sequences,
    plan: TokenPlan,
    numbers: NDArray[np.int64] | None,
    packs: list[range],
) -> Generator[FilledRows, None, None]:
    """Yield the rows of each range of packs; the next ones overwrite their memory."""
    source, schema, buffers = sequences.source, sequences.features.arrow_schema, Buffers()
    # Threads, since the kernels that copy release the interpreter lock.
    # A pool costs 0.5 ms, more than one thread takes to copy a batch of `Packer`.
    with (
        nullcontext()
        if plan.quality.num_tokens < _WORTH_THREADS
        else ThreadPoolExecutor() as executor
    ):
        for some in packs:
            rows = packed_table(
                plan,
                some,
                source.columns,
                source.values,
                schema,
                numbers=numbers,
                executor=executor,
                buffers=buffers,
            )
            num_pieces = int(plan.offsets[some.stop] - plan.offsets[some.start])
            yield FilledRows(rows, [], num_pieces, Counter())


def _text_sizes(plan: TokenPlan, source: TokenSource) -> NDArray[np.int64]:
    """Return int64[packs], bytes of the texts of each."""
    lens = source.text_lens[plan.index[plan.order]]
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(lens)])
    sizes: NDArray[np.int64] = np.diff(before[plan.offsets])
    return sizes


def _counts(
    plan: TokenPlan, sequences: Sequences, rejects: list[Reject], flags: Counter[str] | None
) -> dict[str, int]:
    """Return the manifest's counts of packs, tokens and what was cut or left out."""
    del rejects, flags  # none is found while rows are filled, so the plan has the counts
    masked = sequences.source.num_masked
    return {
        **({} if sequences.columns.mask is None else {"masked_tokens": masked}),
        "cut": plan.num_cut,
        "truncated_tokens": plan.num_truncated_tokens,
        "pieces": len(plan.index),
        "packs": len(plan),
        "bound": plan.quality.bound,
        "tokens": plan.quality.num_tokens,
    }


def token_record(sequences: Sequences) -> dict[str, Any]:
    """Return everything the bytes of the folder depend on."""
    images, longest, columns = sequences.images, sequences.longest, sequences.columns
    bools = bools_of(sequences.dataset.features, columns.tokens)
    return {
        "token_schema_version": VERSION,
        "packpipe": __version__,
        "source_fingerprint": sequences.dataset._fingerprint,
        "token_columns": columns.tokens,
        "value_columns": columns.values,
        # They were stored as uint8 before; folders without any are what they always were.
        **({"bool_columns": bools} if bools else {}),
        # Only if it leaves out something: other folders are what they always were.
        **({} if columns.mask is None else {"mask_column": columns.mask}),
        "config": sequences.config.to_dict(),
        **sequences.key._asdict(),
        # Texts of pairs follow the packs of the images, which this stands for.
        **({} if images is None else {"beside": images.fingerprint}),
        **({"longest": longest} if longest else {}),
    }


def too_long(
    dropped: NDArray[np.int64], lens: NDArray[np.int64], config: TokenConfig
) -> list[Reject]:
    """Return as rejects the sequences that a plan leaves out for their length.

    Args:
        dropped: their rows in the source.
        lens: int64[rows of the source], tokens of each.
        config: the options.
    """
    what = f"expected at most {config.seq_len} (seq_len), with overflow='drop'"
    return [
        Reject(row, ASKED, "too long", f"{lens[row]} tokens, {what}") for row in dropped.tolist()
    ]
