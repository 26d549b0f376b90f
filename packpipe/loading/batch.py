"""`PackedBatch`, `TokenBatch`, `PairBatch`: packed rows as tensors of one shape.

The shapes depend on the batch size, ``seq_len`` and ``max_segments`` alone, never on what the
rows hold, so a model is compiled for one graph only.

Shape letters, here and in the model: B rows, L tokens a row (seq_len), S segments a row
(max_segments), D bytes a patch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from packpipe import checks
from packpipe.rows.pairs import PairRows
from packpipe.rows.rows import NO_LABEL, Rows
from packpipe.rows.schema import SEGMENT_TYPES

NO_EXAMPLE = -1

_Batch = TypeVar("_Batch", bound=type)


def _made_of_columns(
    fields_of: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Callable[[_Batch], _Batch]:
    """Let a class of batches be made of its columns, too, and be a tree of tensors to torch.

    Training frameworks change the tensors of a mapping with ``type(batch)({name: ..., ...})``.

    Args:
        fields_of: returns the fields of the class that hold some columns.
    """

    def changed(batch: _Batch) -> _Batch:
        made_of_fields = batch.__init__  # type: ignore[misc]

        @functools.wraps(made_of_fields)
        def init(self: Any, *columns: Any, **fields: Any) -> None:
            if len(columns) == 1 and isinstance(columns[0], Mapping):
                made_of_fields(self, **fields_of(columns[0]))
            else:
                made_of_fields(self, *columns, **fields)

        batch.__init__ = init  # type: ignore[misc]
        torch.export.register_dataclass(batch, serialized_type_name=f"packpipe.{batch.__name__}")
        return batch

    return changed


class _Columns(Mapping[str, Any]):
    """A batch as the mapping of its columns, in the order of its fields, a dict's one by one."""

    # A batch is itself alone: a mapping's == would ask for one truth of a tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def _columns(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            found |= value if isinstance(value, dict) else {name: value}
        return {name: value for name, value in found.items() if value is not None}

    def __getitem__(self, name: str) -> Any:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


