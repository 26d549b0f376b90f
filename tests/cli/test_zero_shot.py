"""Names of classes beside labels: which label each of them names."""

import re

import datasets
import pytest
from PIL import Image

from packpipe.cli.labels import classes_of, labelled, names_in, with_names
from packpipe.cli.zero_shot import _of_labels

NUMBERS = [11, 2, 0, 10, 3, 1, 4, 9, 5, 8, 6, 7]
NAMES = [f"name {chr(97 + k)}" for k in range(12)]


def named(labels, names):
    """The name that each label gets."""
    pictures = [Image.new("RGB", (4, 4))] * len(labels)
    images = datasets.Dataset.from_dict({"image": pictures, "label": labels})
    found = labelled(with_names(images, names))
    given = _of_labels(names, classes_of(found))
    return [None if label is None else given[label] for label in found["label"]]


def test_labels_that_are_numbers_have_the_names_of_these_lines():
    wanted = [NAMES[k] for k in NUMBERS]
    assert named(NUMBERS, NAMES) == named(list(map(str, NUMBERS)), NAMES) == wanted
    assert named([11, 2, None], NAMES) == [NAMES[11], NAMES[2], None]
    assert named(["11", "2", "7"], None) == ["11", "2", "7"]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1], None, "classes is None, expected the names of labels that are numbers; pass --cl"),
        ([0, 2], ["a", "b"], "a label is 2, expected an integer in 0..1; pass --classes FILE with"),
        ([0, -1], ["a", "b"], "a label is -1, expected an integer in 0..1; pass"),
        ([0.5, 1.0], ["a", "b"], "labels is 'double', expected whole numbers, or texts; pass ano"),
        (
            ["cat", "dog", "sea"],
            ["dog", "cat", "ocean"],
            "a class is 'dog', expected 'cat' in its place, or a name that no label has; write a l",
        ),
    ],
)
def test_names_that_may_be_of_other_labels_are_refused(labels, names, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        named(labels, names)


def test_names_of_some_labels_stand_in_their_places():
    assert named(["cat", "dog", "sea"], ["cat", "dog", "ocean"]) == ["cat", "dog", "ocean"]
    assert named(["cat", "dog", "sea"], ["sea", "cat", "dog"]) == ["cat", "dog", "sea"]


def test_a_file_of_names_is_read_whichever_editor_wrote_it(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\r\n\r\n dög \n".encode())
    assert names_in(path) == ["cat", "dög"]
    path.write_text("road\ncat\nroad \n")
    message = f"a name in --classes {path} is 'road', expected one line of that name; a line is"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        names_in(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"\xe9t\xe9\n", "'utf-8' codec can't decode"), (None, "No such file or directory")],
)
def test_a_file_of_names_that_cannot_be_read_is_named(content, why, tmp_path):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    message = f"--classes is {str(path)!r}, expected a file of text in UTF-8 ({why}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        names_in(path)
