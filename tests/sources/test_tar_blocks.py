"""Tar files of images: which samples are in them, and that what is no such file is named."""

from __future__ import annotations

import tarfile

import fsspec
import pictures
import pytest
from datasets import Features, Image, Value
from windowed import write_tar

from packpipe.sources import tar_blocks
from packpipe.sources.image_files import ImageFiles

IMAGES = [pictures.encoded_image(4, 4 + 4 * (i % 3), i) for i in range(11)]


def members(names) -> dict[str, bytes]:
    """Samples of an image, a class and more."""
    found = {}
    for number, (name, image) in enumerate(zip(names, IMAGES, strict=True)):
        found[f"{name}.PNG"] = image
        found[f"{name}.json"] = b"{}"
        found[f"{name}.cls"] = b"%d\n" % number
        found[f"{name}.mask.png"] = image
    return found


def dataset_in(path):
    files = ImageFiles(path)
    blocks = [files.block(number) for number in range(len(files.block_rows))]
    return files.reader.dataset(blocks)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "train.v1/", "long/" * 30])
def test_members_of_one_name_are_a_sample_and_blocks_are_runs_of_them(
    folder, form, tmp_path, monkeypatch
):
    monkeypatch.setattr(tar_blocks, "_BLOCK_ROWS", 4)
    names = [f"{folder}{number:03}" for number in range(len(IMAGES))]
    more = {"__about__/a.png": b"", f"{folder}._000.png": b"", "LICENSE": b"text"}
    write_tar(tmp_path / "a.tar", more | members(names), format=form)
    files = ImageFiles(tmp_path)
    assert files.block_rows.tolist() == [4, 4, 3]
    assert files.features == Features({"image": Image(), "label": Value("int64")})
    rows = dataset_in(tmp_path).data.table.to_pylist()
    assert [row["label"] for row in rows] == list(range(11))
    assert [row["image"]["bytes"] for row in rows] == IMAGES
    assert rows[3]["image"]["path"] == "003.PNG"
    labels = files.reader.dataset([files.block(2), files.block(0)], ["label"])
    assert labels["label"][:] == [8, 9, 10, 0, 1, 2, 3]
    # The blocks are all that is read of the file.
    spans = [(one.start, one.stop) for one in map(files.block, range(3))]
    assert [stop for _, stop in spans[:2]] == [start for start, _ in spans[1:]]


def test_a_block_ends_at_so_many_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_blocks, "_BLOCK_BYTES", 8 * 512 * 2)
    write_tar(tmp_path / "a.tar", members(map(str, range(11))))
    files = ImageFiles(tmp_path)
    assert files.block_rows.tolist() == [2, 2, 2, 2, 2, 1]
    assert dataset_in(tmp_path)["label"][:] == list(range(11))


def test_a_sample_without_a_whole_number_has_null_for_a_label(tmp_path):
    there = members("abcdefghijk")
    del there["d.cls"]
    there["e.cls"], there["f.cls"], there["g.cls"] = b"ant", b"9" * 20, b"\xff"
    there["h.cls"], there["i.cls"] = b"1_0", b" +08\n"
    write_tar(tmp_path / "a.tar", there)
    rows = dataset_in(tmp_path).data.table.to_pylist()
    assert [row["image"]["bytes"] for row in rows] == IMAGES
    assert [row["label"] for row in rows] == [0, 1, 2, *[None] * 5, 8, 9, 10]
    images = {name: content for name, content in there.items() if name.endswith("PNG")}
    write_tar(tmp_path / "a.tar", images)
    assert dataset_in(tmp_path).column_names == ["image"]


def test_files_behind_a_scheme_have_the_same_blocks_and_one_that_is_another_is_another(tmp_path):
    write_tar(tmp_path / "a.tar", members("abcdefghijk"))
    content = (tmp_path / "a.tar").read_bytes()
    fsspec.filesystem("memory").pipe_file("/shards/a.tar", content)
    there = ImageFiles("memory://shards/*.tar")
    assert there.fingerprint == ImageFiles(tmp_path).fingerprint
    assert there.reader.dataset([there.block(0)]).data.table == dataset_in(tmp_path).data.table
    write_tar(tmp_path / "a.tar", members("abcdefghijz"))
    assert len((tmp_path / "a.tar").read_bytes()) == len(content)
    assert there.fingerprint != ImageFiles(tmp_path).fingerprint


@pytest.mark.parametrize("at", [-1024, -1025, 512, 513, 1])
def test_a_tar_that_is_cut_is_named(at, tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, members("abcdefghijk"))
    content = path.read_bytes()
    end = -(-len(content.rstrip(b"\0")) // 512) * 512
    path.write_bytes(content[: end + 1024 + at] if at < 0 else content[:at])
    with pytest.raises(ValueError, match=r"paths is '.*a\.tar', expected whole tar files, not com"):
        ImageFiles(path)


def test_what_is_no_tar_of_images_is_refused_by_name(tmp_path):
    path, there = tmp_path / "a.tar", members("abcdefghijk")
    for wrong, message in (
        ({"a.cls": b"ant"}, r"'a\.cls' in .*a\.tar is 'ant', expected a whole number; write the"),
        (
            {"k.Cls": b"1"},
            r"'k\.Cls' in .*a\.tar is 'twice', expected one file of each name; write",
        ),
        ({"k.jpg": b""}, r"images in .*a\.tar is 'k\.PNG and k\.jpg', expected one of a name"),
    ):
        write_tar(path, there | wrong)
        with pytest.raises(ValueError, match=message):
            ImageFiles(path)
    write_tar(path, {"a.txt": b"", "a.eps": b""})
    with pytest.raises(ValueError, match=r"images in .*a\.tar is 'none', expected one at least"):
        ImageFiles(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match="expected whole tar files, not compressed"):
        ImageFiles(path)
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=r"'a\.png' in .*a\.tar is 'twice', expected one file of"):
        ImageFiles(path)
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.LNKTYPE, "a.png"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
        tar.addfile(link)
    with pytest.raises(
        ValueError, match=r"'b\.png' in .* is 'a link or a device', expected a plai"
    ):
        ImageFiles(path)


