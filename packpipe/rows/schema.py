"""The columns of packed rows, and their Arrow types: what a folder's tables hold.

Token columns are fixed-size lists, so row r lies at a constant stride; segment columns are
lists, so the schema says which is which. packpipe's own columns hold no nulls. `to_arrow` writes
rows as such tables, `from_arrow` reads them.

=================  ===============================  =========================================
patches            fixed_size_list<uint8>[L·D]      row, column, channel within a patch
segment_ids        fixed_size_list<int32>[L]        1, 2, ... in row order; 0 is padding
coords             fixed_size_list<int16>[2L]       (y, x) of the token in its patch grid;
                                                    (-1, k) of prefix token k
targets            fixed_size_list<uint8>[L·T]      classes of the T cells of each patch, by row and
                   or uint16                        column; the largest number (255, 65535) where
                                                    there is none; absent without a mask column
seq_lens           list<int32>                      tokens kept per segment
grid_hw            list<fixed_size_list<int16>[2]>  patches of the full grid, before dropping
image_hw           list<fixed_size_list<int32>[2]>  upright source size in pixels
box                list<fixed_size_list<int32>[4]>  (top, left, height, width) of the upright source
                                                    in pixels; absent if nothing is cropped
view               list<int32>                      which of the example's views; absent if there is
                                                    one of each
weight             list<float32>                    what the image counts in the loss; absent
                                                    without a weight column
labels             list<the label's type>           absent without a label column
example_index      list<int64>                      row in the source
=================  ===============================  =========================================

Rows of token sequences:

==============  ===================  ==============================================================
input_ids, ...  fixed<T>[L]          the source's token columns, each of its own type
segment_ids     fixed<int32>[L]      1, 2, ... in row order; 0 is padding
position_ids    fixed<int32>[L]      0, 1, ... within the segment; 0 in padding
seq_lens        list<int32>          tokens of each segment
fragment        list<int32>          0, 1, ... of a sequence that was split; else 0
example_index   list<int64>          row in the source
label, ...      list<T>              the source's other columns, one value a segment
==============  ===================  ==============================================================

With ``layout="ragged"`` the source's token columns are lists without padding, and there are no
segment_ids and position_ids. A piece of a sequence begins at token fragment · seq_len of it.
"""

from __future__ import annotations

import pyarrow as pa

from packpipe.images.masks import TargetRules
from packpipe.planning.image_config import PackConfig
from packpipe.planning.token_config import TokenConfig

VERSION = 1

# packpipe's own columns in rows of tokens; a source may have none of these names.
NUMBER_COLUMNS = ("segment_ids", "position_ids")
SEGMENT_TYPES = {"seq_lens": pa.int32(), "fragment": pa.int32(), "example_index": pa.int64()}
RESERVED = (*NUMBER_COLUMNS, *SEGMENT_TYPES)

IMAGE_TOKENS = {"patches": pa.uint8(), "segment_ids": pa.int32(), "coords": pa.int16()}

# Columns of segments that rows of images have only with some options.
SOMETIMES = {
    "box": pa.list_(pa.list_(pa.int32(), 4)),
    "view": pa.list_(pa.int32()),
    "weight": pa.list_(pa.float32()),
}


def segment_schema(
    label_type: pa.DataType | None, config: PackConfig | None = None, *, weighted: bool = False
) -> pa.Schema:
    """Return the schema of the segment columns of images; without options, of those always there.

    Boxes are there if images are cropped, views if there is more than one of each.
    """
    there = () if config is None else sometimes_of(config, weighted=weighted)
    fields = [
        ("seq_lens", pa.list_(pa.int32())),
        ("grid_hw", pa.list_(pa.list_(pa.int16(), 2))),
        ("image_hw", pa.list_(pa.list_(pa.int32(), 2))),
        *((name, SOMETIMES[name]) for name in there),
        *([] if label_type is None else [("labels", pa.list_(label_type))]),
        ("example_index", pa.list_(pa.int64())),
    ]
    return pa.schema(fields)


TOKEN_SEGMENTS = {name: pa.list_(kind) for name, kind in SEGMENT_TYPES.items()}
IMAGE_SEGMENTS = {field.name: field.type for field in segment_schema(None)}


def row_schema(
    config: PackConfig,
    label_type: pa.DataType | None,
    *,
    weighted: bool = False,
    targets: TargetRules | None = None,
) -> pa.Schema:
    """Return the schema of packed rows of images."""
    widths = {"patches": config.patch_bytes, "segment_ids": 1, "coords": 2}
    kinds = dict(IMAGE_TOKENS)
    if targets is not None:
        widths["targets"] = targets.cells(config.patch_size)
        kinds["targets"] = pa.from_numpy_dtype(targets.dtype)
    tokens = [
        pa.field(name, pa.list_(kind, config.seq_len * widths[name]))
        for name, kind in kinds.items()
    ]
    return pa.schema([*tokens, *segment_schema(label_type, config, weighted=weighted)])


def sometimes_of(config: PackConfig, *, weighted: bool = False) -> list[str]:
    """Return the columns of segments that rows have beside the usual ones, by the options."""
    there = {"box": config.crops, "view": config.num_views > 1, "weight": weighted}
    return [name for name in SOMETIMES if there[name]]


def token_schema(
    config: TokenConfig, tokens: dict[str, pa.DataType], values: dict[str, pa.DataType]
) -> pa.Schema:
    """Return the schema of packed rows of tokens.

    Args:
        config: the options.
        tokens: type of the values of each token column.
        values: type of each other column.
    """
    fixed = config.layout == "fixed"
    size = config.seq_len if fixed else -1
    numbers = dict.fromkeys(NUMBER_COLUMNS, pa.int32()) if fixed else {}
    lists = {name: pa.list_(kind, size) for name, kind in (tokens | numbers).items()}
    return pa.schema(lists | {n: pa.list_(kind) for n, kind in (SEGMENT_TYPES | values).items()})
