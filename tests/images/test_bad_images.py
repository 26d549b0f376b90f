"""Whose fault an error is: the machine's, or the file's, whose image is then a reject."""

from __future__ import annotations

import errno
import os
from io import FileIO

import pictures
import pytest
from test_headers import opened_with

from packpipe.images.bad_images import BadImage
from packpipe.images.decode import decode
from packpipe.images.headers import HEAD_BYTES
from packpipe.images.rules import PixelRules

INSIDE = (8, 12)
RULES = PixelRules((255, 255, 255), 10**6, None, "bicubic", "bicubic", "srgb")

# Errors that the next file would meet as well.
MACHINE = {
    "ran out": "ENOMEM EMFILE ENFILE ENOSPC EDQUOT ENOBUFS ENOSR ENOLCK EUSERS",
    "out of reach": "EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET ENONET ENOLINK "
    "ECONNABORTED ECONNREFUSED ECONNRESET ENOTCONN ESHUTDOWN ETIMEDOUT ETIME ECOMM EPIPE EPROTO "
    "ESTALE",
    "ours": "EBADF EFAULT ENOSYS ECANCELED",
}
OF_THE_MACHINE = {
    getattr(errno, name)
    for names in MACHINE.values()
    for name in names.split()
    if hasattr(errno, name)
}


WHEN = {"opened": 0, "read": 1, "searched": 2, "decoded": 3}


@pytest.mark.parametrize("when", WHEN)
def test_every_error_of_the_system_is_the_machines_or_makes_a_reject_of_its_path(
    tmp_path, monkeypatch, when
):
    path, image_hw = tmp_path / "image.png", (200, 200)
    path.write_bytes(pictures.encoded_image(*image_hw))
    assert HEAD_BYTES < path.stat().st_size < 2 * HEAD_BYTES, (
        "read in pieces: its header, its end, its pixels"
    )
    number, calls = 0, 0

    class Failing(FileIO):
        def __init__(self, *arguments):
            self.count()
            super().__init__(*arguments)

        def readinto(self, *arguments):
            self.count()
            return super().readinto(*arguments)

        def count(self):
            nonlocal calls
            calls += 1
            if calls > WHEN[when]:
                raise OSError(number, os.strerror(number))

    opened_with(monkeypatch, Failing)
    # And one that nobody knows; but Python itself reads again after EINTR, for ever here.
    numbers = {*errno.errorcode, 9999} - {errno.EINTR}
    assert len(numbers) > 100
    for number in sorted(numbers):
        calls = 0
        with pytest.raises((OSError, BadImage)) as found:
            decode(str(path), image_hw=image_hw, target_hw=INSIDE, rules=RULES)
        if number in OF_THE_MACHINE:
            assert found.value.errno == number
        elif number == errno.ENOENT and when != "decoded":
            assert found.value.reason == "missing"
        else:
            assert isinstance(found.value, BadImage), errno.errorcode[number]
            assert found.value.reason == ("undecodable" if when == "decoded" else "unreadable")
            assert str(found.value) == f"[Errno {number}] {os.strerror(number)}: {str(path)!r}"
