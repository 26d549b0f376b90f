"""`Packer`: packs one batch of a dataset at a time, for ``Dataset.map``, Ray Data and Spark.

A batch is packed by the same two functions as a whole dataset: one that plans its rows
(`plan_images`, `plan_sequences`) and one that fills them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Image
from datasets.formatting.formatting import LazyBatch, LazyRow
from numpy.typing import NDArray

from packpipe import checks
from packpipe._version import __version__
from packpipe.building.image_job import plan_images
from packpipe.building.images import Images
from packpipe.building.job import PlannedRows
from packpipe.building.token_job import Sequences, plan_sequences
from packpipe.images.pillow_settings import check_settings
from packpipe.philox import checked_key
from packpipe.planning.image_config import PackConfig, config_from
from packpipe.planning.image_options import MAX_IMAGE_SEQ_LEN
from packpipe.planning.token_config import TokenConfig, token_config_from
from packpipe.rows import schema
from packpipe.rows.rejects import ASKED, Reject, bad_because, one_each
from packpipe.sources.columns import AskedColumns, Options
from packpipe.sources.image_source import checked_root
from packpipe.sources.survey import probe_sizes

# Raised whenever the rows of a batch change, so that `map` does not take those of before.
_OUTPUT = 2
_IMAGE_FIELDS = {"bytes", "path"}  # of the struct that an encoded image is
# What Spark lacks: uint64 is left as it is, since no signed number holds it.
_SIGNED = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64()}
log = logging.getLogger(__name__)

ON_ERROR = ("raise", "drop")


class Packer:
    """Packs batches: ``dataset.map(Packer(...), batched=True, remove_columns=...)``.

    Every batch is packed by itself, so the rows depend on ``batch_size`` and ``num_proc``, and
    each batch ends with a pack that is partly empty; `packpipe.pack` has neither limit. Pass
    ``with_indices=True`` to ``map`` to record each example's source row, else
    ``example_index`` is -1; options with random choices need it, since images draw by their row.

    It also packs Arrow tables, record batches and iterators of them, data frames, and dicts of
    NumPy arrays or lists: the batches of Ray Data's ``map_batches`` and Spark's ``mapInArrow``.
    Spark knows neither lists of one size nor unsigned numbers, so the rows of an iterator have
    plain lists and signed numbers: to make them packed rows, ``cast`` them to the schema of the
    rows that `Packer` returns for a table.
    Arrays are packed as the pixels they are. In its own formats (numpy, torch) `datasets` decodes
    images by rules of its own, which know no palettes and no CMYK: pack those without a format.
    Padding of sequences (``attention_mask`` 0) and empty sequences are left out, as in `pack`.

    Args:
        seq_len: tokens a pack holds.
        image_column: name of the column of images; ``"auto"`` finds the only one.
        label_column: name of the column of labels; ``"auto"`` finds it, None leaves labels out.
            Lists of numbers need a type that says how many, ``List(Value("float32"), length=K)``:
            of others each batch takes the commonest number of its own.
        image_root: the only folder that paths may lead into; None follows every path, as in
            `pack`.
        token_columns: names of the columns of tokens; ``"auto"`` takes all lists of numbers of a
            batch without images.
        value_columns: names of the columns that go with each sequence; ``"auto"`` takes all others.
        seed: which permutation of a batch's examples and packs.
        epoch: which of the seed's permutations.
        on_error: ``"raise"`` stops at the first image or sequence that cannot be used; ``"drop"``
            leaves it out and logs it, since ``map`` has no place for a rejects table.
        **options: the options of `PackConfig` or, for token sequences, of `TokenConfig`.

    Raises:
        TypeError, ValueError: an argument is wrong; or, when called, a column or an image is.
    """

    def __init__(
        self,
        seq_len: int = 1024,
        *,
        image_column: str = "auto",
        label_column: str | None = "auto",
        image_root: str | Path | None = None,
        token_columns: str | Sequence[str] = "auto",
        value_columns: str | Sequence[str] = "auto",
        seed: int = 0,
        epoch: int = 0,
        on_error: str = "raise",
        **options: Unpack[Options],
    ) -> None:
        # Images or tokens: the options may tell; if not, the columns of a batch do (`_planned`).
        self.config: PackConfig | TokenConfig = _config_from(seq_len, dict(options), token_columns)
        self.seq_len, self.options = seq_len, dict(options)
        self.columns = AskedColumns(
            image_column, label_column, None, checked_root(image_root), token_columns, value_columns
        )
        self.key = checked_key(seed, epoch)
        self.on_error = checks.choice("on_error", on_error, ON_ERROR, "choose what bad images do")
        # `datasets` fingerprints this object by its class name and these plain values.
        self.version = (__version__, schema.VERSION, _OUTPUT)

    def __call__(self, batch: Any, indices: Sequence[int] | None = None) -> Any:
        """Return the packed rows of a batch.

        Args:
            batch: a batch that ``map`` passes; a ``pyarrow.Table``, ``RecordBatch``
                or data frame; an iterator of them; or a dict of one array or list a column.
            indices: source row of each example, with ``with_indices=True``.

        Returns:
            a ``pyarrow.Table``, of several chunks where a column has more than 2 GiB of texts or
            2**31 tokens; for an iterator, an iterator of record batches of plain types.
        """
        if isinstance(batch, Iterator):
            return (_plain(rows) for one in batch for rows in self(one).to_batches())
        numbers = None if indices is None else np.asarray(indices, np.int64)
        planned = self._planned(_as_dataset(batch), numbers)
        self._settle(planned.rejects, numbers is not None)
        # One range of packs gives one table; the memory of its rows is not used again.
        (filled,) = planned.fill([range(len(planned.plan))])
        self._settle(filled.rejects, numbers is not None)
        if isinstance(batch, LazyBatch) and filled.rows.column(0).num_chunks > 1:
            found, expected = (
                "of 2 GiB or more",
                "2 GiB at most in a column, which map writes whole",
            )
            remedy = "lower map's batch_size, or use packpipe.pack"
            raise ValueError(checks.sentence("batch", found, expected, remedy))
        return filled.rows if numbers is not None else _without_numbers(filled.rows)

    def _planned(self, dataset: Dataset, numbers: NDArray[np.int64] | None) -> PlannedRows:
        """Return the rows of a batch, not filled yet."""
        if self.columns.hold_tokens(dataset.features):
            config = self.config
            if not isinstance(config, TokenConfig):
                config = token_config_from(self.seq_len, self.options)
            tokens = self.columns.of_tokens(dataset, config)
            return plan_sequences(Sequences(dataset, tokens, config, self.key), numbers)
        config = self.config
        if not isinstance(config, PackConfig):
            config = config_from(self.seq_len, self.options)
        columns = self.columns.of_images(dataset)
        if numbers is None and (config.draws or config.num_views > 1):
            expected = "True for options that draw, since every image draws by its row"
            remedy = "use map(packer, batched=True, with_indices=True)"
            raise ValueError(checks.sentence("with_indices", False, expected, remedy))
        check_settings()
        images = Images(dataset, columns, config, self.key)
        sizes = probe_sizes(images.source, len(dataset), max_pixels=config.max_pixels)
        return plan_images(images, sizes, numbers)

    def _settle(self, rejects: list[Reject], in_source: bool) -> None:
        """Raise for the first reject, or log those that are left out."""
        for reject in one_each(rejects):
            name = f"example {reject.example_index}" + ("" if in_source else " of the batch")
            if reject.stage == ASKED:
                log.warning("%s dropped: %s", name, reject.exception)
                continue
            if not reject.is_bad:  # a third of the lines of a text may be empty
                log.debug("%s left out: %s", name, reject.exception)
                continue
            what = f"{name} {bad_because(reject)}"
            if self.on_error == "raise":
                remedy = "pass on_error='drop', or use packpipe.pack, which keeps a rejects table"
                raise ValueError(f"{what}; {remedy}")
            log.warning("%s; dropped", what)


def _as_dataset(batch: Any) -> Dataset:
    """Return a batch as a dataset, its columns not copied if they are Arrow."""
    features = None
    if isinstance(batch, LazyBatch):
        table, features = batch.pa_table, batch.formatter.features
    elif isinstance(batch, pa.RecordBatch):
        table = pa.Table.from_batches([batch])
    elif hasattr(batch, "__arrow_c_stream__"):  # Arrow's own table, pandas', Polars'
        table = _table(batch)
    elif isinstance(batch, Mapping) and not isinstance(batch, LazyRow):
        table = _table({name: _column(name, values) for name, values in batch.items()})
    else:
        expected = "a batch of Dataset.map, Arrow's table, or a dict of columns"
        remedy = "use map(packer, batched=True)"
        raise TypeError(checks.sentence("type(batch)", type(batch).__name__, expected, remedy))
    if features is None:
        table = _in_known_types(table)
    known = Features.from_arrow_schema(table.schema) if features is None else features
    found = Features({name: _feature(known[name]) for name in table.column_names})
    # Without a given fingerprint `datasets` would hash all that the batch holds.
    return Dataset(table, DatasetInfo(features=found), fingerprint="batch")


def _in_known_types(table: pa.Table) -> pa.Table:
    """Return a table with its tensors as lists and its encoded images as `datasets` has them."""
    for place, field in enumerate(table.schema):
        column = table.column(place)
        if isinstance(field.type, pa.BaseExtensionType) and "tensor" in field.type.extension_name:
            table = table.set_column(place, field.name, _column(field.name, _tensors(column)))
        # Where all paths are None, Arrow makes of dicts a struct whose paths have no type.
        elif (
            pa.types.is_struct(field.type) and {inner.name for inner in field.type} == _IMAGE_FIELDS
        ):
            chunks = [Image().cast_storage(chunk) for chunk in column.chunks]
            whole = pa.chunked_array(chunks, Image().pa_type)
            table = table.set_column(place, field.with_type(whole.type), whole)
    return table


def _tensors(column: pa.ChunkedArray) -> Iterator[NDArray[Any] | None]:
    """Yield the arrays of a column of tensors, as Arrow has them, and Ray in types of its own."""
    for chunk in column.chunks:
        there = chunk.filter(chunk.is_valid()) if chunk.null_count else chunk
        if isinstance(there, pa.FixedShapeTensorArray):
            arrays = iter(there.to_numpy_ndarray())
        else:
            arrays = iter(there.to_numpy(zero_copy_only=False))
        for is_there in chunk.is_valid().to_pylist():
            yield next(arrays) if is_there else None


def _table(data: Any) -> pa.Table:
    """Return columns as a table; ValueError if Arrow makes none of them."""
    try:
        return pa.table(data)
    except pa.ArrowException as error:
        raise ValueError(_not_arrow("batch", str(error))) from error


def _column(name: str, values: Any) -> pa.Array:
    """Return a column of arrays of any number of dimensions, or of anything else, as Arrow.

    Raises:
        ValueError: the arrays are of several dtypes or dimensions, or Arrow has no type for what
            the column holds.
    """
    # Arrow takes a column of plain numbers whole; the lines below visit every row.
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype != object:
        return pa.array(_native(values))
    rows = [_native(np.asarray(row)) if hasattr(row, "__array__") else row for row in values]
    arrays = [row for row in rows if isinstance(row, np.ndarray) and row.ndim]
    if not arrays or any(not isinstance(row, np.ndarray | None) for row in rows):
        try:
            return pa.array([row.tolist() if isinstance(row, np.ndarray) else row for row in rows])
        except pa.ArrowException as error:
            raise ValueError(_not_arrow(f"batch[{name!r}]", str(error))) from error
    # Of a list without a value NumPy says float64, whatever stands in the others.
    kinds = {(row.dtype.str, row.ndim) for row in arrays if row.size} or {("<i8", arrays[0].ndim)}
    if len(kinds) > 1 or len(arrays) + sum(row is None for row in rows) < len(rows):
        found = ", ".join(f"{dtype} of {ndim} dimensions" for dtype, ndim in sorted(kinds))
        raise ValueError(_not_arrow(f"batch[{name!r}]", f"arrays of {found}"))
    ((dtype, ndim),) = kinds
    nothing = np.empty((0,) * ndim, dtype)
    column = _nested([row if row.size else nothing for row in arrays], ndim)
    if len(arrays) == len(rows):
        return column
    numbers = iter(range(len(arrays)))
    return column.take(pa.array([None if row is None else next(numbers) for row in rows]))


def _native(values: NDArray[Any]) -> NDArray[Any]:
    """Return an array in this machine's byte order, the only one that Arrow knows."""
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _not_arrow(name: str, found: str) -> str:
    remedy = "pass encoded images, or use map without a format"
    return checks.sentence(name, found, "arrays of one kind, or what Arrow knows", remedy)


