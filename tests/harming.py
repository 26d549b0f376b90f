"""Folders of rows, and all kinds of harm to them, checksums and counts made to agree afterwards."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

from packpipe.building.build import state_of
from packpipe.building.shards import data_files, digest_of, record_of
from packpipe.packing.quality import fill
from packpipe.rows import files
from packpipe.rows.rejects_table import REJECTS_SCHEMA

MANIFEST, REJECTS, STATE, INFO, JOB = (
    "manifest.json",
    "rejects.arrow",
    "state.json",
    "dataset_info.json",
    "job.json",
)
# A segment is its values by column, those of its tokens as a list; a row is a list of segments.
Row = list[dict[str, Any]]


class Harm(NamedTuple):
    """What is harmed, in one word or two, how, and a function that does it to a folder."""

    what: str
    how: str
    do: Callable[[Path], None]

    def within(self, part: Path) -> Harm:
        """The same harm to a folder in a folder."""
        return self._replace(do=lambda folder: self.do(folder / part))


def read(path: Path) -> pa.Table:
    return pa.ipc.open_stream(path.read_bytes()).read_all().combine_chunks()


def write(path: Path, table: pa.Table) -> None:
    files.write_table(path, table.schema, [table])


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def jsons(folder: Path) -> list[str]:
    return [name for name in (MANIFEST, STATE, INFO, JOB) if (folder / name).exists()]


def save(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def data(folder: Path) -> dict[str, pa.Table]:
    return {name: read(folder / name) for name in data_files(load(folder / MANIFEST))}


def of_tokens(table: pa.Table, name: str) -> bool:
    """Whether a column has one value, or some, a token; the other lists have one a segment."""
    if "grid_hw" in table.column_names:
        return name in ("patches", "targets", "segment_ids", "coords")
    return name in ("input_ids", "labels", "weight", "segment_ids", "position_ids")


def agree(folder: Path) -> None:
    """Make records of files, counts, fill and the sidecar follow from what the files hold."""
    manifest = load(folder / MANIFEST)
    rejects = read(folder / REJECTS).to_pylist()
    tables = data(folder)
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {
            "rows": read(path).num_rows,
            "bytes": path.stat().st_size,
            "xxh3_128": files.checksum_of(path),
        }
    rows = [row for table in tables.values() for row in table.to_pylist()]
    pieces = [piece for row in rows for piece in row.get("fragment") or [0] * len(row["seq_lens"])]
    tokens = sum(sum(row["seq_lens"]) for row in rows)
    packed = pieces.count(0) // manifest["config"].get("views", 1)
    manifest["counts"] |= {
        "read": packed + len(rejects),
        "packed": packed,
        "rejected": len(rejects),
        "rejected_by_reason": dict(sorted(Counter(one["reason"] for one in rejects).items())),
        "packs": len(rows),
        "tokens": tokens,
        **({"pieces": len(pieces)} if "pieces" in manifest["counts"] else {}),
    }
    manifest["fill"] = fill(tokens, len(rows), manifest["config"]["seq_len"])
    save(folder / MANIFEST, manifest)
    sign(folder)


def sign(folder: Path) -> None:
    """Make the sidecar follow from the manifest."""
    manifest = load(folder / MANIFEST)
    if isinstance(manifest.get("files"), dict):
        save(folder / STATE, state_of(data_files(manifest), digest_of(record_of(manifest))))


# What else a value could be, of its own kind and of another one.


def others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value, int(value)]
    if isinstance(value, int):
        return [value + 1, value - 1, 0, float(value), value + 1000]
    if isinstance(value, float):
        return [value + 0.5, -value, int(value)]
    if isinstance(value, str):
        return [value + "x", "", value[:-1], None]
    if isinstance(value, bytes):
        return [value[:-1], value + b"\0", value.swapcase()]
    if isinstance(value, list):
        return [value[::-1], value[1:], value + value[:1], None]
    if isinstance(value, dict):
        return [dict(list(value.items())[1:]), {**value, "x": 1}, None]
    return ["x", 0]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    for key, inner in inside:
        yield from places(inner, (*path, key))


def json_harm(whole: Any, name: str, *, signed: bool = False) -> Iterator[Harm]:
    """Every place of a JSON file taken away, or another value.

    Args:
        whole: what the file holds.
        name: of the file.
        signed: whether the digest of a manifest in the sidecar is made to agree.
    """

    def harm(path: tuple[Any, ...], how: str, change: Callable[[Any, Any], None]) -> Harm:
        def do(folder: Path) -> None:
            found = load(folder / name)
            inner = found
            for key in path[:-1]:
                inner = inner[key]
            change(inner, path[-1])
            save(folder / name, found)
            if signed:
                sign(folder)

        where = f"{name} {'.'.join(map(str, path))}"
        return Harm(where, how, do)

    def put(value: Any) -> Callable[[Any, Any], None]:
        return lambda inner, key: inner.__setitem__(key, value)

    for path in places(whole):
        value = whole
        for key in path:
            value = value[key]
        for other in others(value):
            if json.dumps(other) != json.dumps(value):
                yield harm(path, f"is {json.dumps(other)[:60]}", put(other))
        yield harm(path, "is gone", lambda inner, key: inner.__delitem__(key))


def column_harm(folder: Path) -> Iterator[Harm]:
    """Every column of every file: a value changed, two exchanged, the column gone or twice."""
    for name, table in {**data(folder), REJECTS: read(folder / REJECTS)}.items():
        for column in table.column_names:
            values, kind = table.column(column).to_pylist(), table.schema.field(column).type
            at = [path for path in places(values) if not isinstance(_at(values, path), list)]
            # The first, one in the middle, and the last.
            for path in dict.fromkeys(at[i] for i in (0, len(at) // 2, -1) if at):
                for other in others(_at(values, path)):
                    changed = _with(values, {path: other})
                    try:
                        pa.array(changed, kind)
                    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                        continue  # a file cannot hold it
                    if changed != values or repr(other) != repr(_at(values, path)):
                        yield _column(name, column, changed, f"{path} is {other!r}")
            for one in at[:1] + at[len(at) // 2 : len(at) // 2 + 1]:
                for two in at:
                    if _at(values, one) != _at(values, two):
                        changed = _with(values, {one: _at(values, two), two: _at(values, one)})
                        yield _column(name, column, changed, f"{one} and {two} exchanged")
                        break
            yield _tables(name, column, "is gone", lambda t, c=column: t.drop_columns([c]))
            yield _tables(
                name, column, "is there twice", lambda t, c=column: t.append_column("x", t[c])
            )


def _at(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def _with(values: Any, changes: dict[tuple[Any, ...], Any]) -> Any:
    changed = deepcopy(values)
    for path, value in changes.items():
        _at(changed, path[:-1])[path[-1]] = value
    return changed


def _column(name: str, column: str, values: Any, how: str) -> Harm:
    def change(table: pa.Table) -> pa.Table:
        place, field = table.schema.get_field_index(column), table.schema.field(column)
        return table.set_column(place, field, pa.array(values, field.type))

    return _tables(name, column, how, change)


def _tables(name: str, column: str, how: str, change: Callable[[pa.Table], pa.Table]) -> Harm:
    def do(folder: Path) -> None:
        write(folder / name, change(read(folder / name)))
        try:
            agree(folder)
        except (KeyError, TypeError, ValueError):  # a column is not there, or null, to be counted
            records(folder)

    return Harm(f"column {column}", f"{name}: {how}", do)


def image_harm(folder: Path) -> Iterator[Harm]:
    """The encoded image of each segment changed, its checksum made to agree."""

    def harm(name: str, path: tuple[int, int], how: str, image: bytes) -> Harm:
        def change(table: pa.Table) -> pa.Table:
            new = {"encoded": image, "encoded_xxh3": xxhash.xxh3_64_intdigest(image)}
            for column, value in new.items():
                place, field = table.schema.get_field_index(column), table.schema.field(column)
                values = _with(table[column].to_pylist(), {path: value})
                table = table.set_column(place, field, pa.array(values, field.type))
            return table

        return _tables(name, "encoded", f"{path} {how}, and its checksum", change)

    for name, table in data(folder).items():
        images = table["encoded"].to_pylist() if "encoded" in table.column_names else []
        every = [(row, at) for row, some in enumerate(images) for at in range(len(some))]
        for path, other in zip(every, every[1:] + every[:1], strict=True):
            image = _at(images, path)
            flipped = bytearray(image)
            flipped[len(image) // 2] ^= 1
            yield harm(name, path, "is another image", _at(images, other))
            yield harm(name, path, "has another bit", bytes(flipped))
            yield harm(name, path, "is cut short", image[:-1])
            yield harm(name, path, "is longer", image + b"\0")


def records(folder: Path) -> None:
    """Make the records of files alone follow from what they are."""
    manifest = load(folder / MANIFEST)
    for name in manifest["files"]:
        path = folder / name
        size = path.stat().st_size
        manifest["files"][name] |= {"bytes": size, "xxh3_128": files.checksum_of(path)}
        manifest["files"][name]["rows"] = read(path).num_rows
    save(folder / MANIFEST, manifest)


# Rows as lists of segments, to be put together in another way.


def segments_of(table: pa.Table, seq_len: int) -> list[Row]:
    rows = []
    for row in table.to_pylist():
        segments, start = [], 0
        for number, size in enumerate(row["seq_lens"]):
            segment = {}
            for name, values in row.items():
                if of_tokens(table, name):
                    kind = table.schema.field(name).type
                    fixed = pa.types.is_fixed_size_list(kind)
                    width = kind.list_size // seq_len if fixed else 1
                    segment[name] = values[start * width : (start + size) * width]
                else:
                    segment[name] = values[number]
            segments.append(segment)
            start += size
        rows.append(segments)
    return rows


def table_of(rows: list[Row], table: pa.Table, padding: dict[str, int]) -> pa.Table:
    columns = {}
    for field in table.schema:
        lists = []
        for row in rows:
            if not of_tokens(table, field.name):
                lists.append([segment[field.name] for segment in row])
                continue
            if field.name == "segment_ids":
                flat = [n for n, one in enumerate(row, 1) for _ in one["segment_ids"]]
            else:
                flat = [value for segment in row for value in segment[field.name]]
            if pa.types.is_fixed_size_list(field.type):
                zero = not pa.types.is_boolean(field.type.value_type) and 0
                flat += [padding.get(field.name, zero)] * (field.type.list_size - len(flat))
            lists.append(flat)
        columns[field.name] = pa.array(lists, field.type)
    return pa.table(columns, schema=table.schema)


def row_harm(folder: Path, padding: dict[str, int]) -> Iterator[Harm]:
    """Rows and files in other places, cut, put together, lost, or there twice."""
    tables, seq_len = data(folder), load(folder / MANIFEST)["config"]["seq_len"]
    whole = [segments_of(table, seq_len) for table in tables.values()]

    def size(row: Row) -> int:
        return sum(segment["seq_lens"] for segment in row)

    def harm(how: str, change: Callable[[list[list[Row]]], Any]) -> Harm:
        def do(folder: Path) -> None:
            parts = deepcopy(whole)
            change(parts)
            for (name, table), rows in zip(tables.items(), parts, strict=True):
                write(folder / name, table_of(rows, table, padding))
            agree(folder)

        return Harm("rows", how, do)

    def exchange(parts: list[list[Row]], one: tuple[int, ...], two: tuple[int, ...]) -> None:
        first, second = _at(parts, one[:-1]), _at(parts, two[:-1])
        first[one[-1]], second[two[-1]] = second[two[-1]], first[one[-1]]

    rows = [(f, r) for f, part in enumerate(whole) for r in range(len(part))]
    places_of = [(*at, s) for at in rows for s in range(len(_at(whole, at)))]
    for two in rows[1:]:
        yield harm(f"rows {rows[0]} and {two} exchanged", lambda p, t=two: exchange(p, rows[0], t))
    if len(whole) > 1:
        yield harm("files exchanged", lambda parts: exchange(parts, (0,), (1,)))
        yield harm("a row moved to the next file", lambda p: p[1].insert(0, p[0].pop()))
    for f, r in rows:
        if len(whole[f][r]) > 1:
            yield harm(
                f"row {f, r} split",
                lambda p, f=f, r=r: p[f].insert(r + 1, [p[f][r].pop()]),
            )
            yield harm(
                f"segments of row {f, r} exchanged",
                lambda p, f=f, r=r: exchange(p, (f, r, 0), (f, r, len(p[f][r]) - 1)),
            )
        yield harm(f"row {f, r} lost", lambda p, f=f, r=r: p[f].pop(r))
        yield harm(f"row {f, r} twice", lambda p, f=f, r=r: p[f].append(p[f][r]))
        yield harm(f"no row before {f, r}", lambda p, f=f, r=r: p[f].insert(r, []))
    for one in places_of[:3]:
        for two in places_of:
            alike = _at(whole, one)["seq_lens"] == _at(whole, two)["seq_lens"]
            if one[:2] != two[:2] and alike:
                yield harm(
                    f"segments {one}, {two} exchanged", lambda p, o=one, t=two: exchange(p, o, t)
                )
                break
        for f, r in rows:
            if (f, r) != one[:2] and size(whole[f][r]) + _at(whole, one)["seq_lens"] <= seq_len:
                yield harm(
                    f"segment {one} moved to row {f, r}",
                    lambda p, o=one, f=f, r=r: p[f][r].append(_at(p, o[:2]).pop(o[2])),
                )
                break


def reject_harm(
    folder: Path, stages: list[tuple[str, str, str]], padding: dict[str, int]
) -> Iterator[Harm]:
    """Good examples among the rejects, and rejects lost, twice, or in another order."""
    tables, seq_len = data(folder), load(folder / MANIFEST)["config"]["seq_len"]
    name, table = next(iter(tables.items()))
    rows = segments_of(table, seq_len)

    def moved(row: int, at: int, why: tuple[str, str, str]) -> Callable[[Path], None]:
        def do(folder: Path) -> None:
            left = deepcopy(rows)
            segment = left[row].pop(at)
            write(folder / name, table_of(left, table, padding))
            example = segment["example_index"]
            rejects = [tuple(one.values()) for one in read(folder / REJECTS).to_pylist()]
            _put_rejects(folder, sorted([*rejects, (example, *why)]))
            manifest = load(folder / MANIFEST)
            if why[0] == "decode":
                lost = [*manifest["undecoded"], [example, *segment["image_hw"]]]
                manifest["undecoded"] = sorted(lost)
                save(folder / MANIFEST, manifest)
            agree(folder)

        return do

    for row, segments in enumerate(rows):
        for at in range(len(segments)):
            for why in stages:
                yield Harm(
                    "rejects", f"segment {row, at} moved there as {why}", moved(row, at, why)
                )

    def harm(how: str, change: Callable[[list[Any]], Any]) -> Harm:
        def do(folder: Path) -> None:
            rejects = [tuple(one.values()) for one in read(folder / REJECTS).to_pylist()]
            _put_rejects(folder, change(rejects))
            agree(folder)

        return Harm("rejects", how, do)

    yield harm("the first lost", lambda rejects: rejects[1:])
    yield harm("the last lost", lambda rejects: rejects[:-1])
    yield harm("the first twice", lambda rejects: rejects[:1] + rejects)
    yield harm("in another order", lambda rejects: rejects[::-1])


def _put_rejects(folder: Path, rejects: list[Any]) -> None:
    columns = [list(column) for column in zip(*rejects, strict=True)] or [[]] * 4
    write(folder / REJECTS, pa.table(columns, REJECTS_SCHEMA))


def contents(folder: Path) -> str:
    """What a folder says, apart from the bytes it says it with."""
    tables = {path.name: read(path).to_pydict() for path in sorted(folder.glob("*.arrow"))}
    said = {name: load(folder / name) for name in jsons(folder)}
    # As text, since in Python 1, 1.0 and True are equal.
    return json.dumps([tables, said], sort_keys=True, default=str)


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))
