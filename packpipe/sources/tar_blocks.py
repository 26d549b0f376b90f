"""Tar files of images and labels, as WebDataset writes them: a block is a run of their members.

A sample is made of members that follow each other and have one name up to the first dot behind the
last slash: ``0001.jpg`` and ``0001.cls``. It has one image, by its ending, and a label if there are
``.cls`` in the file: a whole number; what is none is null, a bad label. Other members are not read.

Where members lie, their headers say, which stand before each. So a file is read through once, in
pieces of 4 MiB, to open it: what lies between is kept of none, and members that are larger are
skipped. Then a block is one request for its bytes.
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
from packpipe.sources.blocks import Block, Known, check_rows, damaged
from packpipe.sources.kinds import image_suffixes

BLOCK = "block"
# A block ends when it has as many samples, or bytes.
_BLOCK_ROWS, _BLOCK_BYTES = 256, 2**25
# Bytes that are read at once to find the headers.
_PIECE = 2**22
# Arrow holds the images of a block with offsets of 32 bits.
_MOST_BYTES = 2**31
_CLASS = ".cls"
# The name of a sample, and the ending of a member, from the first dot on.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)(\.[^/]*)", re.DOTALL)
# What WebDataset writes about a file itself.
_ABOUT = re.compile(r"__[^/]*__($|/)")


class _Sample(NamedTuple):
    """Members of one name: where the first begins, the image, and the label if there is one."""

    start: int
    image: tarfile.TarInfo | None
    label: tarfile.TarInfo | None


def known(filesystem: Any, file: str) -> Known:
    """Return what the headers of a file say.

    Raises:
        ValueError: it is no whole tar, or a compressed one; a sample has several images or labels,
            or is above 2 GiB; there is no image; or the first label is no number.
    """
    rows: list[int] = []
    starts: list[int] = []
    digest, has_images, first_label = hashlib.sha256(), False, None
    with filesystem.open(file, "rb", block_size=_PIECE) as source:
        try:
            with tarfile.open(fileobj=source, mode="r:") as tar:
                for sample in _samples(tar, file, digest):
                    if not rows or rows[-1] == _BLOCK_ROWS or _is_full(starts[-1], sample):
                        rows.append(0)
                        starts.append(sample.start)
                    rows[-1] += 1
                    has_images |= sample.image is not None
                    if first_label is None and sample.label is not None:
                        first_label = sample.label
                        _check_label(tar, first_label, file)
                end = tar.offset
                check_end(tar)
                size = source.seek(0, io.SEEK_END)
        except tarfile.TarError as error:
            expected = "whole tar files, not compressed"
            raise ValueError(checks.sentence("paths", file, expected, str(error))) from error
    if not has_images:
        expected, remedy = "one at least", "name them NAME.jpg, and labels NAME.cls"
        raise ValueError(checks.sentence(f"images in {file}", "none", expected, remedy))
    spans = list(zip(starts, [*starts[1:], end], strict=True))
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
    content = filesystem.cat_file(block.file, start=block.start, end=block.stop)
    images: list[dict[str, Any] | None] = []
    labels = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for sample in _samples(tar, block.file, hashlib.sha256()):
                images.append(_image_in(content, sample.image))
                label = sample.label
                labels.append(None if label is None else _label_in(_bytes(content, label)))
            if tar.offset != block.stop - block.start:
                raise tarfile.ReadError(f"no member at byte {block.start + tar.offset}")
    except tarfile.TarError as error:
        raise damaged(what, error) from error
    check_rows(what, len(images), block)
    columns = {"image": images, "label": labels}
    arrays = [pa.array(columns[name], schema.field(name).type) for name in schema.names]
    return pa.table(arrays, schema=schema)


def _samples(tar: tarfile.TarFile, file: str, digest: Any) -> Iterator[_Sample]:
    """Yield the samples of a tar; of each member's header, the digest is updated."""
    name, start, suffixes = "", 0, image_suffixes()
    parts: dict[str, tarfile.TarInfo] = {}
    for member in _members(tar, file):
        digest.update(
            f"{member.name}\0{member.size}\0{member.mtime}\0".encode(errors="surrogateescape")
        )
        found = _NAME.fullmatch(member.name)
        if found is None or _ABOUT.match(member.name):
            continue
        if found[1] != name:
            if parts:
                yield _sample(start, parts, suffixes, file)
            name, start, parts = found[1], member.offset, {}
        if found[2] in parts:
            expected, remedy = "one file of each name", "write the tar anew"
            raise ValueError(checks.sentence(f"{member.name} in {file}", "twice", expected, remedy))
        parts[found[2]] = member
    if parts:
        yield _sample(start, parts, suffixes, file)


def _members(tar: tarfile.TarFile, file: str) -> Iterator[tarfile.TarInfo]:
    """Yield the files in a tar, of which none is kept.

    Raises:
        ValueError: a member is a link, whose content is elsewhere, or above 2 GiB.
    """
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep them all
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            expected, remedy = "a plain file", "write the tar anew, with tar --hard-dereference -h"
            what = f"{member.name} in {file}"
            raise ValueError(checks.sentence(what, "a link or a device", expected, remedy))
        if member.size >= _MOST_BYTES:
            what, expected = f"{member.name} in {file}", "less than 2 GiB"
            remedy = "leave it out"
            raise ValueError(checks.sentence(what, f"{member.size:,} bytes", expected, remedy))
        yield member


def _sample(
    start: int, parts: dict[str, tarfile.TarInfo], suffixes: frozenset[str], file: str
) -> _Sample:
    images = [part for ending, part in parts.items() if ending.lower() in suffixes]
    if len(images) > 1:
        expected, remedy = "one of a name", "leave others out, or call them NAME.mask.png"
        found = " and ".join(one.name for one in images[:2])
        raise ValueError(checks.sentence(f"images in {file}", found, expected, remedy))
    return _Sample(start, images[0] if images else None, parts.get(_CLASS))


def _is_full(start: int, sample: _Sample) -> bool:
    return sample.start - start >= _BLOCK_BYTES


def _check_label(tar: tarfile.TarFile, member: tarfile.TarInfo, file: str) -> None:
    stream = tar.extractfile(member)
    text = b"" if stream is None else stream.read()
    if _label_in(text) is None:
        expected, remedy = "a whole number", "write the number of the class"
        what = f"{member.name} in {file}"
        said = text[:40].decode(errors="replace")
        raise ValueError(checks.sentence(what, said, expected, remedy))


def _label_in(text: bytes) -> int | None:
    """Return the number that a text is; None if it is none that fits."""
    try:
        found = int(text)
    except ValueError:
        return None
    return found if abs(found) < 2**63 else None


def _image_in(content: bytes, member: tarfile.TarInfo | None) -> dict[str, Any] | None:
    if member is None:
        return None
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
