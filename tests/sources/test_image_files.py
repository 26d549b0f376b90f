"""Images in Parquet files: which blocks there are, and that each is what it was."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Barrier

import fsspec
import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from packpipe.sources import parquet_blocks
from packpipe.sources.image_files import ImageFiles
from packpipe.storage import reading

NUM_ROWS, PER_FILE, PER_BLOCK = 23, 10, 4


def source() -> Dataset:
    images = [pictures.encoded_image(4, 4 + 4 * (i % 3), i) for i in range(NUM_ROWS)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    labels = [i % 2 for i in range(NUM_ROWS)]
    images = [{"bytes": image, "path": None} for image in images]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def write(folder, dataset: Dataset) -> None:
    for first in range(0, len(dataset), PER_FILE):
        rows = dataset.data.table.slice(first, PER_FILE)
        schema = dataset.features.arrow_schema
        with pq.ParquetWriter(f"{folder}/part-{first:03}.parquet", schema) as writer:
            for start in range(0, rows.num_rows, PER_BLOCK):
                writer.write_table(rows.slice(start, PER_BLOCK).cast(schema))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("files")
    write(found, source())
    return found


def test_the_blocks_are_the_row_groups_of_the_files_in_order(folder):
    files = ImageFiles(f"{folder}/*.parquet")
    assert files.block_rows.tolist() == [4, 4, 2, 4, 4, 2, 3]
    blocks = [files.block(number) for number in range(7)]
    assert [block.first for block in blocks] == [0, 4, 8, 10, 14, 18, 20]
    assert [block.group for block in blocks] == [0, 1, 2, 0, 1, 2, 0]
    assert len({block.file for block in blocks}) == 3
    assert len(files) == NUM_ROWS
    assert repr(files) == "ImageFiles(3 files, 7 blocks, 23 rows)"
    (first, *_) = files.files
    assert repr(ImageFiles(first)) == "ImageFiles(1 file, 3 blocks, 10 rows)"


def test_a_block_has_the_rows_of_its_numbers_and_the_features_of_the_source(folder):
    files, whole = ImageFiles(f"{folder}/*.parquet"), source()
    assert files.features == whole.features
    for number in (6, 1, 3):
        block = files.block(number)
        found = files.reader.dataset([block])
        rows = range(block.first, block.first + block.num_rows)
        assert found.features == whole.features
        assert found.data.table.to_pylist() == whole.data.table.take(pa.array(rows)).to_pylist()


def test_rows_of_blocks_are_those_that_the_blocks_say(folder):
    files = ImageFiles(f"{folder}/*.parquet")
    for blocks in ([6, 1, 3], [0], [], range(7)):
        each = [files.block(number) for number in blocks]
        wanted = [row for one in each for row in range(one.first, one.first + one.num_rows)]
        assert files.rows_of(np.array(blocks, np.int64)).tolist() == wanted


def test_only_the_columns_that_are_named_are_read(folder):
    files = ImageFiles(f"{folder}/*.parquet")
    found = files.reader.dataset([files.block(2), files.block(3)], ["label"])
    assert found.column_names == ["label"]
    assert found["label"][:] == [0, 1, 0, 1, 0, 1]


def test_blocks_are_read_side_by_side_and_returned_in_order(folder, monkeypatch):
    files, real, both = ImageFiles(folder), parquet_blocks.tables, Barrier(3)

    def waiting(*args):
        both.wait(timeout=60)  # for the two others
        return real(*args)

    monkeypatch.setattr(parquet_blocks, "tables", waiting)
    # Four of a file, one more of it, and one of another.
    blocks = [files.block(number) for number in (2, 1, 0, 0, 1, 4)]
    found = files.reader.dataset(blocks, ["label"])["label"][:]
    rows = [range(block.first, block.first + block.num_rows) for block in blocks]
    assert found == [row % 2 for some in rows for row in some]
    assert len(found) == 22


def test_bytes_and_path_are_an_image_without_a_word_of_datasets(tmp_path):
    rows = [{"image": {"bytes": b"\0", "path": None}, "label": 3}]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "one.parquet")
    found = ImageFiles(tmp_path / "one.parquet").features
    assert found == Features({"image": Image(), "label": Value("int64")})


def test_the_fingerprint_is_of_names_sizes_and_rows_wherever_the_files_lie(folder, tmp_path):
    known = ImageFiles(f"{folder}/*.parquet").fingerprint
    write(tmp_path, source())
    assert ImageFiles(f"{tmp_path}/*.parquet").fingerprint == known
    names = [f"{tmp_path}/part-{first:03}.parquet" for first in (0, 10, 20)]
    assert ImageFiles(names).fingerprint == known
    assert ImageFiles(names[::-1]).fingerprint != known
    assert ImageFiles(names[:2]).fingerprint != known
    (tmp_path / "part-000.parquet").rename(tmp_path / "part-001.parquet")
    assert ImageFiles(f"{tmp_path}/*.parquet").fingerprint != known


def test_the_fingerprint_tells_folders_apart_that_hold_the_same_names(tmp_path):
    for folder in ("here/a", "here/b", "there/a", "there/b"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder, source())
    prints = [
        ImageFiles([tmp_path / place / f"{name}/part-000.parquet" for name in names]).fingerprint
        for place, names in (("here", "ab"), ("there", "ab"), ("here", "ba"))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_tells_files_apart_that_were_rewritten_at_the_same_size(tmp_path):
    found = set()
    path = tmp_path / "one.parquet"
    for label in (3, 4):
        rows = source().data.table.slice(0, 8).drop_columns(["label"])
        rows = rows.append_column("label", pa.array([label] * 8, pa.int64()))
        pq.write_table(rows, path, compression="none", use_dictionary=False)
        found.add((path.stat().st_size, ImageFiles(path).fingerprint))
    assert len({size for size, _ in found}) == 1
    assert len(found) == 2


def test_files_that_name_their_classes_otherwise_are_refused(tmp_path):
    for name, names in (("x", ["cat", "dog"]), ("y", ["dog", "cat"])):
        source().cast_column("label", ClassLabel(names=names)).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    expected = (
        r"column 'label' of .*y\.parquet is ClassLabel\(names=\['dog', 'cat'\]\), "
        r"expected ClassLabel\(names=\['cat', 'dog'\]\), as in .*x\.parquet; pack files of other"
    )
    with pytest.raises(ValueError, match=expected):
        ImageFiles(f"{tmp_path}/*.parquet")


def test_a_row_group_that_arrow_cannot_hold_is_named(folder, monkeypatch):
    monkeypatch.setattr(parquet_blocks, "_MOST_BYTES", 300)
    expected = (
        r"largest column of row group 0 of .*part-000\.parquet is '1,030 bytes', expected less"
    )
    with pytest.raises(ValueError, match=expected):
        ImageFiles(f"{folder}/*.parquet")


def test_a_file_that_is_named_twice_is_refused(folder):
    expected = r"paths is '.*part-010\.parquet', expected each file once"
    with pytest.raises(ValueError, match=expected):
        ImageFiles([f"{folder}/*.parquet", f"{folder}/../{folder.name}/part-010.parquet"])


def test_files_behind_a_scheme_have_the_same_blocks(folder):
    memory = fsspec.filesystem("memory")
    for path in sorted(folder.iterdir()):
        memory.pipe_file(f"/blocks/{path.name}", path.read_bytes())
    files = ImageFiles("memory://blocks/*.parquet")
    assert files.files[0] == "memory:///blocks/part-000.parquet"
    assert files.fingerprint == ImageFiles(f"{folder}/*.parquet").fingerprint
    assert files.reader.dataset([files.block(6)])["label"][:] == [0, 1, 0]


def test_what_are_no_such_files_is_refused_by_name(folder, tmp_path):
    (tmp_path / "text.parquet").write_text("no table at all, though it is called so")
    pq.write_table(pa.table({"n": np.arange(3)}), tmp_path / "other.parquet")
    first = f"{folder}/part-000.parquet"
    with pytest.raises(ValueError, match=r"paths is '.*none-\*', expected at least one file there"):
        ImageFiles(f"{folder}/none-*")
    with pytest.raises(ValueError, match=r"paths is \[\], expected one file at least"):
        ImageFiles([])
    with pytest.raises(TypeError, match=r"paths is \[3\], expected paths of files"):
        ImageFiles([3])
    with pytest.raises(ValueError, match=r"text\.parquet', expected Parquet files"):
        ImageFiles([first, tmp_path / "text.parquet"])
    with pytest.raises(
        ValueError, match=r"column 'image' of .*other\.parquet is None, expected Im"
    ):
        ImageFiles([first, tmp_path / "other.parquet"])


def test_endings_are_of_any_case_and_compressed_tars_are_refused(folder, tmp_path):
    for number, path in enumerate(sorted(folder.iterdir())):
        (tmp_path / f"{number}.PARQUET").write_bytes(path.read_bytes())
    assert len(ImageFiles(tmp_path)) == NUM_ROWS
    (tmp_path / "a.tar.gz").write_bytes(b"")
    for paths in (tmp_path / "a.tar.gz", f"{tmp_path}/*.gz"):
        expected = (
            r"paths is '.*a\.tar\.gz', expected a tar that is not compressed; unpack it to one"
        )
        with pytest.raises(ValueError, match=expected):
            ImageFiles(paths)


def test_a_folder_and_every_kind_of_pattern_are_the_files_in_them(folder, tmp_path):
    (tmp_path / "deep.parquet").mkdir()
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        os.symlink(path, tmp_path / "deep.parquet" / path.name)
        memory.pipe_file(f"/tree/deep/{path.name}", path.read_bytes())
    (tmp_path / "deep.parquet" / "NOTES").write_text("no table")
    known = ImageFiles(f"{folder}/*.parquet").fingerprint
    for paths in (tmp_path, f"{tmp_path}/**/*.parquet", "memory://tree", f"file:{folder}"):
        assert ImageFiles(paths).fingerprint == known
    assert len(ImageFiles(f"{folder}/part-0?0.parquet").files) == 3
    assert len(ImageFiles(f"{folder}/part-0[12]0.parquet").files) == 2
    with pytest.raises(ValueError, match=r"paths is 's3:/bucket', expected two slashes"):
        ImageFiles(Path("s3://bucket"))


def test_a_file_that_was_damaged_or_lost_a_column_since_is_named(tmp_path):
    write(tmp_path, source())
    files = ImageFiles(f"{tmp_path}/*.parquet")
    with (tmp_path / "part-010.parquet").open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 400)
    path = tmp_path / "part-020.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["label"]), path)
    for block, group in ((3, r"0 of .*part-010"), (6, r"0 of .*part-020")):
        expected = rf"row group {group}\.parquet is .*, expected what it was when the file was o"
        with pytest.raises(ValueError, match=expected):
            files.reader.dataset([files.block(block)])


def test_a_file_that_was_changed_since_is_named(tmp_path):
    write(tmp_path, source())
    files = ImageFiles(f"{tmp_path}/*.parquet")
    block = files.block(0)._replace(num_rows=5)
    expected = r"row group 0 of .*part-000\.parquet is 4, expected 5; the file was changed"
    with pytest.raises(ValueError, match=expected):
        files.reader.dataset([block])


@pytest.mark.parametrize("what", ["_row_group", "_parquet"])
def test_a_store_that_fails_is_asked_four_times_and_then_named(folder, monkeypatch, what):
    monkeypatch.setattr(reading, "WAITS", (0.0, 0.0, 0.0))
    fails, real = [3], getattr(parquet_blocks, what)

    def failing(*args):
        if "part-010" in repr(args) and fails[0]:
            fails[0] -= 1
            raise ConnectionResetError(104, "reset by peer")
        return real(*args)

    monkeypatch.setattr(parquet_blocks, what, failing)
    files = ImageFiles(folder)  # ends are read by _parquet alone
    blocks = [files.block(number) for number in (0, 3, 4, 6)]
    wanted = [label for b in blocks for label in range(b.first, b.first + b.num_rows)]
    assert files.reader.dataset(blocks)["label"][:] == [label % 2 for label in wanted]
    assert fails == [0]
    fails[0] = 4
    expected = (
        r"row group 0, 1 of .*part-010\.parquet is 'ConnectionResetError: .*reset by peer', "
        r"expected an answer to one of 4 requests; call again"
    )
    with pytest.raises(ConnectionError, match=expected):
        files.reader.dataset(blocks)
    assert fails == [0]


def test_lists_beside_files_may_be_nested_too_deep_to_be_read(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    (tmp_path / "state.json").write_text("[" * 100_000)
    (tmp_path / "data.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match=r"state.json is '.*recursion.*, expected what save_to_"):
        ImageFiles(tmp_path)
