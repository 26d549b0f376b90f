"""Which rows hold the same image file, or the same bytes."""

import io

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from packpipe.sources import image_source
from packpipe.sources.image_source import ImageSource


def encoded(level, suffix="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(file, suffix)
    return file.getvalue()


CONTENTS = [encoded(0), encoded(1), encoded(0, "BMP"), encoded(1, "BMP"), None]


def source_of(dataset):
    return ImageSource(dataset.select_columns(["image"]).with_format("arrow"))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.booleans())
def test_the_same_bytes_are_told_by_the_first_row_that_has_them(numbers, are_images):
    assert len(CONTENTS[2]) == len(CONTENTS[3])  # of equal length, yet others
    contents = [CONTENTS[number] for number in numbers]
    feature = datasets.Value("binary")
    if are_images:
        feature = datasets.Image()
        contents = [None if one is None else {"bytes": one, "path": "x.png"} for one in contents]
    dataset = Dataset.from_dict({"image": contents}, Features({"image": feature}))
    wanted = [row if number == 4 else numbers.index(number) for row, number in enumerate(numbers)]
    assert source_of(dataset).same_files().tolist() == wanted
    backwards = dataset.select(range(len(numbers))[::-1])
    assert source_of(backwards).same_files().tolist() == [
        row if number == 4 else numbers[::-1].index(number)
        for row, number in enumerate(numbers[::-1])
    ]


def test_no_more_is_read_of_images_than_tells_them_apart(monkeypatch):
    rng = np.random.default_rng(0)
    alike = rng.integers(0, 256, 50_000, np.uint8)
    others = [rng.integers(0, 256, 50_000, np.uint8).tobytes() for _ in range(5)]
    late = alike.copy()
    late[-1] ^= 1  # of the same middle
    contents = [alike.tobytes(), *others, late.tobytes(), alike.tobytes(), others[0][:-1]]
    digest, read = image_source._digest, []

    def noted(content):
        read.append(content.size)
        return digest(content)

    monkeypatch.setattr(image_source, "_digest", noted)
    dataset = Dataset.from_dict({"image": contents}, Features({"image": datasets.Value("binary")}))
    assert source_of(dataset).same_files().tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 8]
    assert sorted(read) == [4096] * 8 + [50_000] * 3


@pytest.mark.parametrize("feature", [datasets.Image(), datasets.Value("string")])
def test_the_same_file_is_told_by_its_path(feature, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(encoded(0))
    names = ["a.png", "./a.png", "b.png", "c.png", "../" + tmp_path.name + "/c.png", "gone.png"]
    paths = [f"{tmp_path}/{name}" for name in [*names, "gone.png"]]
    remote = ["s3://bucket/a.png", "s3://bucket/b.png", "s3://bucket/a.png"]
    dataset = Dataset.from_dict({"image": [*paths, *remote, None]}).cast(
        Features({"image": feature})
    )
    found = source_of(dataset).same_files()
    assert found.tolist() == [0, 0, 2, 3, 3, 5, 5, 7, 8, 7, 10]


def test_pixels_are_the_same_as_no_others():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    features = Features({"image": datasets.Array3D((4, 4, 3), "uint8")})
    dataset = Dataset.from_dict({"image": list(images)}, features)
    assert source_of(dataset).same_files().tolist() == [0, 1, 2]