@_made_of_columns(dict)
# Not frozen: Lightning's precisions set the fields of a copy, and refuse a dataclass that is.
@dataclass(eq=False)
class PackedBatch(_Columns):
    """A batch of packed rows; absent segments have seq_lens 0.

    It is a mapping of its tensors, too: ``model(**batch)``, ``batch["labels"]``, ``dict(batch)``.

    Attributes:
        patches: uint8[B, L, D], zeros in padding.
        segment_ids: int32[B, L]: 1, 2, ... in row order; 0 is padding.
        coords: int16[B, L, 2], (y, x) in the image's patch grid; 0 in padding.
        seq_lens: int32[B, S], tokens of each segment.
        grid_hw: int16[B, S, 2], patches of each full grid; 0 where absent.
        example_index: int64[B, S], row in the source; -1 where absent.
        labels: int64[B, S], -100 where absent; None, and no part of the mapping, without labels.
    """

    patches: Tensor
    segment_ids: Tensor
    coords: Tensor
    seq_lens: Tensor
    grid_hw: Tensor
    example_index: Tensor
    labels: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Rows, *, max_segments: int = 64, copy: bool = True) -> PackedBatch:
        """Return rows as tensors, segments padded to max_segments.

        Args:
            rows: what `read_rows` returned.
            max_segments: S; the max_segments the rows were packed with, or more.
            copy: False lets the tensors share the rows' memory where it is writable; views of
                Arrow's memory are not, and are copied.

        Raises:
            ValueError: a row holds more segments than max_segments.
            TypeError: the labels are not integers.
        """
        width = _checked_width(
            rows, max_segments, "pass the max_segments the rows were packed with"
        )
        pad = _padding_to(rows, width)
        labels = None
        if "labels" in rows.segments:
            labels = pad(_integer_labels(rows.segments["labels"]), NO_LABEL)
        return cls(
            patches=_tensor(rows.patches, copy),
            segment_ids=_tensor(rows.segment_ids, copy),
            coords=_tensor(rows.coords, copy),
            seq_lens=pad(rows.seq_lens, 0),
            grid_hw=pad(rows.grid_hw, 0),
            example_index=pad(rows.example_index, NO_EXAMPLE),
            labels=labels,
        )

    @property
    def present(self) -> Tensor:
        """bool[B, S], which segments are present, not padding."""
        return self.seq_lens > 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory, which a GPU copies from without waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return PackedBatch(**{name: change(tensor) for name, tensor in tensors.items()})

    def trim(self, multiple: int) -> PackedBatch:
        """Return the batch without the tokens at the end that are padding in all rows.

        Rows of one image each, batched by similar length, then are the buckets of NaFlex.

        Args:
            multiple: the length stays a multiple of this many tokens, so that few shapes occur.
        """
        multiple = checks.whole_number("multiple", multiple, 1, 2**31 - 1, "64 is usual")
        longest = int(self.seq_lens.sum(1).max())
        # A batch of empty rows keeps some tokens, too, so that no tensor has a length of 0.
        end = max(1, -(-longest // multiple)) * multiple
        columns = ("patches", "segment_ids", "coords")
        return replace(self, **{name: getattr(self, name)[:, :end] for name in columns})

    def by_example(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return (example_index, values) of the present segments, to restore the source order.

        Args:
            values: [B, S, ...], one entry a segment, such as the model's logits.

        Returns:
            int64[n] and [n, ...]; ``out[example_index] = values`` restores the source order.
        """
        present = self.present
        return self.example_index[present], values[present]


def _checked_width(rows: Rows, max_segments: int, remedy: str) -> int:
    """Return max_segments; raise ValueError if a row holds more segments."""
    width = checks.whole_number("max_segments", max_segments, 1, 2**31 - 1, remedy)
    num_segments = rows.num_segments
    too_many = np.flatnonzero(num_segments > width)
    if too_many.size:
        name, found = f"num_segments[{too_many[0]}]", int(num_segments[too_many[0]])
        expected = f"at most {width} (max_segments)"
        raise ValueError(checks.sentence(name, found, expected, remedy))
    return width


def _padding_to(rows: Rows, width: int) -> Callable[[NDArray[Any], float], Tensor]:
    """Return a function that makes a column of segments a tensor [B, S, ...].

    Its second argument is what stands where a row has no such segment.
    """
    places = rows.places(width)  # worked out once for all columns

    def pad(values: NDArray[Any], absent: float) -> Tensor:
        column = np.full((len(rows) * width, *values.shape[1:]), absent, values.dtype)
        column[places] = values
        return torch.from_numpy(column.reshape(len(rows), width, *values.shape[1:]))

    return pad


def _tensor(values: NDArray[Any], copy: bool) -> Tensor:
    # torch has no read-only tensors: writing to one over a mapped file would end the process.
    return torch.from_numpy(values.copy() if copy or not values.flags.writeable else values)


def _integer_labels(labels: pa.Array) -> NDArray[np.int64]:
    if not len(labels):  # a rank without packs, where the type may be unknown
        return np.empty(0, np.int64)
    if not pa.types.is_integer(labels.type):
        remedy = "class_encode_column it before packing, or pack with label_column=None"
        raise TypeError(checks.sentence("labels.type", str(labels.type), "an integer type", remedy))
    # torch's cross-entropy takes class numbers as int64.
    return np.asarray(labels).astype(np.int64)


def _token_fields(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `TokenBatch` that hold the columns, given in the order of a batch.

    Raises:
        ValueError: they are in another order.
    """
    # Told by the order alone, since columns may be anything that was made of the tensors.
    own = [number for number, name in enumerate(columns) if name in _OF_ALL_TOKENS]
    found = tuple(name for name in columns if name in _OF_ALL_TOKENS)
    if found != _OF_ALL_TOKENS or own[-1] - own[0] >= len(own):
        expected = f"{', '.join(_OF_ALL_TOKENS)} one after the other, as a batch has them"
        remedy = "keep the order, or pass the fields by name"
        raise ValueError(checks.sentence("columns", list(columns), expected, remedy))
    fields: dict[str, Any] = {"tokens": {}, "segments": {}}
    others = "tokens"
    for name, value in columns.items():
        if name in _OF_ALL_TOKENS:
            fields[name], others = value, "segments"
        else:
            fields[others][name] = value
    return fields


# Fields of a `TokenBatch` that do not depend on the source, between tokens and segments.
_OF_ALL_TOKENS = ("segment_ids", "position_ids", "seq_lens", "fragment", "example_index")


@_made_of_columns(_token_fields)
@dataclass(eq=False)
class TokenBatch(_Columns):
    """A batch of packed rows of token sequences; absent segments have seq_lens 0.

    It has the fields that `packpipe.model.attention.flatten` reads, so its backends take text, too.
    It is a mapping of its columns, too, those of tokens first and those of segments last:
    ``batch["input_ids"]``, ``dict(batch)``. Models of transformers take `to_transformers`'s.

    Attributes:
        tokens: the source's token columns by name, each [B, L]; unsigned types as int64.
        segment_ids: int32[B, L]: 1, 2, ... in row order; 0 is padding.
        position_ids: int32[B, L], 0, 1, ... within the segment; 0 in padding.
        seq_lens: int32[B, S], tokens of each segment.
        fragment: int32[B, S], which piece of its sequence; 0 where absent.
        example_index: int64[B, S], row in the source; -1 where absent.
        segments: the source's other columns by name, such as ``labels`` of sequences: numbers as
            [B, S], with -100 (``labels``), 0, False or NaN where absent; others as a list of each
            row's values. Integers and bools with a null among them are such lists, too.
    """

    tokens: dict[str, Tensor]
    segment_ids: Tensor
    position_ids: Tensor
    seq_lens: Tensor
    fragment: Tensor
    example_index: Tensor
    segments: dict[str, Tensor | list[list[Any]]] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Rows, *, max_segments: int) -> TokenBatch:
        """Return rows as tensors, segments padded to max_segments.

        Args:
            rows: what `read_rows` returned for token sequences.
            max_segments: S; as many as any row holds, or more.

        Raises:
            ValueError: a row holds more segments than max_segments.
        """
        width = _checked_width(rows, max_segments, "pass as many as the rows hold")
        tokens = {name: _signed_tensor(values) for name, values in rows.tokens.items()}
        pad = _padding_to(rows, width)
        return cls(
            segment_ids=tokens.pop("segment_ids"),
            position_ids=tokens.pop("position_ids"),
            tokens=tokens,
            seq_lens=pad(rows.seq_lens, 0),
            fragment=pad(rows.fragment, 0),
            example_index=pad(rows.example_index, NO_EXAMPLE),
            segments={
                name: _value_tensor(name, values, rows, pad)
                for name, values in rows.segments.items()
                if name not in SEGMENT_TYPES
            },
        )

    @property
    def present(self) -> Tensor:
        """bool[B, S], which segments are present, not padding."""
        return self.seq_lens > 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenBatch:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        """Return the batch in page-locked memory, which a GPU copies from without waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: changed(inner) for name, inner in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return TokenBatch(**changed(vars(self)))


def _value_tensor(
    name: str, values: pa.Array, rows: Rows, pad: Callable[[NDArray[Any], float], Tensor]
) -> Tensor | list[list[Any]]:
    """Return a column with one value a segment: numbers as [B, S], others as lists of the rows."""
    kind = values.type
    if pa.types.is_floating(kind):
        return pad(values.to_numpy(zero_copy_only=False), np.nan)  # a null is NaN
    if not values.null_count and pa.types.is_boolean(kind):
        return pad(values.to_numpy(zero_copy_only=False), False)
    if not values.null_count and pa.types.is_integer(kind):
        return pad(values.to_numpy().astype(np.int64), NO_LABEL if name == "labels" else 0)
    ends = rows.offsets.tolist()
    return [values[a:b].to_pylist() for a, b in itertools.pairwise(ends)]


def _signed_tensor(values: NDArray[Any]) -> Tensor:
    # torch has few operations on unsigned integers, uint8 excepted.
    wide = values.dtype.kind == "u" and values.dtype.itemsize > 1
    return torch.from_numpy(values.astype(np.int64) if wide else values.copy())


@_made_of_columns(dict)
@dataclass(eq=False)
class PairBatch(_Columns):
    """A batch of images and their texts: segment s of row b is the same example in both.

    Pairs whose image could not be decoded are in neither. It is a mapping of the two batches, too:
    ``model(**batch)``, of a model whose ``forward`` takes ``images`` and ``texts``.

    Attributes:
        images: rows of images, [B, L, ...] and [B, S, ...].
        texts: rows of their texts, [B, L2, ...] and [B, S, ...].
    """

    images: PackedBatch
    texts: TokenBatch

    @property
    def present(self) -> Tensor:
        """bool[B, S], which pairs are present, not padding."""
        return self.images.present

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PairBatch:
        """Return the batch on a device."""
        return self._map(lambda rows: rows.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PairBatch:
        """Return the batch in page-locked memory, which a GPU copies from without waiting."""
        return self._map(lambda rows: rows.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> PairBatch:
        return PairBatch(images=change(self.images), texts=change(self.texts))


Batch: TypeAlias = PackedBatch | TokenBatch | PairBatch


def batch_of(rows: Rows | PairRows, *, max_segments: int) -> Batch:
    """Return the batch of some rows, which are in memory of their own or read-only.

    Args:
        rows: of images, of token sequences, or of pairs of both.
        max_segments: S; as many as any row holds, or more.
    """
    if isinstance(rows, PairRows):
        return PairBatch(
            images=PackedBatch.from_rows(rows.images, max_segments=max_segments, copy=False),
            texts=TokenBatch.from_rows(rows.texts, max_segments=max_segments),
        )
    if rows.of_tokens:
        return TokenBatch.from_rows(rows, max_segments=max_segments)
    # Not copied again: what is read-only is copied anyway.
    return PackedBatch.from_rows(rows, max_segments=max_segments, copy=False)
