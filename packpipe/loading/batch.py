"""`PackedBatch`, `TokenBatch`, `PairBatch`: packed rows as tensors of one shape.

The tensors are the arrays of `packpipe.loading.columns`, which says what the shape letters mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from packpipe import checks
from packpipe.loading.colouring import drawn_pixels, segment_numbers
from packpipe.loading.columns import image_columns, token_columns
from packpipe.rows.pairs import PairRows
from packpipe.rows.rows import Rows

_Batch = TypeVar("_Batch", bound=type)


def _made_of_columns(
    fields_of: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Callable[[_Batch], _Batch]:
    """Make a class of batches, so that it takes its columns by name and torch finds its tensors.

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
        # A batch is tensors by name: `torch.load` may take one from a file, also within an exported
        # program, without the caller's trust in whatever the file may run.
        torch.serialization.add_safe_globals([batch])
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

    def __repr__(self) -> str:
        """Return the columns with their types and shapes, not their values."""
        shown = ", ".join(f"{name}={_brief(value)}" for name, value in self._columns.items())
        return f"{type(self).__name__}({shown})"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if isinstance(value, _Columns) else f"{type(value).__name__}[{len(value)}]"


@_made_of_columns(dict)
# Not frozen: Lightning's precisions set the fields of a copy, and refuse a dataclass that is.
@dataclass(eq=False, repr=False)
class PackedBatch(_Columns):
    """A batch of packed rows; absent segments have seq_lens 0.

    It is a mapping of its tensors, too: ``model(**batch)``, ``batch["labels"]``, ``dict(batch)``.

    Attributes:
        patches: uint8[B, L, D], zeros in padding.
        segment_ids: int32[B, L]: 1, 2, ... in row order; 0 is padding.
        coords: int16[B, L, 2], (y, x) in the image's patch grid; (-1, k) of the k-th prefix token,
            whose patch is zeros; 0 in padding.
        seq_lens: int32[B, S], tokens of each segment.
        grid_hw: int16[B, S, 2], patches of each full grid; 0 where absent.
        example_index: int64[B, S], row in the source; -1 where absent.
        labels: int64[B, S], -100 where absent; or, of lists of K numbers and of floats (K = 1),
            float32[B, S, K], NaN where a number or the segment is absent. None, and no part of the
            mapping, without labels.
        targets: uint8[B, L, T], the classes of the T cells of each patch, by row and column, 255
            where there is none; of masks of uint16 int32, and 65535. None, and no part of the
            mapping, without masks.
        weight: float32[B, S], what each image counts in the loss, a mixed one what the two do by
            their shares; 0 where absent. None, and no part of the mapping, without weights.
        view: int32[B, S], which of its example's views each segment is, -1 where absent; None, and
            no part of the mapping, where there is one of each.
        colours: float32[B, S, 3, 4], of an augmentation: what takes (red, green, blue, 1), levels
            of 0..255, to new ones; 0 where absent. None, and no part of the mapping, without one.
        solarize: float32[B, S], levels from this on are 255 - level first; 256 for none, 0 where
            absent. None, and no part of the mapping, where no image can be solarized.
        mix_weight: float32[B, S], of an augmentation that mixes neighbours: the weight of an
            image's own pixels in tokens that meet one of its partner; 0 where absent. None, and no
            part of the mapping, where nothing is mixed; so are the three that follow.
        partner_labels: int64[B, S], labels of the partners; -100 where nothing is mixed.
        label_weights: float32[B, S], weight of an image's own label; 0 where absent.
        mix_offset: int32[B, L], how many places further on the token is that one meets; 0 if it
            meets none.
    """

    patches: Tensor
    segment_ids: Tensor
    coords: Tensor
    seq_lens: Tensor
    grid_hw: Tensor
    example_index: Tensor
    labels: Tensor | None = None
    targets: Tensor | None = None
    weight: Tensor | None = None
    view: Tensor | None = None
    colours: Tensor | None = None
    solarize: Tensor | None = None
    mix_weight: Tensor | None = None
    partner_labels: Tensor | None = None
    label_weights: Tensor | None = None
    mix_offset: Tensor | None = None

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
            TypeError: the labels are neither numbers nor lists of them.
        """
        return cls(**_tensors(image_columns(rows, max_segments, copy=copy)))

    @property
    def present(self) -> Tensor:
        """bool[B, S], which segments are present, not padding."""
        return self.seq_lens > 0

    @property
    def partners(self) -> tuple[Tensor, Tensor] | None:
        """(partner_labels, label_weights), which losses take; None where nothing is mixed."""
        if self.partner_labels is None or self.label_weights is None:
            return None
        return self.partner_labels, self.label_weights

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
        columns = ("patches", "segment_ids", "coords", "targets", "mix_offset")
        return replace(self, **{name: self[name][:, :end] for name in columns if name in self})

    def pixels(self) -> Tensor:
        """Return float32[B, L, D], levels of 0..255 as augmentation shows them, not rounded.

        In the colours that were drawn, and neighbours mixed.
        """
        levels = self.patches.to(torch.float32)
        segments = segment_numbers(self.segment_ids, self.seq_lens.shape[1])
        offsets = None if self.mix_offset is None else self.mix_offset.flatten()
        drawn = drawn_pixels(levels.flatten(0, 1), segments, offsets, self).view_as(levels)
        return drawn.masked_fill((self.coords[..., :1] < 0), 0)  # colours may shift zeros

    def coloured(self) -> PackedBatch:
        """Return the batch with its patches as augmentation shows them, rounded to uint8.

        For models other than `NaViT`, which colours and mixes by itself; the batch returned has
        nothing of that to do any more. Labels of partners stay.
        """
        if self.colours is None and self.mix_offset is None:
            return self
        patches = self.pixels().round().to(torch.uint8)
        done: dict[str, Any] = dict.fromkeys(("colours", "solarize", "mix_weight", "mix_offset"))
        return replace(self, patches=patches, **done)

    def by_example(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return (example_index, values) of the present segments, to restore the source order.

        Args:
            values: [B, S, ...], one entry a segment, such as the model's logits.

        Returns:
            int64[n] and [n, ...]; ``out[example_index] = values`` restores the source order.
        """
        present = self.present
        return self.example_index[present], values[present]

    def by_view(self, values: Tensor, num_views: int) -> tuple[Tensor, Tensor]:
        """Return (example_index, values) of the examples all of whose views are in the batch.

        With ``views_together=True`` those are all, but for images that cannot be decoded. How many
        there are depends on the batch, as with `by_example`.

        Args:
            values: [B, S, ...], one entry a segment, such as the model's vectors.
            num_views: how many views the rows have of each example.

        Returns:
            int64[n], ascending, and [n, num_views, ...].

        Raises:
            ValueError: the rows have one view of each example, or more than num_views.
        """
        if self.view is None:
            expected, remedy = "views of examples", "pack with views=2"
            raise ValueError(checks.sentence("batch.view", None, expected, remedy))
        examples, found = self.by_example(values)
        if (examples < 0).any():
            expected = "rows that say which example is which"
            remedy = "pack with pack, or map with with_indices=True"
            raise ValueError(checks.sentence("example_index", -1, expected, remedy))
        view = self.view[self.present].long()
        if (view >= num_views).any():
            expected, remedy = f"{int(view.max()) + 1} or more", "pass that of the rows"
            raise ValueError(checks.sentence("num_views", num_views, expected, remedy))
        # By example, and within each by view, since the second sort is stable.
        order = view.argsort()
        order = order[examples[order].argsort(stable=True)]
        once, counts = examples.unique(return_counts=True)
        whole = counts == num_views
        kept = found[order][whole.repeat_interleave(counts)]
        return once[whole], kept.unflatten(0, (-1, num_views))


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
@dataclass(eq=False, repr=False)
class TokenBatch(_Columns):
    """A batch of packed rows of token sequences; absent segments have seq_lens 0.

    It has the fields that `packpipe.model.attention.flatten` reads, so its backends take text, too.
    It is a mapping of its columns, too, those of tokens first and those of segments last:
    ``batch["input_ids"]``, ``dict(batch)``. Models of transformers take `to_transformers`'s.

    Attributes:
        tokens: the source's token columns by name, each [B, L]: bools as they are, unsigned types
            as int64, but uint8.
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
    def from_rows(cls, rows: Rows, *, max_segments: int, copy: bool = True) -> TokenBatch:
        """Return rows as tensors, segments padded to max_segments.

        Args:
            rows: what `read_rows` returned for token sequences.
            max_segments: S; as many as any row holds, or more.
            copy: False lets the tensors share the rows' memory where it is writable.

        Raises:
            ValueError: a row holds more segments than max_segments.
        """
        columns = _tensors(token_columns(rows, max_segments, copy=copy))
        return cls(**_token_fields(columns))

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


def _tensors(columns: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        for name, values in columns.items()
    }


@_made_of_columns(dict)
@dataclass(eq=False, repr=False)
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


def batch_of(rows: Rows | PairRows, max_segments: int, *, copy: bool = True) -> Batch:
    """Return rows as the batch of their kind; see ``from_rows`` of `PackedBatch` and `TokenBatch`.

    Args:
        rows: of images, of token sequences, or of pairs of both.
        max_segments: S; as many as any row holds, or more.
        copy: False lets the tensors share the rows' memory where it is writable.
    """
    if isinstance(rows, PairRows):
        return PairBatch(
            images=PackedBatch.from_rows(rows.images, max_segments=max_segments, copy=copy),
            texts=TokenBatch.from_rows(rows.texts, max_segments=max_segments, copy=copy),
        )
    kind = TokenBatch if rows.of_tokens else PackedBatch
    return kind.from_rows(rows, max_segments=max_segments, copy=copy)
