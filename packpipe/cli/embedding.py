"""What `packpipe embed` writes: vectors of each image of a dataset, in one Parquet file.

The examples, or the packed rows, are taken in parts, each computed alone and written to a file of
its own in the folder OUTPUT.parts. A part is complete or not there, so a run that was killed goes
on after the last one, unless an image of a part has changed. When all are there they become OUTPUT,
one row group each, and the folder is removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from datasets import Dataset, Features, List, Value
from datasets.utils import tqdm
from torch import Tensor

from packpipe import __version__, checks
from packpipe.building.shards import alone_in
from packpipe.cli.embedded import REJECTED, EmbeddedImages, EmbeddedRows
from packpipe.cli.starting import trained_model
from packpipe.cli.training_run import device_of_this_rank
from packpipe.durable import commit, partial_of, write_json
from packpipe.model.navit import NaViT
from packpipe.model.precision import is_half
from packpipe.model.predict import Answers, predict_packs
from packpipe.rows.own_columns import holds_rows
from packpipe.rows.rejects import Reject, Tolerance
from packpipe.rows.rejects_table import REJECTS_SCHEMA
from packpipe.sources.kinds import holds_images

DTYPES = ("float32", "float16")
# Examples a part. Vectors of all tokens take some hundred times the memory of one an image.
_PART_SIZE, _PART_SIZE_OF_TOKENS = 4096, 256
_RECORD = "record.json"


def embed(
    run: Path | str,
    dataset: Dataset,
    output: Path,
    *,
    columns: list[str] | None = None,
    tokens: bool = False,
    dtype: str = "float32",
    part_size: int | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    max_bad_fraction: float = 0.01,
    precision: str = "auto",
) -> list[Reject]:
    """Write the features of each image by a model; return the rejects.

    The file has a row for each image that can be read, in the order of the dataset: its
    example_index, the columns kept of the dataset, ``embedding``
    (fixed_size_list<dtype>[channels]) and num_tokens. A dataset of files has one column more that
    can be kept, their ``path``, unless it has one of that name. The rejects are in a table beside
    it, each with the path of its file, if it has one.

    Images of packed rows are embedded as they were packed, part by part as the rows lie, and within
    a part by their example_index. Their only column that can be kept is ``labels``.

    With tokens, in place of ``embedding``: ``tokens`` (list<fixed_size_list<dtype>[channels]>), all
    of the image's, before they are pooled, and ``coords`` (list<fixed_size_list<int16>[2]>), the
    (y, x) of each in the image's patch grid. They go row by row: a map is
    ``tokens.reshape(*coords[-1] + 1, channels)``.

    Args:
        run: a training's folder, one that `packpipe.from_pretrained` reads, or the name of a model
            of the Hugging Face Hub.
        dataset: images; labels are not asked for. Or packed rows of them.
        output: the file.
        columns: of the dataset, that are kept; None keeps all but images, and the path.
        tokens: whether each image gets the vectors of its tokens, in place of one.
        dtype: ``"float32"`` or ``"float16"``.
        part_size: images a part: what a kill may cost, and what is in memory at once; None is
            4096, or 256 with tokens. Of packed rows as many whole rows as hold about so many.
        batch_size: rows a step.
        num_workers: threads that decode ahead.
        max_bad_fraction: a larger share of images that cannot be read is an error.
        precision: in which they are computed, see `packpipe.model.precision`.

    Raises:
        FileExistsError: the file is there already, or other vectors are in its parts, or those of
            images that have changed, or another process is writing them.
        TooManyRejects: too many images cannot be read.
        ValueError: the rows are not of the model's patches, or lack tokens that are asked for.
    """
    output = checks.local_path("OUTPUT", output)
    checks.choice("dtype", dtype, DTYPES, "choose a type of the vectors")
    parts = output.with_name(f"{output.name}.parts")
    if output.exists() and not (parts / _RECORD).exists():
        expected, remedy = "a file that is not there yet", "remove it, or give another name"
        raise FileExistsError(checks.sentence("OUTPUT", str(output), expected, remedy))
    model, options = trained_model(str(run), "RUN")
    packing = options.packing
    model = model.to(device_of_this_rank()).eval()
    source: EmbeddedRows | EmbeddedImages
    if holds_rows(dataset.column_names):
        source = EmbeddedRows(dataset, packing)
    else:
        source = EmbeddedImages(dataset, packing, num_workers)
    if tokens:
        source.check_whole()  # all tokens of a grid are there
    trunk = _without_head(model, tokens=tokens)
    schema = _schema(source.features, columns, _features(dtype, trunk.config.dim, tokens=tokens))
    half = is_half(precision, next(trunk.parameters()).device)
    if part_size is None:
        part_size = _PART_SIZE_OF_TOKENS if tokens else _PART_SIZE
    record = {
        "packpipe": __version__,
        "columns": schema.names,
        "dtype": dtype,
        "part_size": part_size,
        "batch_size": batch_size,
        "precision": "bfloat16" if half else "float32",
        "packing": packing.to_dict(),
        "dataset": source.fingerprint,
        "weights": _digest(trunk),
    }
    ask = partial(
        predict_packs,
        trunk,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
    )
    part = partial(_part, source, schema, ask, prefix_tokens=packing.prefix_tokens)
    tolerance = Tolerance(len(dataset), max_bad_fraction, 2**62)
    output.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(parts, wait=False):
        _begin(parts, record)
        if output.exists():  # killed when all else was done
            rejects = _rejects(rejects_path(output))
        else:
            rejects, names = [], []
            step = source.step(part_size)
            unit = " rows" if holds_rows(dataset.column_names) else " images"
            # disable=None: where stderr is no terminal, nothing is shown.
            with tqdm(total=len(dataset), desc="Embedding", unit=unit, disable=None) as bar:
                for first in range(0, len(dataset), step):
                    names.append(parts / f"{first:012d}.parquet")
                    span = (first, min(first + step, len(dataset)))
                    _complete(names[-1], source.states(span), partial(part, span))
                    rejects += _rejects(rejects_path(names[-1]))
                    tolerance.check(rejects)
                    bar.update(span[1] - span[0])
            _write(rejects_path(output), _one_table(map(rejects_path, names)), REJECTED)
            _write(output, map(pq.read_table, names), schema)
    shutil.rmtree(parts)
    return rejects


def rejects_path(output: Path) -> Path:
    """Return where the rejects of a file of vectors are."""
    return output.with_name(f"{output.stem}.rejects.parquet")


def _rejects(path: Path) -> list[Reject]:
    return [Reject(**row) for row in pq.read_table(path, columns=REJECTS_SCHEMA.names).to_pylist()]


def _one_table(rejects: Iterable[Path]) -> list[pa.Table]:
    return [pa.concat_tables([REJECTED.empty_table(), *map(pq.read_table, rejects)])]


def _complete(
    name: Path,
    found: dict[str, list[int] | None],
    part: Callable[[], tuple[pa.Table, pa.Table]],
) -> None:
    """Write a part, unless it is there; then check that it is of the files as they are.

    Args:
        name: the part's file.
        found: the states of the files that it is of.
        part: computes its rows and rejects.

    Raises:
        FileExistsError: a file has changed since.
    """
    known = name.with_suffix(".files.json")
    if name.exists() and known.exists():
        before = json.loads(known.read_bytes())
        for path, state in found.items():
            if before.get(path) != state:
                what, expected = f"{path}, changed", f"as it was when {name.parent.name} was begun"
                remedy = "remove that folder to begin again"
                raise FileExistsError(checks.sentence("image", what, expected, remedy))
        return
    # Their states are those of before they were read: what changes meanwhile is noticed.
    write_json(known, found)
    rows, rejects = part()
    _write(rejects_path(name), [rejects], REJECTED)
    _write(name, [rows], rows.schema)


def _part(
    source: EmbeddedRows | EmbeddedImages,
    schema: pa.Schema,
    ask: Callable[[Any], Answers],
    span: tuple[int, int],
    *,
    prefix_tokens: int,
) -> tuple[pa.Table, pa.Table]:
    """Return the rows of some neighbouring examples or packed rows, and their rejects."""
    answers, own, bad = source.answered(span, ask)
    own["num_tokens"] = pa.array(answers.seq_lens.numpy() - prefix_tokens)  # patches
    if "tokens" in schema.names:
        own |= _maps(answers.outputs, schema.field("tokens").type)
    else:
        own["embedding"] = _vectors(answers.outputs, schema.field("embedding").type)
    return pa.table([own[name] for name in schema.names], schema.names).cast(schema), bad


def _vectors(values: Tensor, kind: pa.DataType) -> pa.Array:
    """Return [n, channels] as a list of one size each."""
    numbers = values.float().flatten().numpy().astype(kind.value_type.to_pandas_dtype())
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers), kind.list_size)


def _maps(maps: list[Tensor], kind: pa.DataType) -> dict[str, pa.Array]:
    """Return maps [rows, columns, channels] as the columns ``tokens`` and ``coords``."""
    nothing = torch.empty(0, kind.value_type.list_size)
    flat = torch.cat([nothing, *(one.flatten(0, 1) for one in maps)])
    grids = [one.shape[:2] for one in maps]
    places = [np.indices(grid, np.int16).reshape(2, -1).T for grid in grids]
    coords = np.concatenate([np.empty((0, 2), np.int16), *places])
    offsets = pa.array(np.cumsum([0, *map(len, places)]), pa.int32())
    pairs = pa.FixedSizeListArray.from_arrays(pa.array(coords.flatten()), 2)
    return {
        "tokens": pa.ListArray.from_arrays(offsets, _vectors(flat, kind.value_type)),
        "coords": pa.ListArray.from_arrays(offsets, pairs),
    }


def _features(dtype: str, dim: int, *, tokens: bool) -> dict[str, Any]:
    """Return what is written of each image beside its number and the columns kept."""
    vector, number = List(Value(dtype), length=dim), Value("int32")
    if not tokens:
        return {"embedding": vector, "num_tokens": number}
    pairs = List(List(Value("int16"), length=2))
    return {"tokens": List(vector), "coords": pairs, "num_tokens": number}


def _schema(features: dict[str, Any], columns: list[str] | None, own: dict[str, Any]) -> pa.Schema:
    chosen = columns
    if chosen is None:
        chosen = [name for name, feature in features.items() if not holds_images(feature)]
    for name in chosen:
        if name not in features or name in ("example_index", *own):
            expected = f"one of {list(features)}, and none of example_index, {', '.join(own)}"
            raise ValueError(checks.sentence("columns", name, expected, "rename or leave it out"))
    kept = {name: features[name] for name in chosen}
    return Features({"example_index": Value("int64"), **kept, **own}).arrow_schema


def _without_head(model: NaViT, *, tokens: bool) -> NaViT:
    """Return the model, which now gives an image's pooled features, or those of its tokens."""
    if tokens:
        model.pool = None
        model.config = replace(model.config, pooling="none")
    elif model.config.pooling == "none":
        expected, remedy = "one vector an image", "pass tokens (--tokens) for those of its tokens"
        raise ValueError(checks.sentence("pooling", model.config.pooling, expected, remedy))
    model.head, model.config = None, replace(model.config, num_classes=None)
    return model


def _digest(model: NaViT) -> str:
    """Return a digest of the weights."""
    digest = xxhash.xxh3_128()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _begin(parts: Path, record: dict[str, Any]) -> None:
    """Write what the parts are of; if there are some, check that they are of the same."""
    path = parts / _RECORD
    if not path.exists():
        # Left of a folder whose removal was cut short: nobody knows what these are of.
        for part in parts.glob("[0-9]*.parquet"):
            part.unlink()
        write_json(path, record)
        return
    # Versions before there was a choice of it did not write the precision.
    found = {"precision": record["precision"], **json.loads(path.read_bytes())}
    for name, value in record.items():
        if found.get(name) != value:
            expected = f"{found.get(name)!r} as in {parts.name}"
            remedy = "use it again, or remove the folder"
            raise FileExistsError(checks.sentence(name, value, expected, remedy))


def _write(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables as one Parquet file, a row group each, whole or not at all."""
    with pq.ParquetWriter(partial_of(path), schema) as writer:
        for table in tables:
            writer.write_table(table)
    commit(path)
