"""Tar files of images and labels, as WebDataset writes them: a block is a run of their members.

A sample is made of members that follow each other and have one name, which is the path up to the
first dot behind the last slash: ``0001.jpg`` and ``0001.cls``. It has one image, told by its
ending, and a label if any sample of the file has a ``.cls``: a whole number. A text that is no
whole number is null, a bad label. Other members are not read, and a name that has others alone is
no sample.

Only the headers, which stand before the members, say where these lie. So a file is read through
once, in pieces of 4 MiB, to open it; nothing of that is kept, and members that are larger than a
piece are skipped. Then a block is one request for its bytes.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Features, Image, Value

from packpipe import checks
from packpipe.sources.blocks import (
    Block,
    Known,
    bytes_of,
    check_answer,
    check_rows,
    damaged,
    digest_of,
    is_of_system,
    size_of,
)
from packpipe.sources.kinds import decoded_suffixes

BLOCK = "block"
# A block has as many samples, and as many bytes unless a sample alone has more.
_BLOCK_ROWS, _BLOCK_BYTES = 256, 2**25
# Bytes that are asked for to see whether parts of a file can be had.
_PROBE = 512
# Bytes that are read at once to find the headers.
_PIECE = 2**22
# Arrow holds the images of a block with offsets of 32 bits.
_MOST_BYTES = 2**31
_CLASS = ".cls"
_NUMBER = re.compile(rb"\s*[+-]?0*\d{1,19}\s*")
# The name of a sample, and the ending of a member, from the first dot on.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)(\.[^/]*)", re.DOTALL)
# What WebDataset writes about a file itself.
_ABOUT = re.compile(r"__[^/]*__($|/)")


class _Member(NamedTuple):
    """A file in a tar, whose headers and content are the bytes start..stop - 1."""

    start: int
    stop: int
    info: tarfile.TarInfo


class _Sample(NamedTuple):
    """Members of one name, from start to stop - 1: the image, and the label if there is one."""

    start: int
    stop: int
    image: tarfile.TarInfo
    label: tarfile.TarInfo | None

    @property
    def headers(self) -> bytes:
        """What the headers of the image and of the label say."""
        parts = [part for part in (self.image, self.label) if part is not None]
        said = "".join(f"{part.name}\0{part.size}\0{part.mtime}\0" for part in parts)
        return said.encode(errors="surrogateescape")


def known(filesystem: Any, file: str) -> Known:
    """Return what the headers of a file say.

    Raises:
        ValueError: it is no whole tar, or a compressed one; a sample has several images or labels,
            a label and no image, or is above 2 GiB; there is no image; the first label is no
            number; or the file's server gives no parts of files.
    """
    size, first_label = size_of(filesystem, file), None
    check_answer(filesystem.cat_file(file, start=0, end=_PROBE), _PROBE, file)
    rows: list[int] = []
    spans: list[tuple[int, int, bytes]] = []
    digest = hashlib.sha256()
    with filesystem.open(file, "rb", block_size=_PIECE) as source:
        try:
            with tarfile.open(fileobj=source, mode="r:") as tar:
                for sample in _samples(tar, file):
                    is_full = bool(rows) and sample.stop - spans[-1][0] > _BLOCK_BYTES
                    if not rows or rows[-1] == _BLOCK_ROWS or is_full:
                        rows.append(0)
                        spans.append((sample.start, 0, b""))
                    rows[-1] += 1
                    start, _, before = spans[-1]
                    spans[-1] = (start, sample.stop, digest_of(before + sample.headers))
                    digest.update(sample.headers)
                    if first_label is None and sample.label is not None:
                        first_label = sample.label
                        _check_label(tar, first_label, file)
                check_end(tar)
        except tarfile.TarError as error:
            expected = "whole tar files, not compressed"
            raise ValueError(checks.sentence("paths", file, expected, str(error))) from error
    if not rows:
        expected, remedy = "one at least", "name them NAME.jpg, and labels NAME.cls"
        raise ValueError(checks.sentence(f"images in {file}", "none", expected, remedy))
    columns = {"image": Image()} | ({"label": Value("int64")} if first_label is not None else {})
    return Known(size, rows, digest.hexdigest(), Features(columns), spans)


def tables(filesystem: Any, blocks: list[Block], schema: pa.Schema) -> list[pa.Table]:
    """Return the rows of blocks of one file, of which no other bytes are read.

    Raises:
        ValueError: a block is damaged, or has other rows by now.
    """
    return [_table(filesystem, block, schema) for block in blocks]


def _table(filesystem: Any, block: Block, schema: pa.Schema) -> pa.Table:
    what = f"block {block.group} of {block.file}"
    try:
        content = bytes_of(filesystem, block.file, block.start, block.stop)
    except ValueError as error:
        if is_of_system(error):
            raise
        raise damaged(what, error) from error
    images: list[dict[str, Any]] = []
    labels, digest = [], b""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for sample in _samples(tar, block.file):
                images.append(_image_in(content, sample.image))
                label = sample.label
                labels.append(None if label is None else _label_in(_bytes(content, label)))
                digest = digest_of(digest + sample.headers)
            if tar.offset != len(content):
                raise tarfile.ReadError(f"no member at byte {block.start + tar.offset}")
    except tarfile.TarError as error:
        raise damaged(what, error) from error
    check_rows(what, len(images), block, digest)
    columns = {"image": images, "label": labels}
    arrays = [pa.array(columns[name], schema.field(name).type) for name in schema.names]
    return pa.table(arrays, schema=schema)


def _samples(tar: tarfile.TarFile, file: str) -> Iterator[_Sample]:
    """Yield the samples of a tar."""
    name, suffixes = "", decoded_suffixes()
    parts: dict[str, _Member] = {}  # by their endings, in lower case
    for member in _members(tar, file):
        found = _NAME.fullmatch(member.info.name)
        if found is None or _ABOUT.match(member.info.name):
            continue
        if found[1] != name:
            yield from _sample(name, parts, suffixes, file)
            name, parts = found[1], {}
        ending = found[2].lower()
        if ending in parts:
            what = f"{member.info.name!r} in {file}"
            expected, remedy = "one file of each name", "write the tar anew"
            raise ValueError(checks.sentence(what, "twice", expected, remedy))
        parts[ending] = member
    yield from _sample(name, parts, suffixes, file)


def _members(tar: tarfile.TarFile, file: str) -> Iterator[_Member]:
    """Yield the files in a tar, of which none is kept.

    Raises:
        ValueError: a member is a link, whose content is elsewhere, or a sparse file.
        ReadError: a member is of less than no bytes: `tarfile` would read it again and again.
    """
    start = 0
    while (info := tar.next()) is not None:
        # It would keep all members, and what global headers say, which a block may not have.
        tar.members, tar.pax_headers = [], {}  # type: ignore[attr-defined]
        if info.size < 0 or tar.offset <= info.offset:
            raise tarfile.ReadError(f"a member of {info.size} bytes at byte {info.offset}")
        if not info.isdir():
            what, expected = f"{info.name!r} in {file}", "a plain file"
            if info.issparse():
                remedy = "write the tar anew, without --sparse"
                raise ValueError(checks.sentence(what, "a sparse file", expected, remedy))
            if not info.isreg():
                remedy = "write the tar anew, with tar --hard-dereference -h"
                raise ValueError(checks.sentence(what, "a link or a device", expected, remedy))
            yield _Member(start, tar.offset, info)
        start = tar.offset


def _sample(
    name: str, parts: dict[str, _Member], suffixes: frozenset[str], file: str
) -> Iterator[_Sample]:
    """Yield the sample that members of one name are; none if there is no image and no label."""
    images = [part.info for ending, part in parts.items() if ending in suffixes]
    if len(images) > 1:
        expected, remedy = "one of a name", "leave others out, or call them NAME.mask.png"
        found = " and ".join(one.name for one in images[:2])
        raise ValueError(checks.sentence(f"images in {file}", found, expected, remedy))
    label = parts.get(_CLASS)
    if not images:
        if label is not None:
            expected = f"one that stands beside {label.info.name!r}"
            remedy = "if its members lie apart, write them one after the other: tar --sort=name"
            what = f"image of {name!r} in {file}"
            raise ValueError(checks.sentence(what, "missing", expected, remedy))
        return
    members = list(parts.values())  # as they follow each other
    start, stop = members[0].start, members[-1].stop
    if stop - start >= _MOST_BYTES:
        what, expected = f"size of {name!r} in {file}", "less than 2 GiB"
        remedy = "leave it out, or some of its members"
        raise ValueError(checks.sentence(what, f"{stop - start:,} bytes", expected, remedy))
    yield _Sample(start, stop, images[0], None if label is None else label.info)


def _check_label(tar: tarfile.TarFile, member: tarfile.TarInfo, file: str) -> None:
    stream = tar.extractfile(member)
    text = b"" if stream is None else stream.read()
    if _label_in(text) is None:
        expected, remedy = "a whole number", "write the number of the class"
        what = f"{member.name!r} in {file}"
        said = text[:40].decode(errors="replace")
        raise ValueError(checks.sentence(what, said, expected, remedy))


def _label_in(text: bytes) -> int | None:
    """Return the number that a text is; None if it is none that fits."""
    found = int(text) if _NUMBER.fullmatch(text) else 2**63
    return found if abs(found) < 2**63 else None


def _image_in(content: bytes, member: tarfile.TarInfo) -> dict[str, Any]:
    # Names are bytes in a tar, and texts in Arrow.
    name = posixpath.basename(member.name).encode(errors="replace").decode()
    return {"bytes": _bytes(content, member), "path": name}


def _bytes(content: bytes, member: tarfile.TarInfo) -> bytes:
    return content[member.offset_data : member.offset_data + member.size]


def check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError if a tar goes on behind its last member, or is cut there.

    `tarfile` takes a header that it cannot read for the end. Every tar ends with two blocks of
    zeros, and no less than zeros may follow. Compressed streams are read to their checksum.
    """
    stream: Any = tar.fileobj
    stream.seek(tar.offset)
    end = stream.read(2 * tarfile.BLOCKSIZE)
    is_end = end == bytes(2 * tarfile.BLOCKSIZE)
    while is_end and (more := stream.read(1 << 20)):
        is_end = more.count(0) == len(more)
    if not is_end:
        raise tarfile.ReadError(f"neither a file nor the end of a tar follows byte {tar.offset}")
