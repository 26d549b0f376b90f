"""`content_of`: the bytes of an encoded image, wherever it lies."""

import os

import numpy as np
import pytest

from packpipe.images.bad_images import BadImage
from packpipe.images.content import MOST_BYTES, content_of
from packpipe.images.image_data import Confined


def test_bytes_are_those_given_or_those_of_the_file(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"\xff\xd8 and more")
    given = memoryview(b"\xff\xd8")
    assert content_of(given) is given
    assert content_of(str(path)) == b"\xff\xd8 and more"
    root = os.path.realpath(tmp_path)
    assert content_of(Confined(f"{root}/image", root)) == b"\xff\xd8 and more"


def test_what_has_no_bytes_says_why(tmp_path):
    with pytest.raises(BadImage, match="no file") as caught:
        content_of(str(tmp_path / "missing"))
    assert caught.value.reason == "missing"
    with pytest.raises(BadImage, match="is no regular file"):
        content_of(os.devnull)
    with pytest.raises(TypeError, match="an image of type ndarray is not encoded"):
        content_of(np.zeros((2, 2), np.uint8))


def test_a_file_that_is_nothing_but_a_length_is_not_read(tmp_path):
    path = tmp_path / "giant"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(BadImage, match="2,147,483,648 bytes, expected at most 2,147,483,647") as e:
        content_of(str(path))
    assert e.value.reason == "too many bytes"