def test_a_sample_that_arrow_cannot_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_blocks, "_MOST_BYTES", 2048)
    large = b"0" * 4096  # between samples, of which no block has it
    write_tar(tmp_path / "a.tar", {"a.png": b"", "b.bin": large, "c.png": b"", "c.txt": b""})
    assert len(dataset_in(tmp_path)) == 2
    write_tar(tmp_path / "a.tar", {"a.png": b"", "c.png": b"", "c.bin": b"0" * 600})
    expected = r"size of 'c' in .*a\.tar is '2,048 bytes', expected less than 2 GiB; leave it out"
    with pytest.raises(ValueError, match=expected):
        ImageFiles(tmp_path)


def test_members_that_lie_apart_are_no_rows_of_their_own(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {"0.png": b"", "1.png": b"", "0.cls": b"0", "1.cls": b"1"})
    expected = (
        r"image of '0' in .*a\.tar is 'missing', expected one that stands beside '0\.cls'; if"
    )
    with pytest.raises(ValueError, match=expected):
        ImageFiles(path)
    write_tar(path, {"0.json": b"", "1.png": IMAGES[0], "1.CLS": b"3", "2.mpg": b"", "3.jpg": b""})
    rows = dataset_in(path).data.table.to_pylist()
    assert [(row["image"]["path"], row["label"]) for row in rows] == [("1.png", 3), ("3.jpg", None)]


@pytest.mark.parametrize("size", [-512, -(2**40)])
def test_a_member_of_less_than_no_bytes_is_damage_not_an_endless_loop(size, tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": b"1" * 600, "b.png": b"2"})
    content = bytearray((tmp_path / "a.tar").read_bytes())
    header = content[: (place := content.index(b"b.png")) + 512][place:]
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    content[place : place + 512] = header
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"paths is '.*a\.tar', expected whole tar files, not com"):
        ImageFiles(tmp_path)


def test_global_headers_between_blocks_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_blocks, "_BLOCK_ROWS", 1)
    said = tarfile.TarInfo.create_pax_global_header({"comment": "a", "mtime": "7"})
    for number in range(2):
        write_tar(tmp_path / "part", {f"{number}.png": IMAGES[number]})
        with (tmp_path / "a.tar").open("ab") as file:
            file.write(said + (tmp_path / "part").read_bytes()[: 512 * 2])
            assert len(IMAGES[number]) <= 512
    with (tmp_path / "a.tar").open("ab") as file:
        file.write(bytes(1024))
    rows = dataset_in(tmp_path / "a.tar").data.table.to_pylist()
    assert [row["image"]["bytes"] for row in rows] == IMAGES[:2]


def test_names_and_sparse_files_are_said_so_that_a_terminal_obeys_nothing(tmp_path):
    link = tarfile.TarInfo("\x1b[31mb.png")
    for kind, what, remedy in (
        (tarfile.SYMTYPE, "a link or a device", "with tar --hard-dereference -h"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file", "without --sparse"),
    ):
        link.type = kind
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            tar.addfile(link)
        with pytest.raises(ValueError, match=rf"{what}', expected a plain file; .*{remedy}") as no:
            ImageFiles(tmp_path)
        assert "\\x1b[31mb.png" in str(no.value)
        assert "\x1b" not in str(no.value)


def test_a_tar_that_was_damaged_or_changed_since_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_blocks, "_BLOCK_ROWS", 4)
    path = tmp_path / "a.tar"
    write_tar(path, members("abcdefghijk"))
    content, files = path.read_bytes(), ImageFiles(path)
    start = files.block(1).start
    for place, message in (
        (
            start,
            r"block 1 of .*a\.tar is .*, expected what it was when the file was o",
        ),
        (start + 1024, r"block 1 of .*a\.tar is 'no member at byte \d+', expected what it was"),
    ):
        path.write_bytes(content[:place] + b"\xff" * 8 + content[place + 8 :])
        with pytest.raises(ValueError, match=message):
            files.reader.dataset([files.block(0), files.block(1)])
        assert len(files.reader.dataset([files.block(0)])) == 4
    write_tar(path, members("abcdefghijk") | {"g.cls": b"7\n\n"})
    assert len(path.read_bytes()) == len(content)
    expected = (
        r"digest of block 1 of .*a\.tar is '\w{16}', expected \w{16}, as when the file was op"
    )
    with pytest.raises(ValueError, match=expected):
        files.reader.dataset([files.block(1)])
    assert len(files.reader.dataset([files.block(0)])) == 4
    path.write_bytes(content[: start + 700])
    with pytest.raises(
        ValueError, match=r"block 1 of .* expected what it was when the file was opened; repair"
    ):
        files.reader.dataset([files.block(1)])
    path.write_bytes(content)
    block = files.block(1)._replace(num_rows=5)
    with pytest.raises(ValueError, match=r"rows of block 1 of .*a\.tar is 4, expected 5; the file"):
        files.reader.dataset([block])


def test_members_that_were_seen_are_not_kept(tmp_path, monkeypatch):
    held, real = [], tarfile.TarFile.next

    def counting(self):
        held.append(len(self.members))
        return real(self)

    monkeypatch.setattr(tarfile.TarFile, "next", counting)
    write_tar(tmp_path / "a.tar", members("abcdefghijk"))
    assert len(dataset_in(tmp_path)) == 11
    assert len(held) > 80
    assert max(held) <= 1
