"""Arrow files of images: their record batches, and that what is no such file is named."""

from __future__ import annotations

import shutil
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import UnsupportedOperation

import pictures
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_from_disk
from fsspec.implementations.local import LocalFileSystem
from windowed import write_tar

from packpipe.sources import arrow_blocks, tar_blocks
from packpipe.sources.image_files import ImageFiles
from packpipe.storage.messages import ReadAhead, head_at


def source() -> Dataset:
    images = [pictures.encoded_image(4, 4 + 4 * (i % 3), i) for i in range(11)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": one, "path": None} for one in images], "label": [0, 1] * 5 + [1]}
    return Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def rows():
    found = source()
    return found.with_format("arrow")[:].cast(found.features.arrow_schema)


def write(path, rows, form=pa.ipc.new_stream, **options) -> None:
    with form(path, rows.schema, **options) as writer:
        writer.write_table(rows, max_chunksize=4)


@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_blocks_are_the_record_batches_of_streams_and_of_files(form, compression, rows, tmp_path):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    write(tmp_path / "a.arrow", rows, form, options=options)
    write(tmp_path / "b.arrow", rows.slice(0, 3), form, options=options)
    files = ImageFiles(tmp_path)
    assert files.block_rows.tolist() == [4, 4, 3, 3]
    assert files.features == source().features
    found = files.reader.dataset([files.block(number) for number in (3, 1, 0, 2)])
    numbers = pa.array([0, 1, 2, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10])
    assert found.data.table.to_pylist() == rows.take(numbers).to_pylist()
    assert found.features == source().features


def test_what_save_to_disk_wrote_is_taken_where_it_lies(tmp_path):
    source().save_to_disk(str(tmp_path / "saved"), num_shards=2)
    files = ImageFiles(tmp_path / "saved")
    assert len(files) == 11
    found = files.reader.dataset([files.block(number) for number in range(len(files.block_rows))])
    known = load_from_disk(str(tmp_path / "saved")).with_format("arrow")[:]
    assert found.data.table.to_pylist() == known.to_pylist()


def test_what_datasets_computed_beside_the_data_is_not_packed_again(tmp_path):
    folder = tmp_path / "saved"
    source().save_to_disk(str(folder))
    for name in ("cache-0123456789abcdef.arrow", "mine.arrow"):
        shutil.copy(folder / "data-00000-of-00001.arrow", folder / name)
    assert len(ImageFiles(folder)) == len(ImageFiles(tmp_path)) == 11
    assert len(ImageFiles(f"{folder}/*.arrow")) == 22
    (folder / "state.json").unlink()
    assert len(ImageFiles(folder)) == 22
    (folder / "state.json").write_text("{}")
    expected = r"state\.json is \"'_data_files'\", expected what save_to_disk writes; save the data"
    with pytest.raises(ValueError, match=expected):
        ImageFiles(folder)


def test_a_folder_of_splits_or_of_packed_rows_is_refused(rows, tmp_path):
    DatasetDict({"train": source(), "test": source()}).save_to_disk(str(tmp_path / "splits"))
    expected = r"splits', expected no folder of splits; pass one split's folder, such as .*test"
    for folder in (tmp_path, tmp_path / "splits"):
        with pytest.raises(ValueError, match=expected):
            ImageFiles(folder)
    assert len(ImageFiles(tmp_path / "splits" / "train")) == 11
    write(tmp_path / "splits" / "train" / "a.arrow", rows)
    (tmp_path / "splits" / "train" / "manifest.json").write_text('{"packpipe": "0.1.0"}')
    expected = r"paths is '.*train, packed rows', expected images or sequences; pass packed rows to"
    with pytest.raises(ValueError, match=expected):
        ImageFiles(tmp_path / "splits" / "train")


@pytest.mark.parametrize("name", ["a.arrow", "a.tar"])
def test_a_server_that_gives_no_parts_of_files_is_named(name, rows, tmp_path):
    if name == "a.tar":
        write_tar(tmp_path / name, {"a.png": b""})
    else:  # a smaller one would be read whole
        write(tmp_path / name, pa.concat_tables([rows] * 40))
    expected = r"answer to a request for a part of http://.* is '[\d,]+ bytes', expected [\d,]+ b"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(UnsupportedOperation, match=expected):
            ImageFiles(f"http://127.0.0.1:{server.server_port}/{name}?X-Signature=1")
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_a_file_whose_size_is_not_told_is_named():
    class Silent(LocalFileSystem):
        def size(self, path):  # noqa: ARG002
            return None

    for one in (arrow_blocks, tar_blocks):
        with pytest.raises(
            UnsupportedOperation, match=r"size of a is 'not told', expected a number"
        ):
            one.known(Silent(), "a")


def test_rows_are_not_read_to_open_a_file(rows, tmp_path, monkeypatch):
    large = rows.slice(0, 1)
    image = [{"bytes": bytes(2**20), "path": None}]
    large = large.set_column(0, rows.schema.field(0), pa.array(image, rows.schema.field(0).type))
    with pa.ipc.new_stream(tmp_path / "a.arrow", rows.schema) as writer:
        for _ in range(8):
            writer.write_table(large)
    read, real = [], ReadAhead.__init__

    def counting(self, ask, size):
        real(self, lambda start, stop: read.append(stop - start) or ask(start, stop), size)

    monkeypatch.setattr(ReadAhead, "__init__", counting)
    assert ImageFiles(tmp_path).block_rows.tolist() == [1] * 8
    assert len(read) <= 10
    assert sum(read) < 2**18 < (tmp_path / "a.arrow").stat().st_size


def test_what_is_no_whole_arrow_file_is_refused_by_name(rows, tmp_path):
    path = tmp_path / "a.arrow"
    write(path, rows)
    content = path.read_bytes()
    for wrong in (b"", b"text" * 99, content[:-8], content[:-60], content[:300], content[:9]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"paths is '.*a\.arrow', expected whole Arrow files"):
            ImageFiles(path)
    labels = pa.table({"image": rows["image"], "label": rows["label"].dictionary_encode()})
    write(path, labels)
    with pytest.raises(
        ValueError, match=r"a\.arrow is 'a dictionary', expected plain values; write the col"
    ):
        ImageFiles(path)
    write(path, rows.append_column("label", rows["label"]))
    expected = r"columns 'label' of .*a\.arrow is 2, expected one of a name; rename the others"
    with pytest.raises(ValueError, match=expected):
        ImageFiles(path)


@pytest.mark.parametrize("field", ["num_rows", "body"])
def test_a_batch_of_less_than_no_rows_or_bytes_is_damage_not_an_endless_loop(field, rows, tmp_path):
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(path, rows.schema) as writer:
        writer.write_table(rows)
    content = path.read_bytes()
    block = ImageFiles(path).block(0)
    head = head_at(ReadAhead(lambda start, stop: content[start:stop], len(content)), block.start)
    known = struct.pack("<q", getattr(head, field))
    at = content.index(known, block.start)
    assert at < block.start + len(head.content)
    wrong = struct.pack("<q", -len(head.content))
    path.write_bytes(content[:at] + wrong + content[at + 8 :])
    expected = r"expected whole Arrow files, .*; a message of -?\d+ bytes and -?\d+ rows at byte"
    with pytest.raises(ValueError, match=expected):
        ImageFiles(path)


def test_columns_that_are_asked_for_do_not_keep_the_others_in_memory(rows, tmp_path):
    write(tmp_path / "a.arrow", rows)
    files, read = ImageFiles(tmp_path), []

    class Local(LocalFileSystem):
        def cat_file(self, *args, **options):
            read.append(super().cat_file(*args, **options))
            return read[-1]

    for names in (["label"], ["image", "label"]):
        schema = rows.select(names).schema
        (found,) = arrow_blocks.tables(Local(), [files.block(1)], schema)
        assert found.to_pylist() == rows.select(names).slice(4, 4).to_pylist()
        batch = pa.py_buffer(read[-1])
        (label,) = found["label"].chunks
        lies_in_it = 0 <= label.buffers()[1].address - batch.address < len(batch)
        assert lies_in_it == ("image" in names)  # all of it is not copied


def test_a_file_that_was_damaged_or_changed_since_is_named(rows, tmp_path):
    path = tmp_path / "a.arrow"
    write(path, rows)
    content, files = path.read_bytes(), ImageFiles(path)
    block = files.block(1)
    path.write_bytes(content[: block.start] + b"\xff" * 40 + content[block.start + 40 :])
    expected = r"record batch 1 of .*a\.arrow is .*, expected what it was when the file was o"
    with pytest.raises(ValueError, match=expected):
        files.reader.dataset([block])
    assert len(files.reader.dataset([files.block(0)])) == 4
    path.write_bytes(content[: block.start + 100])
    with pytest.raises(ValueError, match=expected):
        files.reader.dataset([block])
    path.write_bytes(b"\0" * 8 + content[8:])
    with pytest.raises(ValueError, match=r"schema of .*a\.arrow is 'no message at byte 0', expec"):
        files.reader.dataset([block])
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"rows of record batch 1 of .* is 4, expected 5; the file"
    ):
        files.reader.dataset([block._replace(num_rows=5)])
