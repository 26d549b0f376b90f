"""Which columns of `ImageFiles` hold what, and what windows of files cannot have."""

from __future__ import annotations

from datasets import LargeList, List

from packpipe import checks
from packpipe.sources.columns import AskedColumns
from packpipe.sources.image_columns import ImageColumns
from packpipe.sources.image_files import ImageFiles


def file_columns(source: ImageFiles, asked: AskedColumns, *, stored: bool = True) -> ImageColumns:
    """Return the columns of files of images: as named, or found.

    Args:
        source: the files.
        asked: the arguments that name columns.
        stored: whether rows are stored, as `AskedColumns.of_images` takes it.

    Raises:
        TypeError, ValueError: an argument or a column is wrong; or labels are lists, whose length
            is the commonest of all rows, which no window knows.
    """
    try:
        columns = asked.of_images(source.reader.dataset(()), stored=stored)
    except (TypeError, ValueError) as error:
        where = "when the files are written, or in a Dataset that they are loaded as"
        raise type(error)(f"{error} (columns of ImageFiles are changed {where})") from error
    label = columns.label
    if label is not None and isinstance(source.features[label], List | LargeList):
        expected = "one value an image"
        remedy = "pass label_column=None, or pack a Dataset, whose labels may be lists"
        name = f"features[{label!r}]"
        raise ValueError(checks.sentence(name, source.features[label], expected, remedy))
    return columns