def _nested(arrays: list[NDArray[Any]], ndim: int) -> pa.Array:
    """Return arrays of one dtype as lists of lists of numbers.

    Arrow would make a Python object of every number of an array of two dimensions.
    """
    values = pa.array(np.concatenate([array.reshape(-1) for array in arrays]))
    # Offsets of plain lists are int32.
    large = len(values) > np.iinfo(np.int32).max
    kind, offset_type = (pa.LargeListArray, pa.int64()) if large else (pa.ListArray, pa.int32())
    # From the last axis to the first, each one wraps the values in lists of its size.
    for axis in reversed(range(ndim)):
        sizes = [np.full(math.prod(array.shape[:axis]), array.shape[axis]) for array in arrays]
        offsets = np.cumsum(np.concatenate([[0], *sizes]))
        values = kind.from_arrays(pa.array(offsets, offset_type), values)
    return values


def _feature(feature: Any) -> Any:
    """Return a column's feature; encoded images outside `datasets` are plain structs."""
    return Image() if isinstance(feature, dict) and set(feature) == _IMAGE_FIELDS else feature


def _plain(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Return rows in types that Spark has: lists of any size, and signed numbers that hold them."""
    return rows.cast(pa.schema([(field.name, _plain_type(field.type)) for field in rows.schema]))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return _SIGNED.get(kind, kind)


def _without_numbers(rows: pa.Table) -> pa.Table:
    """Return rows whose ``example_index`` is -1 throughout, since the source rows are unknown."""
    # Numbers within the batch would be the same in every batch, and look like source rows.
    place = rows.schema.get_field_index("example_index")
    unknown = [
        pa.ListArray.from_arrays(known.offsets, pa.array(np.full(len(known.values), -1)))
        for known in rows.column(place).chunks
    ]
    return rows.set_column(place, rows.schema.field(place), pa.chunked_array(unknown))


def _config_from(
    seq_len: int, options: dict[str, Any], token_columns: str | Sequence[str]
) -> PackConfig | TokenConfig:
    """Return the token configuration if the options or seq_len need it, else that of images."""
    own = {"overflow", "layout", "pad_token_id", "mask_first_label"}
    of_tokens = token_columns != "auto" or bool(own & options.keys())
    long = isinstance(seq_len, int) and seq_len > MAX_IMAGE_SEQ_LEN
    if of_tokens or (long and not options.keys() - TokenConfig.__dataclass_fields__.keys()):
        return token_config_from(seq_len, options)
    return config_from(seq_len, options)
